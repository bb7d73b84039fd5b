"""Patching agrees with running the source, with TransformerLens's own patching, and with a loop by hand."""

from itertools import product

import pytest
import torch
from models_for_tests import MLPS, close, handwritten, hooked, native, perturbed, prompts
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks import patch

MODELS = {
    "hand-written": handwritten,
    "perturbed": perturbed,
    "absolute": lambda: perturbed(positions="absolute"),
    "no norm": lambda: hooked(None, "relu"),
    "LayerNorm": lambda: hooked("LN"),
    "RMSNorm": lambda: hooked("RMS", "silu"),
    "native bridge": lambda: native()[0],
    "native bridge with LayerNorm": lambda: native("LN")[0],
}
STREAM = [
    "hook_embed",
    *(f"blocks.{layer}.hook_resid_{at}" for layer in (0, 1) for at in ("pre", "mid", "post")),
]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def double_results():
    """TransformerLens stores what its patching finds in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def every_component(model):
    return [
        *(hl.Component(layer, "head", head) for layer in (0, 1) for head in range(model.cfg.n_heads)),
        *MLPS,
    ]


def test_patching_from_the_same_prompt_is_the_identity_to_the_bit(model):
    tokens = prompts(3)
    logits, cache = model.run_with_cache(tokens)
    for source in (tokens, cache):
        with patch(model, every_component(model), source):
            assert torch.equal(model(tokens), logits)
        for component in every_component(model):
            with patch(model, component, source, positions=[0, -1]):
                assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("build", [perturbed, lambda: hooked("LN")], ids=["perturbed", "LayerNorm"])
def test_patching_a_pattern_from_the_same_prompt_is_the_identity_to_the_bit(build):
    model, tokens = build(), prompts(3)
    logits, cache = model.run_with_cache(tokens)
    with patch(model, model.circuit.induction, cache, part="pattern"):
        assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("name", STREAM)
def test_patching_the_whole_residual_stream_runs_the_source(model, name):
    if name.endswith("resid_mid") and isinstance(model, TransformerBridge):
        pytest.skip("refused on a TransformerBridge, see test_hooks_safety")
    tokens, source = prompts(3), prompts(3, seed=1)
    expected, cache = model.run_with_cache(source)
    for given in (source, cache):
        with patch(model, name, given):
            close(model(tokens), expected, atol=1e-12)


def test_a_stream_patched_at_some_positions_is_the_source_there_and_the_run_elsewhere(model):
    tokens, source, name = prompts(3), prompts(3, seed=1), "blocks.1.hook_resid_pre"
    _, ours = model.run_with_cache(tokens)
    _, theirs = model.run_with_cache(source)
    with patch(model, name, source, positions=[2, -1]):
        _, patched = model.run_with_cache(tokens)
    for position in range(5):
        assert torch.equal(patched[name][:, position], (theirs if position in (2, 4) else ours)[name][:, position])


def test_one_prompt_is_a_source_for_a_batch(model):
    tokens, source = prompts(3), prompts(1, seed=1)
    with patch(model, MLPS[0], source.expand(3, -1)):
        expected = model(tokens)
    _, squeezed = model.run_with_cache(source, remove_batch_dim=True)
    for given in (source, source[0], source[0].tolist(), squeezed):
        with patch(model, MLPS[0], given):
            close(model(tokens), expected, atol=1e-12)


def test_clean_and_corrupted_prompts_differ_in_effect_only_through_the_continuation():
    model = handwritten(strengths=hl.Strengths(20.0, 6.0, 10.0, 1.0))
    prompt = hl.hijack_prompt(model.language, 0, 3, 1, 12, distance=4, filler="avoid", global_candidate=5, seed=0)
    after_trigger = len(prompt) - 1 - 4 + 1
    assert (prompt.clean != prompt.corrupted).nonzero().tolist() == [[after_trigger]]
    corrupted = model(prompt.corrupted)
    with patch(model, "blocks.1.hook_resid_pre", prompt.clean, positions=after_trigger):
        close(model(prompt.corrupted)[0, -1], model(prompt.clean)[0, -1])
    with patch(model, "blocks.1.hook_resid_pre", prompt.clean, positions=range(after_trigger)):
        close(model(prompt.corrupted)[0, -1], corrupted[0, -1])


def test_its_fwd_hooks_do_the_same_as_the_context(model):
    tokens, source = prompts(3), prompts(3, seed=1)
    patching_ = patch(model, [MLPS[0], hl.Component(1, "head", 0)], source, positions=3)
    with patching_:
        inside = model(tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=patching_.fwd_hooks), inside)
    assert not torch.equal(model(tokens), inside)


def test_the_source_runs_once_and_is_not_read_again(model):
    tokens, source = prompts(3), prompts(3, seed=1)
    patching_ = patch(model, MLPS[0], source)
    with patching_:
        expected = model(tokens)
    with hooks.ablate(model, MLPS[0]), patching_:
        assert torch.equal(model(tokens), expected)
    source.zero_()
    with patching_:
        assert torch.equal(model(tokens), expected)


TRANSFORMER_LENS = {
    # The axes of each result, and the same patch as ours.
    "resid_pre": ("layer pos", lambda m, s, n, p: patch(m, f"blocks.{n}.hook_resid_pre", s, p)),
    "resid_mid": ("layer pos", lambda m, s, n, p: patch(m, f"blocks.{n}.hook_resid_mid", s, p)),
    "attn_out": ("layer pos", lambda m, s, n, p: patch(m, f"blocks.{n}.hook_attn_out", s, p)),
    "mlp_out": ("layer pos", lambda m, s, n, p: patch(m, hl.Component(n, "mlp"), s, p)),
    "attn_head_out_by_pos": (
        "layer pos head",
        lambda m, s, n, p, h: patch(m, hl.Component(n, "head", h), s, p),
    ),
    "attn_head_out_all_pos": ("layer head", lambda m, s, n, h: patch(m, hl.Component(n, "head", h), s)),
    "attn_head_pattern_by_pos": (
        "layer head pos",
        lambda m, s, n, h, p: patch(m, hl.Component(n, "head", h), s, p, part="pattern"),
    ),
    "attn_head_pattern_all_pos": (
        "layer head",
        lambda m, s, n, h: patch(m, hl.Component(n, "head", h), s, part="pattern"),
    ),
}
IGNORED_BY_BRIDGES = ["resid_mid", "attn_head_pattern_by_pos", "attn_head_pattern_all_pos"]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (build, name)
        for build in ("perturbed", "LayerNorm", "native bridge", "native bridge with LayerNorm")
        for name in TRANSFORMER_LENS
        if not ("bridge" in build and name in IGNORED_BY_BRIDGES)
    ],
)
def test_patching_equals_transformer_lens_patching(build, name, double_results):
    model, clean, corrupted = MODELS[build](), prompts(2, 4), prompts(2, 4, seed=1)
    axes, ours = TRANSFORMER_LENS[name]
    _, cache = model.run_with_cache(clean)
    weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))

    def metric(logits):
        return (logits.detach() * weights).sum()

    theirs = getattr(patching, f"get_act_patch_{name}")(model, corrupted, cache, metric)
    sizes = {"layer": 2, "pos": 4, "head": model.cfg.n_heads}
    for where in product(*(range(sizes[axis]) for axis in axes.split())):
        with ours(model, cache, *where):
            close(metric(model(corrupted)), theirs[where])
    assert float((theirs - metric(model(corrupted))).abs().max()) > 0.1
