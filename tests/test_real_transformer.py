"""A transformer that reads vectors: what it computes, and the whole library on it."""

import warnings

import pytest
import torch
from models_for_tests import close

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig
from hijack_lens.models import RealTransformer
from hijack_lens.training.forward import PlainForward

LENGTH, D_IN = 6, 3
PREDICTION = hl.Metric("prediction", lambda outputs: outputs[..., 0])


def build(dtype=torch.float64, **options):
    """One with every weight and bias alive."""
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "seed": 1, **options}
    model = RealTransformer(D_IN, 1, LENGTH + 2, dtype=dtype, device="cpu", **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def vectors(n=2, dtype=torch.float64):
    return torch.randn(n, LENGTH, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def by_hand(model, inputs):
    """An ordinary HookedTransformer whose vocabulary is what the positions of the inputs are embedded as."""
    cfg = model.cfg
    kept = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "attn_only", "act_fn", "normalization_type", "n_ctx")
    options = {name: getattr(cfg, name) for name in kept}
    n = inputs.shape[:2].numel()
    plain = HookedTransformerConfig(**options, d_vocab=n, d_vocab_out=1, dtype=cfg.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        ordinary = HookedTransformer(plain)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in ordinary.named_parameters():
            parameter.copy_(inputs.flatten(0, 1) @ model.W_E if name == "embed.W_E" else weights[name])
    return ordinary.eval()


def test_vectors_enter_at_the_embedding_and_a_token_is_the_vector_with_a_1_at_its_place():
    model, x = build(), vectors()
    _, cache = model.run_with_cache(x)
    close(cache["hook_embed"], x @ model.W_E, atol=1e-14)
    close(cache["blocks.0.hook_resid_pre"], x @ model.W_E + model.W_pos[:LENGTH], atol=1e-14)
    close(model(x), model(x @ model.W_E + model.W_pos[:LENGTH], start_at_layer=0), atol=0)
    ids = torch.tensor([[0, 2, 1, 1]])
    close(model(ids), model(torch.nn.functional.one_hot(ids, D_IN).double()), atol=1e-12)


def test_positions_none_leaves_the_order_to_the_causal_mask():
    model, x = build(positions="none", n_layers=1), vectors(1)
    swapped = x[:, [1, 0, *range(2, LENGTH)]]
    close(model(swapped)[:, 2:], model(x)[:, 2:], atol=1e-12)
    assert float((build(n_layers=1)(swapped) - build(n_layers=1)(x))[:, 2:].detach().abs().max()) > 1e-2


@pytest.mark.parametrize("options", [{}, {"norm": None}, {"positions": "none", "n_heads": 1}, {"d_mlp": 0}])
def test_the_plain_forward_pass_of_vectors_is_the_hooked_one_gradients_included(options):
    model, x = build(**options), vectors()
    trained = [p for p in model.parameters() if p.requires_grad]
    hooked, plain = model(x), PlainForward(model)(x)
    close(plain, hooked, atol=1e-11)
    ours, theirs = (torch.autograd.grad((y**2).sum(), trained, materialize_grads=True) for y in (plain, hooked))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, atol=1e-8 * max(1.0, float(b.abs().max())))


def test_reading_computes_the_same_to_the_bit_at_every_hook_point_and_leaves_the_model_alone():
    model, x = build(), vectors()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, cache = model.run_with_cache(x)
    reader, ids = model.reading(x)
    outputs, read = reader.run_with_cache(ids)
    assert torch.equal(outputs, expected)
    assert set(read) == set(cache)
    assert all(torch.equal(read[name], cache[name]) for name in cache)
    assert (reader.cfg.d_vocab, model.cfg.d_vocab) == (2 * LENGTH, D_IN)
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert torch.equal(model(x), expected)
    tokens = torch.tensor([[0, 1, 2]])
    same, unchanged = model.reading(tokens)
    assert same is model
    assert torch.equal(unchanged, tokens)


LAST = hl.Component(1, "head", 0)
CIRCUIT = hl.Circuit(previous_token=(hl.Component(0, "head", 1),), induction=(LAST,), bigram=(hl.Component(1, "mlp"),))
TOOLS = {
    "patch_sweep": lambda m, a, b: hooks.patch_sweep(m, a, b, PREDICTION).values,
    "ablate_sweep": lambda m, a, b: hooks.ablate_sweep(m, a, PREDICTION, how="mean", reference=b).values,
    "attribution_patch": lambda m, a, b: hooks.attribution_patch(m, a, b, PREDICTION).values,
    "path_sweep": lambda m, a, b: hooks.path_sweep(m, a, b, PREDICTION, "all").values,
    "edge_attribution": lambda m, a, b: hooks.edge_attribution(m, a, b, PREDICTION, "all").values,
    "shapley": lambda m, a, b: hl.shapley(m, a, metric=PREDICTION, components="all").values,
    "attribute": lambda m, a, b: hl.attribute(m, a, circuit=CIRCUIT).values,
    "attribute_sources": lambda m, a, b: hl.attribute_sources(m, a, answers=[0]).values,
    "attribute_scores": lambda m, a, b: hl.attribute_scores(m, a, head=LAST).values,
    "context_memory": lambda m, a, b: hl.context_memory(m, a[0], circuit=CIRCUIT).value_logits,
    "memory_conflict": lambda m, a, b: hl.memory_conflict(m, a[0], circuit=CIRCUIT).context,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_says_of_vectors_what_it_says_of_an_ordinary_model_with_these_embeddings(tool):
    model, x = build(), vectors()
    reader, ids = model.reading(x)
    found = TOOLS[tool](reader, ids[:1], ids[1:])
    assert float(found.abs().max()) > 1e-4
    close(found, TOOLS[tool](by_hand(model, x), ids[:1], ids[1:]), atol=1e-12)


def test_interventions_hold_while_vectors_are_read_and_a_patch_sweep_is_made_of_such_runs():
    model, x = build(), vectors()
    reader, ids = model.reading(x)
    swept = hooks.patch_sweep(reader, ids[:1], ids[1:], PREDICTION, activations="z", positions=[2], layers=1, units=0)
    _, cache = model.run_with_cache(x[:1])
    with hooks.patch(model, LAST, cache, positions=[2]):
        patched = PREDICTION(model(x[1:]))
    with hooks.ablate(model, LAST):
        assert float((model(x) - build()(x)).abs().max()) > 1e-3
    assert torch.equal(model(x), build()(x))
    close(swept.values.flatten(), patched.detach()[None], atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_attributions_are_complete(dtype, tolerance):
    model, x = RealTransformer(D_IN, 1, LENGTH, dtype=dtype, device="cpu", seed=2), vectors(dtype=dtype)
    reader, ids = model.reading(x)
    circuit = hl.Circuit(induction=(LAST,))
    expected = model(x)[:, -1]
    assert hl.attribute(reader, ids, circuit=circuit).completeness_error <= tolerance
    close(hl.attribute(reader, ids, circuit=circuit).values.sum((1, 2)), expected.detach(), atol=tolerance)
    close(hl.attribute_sources(reader, ids[0], answers=[0]).logits, expected[0].detach(), atol=tolerance)
    assert hl.attribute_sources(reader, ids[0], answers=[0]).completeness_error <= tolerance
    assert hl.attribute_scores(reader, ids[0], head=LAST).completeness_error <= tolerance


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3, 4), r"input must be vectors .*3\], got shape \(2, 3, 4\)"),
        (torch.zeros(1, LENGTH + 3, D_IN), "input is 9 vectors long; the model takes at most n_ctx=8"),
        (torch.tensor([[3]]), "input holds token id 3"),
        (torch.zeros(1, 0, D_IN), "input must be vectors"),
        (torch.zeros(LENGTH, D_IN), "input must be vectors"),
    ],
)
def test_what_it_cannot_read_is_refused(given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        build()(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, "d_in must be at least 1, got 0"),
        ({"n_heads": 5}, "n_heads must divide d_model=64, got 5"),
        ({"norm": "BN"}, "norm must be one of"),
        ({"positions": "rotary"}, "positions must be one of"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_shape_that_none_can_have_is_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        RealTransformer(**{"d_in": 2, "d_out": 1, "n_ctx": 4, **options})
