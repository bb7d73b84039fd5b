"""The main job in one call gives the numbers that its parts give, and says who won."""

import dataclasses

import pytest
import torch
from bridges_for_tests import gpt2_like, modern
from models_for_tests import close, handwritten, hooked, perturbed, prompts

import hijack_lens as hl

STRENGTHS = hl.Strengths(previous_token=6.0, match=4.5, copy=9.3, bigram=1.1)
SETTINGS = {
    "relative": {},
    "absolute": {"positions": "absolute", "n_ctx_train": 9},
    "few triggers": {"triggers": [0, 3]},
    "trigger unknown": {"triggers": [3]},
}


def prompt_for(model, repeats=2, **options):
    """The least likely successor of token 0 in context, against the most likely one."""
    row = model.language.pi_b[0].clone()
    row[0] = row[1:].mean()  # not the trigger itself
    c, g = int(row.argmin()), int(row.argmax())
    return hl.hijack_prompt(model.language, 0, c, repeats, 14, global_candidate=g, seed=0, **options)


def margin_with_zeros(model, prompt, name):
    zeros = [(name, lambda x, hook: torch.zeros_like(x))]
    logits = model.run_with_hooks(prompt.tokens[None], fwd_hooks=zeros)[0, -1].detach()
    return float(logits[prompt.in_context] - logits[prompt.global_candidate])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("repeats", [0, 3])
def test_its_numbers_are_those_of_its_parts(setting, repeats):
    model = handwritten(strengths=STRENGTHS, **SETTINGS[setting])
    prompt = prompt_for(model, repeats)
    c, g = prompt.in_context, prompt.global_candidate
    explanation = hl.explain(model, prompt)
    assert explanation.model is model
    assert explanation.prompt is prompt

    logits = model(prompt.tokens)[0, -1].detach()
    close(explanation.margin.total, logits[c] - logits[g])
    close(explanation.attribution.values, hl.attribute(model, prompt).values, atol=0)

    assert explanation.ablated == {
        "previous-token head": pytest.approx(margin_with_zeros(model, prompt, "blocks.0.attn.hook_z"), abs=1e-12),
        "induction head": pytest.approx(margin_with_zeros(model, prompt, "blocks.1.attn.hook_z"), abs=1e-12),
        "bigram memory": pytest.approx(margin_with_zeros(model, prompt, "blocks.1.hook_mlp_out"), abs=1e-12),
    }
    log_pi_b = model.language.log_pi_b[0]
    weights = STRENGTHS.bigram * float(log_pi_b[c] - log_pi_b[g])
    assert explanation.ablated["induction head"] == pytest.approx(weights, abs=1e-10)
    assert explanation.ablated["bigram memory"] == pytest.approx(float(explanation.margin.context), abs=1e-10)

    written = hl.theory.Setting(STRENGTHS, **SETTINGS[setting])
    theory = hl.theory.margin(prompt, model.language, written)
    beside = explanation.theory_beside_model()
    assert list(beside) == ["context", "weights", "rest", "total"]
    for part, (predicted, measured) in beside.items():
        assert predicted == float(getattr(theory, part))
        assert measured == float(getattr(explanation.margin, part))
        assert measured == pytest.approx(predicted, abs=1e-10)
    assert beside["rest"] == (0.0, 0.0)
    flip = hl.theory.min_repeats(model.language, 0, c, g, written, length=14)
    assert explanation.flip == flip


def test_the_verdict_names_the_winner_and_by_how_much():
    language = hl.BigramLanguage.from_text("ab ab ab ac \n", level="char")
    for strengths, winner in ((hl.Strengths(copy=20.0), "context"), (hl.Strengths(copy=0.1), "weights")):
        model = hl.associative_transformer(language, strengths=strengths, dtype=torch.float64, device="cpu")
        prompt = hl.hijack_prompt(language, "a", " ", 2, 10, global_candidate="b", seed=0)
        explanation = hl.explain(model, prompt)
        logits = model(prompt.tokens)[0, -1].detach()
        margin = float(logits[language.index(" ")] - logits[language.index("b")])
        assert explanation.winner == winner
        if winner == "context":
            expected = f"The context hijacks the weights: after 'a' the model prefers '␣' to 'b', by {margin:.2f}"
        else:
            expected = f"The weights overrule the context: after 'a' the model prefers 'b' to '␣', by {-margin:.2f}"
        assert margin * (1 if winner == "context" else -1) > 0
        assert explanation.verdict == f"{expected} logits."


