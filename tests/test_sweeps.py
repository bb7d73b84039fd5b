"""Sweeps are exact: TransformerLens's own patching, and one plain hooked run per patch, are the truth."""

import contextlib
import functools
import itertools
import linecache
import random
import signal
import sys
from dataclasses import replace

import pytest
import torch
import transformer_lens.patching as lens_patching
from bridges_for_tests import BOOTED, gpt2_like, modern
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import HEADS, SHAPE, close, handwritten, hooked, native, perturbed, prompts
from refusals import refused
from strategies import seeds
from test_hooks_safety import hooks_on, left_as_it_was
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens.hooks import ablate, ablate_sweep, attribution_patch, patch_sweep
from hijack_lens.hooks import incremental_runs as api
from hijack_lens.hooks.incremental_runs import IncrementalRuns
from hijack_lens.hooks.patched_runs import ForwardRuns

CLEAN, CORRUPTED = prompts(2, 4, seed=3), prompts(2, 4, seed=4)
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
GROUPED = {"n_heads": 4, "n_key_value_heads": 2}
PLACES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "post": "mlp.hook_post",
}
GROUPS = {
    "stream": ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    "heads": ("z", "q", "pattern"),
    "keys and values": ("k", "v"),
    "neurons": ("post",),
}
SHARED = {
    "relative": perturbed,
    "LayerNorm": lambda: hooked("LN", n_layers=3),
    "four layers, four heads": lambda: hooked("LN", n_layers=4, n_heads=4, d_head=2),
    "grouped": lambda: hooked("RMS", act="silu", n_layers=3, gated_mlp=True, **GROUPED, **ROTARY),
    "parallel": lambda: hooked("LN", parallel_attn_mlp=True),
    "attention only": lambda: hooked(n_layers=1, attn_only=True),
    **BOOTED,
    "native bridge": lambda: native("LN")[0],
}


@functools.cache
def shared(name):
    """One of the models above, to be left as it is."""
    return SHARED[name]()


# The truth: one run of the model per patch, in which a hook writes what it is told to.


def cached(model, tokens):
    """The run's activations, for `looped` to write."""
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    return lambda name, activation: cache[name]


def zeros(name, activation):
    return torch.zeros_like(activation)


def looped(model, tokens, written, components, layers=None, positions=range(4), units=(None,), alone=False):
    """Logits of each patched run, [component, layer, position, unit, batch, pos, d_vocab].

    Prompts do not see one another, so that those of a component and layer share a run; unless they are to be `alone`,
    where a hook of the user's sees the whole batch.
    """
    layers = range(model.cfg.n_layers) if layers is None else layers
    each = list(itertools.product(positions, units))
    groups = [[one] for one in each] if alone else [each]
    runs = [
        _patched_logits(model, tokens, written, component, layer, group)
        for component, layer in itertools.product(components, layers)
        for group in groups
    ]
    return torch.cat(runs).unflatten(0, (len(components), len(layers), len(positions), len(units)))


def _patched_logits(model, tokens, written, component, layer, patches):
    name, n_prompts = f"blocks.{layer}.{PLACES[component]}", len(tokens)
    every = slice(None)

    def write(activation, hook):
        edited = activation.clone()
        for (position, unit), rows in zip(patches, edited.split(n_prompts), strict=True):
            where = every if position is None else position
            index = (every, where) if unit is None else (every, where, unit)
            index = (every, unit, where) if component == "pattern" else index  # [batch, head, query, key]
            rows[index] = written(name, rows)[index]
        return edited

    with torch.no_grad():
        logits = model.run_with_hooks(tokens.repeat(len(patches), 1), fwd_hooks=[(name, write)])
    return logits.unflatten(0, (len(patches), n_prompts))


def measured(logits, metric):
    """A metric of the logits [batch, pos, d_vocab] of each run."""
    values = torch.tensor([float(metric(run)) for run in logits.flatten(0, 3)], dtype=logits.dtype)
    values = values.unflatten(0, logits.shape[:4])
    return values


def difference(position):
    """`logit_diff(1, 2, position)`, once more."""
    return lambda logits: (logits[:, position, 1] - logits[:, position, 2]).mean()


def of_all_positions(logits):
    return (logits[:, :, 1] * logits[:, :, 2].tanh()).sum()


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


METRICS = {
    "last": (hl.logit_diff(1, 2), difference(3)),
    "inner": (hl.logit_diff(1, 2, position=-3), difference(1)),
    "first": (hl.Metric("entropy", entropy, 0), lambda logits: entropy(logits[:, 0]).mean()),
    "all": (of_all_positions, of_all_positions),
}


def available(model, components):
    """Those of the components that the model has, and whose edits it honours."""
    lacking = set()
    if isinstance(model, TransformerBridge):
        lacking |= {"pattern", "resid_mid"}
    if model.cfg.parallel_attn_mlp or model.cfg.attn_only:
        lacking |= {"resid_mid"}
    if model.cfg.attn_only:
        lacking |= {"mlp_out", "post"}
    return [component for component in components if component not in lacking]


def n_units(model, component):
    if component == "post":
        return model.cfg.d_mlp
    grouped = component in ("k", "v") and model.cfg.n_key_value_heads
    return (grouped or model.cfg.n_heads) if component in ("z", "q", "k", "v", "pattern") else None


def agrees(model, components, **plan):
    """A denoising sweep equals the loop, in whatever way it is computed by default; the sweep."""
    sweep = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), components, **plan)
    units = (None,) if sweep.unit is None else range(n_units(model, sweep.activations[0]))
    logits = looped(model, CORRUPTED, cached(model, CLEAN), sweep.activations, units=units, alone=True)
    close(sweep.values, measured(logits, difference(-1)).view_as(sweep.values), atol=1e-10)
    assert sweep.effect.abs().max() > 0.05
    return sweep


# Equality with TransformerLens

FLOAT32 = {
    "relative": lambda: perturbed(dtype=torch.float32),
    "four layers, four heads": lambda: hooked("LN", n_layers=4, n_heads=4, d_head=4, dtype=torch.float32),
    "grouped": lambda: hooked("RMS", act="silu", gated_mlp=True, dtype=torch.float32, **GROUPED, **ROTARY),
}
BLOCK = ("resid_pre", "attn_out", "mlp_out")
BY_TRANSFORMER_LENS = {  # its function's name, and ours: components, positions, and its axes in our order
    "resid_pre": ("resid_pre", None, (0, 1)),
    "resid_mid": ("resid_mid", None, (0, 1)),
    "attn_out": ("attn_out", None, (0, 1)),
    "mlp_out": ("mlp_out", None, (0, 1)),
    "block_every": (BLOCK, None, (0, 1, 2)),
    "attn_head_out_by_pos": ("z", None, (0, 1, 2)),
    "attn_head_q_by_pos": ("q", None, (0, 1, 2)),
    "attn_head_k_by_pos": ("k", None, (0, 1, 2)),
    "attn_head_v_by_pos": ("v", None, (0, 1, 2)),
    "attn_head_pattern_by_pos": ("pattern", None, (0, 2, 1)),
    "attn_head_out_all_pos": ("z", "all", (0, 1)),
    "attn_head_q_all_pos": ("q", "all", (0, 1)),
    "attn_head_k_all_pos": ("k", "all", (0, 1)),
    "attn_head_v_all_pos": ("v", "all", (0, 1)),
    "attn_head_pattern_all_pos": ("pattern", "all", (0, 1)),
}


