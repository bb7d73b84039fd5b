"""How well a linear associative memory recalls once its directions are only nearly orthogonal, in closed form.

A memory stores a table L: for every key v and value u, L[v, u] times the outer product of u's direction and v's. With f
the activation, and tokens as unit vectors, the score that it gives to value u for key q is

    S[q, u] = sum_v f(v.q) sum_w L[v, w] (w.u)

The wanted part is L[q, u], if f(1) = 1. All other inner products are taken to be independent, with mean 0 and mean
square c^2, the `overlap`. With m1 and m2 the first two moments of f of such a product (0 and c^2 for a linear memory),

    mean  of the cross-talk   m1 sum_{v != q} L[v, u]
    its variance              c^2 sum_{w != u} L[q, w]^2  +  (m2 - m1^2) sum_{v != q} L[v, u]^2
                              + c^2 m2 sum_{v != q, w != u} L[v, w]^2

For k one-hot pairs and c^2 = 1/d, the variance is about 2/d + k/d^2. The vector that all other pairs write together has
a length of order sqrt(k/d); each value's direction picks up one part in sqrt(d) of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.checks import check_count, check_fields, check_list, check_shapes
from hijack_lens.core.circuit import Strengths
from hijack_lens.core.files import Saved
from hijack_lens.core.memory import check_memory
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.memories.matrix import memory_matrix
from hijack_lens.memories.token_tables import centred
from hijack_lens.models.associative import associative_transformer

_NODES = 48


class Moments(NamedTuple):
    """The first two moments of a neuron's activation by another token's key."""

    mean: float
    square: float


def overlap(n_directions: int, d_model: int) -> float:
    """The mean square of two directions' inner product, c^2.

    If n unit vectors fill d dimensions evenly, the squares in their Gram matrix sum to n^2/d, with n on the diagonal
    (the bound of Welch 1974). So c^2 is about 1/d for many vectors in few dimensions, and 0 for one per dimension.
    """
    return max(0.0, (n_directions - d_model) / (d_model * (n_directions - 1)))


def thresholded(c2: float) -> Moments:
    """Moments of relu(2x - 1), a neuron that fires if at least half of its key is present.

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
    """Mean and variance of the cross-talk in every cell of a table, for inner products of mean square `c2`."""
    squares = table.square()
    same_key = squares.sum(1, keepdim=True) - squares
    same_value = squares.sum(0, keepdim=True) - squares
    neither = squares.sum() - same_key - same_value - squares
    mean = neuron.mean * (table.sum(0, keepdim=True) - table)
    variance = c2 * same_key + (neuron.square - neuron.mean**2) * same_value + c2 * neuron.square * neither
    return mean, variance


