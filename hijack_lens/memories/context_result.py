"""The result of reading a context as a memory: a table of logits, what it is the sum of, and views of it."""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.circuit import ROLE_NAMES, Circuit, Component
from hijack_lens.memories.context_tables import Tokens, TokenTables

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.ContextMemory.1"
_TENSORS = ("tokens", "attention", "value_logits", "own_logits", "scale")
_OPTIONAL = ("fast_weights", "query_vectors")


@dataclass(frozen=True, repr=False)
class ContextMemory(TokenTables):
    """What an attention head makes of a context, for every token that may ask.

    Attributes:
        attention: that each query token gives to each position of the prompt; the last is its own.
        value_logits: that each position of the context writes where it gets all the attention, before the final norm
            divides them by its scale; in logits.
        own_logits: likewise of the query token itself, whose value no context has written.
        scale: of the final norm, where each query token stands last; 1 without a norm.
        fast_weights: the sum over the context's positions s of (value_s W_O) key_s^T, with keys turned by their
            positions and divided by the scores' scale. With scores in place of their softmax, the head would write
            `fast_weights @ query_vector` of the context into the residual stream. `None` where scores are no products
            of queries and keys: capped, or with a term for the distance (ALiBi), or of unknown making.
        query_vectors: of the query tokens at the position, turned by it; `None` likewise.
        head: whose.
        circuit: names components by their roles.
    """

    attention: Float[Tensor, "query source"]
    value_logits: Float[Tensor, "context answer"]
    own_logits: Float[Tensor, "query answer"]
    scale: Float[Tensor, "query"]
    fast_weights: Float[Tensor, "d_model d_head"] | None
    query_vectors: Float[Tensor, "query d_head"] | None
    head: Component
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        n_sources, n_queries, n_answers = len(self.tokens), len(self.queries), len(self.answers)
        expected = {
            "attention": (n_queries, n_sources),
            "value_logits": (n_sources - 1, n_answers),
            "own_logits": (n_queries, n_answers),
            "scale": (n_queries,),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")

    @cached_property
    def values(self) -> Float[Tensor, "query answer"]:
        """The memory: the logit that the head writes for each answer, the last token being the query; in logits."""
        context, own = self.attention[:, :-1], self.attention[:, -1:]
        return (context @ self.value_logits + own * self.own_logits) / self.scale[:, None]

    def by_source(self, query: int | str) -> Float[Tensor, "source answer"]:
        """One row of `values` by the position that it comes from.

        Args:
            query: a query token, by id or text.
        """
        row = self.row(query)
        written = torch.cat([self.value_logits, self.own_logits[row : row + 1]])
        return self.attention[row, :, None] * written / self.scale[row]

    def to_pandas(self) -> pd.DataFrame:
        """A row per query and answer: their texts, whether the query `occurs` in the context, and the `logit`."""
        index = pd.MultiIndex.from_product([self.query_texts, self.answer_texts], names=["query", "answer"])
        flat = self.values.detach().cpu().double().flatten().numpy()
        frame = pd.Series(flat, index=index, name="logit").reset_index()
        frame.insert(1, "occurs", self.occurs.repeat_interleave(len(self.answers)).numpy())
        return frame

    def picture(self, queries: Tokens = None, answers: Tokens = None) -> "Picture":
        """The memory as a heat map, query tokens against answers.

        Args:
            queries: rows to show, by id or text; by default tokens that the context holds.
            answers: columns, likewise.

        Raises:
            ValueError: for tokens that are not in the table.
        """
        from hijack_lens.visual.memory_maps import context_map

        return context_map(self, queries, answers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "queries": self.queries,
            "answers": self.answers,
            "vocab": self.vocab,
            "head": asdict(self.head),
            "circuit": {role: [asdict(member) for member in getattr(self.circuit, role)] for role in ROLE_NAMES},
        }
        given = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        tensors = {name: x.detach().cpu().contiguous() for name, x in given.items() if x is not None}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContextMemory":
        """Reads what `save` wrote; nothing in it is executed. The evidence for the circuit is not kept.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            roles = {role: tuple(Component(**member) for member in header["circuit"][role]) for role in ROLE_NAMES}
            rest: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            rest |= {name: tensors.get(name) for name in _OPTIONAL}
            return cls(**labels_of(header), head=Component(**header["head"]), circuit=Circuit(**roles), **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved ContextMemory: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.memories.context_report import memory_text

        return memory_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.memories.context_report import memory_html

        return memory_html(self)


def labels_of(header: dict[str, Any]) -> dict[str, Any]:
    """Queries, answers and vocabulary as JSON has kept them."""
    vocab = header["vocab"]  # whose keys JSON has made strings
    return {
        "queries": tuple(header["queries"]),
        "answers": tuple(header["answers"]),
        "vocab": None if vocab is None else {int(token): text for token, text in vocab.items()},
    }
