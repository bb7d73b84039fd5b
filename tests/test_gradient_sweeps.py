"""Attribution patching: it is the derivative that it claims to be, and its error is what `compare` says."""

import copy
import functools
import itertools
import signal

import pytest
import torch
from bridges_for_tests import BOOTED, hooked_twin
from models_for_tests import CIRCUIT, HEADS, MLPS, close, hooked, native, perturbed, prompts
from plain_families import plain_of_hooked
from plain_network import run as run_plain_network
from refusals import refused

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks.sweep_plan import HOOKS

METRIC = hl.logit_diff(1, 2)
CLEAN, CORRUPTED = prompts(), prompts(seed=1)
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
BY_HEAD = ("z", "q", "k", "v", "pattern")
MODELS = {
    "no norm": lambda: hooked(None, "relu"),
    "LayerNorm, four layers": lambda: hooked("LN", n_layers=4),
    "RMSNorm": lambda: hooked("RMS", "silu"),
    "parallel, rotary": lambda: hooked("LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4),
    "grouped keys, gated": lambda: hooked_twin(BOOTED["Llama"]()),
    "native bridge": lambda: native("LN"),
    **{f"{name} bridge": build for name, build in BOOTED.items()},
}


@functools.cache
def family(name):
    """A model, the same network in plain torch, and how far apart their derivatives may be."""
    built = MODELS[name]()
    model, twin = built if isinstance(built, tuple) else (built, built)
    plain = twin.plain if hasattr(twin, "plain") else plain_of_hooked(twin)
    close(plain.run(CLEAN), model(CLEAN).detach(), atol=1e-6)
    return model, plain, 1e-5 if name == "Llama bridge" else 1e-9  # which rounds to float32 halfway


@pytest.fixture(params=MODELS)
def models(request, unchecked):
    return family(request.param)


def activations(plain, tokens):
    """Every activation of a run of the plain network."""
    seen = {}
    plain.run(tokens, lambda name, value: seen.setdefault(name, value))
    return seen


def between(base, source, fraction):
    """For the plain network: a stream that starts between those of two runs."""
    start = "blocks.0.hook_resid_pre"
    return lambda name, value: base[name] + fraction * (source[name] - base[name]) if name == start else value


def node_derivatives(plain, component, layers, steps):
    """The metric's derivative by the size of each patch, [layer, pos, *unit], by autograd through the plain network."""
    base, source = activations(plain, CORRUPTED), activations(plain, CLEAN)
    names = [f"blocks.{layer}.{HOOKS[component][0]}" for layer in layers]
    shown = base[names[0]].transpose(1, 2) if component == "pattern" else base[names[0]]
    shape = shown.shape[1:2] if HOOKS[component][1] is None else shown.shape[1:3]
    total = torch.zeros(len(names), *shape, dtype=torch.float64)
    for step in range(steps):
        sizes = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in names]
        start = between(base, source, step / steps)

        def at(name, value, start=start, sizes=sizes):
            value = start(name, value)
            if name not in names:
                return value
            size = sizes[names.index(name)]
            size = size.T if component == "pattern" else size
            delta = source[name] - base[name]
            return value + size[None].reshape(1, *size.shape, *[1] * (value.ndim - 1 - size.ndim)) * delta

        derivatives = torch.autograd.grad(METRIC(plain.run(CORRUPTED, at)), sizes)
        total += torch.stack(derivatives) / steps
    return total


def test_every_estimate_is_the_derivative_by_the_patch(models):
    model, plain, atol = models
    compared, largest = 0, 0.0
    for component, steps in zip(HOOKS, itertools.cycle([1, 2]), strict=False):
        try:
            sweep = hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC, component, steps=steps)
        except ValueError:  # refused just as `patch_sweep` refuses it
            with pytest.raises(ValueError, match="hook"):
                hooks.patch_sweep(model, CLEAN, CORRUPTED, METRIC, component)
            continue
        expected = node_derivatives(plain, component, sweep.layers, steps)
        close(sweep.effect[0], expected, atol=atol)
        compared, largest = compared + 1, max(largest, float(expected.abs().max()))
    assert compared >= 9
    assert largest > 0.1


def test_a_patch_of_all_positions_is_the_sum_of_those_of_each(unchecked):
    for components in (STREAM, BY_HEAD, "post"):
        each, together = (
            hooks.attribution_patch(hooked("LN"), CLEAN, CORRUPTED, METRIC, components, positions)
            for positions in (None, "all")
        )
        close(together.effect, each.effect.sum(2, keepdim=True))
        assert together.positions == (None,)


