"""A model's forward pass on the same parameters, without hook points: what the training loop runs.

Two identities save most of the matrix products of a hooked forward pass. The first layer's input depends on the token
alone (unless positions are added to it), so its queries, keys and values are computed once per vocabulary entry and
looked up. And a single head as wide as the residual stream needs only the products of W_Q and W_K and of W_V and W_O.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.models.architecture import RelativeAttention
from hijack_lens.models.linear_maps import linear_norm
from hijack_lens.models.real import Inputs, RealTransformer
from hijack_lens.models.transformer import BigramTransformer

Stream = Float[Tensor, "batch pos d_model"]


class PlainForward:
    """What `model(tokens)` returns, to float precision; hooks do not fire.

    Args:
        model: the model to run. Its parameters may change afterwards, but what is frozen at zero now (MLPs, positional
            embeddings) is left out.
    """

    def __init__(self, model: BigramTransformer | RealTransformer):
        self.model = model
        mlps: list[Any] = [getattr(block, "mlp", None) for block in model.blocks]
        self._mlps = [None if mlp is None or _is_frozen_at_zero(mlp) else mlp for mlp in mlps]
        W_pos = None if model.positions == "rotary" else model.W_pos
        self._adds_positions = W_pos is not None and (W_pos.requires_grad or bool(W_pos.any()))

    def __call__(self, tokens: Inputs) -> Float[Tensor, "batch pos d_vocab_out"]:
        """The model's outputs at every position; of vectors, for models that read them."""
        model, by_token = self.model, not tokens.is_floating_point() and not self._adds_positions
        x = model.front(tokens) @ model.W_E if tokens.is_floating_point() else F.embedding(tokens, model.W_E)
        if self._adds_positions:
            x = x + model.W_pos[: tokens.shape[1]]
        block: Any
        for layer, (block, mlp) in enumerate(zip(model.blocks, self._mlps, strict=True)):
            if layer == 0 and by_token:
                x = x + _attention_by_token(block.attn, _normed(block.ln1, model.W_E), tokens)
            else:
                x = x + _attention(block.attn, _normed(block.ln1, x))
            if mlp is not None:
                hidden = torch.addmm(mlp.b_in, _normed(block.ln2, x).flatten(0, 1), mlp.W_in)
                x = x + torch.addmm(mlp.b_out, mlp.act_fn(hidden), mlp.W_out).view_as(x)
        final = _normed(getattr(model, "ln_final", None), x)
        return torch.addmm(model.b_U, final.flatten(0, 1), model.W_U).unflatten(0, tokens.shape[:2])


def _is_frozen_at_zero(mlp: Any) -> bool:
    return not any(p.requires_grad or bool(p.any()) for p in (mlp.W_out, mlp.b_out))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return linear_norm(norm, x)(x)


def _attention(attn: Any, x: Stream) -> Stream:
    """Attention over inputs that differ by position."""
    n_heads, d_model, d_head = attn.W_Q.shape
    relative = isinstance(attn, RelativeAttention)
    if n_heads == 1 and d_head == d_model and not relative and attn.cfg.positional_embedding_type != "rotary":
        # The key bias adds the same score to all keys, so the softmax does not see it.
        q = F.linear(x, attn.W_K[0] @ attn.W_Q[0].T, attn.W_K[0] @ attn.b_Q[0])
        v = x @ (attn.W_V[0] @ attn.W_O[0])
        mixed = _mix(attn, q[:, None], x[:, None], v[:, None])[:, 0]
        return mixed + (attn.b_V[0] @ attn.W_O[0] + attn.b_O)
    q, k, v = _projected(attn, x).unflatten(-1, (3, n_heads, d_head)).unbind(-3)
    return _out(attn, _positioned_mix(attn, q, k, v))


def _attention_by_token(attn: Any, x: Float[Tensor, "d_vocab d_model"], tokens: Int[Tensor, "batch pos"]) -> Stream:
    """Attention whose input at each position is the token's row of `x`."""
    n_heads, _, d_head = attn.W_Q.shape
    table = _projected(attn, x)
    if n_heads > 1:
        q, k, v = F.embedding(tokens, table).unflatten(-1, (3, n_heads, d_head)).unbind(-3)
        return _out(attn, _positioned_mix(attn, q, k, v))
    q, k, v = table.split(d_head, -1)
    written = v @ attn.W_O[0]
    rows = F.embedding(tokens, torch.cat([q, k, written], -1))[..., None, :]
    q, k, v = rows.split([d_head, d_head, written.shape[-1]], -1)
    return _positioned_mix(attn, q, k, v)[..., 0, :] + attn.b_O


def _projected(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of all heads, in one product."""
    weight = torch.cat([attn.W_Q, attn.W_K, attn.W_V]).transpose(1, 2).flatten(0, 1)
    return F.linear(x, weight, torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten())


def _positioned_mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch pos head_index d_value"]:
    """Values mixed by attention, [batch, pos, head_index, d_head] in and out; positions enter here."""
    mask = None
    if isinstance(attn, RelativeAttention):
        length = q.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        mask = attn.relative_scores(q, length).masked_fill(future, -torch.inf)
    elif attn.cfg.positional_embedding_type == "rotary":
        q, k = attn.apply_rotary(q), attn.apply_rotary(k)
    return _mix(attn, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def _mix(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=1 / attn.attn_scale)


def _out(attn: Any, z: Float[Tensor, "batch pos head_index d_head"]) -> Stream:
    return F.linear(z.flatten(2), attn.W_O.flatten(0, 1).T, attn.b_O)
