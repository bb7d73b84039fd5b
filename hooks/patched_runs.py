"""Patched runs as whole forward passes, many in a batch, and the metric read off them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice
from hijack_lens.core.hook_points import check_model
from hijack_lens.core.inputs import model_tokens
from hijack_lens.hooks.intervention import Intervention
from hijack_lens.hooks.sweep_plan import Patches, hook_name
from hijack_lens.metrics import Metric


@dataclass(frozen=True)
class BoundMetric:
    """A metric, ready to be read off many patched runs at once.

    Attributes:
        metric: of the logits [batch, pos, d_vocab] of one run.
        only: the one position that it reads, from the front; `None` where it may read all.
    """

    metric: Metric | Callable[[Tensor], Any]
    only: int | None

    @classmethod
    def of(cls, metric: Any, length: int) -> "BoundMetric":
        """The reader for prompts of a length; `metric` has been resolved."""
        return cls(metric, metric.index(length) if isinstance(metric, Metric) else None)

    @property
    def name(self) -> str:
        """What to call the metric."""
        return getattr(self.metric, "name", None) or getattr(self.metric, "__name__", None) or "metric"

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> float:
        """The metric of one run.

        Raises:
            TypeError: where the metric gives anything but one number.
        """
        value = self.metric(logits)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"metric must give one number per run, got a tensor of shape {tuple(value.shape)}")
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric must give one number per run, got {value!r:.80}") from error

    def each(self, logits: Float[Tensor, "patch batch pos d_vocab"]) -> Float[Tensor, "patch"]:
        """The metric of each run."""
        if isinstance(self.metric, Metric):
            assert self.only is not None
            return self.each_at(logits[:, :, self.only])
        return torch.tensor([self(run) for run in logits], dtype=logits.dtype, device=logits.device)

    def each_at(self, logits: Float[Tensor, "patch batch d_vocab"]) -> Float[Tensor, "patch"]:
        """The same, from the logits of the one position."""
        assert isinstance(self.metric, Metric)
        return self.metric.of_rows(logits).mean(-1)


Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt, in the roles that the direction gives them.

    Attributes:
        base: tokens of the run that is patched.
        source: tokens of the run that patches come from.
        direction: "denoise" patches the clean run into the corrupted one; "noise" the reverse.
    """

    base: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    direction: Direction

    @classmethod
    def of(cls, model: Any, clean: object, corrupted: object, direction: Direction) -> "PromptPair":
        """The pair of what a user calls prompts.

        Raises:
            TypeError, ValueError: for what are no prompts of this model, or are not of one shape.
        """
        check_choice("direction", direction, ("denoise", "noise"))
        check_model(model)
        tokens = model_tokens(model, clean, "clean"), model_tokens(model, corrupted, "corrupted")
        if tokens[0].shape != tokens[1].shape:
            shapes = (tuple(one.shape) for one in tokens)
            raise ValueError("clean and corrupted must have one shape [batch, pos], got {} and {}".format(*shapes))
        source, base = tokens if direction == "denoise" else tokens[::-1]
        return cls(base, source, direction)

    def reader(
        self,
        model: Any,
        metric: Metric | Callable[[Tensor], Any],
        base: Float[Tensor, "batch pos d_vocab"],
        source: Float[Tensor, "batch pos d_vocab"],
    ) -> BoundMetric:
        """The metric, with what it needs of the model and of the two runs' logits."""
        if isinstance(metric, Metric):
            clean, corrupted = (source, base) if self.direction == "denoise" else (base, source)
            metric = metric.on(model, clean, corrupted)
        return BoundMetric.of(metric, base.shape[1])


class ForwardRuns:
    """Patched runs through the model itself.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: of the unpatched run.
        reader: of the metric.
        together: whether patches may share a forward pass. Hooks of the user's must not see a batch other than theirs.
    """

    name: Literal["forward"] = "forward"

    def __init__(self, model: Any, tokens: Int[Tensor, "batch pos"], reader: BoundMetric, together: bool):
        self.model = model
        self.tokens = tokens
        self.reader = reader
        self.together = together

    def reaches(self, component: str, layer: int, patches: Patches) -> Tensor:
        """Which patches can change the metric; whole runs need no such knowledge."""
        return torch.ones(len(patches), dtype=torch.bool)

    def chunks(self, component: str, layer: int, patches: Patches, memory: float) -> list[Int[Tensor, "chunk"]]:
        """Indices of patches, in groups that fit into `memory` bytes."""
        if not len(patches):
            return []
        size = runs_at_once(self.model, self.tokens, memory) if self.together else 1
        return list(torch.arange(len(patches)).split(size))

    def values(
        self, component: str, layer: int, patches: Patches, source: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "patch"]:
        """The metric under each patch.

        Args:
            component: whose activation is patched.
            layer: of the model.
            patches: where.
            source: the activation to patch in, positions second (of patterns: the query's).
        """
        count = len(patches)

        def write(activation: Tensor, hook: Any) -> Tensor:
            edited = activation.clone()
            runs = by_position(component, edited).unflatten(0, (count, -1))
            for row, positions in enumerate(patches.positions):
                if patches.units is None:
                    runs[row, :, positions] = source[:, positions].to(runs)
                else:
                    unit = patches.units[row]
                    runs[row, :, positions, unit] = source[:, positions, unit].to(runs)
            return edited

        with Intervention(self.model, edit=[(hook_name(component, layer), write)]):
            logits = self.model(self.tokens.repeat(count, 1))
        return self.reader.each(logits.unflatten(0, (count, -1)))


def by_position(component: str, activation: Tensor) -> Float[Tensor, "batch pos ..."]:
    """A view of an activation with positions second, then heads or neurons."""
    return activation.transpose(1, 2) if component == "pattern" else activation


def runs_at_once(model: Any, tokens: Int[Tensor, "batch pos"], memory: float) -> int:
    """How many runs on `tokens` fit into `memory` bytes, roughly; at least one."""
    cfg, (batch, length) = model.cfg, tokens.shape
    wide = cfg.d_vocab * 2 + cfg.d_model * 8 + (cfg.d_mlp or 0) * 3 + cfg.n_heads * length * 3
    return max(1, int(memory // (batch * length * wide * torch.finfo(cfg.dtype).bits // 8)))