def test_a_derivative_is_the_limit_of_differences():
    model, eps = hooked("LN", n_layers=4), 1e-5
    source, base = model.run_with_cache(CLEAN)[1], model.run_with_cache(CORRUPTED)[1]
    for component, units in (("resid_pre", None), ("v", [1]), ("pattern", [0]), ("post", [3])):
        sweep = hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC, component, [1, -1], layers=[0, 2], units=units)
        for row, layer in enumerate((0, 2)):
            for column, position in enumerate((1, -1)):
                name = f"blocks.{layer}.{HOOKS[component][0]}"
                delta = torch.zeros_like(base[name])
                axes = {"pattern": (slice(None), 0, position), "post": (slice(None), position, 3)}
                at = axes.get(component, (slice(None), position) if units is None else (slice(None), position, 1))
                delta[at] = (source[name] - base[name])[at]
                up, down = (
                    METRIC(
                        model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, lambda x, hook, d=s * eps * delta: x + d)])
                    )
                    for s in (1, -1)
                )
                actual = sweep.effect[0, row, column].squeeze()
                close(actual, ((up - down) / (2 * eps)).detach(), atol=1e-7)


def test_it_is_patch_sweep_where_the_metric_is_linear_in_what_is_patched(unchecked):
    attention, both = hooked(None, attn_only=True), hooked(None)
    for model, components, layers in (
        (attention, ("attn_out", "resid_post"), 1),
        (attention, ("z", "v", "pattern"), 1),
        (both, ("mlp_out", "resid_post"), 1),
        (both, "post", 1),
    ):
        for direction in ("denoise", "noise"):
            arguments = (model, CLEAN, CORRUPTED, METRIC, components, None, direction)
            result = hooks.attribution_patch(*arguments, layers=layers).compare(
                hooks.patch_sweep(*arguments, layers=layers)
            )
            assert result.max_error < 1e-10
            assert float(result.exact.effect.abs().max()) > 0.1
            assert result.correlation == pytest.approx(1)


def close_prompts(size):
    """A model, and prompts that differ in tokens whose embeddings are `size` apart."""
    model = hooked("LN")
    with torch.no_grad():
        noise = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        model.W_E[1] = model.W_E[0] + size * noise
    tokens = torch.tensor([[0, 3, 4, 0, 5], [2, 0, 6, 3, 0]])
    return model, torch.where(tokens == 0, 1, tokens), tokens


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_error_vanishes_with_the_difference_between_the_prompts(direction, unchecked):
    nodes, edges = [], []
    for size in (1e-2, 1e-3, 1e-4):
        model, clean, corrupted = close_prompts(size)
        metric = hl.logit_diff(3, 2)
        prompts_and_metric = (model, clean, corrupted, metric)
        node = hooks.attribution_patch(*prompts_and_metric, direction=direction).compare(
            hooks.patch_sweep(*prompts_and_metric, direction=direction)
        )
        edge = hooks.edge_attribution(*prompts_and_metric, "all", direction, steps=1).compare(
            hooks.path_sweep(*prompts_and_metric, "all", direction)
        )
        nodes.append(node.relative_error)
        edges.append(edge.relative_error)
    for errors in (nodes, edges):
        assert errors[0] < 0.1
        for before, after in itertools.pairwise(errors):
            assert after == pytest.approx(before / 10, rel=0.2)


# Edges.


def message(plain, seen, sender):
    """What a sender writes into the residual stream."""
    if isinstance(sender, str):
        return seen[f"hook_{sender}"]
    at = f"blocks.{sender.layer}"
    if sender.kind == "mlp":
        return seen[f"{at}.hook_mlp_out"]
    return seen[f"{at}.attn.hook_z"][:, :, sender.head] @ plain.layers[sender.layer]["attn.W_O"][sender.head]


def edge_derivatives(plain, edges, steps):
    """The metric's derivative by how much of its change each edge delivers, each receiver with a stream of its own."""
    base, source = activations(plain, CORRUPTED), activations(plain, CLEAN)
    changes = {s: message(plain, source, s) - message(plain, base, s) for s in {edge.sender for edge in edges}}
    into = {}
    for index, edge in enumerate(edges):
        end = None if isinstance(edge.receiver, str) else (edge.receiver.layer, edge.receiver.head)
        into.setdefault((end, edge.via), []).append(index)
    total = torch.zeros(len(edges), dtype=torch.float64)
    for step in range(steps):
        sizes = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)

        def receives(receiver, via, stream, sizes=sizes):
            return stream + sum(sizes[i] * changes[edges[i].sender] for i in into.get((receiver, via), ()))

        logits = plain.run(CORRUPTED, between(base, source, step / steps), receives)
        total += torch.autograd.grad(METRIC(logits), sizes)[0] / steps
    return total


