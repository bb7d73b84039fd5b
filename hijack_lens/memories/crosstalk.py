"""How well a linear associative memory recalls once its directions are only nearly orthogonal, in closed form.

A memory of the table L keeps, for every key v and value u, L[v, u] in the outer product of u's direction and v's. Asked
for key q, it gives value u the score, with f the activation and unit vectors for tokens,

    S[q, u] = sum_v f(v.q) sum_w L[v, w] (w.u)

whose wanted part is L[q, u] where f(1) = 1. All other inner products are taken to be independent, of mean 0 and mean
square c^2, the `overlap`. With m1 and m2 the first two moments of f there (a linear memory: 0 and c^2),

    mean  of the cross-talk   m1 sum_{v != q} L[v, u]
    its variance              c^2 sum_{w != u} L[q, w]^2  +  (m2 - m1^2) sum_{v != q} L[v, u]^2
                              + c^2 m2 sum_{v != q, w != u} L[v, w]^2

For k one-hot pairs and c^2 = 1/d that is about 2/d + k/d^2. The vector that all other pairs write together has a length
of order sqrt(k/d); each value's direction picks up one part in sqrt(d) of it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from torch import Tensor

_NODES = 48


class Moments(NamedTuple):
    """The first two moments of a neuron's activation by another token's key."""

    mean: float
    square: float


def overlap(n_directions: int, d_model: int) -> float:
    """The mean square of two directions' inner product, c^2.

    n unit vectors that fill d dimensions evenly have Gram matrices with squares that sum to n^2/d, n of it on the
    diagonal (they reach the bound of Welch 1974). Many such vectors in few dimensions: 1/d; with one for each, 0.
    """
    return max(0.0, (n_directions - d_model) / (d_model * (n_directions - 1)))


def thresholded(c2: float) -> Moments:
    """Moments of relu(2x - 1), a neuron that fires where its key is at least half there.

    x = cos(t) is one coordinate of a random unit vector in n = 1/c2 dimensions: t has the density sin(t)^(n - 2).
    """
    if c2 == 0:
        return Moments(0.0, 0.0)
    n = 1 / c2
    nodes, weights = leggauss(_NODES)
    angle = (nodes + 1) * math.pi / 6  # from 0 to where cos is 1/2
    whole = math.exp(math.lgamma((n - 1) / 2) - math.lgamma(n / 2)) * math.sqrt(math.pi)
    density = np.sin(angle) ** (n - 2) * weights * math.pi / 6 / whole
    fires = 2 * np.cos(angle) - 1
    return Moments(float(density @ fires), float(density @ fires**2))


def crosstalk_moments(
    table: Float[Tensor, "key value"], c2: float, neuron: Moments
) -> tuple[Float[Tensor, "key value"], Float[Tensor, "key value"]]:
    """Mean and variance of the cross-talk in every cell.

    Args:
        table: L.
        c2: mean square of inner products.
        neuron: of the keys' activations; `Moments(0, c2)` for a linear memory.
    """
    squares = table.square()
    same_key = squares.sum(1, keepdim=True) - squares
    same_value = squares.sum(0, keepdim=True) - squares
    neither = squares.sum() - same_key - same_value - squares
    mean = neuron.mean * (table.sum(0, keepdim=True) - table)
    variance = c2 * same_key + (neuron.square - neuron.mean**2) * same_value + c2 * neuron.square * neither
    return mean, variance


def expected_recall(table: Float[Tensor, "key value"], c2: float, neuron: Moments) -> float:
    """The fraction of keys whose largest value in L gets the largest score, cross-talk being independent and Gaussian.

    With score means mu and deviations s, and r the right value, per key

        P = integral dx phi(x) prod_{u != r} Phi( (mu_r + s_r x - mu_u) / s_u )

    by Gauss-Hermite quadrature. Cross-talk that two values share harms less, so this errs on the low side: within the
    error of measurement for tables without structure, by up to a tenth for those whose rows are alike or hold one large
    entry each. Of a thresholded memory in few dimensions (d_model = 8 for 64 one-hot pairs), where few neurons fire by
    mistake, so that cross-talk is far from Gaussian, it misses more: 0.5 for a measured 0.8.
    """
    if c2 == 0:
        return 1.0
    mean, variance = crosstalk_moments(table, c2, neuron)
    mean, deviation = table + mean, variance.clamp_min(torch.finfo(table.dtype).tiny).sqrt()
    right = table.argmax(1, keepdim=True)
    nodes, weights = hermegauss(_NODES)
    by_key = table.new_zeros(len(table))
    for x, weight in zip(nodes, weights / weights.sum(), strict=True):
        threshold = mean.gather(1, right) + x * deviation.gather(1, right)
        below = torch.special.log_ndtr((threshold - mean) / deviation)
        by_key += weight * below.scatter(1, right, 0.0).sum(1).exp()
    return float(by_key.mean())
