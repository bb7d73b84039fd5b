"""The result of a path patching sweep: a number per edge, and views of them."""

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.circuit import ROLE_NAMES, Circuit, Component
from hijack_lens.hooks.edges import Edge, name_of
from hijack_lens.hooks.effects import Effects

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.PathSweep.1"


@dataclass(frozen=True, repr=False)
class PathSweep(Effects):
    """A metric with each edge patched, alone.

    Attributes:
        values: the metric with the edge's message replaced, in the metric's unit.
        edges: what the axis holds.
        metric: its name.
        base: the metric on the unpatched run.
        source: the metric on the run that the messages come from.
        direction: "denoise" (clean messages, corrupted run) or "noise" (corrupted messages, clean run).
        method: "forward" for patched runs of the model, "gradient" for an estimate.
        circuit: names components by their roles.
    """

    values: Float[Tensor, "edge"]
    edges: tuple[Edge, ...]
    metric: str
    base: float
    source: float
    direction: Literal["denoise", "noise"]
    method: Literal["forward", "gradient"]
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != (len(self.edges),):
            raise ValueError(f"values must have shape {(len(self.edges),)}, got {tuple(self.values.shape)}")

    def to_pandas(self) -> pd.DataFrame:
        """A row per edge: sender, receiver and via, `value` and `effect`; and `normalised`, where it is defined."""
        frame = pd.DataFrame(
            {
                "sender": [name_of(edge.sender, self.circuit) for edge in self.edges],
                "receiver": [name_of(edge.receiver, self.circuit) for edge in self.edges],
                "via": [edge.via for edge in self.edges],
                "value": self.values.cpu().numpy(),
                "effect": self.effect.cpu().numpy(),
            }
        )
        return frame if self.clean == self.corrupted else frame.assign(normalised=self.normalised.cpu().numpy())

    def picture(self) -> "Picture":
        """A heat map of effects: senders against the inputs of receivers."""
        from hijack_lens.visual.edge_map import edge_map

        return edge_map(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "edges": [asdict(edge) for edge in self.edges],
            "metric": self.metric,
            "base": self.base,
            "source": self.source,
            "direction": self.direction,
            "method": self.method,
            "circuit": {role: [asdict(member) for member in getattr(self.circuit, role)] for role in ROLE_NAMES},
        }
        metadata = {"hijack_lens": json.dumps(header)}
        write_atomically(path, save({"values": self.values.cpu().contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PathSweep":
        """Reads what `save` wrote; nothing in it is executed. The evidence for the circuit is not kept.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            edges = tuple(Edge(_end(e["sender"]), _end(e["receiver"]), e["via"]) for e in header["edges"])
            roles: dict[str, Any] = {
                role: tuple(Component(**member) for member in header["circuit"][role]) for role in ROLE_NAMES
            }
            return cls(
                values=tensors["values"],
                edges=edges,
                metric=header["metric"],
                base=header["base"],
                source=header["source"],
                direction=header["direction"],
                method=header["method"],
                circuit=Circuit(**roles),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved PathSweep: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.hooks.path_table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.hooks.path_table import as_html

        return as_html(self)


def _end(saved: Any) -> Any:
    return Component(**saved) if isinstance(saved, dict) else saved