def with_own_keys(weights, n_heads):
    """A block in which every head has a copy of the keys and values that it shares."""
    names = [f"attn.{kind}_{via}" for kind in "Wb" for via in "KV"]
    return weights | {
        name: weights[name].repeat_interleave(n_heads // len(weights[name]), 0) for name in names if name in weights
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_edge_is_the_derivative_by_the_message_it_delivers(name, unchecked):
    model, plain, atol = family(name)
    plain = copy.copy(plain)
    plain.layers = [with_own_keys(weights, plain.n_heads) for weights in plain.layers]
    via = ("q", "k", "v", "mlp_in", "unembed")
    for steps in (1, 3):
        sweep = hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, "all", via=via, steps=steps)
        expected = edge_derivatives(plain, sweep.edges, steps)
        close(sweep.effect, expected, atol=atol)
        assert {edge.via for edge in sweep.edges} == set(via)
        assert float(expected.abs().max()) > 0.1


def test_the_two_layer_model_with_relative_positions_too(unchecked):
    model = perturbed()
    sent = {tokens: run_plain_network(model, tokens).sent for tokens in (CLEAN, CORRUPTED)}
    sweep = hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, "all", steps=1)
    index = {(edge.sender, edge.receiver, edge.via): i for i, edge in enumerate(sweep.edges)}
    sizes = torch.zeros(len(index), dtype=torch.float64, requires_grad=True)

    def edge(sender, receiver, via, sent_here):
        at = index.get((sender, receiver, via))
        return sent_here if at is None else sent_here + sizes[at] * (sent[CLEAN][sender] - sent[CORRUPTED][sender])

    logits = run_plain_network(model, CORRUPTED, edge).logits
    close(sweep.effect, torch.autograd.grad(METRIC(logits), sizes)[0])
    assert float(sweep.effect.abs().max()) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_edges_out_of_a_component_add_up_to_its_own_attribution(name, unchecked):
    model, _, atol = family(name)
    edges = hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, "all", steps=3)
    heads = hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC, "z", "all", steps=3)
    mlps = hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC, "mlp_out", "all", steps=3)
    for sender in dict.fromkeys(edge.sender for edge in edges.edges if not isinstance(edge.sender, str)):
        out = edges.effect[[edge.sender == sender for edge in edges.edges]].sum()
        whole = (
            mlps.effect[0, sender.layer, 0] if sender.head is None else heads.effect[0, sender.layer, 0, sender.head]
        )
        close(out, whole, atol=atol)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_edges_out_of_the_embeddings_add_up_to_the_difference_between_the_runs(direction, unchecked):
    def missing(steps):
        sweep = hooks.edge_attribution(model, clean, corrupted, hl.logit_diff(3, 2), "all", direction, steps=steps)
        first = [isinstance(edge.sender, str) for edge in sweep.edges]
        return float(sweep.effect[first].sum()) - (sweep.source - sweep.base), abs(sweep.source - sweep.base)

    model, clean, corrupted = close_prompts(1.0)
    (coarse, _), (fine, whole) = missing(10), missing(20)
    assert abs(fine) < 0.05 * whole
    # The error of a sum of rectangles is proportional to their width: halving that halves it.
    assert coarse == pytest.approx(2 * fine, rel=0.05)


def test_edges_into_the_last_reader_are_exact_where_it_is_linear():
    model = hooked(None, attn_only=True)
    heads = hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, "all", via=("v", "unembed"), steps=1).compare(
        hooks.path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", via=("v", "unembed"))
    )
    late = [edge.via == "unembed" or edge.receiver.layer == 1 for edge in heads.exact.edges]
    assert float(heads.error[late].abs().max()) < 1e-10
    assert float(heads.error.abs().max()) > 1e-3


def test_a_metric_that_is_flat_at_the_base_run_needs_more_than_one_step():
    model, from_clean = hooked("LN"), hl.metrics.kl("clean")
    for attribute in (hooks.attribution_patch, functools.partial(hooks.edge_attribution, components="all")):
        one = attribute(model, CLEAN, CORRUPTED, from_clean, direction="noise", steps=1)
        assert float(one.effect.abs().max()) < 1e-12
        assert (
            float(attribute(model, CLEAN, CORRUPTED, from_clean, direction="noise", steps=4).effect.abs().max()) > 0.1
        )


