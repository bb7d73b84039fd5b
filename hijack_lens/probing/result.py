"""The result of a conflict probe: margins by fact and number of repeats, the theory beside them, and views of both."""

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.circuit import ROLE_NAMES, Circuit, Component
from hijack_lens.probing.curve import DoseTheory
from hijack_lens.probing.facts import Conflict
from hijack_lens.theory import Flip, Margin, Strengths

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.DoseResponse.1"
_PARTS = ("context", "weights", "rest")


@dataclass(frozen=True, repr=False)
class DoseResponse:
    """`logit[context's answer] - logit[weights' answer]` by fact and number of repeats; in float64, on the CPU.

    Attributes:
        conflicts: the facts, in the model's tokens.
        margin: split by memory, each part [fact, dose]; a dose is a number of repeats, from 0.
        circuit: whose induction heads carry the context's part.
        theory: what the two-layer theory says of the same prompts.
        completeness_error: the largest |sum over paths - logit| of all attributions; rounding alone.
    """

    conflicts: tuple[Conflict, ...]
    margin: Margin
    circuit: Circuit
    theory: DoseTheory
    completeness_error: float

    def __post_init__(self) -> None:
        shape = (len(self.conflicts), len(self.conflicts[0].prompts))
        for part in (*(getattr(self.margin, name) for name in _PARTS), self.theory.margin):
            if tuple(part.shape) != shape:
                raise ValueError(f"margin must have shape {shape}, got {tuple(part.shape)}")

    @property
    def repeats(self) -> range:
        """What the dose axis holds."""
        return range(self.margin.total.shape[1])

    @property
    def lengths(self) -> Int[Tensor, "fact dose"]:
        """Tokens in each prompt."""
        return torch.tensor([one.lengths for one in self.conflicts])

    @property
    def known(self) -> tuple[bool, ...]:
        """Whether the weights' answer is ahead without any repeat, by fact; only then is there something to flip."""
        return tuple((self.margin.total[:, 0] < 0).tolist())

    @property
    def flips(self) -> tuple[int | None, ...]:
        """The least number of repeats with a margin above 0, by fact; `None` where none of those measured has one."""
        return tuple(next((n for n in self.repeats if row[n] > 0), None) for row in self.margin.total.tolist())

    @property
    def crossings(self) -> Float[Tensor, "fact"]:
        """The same between repeats, margins joined by straight lines: where the margin reaches 0. NaN for `None`."""
        return torch.tensor([crossing(row) for row in self.margin.total.tolist()], dtype=torch.float64)

    def to_pandas(self) -> pd.DataFrame:
        """A row per fact and number of repeats: fact, repeats, length, context, weights, rest, total, theory."""
        total, lengths = self.margin.total, self.lengths
        rows = [
            (
                one.name,
                n,
                int(lengths[i, n]),
                *(float(getattr(self.margin, part)[i, n]) for part in _PARTS),
                float(total[i, n]),
                float(self.theory.margin[i, n]),
            )
            for i, one in enumerate(self.conflicts)
            for n in self.repeats
        ]
        return pd.DataFrame(rows, columns=["fact", "repeats", "length", *_PARTS, "total", "theory"])

    def by_repeats(self) -> pd.DataFrame:
        """A row per number of repeats: means over facts of length and margins, and the total's standard deviation."""
        grouped = self.to_pandas().drop(columns="fact").groupby("repeats")
        return grouped.mean().assign(spread=grouped["total"].std()).reset_index()

    def by_fact(self) -> pd.DataFrame:
        """A row per fact: the tokens scored, the margin at either end, the flip, and the theory's."""
        total = self.margin.total
        return pd.DataFrame(
            {
                "fact": [one.name for one in self.conflicts],
                "context_token": [one.texts[0] for one in self.conflicts],
                "weights_token": [one.texts[1] for one in self.conflicts],
                "known": self.known,
                "first": total[:, 0].tolist(),
                "last": total[:, -1].tolist(),
                "flip": pd.array(self.flips, dtype="Int64"),
                "crossing": self.crossings.tolist(),
                "theory_flip": pd.array([flip.repeats for flip in self.theory.flips], dtype="Int64"),
            }
        )

    def picture(self) -> "Picture":
        """The margin and its parts against the number of repeats, flips marked, and the theory drawn over them."""
        from hijack_lens.visual.dose_curves import dose_curves

        return dose_curves(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        theory = self.theory
        header = {
            "format": _FORMAT,
            "conflicts": [asdict(one) for one in self.conflicts],
            "circuit": {role: [asdict(part) for part in getattr(self.circuit, role)] for role in ROLE_NAMES},
            "source": theory.source,
            "strengths": asdict(theory.strengths),
            "flips": [asdict(flip) for flip in theory.flips],
            "r2": theory.r2,
            "completeness_error": self.completeness_error,
        }
        tensors = {part: getattr(self.margin, part).contiguous() for part in _PARTS}
        tensors |= {"ahead": theory.ahead.contiguous(), "theory": theory.margin.contiguous()}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DoseResponse":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            conflicts = tuple(
                Conflict(
                    **{
                        **one,
                        "prompts": tuple(map(tuple, one["prompts"])),
                        "texts": tuple(one["texts"]),
                        "whole": tuple(one["whole"]),
                    }
                )
                for one in header["conflicts"]
            )
            roles = {role: tuple(Component(**part) for part in parts) for role, parts in header["circuit"].items()}
            source: Literal["weights", "margins"] = header["source"]
            theory = DoseTheory(
                source,
                Strengths(**header["strengths"]),
                tensors["ahead"],
                tensors["theory"],
                tuple(Flip(**flip) for flip in header["flips"]),
                header["r2"],
            )
            margin = Margin(**{part: tensors[part] for part in _PARTS})
            return cls(conflicts, margin, Circuit(**roles), theory, header["completeness_error"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a saved DoseResponse: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.probing.table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.probing.table import as_html

        return as_html(self)


def crossing(margins: list[float]) -> float:
    """Where a line through margins with 0, 1, 2, ... repeats first comes above 0; NaN where it does not."""
    n = next((n for n, margin in enumerate(margins) if margin > 0), None)
    if not n:
        return 0.0 if n == 0 else float("nan")
    return n - margins[n] / (margins[n] - margins[n - 1])
