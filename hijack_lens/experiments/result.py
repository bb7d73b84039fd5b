"""What an experiment finds: a table, a picture, and a verdict that is computed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from hijack_lens._student import student_quantile
from hijack_lens.visual.figures import Picture

Verdict = Literal["reproduced", "in part", "not reproduced"]


@dataclass(frozen=True)
class Finding:
    """One thing that a claim predicts, and what was measured.

    Attributes:
        setting: of the measurement: models, prompts, seeds.
        predicted: what should be seen, its threshold stated.
        measured: what was seen, its uncertainty with it.
        holds: whether it meets the threshold.
    """

    setting: str
    predicted: str
    measured: str
    holds: bool


@dataclass(frozen=True, repr=False)
class Result:
    """An experiment's outcome.

    Attributes:
        findings: one for each thing that the claim predicts.
        table: the measurements, a row each.
        figure: the same as a picture.
        note: what a reader must know beside the findings, if anything.
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame
    figure: Picture
    note: str = ""

    def __post_init__(self) -> None:
        if not self.findings:
            raise ValueError("findings must hold at least one, got none")

    @property
    def verdict(self) -> Verdict:
        """ "reproduced" where all findings hold, "not reproduced" where none does."""
        held = [finding.holds for finding in self.findings]
        return "reproduced" if all(held) else "in part" if any(held) else "not reproduced"

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding."""
        rows = [(f.setting, f.predicted, f.measured, f.holds) for f in self.findings]
        return pd.DataFrame(rows, columns=["setting", "predicted", "measured", "holds"])

    def __repr__(self) -> str:
        lines = [f"Result: {self.verdict}"]
        for finding in self.findings:
            lines.append(f"  {'holds' if finding.holds else 'fails'}: {finding.predicted} — {finding.measured}")
            lines.append(f"         ({finding.setting})")
        return "\n".join(lines + [self.note] * bool(self.note))

    def _repr_png_(self) -> bytes:
        return self.figure.png()


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t), as `f"{estimate:.1%}"` shows them.

    Attributes:
        mean: of the seeds.
        reach: of the interval, to either side; NaN for fewer than two seeds, so that no threshold is met.
    """

    mean: float
    reach: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.reach

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.reach:{spec.lstrip('+')}}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of a measurement, and how far it can be trusted; NaN where a seed has none."""
    found = np.array(list(values), dtype=float)
    n = len(found)
    reach = student_quantile(n - 1) * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(found.mean()), reach)