# What both have in common.

ATTRIBUTE = {
    "nodes": (hooks.attribution_patch, hooks.patch_sweep, {"activations": ("z", "q")}),
    "edges": (hooks.edge_attribution, hooks.path_sweep, {"components": CIRCUIT}),
}


@pytest.fixture(params=ATTRIBUTE)
def both(request, unchecked):
    attribute, sweep, options = ATTRIBUTE[request.param]
    return functools.partial(attribute, **options), functools.partial(sweep, **options)


def test_compare_gives_the_estimate_the_sweep_and_the_difference(both):
    attribute, sweep = both
    for model, direction in ((hooked("LN"), "denoise"), (native("LN")[0], "noise")):
        with torch.no_grad():
            approximate = attribute(model, CLEAN, CORRUPTED, METRIC, direction=direction)
            exact = sweep(model, CLEAN, CORRUPTED, METRIC, direction=direction)
            result = approximate.compare(exact)
            assert result.approximate is approximate
            assert result.exact is exact
            error = (approximate.values - exact.values).flatten()
            close(result.error.flatten(), error)
            assert result.max_error == pytest.approx(float(error.abs().max()))
            assert result.relative_error == pytest.approx(float(error.norm() / exact.effect.norm()))
            effects = torch.stack([approximate.effect.flatten(), exact.effect.flatten()])
            assert result.correlation == pytest.approx(float(torch.corrcoef(effects)[0, 1]))
            assert 0.1 < result.relative_error < 2
            for one in (approximate, exact):
                assert one.base == pytest.approx(float(METRIC(model((CLEAN, CORRUPTED)[direction == "denoise"]))))
                assert one.source == pytest.approx(float(METRIC(model((CORRUPTED, CLEAN)[direction == "denoise"]))))
            assert approximate.direction == direction


def test_a_comparison_is_a_table_and_a_summary(both):
    result = both[0](hooked("LN"), CLEAN, CORRUPTED, METRIC).compare(both[1](hooked("LN"), CLEAN, CORRUPTED, METRIC))
    frame = result.to_pandas()
    assert list(frame.columns[-3:]) == ["estimate", "exact", "error"]
    assert not {"value", "effect", "normalised"} & set(frame.columns)
    close(torch.tensor(frame["error"].to_numpy()), result.error.flatten(), atol=1e-12)
    close(torch.tensor(frame["estimate"].to_numpy()), result.approximate.effect.flatten(), atol=1e-12)
    lines = str(result).splitlines()
    assert f"Comparison of {len(frame)} effects on {METRIC.name}" in lines[0]
    assert f"relative error {result.relative_error:.3g}" in lines[0]
    assert sum(line.startswith("│") for line in lines) == 5
    first = next(line for line in lines if line.startswith("│"))
    assert f"{frame['error'].abs().max():.4g}" in first


def test_what_was_not_scored_takes_no_part_in_a_comparison():
    def sweep(values):
        values = torch.tensor(values)[None, :, None]
        return hl.hooks.Sweep(values, ("z",), (0, 1, 2), (None,), None, (), "m", 0.0, 1.0, "denoise", "gradient")

    result = hooks.Comparison(sweep([1.0, float("nan"), 3.0]), sweep([2.0, 5.0, 3.5]))
    assert result.error.isnan().flatten().tolist() == [False, True, False]
    assert result.max_error == 1.0
    assert result.relative_error == pytest.approx((1.25 / 16.25) ** 0.5)
    assert "3 effects" in str(result)
    nothing = hooks.Comparison(sweep([1.0, 2.0, 3.0]), sweep([0.0, 0.0, 0.0]))
    assert torch.tensor([nothing.relative_error, nothing.correlation]).isnan().all()
    assert nothing.max_error == 3.0


def hooks_and_gradients(model):
    points = {name: (list(point.fwd_hooks), list(point.bwd_hooks)) for name, point in model.hook_dict.items()}
    return points, [(parameter.requires_grad, id(parameter.grad)) for parameter in model.parameters()]


