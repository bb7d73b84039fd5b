"""The shape of a two-layer model, and its attention by relative positions."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hijack_lens.core.checks import check_choice, check_count
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.memory import check_memory
from hijack_lens.hooked import Attention, HookedTransformerConfig

_BLOCK = 70_000
"""Bytes of a block's modules and hook points, beside its weights."""

_SIZES = ("d_model", "d_head", "d_mlp", "n_ctx", "n_layers", "n_heads", "n_offsets")


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, in TransformerLens's terms. With a language, it fixes the shape of every parameter.

    Attributes:
        positions: "relative" (layer 0 is a `RelativeAttention`), "absolute" (learned `W_pos`), "rotary" or "none".
        n_layers: number of attention layers, each with `n_heads` heads of size `d_head`.
        mlp: the last block's MLP: "relu", "linear" or `None`. Earlier blocks' MLPs are zero.
        norm: `None`, "LN" or "RMS", before each head and MLP and before the unembedding.
        n_ctx: the longest prompt.
        n_offsets: with relative positions, how many offsets have a key.
        scale_attention: whether scores are divided by sqrt(d_head).

    Examples:
        >>> from hijack_lens.models import Architecture
        >>> print(Architecture(d_model=16, d_head=16, d_mlp=32, n_ctx=64, n_layers=3).circuit)
        previous-token head: L0H0; induction head: L2H0; bigram memory: L2MLP
    """

    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    positions: Literal["relative", "absolute", "rotary", "none"] = "relative"
    n_layers: int = 2
    n_heads: int = 1
    mlp: Literal["relu", "linear"] | None = "relu"
    norm: Literal["LN", "RMS"] | None = None
    n_offsets: int = 2
    scale_attention: bool = True

    def __post_init__(self) -> None:
        for name, size in self._sizes.items():
            object.__setattr__(self, name, check_count(name, size, minimum=1))
        check_choice("positions", self.positions, ("relative", "absolute", "rotary", "none"))
        if self.mlp is not None:
            check_choice("mlp", self.mlp, ("relu", "linear"))
        if self.norm is not None:
            check_choice("norm", self.norm, ("LN", "RMS"))
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"d_head must be even with rotary positions, got {self.d_head}")

    def check_memory(self, d_vocab: int, bytes_per_weight: int) -> None:
        """There is memory for a model of this shape."""
        attention = 4 * self.n_heads * self.d_model * self.d_head
        mlp = 0 if self.mlp is None else 2 * self.d_model * self.d_mlp
        positions = self.n_ctx * (self.d_head if self.positions == "rotary" else self.d_model)
        weights = self.n_layers * (attention + mlp) + positions + 2 * d_vocab * self.d_model
        weights += self.n_heads * self.n_offsets * self.d_head if self.positions == "relative" else 0
        check_memory(bytes_per_weight * weights + _BLOCK * self.n_layers, **self._sizes, d_vocab=d_vocab)

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SIZES}

    @property
    def circuit(self) -> Circuit:
        """The intended roles: first layer's heads, last layer's heads, last MLP."""
        heads = range(self.n_heads)
        last = self.n_layers - 1
        return Circuit(
            previous_token=tuple(Component(0, "head", head) for head in heads) if last else (),
            induction=tuple(Component(last, "head", head) for head in heads),
            bigram=() if self.mlp is None else (Component(last, "mlp"),),
        )


class RelativeAttention(Attention):
    """TransformerLens's attention, with scores q_t . (k_s + r_{t-s}) (Shaw et al. 2018, arXiv 1803.02155).

    The offset keys r are the parameter `W_R`, [head_index, offset, d_head], for offsets 0, 1, ...; larger
    offsets have the key 0, so nothing depends on the context's length. Their part of the scores passes
    through `hook_rel_scores`, [batch, head_index, query_pos, key_pos].

    Args:
        cfg: the model's configuration.
        n_offsets: how many offsets have a key.
        layer_id: the block's index.

    Examples:
        >>> previous_token = model.blocks[0].attn
        >>> type(previous_token).__name__, previous_token.W_R.shape
        ('RelativeAttention', torch.Size([1, 2, 18]))
    """

    def __init__(self, cfg: HookedTransformerConfig, n_offsets: int, layer_id: int):
        super().__init__(cfg, "global", layer_id)
        self.W_R = nn.Parameter(torch.zeros(cfg.n_heads, n_offsets, cfg.d_head, dtype=cfg.dtype))
        self.hook_rel_scores = HookPoint()

    def calculate_attention_scores(
        self, q: Float[Tensor, "batch query_pos head_index d_head"], k: Float[Tensor, "batch key_pos head_index d_head"]
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """Scores before masking."""
        relative = self.relative_scores(q, n_key=k.shape[1])
        return super().calculate_attention_scores(q, k) + self.hook_rel_scores(relative)

    def relative_scores(
        self, q: Float[Tensor, "batch query_pos head_index d_head"], n_key: int
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """The offset keys' part of the scores. With a key-value cache, the queries are at the last key positions."""
        n_query, n_offsets = q.shape[1], self.W_R.shape[1]
        by_offset = torch.einsum("bqhd,hod->bhqo", q, self.W_R.flip(1)) / self.attn_scale
        # Each row (largest offset first) must shift right by one more than the row before: pad the rows to one more
        # than the wanted width, then read the same memory at that width.
        wide = nn.functional.pad(by_offset, (n_key - n_query, n_query))
        width = wide.shape[-1] - 1
        shifted = wide.flatten(2)[..., : n_query * width].unflatten(2, (n_query, width))
        return shifted[..., n_offsets - 1 : n_offsets - 1 + n_key]
