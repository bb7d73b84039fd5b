"""A model opened into plain functions of the residual stream, for work that needs few positions of few layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    ParallelBlockBridge,
    PositionEmbeddingsAttentionBridge,
)

from hijack_lens.hooked import GROUPED_ATTENTION, Attention, HookedTransformer
from hijack_lens.models.architecture import RelativeAttention

Pointwise = Callable[[Tensor], Tensor]
"""A module that treats each position independently, [batch, pos, d_model] in and out."""


# Settings whose effect a comparison on one prompt or position could miss: harmless values, besides None and False.
_PLAIN: dict[str, tuple] = {
    "attention_dir": ("causal",),
    "positional_embedding_type": ("standard", "rotary", "none"),
    "use_local_attn": (),
    "attn_scores_soft_cap": (-1.0, 0.0),
    "output_logits_soft_cap": (-1.0, 0.0),
    "num_experts": (),
    "use_qk_norm": (),
    "use_attention_sinks": (),
    "use_logn_attn": (),
    "use_dynamic_ntk_rope": (),
    "clip_qkv": (),
    "use_normalization_before_and_after": (),
    "load_in_4bit": (),
}


class UnknownArchitectureError(TypeError):
    """A model that `open_model` cannot take apart."""


@dataclass(frozen=True)
class Block:
    """A transformer block's parts. Keys and values may be shared by groups of query heads.

    Attributes:
        W_Q: with b_Q, maps the normalised residual stream to queries; one matrix, its rows ordered by head.
        W_K: with b_K, maps it to the keys of every key-value head.
        W_V: with b_V, maps it to values.
        W_O: each head's output matrix.
        scale: what scores are divided by.
        ln1: the norm before attention.
        mlp: the MLP and the norm before it; `None` if there is none.
        W_out: each neuron's output direction, if there is an MLP.
        parallel: whether the MLP reads what attention reads.
        rotate: rotates queries or keys, [*rows, head, d_head], by their positions, [*rows].
        W_R: keys per offset, in a `RelativeAttention`.
        softmax_dtype: the softmax's dtype, if not the scores' own.
    """

    W_Q: Float[Tensor, "queries d_model"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "keys d_model"]
    b_K: Float[Tensor, "kv_head d_head"]
    W_V: Float[Tensor, "keys d_model"]
    b_V: Float[Tensor, "kv_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, "d_model"]
    scale: float
    ln1: Pointwise
    mlp: Pointwise | None
    W_out: Float[Tensor, "d_mlp d_model"] | None
    parallel: bool = False
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    W_R: Float[Tensor, "head offset d_head"] | None = None
    softmax_dtype: torch.dtype | None = None

    @property
    def n_groups(self) -> int:
        """Query heads per key-value head."""
        return len(self.b_Q) // len(self.b_K)

    def group(self, index: int) -> "Block":
        """The block with only one key-value head and the query heads that read it."""
        return self._only(slice(index * self.n_groups, (index + 1) * self.n_groups), index)

    def one(self, head: int) -> "Block":
        """The block with only one query head and the key-value head that it reads."""
        return self._only(slice(head, head + 1), head // self.n_groups)

    def ungrouped(self) -> "Block":
        """The block with a key-value head for every query head: copies of those that are shared."""
        n_kv_heads, every = len(self.b_K), self.n_groups

        def copied(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (n_kv_heads, -1)).repeat_interleave(every, 0).flatten(0, 1)

        b_K, b_V = (bias.repeat_interleave(every, 0) for bias in (self.b_K, self.b_V))
        return replace(self, W_K=copied(self.W_K), b_K=b_K, W_V=copied(self.W_V), b_V=b_V)

    def _only(self, heads: slice, kv_head: int) -> "Block":
        shared, d_head = slice(kv_head, kv_head + 1), self.b_Q.shape[1]
        queries, keys = (slice(part.start * d_head, part.stop * d_head) for part in (heads, shared))
        return replace(
            self,
            W_Q=self.W_Q[queries],
            b_Q=self.b_Q[heads],
            W_K=self.W_K[keys],
            b_K=self.b_K[shared],
            W_V=self.W_V[keys],
            b_V=self.b_V[shared],
            W_O=self.W_O[heads],
            W_R=None if self.W_R is None else self.W_R[heads],
        )

    def normed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The residual stream after the norm, as attention reads it."""
        return _pointwise(self.ln1, x)

    def q(
        self, normed: Float[Tensor, "*rows d_model"], positions: Int[Tensor, "..."]
    ) -> Float[Tensor, "*rows head d_head"]:
        """Queries, rotated by their positions (which broadcast against the rows)."""
        return self.turned(_heads(normed, self.W_Q, self.b_Q), positions)

    def k(
        self, normed: Float[Tensor, "*rows d_model"], positions: Int[Tensor, "..."]
    ) -> Float[Tensor, "*rows kv_head d_head"]:
        """Keys, rotated by their positions."""
        return self.turned(_heads(normed, self.W_K, self.b_K), positions)

    def v(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows kv_head d_head"]:
        """Values."""
        return _heads(normed, self.W_V, self.b_V)

    def turned(
        self, x: Float[Tensor, "*rows heads d_head"], positions: Int[Tensor, "..."]
    ) -> Float[Tensor, "*rows heads d_head"]:
        """Queries or keys as they enter the scores."""
        return x if self.rotate is None else self.rotate(x, positions)

    def scores(
        self,
        q: Float[Tensor, "*#rows query head d_head"],
        k: Float[Tensor, "*#rows key kv_head d_head"],
        q_positions: Int[Tensor, "*#rows query"],
        k_positions: Int[Tensor, "*#rows key"],
    ) -> Float[Tensor, "*rows head query key"]:
        """Attention scores; -inf where the key comes after the query."""
        grouped = q.unflatten(-2, (len(self.b_K), self.n_groups))
        scores = torch.einsum("...qkgd,...skd->...kgqs", grouped, k).flatten(-4, -3) / self.scale
        offsets = q_positions[..., :, None] - k_positions[..., None, :]
        if self.W_R is not None:
            n_offsets = self.W_R.shape[1]
            by_offset = torch.einsum("...qhd,hod->...hqo", q, self.W_R) / self.scale
            index = offsets.clamp(0, n_offsets - 1)[..., None, :, :].expand_as(scores)
            near = (offsets >= 0) & (offsets < n_offsets)
            relative = by_offset.expand(*scores.shape[:-1], n_offsets).gather(-1, index)
            scores = scores + relative * near[..., None, :, :]
        return scores.masked_fill((offsets < 0)[..., None, :, :], -torch.inf)

    def pattern(self, scores: Float[Tensor, "*rows head query key"]) -> Float[Tensor, "*rows head query key"]:
        """The attention patterns that scores give."""
        return scores.softmax(-1, dtype=self.softmax_dtype).to(scores.dtype)

    def mixed(
        self, pattern: Float[Tensor, "*#rows head query key"], v: Float[Tensor, "*#rows key kv_head d_head"]
    ) -> Float[Tensor, "*rows query head d_head"]:
        """Values mixed by an attention pattern: z."""
        grouped = pattern.unflatten(-3, (len(self.b_K), self.n_groups))
        return torch.einsum("...kgqs,...skd->...qkgd", grouped, v).flatten(-3, -2)

    def attn_out(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """What attention adds to the residual stream."""
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)

    def mlp_out(
        self, resid_pre: Float[Tensor, "*rows d_model"], attn_out: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """What the MLP adds to the residual stream."""
        if self.mlp is None:
            return torch.zeros_like(attn_out)
        return _pointwise(self.mlp, resid_pre if self.parallel else resid_pre + attn_out)


@dataclass(frozen=True)
class OpenModel:
    """A model's blocks, and what follows them.

    Attributes:
        blocks: in order.
        ln_final: the final norm.
        unembed: the unembedding, an affine map.
    """

    blocks: tuple[Block, ...]
    ln_final: Pointwise
    unembed: Pointwise

    def normed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The last block's residual stream as the unembedding reads it."""
        return _pointwise(self.ln_final, x)

    def unembedded(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Its logits."""
        return _pointwise(self.unembed, normed)

    def logits(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits of the last block's residual stream."""
        return self.unembedded(self.normed(x))


def check_plain(model: Any) -> None:
    """Checks that the model has no setting that `OpenModel` does not compute."""
    for flag, plain in _PLAIN.items():
        if getattr(model.cfg, flag, None) not in (None, False, *plain):
            raise UnknownArchitectureError(f"cfg.{flag}={getattr(model.cfg, flag)!r} is not taken apart")
    window = getattr(getattr(getattr(model, "original_model", None), "config", None), "sliding_window", None)
    if window:
        raise UnknownArchitectureError(f"a sliding window of {window} is not taken apart")
    if any(getattr(block.attn, "q_norm", None) is not None for block in model.blocks if hasattr(block, "attn")):
        raise UnknownArchitectureError("norms of queries and keys are not taken apart")
    if any(getattr(block, "ln1_post", None) is not None for block in model.blocks):
        raise UnknownArchitectureError("norms after attention are not taken apart")
    if isinstance(model, TransformerBridge) and not _angles_stay(model):
        raise UnknownArchitectureError("rotary angles that depend on a prompt's length are not taken apart")


def _angles_stay(model: TransformerBridge) -> bool:
    """Whether a position has the same angles in prompts of any length; with long ropes, as Phi 3 has, it has not."""
    rotary = getattr(getattr(model, "rotary_emb", None), "original_component", None)
    if rotary is None:
        return True
    x, longest = torch.zeros(1, device=model.cfg.device), max(1, model.cfg.n_ctx - 1)

    def angles(*positions: int, kind: tuple) -> Tensor:
        tables = rotary(x, torch.tensor([positions], device=x.device), *kind)
        return torch.stack([table[:, 0] for table in tables])

    kinds: list[tuple] = [(kind,) for kind in getattr(rotary, "layer_types", ())] or [()]
    return all(torch.equal(angles(1, kind=kind), angles(1, longest, kind=kind)) for kind in kinds)


def open_model(model: Any) -> OpenModel:
    """The parts of a model. Using them fires their hook points: check first that these have no hooks.

    The parts may not be all that the model computes: call `check_plain` first, or compare with a run of the model.
    """
    cfg = model.cfg
    hooked = isinstance(model, HookedTransformer)
    normed = cfg.normalization_type is not None if hooked else hasattr(model, "ln_final")

    return OpenModel(
        tuple((_hooked_block if hooked else _bridge_block)(model, block) for block in model.blocks),
        model.ln_final if normed else torch.nn.Identity(),
        model.unembed,
    )


def _hooked_block(model: HookedTransformer, block: Any) -> Block:
    attn, cfg = block.attn, model.cfg
    _check_known(attn, Attention, RelativeAttention, *GROUPED_ATTENTION)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return _rotated(x, attn.rotary_cos[positions], attn.rotary_sin[positions], attn.rotate_every_two)

    shared = isinstance(attn, GROUPED_ATTENTION) and not cfg.ungroup_grouped_query_attention
    return _block(
        block,
        every=attn.repeat_kv_heads if shared else 1,
        scale=float(attn.attn_scale),
        mlp=None if cfg.attn_only else block.mlp,
        parallel=cfg.parallel_attn_mlp,
        rotate=rotate if cfg.positional_embedding_type == "rotary" else None,
        W_R=getattr(attn, "W_R", None),
    )


def _bridge_block(model: TransformerBridge, block: Any) -> Block:
    _check_known(block, BlockBridge, ParallelBlockBridge)
    attn, cfg = block.attn, model.cfg
    rotary = getattr(model, "rotary_emb", None)
    _check_known(
        attn,
        *((AttentionBridge, JointQKVAttentionBridge) if rotary is None else ()),
        *(() if rotary is None else (PositionEmbeddingsAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge)),
    )

    # Gemma 3 turns by other angles in the layers with a window.
    kind: tuple = ()
    if rotary is not None and hasattr(rotary.original_component, "layer_types"):
        kind = (getattr(attn.original_component, "layer_type", None),)
        if kind[0] not in rotary.original_component.layer_types:
            raise UnknownArchitectureError("rotary angles that differ by kind of layer are not taken apart here")

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        assert rotary is not None
        cos, sin = (table[0].view(*positions.shape, -1) for table in rotary(x, positions.reshape(1, -1), *kind))
        return _rotated(x, cos, sin, _half_turned)

    step_by_step = type(attn) is PositionEmbeddingsAttentionBridge

    return _block(
        block,
        every=1,
        scale=1 / getattr(attn.original_component, "scaling", cfg.d_head**-0.5) if step_by_step else cfg.d_head**0.5,
        mlp=getattr(block, "mlp", None),
        parallel=cfg.parallel_attn_mlp,
        rotate=None if rotary is None else rotate,
        softmax_dtype=torch.float32 if step_by_step else None,
    )


def _check_known(module: Any, *kinds: type) -> None:
    # Not isinstance: a subclass may compute something else.
    if type(module) not in kinds:
        raise UnknownArchitectureError(f"a part of type {type(module).__name__} is not taken apart")


def _block(block: Any, every: int, mlp: Any, **rest: Any) -> Block:
    """A block of either family; its W_K and W_V repeat each key-value head `every` times."""
    attn = block.attn
    W_Q, W_K, W_V, W_O = attn.W_Q, attn.W_K[::every], attn.W_V[::every], attn.W_O

    def bias(given: Tensor | None, *shape: int) -> Tensor:
        return W_Q.new_zeros(shape) if given is None else given

    n_kv_heads, _, d_head = W_K.shape
    ln1 = getattr(block, "ln1", torch.nn.Identity())  # OLMo 2's norms come after attention and MLP
    ln2 = getattr(block, "ln2", ln1)  # GPT-J's attention and MLP share a norm
    return Block(
        W_Q=_matrix(W_Q),
        b_Q=bias(attn.b_Q, len(W_Q), d_head),
        W_K=_matrix(W_K),
        b_K=bias(attn.b_K, n_kv_heads * every, d_head)[::every],
        W_V=_matrix(W_V),
        b_V=bias(attn.b_V, n_kv_heads * every, d_head)[::every],
        W_O=W_O,
        b_O=bias(attn.b_O, W_O.shape[-1]),
        ln1=ln1,
        mlp=None if mlp is None else lambda x: mlp(ln2(x)),
        W_out=getattr(mlp, "W_out", None),  # mixtures of experts have none
        **rest,
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, turn: Pointwise) -> Tensor:
    """Rotary positions on the first dimensions of each head, as many as `cos` has."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos[..., None, :] + turn(turned) * sin[..., None, :], rest], -1)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _matrix(weight: Float[Tensor, "heads d_model d_head"]) -> Float[Tensor, "heads_times_d_head d_model"]:
    return weight.transpose(1, 2).flatten(0, 1)


def _heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias.flatten()).unflatten(-1, bias.shape)


def _pointwise(module: Pointwise, x: Tensor) -> Tensor:
    # Modules expect [batch, pos, d_model]: pass all rows as positions of one prompt.
    return module(x.reshape(1, -1, x.shape[-1])).view(*x.shape[:-1], -1)
