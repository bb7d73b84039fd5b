"""A path through a model, and the memory it belongs to."""

from dataclasses import dataclass
from typing import Literal

from hijack_lens.circuit import Circuit, Component

Memory = Literal["context", "weights", "rest"]
MEMORIES: tuple[Memory, ...] = ("context", "weights", "rest")

Source = Literal["embed", "pos_embed", "stream", "biases"]
_SOURCE_NAMES: dict[Source, str] = {
    "embed": "embed",
    "pos_embed": "positional embed",
    "stream": "stream",
    "biases": "biases",
}


@dataclass(frozen=True)
class Path:
    """A route from where a term enters the residual stream to the unembedding.

    Attributes:
        source: "embed", "pos_embed", or "biases": every bias, by whichever route. In a deep model also "stream": all
            that `through[0]` reads from the residual stream and that no longer path beside this one carries.
        through: the heads and MLPs on the way, in order.
        label: the path in words, by the roles of the circuit's components.
        memory: "context" through an induction head; "weights" from the embedding through MLPs alone, from the stream
            through bigram memories alone, or biases; else "rest".
    """

    source: Source
    through: tuple[Component, ...]
    label: str
    memory: Memory

    def __str__(self) -> str:
        return self.label

    @classmethod
    def of(cls, source: Source, through: tuple[Component, ...], circuit: Circuit) -> "Path":
        """A path in the words of a circuit."""
        words = [_SOURCE_NAMES[source], *(circuit.label(component) for component in through)]
        label = words[0] if source == "biases" else " → ".join([*words, "unembed"])
        if any(component in circuit.induction for component in through):
            memory: Memory = "context"
        elif source != "pos_embed" and all(
            component in circuit.bigram if source == "stream" else component.kind == "mlp" for component in through
        ):
            memory = "weights"
        else:
            memory = "rest"
        return cls(source, through, label, memory)