@pytest.mark.parametrize("build", [lambda: hooked("LN"), lambda: native("LN")[0]], ids=["hooked", "native bridge"])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_of_the_model_changes_and_gradients_need_not_be_on(both, build, frozen):
    attribute, model = both[0], build()
    expected = attribute(model, CLEAN, CORRUPTED, METRIC).values
    model.requires_grad_(not frozen)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, logits = hooks_and_gradients(model), model(CLEAN)
    with torch.no_grad():
        values = attribute(model, CLEAN, CORRUPTED, METRIC).values
        assert not torch.is_grad_enabled()
    # Autograd multiplies frozen weights in another order, on some processors to another last bit.
    close(values, expected, atol=1e-12)
    assert torch.equal(attribute(model, CLEAN, CORRUPTED, METRIC).values, values)
    assert torch.is_grad_enabled()
    assert not expected.requires_grad
    assert hooks_and_gradients(model) == before
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert torch.equal(model(CLEAN), logits)


def test_nothing_is_left_after_an_exception_or_ctrl_c(both):
    model, before = hooked("LN"), hooks_and_gradients(hooked("LN"))[0]
    calls = []

    def at_the(count, stop):
        def metric(logits):
            calls.append(logits.requires_grad)
            if len(calls) == count:
                stop()
            return logits[:, -1, 1].mean()

        calls.clear()
        return metric

    def fail():
        raise ZeroDivisionError

    for count in (1, 3):  # in a run that is recorded, and in one that is differentiated
        for stop, error in ((fail, ZeroDivisionError), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)):
            with pytest.raises(error):
                both[0](model, CLEAN, CORRUPTED, at_the(count, stop))
            assert len(calls) == count
            assert hooks_and_gradients(model)[0] == before
            assert torch.is_grad_enabled()
    assert calls[-1]


def test_the_users_hooks_take_part(both):
    attribute, sweep = both
    model, kept = hooked(None, attn_only=True), ("v", "unembed")
    model.hook_dict["blocks.0.attn.hook_z"].add_perma_hook(lambda z, hook: z * 1.5)
    model.hook_dict["blocks.1.hook_resid_post"].add_hook(lambda x, hook: 2 * x + 0.25)
    options = {"via": kept, "components": "all"} if attribute.func is hooks.edge_attribution else {"activations": "v"}
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, **options)
    result = attribute(model, CLEAN, CORRUPTED, METRIC, **options, steps=1).compare(exact)
    late = [edge.receiver == "unembed" or edge.receiver.layer == 1 for edge in getattr(result.exact, "edges", ())]
    error = result.error[late] if late else result.error[:, 1]
    assert float(error.abs().max()) < 1e-10
    with pytest.raises(AssertionError):  # and make a difference
        close(result.exact.values, sweep(hooked(None, attn_only=True), CLEAN, CORRUPTED, METRIC, **options).values)


def test_any_differentiable_function_of_the_logits_will_do(both):
    def everywhere(logits):
        return logits.log_softmax(-1)[:, :, 3].sum()

    attribute, model = both[0], hooked("LN")
    result = attribute(model, CLEAN, CORRUPTED, everywhere)
    assert result.metric == "everywhere"
    assert float(result.effect.abs().max()) > 0.1
    wrapped = attribute(model, CLEAN, CORRUPTED, lambda logits: METRIC(logits).reshape(1))
    close(wrapped.values, attribute(model, CLEAN, CORRUPTED, METRIC).values)


def test_an_estimate_is_saved_and_read_like_any_sweep(tmp_path):
    model = hooked("LN")
    sweep = hooks.attribution_patch(model, CLEAN[0], CORRUPTED[0], METRIC, ("z", "v"), layers=1, units=0)
    assert sweep.method == "gradient"
    assert sweep.values.shape == (2, 1, 5, 1)
    sweep.save(tmp_path / "sweep.safetensors")
    again = hooks.Sweep.load(tmp_path / "sweep.safetensors")
    assert torch.equal(again.values, sweep.values)
    assert again.method == "gradient"
    assert "by gradient runs" in repr(again)


def test_a_model_in_single_precision_gives_single_precision(both):
    model, double = hooked("LN", dtype=torch.float32), hooked("LN")
    result = both[0](model, CLEAN, CORRUPTED, METRIC)
    assert result.values.dtype == torch.float32
    close(result.values.double(), both[0](double, CLEAN, CORRUPTED, METRIC).values, atol=1e-3)


def each_refuses(**changed):
    """Raises what both raise."""
    changed = {"metric": METRIC, "clean": CLEAN, "corrupted": CORRUPTED, **changed}
    model = changed.pop("model", None) or hooked("LN")
    with pytest.raises(Exception) as first:  # noqa: PT011
        hooks.attribution_patch(model, **changed)
    with pytest.raises(first.type) as second:
        hooks.edge_attribution(model, **changed)
    assert str(second.value) == str(first.value)
    raise second.value


