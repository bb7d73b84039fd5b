"""The results of sweeps: labelled numbers, one per patch or edge, and what they have in common."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import check_fields, check_number, check_position, check_shapes, check_type, shown
from hijack_lens.core.circuit import Circuit
from hijack_lens.core.files import Saved
from hijack_lens.core.statistics import most_in_population
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.hooks.edges import Edge, name_of

Result = TypeVar("Result", bound="PatchEffects")


class PatchEffects:
    """Arithmetic on a sweep's values.

    Its subclasses have the fields `values`, `metric` (its name), `base` (the metric on the unpatched run), `source` (on
    the run that patches come from, or `None`) and `direction`.
    """

    values: Tensor
    metric: str
    base: float
    source: Any
    direction: str

    @property
    def clean(self) -> float:
        """The metric on the clean run; for ablations, on the intact run."""
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
    def effect(self) -> Tensor:
        """How much each patch changed the metric: values - base; shaped like `values`."""
        return self.values - self.base

    @property
    def normalised(self) -> Tensor:
        """Values shifted and scaled: 0 is the corrupted run, 1 the clean one; shaped like `values`.

        Raises:
            ValueError: for ablations, and where the metric is the same on both runs.
        """
        if self.clean == self.corrupted:
            raise ValueError(f"metric {self.metric!r} is {self.clean:g} on the clean and on the corrupted run alike")
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    def to_pandas(self) -> pd.DataFrame:
        """A row per patch: its labels, `value` and `effect`."""
        raise NotImplementedError

    def compare(self: "Result", exact: "Result") -> "Comparison[Result]":
        """How far this estimate is from the sweep of the same patches by actual runs.

        Raises:
            TypeError, ValueError: if `exact` is not a sweep of the same patches.
        """
        return Comparison(self, exact)


@dataclass(frozen=True, repr=False)
class Sweep(PatchEffects, Saved, Drawn):
    """A metric under many patches (or ablations), one at a time.

    Attributes:
        values: the metric with the patch in place. Only heads and neurons have the last axis.
        activations: the names of the activations, along the first axis.
        layers: the layers, along the second.
        positions: the positions, along the third; a single `None` if each patch covers all positions at once.
        unit: what the last axis counts: "head", "neuron" or `None`.
        units: the heads or neurons, along the last axis.
        metric: the metric's name.
        base: the metric on the unpatched run.
        source: the metric on the run that patches come from; `None` for ablations.
        direction: "denoise" (clean into corrupted), "noise" (corrupted into clean) or "ablate".
        method: how it was computed: "incremental"; "forward" for whole runs of the model; "gradient" for an estimate.
        texts: the text of the token at each position, if the sweep is of one prompt.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.patch_sweep(model, prompt.clean, prompt.corrupted, margin)
        >>> sweep.axes, sweep.values.shape
        (('activation', 'layer', 'position'), torch.Size([3, 2, 24]))
        >>> sweep.corrupted, sweep.clean
        (-16.38572120666504, 3.2731730937957764)
        >>> sweep.effect.max(), sweep.normalised.max()
        (tensor(19.6589), tensor(1.))
    """

    older_names: ClassVar[Mapping[str, str]] = {"components": "activations"}

    values: Float[Tensor, "activation layer position *unit"]
    activations: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int | None, ...]
    unit: Literal["head", "neuron"] | None
    units: tuple[int, ...]
    metric: str
    base: float
    source: float | None
    direction: Literal["denoise", "noise", "ablate"]
    method: Literal["incremental", "forward", "gradient"]
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"values": tuple(map(len, self._labels.values()))})

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return tuple(self._labels)

    @property
    def _labels(self) -> dict[str, tuple]:
        labels: dict[str, tuple] = {"activation": self.activations, "layer": self.layers, "position": self.positions}
        return labels if self.unit is None else {**labels, self.unit: self.units}

    def __getitem__(self, activation: str) -> "Sweep":
        """The part of the sweep for one activation.

        Raises:
            KeyError: for an activation that was not swept.
        """
        if not isinstance(activation, str) or activation not in self.activations:
            raise KeyError(f"{shown(activation)} was not swept; there are {', '.join(self.activations)}")
        at = self.activations.index(activation)
        return replace(self, values=self.values[at : at + 1], activations=(activation,))

    def to_pandas(self) -> pd.DataFrame:
        """A row per patch: its labels, `value` and `effect`; and its token, if the sweep is of one prompt."""
        frame = tidy(self._labels, value=self.values, effect=self.effect)
        if self.texts is not None and None not in self.positions:
            after = list(frame.columns).index("position") + 1
            frame.insert(after, "token", [self._text(position) for position in frame["position"]])
        return frame

    def describe(self, flat: int) -> str:
        """One patch in words, by its index in the flattened values."""
        flat = check_position("flat", flat, self.values.numel(), self.values.numel() - 1)
        index = torch.unravel_index(torch.tensor(flat), self.values.shape)
        at = {axis: labels[int(i)] for (axis, labels), i in zip(self._labels.items(), index, strict=True)}
        unit = "" if self.unit is None else f" {self.unit} {at[self.unit]}"
        position = at["position"]
        where = "all positions" if position is None else f"position {position}"
        text = "" if position is None or self.texts is None else f" {self._text(position)!r}"
        return f"{at['activation']} layer {at['layer']}{unit}, {where}{text}"

    def _text(self, position: int) -> str:
        assert self.texts is not None
        return self.texts[self.positions.index(position)]


@dataclass(frozen=True, repr=False)
class EdgeScreen(Saved, Drawn):
    """How the edges of a sweep were chosen among more, and what a random sample says of the others.

    Attributes:
        n_edges: all edges; those with the largest effects, estimated by gradients, were chosen.
        estimates: the estimated metric with each of the chosen edges' messages replaced.
        drawn: edges drawn at random from those that were not chosen.
        values: the metric with the message of each of these replaced, by actual runs.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.path_sweep(model, prompt.clean, prompt.corrupted, margin, exact=5, sample=10)
        >>> f"{len(sweep.edges)} of {sweep.screen.n_edges} edges run, {len(sweep.screen.drawn)} of the others drawn"
        '5 of 24 edges run, 10 of the others drawn'
        >>> (sweep.screen.values - sweep.base).abs().max() < 0.1, sweep.missed(0.1)
        (tensor(True), 3)
    """

    n_edges: int
    estimates: Float[Tensor, "edge"]
    drawn: tuple[Edge, ...]
    values: Float[Tensor, "drawn"]

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"values": (len(self.drawn),)})

    def __repr__(self) -> str:
        return f"EdgeScreen(of {self.n_edges} edges: {len(self.estimates)} chosen, {len(self.drawn)} drawn at random)"

    def to_pandas(self) -> pd.DataFrame:
        """A row per edge that was drawn: sender, receiver, via, and the metric's `value`."""
        rows = [(str(edge.sender), str(edge.receiver), edge.via) for edge in self.drawn]
        frame = pd.DataFrame(rows, columns=["sender", "receiver", "via"])
        return frame.assign(value=self.values.detach().cpu().double().numpy())


