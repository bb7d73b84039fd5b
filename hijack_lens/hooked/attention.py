"""A HookedTransformer's attention, where TransformerLens has none (4.x)."""

from typing import Any

import einops
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import get_offset_position_ids
from transformer_lens.utilities.attention import complex_attn_linear, simple_attn_linear

from hijack_lens.hooked.config import HookedTransformerConfig
from hijack_lens.hooked.parts import bias, weight
from hijack_lens.hooked.weights import HeadCircuits

HeadInput = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head_index d_model"]
"""What heads read: one residual stream, or, with `cfg.use_split_qkv_input` or `cfg.use_attn_in`, each its own copy."""


_FIRST_ANGLES = 2048
"""Positions whose rotary angles are computed at first; more follow when a prompt needs them."""


class Attention(HeadCircuits, nn.Module):
    """Causal attention, with a hook point at every step: heads' activations are [batch, pos, head_index, d_head],
    scores and patterns [batch, head_index, query_pos, key_pos], as in TransformerLens.

    Args:
        cfg: the model's configuration.
        attn_type: "global", as TransformerLens calls attention without a window; it had other kinds.
        layer_id: the block's index.
    """

    IGNORE: Tensor
    rotary_sin: Tensor
    rotary_cos: Tensor
    hook_k: HookPoint
    hook_q: HookPoint
    hook_v: HookPoint
    hook_z: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_result: HookPoint
    hook_rot_k: HookPoint
    hook_rot_q: HookPoint

    def __init__(self, cfg: HookedTransformerConfig, attn_type: str = "global", layer_id: int | None = None):
        super().__init__()
        if attn_type != "global":
            raise ValueError(f"attn_type must be 'global', got {attn_type!r}")
        self.cfg = cfg
        self.attn_type = attn_type
        self.layer_id = layer_id
        self.attn_scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        # TransformerLens's order, in which optimizers number parameters and random weights are drawn.
        self.W_Q = weight(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_O = weight(cfg, cfg.n_heads, cfg.d_head, cfg.d_model)
        self.b_Q = bias(cfg, cfg.n_heads, cfg.d_head)
        self.b_O = bias(cfg, cfg.d_model)
        self.W_K = weight(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_V = weight(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.b_K = bias(cfg, cfg.n_heads, cfg.d_head)
        self.b_V = bias(cfg, cfg.n_heads, cfg.d_head)
        # A state dict written under 3.9 has both, though an empty mask says nothing.
        for name, constant in (("mask", torch.zeros((0, 0), dtype=torch.bool)), ("IGNORE", torch.tensor(-torch.inf))):
            self.register_buffer(name, constant)
        rotary = ("rot_k", "rot_q") if cfg.positional_embedding_type == "rotary" else ()
        for name in ("k", "q", "v", "z", "attn_scores", "pattern", "result", *rotary):
            setattr(self, f"hook_{name}", HookPoint())
        if rotary:
            for name, angles in zip(("sin", "cos"), rotary_angles(cfg, min(cfg.n_ctx, _FIRST_ANGLES)), strict=True):
                self.register_buffer(f"rotary_{name}", angles)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # TransformerLens computes rotary angles as far as they were needed, and may have stored fewer or more.
        angles = {prefix + name: getattr(self, name) for name in ("rotary_sin", "rotary_cos") if hasattr(self, name)}
        super()._load_from_state_dict(state_dict | angles, prefix, *rest)

    def forward(
        self,
        query_input: HeadInput,
        key_input: HeadInput,
        value_input: HeadInput,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the heads add to the residual stream."""
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        n_past = 0
        if past_kv_cache_entry is not None:
            n_past = past_kv_cache_entry.past_keys.shape[1]
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q, n_past, attention_mask))
            k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))
        scores = self.apply_causal_mask(self.calculate_attention_scores(q, k), n_past, attention_mask)
        # Padding, which may attend to nothing at all, has no pattern.
        pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(-1).nan_to_num(nan=0.0))
        z = self.calculate_z_scores(v, pattern.to(v))
        if self.cfg.use_attn_result:
            result = (z[..., None] * self.W_O).sum(-2)
            return self.hook_result(result).sum(2) + self.b_O
        w = einops.rearrange(self.W_O, "head d_head d_model -> d_model (head d_head)").contiguous()
        return F.linear(z.flatten(2), w, self.b_O)

    def calculate_qkv_matrices(
        self, query_input: HeadInput, key_input: HeadInput, value_input: HeadInput
    ) -> tuple[
        Float[Tensor, "batch pos head_index d_head"],
        Float[Tensor, "batch pos head_index d_head"],
        Float[Tensor, "batch pos head_index d_head"],
    ]:
        """Queries, keys and values, before rotation."""
        apart = self.cfg.use_split_qkv_input or self.cfg.use_attn_in
        linear = complex_attn_linear if apart else simple_attn_linear
        return (
            self.hook_q(linear(query_input, self.W_Q, self.b_Q)),
            self.hook_k(linear(key_input, self.W_K, self.b_K)),
            self.hook_v(linear(value_input, self.W_V, self.b_V)),
        )

    def calculate_attention_scores(
        self, q: Float[Tensor, "batch query_pos head_index d_head"], k: Float[Tensor, "batch key_pos head_index d_head"]
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """Scores before masking."""
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / self.attn_scale

    def calculate_z_scores(
        self, v: Float[Tensor, "batch key_pos head_index d_head"], pattern: Float[Tensor, "batch head_index query key"]
    ) -> Float[Tensor, "batch query_pos head_index d_head"]:
        """Values mixed by the attention pattern."""
        return self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))

    def apply_causal_mask(
        self,
        attn_scores: Float[Tensor, "batch head_index query_pos key_pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """Scores of the future, and of masked tokens, at -inf."""
        n_query, n_key = attn_scores.shape[-2:]
        if n_query + past_kv_pos_offset != n_key:
            raise ValueError(f"past_kv_pos_offset must be {n_key} - {n_query}, got {past_kv_pos_offset}")
        positions = torch.arange(n_key, device=attn_scores.device)
        visible = positions <= positions[past_kv_pos_offset : past_kv_pos_offset + n_query, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool()
        return torch.where(visible, attn_scores, self.IGNORE)

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head_index d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch pos head_index d_head"]:
        """Queries or keys, turned by their positions; masked tokens are not counted."""
        needed = past_kv_pos_offset + x.shape[1]
        if needed > len(self.rotary_cos):
            longer = rotary_angles(self.cfg, min(self.cfg.n_ctx, max(needed, 2 * len(self.rotary_cos))))
            self.rotary_sin, self.rotary_cos = (angles.to(self.rotary_cos.device) for angles in longer)
        if attention_mask is None:
            at: Tensor | slice = slice(past_kv_pos_offset, past_kv_pos_offset + x.shape[1])
        else:
            at = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        cos, sin = (table[at].unsqueeze(-2) for table in (self.rotary_cos, self.rotary_sin))
        turned, rest = x[..., : self.cfg.rotary_dim], x[..., self.cfg.rotary_dim :]
        return torch.cat([turned * cos + self.rotate_every_two(turned) * sin, rest], dim=-1)

    def rotate_every_two(self, x: Float[Tensor, "*batch rotary_dim"]) -> Float[Tensor, "*batch rotary_dim"]:
        """A quarter turn in each plane; dimension i goes with i + rotary_dim / 2."""
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


def rotary_angles(
    cfg: HookedTransformerConfig, n_pos: int
) -> tuple[Float[Tensor, "pos dim"], Float[Tensor, "pos dim"]]:
    """Sines and cosines of the rotary angles of the first positions."""
    precise = torch.float64 if cfg.dtype == torch.float64 else torch.float32
    n_planes = (cfg.rotary_dim or 0) // 2
    wavelengths = (cfg.rotary_base ** (torch.arange(n_planes, dtype=precise) / n_planes)).repeat(2)
    angles = torch.arange(n_pos, dtype=precise)[:, None] / wavelengths
    return angles.sin().to(cfg.dtype), angles.cos().to(cfg.dtype)
