"""What heads read of the context's answer: turned up and down, and the heads found that carry it."""

from fractions import Fraction

import pytest
import torch
from bridges_for_tests import BOOTED
from models_for_tests import close, handwritten, hooked, prompts
from refusals import refused

import hijack_lens as hl
from hijack_lens import Carriers, Component, attribute_sources, find_carriers, hooks
from hijack_lens.language import RELATIONS, Fact

HEADS = (Component(1, "head", 0), Component(1, "head", 1), Component(0, "head", 1))
FAMILIES = {"LayerNorm": lambda: hooked("LN", n_layers=3), **BOOTED}


def turned_by_hand(model, tokens, heads, factor, keys, queries):
    """Logits with what the heads bring to some positions from some keys multiplied, by edits of hook_z alone."""
    seen = {}

    def keep(activation, hook, name):
        seen[name] = activation

    def edit(z, hook, layer):
        pattern, v = seen[f"pattern{layer}"], seen[f"v{layer}"]
        v = v.repeat_interleave(model.cfg.n_heads // v.shape[2], 2)
        changed = z.clone()
        for head in heads:
            if head.layer == layer:
                brought = torch.einsum("bqs,bse->bqe", pattern[:, head.head][:, :, keys], v[:, keys, head.head])
                changed[:, queries, head.head] += (float(factor) - 1) * brought[:, queries]
        return changed

    fwd_hooks = []
    for layer in sorted({head.layer for head in heads}):
        at = f"blocks.{layer}.attn"
        fwd_hooks += [
            (f"{at}.hook_pattern", lambda x, hook, layer=layer: keep(x, hook, f"pattern{layer}")),
            (f"{at}.hook_v", lambda x, hook, layer=layer: keep(x, hook, f"v{layer}")),
            (f"{at}.hook_z", lambda x, hook, layer=layer: edit(x, hook, layer)),
        ]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=fwd_hooks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [0.0, Fraction(3)])
def test_what_heads_bring_from_some_tokens_is_multiplied_and_nothing_else(family, factor):
    model = FAMILIES[family]()
    tokens = prompts(2, 6, d_vocab=7)
    expected = turned_by_hand(model, tokens, HEADS, factor, [1, 3], [5])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, [1, 3]] = True
    for source in ([1, 3], mask, mask[:1]):
        with torch.no_grad(), hooks.scale(model, HEADS, factor, source=source):
            close(model(tokens), expected)
    every = turned_by_hand(model, tokens, HEADS, factor, [1, 3], [2, 3, 4, 5])
    with torch.no_grad(), hooks.scale(model, HEADS, factor, source=[1, 3], positions=[2, 3, 4, 5]):
        close(model(tokens), every)
    with torch.no_grad():
        given = model.run_with_hooks(tokens, fwd_hooks=hooks.scale(model, HEADS, factor, source=[1, 3]).fwd_hooks)
    close(given, expected)