def expected_recall(table: Float[Tensor, "key value"], c2: float, neuron: Moments) -> float:
    """The fraction of keys whose largest value in L gets the largest score, if cross-talk is independent and Gaussian.

    For a key with score means mu, deviations s and the right value r, its probability is

        P = integral dx phi(x) prod_{u != r} Phi( (mu_r + s_r x - mu_u) / s_u )

    by Gauss-Hermite quadrature. Cross-talk that two values share does less harm, so this errs on the low side: by less
    than the measurement error for tables without structure, by up to a tenth for tables whose rows are alike or have
    one large entry each, and by more for a thresholded memory in few dimensions (d_model = 8 for 64 one-hot pairs),
    where few neurons fire by mistake and cross-talk is far from Gaussian: 0.5 where 0.8 is measured.
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


_MEASURED = ("recall", "crosstalk")
_EXPECTED = ("expected_recall", "expected_crosstalk")

MEMORIES = ("linear memory", "hand-written model")


@dataclass(frozen=True, repr=False)
class MemoryCapacity(Saved, Drawn):
    """Recall and cross-talk against d_model, for the two `MEMORIES` in that order; in float64, on the CPU.

    Attributes:
        d_models: the sizes tried, smallest first.
        seeds: seeds of the directions.
        d_vocab: the number of tokens, with three directions each.
        recall: the fraction of keys whose likeliest value gets the largest score.
        crosstalk: root mean square of the scores minus the table, in logits.
        expected_recall: the recall that theory expects.
        expected_crosstalk: the cross-talk that theory expects.

    Examples:
        >>> capacity = hl.memory_capacity(8, [8, 16], seeds=(0, 1))
        >>> capacity.recall.shape, capacity.recall_stderr.shape
        (torch.Size([2, 2, 2]), torch.Size([2, 2]))
        >>> capacity.to_pandas().columns.tolist()
        ['memory', 'd_model', 'recall', 'stderr', 'expected_recall', 'crosstalk', 'expected_crosstalk']
    """

    d_models: tuple[int, ...]
    seeds: tuple[int, ...]
    d_vocab: int
    recall: Float[Tensor, "memory d_model seed"]
    crosstalk: Float[Tensor, "memory d_model seed"]
    expected_recall: Float[Tensor, "memory d_model"]
    expected_crosstalk: Float[Tensor, "memory d_model"]

    def __post_init__(self) -> None:
        check_fields(self)
        shape = (len(MEMORIES), len(self.d_models), len(self.seeds))
        check_shapes(self, dict.fromkeys(_MEASURED, shape) | dict.fromkeys(_EXPECTED, shape[:2]))

    @property
    def recall_stderr(self) -> Float[Tensor, "memory d_model"]:
        """Standard error of the mean over keys and seeds.

        At least that of as many independent draws with the expected recall, so that it is not 0 where all seeds agree.
        """
        draws = self.d_vocab * len(self.seeds)
        binomial = (self.expected_recall * (1 - self.expected_recall) / draws).clamp_min(0).sqrt()
        return torch.maximum(self.recall.std(-1) / len(self.seeds) ** 0.5, binomial)

    def to_pandas(self) -> pd.DataFrame:
        """A row per memory and d_model: the mean `recall` over seeds, its `stderr` and the `expected_recall`; the mean
        `crosstalk` over seeds, and the `expected_crosstalk`."""
        return tidy(
            {"memory": MEMORIES, "d_model": self.d_models},
            recall=self.recall.mean(-1),
            stderr=self.recall_stderr,
            expected_recall=self.expected_recall,
            crosstalk=self.crosstalk.mean(-1),
            expected_crosstalk=self.expected_crosstalk,
        )


_SURE = 0.9
"""Probability of the right next token, in a language of one fact per token."""

_FRACTIONS = (1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 19 / 20, 1)
"""The default values of d_model, as fractions of 3 d_vocab."""


@torch.no_grad()
def memory_capacity(
    language: BigramLanguage | int, d_models: Iterable[int] | None = None, seeds: Iterable[int] = (0, 1, 2, 3, 4)
) -> MemoryCapacity:
    """Recall of `log pi_b` against d_model, for two memories over the same random directions.

    The directions are those of `associative_transformer`: three per token (embedding, previous token, unembedding),
    orthonormal from d_model = 3 d_vocab on; below that, as nearly orthogonal as random ones get. Two memories are
    measured on them:

    - a linear memory, W = sum over v, u of log pi_b(u|v) U(u) E(v)^T, each row relative to its mean;
    - the hand-written model's own bigram memory (its `memory_matrix`), whose ReLU neurons fire only if at least half of
      their key is present, which keeps out most cross-talk.

    The expected values assume independent Gaussian cross-talk (see `memories.capacity`); nothing is fitted.

    Args:
        language: the bigrams to hold, all of positive probability; or a d_vocab, for a language of one fact per
            token: after each token one follows with probability 0.9, and all others are equally likely.
        d_models: sizes to try; by default a dozen from d_vocab / 8 to 3 d_vocab.
        seeds: seeds of the directions, at least two.

    Raises:
        TypeError, ValueError: for a language with zeros, or invalid sizes or seeds.

    Examples:
        >>> capacity = hl.memory_capacity(8, [8, 16], seeds=(0, 1))
        >>> capacity.to_pandas().groupby(["memory", "d_model"])["recall"].mean()
        memory              d_model
        hand-written model  8          1.000
                            16         1.000
        linear memory       8          0.875
                            16         1.000
        Name: recall, dtype: float64
    """
    if not isinstance(language, BigramLanguage):
        check_memory(3 * 8 * check_count("language", language, minimum=3) ** 2, language=language)
        language = _facts(int(language))
    table = centred(language.finite_log_pi_b())
    orthonormal = 3 * language.d_vocab
    if d_models is None:
        d_models = [max(2, round(orthonormal * fraction)) for fraction in _FRACTIONS]
    sizes = sorted({check_count("d_models", d_model, minimum=2) for d_model in _listed("d_models", d_models)})
    chosen = [check_count("seeds", seed) for seed in _listed("seeds", seeds)]
    if not sizes or len(set(chosen)) < max(2, len(chosen)):
        raise ValueError(f"d_models must hold at least one, and seeds two different ones, got {sizes} and {chosen}")

    recall, crosstalk = (torch.zeros(len(MEMORIES), len(sizes), len(chosen), dtype=torch.float64) for _ in range(2))
    with tqdm(total=len(sizes) * len(chosen), disable=None, unit="model", desc="memory_capacity") as bar:
        for i, d_model in enumerate(sizes):
            for j, seed in enumerate(chosen):
                for memory, scores in enumerate(_memories(language, table, d_model, seed)):
                    recall[memory, i, j] = (scores.argmax(1) == table.argmax(1)).double().mean()
                    crosstalk[memory, i, j] = (scores - table).square().mean().sqrt()
                bar.update()

    expected = torch.zeros(2, len(MEMORIES), len(sizes), dtype=torch.float64)
    for i, d_model in enumerate(sizes):
        c2 = overlap(orthonormal, d_model)
        for memory, neuron in enumerate((Moments(0.0, c2), thresholded(c2))):
            mean, variance = crosstalk_moments(table, c2, neuron)
            expected[0, memory, i] = expected_recall(table, c2, neuron)
            expected[1, memory, i] = (mean.square() + variance).mean().sqrt()
    return MemoryCapacity(
        d_models=tuple(sizes),
        seeds=tuple(chosen),
        d_vocab=language.d_vocab,
        recall=recall,
        crosstalk=crosstalk,
        expected_recall=expected[0],
        expected_crosstalk=expected[1],
    )


def _memories(
    language: BigramLanguage, table: Float[Tensor, "key value"], d_model: int, seed: int
) -> tuple[Float[Tensor, "key value"], Float[Tensor, "key value"]]:
    """Scores of the linear memory, and logits of the hand-written model's memory."""
    model = associative_transformer(
        language,
        strengths=Strengths(bigram=1.0),
        d_model=d_model,
        seed=seed,
        n_ctx=1,
        dtype=torch.float64,
        device="cpu",
    )
    embed, unembed = model.W_E, model.W_U
    return centred(embed @ embed.T @ table @ unembed.T @ unembed), memory_matrix(model).values


def _facts(d_vocab: int) -> BigramLanguage:
    tokens = torch.arange(d_vocab)
    pi_b = torch.full((d_vocab, d_vocab), (1 - _SURE) / (d_vocab - 1), dtype=torch.float64)
    pi_b[tokens, (tokens + 1) % d_vocab] = _SURE
    return BigramLanguage(pi_b)


def _listed(name: str, given: Any) -> list[Any]:
    return check_list(name, given, "several ints")
