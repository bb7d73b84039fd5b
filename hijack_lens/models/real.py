"""A transformer that reads real numbers, or token ids, and writes real numbers."""

import copy
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_choice,
    check_count,
    check_device,
    check_dtype,
    check_tensor,
    check_tokens,
    shown,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig
from hijack_lens.models.trainable import fill

Inputs = Float[Tensor, "prompt pos d_in"] | Int[Tensor, "prompt pos"]
"""Vectors of real numbers, or token ids, each of which stands for the vector with a 1 at its place."""


class RealTransformer(HookedTransformer):
    """A HookedTransformer that also reads vectors: `inputs @ W_E` at `hook_embed`, positions at `hook_pos_embed`.

    Weights are drawn from N(0, 1/fan_in), biases are 0. It has no tokenizer. What of this library takes prompts takes
    token ids; `reading` makes ids of vectors. A module put in the place of `front`, which passes vectors on, is what
    they go through before the embedding; call `setup()` after, if it has hook points.

    Args:
        d_in: numbers per position; for token ids, how many tokens there are.
        d_out: numbers that each position writes; for logits, how many tokens there are.
        n_ctx: the longest prompt.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: heads per block; they divide d_model.
        d_mlp: neurons per block, 4 d_model by default; 0 for attention alone.
        norm: before heads, MLPs and unembedding.
        positions: "absolute" (learned), or "none".
        seed: of the weights.
        dtype: theirs.
        device: by default TransformerLens's choice.

    Raises:
        TypeError, ValueError: for an invalid argument.

    Examples:
        >>> import torch
        >>> reader = hl.models.RealTransformer(d_in=3, d_out=1, n_ctx=5, d_model=16)
        >>> vectors = torch.randn(2, 5, 3)
        >>> of_ids, ids = reader.reading(vectors)
        >>> reader(vectors).shape, torch.equal(of_ids(ids), reader(vectors))
        (torch.Size([2, 5, 1]), True)
    """

    @torch.inference_mode(False)  # under which it could never be trained
    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_ctx: int,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        d_mlp: int | None = None,
        norm: Literal["LN", "RMS"] | None = "LN",
        positions: Literal["absolute", "none"] = "absolute",
        seed: Seed = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ):
        sizes = {"d_in": d_in, "d_out": d_out, "n_ctx": n_ctx, "d_model": d_model, "n_layers": n_layers}
        sizes = {name: check_count(name, size, minimum=1) for name, size in {**sizes, "n_heads": n_heads}.items()}
        d_mlp = 4 * sizes["d_model"] if d_mlp is None else check_count("d_mlp", d_mlp)
        if sizes["d_model"] % sizes["n_heads"]:
            raise ValueError(f"n_heads must divide d_model={shown(d_model)}, got {shown(n_heads)}")
        if norm is not None:
            check_choice("norm", norm, ("LN", "RMS"))
        check_choice("positions", positions, ("absolute", "none"))
        check_dtype("dtype", dtype)
        check_device("device", device)
        generator = as_generator(seed)
        d_model, n_layers = sizes["d_model"], sizes["n_layers"]
        weights = d_model * (n_layers * (4 * d_model + 2 * d_mlp) + sizes["d_in"] + sizes["d_out"] + sizes["n_ctx"])
        check_memory(dtype.itemsize * weights + 70_000 * n_layers, **sizes, d_mlp=d_mlp)
        cfg = HookedTransformerConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=sizes["n_heads"],
            d_head=d_model // sizes["n_heads"],
            d_mlp=d_mlp or None,
            attn_only=not d_mlp,
            act_fn="relu",
            normalization_type=norm,
            n_ctx=sizes["n_ctx"],
            d_vocab=sizes["d_in"],
            d_vocab_out=sizes["d_out"],
            init_weights=False,
            dtype=dtype,
            device=None if device is None else str(torch.device(device)),
        )
        with warnings.catch_warnings():
            # TransformerLens 3.9 says so of every model; a user cannot act on it.
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            super().__init__(cfg)
        self.positions = positions
        self.front: torch.nn.Module = torch.nn.Identity()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                leaf = name.rsplit(".", 1)[-1]
                if leaf == "w":  # a norm's weight
                    parameter.fill_(1.0)
                else:
                    fill(parameter, leaf, "zeros" if leaf == "W_pos" and positions == "none" else None, generator)
        self.W_pos.requires_grad_(positions == "absolute")
        for block in self.blocks:
            block.attn.attn_scale = float(block.attn.attn_scale)  # NumPy's own type, which torch.compile stumbles over
        self.eval()  # it has nothing to switch off

    def input_to_embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The first residual stream, of vectors [batch, pos, d_in] or of token ids.

        Raises:
            TypeError, ValueError: for anything else.
        """
        vectors = check_inputs(self, "input", input)
        if not vectors.is_floating_point():
            return super().input_to_embed(input, *args, **kwargs)
        if any(value is not None for value in (*args[2:], kwargs.get("attention_mask"), kwargs.get("past_kv_cache"))):
            raise ValueError("input must be token ids with an attention mask or a key-value cache, got vectors")
        places = torch.zeros(vectors.shape[:2], dtype=torch.long, device=vectors.device)  # only their shape is read
        residual, rest = self.get_residual(self.hook_embed(self.front(vectors) @ self.W_E), 0, tokens=places)
        return residual, None, rest, None

    def reading(self, inputs: Inputs) -> tuple["RealTransformer", Int[Tensor, "prompt pos"]]:
        """The model with these inputs for its vocabulary, and their ids: what all analyses of this library take.

        It shares everything with the model but its embeddings, of which it has one for each position of each prompt, so
        it computes the same, to the bit. For several prompts at once, such as a clean and a corrupted one, give them
        together and take their rows of the ids.

        Args:
            inputs: vectors [prompt, pos, d_in]; token ids come back as they are.

        Raises:
            TypeError, ValueError: for inputs that the model cannot read.
        """
        vectors = check_inputs(self, "inputs", inputs)
        if not vectors.is_floating_point():
            return self, vectors
        ids = torch.arange(vectors.shape[:2].numel(), device=vectors.device).view(vectors.shape[:2])
        model = copy.copy(self)
        model.cfg = copy.copy(self.cfg)
        model.cfg.d_vocab = ids.numel()
        model._modules = dict(self._modules)
        model._parameters, model._buffers = dict(self._parameters), dict(self._buffers)
        model.embed, model.front = type(self.embed)(model.cfg), torch.nn.Identity()
        embedded = (self.front(vectors) @ self.W_E).detach()
        model.embed.W_E = torch.nn.Parameter(embedded.flatten(0, 1), requires_grad=False)
        model.setup()
        model.eval()
        return model, ids


def check_inputs(model: "RealTransformer", name: str, inputs: Any) -> Inputs:
    """Inputs that the model can read, with an axis of prompts, on its device and, vectors, in its dtype.

    Raises:
        TypeError, ValueError: naming the argument, for anything else.
    """
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        ids = check_tokens(name, inputs, model.cfg.d_vocab, model.cfg.n_ctx)
        return (ids if ids.ndim == 2 else ids[None]).to(model.W_E.device)
    vectors = inputs
    check_tensor(name, vectors, "vectors")
    d_in, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    if vectors.ndim != 3 or vectors.shape[2] != d_in or not vectors.numel():
        raise ValueError(f"{name} must be vectors [batch, pos, {d_in}], got shape {tuple(vectors.shape)}")
    if vectors.shape[1] > n_ctx:
        raise ValueError(f"{name} is {vectors.shape[1]} vectors long; the model takes at most n_ctx={n_ctx}")
    return vectors.to(model.W_E)
