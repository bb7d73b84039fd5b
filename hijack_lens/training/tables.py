"""From learned weights to the theory, token by token: every way through a two-layer model, as a table."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens import theory
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_type
from hijack_lens.core.memory import check_memory
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.fit import bigram_slope
from hijack_lens.training.recall import check_weights_alone


@analysis
def read_tables(model: BigramTransformer) -> theory.Tables:
    """Reads `theory.Tables` off a model's weights, without looking at a prompt.

    Each table is a product of weights along one way through the model: from what stands at a position, or from what
    the previous-token head remembers of it, to the induction head's scores, to the logits and to the MLP's neurons.
    All tables together are the model: `theory` at these gives its attention and logits, to the rounding of its dtype.

    Args:
        model: one of two layers with a head each, without norms, whose positions are relative, absolute or none.

    Raises:
        TypeError, ValueError: for other models; a norm's scale depends on the prompt, and so do rotary scores.

    Examples:
        >>> tables = hl.training.read_tables(model)
        >>> logits = hl.theory.logits(prompt, language, tables)
        >>> bool((logits - model(prompt.tokens)[0]).abs().max() < 1e-4)
        True
    """
    check_type("model", model, BigramTransformer)
    check_weights_alone(model)
    shape, d_vocab, blocks = model.architecture, model.cfg.d_vocab, list[Any](model.blocks)
    if (shape.n_layers, shape.n_heads) != (2, 1):
        raise ValueError(f"model must have two layers of one head, got {shape.n_layers} of {shape.n_heads}")
    if shape.norm is not None or shape.positions == "rotary":
        given = f"norm={shape.norm!r}" if shape.norm is not None else f"positions={shape.positions!r}"
        raise ValueError(f"model must be a sum of tables over tokens, which it is not with {given}")
    if shape.mlp is not None and any(bool(value.any()) for value in (blocks[0].mlp.W_out, blocks[0].mlp.b_out)):
        raise ValueError("model must have an MLP in its last block alone, got one that writes in block 0 as well")
    n_rows = d_vocab + (model.cfg.n_ctx if shape.positions == "absolute" else 0)
    check_memory(8 * n_rows * (5 * n_rows + 4 * (d_vocab + shape.d_mlp)), d_vocab=d_vocab, n_ctx=model.cfg.n_ctx)
    weight = {name: value.detach().double().cpu() for name, value in model.named_parameters()}

    def mapped(rows: Float[Tensor, "row d_in"], layer: int, which: str) -> Float[Tensor, "row d_out"]:
        """The rows through a head's map."""
        return rows @ weight[f"blocks.{layer}.attn.W_{which}"][0]

    def with_bias(rows: Float[Tensor, "row d"], bias: Float[Tensor, "d"]) -> Float[Tensor, "row d"]:
        """With the bias in the tokens' rows, of which there is one at each position."""
        return torch.cat([rows[:d_vocab] + bias, rows[d_vocab:]])

    def head(layer: int, rows: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """A head's queries of the rows (scaled), keys of them, and what it writes when it attends to them."""
        b_Q, b_V = (weight[f"blocks.{layer}.attn.b_{which}"][0] for which in "QV")
        query = with_bias(mapped(rows, layer, "Q"), b_Q) / blocks[layer].attn.attn_scale
        # A key's bias adds the same to all scores of a query, which the softmax does not see.
        return query, mapped(rows, layer, "K"), mapped(with_bias(mapped(rows, layer, "V"), b_V), layer, "O")

    tokens = weight["embed.W_E"]
    rows = torch.cat([tokens, weight["pos_embed.W_pos"]]) if shape.positions == "absolute" else tokens
    query, key, remembered = head(0, rows)
    offset = query @ weight["blocks.0.attn.W_R"][0].T if shape.positions == "relative" else query[:, :0]
    content = query @ key.T

    rows = with_bias(rows, weight["blocks.0.attn.b_O"])
    query, key, value = head(1, rows)
    scale = blocks[1].attn.attn_scale
    query_remembered, key_remembered = mapped(remembered, 1, "Q") / scale, mapped(remembered, 1, "K")
    value_remembered = mapped(mapped(remembered, 1, "V"), 1, "O")

    W_U, W_in, neurons = weight["unembed.W_U"], rows.new_zeros(shape.d_model, 0), rows.new_zeros(0, d_vocab)
    written = [with_bias(rows, weight["blocks.1.attn.b_O"]), remembered, value, value_remembered]
    biases = weight["unembed.b_U"]
    if shape.mlp is not None:
        W_in, neurons = weight["blocks.1.mlp.W_in"], weight["blocks.1.mlp.W_out"] @ W_U
        biases = torch.cat([biases + weight["blocks.1.mlp.b_out"] @ W_U, weight["blocks.1.mlp.b_in"]])
    current, remembered, value, value_remembered = (x @ torch.cat([W_U, W_in], 1) for x in written)
    return theory.Tables(
        offset=offset,
        content=content,
        match=query @ key_remembered.T,
        own=query @ key.T,
        remembered_match=query_remembered @ key_remembered.T,
        remembered_own=query_remembered @ key.T,
        copy=value,
        remembered_copy=value_remembered,
        current=with_bias(current, biases),
        remembered=remembered,
        neurons=neurons,
        activation="linear" if shape.mlp == "linear" else "relu",
        bigram=bigram_slope(model),
    )
