"""Patched runs as whole forward passes, many in a batch; runs to differentiate; and reading the metric off both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice, check_count, shown
from hijack_lens.core.inputs import model_tokens
from hijack_lens.core.tables import widened
from hijack_lens.hooks.intervention import HookFunction, Intervention, keeping, logits_of, record
from hijack_lens.hooks.sweep_plan import Job, Patches, hook_name
from hijack_lens.metrics import Logits, Metric

MetricLike = Metric | Callable[[Tensor], Any]
"""What a user may give as a metric: one of `hijack_lens.metrics`, or a function of one run's logits."""


def check_metric(metric: object, length: int) -> None:
    """Checks that `metric` is a function, and reads no position beyond the prompts."""
    if not callable(metric):
        raise TypeError(f"metric must be a hijack_lens Metric or a function of logits, got {shown(metric)}")
    if isinstance(metric, Metric):
        metric.index(length)


@dataclass(frozen=True)
class BoundMetric:
    """A metric, ready to be read off many patched runs at once.

    Attributes:
        metric: a function of one run's logits [batch, pos, d_vocab].
        only: the one position that it reads, counted from the front; `None` if it may read all.
    """

    metric: MetricLike
    only: int | None

    @classmethod
    def of(cls, model: Any, metric: MetricLike, clean: Tensor, corrupted: Tensor | None = None) -> "BoundMetric":
        """The metric, given what it needs from the model and from the unpatched runs' logits."""
        if not isinstance(metric, Metric):
            return cls(metric, None)
        return cls(metric.on(model, clean, corrupted), metric.index(clean.shape[1]))

    @property
    def name(self) -> str:
        """The metric's name."""
        return getattr(self.metric, "name", None) or getattr(self.metric, "__name__", None) or "metric"

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> float:
        """The metric of one run."""
        value = self.metric(logits if isinstance(self.metric, Metric) else widened(logits))
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"metric must give one number per run, got a tensor of shape {tuple(value.shape)}")
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric must give one number per run, got {shown(value)}") from error

    def each(self, logits: Float[Tensor, "patch batch pos d_vocab"]) -> Float[Tensor, "patch"]:
        """The metric of each run."""
        if isinstance(self.metric, Metric):
            assert self.only is not None
            return self.each_at(logits[:, :, self.only])
        return widened(logits.new_empty(())).new_tensor([self(run) for run in logits])

    def each_at(self, logits: Float[Tensor, "patch batch d_vocab"]) -> Float[Tensor, "patch"]:
        """The metric of each run, from the logits at the one position that it reads."""
        assert isinstance(self.metric, Metric)
        return self.metric.of_rows(logits).mean(-1)


Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt, in the roles that the direction gives them, and the metric for both.

    Attributes:
        base: the tokens of the run that is patched.
        source: the tokens of the run that patches come from.
        direction: "denoise" patches the clean run into the corrupted one; "noise" the reverse.
        metric: what to compute on both runs.
    """

    base: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    direction: Direction
    metric: MetricLike

    @classmethod
    def of(cls, model: Any, clean: object, corrupted: object, metric: Any, direction: Direction) -> "PromptPair":
        """The pair, from the prompts and the metric that a user gives."""
        check_choice("direction", direction, ("denoise", "noise"))
        tokens = model_tokens(model, clean, "clean"), model_tokens(model, corrupted, "corrupted")
        if tokens[0].shape != tokens[1].shape:
            shapes = (tuple(one.shape) for one in tokens)
            raise ValueError("clean and corrupted must have one shape [batch, pos], got {} and {}".format(*shapes))
        check_metric(metric, tokens[0].shape[1])
        source, base = tokens if direction == "denoise" else tokens[::-1]
        return cls(base, source, direction, metric)

    def reader(self, model: Any, base: Logits, source: Logits) -> BoundMetric:
        """The metric, given what it needs from the model and from the two runs' logits."""
        runs = (source, base) if self.direction == "denoise" else (base, source)
        return BoundMetric.of(model, self.metric, *runs)


@dataclass(frozen=True)
class ForwardRuns:
    """Patched runs through the model itself.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        tokens: the unpatched run's tokens.
        reader: reads the metric off the logits.
        together: whether patches may share a forward pass. The user's hooks must see only their own batch.
    """

    name: ClassVar[Literal["forward"]] = "forward"
    model: Any
    tokens: Int[Tensor, "batch pos"]
    reader: BoundMetric
    together: bool

    def reaches(self, activation: str, layer: int, patches: Patches) -> Tensor:
        """Which patches can change the metric; here, none is ruled out."""
        return torch.ones(len(patches), dtype=torch.bool)

    def values(
        self, jobs: Sequence[Job], memory: float
    ) -> Iterator[tuple[Int[Tensor, "patch"], Float[Tensor, "patch"]]]:
        """The metric under each patch of all jobs, in parts that fit into `memory` bytes, with their places."""
        size = runs_at_once(self.model, self.tokens, memory) if self.together else 1
        for job in jobs:
            for rows in torch.arange(len(job.patches)).split(size):
                part = job[rows]
                yield part.places, self._values(part.activation, part.layer, part.patches, part.source)

    def _values(
        self, activation: str, layer: int, patches: Patches, source: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "patch"]:
        count = len(patches)

        def write(current: Tensor, hook: Any) -> Tensor:
            edited = current.clone()
            runs = by_position(activation, edited).unflatten(0, (count, -1))  # a view, to write through
            for row, positions in enumerate(patches.positions):
                if patches.units is None:
                    runs[row, :, positions] = source[:, positions].to(runs)
                else:
                    unit = patches.units[row]
                    runs[row, :, positions, unit] = source[:, positions, unit].to(runs)
            return edited

        with Intervention(self.model, edit=[(hook_name(activation, layer), write)]):
            logits = logits_of(self.model, repeat(self.tokens, "batch pos -> (patch batch) pos", patch=count))
        return self.reader.each(rearrange(logits, "(patch batch) pos d_vocab -> patch batch pos d_vocab", patch=count))


