"""A two-layer model as tables over its tokens: what four strengths say of all tokens alike, said of each."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    check_choice,
    check_fields,
    check_list,
    check_number,
    check_shapes,
    check_tokens,
    check_type,
)
from hijack_lens.core.circuit import Margin
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn

TERMS = ("content", "own", "remembered_match", "remembered_own", "remembered_copy", "remembered")
"""Tables that theory may leave out: a model written by hand needs none of them, but for absolute positions' content."""

_SCORES = ("content", "match", "own", "remembered_match", "remembered_own")
_WRITES = ("copy", "remembered_copy", "current", "remembered")


class Written(NamedTuple):
    """Logits by memory; they add up to the model's."""

    context: Float[Tensor, "*batch pos d_vocab"]
    weights: Float[Tensor, "*batch pos d_vocab"]
    rest: Float[Tensor, "*batch pos d_vocab"]

    @property
    def total(self) -> Float[Tensor, "*batch pos d_vocab"]:
        """All of them together."""
        return self.context + self.weights + self.rest

    def margin(self, a: int, b: int) -> Margin:
        """`logit[a] - logit[b]` at every position, by memory."""
        return Margin(*(part[..., a] - part[..., b] for part in self))


@dataclass(frozen=True, repr=False)
class Tables(Saved, Drawn):
    """What a two-layer model without norms computes, as tables over tokens; `training.read_tables` reads them off.

    A *row* is what stands at a position: the token there and, with absolute positions, after all tokens, the position.
    A row is *remembered* where the previous-token head attends to it. Each table is the product of the weights on one
    way through the model, so that all of them together give the model's own attention and logits (the biases are in
    the tokens' rows). `without` leaves some out. All in float64.

    Attributes:
        offset: [row, offset], b1 by query: the previous-token head's scores for how far back a position is; 0 beyond.
        content: [row, row], its scores from the query's row to the key's.
        match: [row, row], b2 in full: the induction head's scores from the query's row to what the key remembers.
        own: [row, row], its scores from the query's row to the key's own.
        remembered_match: [row, row], its scores from what the query remembers to what the key remembers.
        remembered_own: [row, row], its scores from what the query remembers to the key's own row.
        copy: [row, d_vocab + neuron], what it writes when it attends to a row: logits, and into the MLP's neurons.
        remembered_copy: the same for what is remembered there.
        current: the same for the query's own row, by the residual stream: with the MLP, the bigram memory.
        remembered: the same for what the query remembers.
        neurons: [neuron, d_vocab], the logits that the MLP's neurons write.
        activation: the MLP's, "relu" or "linear".
        bigram: g, the slope of the bigram memory's logits in log pi_b.

    Raises:
        TypeError, ValueError: for tables whose shapes do not go together.

    Examples:
        >>> tables = hl.training.read_tables(model)
        >>> tables.d_vocab, tables.n_positions
        (18, None)
        >>> print(hl.theory.margin(prompt, language, tables))
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> tables.without("own", "remembered").match.shape
        torch.Size([18, 18])
    """

    offset: Float[Tensor, "row offset"]
    content: Float[Tensor, "row row"]
    match: Float[Tensor, "row row"]
    own: Float[Tensor, "row row"]
    remembered_match: Float[Tensor, "row row"]
    remembered_own: Float[Tensor, "row row"]
    copy: Float[Tensor, "row out"]
    remembered_copy: Float[Tensor, "row out"]
    current: Float[Tensor, "row out"]
    remembered: Float[Tensor, "row out"]
    neurons: Float[Tensor, "neuron d_vocab"]
    activation: Literal["relu", "linear"] = "relu"
    bigram: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("bigram", self.bigram, positive=True)
        rows, out = len(self.offset), sum(self.neurons.shape)
        if rows < self.d_vocab:
            raise ValueError(f"offset must have a row for each of {self.d_vocab} tokens, got {rows}")
        check_shapes(self, dict.fromkeys(_SCORES, (rows, rows)) | dict.fromkeys(_WRITES, (rows, out)))

    @property
    def d_vocab(self) -> int:
        """The number of tokens."""
        return self.neurons.shape[1]

    @property
    def n_positions(self) -> int | None:
        """The number of absolute positions; `None` where positions are relative, or there are none."""
        return len(self.offset) - self.d_vocab or None

    def without(self, *terms: str) -> "Tables":
        """The same theory without some of its terms (`theory.tables.TERMS`): their tables are 0.

        Raises:
            ValueError: for other names.
        """
        for term in check_list("terms", terms, "names of tables"):
            check_choice("terms", term, TERMS)
        left_out: dict[str, Any] = {term: torch.zeros_like(getattr(self, term)) for term in terms}
        return replace(self, **left_out)

    def attention(
        self, tokens: Int[Tensor, "*batch pos"], last: bool = False
    ) -> tuple[Float[Tensor, "*batch pos pos"], Float[Tensor, "*batch query pos"]]:
        """The patterns of the previous-token and the induction head; of the latter's last query alone, if asked.

        Raises:
            TypeError, ValueError: for what are no tokens of the vocabulary, and for more than there are positions.
        """
        previous, _, _, induction = self._seen(tokens, last)
        return previous, induction

    def written(self, tokens: Int[Tensor, "*batch pos"], last: bool = False) -> Written:
        """Logits by memory, at every position or at the last alone.

        The MLP reads what is there so far: the weights are what it makes of the current token; the rest, what it makes
        of that and of what the query remembers, less the weights; the context, what the induction head adds to both.
        """
        _, rows, remembered, induction = self._seen(tokens, last)
        asked, asked_remembered = _last(rows, last), _last(remembered, last)
        current = asked @ self.current
        passed = current + asked_remembered @ self.remembered
        copied = passed + (induction @ rows) @ self.copy + (induction @ remembered) @ self.remembered_copy
        weights, both, all_three = map(self._logits, (current, passed, copied))
        return Written(all_three - both, weights, both - weights)

    def _seen(self, tokens: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first pattern, the rows at each position (one-hot), what it remembers, and the second pattern."""
        tokens = check_tokens("tokens", tokens, self.d_vocab)
        check_type("last", last, bool)
        device, length, n_positions = self.offset.device, tokens.shape[-1], self.n_positions
        rows = F.one_hot(tokens.to(device), len(self.offset)).to(self.offset)
        if n_positions is not None:
            if length > n_positions:
                raise ValueError(f"prompt's tokens are {length}; the tables have {n_positions} positions")
            places = torch.arange(length)
            rows[..., places, self.d_vocab + places] = 1.0
        back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        future = back < 0
        n_offsets = self.offset.shape[1]
        by_offset = F.pad(rows @ self.offset, (0, 1))
        place = back.clamp(0, n_offsets).expand(*rows.shape[:-2], length, length)
        scores = rows @ self.content @ rows.mT + by_offset.gather(-1, place)
        previous = scores.masked_fill(future, -torch.inf).softmax(-1)
        remembered = previous @ rows
        asked, asked_remembered = _last(rows, last), _last(remembered, last)
        scores = (asked @ self.own + asked_remembered @ self.remembered_own) @ rows.mT
        scores = scores + (asked @ self.match + asked_remembered @ self.remembered_match) @ remembered.mT
        induction = scores.masked_fill(_last(future, last), -torch.inf).softmax(-1)
        return previous, rows, remembered, induction

    def _logits(self, out: Float[Tensor, "*batch pos out"]) -> Float[Tensor, "*batch pos d_vocab"]:
        direct, neurons = out[..., : self.d_vocab], out[..., self.d_vocab :]
        return direct + (neurons.relu() if self.activation == "relu" else neurons) @ self.neurons

    def to_pandas(self) -> pd.DataFrame:
        """A row per table: its name, rows and columns, the root mean square of its numbers, and the largest."""
        names = ("offset", *_SCORES, *_WRITES, "neurons")
        rows = [
            (name, *table.shape, float(table.square().mean().sqrt()), float(table.abs().max()))
            for name in names
            if (table := getattr(self, name)).numel()
        ]
        return pd.DataFrame(rows, columns=["table", "rows", "columns", "rms", "largest"])

    def __repr__(self) -> str:
        shape = {"d_vocab": self.d_vocab, "n_positions": self.n_positions, "n_neurons": len(self.neurons)}
        left_out = [term for term in TERMS if not bool(getattr(self, term).any())]
        aside = f", without {', '.join(left_out)}" if left_out else ""
        return f"Tables({', '.join(f'{name}={value}' for name, value in shape.items())}{aside})"


def _last(table: Tensor, last: bool) -> Tensor:
    return table[..., -1:, :] if last else table
