"""The associative-memory transformer: the theory's numbers, documented weights, TransformerLens's surface."""

import copy
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from strategies import seeds, worlds
from transformer_lens import ActivationCache
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import hijack_lens as hl
from hijack_lens import theory
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig
from hijack_lens.models import RelativeAttention

# The theory's numbers


def build(world, n_ctx=80, **kwargs):
    return hl.associative_transformer(world.language, **vars(world.setting), n_ctx=n_ctx, **kwargs)


def run(world, **kwargs):
    """Logits of the model and of the theory."""
    with torch.no_grad():
        return build(world, **kwargs)(world.tokens), theory.logits(world.tokens, world.language, world.setting)


@settings(max_examples=120)
@given(worlds())
def test_model_and_theory_agree_in_float64(world):
    actual, expected = run(world, dtype=torch.float64)
    assert actual.dtype == torch.float64
    assert float((actual - expected).abs().max()) <= 1e-10


@given(worlds())
def test_model_and_theory_agree_in_float32(world):
    actual, expected = run(world, dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert float((actual - expected).abs().max()) <= 1e-4 * max(float(expected.abs().max()), 1e-3)


@settings(max_examples=30)
@given(worlds(max_vocab=12, max_length=30))
def test_attention_patterns_agree_too(world):
    model = build(world, dtype=torch.float64)
    _, cache = model.run_with_cache(world.tokens)
    for layer, expected in enumerate(theory.attention(world.tokens, world.language, world.setting)):
        pattern = cache["pattern", layer][:, 0].detach()
        torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-12)


def test_the_defaults_of_model_and_theory_agree():
    language = hl.BigramLanguage.dirichlet(7, seed=0)
    tokens = language.sample(4, 60, None, seed=0).tokens
    model = hl.associative_transformer(language)
    torch.testing.assert_close(model(tokens), theory.logits(tokens, language).float(), rtol=1e-4, atol=1e-4)


# Weights

LANGUAGE = hl.BigramLanguage([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]], tokens=list("abc"))
STRENGTHS = hl.Strengths(7.0, 5.0, 3.0, 2.0)


def outer_sum(shape, *terms):
    """The sum of scale * column row^T over terms (scale, column, row)."""
    total = torch.zeros(shape, dtype=torch.float64)
    for scale, column, row in terms:
        for i in range(shape[0]):
            for j in range(shape[1]):
                total[i, j] += scale * column[i] * row[j]
    return total


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize("d_model", [None, 8])
def test_weights_are_the_documented_sums_of_outer_products(positions, d_model):
    n_ctx_train = 4 if positions == "absolute" else None
    model = hl.associative_transformer(
        LANGUAGE,
        ["a", "c"],
        positions,
        STRENGTHS,
        n_ctx=5,
        n_ctx_train=n_ctx_train,
        d_model=d_model,
        dtype=torch.float64,
    )
    weights = model.state_dict()
    size, d, h = 3, model.cfg.d_model, model.cfg.d_head
    unit, axis = torch.eye(h, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    embed, unembed = weights["embed.W_E"], weights["unembed.W_U"].T
    previous = weights["blocks.0.attn.W_O"][0, :size]
    tokens = range(size)
    log_pi_b = [[math.log(float(LANGUAGE.pi_b[v, u])) for u in tokens] for v in tokens]
    key_to_token = outer_sum((d, h), *[(1, embed[v], unit[v]) for v in tokens])
    expected = {
        "blocks.0.attn.W_V": key_to_token,
        "blocks.0.attn.W_O": outer_sum((h, d), *[(1, unit[v], previous[v]) for v in tokens]),
        "blocks.1.attn.W_Q": outer_sum((d, h), *[(1, embed[k], unit[k]) for k in (0, 2)]),
        "blocks.1.attn.W_K": outer_sum((d, h), *[(5, previous[k], unit[k]) for k in (0, 2)]),
        "blocks.1.attn.W_V": key_to_token,
        "blocks.1.attn.W_O": outer_sum((h, d), *[(3, unit[v], unembed[v]) for v in tokens]),
        "blocks.1.mlp.W_in": outer_sum((d, size), *[(1, embed[v], axis[v]) for v in tokens]),
        "blocks.1.mlp.W_out": outer_sum(
            (size, d), *[(2 * log_pi_b[v][u], axis[v], unembed[u]) for v in tokens for u in tokens]
        ),
    }
    if d_model is not None:  # nearly orthogonal: neurons have thresholds, and values are relative to their mean
        expected["blocks.1.mlp.W_in"] = 2 * expected["blocks.1.mlp.W_in"]
        expected["blocks.1.mlp.b_in"] = -torch.ones(size, dtype=torch.float64)
        mean = [sum(row) / size for row in log_pi_b]
        expected["blocks.1.mlp.W_out"] = outer_sum(
            (size, d), *[(2 * (log_pi_b[v][u] - mean[v]), axis[v], unembed[u]) for v in tokens for u in tokens]
        )
    directions = [embed, previous, unembed]
    if positions == "relative":
        expected["blocks.0.attn.W_Q"] = key_to_token
        expected["blocks.0.attn.W_R"] = torch.stack([0 * unit[0], 7 * unit[:size].sum(0)])
    else:
        pos = weights["pos_embed.W_pos"]
        directions.append(pos)
        pairs = [(pos[t], pos[t - 1], unit[t - 1]) for t in range(1, 4)]  # positions 2 to n_ctx_train
        expected["blocks.0.attn.W_Q"] = outer_sum((d, h), *[(1, here, e) for here, _, e in pairs])
        expected["blocks.0.attn.W_K"] = outer_sum((d, h), *[(7, before, e) for _, before, e in pairs])
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.detach().squeeze(0), expected.pop(name), rtol=0, atol=1e-12)
        elif name not in ("embed.W_E", "unembed.W_U", "pos_embed.W_pos"):
            assert not bool(parameter.any()), name
    assert not expected
    if positions == "relative":
        assert not bool(weights["pos_embed.W_pos"].any())
    directions = torch.cat(directions)
    gram = directions @ directions.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(len(gram), dtype=torch.float64))
    assert (len(gram) == d and gram.equal(torch.eye(d, dtype=torch.float64))) == (d_model is None)


