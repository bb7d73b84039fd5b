"""The result of reading the weights' memory as a table: how well it recalls, its rank, its cross-talk; and views."""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from hijack_lens._checks import check_count
from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.circuit import Component
from hijack_lens.memories.context_free import NamedTokens
from hijack_lens.memories.neurons_result import vocab_of

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.MemoryMatrix.1"


def centred(table: Float[Tensor, "key value"]) -> Float[Tensor, "key value"]:
    """Each row relative to its mean: what all columns share decides nothing."""
    return table - table.mean(1, keepdim=True)


@dataclass(frozen=True, repr=False)
class MemoryMatrix(NamedTokens):
    """What the weights say of each token, in logits; beside it the bigrams' log-probabilities.

    Both tables are in float64, on the CPU, each row relative to its mean over the columns. Every cell counts alike,
    those of bigrams too rare to be learned too: `training.fit_strengths` weighs them by how often they occur.

    Attributes:
        values: the memory's table.
        log_pi_b: the language's; `None` without one, when all that compares the two is NaN.
        key_tokens: ids of the rows' tokens.
        value_tokens: of the columns'.
        part: what wrote it: "memory", the `components`; or "weights", all that does not depend on the context.
        components: the MLPs; none for "weights".
    """

    values: Float[Tensor, "key value"]
    log_pi_b: Float[Tensor, "key value"] | None
    key_tokens: tuple[int, ...]
    value_tokens: tuple[int, ...]
    part: str
    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        shape = (len(self.key_tokens), len(self.value_tokens))
        for name in ("values", "log_pi_b"):
            table = getattr(self, name)
            if table is not None and tuple(table.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(table.shape)}")

    def recall(self, k: int = 1) -> float:
        """The fraction of keys of which the likeliest value is among the k that the memory gives the largest logits.

        NaN without a language.
        """
        check_count("k", k, minimum=1)
        if self.log_pi_b is None:
            return torch.nan
        said = self.values.topk(min(k, self.values.shape[1])).indices
        # By its log-probability, so that of equally likely values any will do.
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
        """What is written beside g * log pi_b, in logits; NaN without a language."""
        if self.log_pi_b is None:
            return torch.full_like(self.values, torch.nan)
        return self.values - self.slope * self.log_pi_b

    @property
    def crosstalk_rms(self) -> float:
        """Its root mean square over all cells."""
        return float(self.crosstalk.square().mean().sqrt())

    @property
    def r2(self) -> float:
        """The share of the memory's squares that g * log pi_b accounts for, at most 1; NaN without a language."""
        return 1 - float(self.crosstalk.square().sum() / self.values.square().sum())

    @cached_property
    def singular_values(self) -> Float[Tensor, "rank"]:
        """Of the memory's table, largest first; one is always 0 where it has as many rows as columns."""
        return torch.linalg.svdvals(self.values)

    @property
    def rank(self) -> int:
        """Its rank to float precision (`torch.linalg.matrix_rank`)."""
        return int(torch.linalg.matrix_rank(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares: how many directions matter (Roy & Vetterli 2007)."""
        share = self.singular_values / self.singular_values.sum()
        return float(torch.special.entr(share).sum().exp())

    def to_pandas(self) -> pd.DataFrame:
        """A row per cell: the texts of `key` and `value`, the `logit`, `log_pi_b` and `crosstalk`."""
        texts = [[self.token_text(token) for token in tokens] for tokens in (self.key_tokens, self.value_tokens)]
        index = pd.MultiIndex.from_product(texts, names=["key", "value"])
        nothing = torch.full_like(self.values, torch.nan)
        columns = {
            "logit": self.values,
            "log_pi_b": nothing if self.log_pi_b is None else self.log_pi_b,
            "crosstalk": self.crosstalk,
        }
        return pd.DataFrame({name: x.flatten().numpy() for name, x in columns.items()}, index=index).reset_index()

    def picture(self) -> "Picture":
        """The memory and g * log pi_b as heat maps side by side, and their singular values."""
        from hijack_lens.visual.matrix_maps import matrix_maps

        return matrix_maps(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "vocab": self.vocab,
            "key_tokens": self.key_tokens,
            "value_tokens": self.value_tokens,
            "part": self.part,
            "components": [asdict(component) for component in self.components],
        }
        tables = {name: getattr(self, name) for name in ("values", "log_pi_b")}
        tensors = {name: table.contiguous() for name, table in tables.items() if table is not None}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryMatrix":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            return cls(
                vocab_of(header),
                values=tensors["values"],
                log_pi_b=tensors.get("log_pi_b"),
                key_tokens=tuple(header["key_tokens"]),
                value_tokens=tuple(header["value_tokens"]),
                part=header["part"],
                components=tuple(Component(**component) for component in header["components"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved MemoryMatrix: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.memories.weights_report import matrix_report

        return matrix_report(self).text()

    def _repr_html_(self) -> str:
        from hijack_lens.memories.weights_report import matrix_report

        return matrix_report(self).html()
