"""Attention scores by path: a labelled tensor that sums to them, its log-odds, and views of both."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.analysis import without_autocast
from hijack_lens.core.checks import as_int, check_fields, check_list, check_shapes, check_type, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.hooks.edges import Sender

ScoreTerm = Sender | Literal["biases", "offset"]
"""What writes into the residual stream; all biases together; or, for keys only, what a relative position adds."""

_NAMES = {"pos_embed": "positional embed", "offset": "offset key"}


def term_label(term: ScoreTerm, circuit: Circuit) -> str:
    """The name of a term: for a component, its role, if it has one to itself."""
    return circuit.label(term) if isinstance(term, Component) else _NAMES.get(term, term)


class _ByTerms:
    """Values by query term and key term."""

    query_terms: tuple[ScoreTerm, ...]
    key_terms: tuple[ScoreTerm, ...]
    circuit: Circuit

    @property
    def query_labels(self) -> tuple[str, ...]:
        """The query terms' names."""
        return tuple(term_label(term, self.circuit) for term in self.query_terms)

    @property
    def key_labels(self) -> tuple[str, ...]:
        """The key terms' names."""
        return tuple(term_label(term, self.circuit) for term in self.key_terms)


@dataclass(frozen=True, repr=False)
class LogOdds(_ByTerms, Drawn):
    """The log-odds of one key against competitors: log of its attention over their total.

    With one competitor, this is the difference of two scores, and splits over paths exactly. With several, it is

        score[key] - log sum_i exp(score[i])  =  sum_i w_i (score[key] - score[i])  -  H(w)

    where w are the competitors' shares of their total attention, and H is the entropy of w. This is an identity. The
    differences split over paths; the entropy does not. It lies between 0 and the log of the number of competitors, and
    is the cost of having many. Given w, `values` are also the derivative: what the log-odds lose, to first order, if a
    path is weakened.

    Attributes:
        values: the weighted differences of scores, by path; in nats, like `entropy` and `total`.
        entropy: the entropy of the competitors' shares; 0 for a single one.
        total: the log-odds from the run's scores: the sum of `values`, minus `entropy`.
        key: the key's position.
        against: the competitors' positions.
        shares: the competitors' shares of their total attention.
        query_terms: the query's terms, along the first axis.
        key_terms: the keys' terms, along the second.
        circuit: names components by their roles.

    Examples:
        >>> odds = hl.attribute_scores(model, prompt).log_odds()
        >>> odds.query_labels[0], odds.key_labels[2], odds.values.shape
        ('embed', 'previous-token head', torch.Size([5, 5]))
        >>> odds.to_pandas().nlargest(1, "log_odds")
          query_path             key_path  log_odds
        2      embed  previous-token head    0.1522
        >>> odds.completeness_error < 1e-4
        True
    """

    values: Float[Tensor, "query_term key_term"]
    entropy: float
    total: float
    key: int
    against: tuple[int, ...]
    shares: Float[Tensor, "competitor"]
    query_terms: tuple[ScoreTerm, ...]
    key_terms: tuple[ScoreTerm, ...]
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"values": (len(self.query_terms), len(self.key_terms)), "shares": (len(self.against),)})

    @classmethod
    def _between(
        cls,
        values: Float[Tensor, "key query_term key_term"],
        scores: Float[Tensor, "key"],
        keys: tuple[int, ...],
        key: int,
        against: tuple[int, ...],
        labels: tuple[tuple[ScoreTerm, ...], tuple[ScoreTerm, ...], Circuit],
    ) -> "LogOdds":
        """The log-odds of one key against others.

        Args:
            values: every key's score, by path.
            scores: every key's score.
            keys: the keys' positions.
            key: the position of the one key.
            against: the positions of the others.
            labels: query terms, key terms, and the circuit that names them.
        """
        own, others = keys.index(key), [keys.index(other) for other in against]
        shares = scores[others].softmax(0)
        with without_autocast():
            mean = einsum(shares, values[others], "key, key query_term key_term -> query_term key_term")
        return cls(
            values=values[own] - mean,
            entropy=float(-torch.xlogy(shares, shares).sum()),
            total=float(scores[own] - scores[others].logsumexp(0)),
            key=key,
            against=against,
            shares=shares,
            query_terms=labels[0],
            key_terms=labels[1],
            circuit=labels[2],
        )

    @property
    def completeness_error(self) -> float:
        """|sum over paths - entropy - log-odds|; only rounding error."""
        return abs(float(self.values.sum()) - self.entropy - self.total)

    def to_pandas(self) -> pd.DataFrame:
        """A row per path: query_path, key_path, log_odds. The entropy belongs to no path, and is left out."""
        return tidy({"query_path": self.query_labels, "key_path": self.key_labels}, log_odds=self.values)