def test_a_factor_of_whole_components():
    model, tokens = hooked("LN", n_layers=3), prompts(2, 6)
    parts = (Component(1, "head", 0), Component(2, "mlp"), "blocks.0.hook_attn_out")
    with torch.no_grad():
        plain = model(tokens)
        with hooks.ablate(model, parts, positions=-1):
            off = model(tokens)
        with hooks.scale(model, parts, 0.0):
            assert torch.equal(model(tokens), off)
        with hooks.scale(model, parts, 1.0, positions=None):
            assert torch.equal(model(tokens), plain)

        def double(activation, hook):
            return 2 * activation

        doubled = model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_mlp_out", double)])
        with hooks.scale(model, "L2MLP", 2.0, positions=None):
            close(model(tokens), doubled)


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "learned positions", "relative"])
def test_text_is_found_in_each_prompt_and_others_stay_to_the_bit(family):
    if family in BOOTED:
        model, heads = BOOTED[family](), HEADS
        texts = ["one two three a b four", "five six seven a nine two", "two three one six a b"]
    else:
        model = hooked("LN", n_layers=2) if family == "learned positions" else handwritten(7)
        model.tokenizer, heads = handwritten(7).tokenizer, (Component(1, "head", 0), Component(0, "head", 0))
        names = handwritten(7).language.tokens
        words = dict(zip(["one", "two", "three", "a", "b", "four", "nine"], names, strict=True))
        texts = ["one two three a b four", "four b a nine two one", "two three one four a b"]
    tokens = torch.cat([as_tokens(model, [words[w] for w in t.split()] if family not in BOOTED else t) for t in texts])
    start, last = tokens.shape[1] - 6, tokens.shape[1] - 1
    sought = "two three" if family in BOOTED else " ".join([words["two"], words["three"]])
    nine = "nine" if family in BOOTED else words["nine"]
    with torch.no_grad():
        plain = model(tokens)
        with hooks.scale(model, heads, 4.0, source=sought):
            found = model(tokens)
        assert torch.equal(found[1], plain[1])
        for row, keys in ((0, [1, 2]), (2, [0, 1])):
            expected = turned_by_hand(model, tokens, heads, 4.0, [start + key for key in keys], [last])
            close(found[row], expected[row])
        with hooks.scale(model, heads, 4.0, source=[sought, nine]):
            assert not torch.equal(model(tokens)[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_text_is_found_in_half_precision(dtype):
    model, tokens = handwritten(7, dtype=dtype), torch.tensor([[1, 2, 3, 1]])
    with torch.no_grad():
        plain = model(tokens)
        with hooks.scale(model, "L1H0", 0.3, source=[1]):
            expected = model(tokens)
        for token, logits in ((2, expected), (5, plain)):
            with hooks.scale(model, "L1H0", 0.3, source=model.language.tokens[token]):
                assert torch.equal(model(tokens), logits)
    assert not torch.equal(expected, plain)


def as_tokens(model, text):
    if isinstance(text, str):
        return model.to_tokens(text)
    return torch.tensor([model.tokenizer.convert_tokens_to_ids(text)])


def check_cache(model):
    """Skips where TransformerLens itself does not attend to what is in the cache, as 4.3 with transformers 5.24."""
    seen = []
    with (
        torch.no_grad(),
        hooks.Intervention(model, look=[("blocks.0.attn.hook_pattern", lambda x, hook: seen.append(x))]),
    ):
        model.generate(prompts(1, 5), max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
    if seen[-1].shape[-1] == 1:
        pytest.skip("this TransformerLens's bridges lose the cache of this transformers: what is generated is wrong")


@pytest.mark.parametrize("family", ["HookedTransformer", "Llama"])
def test_with_a_key_value_cache_each_new_token_is_steered_as_the_last(family):
    if family == "Llama":
        model, tokens = BOOTED["Llama"](), prompts(1, 5, d_vocab=13)
    else:
        language = hl.BigramLanguage.dirichlet(7, seed=0)
        model, tokens = handwritten(7), prompts(1, 5)
        assert model.language.d_vocab == language.d_vocab
    heads = (Component(1, "head", 0), Component(0, "head", 0))
    check_cache(model)
    carriers = _carriers(heads, 5.0)
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    with torch.no_grad():
        with hooks.steer(model, carriers, [1, 3]):
            cached = model.generate(tokens, use_past_kv_cache=True, **options)
        by_hand = tokens
        for _ in range(4):
            queries = range(4, by_hand.shape[1])
            with hooks.scale(model, heads, 5.0, source=[1, 3], positions=queries):
                by_hand = torch.cat([by_hand, model(by_hand)[:, -1:].argmax(-1)], 1)
        plain = model.generate(tokens, use_past_kv_cache=True, **options)
    assert cached.tolist() == by_hand.tolist()
    assert plain.shape == cached.shape


def test_a_cache_that_was_filled_before_is_refused():
    model = BOOTED["Llama"]()
    check_cache(model)
    tokens = prompts(1, 5, d_vocab=13)
    with torch.no_grad():
        cache = model.original_model(tokens, use_cache=True).past_key_values
        with hooks.scale(model, HEADS[0], 2.0, source=[1]), pytest.raises(RuntimeError, match="enter it before"):
            model.original_model(tokens[:, :1], past_key_values=cache, use_cache=True)


def _carriers(heads, strength):
    flow = torch.zeros(4, 2, 4)
    return Carriers(heads, strength, flow, 0.0, (1,), (1.0,), torch.zeros(1, 2), torch.zeros(1, 2))


def test_steering_turns_the_carriers_at_the_source_by_the_strength():
    model, tokens = hooked("LN", n_layers=3), prompts(2, 6)
    carriers = _carriers(HEADS, 3.0)
    for toward, strength, factor in (
        ("context", None, 3.0),
        ("context", 0.0, 0.0),
        ("context", 2.0, 2.0),
        ("weights", None, 0.0),
        ("weights", 4.0, 0.25),
    ):
        expected = turned_by_hand(model, tokens, HEADS, factor, [1, 2], [5])
        with torch.no_grad(), hooks.steer(model, carriers, [1, 2], toward, strength):
            close(model(tokens), expected)


@pytest.fixture(scope="module")
def copying():
    """A two-layer model, and prompts in which its weights and its context disagree."""
    model = handwritten(20, strengths=hl.Strengths(match=6.0, copy=6.0, bigram=0.3))
    said = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        q, c = torch.randperm(20, generator=generator)[:2].tolist()
        if model.language.global_candidate(q) != c:
            said.append(hl.hijack_prompt(model.language, q, c, repeats=2, length=20, seed=seed))
    return model, said


def answers_of(model, said):
    return [[model.language.tokens[getattr(p, name)] for p in said] for name in ("in_context", "global_candidate")]


def test_the_induction_head_is_found_and_its_flow_is_its_link(copying):
    model, said = copying
    texts = [prompt.text for prompt in said]
    context, weights = (
        [model.language.tokens[getattr(p, n)] for p in said] for n in ("in_context", "global_candidate")
    )
    found = find_carriers(model, texts, context, weights)
    assert found.heads == (Component(1, "head", 0),)
    for row, prompt in enumerate(said):
        answers = [prompt.in_context, prompt.global_candidate]
        links = attribute_sources(model, prompt.tokens, answers).links
        at = (prompt.tokens == prompt.in_context).nonzero().flatten()
        expected = (links[..., 0] - links[..., 1])[:, :, at].sum(-1)
        close(found.flow[row], expected)
    table = found.to_pandas()
    assert table["head"].tolist() == ["L1H0", "L0H0"]
    assert table["named"].tolist() == [True, False]
    assert table["flow"][0] == pytest.approx(float(found.flow[:, 1, 0].mean()))
    tried = found.tried()
    for row in tried.itertuples():
        counts = {"context": 0, "weights": 0}
        for prompt in said:
            mask = (prompt.tokens == prompt.in_context)[None]
            with torch.no_grad(), hooks.scale(model, "L1H0", row.strength, source=mask):
                best = int(model(prompt.tokens[None])[0, -1].argmax())
            counts["context"] += best == prompt.in_context
            counts["weights"] += best == prompt.global_candidate
        assert row.context == pytest.approx(counts["context"] / len(said))
        assert row.weights == pytest.approx(counts["weights"] / len(said))
    assert found.strength in found.strengths


def test_carriers_show_and_save_themselves(copying, tmp_path):
    model, said = copying
    found = find_carriers(model, [prompt.text for prompt in said], *answers_of(model, said))
    found.save(tmp_path / "carriers")
    again = Carriers.load(tmp_path / "carriers")
    assert again.heads == found.heads
    assert torch.equal(again.by_strength, found.by_strength)
    assert "L1H0" in str(found)
    assert "L1H0" in found._repr_html_()


def test_relations_have_hundreds_of_facts_each_denied_by_another_subjects_answer():
    assert len(RELATIONS) >= 5
    assert sum(len(relation.answers) for relation in RELATIONS.values()) >= 200
    for relation in RELATIONS.values():
        subjects = [subject for subject, _ in relation.answers]
        assert len(set(subjects)) == len(subjects)
        facts = relation.facts(seed=3)
        answers = {answer for _, answer in relation.answers}
        assert [(fact.subject, fact.weights) for fact in facts] == list(relation.answers)
        assert all(fact.context in answers and fact.context != fact.weights for fact in facts)
        assert facts == relation.facts(seed=3) != relation.facts(seed=4)


FACTS = [Fact("one", "two", "three", "a {subject} b {answer}.")] * 4

test_bad_input_is_refused = refused(
    ValueError,
    {
        "prompts must be at least 4, got 1": lambda: find_carriers(BOOTED["Llama"](), FACTS[:1]),
        "context and weights come with Facts": lambda: find_carriers(BOOTED["Llama"](), FACTS, ["a"] * 4),
        "context must hold an answer for each of 4 prompts, got 2": lambda: find_carriers(
            BOOTED["Llama"](), ["a b"] * 4, ["a"] * 2, ["b"] * 4
        ),
        r"prompts\[0\] must hold the context's answer 'two'": lambda: find_carriers(
            BOOTED["Llama"](), ["a b"] * 4, ["two"] * 4, ["b"] * 4
        ),
        r"prompts\[0\]: the answers 'one' and 'one' begin with the same token": lambda: find_carriers(
            BOOTED["Llama"](), ["a one b"] * 4, ["one"] * 4, ["one"] * 4
        ),
        "factor must be a finite number >= 0": lambda: hooks.scale(hooked(), "L0H0", -1.0),
        "components: 'hook_nowhere' is not a hook point": lambda: hooks.scale(hooked(), "hook_nowhere", 2.0),
        "components must be attention heads": lambda: hooks.scale(hooked(), "L0MLP", 2.0, source=[1]),
        "source is text, but the model has no tokenizer": lambda: hooks.scale(hooked(), "L0H0", 2.0, source="a"),
        "source must be words that the model's tokenizer knows, got 'zebra'": lambda: hooks.scale(
            BOOTED["Llama"](), "L0H0", 2.0, source="zebra"
        ),
        "source must be positions counted from the front": lambda: hooks.scale(hooked(), "L0H0", 2.0, source=[-1]),
        "toward must be one of 'context', 'weights'": lambda: hooks.steer(
            hooked(), _carriers(HEADS[:1], 2.0), [1], "both"
        ),
    },
)
