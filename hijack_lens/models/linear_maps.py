"""Parts of a model as the linear maps that they are, once a run has settled their scales."""

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


@dataclass(frozen=True)
class Readout:
    """A linear reading of the residual stream x before some component: sum over s of weight[s] * x[s] @ directions.

    Paths are followed backwards, from the logits to what wrote them (Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"): few directions, one per answer, pass through weights and frozen patterns, norms and gates,
    where a term of the stream for each component and source position would be [head, source, d_model].

    Attributes:
        directions: what is read; with a batch axis where gates lie between, which differ by prompt.
        weight: how strongly each position that is read counts.
        where: those positions.
    """

    directions: Float[Tensor, "*batch d_model answer"]
    weight: Float[Tensor, "batch read"]
    where: slice

    def before(self, norm: LinearNorm) -> "Readout":
        """What is read before a norm (its bias aside) to read this after it; the norm's scales are of `where`."""
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
        """What a head reads, at all positions, of what this reads of its output; the norm is still to come."""
        weight = torch.einsum("br,brs->bs", self.weight, pattern)
        return Readout(W_V @ (W_O @ self.directions), weight, slice(None))

    def before_mlp(
        self,
        gate: Float[Tensor, "batch d_mlp"],
        W_in: Float[Tensor, "d_model d_mlp"],
        W_out: Float[Tensor, "d_mlp d_model"],
    ) -> "Readout":
        """What an MLP with these gates reads, likewise; this being a reading of one position."""
        return Readout(W_in @ (gate[..., None] * (W_out @ self.directions)), self.weight, self.where)

    def stream(self, x: Float[Tensor, "batch read d_model"]) -> Float[Tensor, "batch read answer"]:
        """What is read of a term of the stream, by the position where it is read."""
        return self.weight[..., None] * (x @ self.directions)

    def heads(
        self,
        pattern: Float[Tensor, "batch head read pos"],
        v: Float[Tensor, "batch pos head d_head"],
        W_O: Float[Tensor, "head d_head d_model"],
    ) -> Float[Tensor, "batch head pos answer"]:
        """What is read of the outputs of heads, by the position that they attend to."""
        weight = torch.einsum("br,bhrs->bhs", self.weight, pattern)
        return weight[..., None] * (v.transpose(1, 2) @ (W_O @ self.directions.unsqueeze(-3)))