def test_the_flip_is_where_the_verdict_turns():
    """With neutral filler that holds no candidate, as the closed form has it."""
    model = handwritten(strengths=STRENGTHS, n_ctx=32)
    explanations = [hl.explain(model, prompt_for(model, n, filler="avoid")) for n in range(7)]
    winners = [explanation.winner for explanation in explanations]
    least = explanations[0].flip.repeats
    assert least is not None
    assert 0 < least < 7
    assert winners.index("context") == least


def test_a_model_whose_tables_cannot_be_read_has_no_theory():
    model = perturbed(n_ctx=16)
    model.strengths = None
    explanation = hl.explain(model, prompt_for(model))
    assert explanation.theory is None
    assert explanation.flip is None
    assert explanation.theory_beside_model() == {}
    assert set(explanation.ablated) == {"previous-token head", "induction head", "bigram memory"}


def test_roles_that_nothing_plays_are_not_ablated():
    model = handwritten()
    model.circuit = hl.Circuit(induction=model.circuit.induction)
    assert set(hl.explain(model, prompt_for(model)).ablated) == {"induction head"}


def test_it_leaves_the_model_as_it_was():
    model, tokens = handwritten(), prompts()
    model.hook_dict["blocks.0.hook_resid_pre"].add_perma_hook(lambda x, hook: None)
    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    logits = model(tokens)
    hl.explain(model, prompt_for(model))
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    assert torch.equal(model(tokens), logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_it_cannot_explain_is_refused_with_the_reason(unchecked):
    model = handwritten()
    prompt = prompt_for(model)
    with pytest.raises(TypeError, match="model must be a BigramTransformer, got HookedTransformer"):
        hl.explain(hooked(), prompt)
    with pytest.raises(TypeError, match=r"prompt must be a HijackPrompt or Tensor \[pos\], got tensor"):
        dataclasses.replace(hl.explain(model, prompt), prompt=prompts())
    several = hl.hijack_prompt(model.language, 0, 1, 2, 12, n_prompts=2, seed=0)
    with pytest.raises(ValueError, match="prompt must be a single prompt, got HijackPrompt"):
        dataclasses.replace(hl.explain(model, prompt), prompt=several)
    with pytest.raises(TypeError, match="total must be a float, got 'large'"):
        dataclasses.replace(hl.explain(model, prompt), total="large")
    with pytest.raises(TypeError, match="answer and foil must be given with a Tensor: only a HijackPrompt has"):
        hl.explain(model, prompt.tokens)
    with pytest.raises(TypeError, match="answer and foil must be given with a str: only a HijackPrompt has"):
        hl.explain(model, "012")
    with pytest.raises(ValueError, match="answer must be one token, or one for each of 2 prompts, got 3"):
        hl.explain(model, prompts(), [1, 2, 3], 0)
    with pytest.raises(ValueError, match="prompt must hold at least one token, got ' '"):
        hl.explain(model, " ", 1, 2)
    with pytest.raises(ValueError, match="prompt is text, but the model has no tokenizer"):
        hl.explain(hooked(), ["0 1", "2"], 1, 2)
    with pytest.raises(ValueError, match="of the model's language"):
        hl.explain(handwritten(d_vocab=9), prompt)
    with pytest.raises(ValueError, match=r"14 tokens long.*n_ctx=10"):
        hl.explain(handwritten(n_ctx=10), prompt)


def test_a_verdict_says_when_both_memories_agree_and_when_neither_candidate_comes_first():
    language = hl.BigramLanguage.from_text(hl.default_text())
    model = hl.associative_transformer(language)
    agreeing = hl.explain(model, hl.hijack_prompt(language, "q", "_", 3, 64, global_candidate="z", seed=0))
    assert float(agreeing.margin.context) > 0
    assert float(agreeing.margin.weights) > 0
    assert agreeing.verdict.startswith("Both memories agree: after 'q' the model prefers '_' to 'z'")
    outvoted = hl.explain(model, hl.hijack_prompt(language, "q", "a", 0, 64, global_candidate="b", seed=3))
    first = language.display(int(outvoted.attribution.logits.argmax()))
    assert first not in ("a", "b")
    assert outvoted.verdict.endswith(f"(Its first choice is neither, but {first!r}.)")
    even = hl.BigramLanguage([[0.02, 0.04, 0.04, 0.9]] + [[0.25] * 4] * 3)
    tie = hl.explain(hl.associative_transformer(even), hl.hijack_prompt(even, 0, 1, 0, 8, global_candidate=2, seed=0))
    assert tie.verdict == (
        "Neither memory wins: after '0', '1' and '2' have the same logit. (Its first choice is neither, but '3'.)"
    )


# Several prompts


def same(one, other):
    assert one.names == other.names
    assert one.texts == other.texts
    assert one.verdict == other.verdict
    close(one.attribution.values, other.attribution.values, atol=1e-12)
    assert one.ablated == pytest.approx(other.ablated, abs=1e-12)


@pytest.mark.parametrize("family", ["hooked", "bridge"])
def test_a_batch_is_explained_prompt_by_prompt(family, unchecked):
    model = hooked("LN", n_layers=3) if family == "hooked" else gpt2_like()
    circuit, tokens = hl.Circuit(induction=(hl.Component(1, "head", 0),)), prompts(3, 5)
    found = hl.explain(model, tokens, [1, 2, 3], 4, circuit=circuit)
    assert [type(one) for one in found] == [hl.Explanation] * 3
    for one, ids, answer in zip(found, tokens, (1, 2, 3), strict=True):
        same(one, hl.explain(model, ids, answer, 4, circuit=circuit))
        assert one.attribution.candidates == (answer, 4)
    same(hl.explain(model, tokens[:1], 1, 4, circuit=circuit), found[0])


def test_texts_of_any_lengths_are_explained_each_as_it_is_alone(unchecked):
    bridge, circuit = gpt2_like(), hl.Circuit(induction=(hl.Component(1, "head", 0),))
    texts = ["one two one", "seven eight nine a b seven", "two"]
    found = hl.explain(bridge, texts, ["two", "eight", "one"], ["a", "b", "a"], circuit=circuit)
    for one, text, answer, foil in zip(found, texts, ("two", "eight", "one"), "aba", strict=True):
        same(one, hl.explain(bridge, text, answer, foil, circuit=circuit))
        with torch.no_grad():
            logits = bridge(bridge.to_tokens(text))[0, -1]
        first, second = (bridge.tokenizer.convert_tokens_to_ids(word) for word in (answer, foil))
        assert one.total == pytest.approx(float(logits[first] - logits[second]), abs=1e-12)
    assert len(hl.explain(bridge, texts[:1], "two", "a", circuit=circuit)) == 1


def test_a_batch_of_hijack_prompts_is_explained_too():
    model = handwritten()
    batch = prompt_for(model, n_prompts=3)
    for index, one in enumerate(hl.explain(model, batch)):
        assert torch.equal(one.prompt.tokens, batch.tokens[index])
        close(one.margin.total, hl.attribute(model, batch)[index].margin().total)
        assert one.flip == hl.explain(model, one.prompt).flip


# Logits that are no sum over paths

NO_SUMS = {
    "logit cap": (lambda: hooked("LN", output_logits_soft_cap=5.0), "caps its logits"),
    "norms after": (lambda: hooked("RMS", use_normalization_before_and_after=True), "norms of all that heads write"),
    "OLMo 2": (
        lambda: hooked("RMS", original_architecture="Olmo2ForCausalLM", n_layers=2),
        "norms or scales what the heads of layer 0 write",
    ),
    "Gemma2 bridge": (lambda: modern("Gemma2"), "caps its logits"),
    "Gemma3 bridge": (lambda: modern("Gemma3"), "norms or scales what the heads of layer 0 write"),
    "Olmo2 bridge": (lambda: modern("Olmo2"), "norms or scales what the heads of layer 0 write"),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_without_paths_there_are_verdict_and_ablations_and_the_reason(name, tmp_path, unchecked):
    build, reason = NO_SUMS[name]
    model, tokens = build(), prompts(1, 6)[0]
    circuit = hl.Circuit((hl.Component(0, "head", 1),), (hl.Component(1, "head", 0),), (hl.Component(1, "mlp"),))
    explanation = hl.explain(model, tokens, 1, 2, circuit=circuit)
    with torch.no_grad():
        logits = model(tokens[None])[0, -1]
        zeros = [("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]
        ablated = model.run_with_hooks(tokens[None], fwd_hooks=zeros)[0, -1]
    assert explanation.attribution is None
    assert reason in explanation.not_split
    assert explanation.total == pytest.approx(float(logits[1] - logits[2]), abs=1e-12)
    assert explanation.ablated["bigram memory"] == pytest.approx(float(ablated[1] - ablated[2]), abs=1e-12)
    assert set(explanation.ablated) == {"previous-token head", "induction head", "bigram memory"}
    preferred, other = explanation.names if explanation.total > 0 else explanation.names[::-1]
    by = abs(explanation.total)
    said = (
        f"the model prefers {preferred!r} to {other!r}, by {by:.2f} logits; which memory wrote that is not split: model"
    )
    assert said in explanation.verdict
    assert reason in explanation.verdict
    for shown in (
        repr(explanation),
        explanation._repr_html_(),
        hl.write_report(explanation, tmp_path / "r.html").read_text(),
    ):
        assert reason in shown
    assert explanation.picture().png()
    with pytest.raises(ValueError, match="is not split by memory: model"):
        _ = explanation.margin
    with pytest.raises(ValueError, match=reason):
        hl.attribute(model, tokens, answers=[1, 2])


def test_of_a_deep_model_roles_are_held_at_means_and_the_verdict_goes_by_source_tokens(tmp_path):
    model, tokens = hooked("LN", n_layers=3), prompts(1, 6)[0]
    circuit = hl.Circuit(induction=(hl.Component(2, "head", 0),), bigram=(hl.Component(0, "mlp"),))
    orders = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).argsort(1)
    others = torch.cat([tokens[:1].expand(8, 1), tokens[1:][orders]], 1)
    cache = model.run_with_cache(others)[1]

    def held(x, hook):
        x = x.clone()
        if hook.name.endswith("hook_z"):
            x[:, :, 0] = cache[hook.name][:, :, 0].mean(0)
        else:
            x[:] = cache[hook.name].mean(0)
        return x

    seen = set()
    for answer, foil in ((1, 2), (2, 1), (3, 5), (5, 3), (4, 6), (6, 4)):
        found = hl.explain(model, tokens, answer, foil, circuit=circuit)
        for role, name in (("induction head", "blocks.2.attn.hook_z"), ("bigram memory", "blocks.0.hook_mlp_out")):
            without = model.run_with_hooks(tokens[None], fwd_hooks=[(name, held)])[0, -1].detach()
            assert found.ablated[role] == pytest.approx(float(without[answer] - without[foil]), abs=1e-9)
            intact = model(tokens[None])[0, -1].detach().softmax(-1)
            worse = float(-(intact * without.log_softmax(-1)).sum()) > torch.tensor(7.0).log()
            assert (role in found.broken) == worse
        by_source = hl.attribute_sources(model, tokens, [answer, foil]).margin()
        rest, total = float(found.margin.rest), float(found.margin.total)
        left_to_others = rest * total > 0 and abs(rest) >= abs(total - rest)
        assert (found.by_source is not None) == left_to_others
        if left_to_others:
            seen.add(found.verdict.split(":")[0])
            close(found.by_source.context, by_source.context)
            assert f"the context gave {float(by_source.context):+.2f}, the weights" in found.verdict
            assert not found.verdict.startswith("Neither")
            assert found.winner == ("context" if total > 0 else "weights")
    assert seen
    page = hl.write_report(found, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "output set to its mean over other orders of the prompt" in page
    assert "set to zero" not in page
    said = "Without its induction head, the model predicts worse than a uniform guess would"
    assert said not in page
    broken = dataclasses.replace(found, broken=("induction head",))
    assert said in hl.write_report(broken, tmp_path / "report.html").read_text(encoding="utf-8")
    assert said in " ".join(str(broken).split())
    assert "set to its mean" in str(found)
