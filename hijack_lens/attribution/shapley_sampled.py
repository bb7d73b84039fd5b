"""Shapley values and interactions estimated from random orders of the players."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MIN_SAMPLES = 10
"""Means of fewer say too little about their own errors: their intervals would hold the truth too rarely."""


@dataclass(frozen=True)
class Estimates:
    """Means over samples, with their standard errors; NaN where there is no pair, or too few samples of it.

    Attributes:
        values: Shapley values.
        stderr: theirs.
        interactions: Shapley interaction indices of pairs.
        interactions_stderr: theirs.
        pair_samples: how many samples each interaction is the mean of.
        full: worth of all players together.
        empty: worth of none.
        n_runs: how many different coalitions were run.
    """

    values: Float[Tensor, "player"]
    stderr: Float[Tensor, "player"]
    interactions: Float[Tensor, "player player"]
    interactions_stderr: Float[Tensor, "player player"]
    pair_samples: Int[Tensor, "player player"]
    full: float
    empty: float
    n_runs: int


def estimate(
    worth: Callable[[Bool[Tensor, "coalition player"]], Float[Tensor, "coalition"]],
    n_players: int,
    n_samples: int,
    interactions: bool,
    generator: torch.Generator,
) -> Estimates:
    """Estimates from random orders, each together with its reverse, without bias.

    Whoever comes early in an order comes late in its reverse, so that errors of the two cancel in part (antithetic
    sampling: Mitchell, Cooper, Frank & Holmes, JMLR 2022, arXiv 2104.12199). In every order the gains telescope, so the
    values sum to full − empty exactly, as they should. For interactions, each two neighbours in an order are swapped as
    well, which doubles the runs: without, whatever two players add alone would stay in the difference as noise. A pair
    is neighbours in a share 2 / n_players of the orders.

    Args:
        worth: of coalitions; asked once, for each coalition once.
        n_players: how many.
        n_samples: how many orders, each of them run in reverse, too.
        interactions: whether to estimate these.
        generator: of the orders.
    """
    n = n_players
    ranks = torch.rand(n_samples, n, generator=generator, dtype=torch.float64).argsort(-1)
    # Who has come after k players, k = 0 ... n; the complements are who has come in the reverse order after n - k.
    come = ranks[:, None] < torch.arange(n + 1)[:, None]
    # The k-th and the one after it swapped: who has come in between.
    k = torch.arange(n - 1 if interactions else 0)[:, None]
    swapped = (ranks[:, None] < k) | (ranks[:, None] == k + 1)
    forward = torch.cat([come, swapped], 1)
    visited, where = torch.stack([forward, ~forward]).flatten(0, 2).unique(dim=0, return_inverse=True)
    found = worth(visited)[where].reshape(2, n_samples, -1)
    come_worth, swapped_worth = found[..., : n + 1], found[..., n + 1 :]

    ahead, behind = come_worth.diff(dim=-1)
    gains = ((ahead - behind) / 2).gather(1, ranks)
    stderr = gains.std(0) / math.sqrt(n_samples)
    if interactions and n > 1:
        # Both ways round it is the same difference of differences.
        beyond = come_worth[..., 2:] - come_worth[..., 1:-1] - swapped_worth + come_worth[..., :-2]
        mean, spread, counts = _by_pair(beyond.mean(0), ranks.argsort(-1).unfold(1, 2, 1), n)
    else:
        mean = spread = gains.new_full((n, n), torch.nan)
        counts = torch.zeros(n, n, dtype=torch.long)
    return Estimates(
        values=gains.mean(0),
        stderr=stderr,
        interactions=mean,
        interactions_stderr=spread,
        pair_samples=counts,
        full=float(come_worth[0, 0, -1]),
        empty=float(come_worth[0, 0, 0]),
        n_runs=len(visited),
    )


def _by_pair(
    samples: Float[Tensor, "sample neighbours"], pairs: Int[Tensor, "sample neighbours 2"], n: int
) -> tuple[Float[Tensor, "player player"], Float[Tensor, "player player"], Int[Tensor, "player player"]]:
    """Mean, standard error and number of each pair's samples."""
    low, high = pairs.amin(-1), pairs.amax(-1)
    cell, flat = (low * n + high).flatten(), samples.flatten()
    counts = torch.bincount(cell, minlength=n * n)
    mean = flat.new_zeros(n * n).index_add_(0, cell, flat) / counts
    squares = flat.new_zeros(n * n).index_add_(0, cell, (flat - mean[cell]).square())
    stderr = (squares / (counts - 1).clamp(min=1) / counts).sqrt()
    too_few = counts < MIN_SAMPLES
    mean, stderr = mean.masked_fill(too_few, torch.nan), stderr.masked_fill(too_few, torch.nan)
    upper = torch.ones(n, n).triu(1).bool()
    mean, stderr, counts = mean.reshape(n, n), stderr.reshape(n, n), counts.reshape(n, n)
    return torch.where(upper, mean, mean.T), torch.where(upper, stderr, stderr.T), counts + counts.T