@functools.cache
def in_float32(name):
    """Attention enlarged, so that any patch of it moves the logits by about one."""
    model = FLOAT32[name]()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.mul_(2)
            block.attn.W_O.mul_(1.5)
    return model


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", BY_TRANSFORMER_LENS)
@pytest.mark.parametrize("name", FLOAT32)
def test_transformer_lenss_own_patching_gives_the_same_in_float32(name, function):
    model, (components, positions, order) = in_float32(name), BY_TRANSFORMER_LENS[function]
    metric = hl.logit_diff(1, 2)
    cache = model.run_with_cache(CLEAN)[1]
    patch = getattr(lens_patching, f"get_act_patch_{function}")
    theirs = patch(model, CORRUPTED, cache, metric).permute(order)
    for method in ("incremental", "forward"):
        ours = patch_sweep(model, CLEAN, CORRUPTED, metric, components, positions, method=method)
        assert ours.method == method
        values = ours.values.view_as(theirs)
        assert values.dtype == torch.float32
        assert (values - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert ours.effect.abs().max() > 0.1


@pytest.mark.parametrize("name", ["native bridge", "Llama"])
def test_transformer_lenss_own_patching_gives_the_same_on_bridges(name):
    model, metric = shared(name), hl.logit_diff(1, 2)
    cache = model.run_with_cache(CLEAN)[1]
    for components, theirs in (
        (BLOCK, lens_patching.get_act_patch_block_every(model, CORRUPTED, cache, metric)),
        ("z", lens_patching.get_act_patch_attn_head_out_by_pos(model, CORRUPTED, cache, metric)),
    ):
        sweep = patch_sweep(model, CLEAN, CORRUPTED, metric, components)
        # TransformerLens keeps its results in float32.
        close(sweep.values.float().view_as(theirs), theirs, atol=1e-5)
        assert sweep.effect.abs().max() > 0.1


# Equality with the loop


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", SHARED)
def test_every_sweep_is_the_loop_over_hooked_runs(name, group):
    model = shared(name)
    components = available(model, GROUPS[group])
    if not components:
        pytest.skip("it has none of these")
    n = n_units(model, components[0])
    units = None if n is None else range(n) if group != "neurons" else (3, n - 1)
    layers = range(model.cfg.n_layers) if model.cfg.n_layers < 4 else (0, 3)
    plans = (
        # patched, source, direction, positions as given to the sweep and as looped over, what is read and how
        (CORRUPTED, CLEAN, "denoise", (0, 1, -1), (0, 1, 3), ("last", "last forward", "inner", "all")),
        (CLEAN, CORRUPTED, "noise", "all", (None,), ("last", "first", "all")),
    )
    turn = list(SHARED).index(name) + list(GROUPS).index(group)  # every model and every group has both
    for into, out_of, direction, positions, places, ways in plans[turn % 2 :][:1]:
        logits = looped(model, into, cached(model, out_of), components, layers, places, units or (None,))
        for way in ways:
            reads, method = way.split() if " " in way else (way, "incremental")
            metric, plain = METRICS[reads]
            options = {"layers": layers, "units": units, "method": method}
            sweep = patch_sweep(model, CLEAN, CORRUPTED, metric, components, positions, direction, **options)
            expected = measured(logits, plain)
            close(sweep.values, expected.squeeze(-1) if n is None else expected)
            assert (sweep.method, sweep.direction) == (method, direction)
            with torch.no_grad():
                close(sweep.base, float(plain(model(into))))
                close(sweep.source, float(plain(model(out_of))))
            # At the first position, heads have nowhere else to look.
            assert reads == "first" or sweep.effect.abs().max() > 0.02


@st.composite
def random_models(draw):
    """HookedTransformers of every kind that is taken apart."""
    seed = draw(seeds)
    if draw(st.integers(0, 4)) == 0:
        return perturbed(seed, scale=draw(st.sampled_from([0.1, 0.4])))
    n_heads = draw(st.sampled_from([1, 2, 4]))
    config = {"n_layers": draw(st.integers(1, 4)), "n_heads": n_heads}
    if draw(st.booleans()):
        config |= ROTARY
        config["rotary_dim"] = draw(st.sampled_from([2, 4]))
    if n_heads > 1 and draw(st.booleans()):
        config["n_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2) if n < n_heads]))
    kind = draw(st.sampled_from(["plain", "gated", "parallel", "attn_only"]))
    if kind != "plain":
        config[{"gated": "gated_mlp", "parallel": "parallel_attn_mlp"}.get(kind, kind)] = True
    norm, act = draw(st.sampled_from([None, "LN", "RMS"])), draw(st.sampled_from(["gelu", "relu", "silu"]))
    return hooked(norm, act, seed=seed, **config)


bridges = st.sampled_from([name for name in SHARED if "ridge" in name or name in BOOTED]).map(shared)


@settings(max_examples=40)
@given(model=st.one_of(random_models(), random_models(), bridges), data=st.data())
def test_sweeps_of_any_part_of_any_model_on_any_prompts_are_the_loop(model, data):
    draw = data.draw
    length = draw(st.integers(1, 6), "length")
    n_prompts = draw(st.integers(1, 3), "prompts")
    clean, corrupted = (
        prompts(n_prompts, length, seed=draw(seeds, "prompt seed"), d_vocab=model.cfg.d_vocab) for _ in range(2)
    )
    group = draw(st.sampled_from([group for group in GROUPS.values() if available(model, group)]), "group")
    every = available(model, group)
    components = draw(st.lists(st.sampled_from(every), min_size=1, max_size=2, unique=True), "components")
    some = st.lists(st.integers(-length, length - 1), min_size=1, max_size=3)
    positions = draw(st.sampled_from(["all", None]) | st.integers(-length, length - 1) | some, "positions")
    n_layers = model.cfg.n_layers
    layers = draw(st.lists(st.integers(-n_layers, n_layers - 1), min_size=1, max_size=2), "layers")
    n = n_units(model, components[0])
    units = None if n is None else draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=2), "units")
    direction = draw(st.sampled_from(["denoise", "noise"]), "direction")
    read = draw(st.none() | st.integers(-length, length - 1), "position that the metric reads")
    metric = of_all_positions if read is None else hl.logit_diff(1, 2, read)
    plain = of_all_positions if read is None else difference(read)

    into, out_of = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    listed = range(length) if positions is None else [None] if positions == "all" else positions
    listed = [listed] if isinstance(listed, int) else listed
    front = [layer % n_layers for layer in layers]
    logits = looped(model, into, cached(model, out_of), components, front, listed, units or (None,))
    expected = measured(logits, plain)
    for method in ("incremental", "forward"):
        sweep = patch_sweep(
            model, clean, corrupted, metric, components, positions, direction, layers=layers, units=units, method=method
        )
        # Without norms, random models have logits of any size.
        close(
            sweep.values, expected.squeeze(-1) if n is None else expected, 1e-10 * max(1, float(expected.abs().max()))
        )
        assert sweep.activations == tuple(components)
        assert sweep.layers == tuple(front)
        assert sweep.positions == tuple(None if p is None else p % length for p in listed)
        assert sweep.units == (() if n is None else tuple(unit % n for unit in units))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_metrics_that_need_the_unpatched_runs_get_the_right_ones(direction):
    model = shared("LayerNorm")
    into, out_of = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    logits = looped(model, into, cached(model, out_of), ["resid_pre"])
    for reference, tokens in (("clean", CLEAN), ("corrupted", CORRUPTED)):
        p = model(tokens)[:, 2].detach().softmax(-1)

        def plain(run, p=p):
            return (p * (p.log() - run[:, 2].log_softmax(-1))).sum(-1).mean()

        for method in ("incremental", "forward"):
            sweep = patch_sweep(
                model,
                CLEAN,
                CORRUPTED,
                hl.metrics.kl(reference, position=2),
                "resid_pre",
                None,
                direction,
                method=method,
            )
            close(sweep.values, measured(logits, plain).squeeze(-1))
            close({"clean": sweep.clean, "corrupted": sweep.corrupted}[reference], 0.0)
            assert sweep.values.max() > 0.01


