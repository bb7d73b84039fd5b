"""A two-layer model to be trained."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_choice, check_count, check_texts, check_type, shown
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.architecture import Architecture
from hijack_lens.models.transformer import BigramTransformer

Init = Literal["normal", "identity", "zeros"]


def trainable_transformer(
    language: BigramLanguage,
    positions: Literal["relative", "absolute", "rotary", "none"] = "relative",
    d_model: int = 128,
    n_heads: int = 1,
    mlp: Literal["relu", "linear"] | None = "relu",
    norm: Literal["LN", "RMS"] | None = None,
    freeze: Sequence[str] = (),
    init: Mapping[str, Init] | None = None,
    seed: Seed = 0,
    *,
    n_layers: int = 2,
    d_head: int | None = None,
    d_mlp: int | None = None,
    n_ctx: int = 1024,
    n_offsets: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> BigramTransformer:
    """A randomly initialised HookedTransformer of the architecture that `associative_transformer` writes by hand.

    Weights are drawn from N(0, 1/fan_in); embedding rows have norm about 1. Biases and offset keys start at 0, as do
    all MLPs but the last block's, which stay 0. With relative positions, layer 0's query bias is drawn
    from N(0, 1). The simplifications of Bietti et al. 2023 (arXiv 2306.00802, section 4) are options:

        trainable_transformer(
            language, "absolute", mlp="linear",
            init={"W_Q": "identity", "W_O": "identity"},     # merged W_OV = W_V
            freeze=("W_E", "W_U", "W_pos", "W_Q", "W_O"),
        )

    Args:
        language: gives the vocabulary.
        positions: "relative" (layer 0 has keys for the last `n_offsets` offsets), "absolute" (learned), "rotary",
            or "none".
        d_model: width of the residual stream.
        n_heads: heads per layer.
        mlp: the last block's MLP.
        norm: before heads, MLP and unembedding.
        freeze: names of parameters that training leaves alone, short ("W_E") or full ("blocks.0.attn.W_Q").
        init: how to initialise parameters by name: "normal", "identity" (ones on the diagonal) or "zeros".
        seed: for the random draws.
        n_layers: other depths, for comparison.
        d_head: by default d_model / n_heads.
        d_mlp: by default 2 * d_model.
        n_ctx: the longest prompt.
        n_offsets: with relative positions, how many offsets have a key.
        dtype: the weights' dtype.
        device: by default TransformerLens's choice.

    Raises:
        TypeError, ValueError: for an invalid argument, or a name that no parameter has.

    Examples:
        >>> small = hl.trainable_transformer(language, "absolute", d_model=16, n_ctx=32, seed=0)
        >>> small("queen").shape
        torch.Size([1, 5, 18])
    """
    d_model = check_count("d_model", d_model, minimum=1)
    n_heads = check_count("n_heads", n_heads, minimum=1)
    check_type("init", {} if init is None else init, Mapping)
    if isinstance(freeze, str):
        raise ValueError(f"freeze must be a list of names, got the text {shown(freeze)}")
    freeze = check_texts("freeze", freeze)
    if d_head is None and d_model % n_heads:
        raise ValueError(f"n_heads must divide d_model={d_model}, got {n_heads}; or give d_head=")
    architecture = Architecture(
        d_model=d_model,
        d_head=d_model // n_heads if d_head is None else d_head,
        d_mlp=2 * d_model if d_mlp is None else d_mlp,
        n_ctx=n_ctx,
        positions=positions,
        n_layers=n_layers,
        n_heads=n_heads,
        mlp=mlp,
        norm=norm,
        n_offsets=n_offsets,
    )
    model = BigramTransformer(architecture, language, dtype=dtype, device=device)
    generator = as_generator(seed)
    chosen: dict[str, Init] = {} if init is None else dict(init)
    for choice in chosen.values():
        check_choice("init", choice, ("normal", "identity", "zeros"))
    known = {name for full, _ in model.named_parameters() for name in (full, full.rsplit(".", 1)[-1])}
    for argument, names in (("init", chosen), ("freeze", freeze)):
        for name in names:
            if not isinstance(name, str) or name not in known:
                short = ", ".join(sorted(one for one in known if "." not in one))
                raise ValueError(f"{argument} names {shown(name)}, which is not a parameter; known are {short}")

    unused_mlps = tuple(f"blocks.{layer}.mlp." for layer in range(n_layers - 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            how = chosen.get(name, chosen.get(leaf))
            frozen = name in freeze or leaf in freeze
            if name == "blocks.0.attn.b_Q" and positions == "relative" and how is None:
                how = "normal"  # a query shared by all tokens, for the offset keys to match
            if name.startswith(unused_mlps) or (leaf == "W_pos" and positions != "absolute"):
                how, frozen = "zeros", True
            if how is None and leaf == "w":
                parameter.fill_(1.0)  # a norm's weight
            else:
                fill(parameter, leaf, how, generator)
            parameter.requires_grad_(not frozen)
    return model


def fill(parameter: Tensor, leaf: str, how: Init | None, generator: torch.Generator) -> None:
    """Initialises a parameter, by its short name where it is not said how."""
    if how is None:
        how = "zeros" if leaf.startswith("b") or leaf == "W_R" else "normal"
    if how == "identity" and parameter.ndim < 2:
        raise ValueError(f"init: {leaf!r} is a vector, and cannot be 'identity'")
    if how == "normal":
        vector = parameter.ndim < 2 or leaf.startswith("b")
        fan_in = {"W_E": parameter.shape[-1], "W_pos": parameter.shape[-1], "W_O": parameter.shape[:-1].numel()}.get(
            leaf, 1 if vector else parameter.shape[-2]
        )
        # Drawn on the CPU in float64, so that a seed gives the same model on every device and in every dtype.
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
        parameter.copy_(drawn)
    else:
        parameter.zero_()
        if how == "identity":
            parameter.diagonal(dim1=-2, dim2=-1).fill_(1.0)
