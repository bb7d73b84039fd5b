"""What the results of sweeps have in common: a metric on patched runs, between an unpatched run and a source run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Effects:
    """Arithmetic of a sweep's values.

    Its subclasses have the fields `values`, `metric` (its name), `base` (the metric on the unpatched run), `source` (on
    the run that patches come from, or `None`) and `direction`.
    """

    values: "Tensor"
    metric: str
    base: float
    source: Any
    direction: str

    @property
    def clean(self) -> float:
        """The metric on the clean run; of ablations, on the intact one."""
        return self.source if self.direction == "denoise" else self.base

    @property
    def corrupted(self) -> float:
        """The metric on the corrupted run.

        Raises:
            ValueError: for ablations, which have none.
        """
        if self.source is None:
            raise ValueError("ablations have no corrupted run")
        return self.base if self.direction == "denoise" else self.source

    @property
    def effect(self) -> "Tensor":
        """What each patch changed: values - base; of the shape of `values`."""
        return self.values - self.base

    @property
    def normalised(self) -> "Tensor":
        """Values shifted and scaled: 0 is the corrupted run, 1 the clean one; of the shape of `values`.

        Raises:
            ValueError: for ablations, and where the metric is the same on both runs.
        """
        if self.clean == self.corrupted:
            raise ValueError(f"metric {self.metric!r} is {self.clean:g} on the clean and on the corrupted run alike")
        return (self.values - self.corrupted) / (self.clean - self.corrupted)
