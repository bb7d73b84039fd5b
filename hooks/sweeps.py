"""The sweeps as a user calls them: by patched runs, by ablated runs, or estimated from derivatives."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import Seed, as_generator
from hijack_lens.core.hook_points import is_hooked
from hijack_lens.core.inputs import model_tokens
from hijack_lens.core.memory import memory_budget
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import widened
from hijack_lens.core.texts import decoded, tokenizer_of
from hijack_lens.hooks.incremental_runs import IncrementalRuns, Method, checked_runs, open_for
from hijack_lens.hooks.intervention import check_reference, draw_rows, read_source, record, stand_in
from hijack_lens.hooks.patched_runs import (
    BoundMetric,
    Direction,
    ForwardRuns,
    GradientRuns,
    MetricLike,
    PromptPair,
    by_position,
    check_metric,
    check_steps,
)
from hijack_lens.hooks.sweep_plan import STREAM, Job, Plan, hook_name, make_plan
from hijack_lens.hooks.sweep_results import Sweep
from hijack_lens.models.readable import UnreadableWeightsError, check_readable

Which = int | Iterable[int] | None


@analysis
def patch_sweep(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    activations: str | Sequence[str] | None = None,
    positions: Which | Literal["all"] = None,
    direction: Direction = "denoise",
    *,
    layers: Which = None,
    units: Which = None,
    method: Method = "auto",
    memory_gb: float = 0.25,
    prepend_bos: bool | None = None,
) -> Sweep:
    """Activation patching of every activation, layer and position, one at a time: exactly what TransformerLens's
    `patching.get_act_patch_*` functions compute in a loop.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many prompts, of the same length.
        metric: one of `hijack_lens.metrics`; or a function from the logits [batch, pos, d_vocab] of one run to a
            number, which costs more, since it may read every position.
        activations: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"; or, by head, "z", "q", "k", "v",
            "pattern" (whose positions are the queries'); or "post", the MLPs' neurons. By default those of "resid_pre",
            "attn_out" and "mlp_out" that the model has.
        positions: which positions; by default every one, one at a time. "all" patches all positions at once.
        direction: "denoise" runs the corrupted prompts and patches the clean run's activations in; "noise" the reverse.
        layers: which layers; by default all.
        units: which heads or neurons; by default all. Where heads share keys and values, "k" and "v" have fewer than
            "q": what is not there is NaN.
        method: "incremental" computes only what a patch can change, on models whose parts are known (it is first
            checked against a run of the model); "forward" runs the whole model on batches of patches. "auto" takes
            "incremental" where it works and the model has no hooks, else "forward".
        memory_gb: roughly how much memory the patched runs may take at a time.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for what the model lacks or would ignore, prompts that do not match, and a metric that
            gives no number; with method="incremental", for a model that cannot be run this way.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.patch_sweep(model, prompt.clean, prompt.corrupted, margin, "resid_pre")
        >>> sweep.to_pandas().round(3).nlargest(3, "effect")[["layer", "position", "token", "effect"]]
            layer  position token  effect
        4       0         4     u   6.553
        6       0         6     u   6.553
        16      0        16     u   6.553
    """
    pair = PromptPair.of(model, clean, corrupted, metric, direction)
    plan = make_plan(model, activations, positions, layers, units, pair.base.shape[1])
    source_logits, source = record(model, pair.source, [hook_name(*point) for point in plan.points])
    bound = partial(pair.reader, model, source=source_logits)
    return _sweep(model, pair.base, plan, source, bound, method, memory_gb, direction, source_logits)


@analysis
def ablate_sweep(
    model: Any,
    prompt: object,
    metric: MetricLike,
    activations: str | Sequence[str] | None = None,
    positions: Which | Literal["all"] = None,
    how: Literal["zero", "mean", "resample"] = "zero",
    reference: object = None,
    *,
    layers: Which = None,
    units: Which = None,
    seed: Seed = 0,
    method: Method = "auto",
    memory_gb: float = 0.25,
    prepend_bos: bool | None = None,
) -> Sweep:
    """Ablates every activation, layer and position, one at a time.

    Args:
        model: as for `patch_sweep`; so are all details not given here.
        prompt: one prompt or a batch; its intact run is the "clean" run of a metric that needs one.
        metric: a metric of the logits.
        activations: which activations to ablate; by default those of "attn_out" and "mlp_out" that the model has.
        positions: which positions; "all" ablates all positions at once.
        how: "zero"; "mean" over the reference prompts, position by position; or "resample": what a reference prompt
            has there, drawn for each prompt once for the whole sweep.
        reference: prompts or a cache, as long as `prompt`; for "mean" and "resample".
        layers: which layers.
        units: which heads or neurons.
        seed: the seed of the draws for "resample".
        method: how to compute it.
        memory_gb: how much memory to use.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: as for `patch_sweep`, and where `reference` is missing, unused or of another length.

    Examples:
        >>> sweep = hl.hooks.ablate_sweep(model, prompt, hl.metrics.margin(prompt), positions=[-1])
        >>> sweep.to_pandas()[["activation", "layer", "effect"]]
          activation  layer    effect
        0   attn_out      0  0.000000
        1   attn_out      1 -9.853812
        2    mlp_out      0  0.000000
        3    mlp_out      1  6.580639
    """
    check_reference(how, reference)
    generator = as_generator(seed)
    tokens = model_tokens(model, prompt)
    plan = make_plan(model, activations, positions, layers, units, tokens.shape[1], STREAM[1:])
    check_metric(metric, tokens.shape[1])
    names = [hook_name(*point) for point in plan.points]
    written: dict[str, Tensor] | None = None
    if how != "zero":
        source = read_source(model, reference, names, "reference")
        first = source[names[0]]
        length = first.shape[2 if plan.activations[0] == "pattern" else 1]
        if length != tokens.shape[1]:
            raise ValueError(f"reference must be as long as prompt, {tokens.shape[1]}, got {length}")
        rows = draw_rows(how, len(first), len(tokens), generator)
        written = {name: stand_in(how, x, rows).expand(len(tokens), *x.shape[1:]) for name, x in source.items()}
    bound = partial(BoundMetric.of, model, metric)
    return _sweep(model, tokens, plan, written, bound, method, memory_gb, "ablate", None)


@analysis
def attribution_patch(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    activations: str | Sequence[str] | None = None,
    positions: Which | Literal["all"] = None,
    direction: Direction = "denoise",
    *,
    layers: Which = None,
    units: Which = None,
    steps: int = 1,
    prepend_bos: bool | None = None,
) -> Sweep:
    """`patch_sweep` to first order: (source − base) · ∂metric/∂activation, for every patch at once.

    It costs three forward passes and a backward one, however many patches there are (Nanda 2023, "Attribution
    patching"; arXiv 2310.10348). It is exact where the metric is linear in the activation; where it is not, as for
    large changes, saturated attention, or a KL divergence from the base run itself (whose derivative is zero),
    `compare` measures how far off it is.

    Args:
        model: as for `patch_sweep`; so are all details not given here.
        clean: the clean prompts.
        corrupted: as many prompts, of the same length.
        metric: one of `hijack_lens.metrics`, or a function from the logits [batch, pos, d_vocab] of one run to a tensor
            of one number, which torch can differentiate.
        activations: which activations to patch.
        positions: which positions; "all" patches all positions at once.
        direction: which run's activations are patched in.
        layers: which layers.
        units: which heads or neurons.
        steps: the number of runs to average the derivative over; above 1, for a metric that is flat at the base run.
            Their embeddings go from the base run's towards the source run's in equal steps (as in arXiv 2403.17806).
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: as for `patch_sweep`, and for a metric without a derivative.

    Examples:
        >>> runs = prompt.clean, prompt.corrupted, hl.metrics.log_prob("e"), "attn_out"
        >>> estimate = hl.hooks.attribution_patch(model, *runs)
        >>> compared = estimate.compare(hl.hooks.patch_sweep(model, *runs))
        >>> f"correlation {compared.correlation:.2f}, relative error {compared.relative_error:.2f}"
        'correlation 1.00, relative error 0.20'
    """
    check_steps(steps)
    pair = PromptPair.of(model, clean, corrupted, metric, direction)
    plan = make_plan(model, activations, positions, layers, units, pair.base.shape[1])
    names = [hook_name(*point) for point in plan.points]
    runs = GradientRuns(model, pair, names)
    effects = widened(torch.zeros(plan.shape, dtype=model.cfg.dtype, device=pair.base.device))
    for step in range(steps):
        gradients, _ = runs.at(step / steps, names)
        for (activation, layer), into in zip(plan.points, effects.flatten(0, 1), strict=True):
            name = hook_name(activation, layer)
            source, base, gradient = map(widened, (runs.source[name], runs.base[name], gradients[name]))
            change = by_position(activation, (source - base) * gradient)
            into += _of_patches(plan, activation, reduce(change, "batch pos ... -> pos ...", "sum")).to(into) / steps
    measured = {"base": runs.base_value, "source": runs.source_value, "direction": direction, "method": "gradient"}
    return _labelled(model, pair.base, plan, runs.base_value + effects, runs.reader, **measured)


def _of_patches(plan: Plan, activation: str, change: Float[Tensor, "pos ..."]) -> Float[Tensor, "position *unit"]:
    """For each patch, the sum of `change` over the positions and units that it covers."""
    if plan.unit is None:
        change = reduce(change, "pos ... -> pos", "sum")
    else:
        every, there = reduce(change, "pos unit ... -> pos unit", "sum"), plan.there(activation)
        change = every.new_full((len(every), len(plan.units)), torch.nan)
        change[:, there] = every[:, [unit for unit in plan.units if unit < every.shape[1]]]
    return change.sum(0, keepdim=True) if plan.positions is None else change[list(plan.positions)]


def _sweep(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    plan: Plan,
    source: dict[str, Tensor] | None,
    bound: Callable[[Tensor], BoundMetric],
    method: Method,
    memory_gb: float,
    direction: Literal["denoise", "noise", "ablate"],
    source_logits: Tensor | None,
) -> Sweep:
    """What patching and ablation share. `source` is what is written, `None` for zeros; `bound` takes base logits."""
    memory = memory_budget(memory_gb)
    opened, why_not = open_for(model, method)
    if opened is not None:
        try:
            for layer in plan.layers if "post" in plan.activations else ():
                check_readable(model, layer, "mlp.W_out")
        except UnreadableWeightsError as error:
            opened, why_not = None, str(error)
    names = [hook_name(*point) for point in plan.points]
    base_logits, base = record(
        model, tokens, list(dict.fromkeys(names + ([] if opened is None else IncrementalRuns.names(opened))))
    )
    reader = bound(base_logits)
    unpatched = reader(base_logits)
    incremental = checked_runs(model, method, opened, why_not, base, base_logits, reader)
    runs = incremental or ForwardRuns(model, tokens, reader, together=not is_hooked(model))

    values = widened(base_logits.new_empty(())).new_full(plan.shape, unpatched)
    patches = plan.patches(tokens.shape[1])
    jobs = []
    places = torch.arange(values.numel()).view(len(plan.points), -1)
    for (activation, layer), into, place in zip(plan.points, values.view(places.shape), places, strict=True):
        current = by_position(activation, base[hook_name(activation, layer)])
        written = current.new_zeros(()).expand_as(current)
        if source is not None:
            written = by_position(activation, source[hook_name(activation, layer)])
        there = plan.there(activation).repeat(len(into) // len(plan.units or (0,)))
        into[~there.to(into.device)] = torch.nan
        rows = there.nonzero()[:, 0]
        reached = runs.reaches(activation, layer, patches[rows])
        # Writing what is there already changes nothing.
        rows = rows[reached & patches[rows].pick((current != written).any(0)).cpu()]
        if len(rows):
            jobs.append(Job(activation, layer, patches[rows], written, place[rows]))
    with progress(sum(len(job.patches) for job in jobs), "patched run", "the sweep") as advance:
        for place, found in runs.values(jobs, memory):
            values.view(-1)[place] = found
            advance(len(place))
    of_source = None if source_logits is None else reader(source_logits)
    measured = {"base": unpatched, "source": of_source, "direction": direction, "method": runs.name}
    return _labelled(model, tokens, plan, values, reader, **measured)


def _labelled(
    model: Any, tokens: Int[Tensor, "batch pos"], plan: Plan, values: Tensor, reader: BoundMetric, **measured: Any
) -> Sweep:
    """The values, with the plan's labels for their axes."""
    texts = None  # of the tokens at the positions, for a single prompt
    if len(tokens) == 1 and plan.positions is not None and tokenizer_of(model) is not None:
        every = decoded(model.tokenizer, tokens[0].tolist())
        texts = tuple(every[position] for position in plan.positions)
    return Sweep(
        values=values,
        activations=plan.activations,
        layers=plan.layers,
        positions=(None,) if plan.positions is None else plan.positions,
        unit=plan.unit,
        units=plan.units,
        metric=reader.name,
        texts=texts,
        **measured,
    )
