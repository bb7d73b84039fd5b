"""Attribution patching: a sweep estimated from derivatives."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import check_count
from hijack_lens.hooks.intervention import HookFunction, Intervention, record
from hijack_lens.hooks.patched_runs import Direction, PromptPair, by_position
from hijack_lens.hooks.sweep_plan import Plan, hook_name, make_plan
from hijack_lens.hooks.sweep_results import Comparison, Sweep
from hijack_lens.hooks.sweeps import STREAM, check_metric, patch_sweep, position_texts
from hijack_lens.metrics import Metric

_START = "blocks.0.hook_resid_pre"


class GradientRuns:
    """Runs of a model whose embeddings are the base run's, or part of the way to the source run's.

    Nothing of the model's changes: not which parameters require gradients, nor the gradients they hold.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        pair: the two runs' prompts.
        metric: to differentiate.
        names: of the hook points whose activations to record in the two runs.

    Attributes:
        base: what was recorded of the base run.
        source: of the source run.
        reader: of the metric.
        base_value: the metric of the base run.
        source_value: of the source run.
    """

    def __init__(self, model: Any, pair: PromptPair, metric: Metric | Callable[[Tensor], Any], names: Sequence[str]):
        self.model = model
        self.pair = pair
        recorded = list(dict.fromkeys([*names, _START]))
        source_logits, self.source = record(model, pair.source, recorded)
        base_logits, self.base = record(model, pair.base, recorded)
        self.reader = pair.reader(model, metric, base_logits, source_logits)
        self.base_value, self.source_value = self.reader(base_logits), self.reader(source_logits)

    def at(
        self, fraction: float, by: Sequence[str], look: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The metric's derivative in one run by activations, and other activations of that run.

        Args:
            fraction: of the way from the base run's embeddings (with positions) to the source run's.
            by: hook points by whose activations to differentiate.
            look: hook points whose activations to return.

        Raises:
            TypeError: for a metric that cannot be differentiated.
            ValueError: for an activation on which the metric does not depend at all.
        """
        start = self.base[_START] + fraction * (self.source[_START] - self.base[_START])
        seen: dict[str, Tensor] = {}
        looked: dict[str, Tensor] = {}

        def watch(name: str) -> HookFunction:
            def hook_fn(activation: Tensor, hook: Any) -> Tensor:
                current = start if name == _START else activation
                # A sum, so that it is a part of the graph whatever the parameters require; and handed back, so that
                # what follows depends on it, also where a bridge goes on with another shape than it shows.
                seen[name] = current + current.new_zeros(()).requires_grad_()
                return seen[name]

            return hook_fn

        def keep(name: str) -> HookFunction:
            def hook_fn(activation: Tensor, hook: Any) -> None:
                looked[name] = activation.detach()

            return hook_fn

        edits = [(name, watch(name)) for name in dict.fromkeys([_START, *by])]
        # Entered second, what only looks sees what was handed back.
        looks = Intervention(self.model, look=[(name, keep(name)) for name in look])
        with torch.enable_grad(), Intervention(self.model, edit=edits), looks:
            value = self._value(self.model(self.pair.base))
        gradients = torch.autograd.grad(value, [seen[name] for name in by], allow_unused=True)
        found: dict[str, Tensor] = {}
        for name, gradient in zip(by, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"metric {self.reader.name!r} does not depend on {name!r} at all: a hook on the model, or the "
                    "model itself, goes on with something else"
                )
            found[name] = gradient
        return found, looked

    def _value(self, logits: Tensor) -> Tensor:
        value = self.reader.metric(logits)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise TypeError(
                f"metric {self.reader.name!r} must give a tensor that torch can differentiate, got {value!r:.80}: "
                "compute it from the logits by torch's operations alone, without .item(), .detach() or no_grad()"
            )
        return value.reshape(())


MetricLike = Metric | Callable[[Tensor], Any]
Which = int | Iterable[int] | None