def test_superposition_is_approximate_and_better_with_more_dimensions():
    language = hl.BigramLanguage.dirichlet(40, seed=0)
    strengths = hl.Strengths(10.0, 4.0, 5.0, 0.1)
    tokens = language.sample(8, 30, seed=0).tokens
    expected = theory.logits(tokens, language, theory.Setting(strengths))

    def error(d_model):
        squares = []
        for seed in range(4):
            model = hl.associative_transformer(language, strengths=strengths, d_model=d_model, seed=seed)
            squares.append((model(tokens).detach() - expected).square().mean())
        return float(torch.stack(squares).mean().sqrt())

    errors = [error(d_model) for d_model in (20, 60, 119, 120, 200)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.2 * errors[2] > 0.01
    assert max(errors[3:]) < 1e-5  # 3 * 40 directions fit: exact


def test_superposed_directions_depend_on_the_seed_alone():
    language = hl.BigramLanguage.dirichlet(6, seed=0)
    first, again, other = (
        hl.associative_transformer(language, d_model=10, seed=seed).W_E
        for seed in (3, torch.Generator().manual_seed(3), 4)
    )
    assert first.equal(again)
    assert not first.equal(other)


# TransformerLens's surface


@pytest.fixture(params=["relative", "absolute"])
def model(request):
    language = hl.BigramLanguage.from_text("the quick\n queen\tquit the quiz " * 3)
    strengths = hl.Strengths(12.0, 6.0, 8.0, 1.0)
    return hl.associative_transformer(
        language, "q", request.param, strengths, n_ctx=40, dtype=torch.float64
    ).requires_grad_(False)


def expect(model, tokens, **changed):
    setting = replace(theory.Setting.of(model), strengths=replace(model.strengths, **changed))
    return theory.logits(tokens, model.language, setting)


def test_the_model_says_what_it_is(model):
    assert isinstance(model, HookedTransformer)
    assert isinstance(model, hl.BigramTransformer)
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.act_fn) == (2, 1, "relu")
    assert model.cfg.normalization_type is None
    assert model.cfg.d_mlp == model.cfg.d_vocab == model.language.d_vocab
    assert model.triggers == [model.language.index("q")]
    parts = {role: str(component) for role, component in model.circuit}
    assert parts == {"previous_token": "L0H0", "induction": "L1H0", "bigram": "L1MLP"}


def test_strings_and_tokens_are_the_same_input(model):
    text = "q\tt quick\nquiz"
    tokens = model.to_tokens(text)
    assert tokens.tolist() == [model.language.encode(text).tolist()]
    assert model.to_str_tokens(text) == model.to_str_tokens(tokens[0]) == list(text)
    assert model.to_string(tokens) == [text]
    assert model.to_string(tokens[0]) == text
    assert model.to_single_token("\n") == model.language.index("\n")
    assert model(text).equal(model(tokens))
    assert model.to_tokens(["quit", "quiz"]).tolist() == [model.language.encode(t).tolist() for t in ("quit", "quiz")]
    torch.testing.assert_close(model(text), expect(model, tokens), rtol=0, atol=1e-10)
    loss = -expect(model, tokens).log_softmax(-1)[0, range(len(text) - 1), tokens[0, 1:]].mean()
    torch.testing.assert_close(model(text, return_type="loss"), loss)


