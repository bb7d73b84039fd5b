"""A model's normalisation as the linear map that it is, once its scale is known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.components import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

_UNNAMED_EPS = 1e-5
"""What OLMo's norm, which has no attribute for it, adds to the variance."""


@dataclass(frozen=True)
class LinearNorm:
    """A norm with its scale frozen: x -> (x - mean(x) if centred) / scale * w, and then + b.

    Attributes:
        centred: whether the mean is taken off (LayerNorm, not RMSNorm).
        scale: of the actual run; `None` where there is no norm.
        w: weight, if any.
        b: bias, if any.
    """

    centred: bool = False
    scale: Float[Tensor, "*batch 1"] | None = None
    w: Float[Tensor, "d_model"] | None = None
    b: Float[Tensor, "d_model"] | None = None

    def linear(
        self, x: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows_scale 1"] | None = None
    ) -> Float[Tensor, "*rows d_model"]:
        """The map without its bias, so that a sum of terms maps to the sum of what they map to.

        Args:
            x: terms of the residual stream.
            scale: those of the run's scales that broadcast against x; by default all of them.
        """
        if self.scale is None:
            return x
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / (self.scale if scale is None else scale)
        return x if self.w is None else x * self.w

    def before(self, W: Float[Tensor, "d_model out"], position: int) -> Float[Tensor, "*batch d_model out"]:
        """The map at a position, without its bias, and a matrix that comes after it, as one matrix."""
        if self.scale is None:
            return W
        W = W if self.w is None else self.w[:, None] * W
        if self.centred:
            W = W - W.mean(0)
        return W / self.scale[:, position, None]

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself, where its scale is x's own."""
        x = self.linear(x)
        return x if self.b is None else x + self.b


def linear_norm(norm: nn.Module | None, x: Float[Tensor, "*batch d_model"]) -> LinearNorm:
    """The norm module as it acts on the residual stream `x`; none of its hooks fires.

    Raises:
        TypeError: for a kind of norm that is not linear once its scale is known, or is unknown here.
    """
    norm = getattr(norm, "original_component", norm)  # what a TransformerBridge wraps
    if norm is None or isinstance(norm, nn.Identity):
        return LinearNorm()
    if isinstance(norm, (LayerNorm, LayerNormPre, nn.LayerNorm)):
        centred = True
    elif isinstance(norm, (RMSNorm, RMSNormPre, nn.RMSNorm)):
        centred = False
    else:
        return _tried_out(norm, x)
    # PyTorch's own modules call them weight and bias.
    w, b = (getattr(norm, short, getattr(norm, long, None)) for short, long in (("w", "weight"), ("b", "bias")))
    return LinearNorm(centred, _scale(x, norm.eps, centred), w, b)


def normed(norm: nn.Module | None, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What a norm module makes of `x`, to the model's own rounding; none of its hooks fires.

    Raises:
        TypeError: for a norm that is unknown here.
    """
    if isinstance(norm, NormalizationBridge) and (
        norm.use_native_layernorm_autograd or getattr(norm.config, "layer_norm_folding", False)
    ):
        # The bridge asks the module it wraps, which may well compute in float32 whatever the model's dtype.
        return norm.original_component.forward(x).to(x.dtype)
    return linear_norm(norm, x)(x)


def _tried_out(norm: nn.Module, x: Float[Tensor, "*batch d_model"]) -> LinearNorm:
    """A norm of an unknown class, where it proves to be an RMSNorm or a LayerNorm on `x` itself.

    Every family of Hugging Face's models has a class of its own; some multiply by 1 + weight.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    actual = norm.forward(x)
    tried = [
        LinearNorm(centred, _scale(x, one_eps, centred), w, bias)
        for one_eps in ((None, _UNNAMED_EPS) if eps is None else (eps,))
        for centred in (False, True)
        for w in ((None,) if weight is None else (weight, 1 + weight))
    ]
    errors = [float((candidate(x) - actual).detach().abs().max()) for candidate in tried]
    best = errors.index(min(errors))
    # Many compute in float32, whatever the model's dtype.
    tolerance = max(4 * torch.finfo(x.dtype).eps, 32 * torch.finfo(torch.float32).eps)
    if errors[best] <= tolerance * float(actual.detach().abs().max()):
        return tried[best]
    raise TypeError(
        f"model has a norm of type {type(norm).__name__}, which computes neither an RMSNorm nor a LayerNorm"
    )


def _scale(x: Float[Tensor, "*batch d_model"], eps: float | None, centred: bool) -> Float[Tensor, "*batch 1"]:
    spread = x - x.mean(-1, keepdim=True) if centred else x
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # PyTorch's default
    return (spread.pow(2).mean(-1, keepdim=True) + eps).sqrt()
