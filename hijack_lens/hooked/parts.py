"""A HookedTransformer's parts but for attention, where TransformerLens has none (4.x)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.factories.activation_function_factory import ActivationFunctionFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import get_offset_position_ids

from hijack_lens.hooked.config import HookedTransformerConfig

# Operations and their order are those of TransformerLens 3.9: a model saved there gives the same logits to the bit.


def weight(cfg: HookedTransformerConfig, *shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(*shape, dtype=cfg.dtype))


def bias(cfg: HookedTransformerConfig, *shape: int) -> nn.Parameter:
    """A parameter that starts at 0."""
    return nn.Parameter(torch.zeros(*shape, dtype=cfg.dtype))


class Embed(nn.Module):
    """The token embedding."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.W_E = weight(cfg, cfg.d_vocab, cfg.d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """A row for each token."""
        return self.W_E[tokens, :]


class PosEmbed(nn.Module):
    """The embedding of absolute positions."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.W_pos = weight(cfg, cfg.n_ctx, cfg.d_model)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """A row for each position; masked tokens have none, and are not counted."""
        here = slice(past_kv_pos_offset, past_kv_pos_offset + tokens.shape[-1])
        if attention_mask is None:
            return self.W_pos[here].expand(len(tokens), -1, -1).clone()
        positions = get_offset_position_ids(past_kv_pos_offset, attention_mask)
        return torch.where(attention_mask[:, here, None].bool(), self.W_pos[positions], 0)


class Unembed(nn.Module):
    """The map from the final residual stream to logits."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.W_U = weight(cfg, cfg.d_model, cfg.d_vocab_out)
        self.b_U = bias(cfg, cfg.d_vocab_out)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Logits."""
        return self.hook_out(F.linear(self.hook_in(residual), self.W_U.T.contiguous(), self.b_U))


class _Norm(nn.Module):
    """What both norms share: the scale of what they are given, in float32 or better."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model, dtype=cfg.dtype))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def scaled(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x over its root mean square, in the model's dtype."""
        mean_square = torch.mean(x**2, dim=-1, keepdim=True)
        scale = self.hook_scale(torch.sqrt(mean_square + self.eps))
        return self.hook_normalized(x / scale).to(self.cfg.dtype)


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * w."""

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The normalised residual stream."""
        return self.scaled(_precise(x)) * self.w


class LayerNorm(_Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__(cfg)
        self.b = bias(cfg, cfg.d_model)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The normalised residual stream."""
        precise = _precise(x)
        return self.scaled(precise - precise.mean(-1, keepdim=True)) * self.w + self.b


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


class MLP(nn.Module):
    """W_out act_fn(W_in x + b_in) + b_out."""

    def __init__(self, cfg: HookedTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.d_mlp = cfg.d_mlp
        self.act_fn = ActivationFunctionFactory.pick_activation_function(cfg)
        self.W_in = weight(cfg, cfg.d_model, cfg.d_mlp)
        self.b_in = bias(cfg, cfg.d_mlp)
        self.W_out = weight(cfg, cfg.d_mlp, cfg.d_model)
        self.b_out = bias(cfg, cfg.d_model)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        pre = torch.addmm(self.b_in, x.flatten(0, 1), self.W_in).unflatten(0, x.shape[:2])
        post = self.hook_post(self.act_fn(self.hook_pre(pre)))
        return torch.addmm(self.b_out, post.flatten(0, 1), self.W_out).view_as(x)