def test_words_are_tokens_too():
    language = hl.BigramLanguage.from_text("Don't stop, the cat said. The cat sat.", level="word")
    model = hl.associative_transformer(language)
    assert model.to_str_tokens("The cat, sat.") == ["The", "cat", ",", "sat", "."]
    assert model.to_tokens("Don't\n stop ,").tolist() == [[language.index(t) for t in ("Don't", "stop", ",")]]
    assert model.to_string(model.to_tokens("The cat sat")) == ["The cat sat"]


@settings(max_examples=40)
@given(st.text(min_size=2, max_size=30), st.sampled_from(["char", "word"]))
def test_the_tokenizer_encodes_any_text_as_the_language_does(text, level):
    if level == "word":
        text = f"a {text} b"
    language = hl.BigramLanguage.from_text(text, level)
    model = hl.associative_transformer(language)
    assert model.to_tokens(text).tolist() == [language.encode(text).tolist()]
    assert model.to_str_tokens(text) == [language.tokens[i] for i in language.encode(text)]


@pytest.mark.parametrize("text", ["a <unk> b", "<|endoftext|>", "<s>[UNK]</s>"])
def test_text_that_looks_like_a_special_token_is_text(text):
    language = hl.BigramLanguage.from_text((text + " xyz") * 3, max_vocab=len(set(text)) + 1)
    assert "<unk>" in language.tokens
    model = hl.associative_transformer(language)
    assert model.to_tokens(text).tolist() == [language.encode(text).tolist()]
    assert model.to_tokens("é" + text)[0, 0] == language.index("<unk>")


def test_run_with_cache_sees_every_hook_point(model):
    tokens = model.to_tokens("the quick queen q")
    logits, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    assert logits.equal(model(tokens))
    length = tokens.shape[1]
    for layer in (0, 1):
        assert cache["pattern", layer].shape == (1, 1, length, length)
    total = cache["embed"] + cache["pos_embed"] + cache["attn_out", 0] + cache["attn_out", 1] + cache["mlp_out", 1]
    torch.testing.assert_close(cache["resid_post", 1], total, rtol=0, atol=1e-12)
    torch.testing.assert_close(total @ model.W_U, logits, rtol=0, atol=1e-12)
    unfired = {name for name in model.hook_dict if name not in cache}
    flagged = ("hook_result", "_input", "hook_attn_in", "hook_mlp_in", "hook_tokens")
    assert all(name.endswith(flagged) for name in unfired), unfired


def test_relative_scores_have_a_hook_point_of_their_own(model):
    name = "blocks.0.attn.hook_rel_scores"
    tokens = model.to_tokens("the quick queen q")
    if model.positions == "absolute":
        assert name not in model.hook_dict
        return
    _, cache = model.run_with_cache(tokens)
    length = tokens.shape[1]
    expected = 12.0 * torch.ones(length - 1, dtype=torch.float64).diag(-1)  # b1 for the token before
    torch.testing.assert_close(cache[name], expected[None, None], rtol=0, atol=1e-12)
    halved = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda scores, hook: scores / 2)])
    torch.testing.assert_close(halved, expect(model, tokens, previous_token=6.0), rtol=0, atol=1e-10)
    with model.hooks(fwd_hooks=[(name, lambda scores, hook: scores * 0)]):
        blind, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(blind, expect(model, tokens, previous_token=0.0), rtol=0, atol=1e-10)
    torch.testing.assert_close(cache["pattern", 0][0, 0, 4, :5], torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(model(tokens), expect(model, tokens), rtol=0, atol=1e-10)  # the hook is gone


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.booleans(), seeds)
def test_attention_scores_add_a_key_per_offset(n_offsets, n_query, n_cached, scaled, seed):
    # score[t, s] = q_t . (k_s + r_{t-s}) / scale, r = 0 beyond the last offset; the future is masked anyway.
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=6, n_heads=2, d_head=3, n_ctx=9, use_attn_scale=scaled, act_fn="relu", d_vocab=5
    )
    attention = RelativeAttention(cfg, n_offsets, layer_id=0).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    attention.W_R.normal_(generator=generator)
    n_key = n_cached + n_query
    q = torch.randn(2, n_query, 2, 3, generator=generator, dtype=torch.float64)
    k = torch.randn(2, n_key, 2, 3, generator=generator, dtype=torch.float64)
    scores = attention.calculate_attention_scores(q, k)
    assert scores.shape == (2, 2, n_query, n_key)
    for batch, head in ((0, 0), (1, 1)):
        for t in range(n_query):
            for s in range(n_cached + t + 1):
                key, offset = k[batch, s, head], n_cached + t - s
                if offset < n_offsets:
                    key = key + attention.W_R[head, offset]
                expected = float(q[batch, t, head] @ key) / (math.sqrt(3) if scaled else 1)
                assert float(scores[batch, head, t, s]) == pytest.approx(expected, abs=1e-12)