@overload
def attribution_patch(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    components: str | Sequence[str] = ...,
    positions: Which | Literal["all"] = ...,
    direction: Direction = ...,
    *,
    layers: Which = ...,
    units: Which = ...,
    steps: int = ...,
    compare: Literal[False] = ...,
) -> Sweep: ...
@overload
def attribution_patch(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    components: str | Sequence[str] = ...,
    positions: Which | Literal["all"] = ...,
    direction: Direction = ...,
    *,
    layers: Which = ...,
    units: Which = ...,
    steps: int = ...,
    compare: Literal[True],
) -> Comparison[Sweep]: ...
@torch.no_grad()
def attribution_patch(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    components: str | Sequence[str] = STREAM,
    positions: Which | Literal["all"] = None,
    direction: Direction = "denoise",
    *,
    layers: Which = None,
    units: Which = None,
    steps: int = 1,
    compare: bool = False,
) -> Sweep | Comparison[Sweep]:
    """`patch_sweep` to first order: (source − base) · ∂metric/∂activation, for every patch at once.

    It costs three forward passes and a backward one, however many patches there are (Nanda 2023, "Attribution
    patching"; arXiv 2310.10348). It is exact where the metric is linear in the activation; where it is not, as for
    large changes, saturated attention, or a KL from the very run that is patched (whose derivative is zero), `compare`
    tells by how much it is off.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many, as long.
        metric: one of `hijack_lens.metrics`, or a function from the logits [batch, pos, d_vocab] of one run to a tensor
            of one number, which torch can differentiate.
        components: as for `patch_sweep`.
        positions: which; by default every one, each alone. "all" patches all positions at once.
        direction: "denoise" runs the corrupted prompts and patches the clean run's activations in; "noise" the reverse.
        layers: which; by default all.
        units: which heads or neurons; by default all.
        steps: above 1, the derivative is the mean of that many runs, whose embeddings go from the base run's towards
            the source run's in equal steps (as in arXiv 2403.17806): for a metric that is flat at the base run.
        compare: whether to run the exact sweep as well, and to return both.

    Raises:
        TypeError, ValueError: as for `patch_sweep`, and for a metric without a derivative.
    """
    check_count("steps", steps, 1)
    pair = PromptPair.of(model, clean, corrupted, direction)
    plan = make_plan(model, components, positions, layers, units, pair.base.shape[1])
    check_metric(metric, pair.base.shape[1])
    names = [hook_name(*point) for point in plan.points]
    runs = GradientRuns(model, pair, metric, names)
    effects = torch.zeros(plan.shape, dtype=model.cfg.dtype, device=pair.base.device)
    for step in range(steps):
        gradients, _ = runs.at(step / steps, names)
        for (component, layer), into in zip(plan.points, effects.flatten(0, 1), strict=True):
            name = hook_name(component, layer)
            change = (runs.source[name] - runs.base[name]) * gradients[name]
            into += _of_patches(plan, by_position(component, change).sum(0)).to(into) / steps
    estimate = Sweep(
        values=runs.base_value + effects,
        components=plan.components,
        layers=plan.layers,
        positions=(None,) if plan.positions is None else plan.positions,
        unit=plan.unit,
        units=plan.units,
        metric=runs.reader.name,
        base=runs.base_value,
        source=runs.source_value,
        direction=direction,
        method="gradient",
        texts=position_texts(model, pair.base, plan),
    )
    if not compare:
        return estimate
    exact = patch_sweep(model, clean, corrupted, metric, components, positions, direction, layers=layers, units=units)
    return Comparison(estimate, exact)


def _of_patches(plan: Plan, change: Float[Tensor, "pos ..."]) -> Float[Tensor, "position *unit"]:
    """What a change by position, and whatever comes after it, sums up to for each patch."""
    if plan.unit is None:
        change = change.flatten(1).sum(-1)
    else:
        change = change.reshape(*change.shape[:2], -1).sum(-1)[:, list(plan.units)]
    return change.sum(0, keepdim=True) if plan.positions is None else change[list(plan.positions)]
