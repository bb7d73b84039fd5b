"""A two-layer model's logits on the same parameters, without the hook points: what the training loop runs."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hijack_lens.models import RelativeAttention, TwoLayerTransformer
from hijack_lens.norm import linear_norm


class PlainForward:
    """What `model(tokens)` returns, to float precision; hooks do not fire.

    Args:
        model: to run. Its parameters may change afterwards; but MLPs that are frozen at zero now are left out.
    """

    def __init__(self, model: TwoLayerTransformer):
        self.model = model
        mlps: list[Any] = [getattr(block, "mlp", None) for block in model.blocks]
        self._mlps = [None if mlp is None or _is_frozen_at_zero(mlp) else mlp for mlp in mlps]

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits at every position."""
        model = self.model
        x = F.embedding(tokens, model.W_E)
        if model.positions == "absolute":
            x = x + model.W_pos[: tokens.shape[1]]
        block: Any
        for block, mlp in zip(model.blocks, self._mlps, strict=True):
            x = x + _attention(block.attn, _normed(block.ln1, x))
            if mlp is not None:
                x = x + mlp.act_fn(_normed(block.ln2, x) @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
        return _normed(getattr(model, "ln_final", None), x) @ model.W_U + model.b_U


def _is_frozen_at_zero(mlp: Any) -> bool:
    return not any(p.requires_grad or bool(p.any()) for p in (mlp.W_out, mlp.b_out))


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return linear_norm(norm, x)(x)


def _attention(attn: Any, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    n_heads, _, d_head = attn.W_Q.shape
    # One product gives every head's queries, keys and values.
    weight = torch.cat([attn.W_Q, attn.W_K, attn.W_V]).transpose(1, 2).flatten(0, 1)
    bias = torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten()
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, n_heads, d_head)).unbind(2)
    mask = None
    if isinstance(attn, RelativeAttention):
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mask = attn.relative_scores(q, length).masked_fill(future, -torch.inf)
    elif attn.cfg.positional_embedding_type == "rotary":
        q, k = attn.apply_rotary(q), attn.apply_rotary(k)
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=1 / attn.attn_scale,
    )
    return F.linear(z.transpose(1, 2).flatten(2), attn.W_O.flatten(0, 1).T, attn.b_O)