def estimate(**options):
    return hooks.attribution_patch(hooked(), CLEAN, CORRUPTED, METRIC, "z", **options)


test_a_wrong_type_is_refused = refused(
    TypeError,
    {
        "approximate and exact must be results of one kind, got a Sweep and a PathSweep": lambda: estimate().compare(
            hooks.path_sweep(hooked(), CLEAN, CORRUPTED, METRIC, HEADS)
        ),
        "exact must be a PatchEffects, got 'exact'": lambda: estimate().compare("exact"),
        "metric 'number' must give a tensor that torch can differentiate, got .*\\.item\\(\\)": lambda: each_refuses(
            metric=hl.Metric("number", lambda logits: logits[..., 0].detach())
        ),
        "must give a tensor that torch can differentiate, got -?[0-9.]+": lambda: each_refuses(
            metric=lambda logits: logits.sum().item()
        ),
        "metric must give one number per run, got a tensor of shape": lambda: each_refuses(
            metric=lambda logits: logits
        ),
        "metric must be a hijack_lens Metric or a function of logits, got 3": lambda: each_refuses(metric=3),
        "steps must be an int, got 1.5": lambda: each_refuses(steps=1.5),
        "model must be a HookedTransformer or TransformerBridge": lambda: each_refuses(model="gpt2"),
        'components must be a Component, .* a Circuit, .* or "all"; got 3': lambda: hooks.edge_attribution(
            hooked(), CLEAN, CORRUPTED, METRIC, 3
        ),
    },
)


def with_hook(model):
    model.add_hook("hook_embed", lambda activation, hook: None)
    return model


test_a_wrong_value_is_refused = refused(
    ValueError,
    {
        "steps must be at least 1, got 0": lambda: each_refuses(steps=0),
        "steps must be at most 10000, got 1000000000000": lambda: each_refuses(steps=10**12),
        "direction must be one of 'denoise', 'noise', got 'both'": lambda: each_refuses(direction="both"),
        r"clean and corrupted must have one shape .* got \(2, 4\) and \(2, 5\)": lambda: each_refuses(
            clean=CLEAN[:, 1:]
        ),
        "reads position 7; the prompts have 5": lambda: each_refuses(metric=hl.logit_diff(0, 1, position=7)),
        "activations must be among .* got 'hook_z'": lambda: hooks.attribution_patch(
            hooked(), CLEAN, CORRUPTED, METRIC, "hook_z"
        ),
        "does not honour edits at 'blocks.0.hook_resid_mid'": lambda: hooks.attribution_patch(
            native()[0], CLEAN, CORRUPTED, METRIC, "resid_mid"
        ),
        "via='k': this model's heads share keys": lambda: hooks.edge_attribution(
            with_hook(hooked_twin(BOOTED["Llama"]())), CLEAN, CORRUPTED, METRIC, "all"
        ),
        "the components have no such inputs": lambda: hooks.edge_attribution(
            hooked(), CLEAN, CORRUPTED, METRIC, MLPS[0], via="q"
        ),
        "components: L0H5 is head 5": lambda: hooks.edge_attribution(
            hooked(), CLEAN, CORRUPTED, METRIC, [HEADS[0], hl.Component(0, "head", 5)]
        ),
        "approximate and exact must be of the same patches, got activations": lambda: hooks.Comparison(
            *(
                hooks.patch_sweep(hooked(), CLEAN, CORRUPTED, METRIC, components, "all")
                for components in ("attn_out", ("attn_out", "mlp_out"))
            )
        ),
        "of the same patches, got positions": lambda: estimate().compare(estimate(positions=[0])),
        "of the same patches, got direction denoise and noise": lambda: estimate().compare(estimate(direction="noise")),
        "of the same patches, got edges": lambda: hooks.edge_attribution(
            hooked(), CLEAN, CORRUPTED, METRIC, HEADS
        ).compare(hooks.path_sweep(hooked(), CLEAN, CORRUPTED, METRIC, HEADS[:2])),
    },
)


def test_an_activation_that_a_hook_cuts_off_has_no_derivative(unchecked):
    model = hooked()
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda x, hook: torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"does not depend on 'blocks\.1\.mlp\.hook_post' at all: a hook on the model"):
        hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC, "post")
