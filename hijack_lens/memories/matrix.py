"""The weights' memory read as a table: how well it recalls, its rank and its cross-talk; and views of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.attribution.direct import check_additive
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_choice, check_count, check_fields, check_shapes, check_type, shown
from hijack_lens.core.circuit import Component
from hijack_lens.core.files import Saved
from hijack_lens.core.inputs import Components, Tokens, components_of, token_ids
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.core.texts import n_outputs, outputs_are_tokens, texts_of
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.memories.token_tables import NamedTokens, centred, check_logits, context_free
from hijack_lens.models.linear_maps import linear_norm


@dataclass(frozen=True, repr=False)
class MemoryMatrix(NamedTokens, Saved, Drawn):
    """What the weights say after each token, in logits, and the bigrams' log-probabilities.

    Both tables are in float64, on the CPU, each row relative to its mean over the columns. Every cell counts alike,
    even of bigrams too rare to be learned; `training.fit_strengths` weights them by how often they occur.

    Attributes:
        values: the memory's table.
        log_pi_b: the language's table; `None` without a language, and then all that compares the two is NaN.
        key_tokens: ids of the rows' tokens.
        value_tokens: ids of the columns' tokens, which are outputs.
        part: what wrote the table: "memory" (the `components`) or "weights" (all that does not depend on the context).
        components: the MLPs; none for "weights".

    Examples:
        >>> matrix = hl.memory_matrix(model)
        >>> f"{matrix.slope:.3f} of log pi_b, R² {matrix.r2:.3f}, rank {matrix.rank} ({matrix.effective_rank:.1f})"
        '1.000 of log pi_b, R² 1.000, rank 12 (10.6)'
        >>> matrix.crosstalk.shape, matrix.crosstalk_rms < 1e-4
        (torch.Size([18, 18]), True)
        >>> matrix.singular_values[:2]
        tensor([13.7095, 12.6425], dtype=torch.float64)
    """

    values: Float[Tensor, "key value"]
    log_pi_b: Float[Tensor, "key value"] | None
    key_tokens: tuple[int, ...]
    value_tokens: tuple[int, ...]
    part: str
    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        shape = (len(self.key_tokens), len(self.value_tokens))
        check_shapes(self, {"values": shape, "log_pi_b": shape})

    def recall(self, k: int = 1) -> float:
        """The fraction of keys whose likeliest value is among the k that the memory gives the largest logits.

        NaN without a language.
        """
        check_count("k", k, minimum=1)
        if self.log_pi_b is None:
            return torch.nan
        said = self.values.topk(min(k, self.values.shape[1])).indices
        # Compared by log-probability, so that any of several equally likely values will do.
        best = self.log_pi_b.gather(1, said).max(1).values
        return float((best == self.log_pi_b.max(1).values).double().mean())

    @cached_property
    def slope(self) -> float:
        """g, the least-squares slope of the memory's cells over `log_pi_b`; NaN without a language."""
        if self.log_pi_b is None:
            return torch.nan
        return float((self.values * self.log_pi_b).sum() / self.log_pi_b.square().sum())

    @cached_property
    def crosstalk(self) -> Float[Tensor, "key value"]:
        """What is written in addition to g * log pi_b, in logits; NaN without a language."""
        if self.log_pi_b is None:
            return torch.full_like(self.values, torch.nan)
        return self.values - self.slope * self.log_pi_b

    @property
    def crosstalk_rms(self) -> float:
        """The root mean square of the cross-talk over all cells."""
        return float(self.crosstalk.square().mean().sqrt())

    @property
    def r2(self) -> float:
        """The share of the memory's squares that g * log pi_b accounts for, at most 1; NaN without a language."""
        return 1 - float(self.crosstalk.square().sum() / self.values.square().sum())

    @cached_property
    def singular_values(self) -> Float[Tensor, "rank"]:
        """The singular values of the table, largest first; one is always 0 where it has as many rows as columns."""
        return torch.linalg.svdvals(self.values)

    @property
    def rank(self) -> int:
        """The table's rank to float precision (`torch.linalg.matrix_rank`)."""
        return int(torch.linalg.matrix_rank(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares: how many directions matter (Roy & Vetterli 2007)."""
        share = self.singular_values / self.singular_values.sum()
        return float(torch.special.entr(share).sum().exp())

    def to_pandas(self) -> pd.DataFrame:
        """A row per cell: the texts of `key` and `value`, the `logit`, `log_pi_b` and `crosstalk`."""
        keys, values = map(self.token_text, self.key_tokens), map(self.output_text, self.value_tokens)
        log_pi_b = torch.full_like(self.values, torch.nan) if self.log_pi_b is None else self.log_pi_b
        return tidy({"key": keys, "value": values}, logit=self.values, log_pi_b=log_pi_b, crosstalk=self.crosstalk)


_MOST_CELLS = 2**26
"""The most numbers in a table: 512 MiB in float64."""


@analysis
def memory_matrix(
    model: Any,
    components: Components | None = None,
    *,
    part: Literal["memory", "weights"] = "memory",
    language: BigramLanguage | Literal["model"] | None = "model",
    key_tokens: Tokens = None,
    value_tokens: Tokens = None,
) -> MemoryMatrix:
    """What the weights say after each token, whatever the context: the learned table W_F, next to `log pi_b`.

    Row v holds the logits of token v's own run, with attention and positions off, relative to their mean, since a
    constant per row changes no prediction. Of these, "memory" is what the MLPs write straight into the logits (their
    output, bias included, through the final norm with that run's scale, and W_U), the memory W_F of Bietti et al. 2023
    (arXiv 2306.00802, section 4) and the feed-forward layer of Wang & Sato (arXiv 2412.11459); "weights" is all of
    them: embedding, every MLP and biases, which `training.fit_strengths` fits.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        components: the MLPs: a `Component`, its place ("L2MLP") or a role of `model.circuit` ("bigram"); several of
            these, or a mapping to them; a `Circuit`, for its bigram memory; or "all" MLPs. By default the bigram memory
            of `model.circuit`.
        part: "memory" or "weights".
        language: whose bigrams to compare with, all of positive probability; by default the model's own, if it has
            one. With `None` the table stands alone, and all comparisons are NaN.
        key_tokens: tokens of the rows, by id or text; by default the whole vocabulary.
        value_tokens: tokens of the columns, likewise.

    Raises:
        TypeError, ValueError: for MLPs and tokens that the model does not have, a language of another vocabulary or
            with zeros, tables of more than 2^26 cells (choose key_tokens and value_tokens), and models whose logits are
            not sums of what MLPs write.

    Examples:
        >>> matrix = hl.memory_matrix(model)
        >>> matrix.recall()  # of the likeliest next token, over all tokens
        1.0
    """
    check_choice("part", part, ("memory", "weights"))
    if part == "weights" and components is not None:
        raise ValueError(
            f"components must not be given with part='weights', which is all of them; got {shown(components)}"
        )
    mlps = () if part == "weights" else components_of(model, components, kind="mlp")
    check_additive(model)
    rows, columns = (
        token_ids(model, "key_tokens", key_tokens),
        token_ids(model, "value_tokens", value_tokens, output=True),
    )
    if len(rows) * len(columns) > _MOST_CELLS:
        raise ValueError(
            f"key_tokens and value_tokens must be fewer: {len(rows)} by {len(columns)} cells are over {_MOST_CELLS:,}; "
            "give some, such as a prompt's"
        )
    if isinstance(language, str):
        check_choice("language", language, ("model",))
        language = getattr(model, "language", None)
    log_pi_b = None
    if language is not None:
        check_type("language", language, BigramLanguage)
        if language.d_vocab != model.cfg.d_vocab:
            raise ValueError(f"language must have the model's {model.cfg.d_vocab} tokens, got {language.d_vocab}")
        if not outputs_are_tokens(model):
            raise ValueError(f"language must be None for a model whose {n_outputs(model)} outputs are not its tokens")
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
    as_tokens = outputs_are_tokens(model)
    return MemoryMatrix(
        texts_of(model, torch.cat([rows, *([columns] if as_tokens else [])])),
        outputs_are_tokens=as_tokens,
        values=torch.cat(table),
        log_pi_b=log_pi_b,
        key_tokens=tuple(rows.tolist()),
        value_tokens=tuple(columns.tolist()),
        part=part,
        components=mlps,
    )
