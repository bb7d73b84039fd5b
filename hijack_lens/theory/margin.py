"""A logit difference, and what each memory contributes to it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Margin:
    """`logit[a] - logit[b]`, split by memory; in logits.

    Attributes:
        context: written through the induction head.
        weights: written by the bigram memory, the direct path and the biases.
        rest: written any other way.
    """

    context: Float[Tensor, "*batch"]
    weights: Float[Tensor, "*batch"]
    rest: Float[Tensor, "*batch"]

    @property
    def total(self) -> Float[Tensor, "*batch"]:
        """The hijack margin: positive where a wins, negative where b does."""
        return self.context + self.weights + self.rest

    def __repr__(self) -> str:
        parts = {"context": self.context, "weights": self.weights, "rest": self.rest, "total": self.total}
        shown = (
            f"{name}={value.item():+.4f}"
            if value.numel() == 1
            else f"{name}={[round(x, 4) for x in value.flatten().tolist()]}"
            for name, value in parts.items()
        )
        return f"Margin({', '.join(shown)})"
