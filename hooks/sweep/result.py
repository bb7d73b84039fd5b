"""The result of a sweep: a labelled tensor, and views of it."""

import json
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.hooks.effects import Effects

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.Sweep.1"


@dataclass(frozen=True, repr=False)
class Sweep(Effects):
    """A metric under many patches (or ablations), each alone.

    Attributes:
        values: the metric with the patch in place. The last axis is there for heads and neurons only.
        components: names of activations, along the first axis.
        layers: along the second.
        positions: along the third; a single `None` where each patch covers all positions at once.
        unit: "head", "neuron" or `None`.
        units: heads or neurons, along the last axis.
        metric: its name.
        base: the metric on the unpatched run.
        source: the metric on the run that patches come from; `None` for ablations.
        direction: "denoise" (clean into corrupted), "noise" (corrupted into clean) or "ablate".
        method: how it was computed: "incremental"; "forward" for whole runs of the model; "gradient" for an estimate.
        texts: of the tokens at the positions, where the sweep is of one prompt.
    """

    values: Float[Tensor, "component layer position *unit"]
    components: tuple[str, ...]
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
        expected = tuple(len(labels) for labels in self._labels.values())
        if tuple(self.values.shape) != expected:
            raise ValueError(f"values must have shape {expected}, got {tuple(self.values.shape)}")

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return tuple(self._labels)

    @property
    def _labels(self) -> dict[str, tuple]:
        labels: dict[str, tuple] = {"component": self.components, "layer": self.layers, "position": self.positions}
        return labels if self.unit is None else {**labels, self.unit: self.units}

    def __getitem__(self, component: str) -> "Sweep":
        """One component's part.

        Raises:
            KeyError: for a component that was not swept.
        """
        if component not in self.components:
            raise KeyError(f"{component!r} was not swept; there are {', '.join(self.components)}")
        at = self.components.index(component)
        return replace(self, values=self.values[at : at + 1], components=(component,))

    def to_pandas(self) -> pd.DataFrame:
        """A row per patch: its labels, `value` and `effect`."""
        index = pd.MultiIndex.from_product(list(self._labels.values()), names=self.axes)
        values = self.values.detach().cpu().flatten().numpy()
        frame = pd.DataFrame({"value": values, "effect": values - self.base}, index=index).reset_index()
        if self.texts is not None and None not in self.positions:
            after = list(frame.columns).index("position") + 1
            frame.insert(after, "token", [self._text(position) for position in frame["position"]])
        return frame

    def picture(self, normalised: bool | None = None) -> "Picture":
        """A heat map per component: layers (with heads) against positions.

        Args:
            normalised: on the scale from 0 (corrupted) to 1 (clean), rather than as the metric's change; by default
                where there is such a scale.

        Raises:
            ValueError: where `normalised` is asked for and there is no such scale.
        """
        from hijack_lens.visual.heatmaps import sweep_maps

        return sweep_maps(self, normalised)

    def _repr_png_(self) -> bytes:
        return self.picture().png()

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis}={len(labels)}" for axis, labels in self._labels.items())
        lines = [
            f"Sweep({shape}) of {self.metric}, {self.direction}, by {self.method} runs; unpatched: {self.base:.4g}"
        ]
        if self.source is not None:
            lines[0] += f", source run: {self.source:.4g}"
        effect = self.effect.detach().flatten()
        for flat in effect.nan_to_num().abs().argsort(descending=True, stable=True)[:5].tolist():
            lines.append(
                f"  {self._describe(flat)}: {float(self.values.flatten()[flat]):.4g} ({float(effect[flat]):+.4g})"
            )
        return "\n".join(lines)

    def _describe(self, flat: int) -> str:
        index = torch.unravel_index(torch.tensor(flat), self.values.shape)
        at = {axis: labels[int(i)] for (axis, labels), i in zip(self._labels.items(), index, strict=True)}
        unit = "" if self.unit is None else f" {self.unit} {at[self.unit]}"
        position = at["position"]
        where = "all positions" if position is None else f"position {position}"
        text = "" if position is None or self.texts is None else f" {self._text(position)!r}"
        return f"{at['component']} layer {at['layer']}{unit}, {where}{text}"

    def _text(self, position: int) -> str:
        assert self.texts is not None
        return self.texts[self.positions.index(position)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "values"}
        metadata = {"hijack_lens": json.dumps({"format": _FORMAT, **header})}
        write_atomically(path, save({"values": self.values.detach().cpu().contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sweep":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        wanted = {field.name for field in fields(cls)} - {"values"}
        if set(tensors) != {"values"} or set(header) - {"format"} != wanted:
            raise ValueError(f"{path} is damaged: it lacks a part of a sweep, or has another")
        labels: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in header.items() if name in wanted
        }
        return cls(values=tensors["values"], **labels)