@dataclass(frozen=True, repr=False)
class ScoreAttribution(_ByTerms, Saved, Drawn):
    """What each pair of paths, into the query and into the key, adds to a head's scores at one query position, exactly.

    A term of a query or key is "embed", "pos_embed", the `Component` that wrote it, "biases" (all biases, by any route,
    except an MLP's own, which are part of its output), or, for keys only, "offset" (the key of a relative position).

    Attributes:
        values: in nats (scores as they enter the softmax); they sum to `scores` over both terms.
        scores: the run's scores.
        attention: the attention that each key gets in the run.
        head: the head.
        query: the position that attends.
        keys: the positions attended to, along the first axis.
        query_terms: the query's terms, along the second.
        key_terms: the keys' terms, along the third.
        texts: the prompt's tokens, with white space visible.
        circuit: names components by their roles.
        sink: where the head looks if it looks for nothing: the first position, if it is among the keys, the model has
            more than two layers and the head gives it more than half of its attention; else `None`. Among several keys
            it is never the `top_key`, nor by default a competitor.

    Examples:
        >>> scores = hl.attribute_scores(model, prompt, "induction")
        >>> scores.axes, scores.values.shape
        (('key', 'query_term', 'key_term'), torch.Size([24, 5, 5]))
        >>> scores.query_labels
        ('embed', 'positional embed', 'previous-token head', 'L0MLP', 'biases')
        >>> scores.key_labels
        ('embed', 'positional embed', 'previous-token head', 'L0MLP', 'biases')
        >>> prompt.text[scores.top_key - 1 : scores.top_key + 1]
        'qe'
        >>> scores.completeness_error < 1e-4
        True
    """

    values: Float[Tensor, "key query_term key_term"]
    scores: Float[Tensor, "key"]
    attention: Float[Tensor, "key"]
    head: Component
    query: int
    keys: tuple[int, ...]
    query_terms: tuple[ScoreTerm, ...]
    key_terms: tuple[ScoreTerm, ...]
    texts: tuple[str, ...]
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)
    sink: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        expected = (len(self.keys), len(self.query_terms), len(self.key_terms))
        check_shapes(self, {"values": expected, "scores": expected[:1], "attention": expected[:1]})
        if not all(0 <= position < len(self.texts) for position in (self.query, *self.keys)):
            raise ValueError(f"texts must be of all positions, got {len(self.texts)} of them")

    @property
    def axes(self) -> tuple[str, str, str]:
        """Names of the axes of `values`."""
        return ("key", "query_term", "key_term")

    @property
    def completeness_error(self) -> float:
        """The largest |sum over paths - score|; only rounding error."""
        return float((self.values.sum((1, 2)) - self.scores).abs().max())

    @property
    def top_key(self) -> int:
        """The position in `keys`, the `sink` apart, that gets the most attention."""
        others = [index for index, key in enumerate(self.keys) if key != self.sink]
        return self.keys[others[int(self.scores[others].argmax())] if others else 0]

    def cell(self, query_term: ScoreTerm, key_term: ScoreTerm | tuple[Component, ...]) -> Float[Tensor, "key"]:
        """What one pair of paths adds to each key's score.

        Args:
            query_term: one of `query_terms`, or a role of a `Circuit` that only one component has.
            key_term: one of `key_terms`, likewise.

        Raises:
            ValueError: for a term that is not among them.
        """
        row = _index("query_term", query_term, self.query_terms)
        return self.values[:, row, _index("key_term", key_term, self.key_terms)]

    def log_odds(self, key: int | None = None, against: int | Iterable[int] | None = None) -> LogOdds:
        """Why the head preferred a key to others: the log of its attention over their total, by path.

        A part of the score that all keys share cancels here, as it does in the softmax.

        Args:
            key: a position in `keys`; by default the `top_key`.
            against: a competitor or several; by default every other key up to the query but the `sink`; if there are
                none, the sink.

        Raises:
            TypeError, ValueError: for positions that are not among `keys`.
        """
        own = self.top_key if key is None else self.position(key)
        if against is None:
            missing = sorted(set(range(self.query + 1)) - set(self.keys))
            if missing:
                raise ValueError(f"against must be given, since this attribution lacks the keys {missing}")
            others = tuple(other for other in self.keys if other != own)
            others = tuple(other for other in others if other != self.sink) or others
        else:
            listed = [against] if as_int(against) is not None else check_list("against", against, "positions")
            others = tuple(self.position(other, "against") for other in listed)
        if not others or own in others or len(set(others)) < len(others):
            raise ValueError(f"against must be one or several different keys other than {own}, got {shown(against)}")
        labels = (self.query_terms, self.key_terms, self.circuit)
        return LogOdds._between(self.values, self.scores, self.keys, own, others, labels)

    def position(self, key: Any, name: str = "key") -> int:
        """The position of a key of this attribution; negative ones count from the end of the prompt."""
        check_type("name", name, str)
        number = as_int(key)
        if number is None:
            raise TypeError(f"{name} must be a position (an int), got {shown(key)}")
        position = number + len(self.texts) if number < 0 else number
        if position not in self.keys:
            raise ValueError(f"{name} must be among this attribution's keys, got {shown(number)}")
        return position

    def to_pandas(self) -> pd.DataFrame:
        """A row per value: key, token, query_path, key_path, score."""
        axes = {"key": self.keys, "query_path": self.query_labels, "key_path": self.key_labels}
        frame = tidy(axes, score=self.values)
        frame.insert(1, "token", [self.texts[key] for key in frame["key"]])
        return frame


def _index(name: str, term: Any, terms: tuple[ScoreTerm, ...]) -> int:
    (term,) = term if isinstance(term, tuple) and len(term) == 1 else (term,)
    if not isinstance(term, (str, Component)) or term not in terms:
        got = f"{term!s:.80}" if isinstance(term, (str, Component)) else shown(term)
        raise ValueError(f"{name} must be one of {', '.join(map(str, terms))}; got {got}")
    return terms.index(term)