def test_each_prompt_of_a_batch_may_have_its_own_answer():
    model = shared("grouped")
    metric = hl.logit_diff([1, 4], [2, 0])
    logits = looped(model, CORRUPTED, cached(model, CLEAN), ["mlp_out"])

    def plain(run):
        return (run[0, -1, 1] - run[0, -1, 2] + run[1, -1, 4] - run[1, -1, 0]) / 2

    for method in ("incremental", "forward"):
        sweep = patch_sweep(model, CLEAN, CORRUPTED, metric, "mlp_out", method=method)
        close(sweep.values, measured(logits, plain).squeeze(-1))


@pytest.mark.parametrize(
    "number", [float, lambda x: x.detach().numpy(), lambda x: x[None, None], lambda x: int(x * 1000), lambda x: x > 0]
)
def test_a_metric_may_give_any_kind_of_number(number):
    model = shared("parallel")
    logits = looped(model, CORRUPTED, cached(model, CLEAN), ["attn_out"])
    for method in ("incremental", "forward"):
        sweep = patch_sweep(model, CLEAN, CORRUPTED, lambda run: number(run[:, :, 2].sum()), "attn_out", method=method)
        expected = measured(logits, lambda run: number(run[:, :, 2].sum()))
        close(sweep.values, expected.squeeze(-1))


def test_prompts_may_be_lists_text_or_hijack_prompts():
    model, metric = handwritten(), hl.logit_diff(1, 2)
    clean, corrupted = torch.tensor([[1, 2, 3, 1]]), torch.tensor([[1, 4, 3, 1]])
    expected = patch_sweep(model, clean, corrupted, metric)
    assert expected.texts == ("1", "2", "3", "1") or expected.texts == ("1", "4", "3", "1")
    for pair in (([1, 2, 3, 1], [1, 4, 3, 1]), (clean[0], corrupted[0]), (clean[0].numpy(), corrupted)):
        assert torch.equal(patch_sweep(model, *pair, metric).values, expected.values)
    prompt = hl.hijack_prompt(model.language, 1, 2, 2, 12, global_candidate=3, seed=0)
    other = prompt.tokens.flip(-1)
    by_prompt = patch_sweep(model, prompt, other, hl.metrics.margin(prompt))
    plain = patch_sweep(model, prompt.tokens, other, hl.logit_diff(2, 3))
    assert torch.equal(by_prompt.values, plain.values)
    bridge = gpt2_like()
    by_text = patch_sweep(bridge, "one two three", "one five three", hl.logit_diff("one", "two"))
    by_ids = patch_sweep(bridge, [0, 2, 3, 4], [0, 2, 6, 4], hl.logit_diff(2, 3))
    assert torch.equal(by_text.values, by_ids.values)
    assert by_text.texts == ("<end>", "one", "five", "three")
    several = ["one two", "three four"]
    assert patch_sweep(bridge, several, several[::-1], hl.logit_diff(2, 3)).texts is None


# Ablations


def resampled(seed, reference, tokens):
    """What the documentation says: a reference prompt for each prompt, drawn once for the whole sweep."""
    generator = torch.Generator().manual_seed(seed)
    return reference[torch.randint(len(reference), (len(tokens),), generator=generator)]


def ablation_source(model, how, reference, tokens, seed):
    if how == "zero":
        return zeros
    if how == "resample":
        return cached(model, resampled(seed, reference, tokens))
    source = cached(model, reference)
    return lambda name, activation: source(name, activation).mean(0, keepdim=True).expand_as(activation)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@pytest.mark.parametrize("name", ["relative", "grouped", "Llama"])
def test_every_ablation_is_the_loop_over_hooked_runs(name, how):
    model = shared(name)
    tokens, reference = CLEAN, None if how == "zero" else prompts(5, 4, seed=10)
    written = ablation_source(model, how, reference, tokens, seed=3)
    for group, positions, places in (
        ("stream", None, range(4)),
        ("heads", [-1, 1], (3, 1)),
        ("keys and values", "all", (None,)),
        ("neurons", 2, (2,)),
    ):
        components = available(model, GROUPS[group])
        n = n_units(model, components[0])
        units = (None,) if n is None else range(min(n, 4))
        logits = looped(model, tokens, written, components, positions=places, units=units)
        for reads, method in (("last", "incremental"), ("all", "incremental"), ("all", "forward")):
            metric, plain = METRICS[reads]
            expected = measured(logits, plain)
            options = {"units": None if n is None else units, "seed": 3, "method": method}
            sweep = ablate_sweep(model, tokens, metric, components, positions, how, reference, **options)
            close(sweep.values, expected.squeeze(-1) if n is None else expected)
            assert (sweep.method, sweep.direction, sweep.source) == (method, "ablate", None)
            with torch.no_grad():
                close(sweep.base, float(plain(model(tokens))))


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_ablation_sweeps_do_what_ablate_does(how):
    model = shared("LayerNorm")
    tokens, reference = prompts(3, 4), None if how == "zero" else prompts(5, 4, seed=8)
    sweep = ablate_sweep(model, tokens, hl.logit_diff(1, 2), "z", None, how, reference, seed=4, layers=(0, 1))
    mlps = ablate_sweep(model, tokens, hl.logit_diff(1, 2), "mlp_out", "all", how, reference, seed=4)
    seed = {"seed": 4} if how == "resample" else {}
    for head, position in itertools.product(HEADS, range(4)):
        with ablate(model, head, how, reference, positions=position, **seed), torch.no_grad():
            close(sweep.values[0, head.layer, position, head.head], difference(-1)(model(tokens)))
    for layer in range(3):
        with ablate(model, hl.Component(layer, "mlp"), how, reference, **seed), torch.no_grad():
            close(mlps.values[0, layer, 0], difference(-1)(model(tokens)))