@dataclass(frozen=True, repr=False)
class PathSweep(PatchEffects, Saved, Drawn):
    """A metric with each edge patched, one at a time.

    Attributes:
        values: the metric with the edge's message replaced, in the metric's unit.
        edges: the edges along the axis.
        metric: the metric's name.
        base: the metric on the unpatched run.
        source: the metric on the run that the messages come from.
        direction: "denoise" (clean messages, corrupted run) or "noise" (corrupted messages, clean run).
        method: "incremental" or "forward" for patched runs, as in a `Sweep`; "gradient" for an estimate.
        circuit: names components by their roles.
        screen: how the edges were chosen among more, if they were.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.path_sweep(model, prompt.clean, prompt.corrupted, margin)
        >>> print(sweep.edges[0])
        embed → L0H0 q
        >>> sweep.corrupted, sweep.clean
        (-16.38572120666504, 3.2731730937957764)
        >>> sweep.effect.max(), sweep.normalised.max()
        (tensor(19.6589), tensor(1.))
    """

    values: Float[Tensor, "edge"]
    edges: tuple[Edge, ...]
    metric: str
    base: float
    source: float
    direction: Literal["denoise", "noise"]
    method: Literal["incremental", "forward", "gradient"]
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)
    screen: EdgeScreen | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"values": (len(self.edges),)})

    def missed(self, size: float) -> int:
        """At most how many of the edges not chosen change the metric by more than `size`, with 95% confidence.

        An exact bound from the random sample of them (hypergeometric); 0 where every edge was run.

        Raises:
            TypeError, ValueError: for a size that is no number from 0 on.
        """
        size = check_number("size", size)
        if self.screen is None:
            return 0
        beyond = (self.screen.values - self.base).abs() > size
        return most_in_population(int(beyond.sum()), len(beyond), self.screen.n_edges - len(self.edges))

    def to_pandas(self) -> pd.DataFrame:
        """A row per edge: sender, receiver and via, `value` and `effect`; and `normalised`, where it is defined."""
        numbers = {"value": self.values, "effect": self.effect}
        if self.clean != self.corrupted:
            numbers["normalised"] = self.normalised
        frame = tidy({"edge": range(len(self.edges))}, **numbers).drop(columns="edge")
        frame.insert(0, "sender", [name_of(edge.sender, self.circuit) for edge in self.edges])
        frame.insert(1, "receiver", [name_of(edge.receiver, self.circuit) for edge in self.edges])
        frame.insert(2, "via", [edge.via for edge in self.edges])
        return frame


