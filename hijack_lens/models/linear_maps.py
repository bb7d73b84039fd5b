"""Parts of a model as linear maps, their scales frozen at those of a run."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from hijack_lens.hooked import CENTRED_NORMS, RMS_NORMS

_UNNAMED_EPS = 1e-5
"""The epsilon of OLMo's norm, which has no attribute for it."""


@dataclass(frozen=True)
class LinearNorm:
    """A norm with its scale frozen: x -> (x - mean(x) if centred) / scale * w, and then + b.

    Attributes:
        centred: whether the mean is subtracted (LayerNorm, not RMSNorm).
        scale: the actual run's scale; `None` if there is no norm.
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
        """The map without its bias, so that the image of a sum of terms is the sum of their images.

        Args:
            x: terms of the residual stream.
            scale: the part of the run's scales that broadcasts against x; by default, all of them.
        """
        if self.scale is None:
            return x
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / (self.scale if scale is None else scale)
        return x if self.w is None else x * self.w

    def transposed(
        self, g: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows_scale 1"] | None = None
    ) -> Float[Tensor, "*rows d_model"]:
        """The map's transpose: readings of its output, as readings of its input. Arguments as for `linear`."""
        if self.scale is None:
            return g
        g = g if self.w is None else g * self.w
        g = g / (self.scale if scale is None else scale)
        return g - g.mean(-1, keepdim=True) if self.centred else g

    def before(self, W: Float[Tensor, "d_model out"], position: int) -> Float[Tensor, "*batch d_model out"]:
        """The map at a position (without its bias), then the matrix `W`, as one matrix."""
        if self.scale is None:
            return W
        W = W if self.w is None else self.w[:, None] * W
        if self.centred:
            W = W - W.mean(0)
        return W / self.scale[:, position, None]

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself, if its scale was computed from x."""
        x = self.linear(x)
        return x if self.b is None else x + self.b


def linear_norm(norm: nn.Module | None, x: Float[Tensor, "*batch d_model"]) -> LinearNorm:
    """The norm module as it acts on the residual stream `x`; none of its hooks fires."""
    module: Any = getattr(norm, "original_component", norm)  # the one that a TransformerBridge wraps
    if module is None or isinstance(module, nn.Identity):
        return LinearNorm()
    centred = isinstance(module, (*CENTRED_NORMS, nn.LayerNorm))
    known = centred or isinstance(module, (*RMS_NORMS, nn.RMSNorm))
    if not known:
        return _tried_out(module, x)
    # PyTorch's own modules call them weight and bias.
    w, b = (getattr(module, short, getattr(module, long, None)) for short, long in (("w", "weight"), ("b", "bias")))
    return LinearNorm(centred, _scale(x, module.eps, centred), w, b)


def normed(norm: nn.Module | None, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """A norm module's output on `x`, with the model's own rounding; none of its hooks fires."""
    if isinstance(norm, NormalizationBridge) and (
        norm.use_native_layernorm_autograd or getattr(norm.config, "layer_norm_folding", False)
    ):
        # The bridge calls the module it wraps, which may compute in float32 whatever the model's dtype.
        return norm.original_component.forward(x).to(x.dtype)
    return linear_norm(norm, x)(x)


def _tried_out(norm: nn.Module, x: Float[Tensor, "*batch d_model"]) -> LinearNorm:
    """A norm of an unknown class, if it turns out to compute an RMSNorm or a LayerNorm on `x`.

    Every Hugging Face model family has its own norm class; some multiply by 1 + weight.
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
    if errors[best] <= rounding(x.dtype) * float(actual.detach().abs().max()):
        return tried[best]
    raise TypeError(
        f"model has a norm of type {type(norm).__name__}, which computes neither an RMSNorm nor a LayerNorm"
    )


def rounding(dtype: torch.dtype) -> float:
    """The relative error of modules that compute in float32, as many do, whatever the model's dtype."""
    return max(4 * torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)


def _scale(x: Float[Tensor, "*batch d_model"], eps: float | None, centred: bool) -> Float[Tensor, "*batch 1"]:
    spread = x - x.mean(-1, keepdim=True) if centred else x
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # PyTorch's default
    return (spread.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@dataclass(frozen=True)
class Readout:
    """A linear readout of the residual stream x before some component: sum over s of weight[s] * x[s] @ directions.

    Paths are traced backwards, from the logits to what wrote them (Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"). One direction per answer passes back through weights and frozen patterns, norms and gates;
    forwards, the terms of each component and source position would take [head, source, d_model].

    Attributes:
        directions: the directions read; with a batch axis once they passed through gates, which differ by prompt.
        weight: the weight of each position read.
        where: those positions.
    """

    directions: Float[Tensor, "*batch d_model answer"]
    weight: Float[Tensor, "batch read"]
    where: slice

    def before(self, norm: LinearNorm) -> "Readout":
        """The readout before a norm (without bias) that equals this one after it; the scales are those at `where`."""
        directions = self.directions if norm.w is None else norm.w[:, None] * self.directions
        if norm.centred:
            directions = directions - directions.mean(-2, keepdim=True)
        weight = self.weight if norm.scale is None else self.weight / norm.scale[..., 0]
        return Readout(directions, weight, self.where)

    def before_head(
        self,
        pattern: Float[Tensor, "batch read pos"],
        W_V: Float[Tensor, "d_model d_head"],
        W_O: Float[Tensor, "d_head d_model"],
    ) -> "Readout":
        """The readout of a head's normed input, at all positions, that equals this one of its output."""
        weight = torch.einsum("br,brs->bs", self.weight, pattern)
        return Readout(W_V @ (W_O @ self.directions), weight, slice(None))

    def before_mlp(
        self,
        gate: Float[Tensor, "batch d_mlp"],
        W_in: Float[Tensor, "d_model d_mlp"],
        W_out: Float[Tensor, "d_mlp d_model"],
    ) -> "Readout":
        """The same for an MLP with these gates; this readout must be of one position."""
        return Readout(W_in @ (gate[..., None] * (W_out @ self.directions)), self.weight, self.where)

    def stream(self, x: Float[Tensor, "batch read d_model"]) -> Float[Tensor, "batch read answer"]:
        """What this reads of a term of the residual stream, by position."""
        return self.weight[..., None] * (x @ self.directions)

    def heads(
        self,
        pattern: Float[Tensor, "batch head read pos"],
        v: Float[Tensor, "batch pos head d_head"],
        W_O: Float[Tensor, "head d_head d_model"],
    ) -> Float[Tensor, "batch head pos answer"]:
        """What this reads of heads' outputs, by the position they attend to."""
        weight = torch.einsum("br,bhrs->bhs", self.weight, pattern)
        return weight[..., None] * (v.transpose(1, 2) @ (W_O @ self.directions.unsqueeze(-3)))
