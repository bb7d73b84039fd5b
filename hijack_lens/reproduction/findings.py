"""What an experiment finds: estimates over seeds, the thresholds that they meet, and the verdict that follows."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from hijack_lens.core.checks import check_fields, check_list, check_type, shown
from hijack_lens.core.statistics import student_quantile
from hijack_lens.core.tables import Drawn, Report, picture_of, report_of, table_of
from hijack_lens.show.style import Picture

Verdict = Literal["reproduced", "in part", "not reproduced", "undecided"]

_MANY = 1000
"""Seeds beyond which it is not said how many would decide: the threshold may be where the mean is."""

_SAID = {True: "holds", False: "fails", None: "undecided"}


@dataclass(frozen=True)
class Condition:
    """Whether an estimate meets a threshold.

    Attributes:
        holds: `True` where all of the 95% interval does, `False` where none of it does; `None` where it straddles the
            threshold, so that the seeds decide nothing.
        seeds: how many would, at the spread that was seen; `None` where it is decided, cannot be told, or takes 1,000.
    """

    holds: bool | None
    seeds: int | None = None


@dataclass(frozen=True)
class Finding:
    """One prediction of a claim, and what was measured.

    Attributes:
        setting: what was measured on: models, prompts, seeds.
        predicted: what should be seen, with its threshold.
        measured: what was seen, with its uncertainty.
        holds: whether the threshold is met, by all of the 95% interval over seeds, or by every seed where that is said;
            `None` where the interval straddles it: undecided.

    Examples:
        >>> from hijack_lens.reproduction import Finding
        >>> finding = Finding.at_least("five seeds", "accuracy at least 90%", [0.95, 0.96, 0.94, 0.97, 0.95], 0.9)
        >>> finding.measured, finding.holds
        ('95.4% ± 1.4%', True)
    """

    setting: str
    predicted: str
    measured: str
    holds: bool | None

    @classmethod
    def judged(cls, setting: str, predicted: str, measured: str, *conditions: Condition | bool) -> "Finding":
        """Holds where all conditions do and fails where one fails; else it says how many seeds would decide."""
        known = [one if isinstance(one, Condition) else Condition(one) for one in conditions]
        held = [one.holds for one in known]
        holds = False if False in held else None if None in held else True
        if holds is None:
            seeds = [one.seeds for one in known if one.holds is None]
            told = [n for n in seeds if n is not None]
            enough = f": about {max(told)} seeds would tell" if len(told) == len(seeds) else ""
            measured += f"; undecided{enough}"
        return cls(setting, predicted, measured, holds)

    @classmethod
    def at_least(
        cls, setting: str, predicted: str, by_seed: Iterable[float], threshold: float, spec: str = ".1%"
    ) -> "Finding":
        """Holds where all of the 95% interval over seeds is at the threshold or above."""
        values = check_list("by_seed", by_seed, "numbers")
        for name, value in [("threshold", threshold), *(("by_seed", value) for value in values)]:
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError(f"{name} must be a number that a float can hold, got {shown(value)}")
        check_type("spec", spec, str)
        found = over_seeds(values)
        try:
            measured = format(found, spec)
        except ValueError as error:
            raise ValueError(f"spec must be a format for numbers, such as '.1%', got {shown(spec)}") from error
        return cls.judged(setting, predicted, measured, found.at_least(threshold))


@dataclass(frozen=True, repr=False)
class Result(Drawn):
    """An experiment's outcome.

    Attributes:
        findings: one for each prediction of the claim.
        table: the measurements, one per row.
        figure: the measurements as a picture.
        note: what else a reader must know, if anything.

    Examples:
        >>> import pandas as pd
        >>> from hijack_lens.reproduction import Finding, Result
        >>> table = pd.DataFrame({"seed": [0, 1, 2], "accuracy": [0.95, 0.97, 0.96]})
        >>> finding = Finding.at_least("three seeds", "accuracy at least 90%", table["accuracy"].tolist(), 0.9)
        >>> result = Result((finding,), table, hl.explain(model, prompt).picture())
        >>> result.verdict
        'reproduced'
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame
    figure: Picture
    note: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.findings:
            raise ValueError("findings must hold at least one, got none")

    @property
    def verdict(self) -> Verdict:
        """ "reproduced" where all findings hold, "not reproduced" where all fail, "in part" where some do either.

        "undecided" where that hangs on findings whose intervals straddle their thresholds.
        """
        held = {finding.holds for finding in self.findings}
        if {True, False} <= held:
            return "in part"
        return "undecided" if None in held else "reproduced" if True in held else "not reproduced"

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding, a column per attribute."""
        return pd.DataFrame([vars(finding) for finding in self.findings])


@report_of.register
def result_report(result: Result) -> Report:
    """The verdict, each finding, and the measurements."""
    lines = []
    for finding in result.findings:
        lines.append(f"  {_SAID[finding.holds]}: {finding.predicted} — {finding.measured}")
        lines.append(f"         ({finding.setting})")
    notes = [result.note] * bool(result.note)
    return Report(f"Result: {result.verdict}", lines, [table_of(result.table, "measurements")], notes)


@picture_of.register
def result_figure(result: Result) -> Picture:
    """The measurements."""
    return result.figure


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t); `f"{estimate:.1%}"` shows both.

    Attributes:
        mean: the mean over seeds.
        reach: half the interval's width; NaN for fewer than two seeds, so that no threshold is met.
        seeds: how many there were.
    """

    mean: float
    reach: float
    seeds: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.reach

    def at_least(self, threshold: float) -> Condition:
        """Whether the interval lies at the threshold or above."""
        return self._judged(self.low >= threshold, self.high < threshold, threshold)

    def above(self, threshold: float) -> Condition:
        """Whether it lies above the threshold."""
        return self._judged(self.low > threshold, self.high <= threshold, threshold)

    def at_most(self, threshold: float) -> Condition:
        """Whether it lies at the threshold or below."""
        return self._judged(self.high <= threshold, self.low > threshold, threshold)

    def below(self, threshold: float) -> Condition:
        """Whether it lies below the threshold."""
        return self._judged(self.high < threshold, self.low >= threshold, threshold)

    def _judged(self, met: bool, missed: bool, threshold: float) -> Condition:
        if met or missed:
            return Condition(bool(met))
        away = abs(self.mean - threshold)
        if not away > 0 or math.isnan(self.reach):
            return Condition(None)
        # An interval's width falls with the square root of their number.
        seeds = self.seeds * (self.reach / away) ** 2
        return Condition(None, math.ceil(seeds) if seeds < _MANY else None)

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.reach:{spec.lstrip('+')}}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of a measurement over seeds, and its interval; NaN where a seed has none."""
    found = np.array(list(values), dtype=float)
    n = len(found)
    reach = student_quantile(n - 1) * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(found.mean()), reach, n)
