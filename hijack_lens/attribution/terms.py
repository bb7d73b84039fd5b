"""Terms of the residual stream, and how they pass through the frozen blocks of a run.

Given the attention patterns, the norms' scales and the MLPs' gates of a run, every block is linear in the
residual stream (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Terms are followed
through it in one of two ways.

`SummedBlock` keeps each term as the vectors it adds at every position.

`FirstBlock` and `LastBlock` follow where a term came from, for one query position of a model of at most two
blocks, without ever holding a [query, source, d_model] tensor: what a head writes at any position is a mix of
low-rank vectors, one per source, so the mixing weights and the vectors are kept apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.norm import LinearNorm, linear_norm


@dataclass(frozen=True)
class FrozenBlock:
    """A block's weights, and what the run has settled: patterns, scales and gates. A bias may be absent."""

    pattern: Float[Tensor, "batch head query key"]
    ln1: LinearNorm
    ln2: LinearNorm
    gate: Float[Tensor, "batch pos d_mlp"] | None
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_V: Float[Tensor, "head d_head"] | None
    b_O: Float[Tensor, "d_model"] | None
    W_in: Float[Tensor, "d_model d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"] | None
    b_in: Float[Tensor, "d_mlp"] | None
    b_out: Float[Tensor, "d_model"] | None

    @classmethod
    def of(cls, block: Any, run: dict[str, Tensor], layer: int) -> "FrozenBlock":
        """Block `layer` of a model, as it acted in a recorded run."""
        prefix = f"blocks.{layer}"
        mlp = getattr(block, "mlp", None)
        gate = None
        if mlp is not None:
            pre, post = run[f"{prefix}.mlp.hook_pre"], run[f"{prefix}.mlp.hook_post"]
            gate = torch.where(pre == 0, 0.0, post / pre)
        attn = block.attn
        return cls(
            pattern=run[f"{prefix}.attn.hook_pattern"],
            ln1=linear_norm(getattr(block, "ln1", None), run[f"{prefix}.hook_resid_pre"]),
            ln2=linear_norm(getattr(block, "ln2", None), run[f"{prefix}.hook_resid_mid"]) if mlp else LinearNorm(),
            gate=gate,
            W_V=attn.W_V.detach(),
            W_O=attn.W_O.detach(),
            b_V=_detached(attn.b_V),
            b_O=_detached(attn.b_O),
            W_in=_detached(mlp.W_in) if mlp else None,
            W_out=_detached(mlp.W_out) if mlp else None,
            b_in=_detached(mlp.b_in) if mlp else None,
            b_out=_detached(mlp.b_out) if mlp else None,
        )

    @property
    def heads(self) -> list[int]:
        """Heads that write anything at all."""
        return [head for head in range(len(self.W_O)) if bool(self.W_O[head].any())]

    @property
    def has_mlp(self) -> bool:
        """Whether there is an MLP that writes anything at all."""
        return self.W_out is not None and (bool(self.W_out.any()) or self.b_out is not None and bool(self.b_out.any()))

    def attn_bias(self) -> Float[Tensor, "batch pos d_model"]:
        """What the attention adds at each position whatever it reads."""
        total = torch.zeros_like(self.W_O[0, 0])
        total = total.expand(self.pattern.shape[0], self.pattern.shape[2], -1)
        for head in range(len(self.W_O)):
            value = torch.zeros_like(self.W_O[head, :, 0])
            if self.b_V is not None:
                value = value + self.b_V[head]
            if self.ln1.b is not None:
                value = value + self.ln1.b @ self.W_V[head]
            total = total + self.pattern[:, head].sum(-1)[..., None] * (value @ self.W_O[head])
        return total if self.b_O is None else total + self.b_O

    def mlp_bias(self) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds at each position whatever it reads, given its gates."""
        assert self.gate is not None and self.W_in is not None and self.W_out is not None
        before = torch.zeros_like(self.W_in[0])
        if self.b_in is not None:
            before = before + self.b_in
        if self.ln2.b is not None:
            before = before + self.ln2.b @ self.W_in
        total = (before * self.gate) @ self.W_out
        return total if self.b_out is None else total + self.b_out

    def values(self, x: Tensor, head: int, scale: Tensor | None = None) -> Tensor:
        """What a head reads from terms x: its value vectors, bias aside."""
        return self.ln1.linear(x, scale) @ self.W_V[head]

    def mlp(self, x: Tensor, gate: Tensor, scale: Tensor | None) -> Tensor:
        """What the MLP makes of terms x at the positions of `gate` and `scale`, biases aside."""
        assert self.W_in is not None and self.W_out is not None
        return (self.ln2.linear(x, scale) @ self.W_in * gate) @ self.W_out


def _detached(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


@dataclass(frozen=True)
class SummedBlock:
    """A block that takes terms as [batch, pos, d_model] and forgets where they came from."""

    block: FrozenBlock

    def keep(self, term: Tensor) -> Tensor:
        """The term past the block, along the residual stream."""
        return term

    def bias(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """A bias as a term."""
        return x

    def head(self, term: Tensor, head: int) -> Tensor:
        """The term through a head."""
        return self.block.pattern[:, head] @ self.block.values(term, head) @ self.block.W_O[head]

    def mlp(self, term: Tensor) -> Tensor:
        """The term through the MLP."""
        assert self.block.gate is not None
        return self.block.mlp(term, self.block.gate, None)


@dataclass(frozen=True)
class Local:
    """A term at every position, each of its own position's making."""

    x: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Mixed:
    """A head's output at every position q: sum over sources s of pattern[q, s] * v[s] @ basis."""

    pattern: Float[Tensor, "batch query key"]
    v: Float[Tensor, "batch key rank"]
    basis: Float[Tensor, "rank d_model"]


