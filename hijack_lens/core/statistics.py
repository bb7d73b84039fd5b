"""How uncertain a mean of few samples is, and how large it can get by chance."""

import functools
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CONFIDENCE = 0.95


@functools.cache
def student_quantile(dof: int, confidence: float = _CONFIDENCE) -> float:
    """How many standard errors the 95% interval of a mean reaches to either side (Student 1908).

    Other levels of confidence are those of the same distribution's central part.
    """
    # With t = √dof · tan(angle), the density is proportional to cos(angle)^(dof - 1).
    angles = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (dof - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(confidence * mass[-1], mass, angles)))


_DRAWS = 1000
_LEVEL = 0.99


def chance(values: Float[Tensor, "prompt statistic"], generator: torch.Generator) -> float:
    """The level that the largest of several means over prompts exceeds by chance in 1% of cases, if all are truly 0.

    All of a prompt's deviations from the means keep or flip their signs together, at random (a wild bootstrap). So the
    level accounts for the number of statistics and for any correlation between them.
    """
    n_prompts = len(values)
    signs = torch.randint(2, (_DRAWS, n_prompts), generator=generator).to(values) * 2 - 1
    means = signs @ (values - values.mean(0)) / (n_prompts * (n_prompts - 1)) ** 0.5
    return float(means.max(1).values.quantile(_LEVEL))


def most_in_population(found: int, drawn: int, population: int) -> int:
    """The most of a finite population that can be of a kind, if so many of those drawn at random from it are.

    The upper end of an exact one-sided 95% interval, by the hypergeometric distribution: with any more of the kind, so
    few would be found in fewer than 5% of draws.
    """

    def ways(of: int, chosen: int) -> float:
        return math.lgamma(of + 1) - math.lgamma(chosen + 1) - math.lgamma(of - chosen + 1)

    def chance_of_so_few(kind: int) -> float:
        every = ways(population, drawn)
        fits = range(max(0, drawn - (population - kind)), min(found, kind) + 1)
        return sum(math.exp(ways(kind, k) + ways(population - kind, drawn - k) - every) for k in fits)

    low, high = found, population - (drawn - found)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chance_of_so_few(middle) >= 1 - _CONFIDENCE else (low, middle - 1)
    return low