@dataclass(frozen=True, repr=False)
class Comparison(Drawn, Generic[Result]):
    """The gradient estimate of each patch's effect beside its exact effect.

    Patches not scored (NaN) in either sweep are left out of the numbers.

    Attributes:
        approximate: the estimate.
        exact: the sweep of the same patches by actual runs.

    Examples:
        >>> runs = prompt.clean, prompt.corrupted, hl.metrics.log_prob("e"), "attn_out"
        >>> exact = hl.hooks.patch_sweep(model, *runs)
        >>> compared = hl.hooks.attribution_patch(model, *runs).compare(exact)
        >>> f"correlation {compared.correlation:.2f}, relative error {compared.relative_error:.2f}"
        'correlation 1.00, relative error 0.20'
        >>> compared.error.shape == exact.values.shape, round(compared.max_error, 2)
        (True, 3.31)
    """

    approximate: Result
    exact: Result

    def __post_init__(self) -> None:
        check_type("approximate", self.approximate, PatchEffects)
        check_type("exact", self.exact, PatchEffects)
        kinds = type(self.approximate).__name__, type(self.exact).__name__
        if kinds[0] != kinds[1]:
            raise TypeError("approximate and exact must be results of one kind, got a {} and a {}".format(*kinds))
        for name in ("activations", "edges", "layers", "positions", "units", "texts", "metric", "direction"):
            ours, theirs = (getattr(one, name, None) for one in (self.approximate, self.exact))
            if ours != theirs:
                raise ValueError(
                    f"approximate and exact must be of the same patches, got {name} {ours!s:.80} and {theirs!s:.80}"
                )

    @property
    def error(self) -> Float[Tensor, "..."]:
        """The estimate of each patched run's metric, minus the metric itself."""
        return self.approximate.values - self.exact.values

    @property
    def max_error(self) -> float:
        """The largest absolute error."""
        return float(self._scored(self.error).abs().max())

    @property
    def relative_error(self) -> float:
        """The root mean square of the errors, divided by that of the exact effects; NaN if no patch has an effect."""
        size = float(self._scored(self.exact.effect).norm())
        return float(self._scored(self.error).norm()) / size if size else math.nan

    @property
    def correlation(self) -> float:
        """Pearson's correlation of estimated and exact effects; NaN if either are all the same."""
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
