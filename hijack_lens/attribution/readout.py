"""How chosen logits read the residual stream, directly and through components."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.norm import LinearNorm


@dataclass(frozen=True)
class Readout:
    """A linear reading of the residual stream x before some component: sum over s of weight[s] * x[s] @ directions.

    Paths are followed backwards, from the logits to what wrote them (Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"): few directions, one per answer, pass through weights and frozen patterns, norms and gates,
    where a term of the stream for each component and source position would be [head, source, d_model].

    Attributes:
        directions: what is read; with a batch axis where gates lie between, which differ by prompt.
        weight: how strongly each position that is read counts.
        where: those positions.
    """

    directions: Float[Tensor, "*batch d_model answer"]
    weight: Float[Tensor, "batch read"]
    where: slice

    def before(self, norm: LinearNorm) -> "Readout":
        """What is read before a norm (its bias aside) to read this after it; the norm's scales are of `where`."""
        directions = self.directions if norm.w is None else norm.w[:, None] * self.directions
        if norm.centred:
            directions = directions - directions.mean(-2, keepdim=True)
        weight = self.weight if norm.scale is None else self.weight / norm.scale[..., 0]
        return Readout(directions, weight, self.where)

    def before_head(
        self,
        pattern: Float[Tensor, "batch read pos"],
        W_V: Float[Tensor, "d_model d_head"],
        W_O: Float[Tensor, "d_head d_model"],
    ) -> "Readout":
        """What a head reads, at all positions, of what this reads of its output; the norm is still to come."""
        weight = torch.einsum("br,brs->bs", self.weight, pattern)
        return Readout(W_V @ (W_O @ self.directions), weight, slice(None))

    def before_mlp(
        self,
        gate: Float[Tensor, "batch d_mlp"],
        W_in: Float[Tensor, "d_model d_mlp"],
        W_out: Float[Tensor, "d_mlp d_model"],
    ) -> "Readout":
        """What an MLP with these gates reads, likewise; this being a reading of one position."""
        return Readout(W_in @ (gate[..., None] * (W_out @ self.directions)), self.weight, self.where)

    def stream(self, x: Float[Tensor, "batch read d_model"]) -> Float[Tensor, "batch read answer"]:
        """What is read of a term of the stream, by the position where it is read."""
        return self.weight[..., None] * (x @ self.directions)

    def heads(
        self,
        pattern: Float[Tensor, "batch head read pos"],
        v: Float[Tensor, "batch pos head d_head"],
        W_O: Float[Tensor, "head d_head d_model"],
    ) -> Float[Tensor, "batch head pos answer"]:
        """What is read of the outputs of heads, by the position that they attend to."""
        weight = torch.einsum("br,bhrs->bhs", self.weight, pattern)
        return weight[..., None] * (v.transpose(1, 2) @ (W_O @ self.directions.unsqueeze(-3)))