def test_resampling_draws_from_a_given_generator_and_differs_between_seeds():
    model, tokens, reference = shared("LayerNorm"), prompts(3, 4), prompts(9, 4, seed=8)
    sweep = functools.partial(
        ablate_sweep, model, tokens, hl.logit_diff(1, 2), "mlp_out", how="resample", reference=reference
    )
    generator = torch.Generator().manual_seed(5)
    first, second = sweep(seed=generator), sweep(seed=generator)
    assert torch.equal(first.values, sweep(seed=5).values)
    assert not torch.equal(first.values, second.values)
    assert not torch.equal(sweep(seed=6).values, sweep(seed=5).values)
    assert torch.equal(sweep().values, sweep(seed=0).values)


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_a_reference_may_be_a_cache_and_is_left_as_it_is(how):
    model, reference = shared("LayerNorm"), prompts(5, 4, seed=8)
    cache = model.run_with_cache(reference)[1]
    kept = {name: value.clone() for name, value in cache.items()}
    sweep = functools.partial(ablate_sweep, model, CLEAN, hl.logit_diff(1, 2), ("z", "pattern"), how=how)
    expected = sweep(reference=reference)
    for given_ in (cache, dict(cache.items())):
        close(sweep(reference=given_).values, expected.values, atol=0)
    assert all(torch.equal(cache[name], value) for name, value in kept.items())


def test_metrics_of_an_ablation_compare_with_the_intact_run():
    model = shared("relative")
    sweep = ablate_sweep(model, CLEAN, hl.metrics.kl("clean"), "attn_out")
    close(sweep.base, 0.0)
    assert sweep.values.max() > 0.01
    with pytest.raises(ValueError, match="corrupted"):
        ablate_sweep(model, CLEAN, hl.metrics.kl("corrupted"), "attn_out")


# Models with hooks on them


def mixes_the_batch(activation, hook):
    """A hook that notices whether other runs share its forward pass."""
    return activation + activation.mean(0, keepdim=True) * len(activation)


@pytest.fixture(params=["LayerNorm", "native bridge", "GPT-2"])
def hooked_model(request):
    """A model on which a user has two hooks: one at a hook point that sweeps patch, one that minds its batch."""
    model = shared(request.param)
    model(CLEAN)
    before = hooks_on(model)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", mixes_the_batch)]):
        point = model.hook_dict["blocks.0.attn.hook_z"]
        point.add_perma_hook(lambda z, hook: z * 1.5)
        yield model
        point.remove_hooks("fwd", including_permanent=True)
    assert hooks_on(model) == before


def test_hooks_of_the_users_take_part_in_every_run(hooked_model, unchecked):
    model = hooked_model
    with left_as_it_was(model):
        for components in (("resid_pre", "attn_out"), ("z",)):
            assert agrees(model, components).method == "forward"
        ablated = ablate_sweep(model, CLEAN, of_all_positions, "mlp_out", "all")
        expected = measured(looped(model, CLEAN, zeros, ["mlp_out"], positions=(None,), alone=True), of_all_positions)
        close(ablated.values, expected.squeeze(-1))
        for sweep in (
            lambda: patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), method="incremental"),
            lambda: ablate_sweep(model, CLEAN, hl.logit_diff(1, 2), method="incremental"),
        ):
            with pytest.raises(ValueError, match=r"method='incremental'.*there are hooks on the model"):
                sweep()


@pytest.mark.parametrize("how", ["zero", "resample"])
@pytest.mark.parametrize("name", ["relative", "LayerNorm", "native bridge"])
def test_sweeps_within_an_ablation_are_of_the_ablated_model(name, how):
    model = shared(name)
    intact = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), "z").values
    reference = {} if how == "zero" else {"reference": prompts(3, 4, seed=7), "seed": 1}
    with left_as_it_was(model), ablate(model, HEADS[0], how, **reference):
        inside = agrees(model, ["z"])
        assert inside.method == "forward"
    assert (inside.values - intact).abs().max() > 0.01
    assert patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), "z").method == "incremental"


TORCH_HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(lambda m, args, out: hook(out)),
    "forward with arguments": lambda module, hook: module.register_forward_hook(
        lambda m, args, kwargs, out: hook(out), with_kwargs=True
    ),
    "before forward": lambda module, hook: module.register_forward_pre_hook(lambda m, args: (hook(args[0]),)),
    "a partial function": lambda module, hook: module.register_forward_hook(
        functools.partial(lambda scale, m, args, out: hook(out) * scale, 0.5)
    ),
}


@pytest.mark.parametrize("kind", TORCH_HOOKS)
@pytest.mark.parametrize("name", ["LayerNorm", "native bridge", "Hugging Face's module in a bridge"])
def test_hooks_of_torchs_take_part_too(name, kind, unchecked):
    inner = name.startswith("Hugging")
    model = gpt2_like() if inner else shared(name)
    mlp = model.blocks[0].mlp
    intact = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), "resid_pre").values
    handle = TORCH_HOOKS[kind](mlp.original_component if inner else mlp, lambda x: x + x.mean(0, keepdim=True))
    try:
        found = agrees(model, ["resid_pre"])
        assert found.method == "forward"
        assert (found.values - intact).abs().max() > 0.01
        with pytest.raises(ValueError, match=r"method='incremental'.*there are hooks on the model"):
            patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), method="incremental")
    finally:
        handle.remove()
    assert patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2)).method == "incremental"


# Models that are not taken apart


class Doubled(type(hooked().blocks[0])):
    """A block that does more than its parts do."""

    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Steered(type(hooked().blocks[0])):
    """A block with something of its own at one early position."""

    def forward(self, *args, **kwargs):
        stream = super().forward(*args, **kwargs).clone()
        stream[:, 1] *= 2
        return stream


def with_forward(model):
    """A model whose first attention has a forward that somebody put there, of effect before the last position."""
    attn = model.blocks[0].attn
    own = attn.forward

    def forward(*args, **kwargs):
        written = own(*args, **kwargs)
        return torch.cat([2 * written[:, :-1], written[:, -1:]], 1)

    attn.forward = forward
    return model


class Inverted(type(hooked().blocks[0].attn)):
    """An attention with something of its own in it."""

    def calculate_attention_scores(self, *args, **kwargs):
        return -super().calculate_attention_scores(*args, **kwargs)