def test_generation_is_greedy_decoding_with_and_without_a_cache(model):
    text = "quick qu"
    tokens = model.to_tokens(text)
    for _ in range(20):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    for cached in (True, False):
        greedy = {"max_new_tokens": 20, "do_sample": False, "verbose": False, "use_past_kv_cache": cached}
        assert model.generate(model.to_tokens(text), **greedy).tolist() == tokens.tolist()
        assert model.generate(text, **greedy) == model.language.decode(tokens)
        assert model.generate([text, text], **greedy) == [model.language.decode(tokens)] * 2


@settings(max_examples=20)
@given(worlds(max_vocab=12, max_length=20))
def test_a_key_value_cache_changes_no_logit(world):
    model = build(world, dtype=torch.float64).requires_grad_(False)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(world.tokens))
    steps = [model(column[:, None], past_kv_cache=cache) for column in world.tokens.T]
    torch.testing.assert_close(torch.cat(steps, 1), model(world.tokens), rtol=0, atol=1e-12)


def test_sampled_generation_does_not_depend_on_the_cache(model):
    tokens = model.to_tokens(["quick", "queen"])
    drawn = []
    for cached in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn.append(model.generate(tokens, max_new_tokens=25, verbose=False, use_past_kv_cache=cached))
    assert drawn[0].equal(drawn[1])
    assert int(drawn[0].max()) < model.language.d_vocab


@pytest.mark.parametrize("cached", [True, False])
def test_generation_stops_at_n_ctx_with_a_clear_error(model, cached):
    full = model.generate("quick", max_new_tokens=35, do_sample=False, verbose=False, use_past_kv_cache=cached)
    assert len(full) == 40
    with pytest.raises(ValueError, match="n_ctx=40"):
        model.generate("quick", max_new_tokens=37, do_sample=False, verbose=False, use_past_kv_cache=cached)


def test_a_state_dict_brings_every_number_along(model):
    tokens = model.to_tokens("the quick queen q")
    fresh = hl.associative_transformer(
        model.language, None, model.positions, hl.Strengths(1.0, 1.0, 1.0, 0.1), n_ctx=40, dtype=torch.float64
    )
    assert not fresh(tokens).equal(model(tokens))
    fresh.load_state_dict(model.state_dict())
    assert fresh(tokens).equal(model(tokens))


def test_a_deep_copy_is_a_model_of_its_own(model):
    tokens = model.to_tokens("the quick queen q")
    before = model(tokens)
    twin = copy.deepcopy(model)
    assert twin(tokens).equal(before)
    assert (twin.positions, twin.strengths, twin.circuit) == (model.positions, model.strengths, model.circuit)
    with torch.no_grad():
        twin.unembed.W_U *= 0
    assert not bool(twin(tokens).any())
    assert model(tokens).equal(before)
    _, cache = twin.run_with_cache(tokens)
    assert "blocks.0.attn.hook_pattern" in cache


