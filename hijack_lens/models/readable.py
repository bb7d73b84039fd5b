"""Weights that may be read in place of running the module that has them."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from hijack_lens.models.linear_maps import rounding

_KNOWN = ("transformer_lens", "transformers", "torch", "hijack_lens")
"""Packages in which a `forward` that computes what the weights say may be defined."""


class UnreadableWeightsError(ValueError):
    """Weights that are not what their module computes."""


def check_readable(model: Any, layer: int, *names: str) -> None:
    """Checks that a block's modules compute what some of their weights say ("attn.W_O", "mlp.W_in").

    Under an adapter that was not merged (peft), when quantised, or with a `forward` of the user's, they do not.

    Raises:
        UnreadableWeightsError: naming the module.
    """
    for name in names:
        part, weight = name.split(".")
        module, at = getattr(model.blocks[layer], part), f"blocks.{layer}.{part}"
        home = str(getattr(inspect.unwrap(module.forward), "__module__", None))
        if "forward" in vars(module) or home.split(".")[0] not in _KNOWN:
            raise UnreadableWeightsError(
                f"model's {at} has a forward of its own ({home}): its {weight} may not be what it computes"
            )
        if isinstance(model, TransformerBridge):
            leaf = weight.removeprefix("W_").lower()
            linear = getattr(getattr(module, leaf, None), "original_component", None)
            if linear is not None and not _computes(linear, _matrix(weight, getattr(module, weight))):
                raise UnreadableWeightsError(
                    f"model's {at}.{leaf}, a {type(linear).__name__}, does not compute what its {weight} says: merge "
                    "adapters into the weights, and load quantised ones in full precision"
                )
        elif getattr(model.cfg, "load_in_4bit", False):
            raise UnreadableWeightsError(
                f"model's {at} is quantised, so its {weight} cannot be read: load it in full precision"
            )


def _matrix(name: str, weight: Tensor) -> Float[Tensor, "input output"]:
    """A weight as one matrix, its heads side by side."""
    if weight.ndim == 2:
        return weight
    return weight.flatten(0, 1) if name == "W_O" else weight.movedim(0, 1).flatten(1)


def _computes(linear: nn.Module, weight: Float[Tensor, "input output"]) -> bool:
    """Whether a linear module multiplies by a matrix, seen on one vector."""
    probe = torch.randn(1, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        actual = linear.forward(probe) - linear.forward(torch.zeros_like(probe))
        size = probe.abs() @ weight.abs() + actual.abs()
        return bool(((actual - probe @ weight).abs() <= rounding(weight.dtype) * size).all())
