"""Attention with a learnable key per offset."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.components import Attention
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.hook_points import HookPoint


class RelativeAttention(Attention):
    """TransformerLens's attention, with scores q_t . (k_s + r_{t-s}) (Shaw et al. 2018, arXiv 1803.02155).

    The offset keys r are the parameter `W_R`, [head_index, offset, d_head], for offsets 0, 1, ...; larger
    offsets have the key 0, so that nothing depends on the context's length. Their part of the scores passes
    through `hook_rel_scores`, [batch, head_index, query_pos, key_pos].

    Args:
        cfg: of the model.
        n_offsets: how many offsets have a key.
        layer_id: of the block.
    """

    def __init__(self, cfg: HookedTransformerConfig, n_offsets: int, layer_id: int):
        super().__init__(cfg, "global", layer_id)
        self.W_R = nn.Parameter(torch.zeros(cfg.n_heads, n_offsets, cfg.d_head, dtype=cfg.dtype))
        self.hook_rel_scores = HookPoint()

    def calculate_attention_scores(
        self,
        q: Float[Tensor, "batch query_pos head_index d_head"],
        k: Float[Tensor, "batch key_pos head_index d_head"],
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """Scores before masking."""
        relative = self.relative_scores(q, n_key=k.shape[1])
        return super().calculate_attention_scores(q, k) + self.hook_rel_scores(relative)

    def relative_scores(
        self, q: Float[Tensor, "batch query_pos head_index d_head"], n_key: int
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """The offset keys' part; with a key-value cache the queries are the last of the keys' positions."""
        n_query, n_offsets = q.shape[1], self.W_R.shape[1]
        by_offset = torch.einsum("bqhd,hod->bhqo", q, self.W_R.flip(1)) / self.attn_scale
        # Rows of the offsets' scores, largest offset first, are to be shifted right by one more from row to row:
        # pad them to one more than the width wanted, and read the same memory with that width.
        wide = nn.functional.pad(by_offset, (n_key - n_query, n_query))
        width = wide.shape[-1] - 1
        shifted = wide.flatten(2)[..., : n_query * width].unflatten(2, (n_query, width))
        return shifted[..., n_offsets - 1 : n_offsets - 1 + n_key]
