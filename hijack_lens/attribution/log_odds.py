"""Why a head preferred one key to others: its log-odds, split over (query path, key path)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.attribution.score_terms import Term, term_label
from hijack_lens.circuit import Circuit

if TYPE_CHECKING:
    from hijack_lens.visual import Picture


@dataclass(frozen=True, repr=False)
class LogOdds:
    """The log-odds of one key against competitors: log of its attention over all of theirs.

    With one competitor this is the difference of two scores, and splits over paths exactly. With several, it is

        score[key] - log sum_i exp(score[i])  =  sum_i w_i (score[key] - score[i])  -  H(w)

    where w are the competitors' shares of the attention that they get together, and H their entropy. This is an
    identity; the differences split over paths, the entropy does not: it is between 0 and the log of how many they are,
    and is what it costs to have many competitors. Given w, `values` are also the derivative: what the log-odds lose, to
    first order, where a path is weakened.

    Attributes:
        values: of the weighted differences of scores, by path; in nats, as `entropy` and `total`.
        entropy: of the competitors' shares; 0 for a single one.
        total: log-odds by the run's scores: the sum of `values`, less `entropy`.
        key: its position.
        against: positions of the competitors.
        shares: of the attention that the competitors get together.
        query_terms: along the first axis.
        key_terms: along the second.
        circuit: names components by their roles.
    """

    values: Float[Tensor, "query_term key_term"]
    entropy: float
    total: float
    key: int
    against: tuple[int, ...]
    shares: Float[Tensor, "competitor"]
    query_terms: tuple[Term, ...]
    key_terms: tuple[Term, ...]
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    @classmethod
    def between(
        cls,
        values: Float[Tensor, "key query_term key_term"],
        scores: Float[Tensor, "key"],
        keys: tuple[int, ...],
        key: int,
        against: tuple[int, ...],
        labels: tuple[tuple[Term, ...], tuple[Term, ...], Circuit],
    ) -> "LogOdds":
        """The log-odds of one of some keys against others of them.

        Args:
            values: of every key's score, by path.
            scores: of every key.
            keys: their positions.
            key: the position of the one.
            against: the positions of the others.
            labels: terms of queries, of keys, and the circuit that names them.
        """
        own, others = keys.index(key), [keys.index(other) for other in against]
        shares = scores[others].softmax(0)
        return cls(
            values=values[own] - torch.einsum("k,kab->ab", shares, values[others]),
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
        """|sum over paths - entropy - log-odds|; rounding alone."""
        return abs(float(self.values.sum()) - self.entropy - self.total)

    def to_pandas(self) -> pd.DataFrame:
        """A row per path: query_path, key_path, log_odds; the entropy, which belongs to none, is not among them."""
        names = [[term_label(term, self.circuit) for term in terms] for terms in (self.query_terms, self.key_terms)]
        index = pd.MultiIndex.from_product(names, names=["query_path", "key_path"])
        return pd.Series(self.values.cpu().double().flatten().numpy(), index=index, name="log_odds").reset_index()

    def picture(self) -> "Picture":
        """A heat map: query paths against key paths."""
        from hijack_lens.visual.score_maps import odds_map

        return odds_map(self)

    def _repr_png_(self) -> bytes:
        return self.picture().png()

    def __repr__(self) -> str:
        several = f" - entropy {self.entropy:.4g}" if len(self.against) > 1 else ""
        return (
            f"LogOdds({self.total:+.4g} = paths {float(self.values.sum()):+.4g}{several}) of key {self.key} against "
            + (f"key {self.against[0]}" if len(self.against) == 1 else f"{len(self.against)} others")
        )