class Capped(type(hooked())):
    """A model that does something to its logits."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).tanh()


def with_class(model, part, kind):
    part(model).__class__ = kind
    return model


STRANGE = {  # and what is said of them
    "ALiBi": (lambda: hooked("LN", positional_embedding_type="alibi"), "cfg.positional_embedding_type='alibi'"),
    "shortformer": (lambda: hooked("LN", positional_embedding_type="shortformer"), "'shortformer' is not taken apart"),
    "a window": (
        lambda: hooked("LN", use_local_attn=True, window_size=2, attn_types=["global", "local"]),
        "cfg.use_local_attn=True is not taken apart",
    ),
    "capped scores": (lambda: hooked("LN", attn_scores_soft_cap=1.0), "cfg.attn_scores_soft_cap=1.0"),
    "capped logits": (lambda: hooked("LN", output_logits_soft_cap=1.0), "cfg.output_logits_soft_cap=1.0"),
    "normed queries": (lambda: hooked("RMS", use_qk_norm=True, **ROTARY), "cfg.use_qk_norm=True"),
    "norms after": (
        lambda: hooked("RMS", use_normalization_before_and_after=True, gated_mlp=True, act="silu"),
        "cfg.use_normalization_before_and_after=True",
    ),
    "a lower block of another class": (
        lambda: with_class(hooked("LN"), lambda model: model.blocks[0], Doubled),
        "resid_post of layer 0",
    ),
    "a block that acts at one position": (
        lambda: with_class(hooked("LN"), lambda model: model.blocks[0], Steered),
        "resid_post of layer 0",
    ),
    "an attention's own forward": (lambda: with_forward(hooked("LN")), "attn_out of layer 0"),
    "a last block of another class": (
        lambda: with_class(hooked(), lambda model: model.blocks[1], Doubled),
        "the logits",
    ),
    "attention of another class": (
        lambda: with_class(hooked("LN"), lambda model: model.blocks[1].attn, Inverted),
        "a part of type Inverted is not taken apart",
    ),
    "a model of another class": (lambda: with_class(hooked("LN"), lambda model: model, Capped), "the logits"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_models_that_are_not_taken_apart_are_run_whole(name):
    make, reason = STRANGE[name]
    model = make()
    with left_as_it_was(model):
        for components in (["resid_pre", "mlp_out"], ["z", "q"]):
            sweep = agrees(model, components)
            assert sweep.method == "forward"
        with pytest.raises(ValueError, match=f"method='incremental' cannot run this {type(model).__name__}.*{reason}"):
            patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), method="incremental")


def test_a_bridges_subclassed_part_is_not_taken_apart():
    bridge = native("LN")[0]
    kind = type(bridge.blocks[1].attn)
    bridge.blocks[1].attn.__class__ = type("Other", (kind,), {})
    assert agrees(bridge, ["resid_pre"]).method == "forward"
    with pytest.raises(ValueError, match=r"method='incremental' cannot run this TransformerBridge.*type Other"):
        patch_sweep(bridge, CLEAN, CORRUPTED, hl.logit_diff(1, 2), method="incremental")


def test_angles_that_depend_on_a_prompts_length_are_not_computed_for_some_positions_alone(unchecked):
    bridge = modern("Phi3")
    clean, corrupted = prompts(2, 7, d_vocab=13), prompts(2, 7, d_vocab=13, seed=5)
    found = patch_sweep(bridge, clean, corrupted, hl.logit_diff(1, 2), "resid_pre", positions=[1, 2])
    cache = bridge.run_with_cache(clean)[1]
    for layer, position in itertools.product(range(2), (1, 2)):
        name = f"blocks.{layer}.hook_resid_pre"

        def write(stream, hook, position=position):
            edited = stream.clone()
            edited[:, position] = cache[name][:, position]  # noqa: B023
            return edited

        with torch.no_grad():
            logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, write)])[:, -1]
        close(found.values[0, layer, position - 1], (logits[:, 1] - logits[:, 2]).mean())
    with pytest.raises(ValueError, match="rotary angles that depend on a prompt's length are not taken apart"):
        patch_sweep(bridge, clean, corrupted, hl.logit_diff(1, 2), method="incremental")


def on_block(layer, **changes):
    def change(opened):
        blocks = list(opened.blocks)
        made = {name: value(getattr(blocks[layer], name)) for name, value in changes.items()}
        blocks[layer] = replace(blocks[layer], **made)
        return replace(opened, blocks=tuple(blocks))

    return change


WRONGLY_OPENED = {  # a part that the engine would have got wrong, and where that must be noticed
    "queries": (on_block(0, W_Q=lambda w: w * 1.001), "q of layer 0"),
    "query biases": (on_block(1, b_Q=lambda b: b + 0.001), "q of layer 1"),
    "keys": (on_block(1, W_K=lambda w: w * 1.001), "k of layer 1"),
    "values": (on_block(0, b_V=lambda b: b + 0.001), "v of layer 0"),
    "scale": (on_block(1, scale=lambda scale: scale * 1.01), "z of layer 1"),
    "outputs": (on_block(1, W_O=lambda w: w.flip(0)), "attn_out of layer 1"),
    "output bias": (on_block(0, b_O=lambda b: b + 0.001), "attn_out of layer 0"),
    "norm": (on_block(0, ln1=lambda norm: lambda x: x), "q of layer 0"),
    "MLP": (on_block(1, mlp=lambda mlp: lambda x: mlp(x) * 1.001), "mlp_out of layer 1"),
    "no MLP": (on_block(0, mlp=lambda mlp: None), "resid_post of layer 0|mlp_out of layer 0"),
    "side by side": (on_block(0, parallel=lambda parallel: not parallel), "mlp_out of layer 0"),
    "no rotation": (on_block(1, rotate=lambda rotate: None), "z of layer 1"),
    "rotation": (on_block(0, rotate=lambda rotate: lambda x, at: rotate(x, at * 2)), "z of layer 0"),
    "unembedding": (lambda opened: replace(opened, unembed=lambda x: opened.unembed(x) + 0.001), "the logits"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("grouped", part) for part in WRONGLY_OPENED),
        *(("Llama", part) for part in ("keys", "scale", "rotation", "MLP")),
    ],
)
def test_a_part_that_is_not_what_the_model_computes_is_noticed(name, part, monkeypatch):
    model, (change, where) = shared(name), WRONGLY_OPENED[part]
    sweep = functools.partial(patch_sweep, model, CLEAN, CORRUPTED, activations="attn_out", positions=0, layers=0)
    right = sweep(hl.logit_diff(1, 2))
    assert right.method == "incremental"
    opening = api.open_model
    monkeypatch.setattr(api, "open_model", lambda model: change(opening(model)))
    for metric in (hl.logit_diff(1, 2), hl.logit_diff(1, 2, position=1), of_all_positions):
        with pytest.raises(ValueError, match=rf"({where}) would not be what the model computes"):
            sweep(metric, method="incremental")
    fallen_back = sweep(hl.logit_diff(1, 2))
    assert fallen_back.method == "forward"
    close(fallen_back.values, right.values)


def test_flags_that_only_add_hook_points_change_nothing():
    for config in ({}, GROUPED):
        expected = patch_sweep(hooked("LN", **config), CLEAN, CORRUPTED, hl.logit_diff(1, 2), ("k", "v"))
        for flag in (
            "use_attn_result",
            "use_split_qkv_input",
            "use_hook_mlp_in",
            *(() if config else ("use_attn_in",)),
        ):
            model = hooked("LN", **config)
            getattr(model, f"set_{flag}")(True)
            sweep = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), ("k", "v"))
            assert sweep.method == "incremental"
            close(sweep.values, expected.values)
    agrees(model, ["k", "v"])
    ungrouped = hooked("LN", ungroup_grouped_query_attention=True, **GROUPED)
    sweep = patch_sweep(ungrouped, CLEAN, CORRUPTED, hl.logit_diff(1, 2), ("k", "v", "z"), method="incremental")
    assert sweep.values.shape[-1] == 4
    logits = looped(ungrouped, CORRUPTED, cached(ungrouped, CLEAN), ("k", "v", "z"), units=range(4))
    close(sweep.values, measured(logits, difference(-1)))


# Models whose differences the runs at hand do not show


def far_away():
    """Local attention whose query would look at what lies beyond its window, if only it were there."""
    model = hooked(n_layers=1, n_heads=1, use_local_attn=True, window_size=2, attn_types=["local"])
    with torch.no_grad():
        attn = model.blocks[0].attn
        model.W_E[:, 0] = model.W_pos[:, 0] = 0
        model.W_E[5, 0], model.W_E[6, 0] = 0.5, 1.0
        for weight in (attn.W_Q, attn.b_Q, attn.W_K, attn.b_K):
            weight.zero_()
        attn.b_Q[0, 0], attn.W_K[0, 0, 0] = 200, 1
    return model, torch.tensor([[6, 1, 5, 5]]), torch.tensor([[3, 1, 5, 5]])


UNSEEN = {
    "bidirectional attention": (lambda: (hooked("LN", attention_dir="bidirectional"), CLEAN, CORRUPTED), 1e-10),
    "a window": (far_away, 1e-10),
    "a wide cap on scores": (
        lambda: (hooked("LN", attn_scores_soft_cap=300.0, dtype=torch.float32), CLEAN, CORRUPTED),
        1e-5,
    ),
    "a wide cap on logits": (
        lambda: (hooked("LN", output_logits_soft_cap=100.0, dtype=torch.float32), CLEAN, CORRUPTED),
        1e-5,
    ),
    "experts": (
        lambda: (hooked("RMS", num_experts=2, experts_per_token=1, dtype=torch.float32), CLEAN, CORRUPTED),
        1e-5,
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_models_whose_difference_is_hard_to_see_are_swept_right_too(name):
    make, tolerance = UNSEEN[name]
    model, clean, corrupted = make()
    sweep = patch_sweep(model, clean, corrupted, hl.logit_diff(1, 2), BLOCK)
    expected = measured(looped(model, corrupted, cached(model, clean), BLOCK), difference(-1))
    assert (sweep.values - expected.squeeze(-1)).abs().max() <= tolerance * expected.abs().max()


# What costs nothing, and what it costs


class Sizes:
    """How many patches were run at once."""

    def __init__(self, monkeypatch):
        self.seen = []
        for kind in (ForwardRuns, IncrementalRuns):
            monkeypatch.setattr(kind, "values", self.watched(kind.values))

    def watched(self, method):
        def values(runs, jobs, memory):
            for places, found in method(runs, jobs, memory):
                self.seen.append(len(places))
                yield places, found

        return values


@pytest.mark.parametrize("reads", ["last", "all"])
@pytest.mark.parametrize("method", ["incremental", "forward"])
def test_little_memory_gives_the_same_numbers_in_more_steps(method, reads, monkeypatch):
    model, sizes = shared("grouped"), Sizes(monkeypatch)
    for components, units in ((("resid_pre", "mlp_out"), None), (("z",), (0, 3)), (("k",), None), (("post",), (0, 5))):
        sweep = functools.partial(
            patch_sweep, model, CLEAN, CORRUPTED, METRICS[reads][0], components, units=units, layers=(0, 2)
        )
        sizes.seen = []
        at_once, count, most = sweep(method=method), sum(sizes.seen), max(sizes.seen)
        assert most > 3
        for memory, largest in ((1e-12, 1), (1e-5, most - 1), (1e308, most)):
            sizes.seen = []
            close(sweep(method=method, memory_gb=memory).values, at_once.values)
            assert max(sizes.seen) <= largest
            assert sum(sizes.seen) == count


@pytest.mark.parametrize("method", ["incremental", "forward"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_patches_that_write_what_is_there_are_not_run(group, method, monkeypatch):
    model, sizes, calls = shared("grouped"), Sizes(monkeypatch), itertools.count()

    def metric(logits):
        next(calls)
        return of_all_positions(logits)

    for positions in (None, "all"):
        sweep = patch_sweep(model, CLEAN, CLEAN, metric, group, positions, method=method)
        assert torch.equal(sweep.effect, torch.zeros_like(sweep.values))
        assert bool((sweep.values == sweep.base).all())
        assert sweep.source == sweep.base
    assert not any(sizes.seen)
    assert next(calls) == 4


def test_where_nothing_is_to_be_run_the_model_is_not_run_on_an_empty_batch():
    model, batches = shared("LayerNorm"), []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: batches.append(len(x)))]):
        patch_sweep(model, CLEAN, CLEAN, hl.logit_diff(1, 2), "resid_pre")
    assert batches == [2, 2]


def test_prompts_that_differ_late_are_patched_only_there(monkeypatch):
    model, sizes = shared("LayerNorm"), Sizes(monkeypatch)
    corrupted = CLEAN.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 7
    for method in ("incremental", "forward"):
        sizes.seen = []
        sweep = patch_sweep(model, CLEAN, corrupted, of_all_positions, "resid_pre", method=method)
        assert sum(sizes.seen) == 3 + 2  # in layer 0, position 2 alone differs
        assert torch.equal(sweep.effect[:, :, :2], torch.zeros(1, 3, 2, dtype=torch.float64))
        assert bool((sweep.effect[0, :, 2] != 0).all())


def test_patches_after_the_position_that_is_read_do_nothing(monkeypatch):
    model, sizes = shared("LayerNorm"), Sizes(monkeypatch)
    for group in GROUPS.values():
        sweep = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2, position=1), group, method="incremental")
        assert torch.equal(sweep.effect[:, :, 2:], torch.zeros_like(sweep.effect[:, :, 2:]))
        assert sweep.effect[:, :, :2].abs().max() > 0.01
    sizes.seen = []
    patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2, position=1), "attn_out", method="incremental")
    assert sum(sizes.seen) == 2 + 2 + 1  # of the last layer, only what comes out at position 1


# Whatever goes wrong, the model is as it was


class Sentinel(Exception):
    pass


def nth_time(n, error):
    """A metric that fails when it is asked once too often."""
    calls = itertools.count(1)

    def metric(logits):
        if next(calls) == n:
            error()
        return logits[:, :, 1].sum()

    return metric


def fails():
    raise Sentinel


def interrupts():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("error", "kind"), [(fails, Sentinel), (interrupts, KeyboardInterrupt)])
@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("name", ["relative", "native bridge"])
def test_a_metric_that_fails_leaves_nothing_behind(name, n, error, kind):
    model = shared(name)
    for method in ("incremental", "forward"):
        with left_as_it_was(model), pytest.raises(kind):
            patch_sweep(model, CLEAN, CORRUPTED, nth_time(n, error), method=method)
        with left_as_it_was(model), pytest.raises(kind):
            ablate_sweep(model, CLEAN, nth_time(n, error), method=method)
    with left_as_it_was(model), ablate(model, HEADS[0]), pytest.raises(kind):
        patch_sweep(model, CLEAN, CORRUPTED, nth_time(n, error))


@pytest.mark.parametrize(("error", "kind"), [(fails, Sentinel), (interrupts, KeyboardInterrupt)])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["relative", "native bridge"])
def test_a_hook_of_the_users_that_fails_leaves_nothing_behind(name, n, error, kind):
    model, calls = shared(name), itertools.count(1)
    with left_as_it_was(model):
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: error() if next(calls) == n else None)]):
            before = hooks_on(model)
            with pytest.raises(kind):
                patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2), "resid_pre")
            assert hooks_on(model) == before
        assert next(calls) == n + 1


FILES = ("hooks/sweep/", "hooks/intervention.py", "hooks/site.py", "hijack_lens/blocks.py", "hijack_lens/metrics.py")


class CtrlC:
    """A Ctrl-C at the n-th line that runs in the library; where that was, or `None`.

    What no program can guard is passed over: the first line of `__exit__`, and the moment before that, on a `with`.
    """

    def __init__(self, n=None):
        self.n, self.lines, self.where, self.entered = n, 0, None, None

    def __call__(self, frame, event, _):
        code = frame.f_code
        if not any(part in code.co_filename for part in FILES):
            return None
        if event != "line":
            self.entered = frame if code.co_name == "__exit__" else self.entered
            return self
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if self.entered is frame or line.startswith("with "):
            self.entered = None
            return self
        self.lines += 1
        if self.lines == self.n:
            self.where = f"{code.co_filename}, line {frame.f_lineno}"
            raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.parametrize("method", ["incremental", "forward"])
@pytest.mark.parametrize("name", ["attention only", "native bridge"])
def test_ctrl_c_at_any_moment_leaves_nothing_behind(name, method, unchecked):
    model = shared(name)
    sweep = functools.partial(
        patch_sweep, model, CLEAN[:1, :2], CORRUPTED[:1, :2], of_all_positions, "z", layers=0, method=method
    )
    with CtrlC() as whole:
        sweep()
    assert whole.lines > 100
    logits, before = model(CLEAN), hooks_on(model)
    for n in sorted(random.Random(0).sample(range(1, whole.lines + 1), 20)):
        with contextlib.suppress(KeyboardInterrupt), CtrlC(n) as moment:
            sweep()
        assert moment.where is not None
        assert hooks_on(model) == before, moment.where
        assert torch.is_grad_enabled(), moment.where
    assert torch.equal(model(CLEAN), logits)


@pytest.mark.parametrize("method", ["incremental", "forward"])
def test_nothing_else_is_touched(method, global_rng_untouched):
    model = hooked("LN")
    frozen = [index % 3 == 0 for index, _ in enumerate(model.parameters())]
    for parameter, is_frozen in zip(model.parameters(), frozen, strict=True):
        parameter.requires_grad_(not is_frozen)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    clean, corrupted, reference = CLEAN.clone(), CORRUPTED.clone(), prompts(3, 4, seed=2)
    for group in GROUPS.values():
        with left_as_it_was(model):
            sweeps = (
                patch_sweep(model, clean, corrupted, hl.logit_diff(1, 2), group, method=method),
                patch_sweep(model, clean, corrupted, of_all_positions, group, "all", "noise", method=method),
                ablate_sweep(
                    model, clean, hl.logit_diff(1, 2), group, None, "resample", reference, seed=3, method=method
                ),
            )
        assert torch.is_grad_enabled()
        for sweep in sweeps:
            assert not sweep.values.requires_grad
            assert sweep.values.grad_fn is None
    assert [not parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))
    assert torch.equal(clean, CLEAN)
    assert torch.equal(corrupted, CORRUPTED)


# Bad input


def patching(metric=None, clean=CLEAN, corrupted=CORRUPTED, model="LayerNorm", **options):
    metric = hl.logit_diff(1, 2) if metric is None else metric
    return lambda: patch_sweep(shared(model) if isinstance(model, str) else model, clean, corrupted, metric, **options)


def ablating(**options):
    options = {"metric": hl.logit_diff(1, 2), **options}
    return lambda: ablate_sweep(shared("LayerNorm"), CLEAN, **options)


test_what_makes_no_sense_is_refused = refused(
    ValueError,
    {
        "activations must be among 'resid_pre', .*, got 'attn'": patching(activations="attn"),
        "activations must be among .*got 'hook_z'": patching(activations=["z", "hook_z"]),
        "activations must all have heads, all have neurons, or neither: sweep z, mlp_out": patching(
            activations=("z", "mlp_out")
        ),
        "activations must all have heads.*: sweep post, z": patching(activations=("post", "z")),
        "clean and corrupted must have one shape .*\\(2, 4\\) and \\(2, 3\\)": patching(corrupted=CORRUPTED[:, :3]),
        "clean and corrupted must have one shape .*\\(2, 4\\) and \\(1, 4\\)": patching(corrupted=CORRUPTED[:1]),
        "clean is text, but the model has no tokenizer": patching(clean="one two"),
        "corrupted is text, but the model has no tokenizer": patching(corrupted=["one two"]),
        "clean holds token id 7": patching(clean=CLEAN * 0 + 7),
        "corrupted is 13 tokens long": patching(corrupted=[0] * 13),
        "direction must be one of 'denoise', 'noise', got 'clean'": patching(direction="clean"),
        "method must be one of 'auto', 'incremental', 'forward', got 'fast'": patching(method="fast"),
        "layers holds 3; the model has 3": patching(layers=3),
        "layers holds -4": patching(layers=[0, -4]),
        "layers must hold at least one": patching(layers=[]),
        "units holds 2; the model has 2": patching(activations="z", units=2),
        "units holds 10; the model has 10": patching(activations="post", units=range(11)),
        "units holds 2; the model has 2 *$": patching(model="grouped", activations="k", units=[2]),
        "units must be None for mlp_out": patching(activations="mlp_out", units=0),
        "positions holds 4; the run has 4 tokens": patching(positions=4),
        "positions holds -5": patching(positions=[0, -5]),
        "positions must hold at least one": patching(positions=()),
        "memory_gb must be a finite number > 0, got 0": patching(memory_gb=0),
        "memory_gb must be .*got nan": patching(memory_gb=float("nan")),
        "metric 'logit 1 − logit 2' reads position 4; the prompts have 4": patching(hl.logit_diff(1, 2, 4)),
        "metric 'logit 1 − logit 2' reads position -5": patching(hl.logit_diff(1, 2, -5)),
        "answer has 3 tokens, one per prompt, for 2 prompts": patching(hl.logit_diff([1, 2, 3], 0)),
        "foil holds token id 9": patching(hl.logit_diff(1, 9)),
        "TransformerBridge does not honour edits at 'blocks.0.hook_resid_mid'": patching(
            model="GPT-2", clean=CLEAN, activations="resid_mid"
        ),
        "'blocks.0.hook_resid_mid' is not a hook point": patching(model="parallel", activations="resid_mid"),
        "how must be one of 'zero', 'mean', 'resample', got 'median'": ablating(how="median"),
        "how='mean' needs reference=": ablating(how="mean"),
        "how='resample' needs reference=": ablating(how="resample"),
        "how='zero' takes no reference": ablating(reference=CORRUPTED),
        "reference must be as long as prompt, 4, got 5": ablating(how="mean", reference=prompts(2, 5)),
        "reference must be as long as prompt, 4, got 3": ablating(
            how="resample", reference=prompts(2, 3), activations="pattern"
        ),
        "reference holds token id 8": ablating(how="mean", reference=[8, 8, 8, 8]),
        "reference is a cache without blocks.0.attn.hook_z": ablating(how="mean", reference={}, activations="z"),
        "activations must be among .*got 'heads'": ablating(activations="heads"),
        "layers holds 7": ablating(layers=7),
        "metric '.*' reads position 9": ablating(metric=hl.logit_diff(1, 2, 9)),
    },
)

test_what_is_of_another_kind_is_refused = refused(
    TypeError,
    {
        "model must be a HookedTransformer or TransformerBridge, got 3": patching(model=3),
        "activations must be one or several of .*got \\[\\]": patching(activations=[]),
        "activations must be one or several of .*got 5": patching(activations=5),
        "activations must be one or several of .*HEAD|Component": patching(activations=[HEADS[0]]),
        "clean must be a tensor of token ids, got NoneType": patching(clean=None),
        "corrupted must hold integer token ids": patching(corrupted=torch.rand(2, 4)),
        "layers must be an int or several, got 'a'": patching(layers="a"),
        "layers must be an int or several, got True": patching(layers=True),
        "layers must be ints, got 0.5": patching(layers=[0.5]),
        "units must be ints, got None": patching(activations="z", units=[None]),
        "positions must be an int or several, got 'last'": patching(positions="last"),
        "positions must be ints, got 1.0": patching(positions=[1.0]),
        "memory_gb must be a number, got '1'": patching(memory_gb="1"),
        "metric must be a hijack_lens Metric or a function of logits, got 3": patching(3),
        "metric must be a hijack_lens Metric or a function of logits, got 'margin'": ablating(metric="margin"),
        "metric must give one number per run, got a tensor of shape \\(2, 4\\)": patching(lambda x: x[:, :, 1]),
        "metric must give one number per run, got None": patching(lambda x: None),
        "metric must give one number per run, got 'much'": patching(lambda x: "much"),
        "metric must give one number per run, got a tensor of shape \\(2,\\)": ablating(metric=lambda x: x[:, 0, 1]),
        "seed must be an int, a torch.Generator or None, got 'x'": ablating(how="mean", reference=CORRUPTED, seed="x"),
    },
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "of_logits",
    [lambda x: x, lambda x: x.sum(), lambda x: x[..., 0, :], lambda x: 3.0],
    ids=["no number", "of the whole batch", "of one prompt", "no tensor"],
)
def test_a_metric_whose_numbers_are_not_one_per_prompt_is_refused(of_logits):
    for method in ("incremental", "forward"):
        with pytest.raises(TypeError, match="metric 'mine' must give one number per prompt"):
            patch_sweep(shared("LayerNorm"), CLEAN, CORRUPTED, hl.Metric("mine", of_logits), method=method)


@pytest.mark.parametrize("components", [("mlp_out",), ("resid_pre", "mlp_out")])
def test_mlps_of_a_model_without_them_are_refused(components, unchecked):
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_mlp_out' never fires: this model's blocks have no MLPs"):
        patch_sweep(shared("attention only"), CLEAN, CORRUPTED, hl.logit_diff(1, 2), components)


def without_mlps(kind):
    if kind == "hooked":
        return shared("attention only")
    options = {**SHAPE, "n_layers": 2, "act_fn": "gelu", "normalization_type": "LN", "seed": 0, "attn_only": True}
    return TransformerBridge.boot_native(options, device="cpu", dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", ["hooked", "native bridge"])
def test_by_default_a_sweep_leaves_out_what_the_model_lacks(kind, unchecked):
    model, pair = without_mlps(kind), (CLEAN, CORRUPTED, hl.logit_diff(1, 2))
    for function in (patch_sweep, attribution_patch):
        found = function(model, *pair)
        assert found.activations == ("resid_pre", "attn_out")
        close(found.values, function(model, *pair, ("resid_pre", "attn_out")).values, atol=0)
    ablated = ablate_sweep(model, CLEAN, hl.logit_diff(1, 2))
    assert ablated.activations == ("attn_out",)
    assert float(ablated.effect.abs().max()) > 0.01
    with pytest.raises(ValueError, match=r"hook_mlp_out' (never fires|is not a hook point)"):
        patch_sweep(model, *pair, ("resid_pre", "attn_out", "mlp_out"))


@pytest.mark.parametrize("name", ["grouped", "Llama"])
def test_queries_and_shared_keys_and_values_are_swept_in_one_call(name, unchecked):
    model, pair = shared(name), (CLEAN, CORRUPTED, hl.logit_diff(1, 2))
    for function in (patch_sweep, functools.partial(patch_sweep, method="forward"), attribution_patch):
        for positions in (None, "all"):
            found = function(model, *pair, ("q", "k", "v"), positions)
            assert found.units == (0, 1, 2, 3)
            for activation, size in (("q", 4), ("k", 2), ("v", 2)):
                alone = function(model, *pair, activation, positions).values
                close(found[activation].values[..., :size], alone, atol=1e-12)
                assert bool(found[activation].values[..., size:].isnan().all())
    some = patch_sweep(model, *pair, ("k", "q"), units=[3, 1])
    close(some["k"].values[..., 1:], patch_sweep(model, *pair, "k", units=1).values)
    assert bool(some["k"].values[..., 0].isnan().all())
    assert some.picture().png()
    assert "nan" not in repr(some)
    assert int(some.to_pandas()["value"].isna().sum()) == model.cfg.n_layers * 4


@pytest.mark.parametrize("model", ["LayerNorm", "native bridge"])
def test_after_bad_input_the_model_is_as_it_was(model, unchecked):
    with left_as_it_was(shared(model)):
        for options in ({"activations": "attn"}, {"positions": 9}, {"metric": lambda x: x}, {"layers": 9}):
            with pytest.raises((TypeError, ValueError)):
                patching(model=model, **options)()