def test_dtype_follows_the_model(model):
    tokens = model.to_tokens("the quick queen q")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        half = copy.deepcopy(model).to(dtype)
        logits, cache = half.run_with_cache(tokens)
        assert {activation.dtype for activation in cache.values()} == {logits.dtype} == {dtype}
        expected = expect(model, tokens)
        assert float((logits.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_every_weight_takes_gradients():
    model = hl.associative_transformer(LANGUAGE, strengths=STRENGTHS, n_ctx=8)
    model(torch.tensor([[0, 1, 2, 0, 1]]), return_type="loss").backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert bool(model.blocks[0].attn.W_R.grad.any())


# Quiet construction


def test_construction_is_silent_and_hides_no_other_warning(monkeypatch):
    from hijack_lens.models import transformer as two_layer

    def warn_too(language, tokenize=two_layer.hf_tokenizer):
        warnings.warn("something else is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("look out", UserWarning, stacklevel=1)
        return tokenize(language)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hl.associative_transformer(LANGUAGE)
    assert [str(warning.message) for warning in seen] == []
    monkeypatch.setattr(two_layer, "hf_tokenizer", warn_too)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hl.associative_transformer(LANGUAGE)
    assert [str(warning.message) for warning in seen] == ["something else is deprecated", "look out"]


@pytest.mark.parametrize("options", [{}, {"positions": "absolute"}, {"d_model": 6}])
def test_construction_leaves_the_global_random_state_alone(options, global_rng_untouched):
    hl.associative_transformer(LANGUAGE, **options)


def import_error(folder, code):
    """The last line that importing and first using hijack_lens prints after `code`, with a folder's modules first."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {code}; import hijack_lens; hijack_lens.attribute"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("found", ["2.18.0", "3.8.1", "5.0.0"])
def test_a_transformer_lens_of_another_time_is_named_at_import(tmp_path, found):
    error = import_error(tmp_path, f"import importlib.metadata as m; m.version = lambda name: {found!r}")
    assert error.startswith(f"ImportError: hijack-lens needs transformer-lens >=3.9,<5, found {found}. ")
    assert error.endswith("pip install 'transformer-lens>=3.9,<5'")


def test_an_import_that_fails_for_another_reason_says_its_own(tmp_path):
    (tmp_path / "transformer_lens.py").write_text("raise ImportError('numpy is too old')")
    assert import_error(tmp_path, "pass") == "ImportError: numpy is too old"


# Bad input

ZEROS = hl.BigramLanguage([[0.0, 1.0], [0.5, 0.5]], tokens=["a", "b"])
GOOD = hl.associative_transformer(LANGUAGE, n_ctx=4)


def construct(language=LANGUAGE, **kwargs):
    return hl.associative_transformer(language, **kwargs)


def absolute(**kwargs):
    return construct(positions="absolute", **kwargs)


VALUE_ERRORS = {
    "pi_b holds zeros .*'a' after 'a'.*floored": lambda: construct(ZEROS),
    "previous_token must be finite in a model, got inf": lambda: construct(strengths=hl.Strengths(math.inf)),
    "positions must be one of .* got 'rotary'": lambda: construct(positions="rotary"),
    "trigger 'z' is not one of": lambda: construct(triggers="z"),
    "trigger 3 is not a token id": lambda: construct(triggers=[0, 3]),
    "triggers must be distinct": lambda: construct(triggers=["a", 0]),
    "n_ctx must be at least 1, got 0": lambda: construct(n_ctx=0),
    "d_model must be at least 1, got 0": lambda: construct(d_model=0),
    "n_ctx_train is for absolute positions; .* got 5": lambda: construct(n_ctx_train=5),
    "n_ctx_train must be at least 1, got 0": lambda: absolute(n_ctx_train=0),
    "n_ctx_train must be at most n_ctx=8, got 9": lambda: absolute(n_ctx=8, n_ctx_train=9),
    "is 5 tokens long; the model takes at most n_ctx=4": lambda: GOOD(torch.tensor([[0] * 5])),
    "is 6 tokens long; the model takes at most n_ctx=4": lambda: GOOD(torch.tensor([0] * 6)),
    "is 7 tokens long; the model takes at most n_ctx=4": lambda: GOOD("abcabca"),
    "text holds 'z', which is not one of the language's 3 tokens": lambda: GOOD("abz"),
    "input must hold at least one token, got ''": lambda: GOOD(""),
    r"input must hold at least one token, got \[\]": lambda: GOOD([]),
    r"input texts must be equally long, got \[1, 2\]": lambda: GOOD(["a", "bc"]),
    "token id 3; the vocabulary has ids 0 to 2": lambda: GOOD(torch.tensor([[0, 3]])),
    "token id -1; the vocabulary has ids 0 to 2": lambda: GOOD(torch.tensor([[0, -1]])),
}
TYPE_ERRORS = {
    "n_ctx must be an int, got 8.0": lambda: construct(n_ctx=8.0),
    "d_model must be an int, got '9'": lambda: construct(d_model="9"),
    "dtype must be a floating-point torch.dtype, got torch.int64": lambda: construct(dtype=torch.int64),
    "dtype must be a .* got 'float32'": lambda: construct(dtype="float32"),
    "seed must be an int, a torch.Generator or None, got '0'": lambda: construct(seed="0"),
    "n_ctx_train must be an int, got 2.5": lambda: absolute(n_ctx_train=2.5),
    "text must be a string, got int": lambda: GOOD([1, 2]),
}


test_a_bad_value_is_refused_by_name_and_value = refused(ValueError, VALUE_ERRORS)
test_a_bad_type_is_refused_by_name_and_value = refused(TypeError, TYPE_ERRORS)
