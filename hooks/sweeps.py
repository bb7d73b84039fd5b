"""The sweeps as a user calls them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.checks import as_generator, check_choice, check_number
from hijack_lens.core.hook_points import check_model, is_hooked
from hijack_lens.core.inputs import model_tokens
from hijack_lens.hooks.incremental_runs import IncrementalRuns
from hijack_lens.hooks.intervention import read_source, record
from hijack_lens.hooks.patched_runs import BoundMetric, Direction, ForwardRuns, PromptPair, by_position
from hijack_lens.hooks.sweep_plan import Plan, hook_name, make_plan
from hijack_lens.hooks.sweep_results import Sweep
from hijack_lens.metrics import Metric
from hijack_lens.models.opened import UnknownArchitectureError, check_plain, open_model

Method = Literal["auto", "incremental", "forward"]
STREAM = ("resid_pre", "attn_out", "mlp_out")


@torch.no_grad()
def patch_sweep(
    model: Any,
    clean: object,
    corrupted: object,
    metric: Metric | Callable[[Tensor], Any],
    components: str | Sequence[str] = STREAM,
    positions: int | Iterable[int] | Literal["all"] | None = None,
    direction: Direction = "denoise",
    *,
    layers: int | Iterable[int] | None = None,
    units: int | Iterable[int] | None = None,
    method: Method = "auto",
    memory_gb: float = 0.25,
) -> Sweep:
    """Activation patching of every component, layer and position, each alone: what TransformerLens's
    `patching.get_act_patch_*` loop over, exactly.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many, as long.
        metric: one of `hijack_lens.metrics`; or a function from the logits [batch, pos, d_vocab] of one run to a
            number, which costs more, since it may read every position.
        components: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"; or, by head, "z", "q", "k", "v",
            "pattern" (whose positions are the queries'); or "post", the MLPs' neurons.
        positions: which; by default every one, each alone. "all" patches all positions at once.
        direction: "denoise" runs the corrupted prompts and patches the clean run's activations in; "noise" the reverse.
        layers: which; by default all.
        units: which heads or neurons; by default all.
        method: "incremental" computes only what a patch can have changed, on models whose parts are known (it is
            compared with a run of the model first); "forward" runs the whole model on batches of patches. By default
            the first where it can be, with no hooks on the model.
        memory_gb: how much memory patched runs may take at a time, roughly.

    Raises:
        TypeError, ValueError: for what the model lacks or would ignore, prompts that do not match, and a metric that
            gives no number; with method="incremental" for a model that cannot be run so.
    """
    pair = PromptPair.of(model, clean, corrupted, direction)
    plan = make_plan(model, components, positions, layers, units, pair.base.shape[1])
    check_metric(metric, pair.base.shape[1])
    source_logits, source = record(model, pair.source, [hook_name(*point) for point in plan.points])

    def reader_of(base_logits: Tensor) -> BoundMetric:
        return pair.reader(model, metric, base_logits, source_logits)

    return _sweep(model, pair.base, plan, source, reader_of, method, memory_gb, direction, source_logits)


@torch.no_grad()
def ablate_sweep(
    model: Any,
    tokens: object,
    metric: Metric | Callable[[Tensor], Any],
    components: str | Sequence[str] = ("attn_out", "mlp_out"),
    positions: int | Iterable[int] | Literal["all"] | None = None,
    how: Literal["zero", "mean", "resample"] = "zero",
    reference: object = None,
    *,
    layers: int | Iterable[int] | None = None,
    units: int | Iterable[int] | None = None,
    seed: int | torch.Generator = 0,
    method: Method = "auto",
    memory_gb: float = 0.25,
) -> Sweep:
    """Ablates every component, layer and position, each alone.

    Args:
        model: as for `patch_sweep`, and likewise all that is not named here.
        tokens: the prompts to run; a metric's "clean" run is theirs.
        metric: of the logits.
        components: to ablate.
        positions: which; "all" ablates all positions at once.
        how: "zero"; "mean" over the reference prompts, position by position; or "resample": what a reference prompt
            has there, drawn for each prompt once for the whole sweep.
        reference: prompts or a cache, as long as `tokens`; for "mean" and "resample".
        layers: which.
        units: which heads or neurons.
        seed: of the draws for "resample".
        method: how to compute it.
        memory_gb: how much memory to take.

    Raises:
        TypeError, ValueError: as for `patch_sweep`, and where `reference` is missing, unused or of another length.
    """
    check_choice("how", how, ("zero", "mean", "resample"))
    if (reference is None) != (how == "zero"):
        need = "takes no reference" if how == "zero" else "needs reference="
        raise ValueError(f"how={how!r} {need}, got reference={reference!r:.60}")
    generator = as_generator(seed)
    check_model(model)
    run = model_tokens(model, tokens)
    plan = make_plan(model, components, positions, layers, units, run.shape[1])
    check_metric(metric, run.shape[1])
    names = [hook_name(*point) for point in plan.points]
    source: dict[str, Tensor] | None = None
    if how != "zero":
        source = read_source(model, reference, names, "reference")
        length = source[names[0]].shape[2 if plan.components[0] == "pattern" else 1]
        if length != run.shape[1]:
            raise ValueError(f"reference must be as long as tokens, {run.shape[1]}, got {length}")
        first = next(iter(source.values()))
        drawn = torch.randint(len(first), (len(run),), generator=generator).to(first.device)
        for name, activation in source.items():
            chosen = activation.mean(0, keepdim=True) if how == "mean" else activation[drawn]
            source[name] = chosen.expand(len(run), *activation.shape[1:])

    def reader_of(logits: Tensor) -> BoundMetric:
        return BoundMetric.of(metric.on(model, clean=logits) if isinstance(metric, Metric) else metric, logits.shape[1])

    return _sweep(model, run, plan, source, reader_of, method, memory_gb, "ablate", None)


def check_metric(metric: object, length: int) -> None:
    """`metric` is a function, and reads no position beyond the prompts."""
    if not callable(metric):
        raise TypeError(f"metric must be a hijack_lens Metric or a function of logits, got {metric!r:.80}")
    if isinstance(metric, Metric):
        metric.index(length)


def _sweep(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    plan: Plan,
    source: dict[str, Tensor] | None,
    reader_of: Callable[[Tensor], BoundMetric],
    method: Method,
    memory_gb: float,
    direction: Literal["denoise", "noise", "ablate"],
    source_logits: Tensor | None,
) -> Sweep:
    """What patching and ablation share: `source` holds what is written, or is `None` for zeros."""
    check_choice("method", method, ("auto", "incremental", "forward"))
    memory = check_number("memory_gb", memory_gb, positive=True) * 2**30
    why_not = "there are hooks on the model" if is_hooked(model) else None
    opened = None
    if why_not is None and method != "forward":
        try:
            check_plain(model)
            opened = open_model(model)
        except UnknownArchitectureError as error:
            why_not = str(error)
    names = [hook_name(*point) for point in plan.points]
    base_logits, base = record(
        model, tokens, list(dict.fromkeys(names + ([] if opened is None else IncrementalRuns.names(opened))))
    )
    reader = reader_of(base_logits)
    unpatched = reader(base_logits)
    runs: ForwardRuns | IncrementalRuns = ForwardRuns(model, tokens, reader, together=not is_hooked(model))
    if opened is not None:
        incremental = IncrementalRuns(opened, base, base_logits, reader)
        differs = incremental.mismatch()
        if differs is None:
            runs = incremental
        else:
            why_not = f"{differs} would not be what the model computes"
    if method == "incremental" and why_not is not None:
        raise ValueError(f"method='incremental' cannot run this {type(model).__name__}: {why_not}")

    values = base_logits.new_full(plan.shape, unpatched)
    patches = plan.patches(tokens.shape[1])
    with tqdm(total=len(plan.points) * len(patches), disable=None, unit="patch") as bar:
        for (component, layer), into in zip(plan.points, values.view(len(plan.points), -1), strict=True):
            name = hook_name(component, layer)
            current = by_position(component, base[name])
            written = torch.zeros_like(current) if source is None else by_position(component, source[name])
            reached = runs.reaches(component, layer, patches)
            # Writing what is there already changes nothing.
            live = (reached & patches.pick((current != written).any(0)).cpu()).nonzero()[:, 0]
            bar.update(len(patches) - len(live))
            for chosen in runs.chunks(component, layer, patches[live], memory):
                into[live[chosen]] = runs.values(component, layer, patches[live[chosen]], written)
                bar.update(len(chosen))
    return Sweep(
        values=values,
        components=plan.components,
        layers=plan.layers,
        positions=(None,) if plan.positions is None else plan.positions,
        unit=plan.unit,
        units=plan.units,
        metric=reader.name,
        base=unpatched,
        source=None if source_logits is None else reader(source_logits),
        direction=direction,
        method=runs.name,
        texts=position_texts(model, tokens, plan),
    )


def position_texts(model: Any, tokens: Int[Tensor, "batch pos"], plan: Plan) -> tuple[str, ...] | None:
    """The patched positions' tokens, where they are one prompt's."""
    if len(tokens) > 1 or plan.positions is None or getattr(model, "tokenizer", None) is None:
        return None
    texts = model.to_str_tokens(tokens[0])
    return tuple(texts[position] for position in plan.positions)
