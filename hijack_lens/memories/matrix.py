"""The weights' memory as a table from token to token, beside the bigrams that it should hold."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens._checks import check_choice, check_type
from hijack_lens.attribution.answers import texts_of
from hijack_lens.attribution.direct import check_additive
from hijack_lens.circuit import Component
from hijack_lens.language import BigramLanguage
from hijack_lens.memories.context_free import Tokens, check_logits, chosen_tokens, context_free, memory_mlps
from hijack_lens.memories.matrix_result import MemoryMatrix, centred
from hijack_lens.norm import linear_norm

_MOST_CELLS = 2**26
"""Numbers in a table: 512 MiB in float64."""


@torch.no_grad()
def memory_matrix(
    model: Any,
    components: Component | Sequence[Component] | None = None,
    *,
    part: Literal["memory", "weights"] = "memory",
    language: BigramLanguage | Literal["model"] | None = "model",
    keys: Tokens = None,
    values: Tokens = None,
) -> MemoryMatrix:
    """What the weights say after each token, whatever the context: the learned table W_F beside `log pi_b`.

    Row v holds the logits of token v's own run, with attention and positions off, relative to their mean, since a
    constant per row changes no prediction. Of these, "memory" is what the MLPs write straight into the logits (their
    output, bias included, through the final norm with that run's scale, and W_U), the memory W_F of Bietti et al. 2023
    (arXiv 2306.00802, section 4) and the feed-forward layer of Wang & Sato (arXiv 2412.11459); "weights" is all of
    them: embedding, every MLP and biases, which `training.fit_strengths` fits.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        components: the MLPs; by default the circuit's bigram memory.
        part: "memory" or "weights".
        language: whose bigrams to compare with, every one of positive probability; by default the model's own, if it
            has one. With `None` the table stands alone, and what compares is NaN: not scored.
        keys: tokens of the rows, by id or text; by default the whole vocabulary.
        values: tokens of the columns, likewise.

    Raises:
        TypeError, ValueError: for MLPs and tokens that the model does not have, a language of another vocabulary or
            with zeros, tables of more than 2^26 cells (choose keys and values), and models whose logits are no sum over
            what MLPs write.
    """
    check_choice("part", part, ("memory", "weights"))
    if part == "weights" and components is not None:
        raise ValueError(f"components must not be given with part='weights', which is all of them; got {components!r}")
    mlps = () if part == "weights" else memory_mlps(model, components)
    check_additive(model)
    rows, columns = (chosen_tokens(model, name, given) for name, given in (("keys", keys), ("values", values)))
    if len(rows) * len(columns) > _MOST_CELLS:
        raise ValueError(f"keys and values must be fewer: {len(rows)} by {len(columns)} cells are over {_MOST_CELLS:,}")
    if isinstance(language, str):
        check_choice("language", language, ("model",))
        language = getattr(model, "language", None)
    log_pi_b = None
    if language is not None:
        check_type("language", language, BigramLanguage)
        if language.d_vocab != model.cfg.d_vocab:
            raise ValueError(f"language must have the model's {model.cfg.d_vocab} tokens, got {language.d_vocab}")
        log_pi_b = centred(language.finite_log_pi_b()[rows][:, columns])

    check_logits(model, int(rows[0]))
    stream = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    outputs = [f"blocks.{mlp.layer}.hook_mlp_out" for mlp in mlps]
    to_logits = columns.to(model.W_U.device)
    W_U, b_U = model.W_U[:, to_logits], model.b_U[to_logits]
    table: list[Tensor] = []
    for run in context_free(model, rows, [stream, *outputs], model.cfg.n_layers):
        norm = linear_norm(getattr(model, "ln_final", None), run[stream])
        if part == "weights":
            logits = norm(run[stream]) @ W_U + b_U
        else:
            logits = norm.linear(torch.stack([run[name] for name in outputs]).sum(0)) @ W_U
        table.append(centred(logits.cpu().double()))
    return MemoryMatrix(
        texts_of(model, torch.cat([rows, columns])),
        values=torch.cat(table),
        log_pi_b=log_pi_b,
        key_tokens=tuple(rows.tolist()),
        value_tokens=tuple(columns.tolist()),
        part=part,
        components=mlps,
    )
