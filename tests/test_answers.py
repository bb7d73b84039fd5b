"""Answers of language models explained without a circuit, against runs by hand."""

import pytest
import torch
from bridges_for_tests import BOOTED, modern, scattered
from browser_for_tests import Opened
from models_for_tests import hooked, native, prompts
from refusals import refused
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

import hijack_lens as hl
from hijack_lens import AnswerExplanation, attribute_sources, hooks
from hijack_lens.models.loading import load_model

TEXT = "one two three nine four two three"


def plain(factory):
    """A model without a circuit of its own."""
    model = factory()
    if hasattr(model, "circuit"):
        del model.circuit
    return model


FAMILIES = {
    "LayerNorm": lambda: plain(lambda: hooked("LN", n_layers=3)),
    "logit cap": lambda: plain(lambda: hooked("LN", output_logits_soft_cap=5.0)),
    "Gemma 2": lambda: modern("Gemma2"),
    **BOOTED,
}


def margin(model, tokens, pair, **hooks):
    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], **hooks)[0, -1]
    return float(logits[pair[0]] - logits[pair[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_attributed_and_changes_are_measured(family, unchecked):
    model, tokens, context = FAMILIES[family](), prompts(1, 8)[0], [2, 3, 4]
    tokens[3], pair = 5, [5, 1]
    said = hl.explain(model, tokens, 5, 1, context=context)
    assert isinstance(said, AnswerExplanation)
    result = attribute_sources(model, tokens, pair, context=context)
    total = margin(model, tokens, pair)
    exact = 1e-5 if family in ("Gemma 2", "Llama") else 1e-9  # these compute norms in float32
    assert said.total == pytest.approx(total, abs=exact * 10)
    for part, value in result.margin(*pair).parts.items():
        assert float(said.margin.parts[part]) == pytest.approx(float(value), abs=1e-9)
    assert float(said.margin.rest) == 0

    brought = (result.links[..., 0] - result.links[..., 1])[..., context].sum(-1)
    checks = {check.what.split(" ")[0]: check for check in said.checks}
    everything = checks["attention"]
    assert everything.attributed == pytest.approx(float(brought.sum()), abs=1e-9)

    def cut(pattern, hook, heads):
        changed = pattern.clone()
        for head in heads:
            changed[:, head, -1, context] = 0.0
        return changed

    def without(layers):
        names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in layers}
        every = [(names[n], lambda x, hook, heads=heads: cut(x, hook, heads)) for n, heads in layers.items()]
        return total - margin(model, tokens, pair, fwd_hooks=every)

    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    assert everything.measured == pytest.approx(without({n: range(n_heads) for n in range(n_layers)}), abs=exact * 100)
    best = hl.Component.of(next(name for name in checks if name.startswith("L")).removesuffix("'s"))
    assert abs(float(brought[best.layer, best.head])) == pytest.approx(float(brought.abs().max()))
    assert checks[f"{best}'s"].measured == pytest.approx(without({best.layer: [best.head]}), abs=exact * 100)

    for dose, expected in ((0, [*tokens[:2], *tokens[5:]]), (2, [*tokens[:5], *tokens[2:]])):
        assert said.doses[dose] == pytest.approx(margin(model, torch.stack(expected), pair), abs=exact * 100)
    assert said.doses[1] == said.total


def test_a_folder_without_a_tokenizer_is_a_model_of_ids(tmp_path, unchecked):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=13, n_positions=24)
    scattered(GPT2LMHeadModel(config)).save_pretrained(tmp_path)
    model, tokens = TransformerBridge.boot_transformers(str(tmp_path), device="cpu"), prompts(1, 8)[0]
    assert hl.explain(model, tokens, 5, 1).attribution.context == tuple(range(1, 7))
    with pytest.raises(ValueError, match="prompt is text, but the model has no tokenizer: give token ids"):
        hl.explain(model, "one two", 5, 1)
    with pytest.raises(ValueError, match="it has no tokenizer: save one in its folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("norm", [None, "LN"])
def test_a_bridge_that_shows_patterns_after_their_use_is_explained_as_its_twin(norm, unchecked):
    bridge, twin = native(norm)
    tokens = prompts(1, 8)[0]
    tokens[3] = 5
    found, expected = (hl.explain(model, tokens, 5, 1, context=[2, 3, 4]) for model in (bridge, plain(lambda: twin)))
    assert [check.what for check in found.checks] == [check.what for check in expected.checks]
    assert sum("attention to the context cut" in check.what for check in found.checks) == 2
    for one, other in zip(found.checks, expected.checks, strict=True):
        assert one.attributed == pytest.approx(other.attributed, abs=1e-10)
        assert one.measured == pytest.approx(other.measured, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_contrasts_difference_is_attributed_and_its_carriers_are_patched(family, unchecked):
    model, tokens, pair = FAMILIES[family](), prompts(1, 8)[0], [5, 1]
    other = torch.cat([tokens[:3], (tokens[3:4] + 3) % 7, tokens[4:]])
    said = hl.explain(model, tokens, *pair, context=[2, 3, 4], contrast=other)
    exact = 1e-4 if family in ("Gemma 2", "Llama") else 1e-9  # these compute norms in float32
    total = margin(model, tokens, pair)
    assert said.contrast.total == pytest.approx(margin(model, other, pair), abs=exact)
    own, theirs = (attribute_sources(model, x, pair, context=[2, 3, 4]).margin(*pair) for x in (tokens, other))
    assert float(said.contrast.margin.context) == pytest.approx(float(own.context - theirs.context), abs=exact)
    assert float(said.contrast.margin.weights) == pytest.approx(float(own.weights - theirs.weights), abs=exact)
    assert float(said.contrast.margin.total) == pytest.approx(total - said.contrast.total, abs=exact)
    cache = model.run_with_cache(other[None])[1]

    def patched(head):
        def edit(z, hook):
            z = z.clone()
            z[:, -1, head.head] = cache[f"blocks.{head.layer}.attn.hook_z"][:, -1, head.head]
            return z

        return total - margin(model, tokens, pair, fwd_hooks=[(f"blocks.{head.layer}.attn.hook_z", edit)])

    n_heads = model.cfg.n_layers * model.cfg.n_heads
    first_order = -hooks.attribution_patch(
        model, tokens, other, hl.logit_diff(*pair), "z", positions=-1, direction="noise"
    ).effect.squeeze()
    assert len(said.contrast.carriers) == min(4, n_heads)
    for carrier in said.contrast.carriers:
        head = hl.Component.of(carrier.what)
        assert carrier.measured == pytest.approx(patched(head), abs=exact)
        assert carrier.attributed == pytest.approx(float(first_order[head.layer, head.head]), abs=exact)
    largest = max(said.contrast.carriers, key=lambda carrier: abs(carrier.measured))
    assert f"most is carried by {largest.what} ({largest.measured:+.2f})" in said.verdict
    assert "margin loses, patched" in str(said)
    same = hl.explain(model, tokens, *pair, context=[2, 3, 4], contrast=tokens)
    assert {carrier.measured for carrier in same.contrast.carriers} == {0.0}


def test_further_candidates_are_split_by_memory_and_change_nothing_else(unchecked):
    for family in ("GPT-2", "Llama"):
        bridge = BOOTED[family]()
        alone = hl.explain(bridge, TEXT, "nine", "a", context="nine four")
        said = hl.explain(bridge, TEXT, "nine", "a", context="nine four", candidates=["five", 3])
        assert said.verdict == alone.verdict
        assert [check.what for check in said.checks] == [check.what for check in alone.checks]
        five = bridge.to_single_token("five")
        assert said.attribution.answers == (*alone.attribution.answers, five, 3)
        split = attribute_sources(bridge, TEXT, list(said.attribution.answers), context="nine four").by_memory()
        torch.testing.assert_close(said.attribution.by_memory()["context"], split["context"])
        logits = bridge(TEXT)[0, -1].detach()
        torch.testing.assert_close(said.attribution.logits.to(logits), logits[list(said.attribution.answers)])
        assert "the candidates' logits, by memory" in str(said)
        assert "candidates' logits" not in str(alone)


def test_each_prompt_of_several_has_its_own_contrast(unchecked):
    bridge, texts = BOOTED["GPT-2"](), [TEXT, "five six a b five"]
    others = [TEXT.replace("nine", "five"), "five four a b five"]
    found = hl.explain(bridge, texts, ["two", "six"], "a", context=[1, 2], contrast=others)
    for one, text, answer, other in zip(found, texts, ("two", "six"), others, strict=True):
        alone = hl.explain(bridge, text, answer, "a", context=[1, 2], contrast=other)
        assert one.verdict == alone.verdict
        assert one.contrast.prompt.tolist() == bridge.to_tokens(other)[0].tolist()


def test_the_contexts_answer_is_exchanged_for_the_likeliest_other_words(unchecked):
    model, pair = plain(lambda: hooked("LN", n_layers=3)), [5, 1]
    tokens = torch.tensor([0, 2, 5, 3, 4, 2])
    said = hl.explain(model, tokens, 5, 1, context=[1, 2, 3])
    ranked = model(tokens[None])[0, -1].argsort(descending=True).tolist()
    others = [token for token in ranked if token not in pair][:2]
    changed = [torch.tensor([0, 2, other, 3, 4, 2]) for other in others]
    expected = margin(model, tokens, pair) - sum(margin(model, one, pair) for one in changed) / 2
    swap = said.checks[0]
    assert swap.what == f"'5' in the context exchanged for '{others[0]}', '{others[1]}'"
    assert swap.measured == pytest.approx(expected, abs=1e-9)
    share = attribute_sources(model, tokens, pair, context=[1, 2, 3]).by_source()["context"][2]
    assert swap.attributed == pytest.approx(float(share[0] - share[1]), abs=1e-9)
    apart = hl.explain(model, tokens, 6, 1, context=[1, 3])
    assert not any("in the context exchanged" in check.what for check in apart.checks)


def test_the_querys_token_that_wrote_most_is_exchanged_for_what_else_is_likely_there(unchecked):
    model, pair = plain(lambda: hooked("LN", n_layers=3)), [5, 1]
    tokens = torch.tensor([0, 2, 6, 3, 4, 2, 3])
    said = hl.explain(model, tokens, 5, 1, context=[1, 2])
    shares = attribute_sources(model, tokens, pair, context=[1, 2]).by_token()
    wrote = (shares[:, 0] - shares[:, 1]).tolist()
    at = max(range(3, 6), key=lambda position: abs(wrote[position]))
    ranked = model(tokens[None, :at])[0, -1].argsort(descending=True).tolist()
    others = [token for token in ranked if token not in (*pair, int(tokens[at]))][:2]
    changed = [torch.cat([tokens[:at], torch.tensor([other]), tokens[at + 1 :]]) for other in others]
    (check,) = [check for check in said.checks if "in the query" in check.what]
    assert check.what == f"'{int(tokens[at])}' in the query exchanged for '{others[0]}', '{others[1]}'"
    assert check.attributed == pytest.approx(wrote[at], abs=1e-9)
    lost = margin(model, tokens, pair) - sum(margin(model, one, pair) for one in changed) / 2
    assert check.measured == pytest.approx(lost, abs=1e-9)
    # A query of one token, the answer's position, has no other.
    short = hl.explain(model, tokens, 5, 1, context=[1, 2, 3, 4, 5])
    assert not any("in the query" in check.what for check in short.checks)


def test_verdict_and_winner_say_what_the_margin_says():
    model = plain(lambda: hooked("LN", n_layers=3))
    for seed in range(6):
        tokens = prompts(1, 8, seed)[0]
        said = hl.explain(model, tokens, 5, 1, context=[2, 3, 4])
        assert said.winner == ("context" if said.total > 0 else "weights")
        context, weights = float(said.margin.context), float(said.margin.weights)
        if said.total > 0:
            opening = "The context wins" if context > 0 else "The weights speak for the context's answer"
            opening = "Both memories agree" if min(context, weights) > 0 else opening
        else:
            opening = "The weights win" if weights < 0 else "The context speaks against its own answer"
            opening = "Both memories agree" if max(context, weights) < 0 else opening
        first, second = ("5", "1") if said.total > 0 else ("1", "5")
        gave = f"the context gave {context:+.2f}, the weights {weights:+.2f}"
        assert said.verdict.startswith(f"{opening}: '{first}' over '{second}' by {abs(said.total):.2f} logits; {gave}")
        apart = [check for check in said.checks if check.parts]
        assert ("Attribution and intervention part" in said.verdict) == bool(apart)
        for check in said.checks:
            gap = abs(check.attributed - check.measured)
            assert check.parts == (gap > 0.5 and gap > 0.5 * max(abs(check.attributed), abs(check.measured)))


def test_batches_and_texts_of_any_length_are_each_as_alone(unchecked):
    bridge, texts = BOOTED["GPT-2"](), [TEXT, "five six a b five"]
    found = hl.explain(bridge, texts, ["two", "six"], "a", context=[1, 2])
    for one, text, answer in zip(found, texts, ("two", "six"), strict=True):
        alone = hl.explain(bridge, text, answer, "a", context=[1, 2])
        assert one.verdict == alone.verdict
        assert torch.equal(one.attribution.values, alone.attribution.values)
        assert one.names == (answer, "a")


def test_answers_of_several_tokens_are_compared_by_the_first_and_weighed_whole(unchecked):
    bridge = BOOTED["Llama"]()
    said = hl.explain(bridge, TEXT, "five six seven", "a")
    assert said.names == ("five", "a")
    tokens = bridge.to_tokens(TEXT)[0]
    ids = bridge.tokenizer.convert_tokens_to_ids(["five", "six", "seven"])
    total = 0.0
    for index, token in enumerate(ids):
        with torch.no_grad():
            logits = bridge(torch.cat([tokens, torch.tensor(ids[:index], dtype=torch.long)])[None])[0, -1]
        total += float(logits.log_softmax(-1)[token])
    assert said.whole["fivesixseven"] == pytest.approx(total, abs=1e-5)
    assert "Log-probabilities of the whole answers" in str(said)
    assert hl.explain(bridge, TEXT, "five", "a").whole == {}


@pytest.mark.browser
def test_it_is_drawn_and_reported_offline(tmp_path, browser):
    said = hl.explain(BOOTED["Llama"](), TEXT, "two", "a", context="two three")
    assert said.picture().png()
    for shown in (str(said), said._repr_html_()):
        for part in ("The ", "attribution beside interventions", "by where it entered"):
            assert part in shown
    out = hl.write_report(said, tmp_path / "r.html")
    opened = Opened(browser, out)
    opened.page.wait_for_timeout(300)
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [out.as_uri()]
    assert "Where the heads that brought most look" in opened.page.inner_text("body")


CHAT = [{"role": "user", "content": "one two"}]


def test_a_chat_is_written_by_the_tokenizers_template(monkeypatch):
    bridge = BOOTED["Llama"]()
    template = "{% for m in messages %}<end> {{ m['role'][0:0] }}{{ m['content'] }} {% endfor %}a"
    monkeypatch.setattr(bridge.tokenizer, "chat_template", template, raising=False)
    result = attribute_sources(bridge, CHAT, ["two", "b"], context="one")
    assert result.source_texts() == ["<end>", "one", "two", "a"]
    assert torch.equal(
        result.values, attribute_sources(bridge, torch.tensor([0, 2, 3, 11]), ["two", "b"], context="one").values
    )
    monkeypatch.setattr(bridge.tokenizer, "chat_template", None, raising=False)
    with pytest.raises(ValueError, match="prompt is a chat, but the model's tokenizer has no template"):
        attribute_sources(bridge, CHAT, ["two", "b"])


test_bad_input_is_refused = refused(
    ValueError,
    {
        "context does not go with a circuit": lambda: hl.explain(hooked(), prompts(1, 4)[0], 1, 2, context=[1]),
        "contrast does not go with a circuit": lambda: hl.explain(
            hooked(), prompts(1, 4)[0], 1, 2, contrast=prompts(1, 4)[0]
        ),
        "candidates does not go with a circuit": lambda: hl.explain(hooked(), prompts(1, 4)[0], 1, 2, candidates=[3]),
        "candidates must begin with tokens other than answer and foil, each its own, got": lambda: hl.explain(
            BOOTED["Llama"](), TEXT, "two", "a", candidates=["a"]
        ),
        "candidates holds 'zebra', which is not": lambda: hl.explain(
            BOOTED["Llama"](), TEXT, "two", "a", candidates=["zebra"]
        ),
        "contrast must have as many tokens as its prompt, .*, got": lambda: hl.explain(
            BOOTED["Llama"](), TEXT, "two", "a", contrast="one two"
        ),
        "contrast must be as many prompts as prompt, 1, got 2": lambda: hl.explain(
            BOOTED["Llama"](), TEXT, "two", "a", contrast=["one two", "a b"]
        ),
        "answer and foil must begin with different tokens": lambda: hl.explain(
            BOOTED["Llama"](), TEXT, "two three", "two four"
        ),
        "answer must be an output from 0 to 12, got 99": lambda: hl.explain(BOOTED["Llama"](), TEXT, 99, 1),
        "answer holds 'zebra', which is not a single token": lambda: hl.explain(BOOTED["Llama"](), TEXT, "zebra", "a"),
        "model 'none.gguf' is not a file": lambda: load_model("none.gguf"),
    },
)
