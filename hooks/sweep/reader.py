"""From the logits of patched runs to the metric's values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.metrics import Metric


@dataclass(frozen=True)
class Reader:
    """A metric, ready to be read off many patched runs at once.

    Attributes:
        metric: of the logits [batch, pos, d_vocab] of one run.
        only: the one position that it reads, from the front; `None` where it may read all.
    """

    metric: Metric | Callable[[Tensor], Any]
    only: int | None

    @classmethod
    def of(cls, metric: Any, length: int) -> "Reader":
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