def by_position(activation: str, values: Tensor) -> Float[Tensor, "batch pos ..."]:
    """A view of an activation's values with positions second, then heads or neurons."""
    return rearrange(values, "batch head query key -> batch query head key") if activation == "pattern" else values


def runs_at_once(model: Any, tokens: Int[Tensor, "batch pos"], memory: float) -> int:
    """Roughly how many runs on `tokens` fit into `memory` bytes; at least one."""
    cfg, (batch, length) = model.cfg, tokens.shape
    wide = cfg.d_vocab * 2 + cfg.d_model * 8 + (cfg.d_mlp or 0) * 3 + cfg.n_heads * length * 3
    return max(1, int(memory // (batch * length * wide * torch.finfo(cfg.dtype).bits // 8)))


_START = "blocks.0.hook_resid_pre"


_MOST_STEPS = 10_000
"""Runs that a derivative is averaged over, far beyond what changes it."""


def check_steps(steps: object) -> None:
    """Checks the number of runs that a derivative is averaged over."""
    if check_count("steps", steps, 1) > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS}, got {shown(steps)}")


class GradientRuns:
    """Runs of a model from the base run's embeddings, or from embeddings part of the way to the source run's.

    The model is left unchanged, including which parameters require gradients and the gradients they hold. Must be used
    outside `torch.inference_mode`.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        pair: the two runs' prompts, and the metric to differentiate.
        names: the hook points whose activations to record in the two runs.

    Attributes:
        base: the base run's recorded activations, by hook point.
        source: the source run's.
        reader: reads the metric off the logits.
        base_value: the metric of the base run.
        source_value: the metric of the source run.
    """

    def __init__(self, model: Any, pair: PromptPair, names: Sequence[str]):
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ValueError("model was made under torch.inference_mode(), so nothing can be differentiated through it")
        self.model = model
        self.tokens = pair.base.clone()  # autograd keeps none that were made under inference mode
        recorded = list(dict.fromkeys([*names, _START]))
        source_logits, self.source = record(model, pair.source, recorded)
        base_logits, self.base = record(model, self.tokens, recorded)
        self.reader = pair.reader(model, base_logits, source_logits)
        self.base_value, self.source_value = self.reader(base_logits), self.reader(source_logits)

    def at(
        self, fraction: float, by: Sequence[str], look: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """In one run, the metric's derivatives with respect to activations at `by`, and the activations at `look`.

        The run's embeddings (positions included) lie `fraction` of the way from the base run's to the source run's.
        """
        start = self.base[_START] + fraction * (self.source[_START] - self.base[_START])
        seen: dict[str, Tensor] = {}
        looked: dict[str, Tensor] = {}

        def watch(name: str) -> HookFunction:
            def hook_fn(activation: Tensor, hook: Any) -> Tensor:
                current = start if name == _START else activation
                # The sum makes it part of the graph whatever the parameters require. Returning it makes what follows
                # depend on it, even where a bridge goes on with a different shape from the one it shows.
                seen[name] = current + current.new_zeros(()).requires_grad_()
                return seen[name]

            return hook_fn

        edits = [(name, watch(name)) for name in dict.fromkeys([_START, *by])]
        # Entered second, so that they see what the edits return.
        looks = Intervention(self.model, look=keeping(looked, look))
        with torch.enable_grad(), Intervention(self.model, edit=edits), looks:
            value = self._value(logits_of(self.model, self.tokens))
        gradients = torch.autograd.grad(value, [seen[name] for name in by], allow_unused=True)
        found: dict[str, Tensor] = {}
        for name, gradient in zip(by, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"metric {self.reader.name!r} does not depend on {name!r} at all: a hook on the model, or the "
                    "model itself, uses another value in its place"
                )
            found[name] = gradient
        return found, looked

    def _value(self, logits: Tensor) -> Tensor:
        value = self.reader.metric(widened(logits))
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise TypeError(
                f"metric {self.reader.name!r} must give a tensor that torch can differentiate, got {shown(value)}: "
                "compute it from the logits with torch operations only, without .item(), .detach() or no_grad()"
            )
        return value.reshape(())
