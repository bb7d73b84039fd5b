"""An estimate of a sweep beside the sweep itself."""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.hooks.path_result import PathSweep
from hijack_lens.hooks.sweep.result import Sweep

Result = TypeVar("Result", Sweep, PathSweep)


@dataclass(frozen=True, repr=False)
class Comparison(Generic[Result]):
    """What gradients say of each patch, and what each patch does.

    What was not scored (NaN) in either takes no part in the numbers.

    Attributes:
        approximate: the estimate.
        exact: the sweep of the same patches by actual runs.
    """

    approximate: Result
    exact: Result

    def __post_init__(self) -> None:
        shapes = tuple(self.approximate.values.shape), tuple(self.exact.values.shape)
        if shapes[0] != shapes[1]:
            raise ValueError("approximate and exact must be of the same patches, got shapes {} and {}".format(*shapes))

    @property
    def error(self) -> Float[Tensor, "..."]:
        """The estimate of each patched run's metric, less the metric itself."""
        return self.approximate.values - self.exact.values

    @property
    def max_error(self) -> float:
        """The largest error, without its sign."""
        return float(self._scored(self.error).abs().max())

    @property
    def relative_error(self) -> float:
        """The errors' root mean square over the exact effects'; NaN where no patch has an effect."""
        size = float(self._scored(self.exact.effect).norm())
        return float(self._scored(self.error).norm()) / size if size else math.nan

    @property
    def correlation(self) -> float:
        """Pearson's, of estimated and exact effects; NaN where either are all alike."""
        pairs = torch.stack([self._scored(self.approximate.effect), self._scored(self.exact.effect)])
        return float(torch.corrcoef(pairs)[0, 1])

    def _scored(self, values: Tensor) -> Tensor:
        values = values.detach().double().flatten()
        return values[self.error.detach().isfinite().flatten()]

    def to_pandas(self) -> pd.DataFrame:
        """A row per patch: its labels, then `estimate` and `exact` effect, and the `error`."""
        frame = self.approximate.to_pandas().drop(columns=["value", "normalised"], errors="ignore")
        frame = frame.rename(columns={"effect": "estimate"})
        frame["exact"] = self.exact.to_pandas()["effect"]
        frame["error"] = frame["estimate"] - frame["exact"]
        return frame

    def __repr__(self) -> str:
        frame = self.to_pandas()
        worst = frame.reindex(frame["error"].abs().sort_values(ascending=False, kind="stable").index)[:5]
        return (
            f"Comparison of {len(frame)} effects on {self.exact.metric}: largest error {self.max_error:.3g}, "
            f"relative error {self.relative_error:.3g}, correlation {self.correlation:.4f}; largest errors:\n"
            + worst.to_string(index=False, float_format="{:.4g}".format)
        )
