"""Terms of the residual stream, and how they pass through the frozen blocks of a run.

Given the attention patterns, the norms' scales and the MLPs' gates of a run, every block is linear in the
residual stream (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Terms are followed
through it in one of two ways.

`SummedBlock` keeps each term as the vectors it adds at every position.

`FirstBlock` and `LastBlock` follow where a term came from, for one query position of a model of at most two
blocks, without ever holding a [query, source, d_model] tensor: what a head writes at any position is a mix of
low-rank vectors, one per source, so the mixing weights and the vectors are kept apart.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hijack_lens.hooked import HookedTransformer
from hijack_lens.models.linear_maps import LinearNorm, linear_norm


@dataclass(frozen=True)
class FrozenMLP:
    """An MLP with its gates (activation / pre-activation per neuron) frozen at a run's. Biases may be absent."""

    norm: LinearNorm
    gate: Float[Tensor, "batch pos d_mlp"]
    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, "d_mlp"] | None
    b_out: Float[Tensor, "d_model"] | None

    def bias(self, at: slice = slice(None)) -> Float[Tensor, "batch some d_model"]:
        """What it adds at each position regardless of its input."""
        before = torch.zeros_like(self.W_in[0])
        if self.b_in is not None:
            before = before + self.b_in
        if self.norm.b is not None:
            before = before + self.norm.b @ self.W_in
        total = (before * self.gate[:, at]) @ self.W_out
        return total if self.b_out is None else total + self.b_out

    def everywhere(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Its output for a term at every position, without biases."""
        return (self.norm.linear(x) @ self.W_in * self.gate) @ self.W_out

    def at(self, query: int, x: Float[Tensor, "*batch rows d_model"]) -> Float[Tensor, "batch rows d_model"]:
        """Its output for terms at one position, without biases."""
        x = x.expand(len(self.gate), -1, -1)
        scale = None if self.norm.scale is None else self.norm.scale[:, query, None]
        return (self.norm.linear(x, scale) @ self.W_in * self.gate[:, query, None]) @ self.W_out


@dataclass(frozen=True)
class FrozenBlock:
    """A block's weights, with patterns, scales and gates frozen at a run's. Biases and a zero MLP may be absent."""

    pattern: Float[Tensor, "batch head query key"]
    norm: LinearNorm
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: tuple[Float[Tensor, "d_head d_model"], ...]
    b_V: Float[Tensor, "head d_head"] | None
    b_O: Float[Tensor, "d_model"] | None
    mlp: FrozenMLP | None

    @classmethod
    def of(cls, block: Any, run: dict[str, Tensor], layer: int) -> "FrozenBlock":
        """Block `layer` of a model, as it acted in a recorded run."""
        prefix = f"blocks.{layer}"
        attn, frozen_mlp = block.attn, None
        if hasattr(block, "mlp") and any(bool(W.any()) for W in (block.mlp.W_out, block.mlp.b_out) if W is not None):
            mlp, pre, post = block.mlp, run[f"{prefix}.mlp.hook_pre"], run[f"{prefix}.mlp.hook_post"]
            frozen_mlp = FrozenMLP(
                norm=linear_norm(getattr(block, "ln2", None), run[f"{prefix}.hook_resid_mid"]),
                gate=gate(mlp, pre, post),
                W_in=mlp.W_in,
                W_out=mlp.W_out,
                b_in=mlp.b_in,
                b_out=mlp.b_out,
            )
        return cls(
            pattern=run[f"{prefix}.attn.hook_pattern"],
            norm=linear_norm(getattr(block, "ln1", None), run[f"{prefix}.hook_resid_pre"]),
            W_V=attn.W_V,
            W_O=attn.W_O.unbind(),
            b_V=attn.b_V,
            b_O=attn.b_O,
            mlp=frozen_mlp,
        )

    @property
    def heads(self) -> list[int]:
        """Heads that write anything at all."""
        return [head for head, W_O in enumerate(self.W_O) if bool(W_O.any())]

    def bias(self) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds at each position regardless of its input."""
        total = self.W_V.new_zeros(self.pattern.shape[0], self.pattern.shape[2], self.W_V.shape[1])
        for head, W_O in enumerate(self.W_O):
            value = torch.zeros_like(W_O[:, 0])
            if self.b_V is not None:
                value = value + self.b_V[head]
            if self.norm.b is not None:
                value = value + self.norm.b @ self.W_V[head]
            total = total + self.pattern[:, head].sum(-1)[..., None] * (value @ W_O)
        return total if self.b_O is None else total + self.b_O

    def values(self, x: Tensor, head: int) -> Tensor:
        """The value vectors that a head reads from a term at every position, without bias."""
        return self.norm.linear(x) @ self.W_V[head]

    def unscaled_values(self, x: Tensor, head: int) -> Tensor:
        """The same before the division by the norm's scale, which is left to `reading`."""
        if self.norm.scale is None:
            return x @ self.W_V[head]
        return self.norm.linear(x, torch.ones_like(self.norm.scale[0, :1])) @ self.W_V[head]

    def reading(self, head: int, query: int) -> Float[Tensor, "batch key"]:
        """The weight with which a query position reads each position's unscaled values."""
        pattern = self.pattern[:, head, query]
        return pattern if self.norm.scale is None else pattern / self.norm.scale[..., 0]


def gate(mlp: Any, pre: Float[Tensor, "*rows d_mlp"], post: Float[Tensor, "*rows d_mlp"]) -> Tensor:
    """An MLP's activation as gate(pre) * pre."""
    return torch.where(pre == 0, _slope_at_zero(mlp), post / pre)


def gates_of(
    model: Any, mlp: Any, pre: Float[Tensor, "*rows d_mlp"], linear: Tensor, post: Float[Tensor, "*rows d_mlp"]
) -> Tensor:
    """What multiplies the MLP's linear pre-activations; `linear` are these in a gated MLP, and else `pre`."""
    if biases_after_gate(model):
        return mlp.act_fn(pre)
    return torch.where(linear == 0, 0.0, post / linear) if is_gated(model) else gate(mlp, pre, post)


def is_gated(model: Any) -> bool:
    """Whether a model's MLPs multiply two readings of their input."""
    return bool(getattr(model.cfg, "gated_mlp", False))


def biases_after_gate(model: Any) -> bool:
    """Whether MLPs add their b_in after the gate, as a HookedTransformer's gated ones do."""
    return is_gated(model) and isinstance(model, HookedTransformer)


def _slope_at_zero(mlp: Any) -> float:
    """The activation's gate at input 0, where any gate would give the right sum."""
    act_fn = getattr(mlp, "act_fn", None)
    if act_fn is None:
        return 0.0
    with torch.enable_grad():
        x = torch.zeros((), requires_grad=True)
        return float(torch.autograd.grad(act_fn(x), x)[0])


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

    def mlp(self, term: Tensor, mlp: FrozenMLP) -> Tensor:
        """The term through the MLP."""
        return mlp.everywhere(term)

    def mlp_bias(self, mlp: FrozenMLP) -> Tensor:
        """The MLP's bias as a term."""
        return mlp.bias()


@dataclass(frozen=True)
class Local:
    """A term whose source at each position is that position."""

    x: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Mixed:
    """A head's output at every position q: sum over sources s of pattern[q, s] * v[s] @ basis."""

    pattern: Float[Tensor, "batch query key"]
    v: Float[Tensor, "batch key rank"]
    basis: Float[Tensor, "rank d_model"]


@dataclass(frozen=True)
class Gated:
    """An MLP's response to a head's output, at every position."""

    mixed: Mixed
    mlp: FrozenMLP


@dataclass(frozen=True)
class Point:
    """A term at the query position, with that position as its source."""

    x: Float[Tensor, "batch d_model"]


@dataclass(frozen=True)
class Spread:
    """A term at the query position: from source s comes weight[s] * v[s] @ basis."""

    weight: Float[Tensor, "batch source"]
    v: Float[Tensor, "batch source rank"]
    basis: Float[Tensor, "*batch rank d_model"]


@dataclass(frozen=True)
class Through:
    """The last MLP's response to a term at the query position."""

    term: Point | Spread


@dataclass(frozen=True)
class FirstBlock:
    """The block of which every position matters, since the last block may attend to any."""

    block: FrozenBlock

    def keep(self, term: Local) -> Local:
        """The term past the block, along the residual stream."""
        return term

    def bias(self, x: Float[Tensor, "batch pos d_model"]) -> Local:
        """A bias as a term; its source is the position where it enters."""
        return Local(x)

    def head(self, term: Local, head: int) -> Mixed:
        """The term through a head."""
        return Mixed(self.block.pattern[:, head], self.block.values(term.x, head), self.block.W_O[head])

    def mlp(self, term: Local | Mixed, mlp: FrozenMLP) -> Local | Gated:
        """The term through the MLP."""
        return Gated(term, mlp) if isinstance(term, Mixed) else Local(mlp.everywhere(term.x))

    def mlp_bias(self, mlp: FrozenMLP) -> Local:
        """The MLP's bias as a term."""
        return Local(mlp.bias())


@dataclass(frozen=True)
class LastBlock:
    """The block of which only the query position matters."""

    block: FrozenBlock
    query: int

    def keep(self, term: Local | Mixed | Gated) -> Point | Spread:
        """The term at the query position, along the residual stream."""
        if isinstance(term, Local):
            return Point(term.x[:, self.query])
        if isinstance(term, Mixed):
            return Spread(term.pattern[:, self.query], term.v, term.basis)
        mixed = term.mixed
        return Spread(mixed.pattern[:, self.query], mixed.v, term.mlp.at(self.query, mixed.basis))

    def bias(self, x: Float[Tensor, "batch pos d_model"]) -> Point:
        """A bias as a term; its source is the query position, where it enters."""
        return Point(x[:, self.query])

    def head(self, term: Local | Mixed | Gated, head: int) -> Spread:
        """The term through a head."""
        block, W_O = self.block, self.block.W_O[head]
        reading = block.reading(head, self.query)
        if isinstance(term, Local):
            return Spread(reading, block.unscaled_values(term.x, head), W_O)
        if isinstance(term, Mixed):
            weight = einsum(reading, term.pattern, "batch key, batch key source -> batch source")
            return Spread(weight, term.v @ block.unscaled_values(term.basis, head), W_O)
        # An MLP lies between the two heads, and its gates differ by position: mix neuron by neuron.
        mixed, mlp = term.mixed, term.mlp
        basis = mixed.basis
        if mlp.norm.scale is not None:
            reading = reading / mlp.norm.scale[..., 0]
            basis = mlp.norm.linear(basis, torch.ones_like(mlp.norm.scale[0, :1]))
        mix = einsum(
            mixed.pattern * reading[..., None], mlp.gate, "batch key source, batch key neuron -> batch source neuron"
        )
        neurons = mix * (mixed.v @ (basis @ mlp.W_in))
        return Spread(torch.ones_like(reading), neurons @ block.unscaled_values(mlp.W_out, head), W_O)

    def mlp(self, term: Point | Spread, mlp: FrozenMLP) -> Through:
        """The term at the query position through the MLP."""
        return Through(term)

    def mlp_bias(self, mlp: FrozenMLP) -> Point:
        """The MLP's bias as a term."""
        return Point(mlp.bias(slice(self.query, self.query + 1))[:, 0])


@dataclass(frozen=True)
class Unembedding:
    """How the residual stream at the query position becomes logits, directly and through the last MLP.

    Each way is one matrix, multiplied out once. So is its product with each basis, which terms through a head share.
    """

    query: int
    straight: Float[Tensor, "*some d_model d_vocab"]
    through: Float[Tensor, "batch d_model d_vocab"] | None
    seen: dict[tuple[Tensor, bool], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, final: LinearNorm, W_U: Float[Tensor, "d_model d_vocab"], last: LastBlock) -> "Unembedding":
        """The unembedding after a model's last block."""
        straight, through, mlp = final.before(W_U, last.query), None, last.block.mlp
        if mlp is not None:
            neurons = mlp.gate[:, last.query, :, None] * (mlp.W_out @ straight)
            through = mlp.norm.before(mlp.W_in, last.query) @ neurons
        return cls(last.query, straight, through)

    def logits(self, term: Point | Spread | Through, length: int) -> Float[Tensor, "batch source d_vocab"]:
        """What a term adds to the logits, by source."""
        through = isinstance(term, Through)
        matrix = self.through if through else self.straight
        at_query = term.term if isinstance(term, Through) else term
        assert matrix is not None
        if isinstance(at_query, Spread):
            key = (at_query.basis, through)
            if key not in self.seen:
                self.seen[key] = at_query.basis @ matrix
            return (at_query.v @ self.seen[key]) * at_query.weight[..., None]
        logits = at_query.x[:, None] @ matrix
        value = logits.new_zeros(len(logits), length, logits.shape[-1])
        value[:, self.query] = logits[:, 0]
        return value