@dataclass(frozen=True)
class Gated:
    """What the first block's MLP makes of a head's output, at every position."""

    mixed: Mixed


@dataclass(frozen=True)
class Point:
    """A term at the query position, of that position's own making."""

    x: Float[Tensor, "batch d_model"]


@dataclass(frozen=True)
class Spread:
    """A term at the query position: from source s comes weight[s] * v[s] @ basis."""

    weight: Float[Tensor, "batch source"]
    v: Float[Tensor, "batch source rank"]
    basis: Float[Tensor, "*batch rank d_model"]


@dataclass(frozen=True)
class FirstBlock:
    """The block whose every position matters, since the last block may attend to it."""

    block: FrozenBlock

    def keep(self, term: Local) -> Local:
        """The term past the block, along the residual stream."""
        return term

    def bias(self, x: Float[Tensor, "batch pos d_model"]) -> Local:
        """A bias as a term; its source is the position where it enters."""
        return Local(x)

    def head(self, term: Local, head: int) -> Mixed:
        """The term through a head."""
        block = self.block
        return Mixed(block.pattern[:, head], block.values(term.x, head), block.W_O[head])

    def mlp(self, term: Local | Mixed) -> Local | Gated:
        """The term through the MLP."""
        if isinstance(term, Mixed):
            return Gated(term)
        assert self.block.gate is not None
        return Local(self.block.mlp(term.x, self.block.gate, None))


@dataclass(frozen=True)
class LastBlock:
    """The block of which one query position matters."""

    block: FrozenBlock
    first: FrozenBlock | None
    query: int

    def keep(self, term: Local | Mixed | Gated) -> Point | Spread:
        """The term at the query position, along the residual stream."""
        if isinstance(term, Local):
            return Point(term.x[:, self.query])
        if isinstance(term, Mixed):
            return Spread(term.pattern[:, self.query], term.v, term.basis)
        assert self.first is not None
        mixed = term.mixed
        basis = _mlp_at(self.first, self.query, mixed.basis)
        return Spread(mixed.pattern[:, self.query], mixed.v, basis)

    def bias(self, x: Float[Tensor, "batch pos d_model"]) -> Point:
        """A bias as a term; its source is the query position, where it enters."""
        return Point(x[:, self.query])

    def head(self, term: Local | Mixed | Gated, head: int) -> Spread:
        """The term through a head."""
        block = self.block
        pattern, W_O = block.pattern[:, head, self.query], block.W_O[head]
        # The norm divides each position by its scale; here that is part of the weight it is read with.
        one = None if block.ln1.scale is None else torch.ones_like(block.ln1.scale[:, :1])
        unscaled = pattern if block.ln1.scale is None else pattern / block.ln1.scale[..., 0]
        if isinstance(term, Local):
            return Spread(unscaled, block.values(term.x, head, one), W_O)
        if isinstance(term, Mixed):
            weight = torch.einsum("bq,bqs->bs", unscaled, term.pattern)
            return Spread(weight, term.v @ block.values(term.basis, head, None if one is None else one[0]), W_O)
        # Between the two heads stands an MLP, whose gates differ by position: mix neuron by neuron.
        first, mixed = self.first, term.mixed
        assert first is not None and first.gate is not None and first.W_in is not None and first.W_out is not None
        if first.ln2.scale is not None:
            unscaled = unscaled / first.ln2.scale[..., 0]
            basis = first.ln2.linear(mixed.basis, torch.ones_like(first.ln2.scale[0, :1]))
        else:
            basis = mixed.basis
        mix = torch.einsum("bqs,bqm->bsm", mixed.pattern * unscaled[..., None], first.gate)
        neurons = mix * (mixed.v @ (basis @ first.W_in))
        read = block.values(first.W_out, head, None if one is None else one[0])
        return Spread(torch.ones_like(pattern), neurons @ read, W_O)

    def mlp(self, term: Point | Spread) -> Point | Spread:
        """The term at the query position through the MLP."""
        if isinstance(term, Point):
            return Point(_mlp_at(self.block, self.query, term.x[:, None])[:, 0])
        return Spread(term.weight, term.v, _mlp_at(self.block, self.query, term.basis))


def _mlp_at(
    block: FrozenBlock, query: int, x: Float[Tensor, "*batch rows d_model"]
) -> Float[Tensor, "batch rows d_model"]:
    """Terms through the MLP as it stands at one position."""
    assert block.gate is not None
    scale = None if block.ln2.scale is None else block.ln2.scale[:, query, None]
    return block.mlp(x.expand(len(block.gate), -1, -1), block.gate[:, query, None], scale)
