"""Tables of logits by query token and answer: what a model would say if a prompt's last token were another."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijack_lens._checks import as_int, check_position
from hijack_lens._inputs import model_tokens
from hijack_lens.attribution.answers import answer_ids, texts_of
from hijack_lens.hooks.intervention import check_model
from hijack_lens.language import visible

Tokens = Iterable[int | str] | Int[Tensor, "token"] | None
"""Tokens that a user names, by id or text; `None` for a default."""

_MOST_CELLS = 2**27
"""Numbers in a table: 1 GiB in float64."""


@dataclass(frozen=True, repr=False)
class TokenTables:
    """What the rows and columns of such tables stand for.

    Attributes:
        tokens: of the prompt, up to the position whose token is replaced; that one is the last.
        queries: ids of what it is replaced by, row by row.
        answers: ids of the tokens whose logits these are, column by column.
        vocab: texts of all these tokens by their ids; `None` where the model has no tokenizer.
    """

    tokens: Int[Tensor, "source"]
    queries: tuple[int, ...]
    answers: tuple[int, ...]
    vocab: Mapping[int, str] | None

    @property
    def position(self) -> int:
        """The position whose token is replaced."""
        return len(self.tokens) - 1

    @property
    def query_texts(self) -> tuple[str, ...]:
        """Of the rows."""
        return tuple(map(self.token_text, self.queries))

    @property
    def answer_texts(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(map(self.token_text, self.answers))

    @property
    def source_texts(self) -> tuple[str, ...]:
        """Of the prompt."""
        return tuple(map(self.token_text, self.tokens.tolist()))

    @cached_property
    def occurs(self) -> Bool[Tensor, "query"]:
        """Which query tokens the context, before the position, holds at all."""
        return torch.isin(torch.tensor(self.queries), self.tokens[:-1].cpu())

    def token_text(self, token: int) -> str:
        """A token's text with white space visible; its id where there is no tokenizer."""
        return str(token) if self.vocab is None else visible(self.vocab[token])

    def row(self, query: int | str) -> int:
        """Which row a query token has.

        Raises:
            ValueError: for a token, by id or text, that has none.
        """
        return self._find("query", query, self.queries)

    def chosen(self, queries: Tokens, answers: Tokens, most: int) -> tuple[list[int], list[int]]:
        """Rows and columns to show: those asked for, else those that the context holds, the most frequent first.

        Args:
            queries: by id or text.
            answers: likewise.
            most: how many of either to take where they were not asked for; of all, where the context holds none.
        """
        chosen = []
        for name, asked, ids in (("queries", queries, self.queries), ("answers", answers, self.answers)):
            rows = self._held(ids, most) if asked is None else [self._find(name, token, ids) for token in asked]
            if not rows:
                raise ValueError(f"{name} must be at least one token, got none")
            chosen.append(rows)
        return chosen[0], chosen[1]

    def _held(self, ids: Sequence[int], most: int) -> list[int]:
        """Which of some tokens the context holds, the most frequent in it; all of them where it holds none."""
        count = Counter(self.tokens[:-1].tolist())
        held = [index for index, token in enumerate(ids) if token in count] or list(range(len(ids)))
        return sorted(sorted(held, key=lambda index: -count[ids[index]])[:most])

    def _find(self, name: str, token: Any, ids: Sequence[int]) -> int:
        if isinstance(token, str):
            known, wanted = [self.token_text(i) for i in ids], visible(token)
            place = known.index(wanted) if self.vocab is not None and wanted in known else None
        else:
            number = as_int(token)
            place = ids.index(number) if number is not None and number in ids else None
        if place is None:
            raise ValueError(f"{name} must be among this table's tokens, got {token!r}")
        return place


def token_tables(model: Any, tokens: object, position: int, queries: object, answers: object) -> TokenTables:
    """Rows and columns for one prompt, as a user gives them.

    Raises:
        TypeError, ValueError: for prompts, positions and tokens that the model does not have, and for too many.
    """
    check_model(model)
    ids = model_tokens(model, tokens)
    if len(ids) != 1:
        raise ValueError(f"tokens must be one prompt, got a batch of {len(ids)}: take them one by one")
    length = ids.shape[1]
    at = check_position("position", position, length, length - 1)
    rows, columns = (_ids(model, name, given) for name, given in (("queries", queries), ("answers", answers)))
    n_cells = len(rows) * (len(columns) + at + 1)
    if n_cells > _MOST_CELLS:
        raise ValueError(
            f"queries and answers must be fewer: {len(rows)} by {len(columns)} tokens take {n_cells:,} numbers, over "
            f"{_MOST_CELLS:,}"
        )
    vocab = texts_of(model, torch.cat([ids.flatten().cpu(), torch.tensor(rows + columns)]))
    return TokenTables(ids[0, : at + 1], tuple(rows), tuple(columns), vocab)


def replaced(tokens: Int[Tensor, "source"], queries: Sequence[int]) -> Int[Tensor, "query source"]:
    """The prompt with each query token in its last token's place."""
    prompts = tokens.repeat(len(queries), 1)
    prompts[:, -1] = torch.tensor(queries).to(prompts)
    return prompts


def _ids(model: Any, name: str, given: Any) -> list[int]:
    if given is None:
        return list(range(model.cfg.d_vocab))
    return answer_ids(model, given, name, at_least=1).tolist()
