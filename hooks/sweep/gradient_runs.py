"""Runs on the way from one prompt to another, and the metric's derivative by activations in each of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack_lens.hooks.intervention import HookFunction, Intervention, record
from hijack_lens.hooks.sweep.pair import PromptPair
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
