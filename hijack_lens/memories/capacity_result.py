"""The result of measuring how much a memory holds, and views of it."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.MemoryCapacity.1"
_MEASURED = ("recall", "crosstalk")
_EXPECTED = ("expected_recall", "expected_crosstalk")

MEMORIES = ("linear memory", "hand-written model")


@dataclass(frozen=True, repr=False)
class MemoryCapacity:
    """Recall and cross-talk against d_model, of the two `MEMORIES` in that order; in float64, on the CPU.

    Attributes:
        d_models: what was tried, smallest first.
        seeds: of the directions.
        d_vocab: how many tokens have three directions each.
        recall: the fraction of keys whose likeliest value gets the largest score.
        crosstalk: root mean square of what is written beside the table, in logits.
        expected_recall: by theory.
        expected_crosstalk: likewise.
    """

    d_models: tuple[int, ...]
    seeds: tuple[int, ...]
    d_vocab: int
    recall: Float[Tensor, "memory d_model seed"]
    crosstalk: Float[Tensor, "memory d_model seed"]
    expected_recall: Float[Tensor, "memory d_model"]
    expected_crosstalk: Float[Tensor, "memory d_model"]

    def __post_init__(self) -> None:
        shape = (len(MEMORIES), len(self.d_models), len(self.seeds))
        for names, expected in ((_MEASURED, shape), (_EXPECTED, shape[:2])):
            for name in names:
                if tuple(getattr(self, name).shape) != expected:
                    raise ValueError(f"{name} must have shape {expected}, got {tuple(getattr(self, name).shape)}")

    @property
    def recall_stderr(self) -> Float[Tensor, "memory d_model"]:
        """Standard error of the mean over keys and seeds, never below that of as many independent draws.

        The latter at the expected recall, so that it is not 0 where all seeds agree.
        """
        draws = self.d_vocab * len(self.seeds)
        binomial = (self.expected_recall * (1 - self.expected_recall) / draws).clamp_min(0).sqrt()
        return torch.maximum(self.recall.std(-1) / len(self.seeds) ** 0.5, binomial)

    def to_pandas(self) -> pd.DataFrame:
        """A row per memory and d_model: `recall` in the mean over seeds, its `stderr`, the `expected_recall`, and the
        same of the root mean square of the `crosstalk`."""
        index = pd.MultiIndex.from_product([MEMORIES, self.d_models], names=["memory", "d_model"])
        columns = {
            "recall": self.recall.mean(-1),
            "stderr": self.recall_stderr,
            "expected_recall": self.expected_recall,
            "crosstalk": self.crosstalk.mean(-1),
            "expected_crosstalk": self.expected_crosstalk,
        }
        return pd.DataFrame({name: x.flatten().numpy() for name, x in columns.items()}, index=index).reset_index()

    def picture(self) -> "Picture":
        """Recall and cross-talk against d_model: measured points, and theory as lines."""
        from hijack_lens.visual.capacity_curves import capacity_curves

        return capacity_curves(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {"format": _FORMAT, "d_models": self.d_models, "seeds": self.seeds, "d_vocab": self.d_vocab}
        tensors = {name: getattr(self, name).contiguous() for name in (*_MEASURED, *_EXPECTED)}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryCapacity":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            return cls(
                d_models=tuple(header["d_models"]),
                seeds=tuple(header["seeds"]),
                d_vocab=header["d_vocab"],
                **{name: tensors[name] for name in (*_MEASURED, *_EXPECTED)},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved MemoryCapacity: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.memories.weights_report import capacity_report

        return capacity_report(self).text()

    def _repr_html_(self) -> str:
        from hijack_lens.memories.weights_report import capacity_report

        return capacity_report(self).html()
