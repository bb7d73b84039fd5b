"""The result of sharing out a metric among components: Shapley values, interactions, and views of them."""

import json
import os
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens._student import student_quantile
from hijack_lens.attribution.coalitions import How
from hijack_lens.attribution.players import Player
from hijack_lens.circuit import Component

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.ShapleyValues.1"
_EXACT = ("values", "interactions", "worth")
_SAMPLED = ("values", "interactions", "stderr", "interactions_stderr", "pair_samples")


@dataclass(frozen=True, repr=False)
class ShapleyValues:
    """What each component is worth, in the metric's unit; in float64, on the CPU.

    Attributes:
        values: each player's Shapley value; they sum to `full - empty`.
        interactions: each pair's Shapley interaction index: positive where two need each other, negative where one
            does for the other. NaN on the diagonal, and where a pair was not scored.
        players: what the axes hold.
        metric: its name.
        how: what absent components wrote.
        full: the metric with all players present, that is, of the run itself.
        empty: the metric with none present.
        n_runs: how many coalitions were run.
        worth: the metric of every coalition, with an axis (absent, present) for each player: `worth[1, 0, 1]` is that
            with the second of three absent. `None` where values were sampled.
        stderr: standard errors of the values; `None` where they are exact, and likewise what follows.
        interactions_stderr: those of the interactions.
        n_samples: how many samples a value is the mean of, each an order of the players and its reverse.
        pair_samples: how many an interaction is the mean of.
    """

    values: Float[Tensor, "player"]
    interactions: Float[Tensor, "player player"]
    players: tuple[Player, ...]
    metric: str
    how: How
    full: float
    empty: float
    n_runs: int
    worth: Float[Tensor, "*present"] | None = None
    stderr: Float[Tensor, "player"] | None = None
    interactions_stderr: Float[Tensor, "player player"] | None = None
    n_samples: int | None = None
    pair_samples: Int[Tensor, "player player"] | None = None

    def __post_init__(self) -> None:
        n = len(self.players)
        shapes = {"values": (n,), "interactions": (n, n), "worth": (2,) * n, "stderr": (n,)}
        shapes |= dict.fromkeys(("interactions_stderr", "pair_samples"), (n, n))
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None and name in (_EXACT if self.exact else _SAMPLED):
                raise ValueError(f"{name} must be there, got None")
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")

    @property
    def exact(self) -> bool:
        """Whether every coalition was run."""
        return self.n_samples is None

    @property
    def labels(self) -> tuple[str, ...]:
        """What the players are called."""
        return tuple(player.label for player in self.players)

    @property
    def efficiency_error(self) -> float:
        """|sum of the values - (full - empty)|; rounding alone, sampled or not."""
        return abs(float(self.values.sum()) - (self.full - self.empty))

    @property
    def alone(self) -> Float[Tensor, "player"]:
        """What each player adds where no other is present; NaN where values were sampled."""
        return self._single(present=1) - self.empty

    @property
    def last(self) -> Float[Tensor, "player"]:
        """What each player adds where all others are present, which is what its ablation takes away; NaN likewise."""
        return self.full - self._single(present=0)

    @property
    def main(self) -> Float[Tensor, "player"]:
        """Each value without the player's half of its interactions (Lundberg, Erion & Lee 2018, arXiv 1802.03888).

        With the interactions of all pairs they sum to `full - empty`. NaN where some of them were not scored.
        """
        return self.values - self.interactions.clone().fill_diagonal_(0.0).sum(1) / 2

    @property
    def ci(self) -> Float[Tensor, "player 2"]:
        """Lower and upper ends of 95% confidence intervals of the values, by Student's t; the values, where exact."""
        width = 0.0 if self.stderr is None or self.n_samples is None else student_quantile(self.n_samples - 1)
        half = width * (torch.zeros_like(self.values) if self.stderr is None else self.stderr)
        return torch.stack([self.values - half, self.values + half], -1)

    @property
    def interactions_ci(self) -> Float[Tensor, "player player 2"]:
        """The same, of the interactions."""
        half = torch.zeros_like(self.interactions)
        if self.interactions_stderr is not None and self.pair_samples is not None:
            widths = [[student_quantile(max(1, count - 1)) for count in row] for row in self.pair_samples.tolist()]
            half = torch.tensor(widths).to(half) * self.interactions_stderr
        return torch.stack([self.interactions - half, self.interactions + half], -1)

    def __getitem__(self, label: str) -> float:
        """One player's value.

        Raises:
            KeyError: for a label that no player has.
        """
        if label not in self.labels:
            raise KeyError(f"{label!r} is no player; there are {', '.join(self.labels)}")
        return float(self.values[self.labels.index(label)])

    def to_pandas(self) -> pd.DataFrame:
        """A row per player: its label and parts, value, standard error and confidence interval, `alone` and `last`."""
        frame = pd.DataFrame({"player": self.labels, "parts": [", ".join(map(str, p.parts)) for p in self.players]})
        frame["value"] = self.values.numpy()
        frame["stderr"] = 0.0 if self.stderr is None else self.stderr.numpy()
        frame["low"], frame["high"] = (end.numpy() for end in self.ci.unbind(-1))
        return frame.assign(alone=self.alone.numpy(), last=self.last.numpy())

    def interactions_to_pandas(self) -> pd.DataFrame:
        """A row per pair: `first`, `second`, the `interaction`, its standard error and confidence interval."""
        errors = torch.zeros_like(self.interactions) if self.interactions_stderr is None else self.interactions_stderr
        rows = [
            (self.labels[i], self.labels[j], *(float(x) for x in (self.interactions[i, j], errors[i, j], *ends[i, j])))
            for ends in [self.interactions_ci]
            for i, j in combinations(range(len(self.players)), 2)
        ]
        return pd.DataFrame(rows, columns=["first", "second", "interaction", "stderr", "low", "high"])

    def picture(self) -> "Picture":
        """Values as bars, with their confidence intervals, and interactions as a heat map."""
        from hijack_lens.visual.shapley_bars import shapley_bars

        return shapley_bars(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "players": [asdict(player) for player in self.players],
            "metric": self.metric,
            "how": self.how,
            "full": self.full,
            "empty": self.empty,
            "n_runs": self.n_runs,
            "n_samples": self.n_samples,
        }
        tensors = {name: getattr(self, name).contiguous() for name in (_EXACT if self.exact else _SAMPLED)}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShapleyValues":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            players = tuple(Player(p["label"], tuple(map(_part, p["parts"]))) for p in header.pop("players"))
            rest: dict[str, Any] = {**header, **tensors}
            rest.pop("format")
            return cls(players=players, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved ShapleyValues: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.attribution.shapley_table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.attribution.shapley_table import as_html

        return as_html(self)

    def _single(self, present: int) -> Float[Tensor, "player"]:
        """The metric where each player alone is present, or alone absent."""
        if self.worth is None:
            return torch.full_like(self.values, torch.nan)
        n = len(self.players)
        at = (torch.eye(n, dtype=torch.long) if present else 1 - torch.eye(n, dtype=torch.long)).unbind(1)
        return self.worth[at]


def _part(saved: object) -> "Component | str":
    return Component(**saved) if isinstance(saved, dict) else str(saved)
