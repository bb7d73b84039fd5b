"""Shapley values and interactions from what every coalition is worth."""

from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def all_coalitions(n_players: int) -> Bool[Tensor, "coalition player"]:
    """Every coalition, who is in it; their order is that of a tensor with an axis (absent, present) per player."""
    axes = [torch.tensor([False, True])] * n_players
    return torch.cartesian_prod(*axes).reshape(-1, n_players)


def shapley_values(worth: Float[Tensor, "coalition"]) -> Float[Tensor, "player"]:
    """Each player's Shapley value (Shapley 1953): what it adds to those who came before it, averaged over all orders.

        value_i = Σ_{S without i}  |S|! (n - |S| - 1)! / n!  ·  ( worth(S + i) - worth(S) )

    Args:
        worth: of every coalition, in the order of `all_coalitions`.
    """
    n, sizes = _sizes(worth)
    weights = torch.tensor([1 / (n * comb(n - 1, size)) for size in range(n)], dtype=worth.dtype)
    values = []
    for player in range(n):
        without, joined = _split(worth, player).unbind(1)
        values.append((weights[_split(sizes, player)[:, 0]] * (joined - without)).sum())
    return torch.stack(values)


def shapley_interactions(worth: Float[Tensor, "coalition"]) -> Float[Tensor, "player player"]:
    """The Shapley interaction index of each pair (Grabisch & Roubens 1999): what two add together beyond what each adds
    alone, averaged over all orders in which they come one after the other.

        I_ij = Σ_{S without i, j}  |S|! (n - |S| - 2)! / (n - 1)!  ·  ( worth(S + i + j) - worth(S + i) - worth(S + j)
                                                                        + worth(S) )

    Args:
        worth: of every coalition, in the order of `all_coalitions`.

    Returns:
        A symmetric matrix; NaN on its diagonal, where there is no pair.
    """
    n, sizes = _sizes(worth)
    weights = torch.tensor([1 / ((n - 1) * comb(n - 2, size)) for size in range(n - 1)], dtype=worth.dtype)
    indices = worth.new_full((n, n), torch.nan)
    for first in range(n):
        # Without the first player's axis, the second's is one further to the front.
        without, joined = _split(worth, first).unbind(1)
        gain, others = (joined - without).flatten(), _split(sizes, first)[:, 0].flatten()
        for second in range(first + 1, n):
            alone, beside = _split(gain, second - 1).unbind(1)
            index = (weights[_split(others, second - 1)[:, 0]] * (beside - alone)).sum()
            indices[first, second] = indices[second, first] = index
    return indices


def _sizes(worth: Float[Tensor, "coalition"]) -> tuple[int, Int[Tensor, "coalition"]]:
    n = len(worth).bit_length() - 1
    return n, all_coalitions(n).sum(1)


def _split(values: Tensor, player: int) -> Tensor:
    """[those before it, absent or present, those after it]."""
    return values.reshape(2**player, 2, -1)
