"""How much a memory holds as d_model falls below what its tokens need: recall, theory beside measurement."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens._checks import check_count
from hijack_lens.language import BigramLanguage
from hijack_lens.memories.capacity_result import MEMORIES, MemoryCapacity
from hijack_lens.memories.crosstalk import Moments, crosstalk_moments, expected_recall, overlap, thresholded
from hijack_lens.memories.matrix import memory_matrix
from hijack_lens.memories.matrix_result import centred
from hijack_lens.models import associative_transformer
from hijack_lens.theory import Strengths

_SURE = 0.9
"""Probability of the right next token, in a language of one fact per token."""

_FRACTIONS = (1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 19 / 20, 1)
"""Of 3 d_vocab, by default: d_model."""


@torch.no_grad()
def memory_capacity(
    language: BigramLanguage | int,
    d_models: Iterable[int] | None = None,
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> MemoryCapacity:
    """Recall of `log pi_b` against d_model, for two memories over the same random directions.

    The directions are those of `associative_transformer`: three per token (embedding, previous token, unembedding),
    orthonormal from d_model = 3 d_vocab on, and as nearly orthogonal as random ones get below. On them are measured

    - a linear memory, W = sum over v, u of log pi_b(u|v) U(u) E(v)^T, each row relative to its mean;
    - the hand-written model's own bigram memory, whose ReLU neurons fire where their key is at least half there and so
      keep most of the cross-talk out: `memory_matrix` of the model.

    Beside them stands what independent Gaussian cross-talk gives (see `memories.crosstalk`), without any fit.

    Args:
        language: the bigrams to hold, every one of positive probability; or a d_vocab, for a language of one fact per
            token: each token's next follows it with probability 0.9, and all others are equally likely.
        d_models: by default a dozen from d_vocab / 8 to 3 d_vocab.
        seeds: of the directions, two at least.

    Raises:
        TypeError, ValueError: for a language with zeros, and sizes or seeds that are none.
    """
    if not isinstance(language, BigramLanguage):
        language = _facts(check_count("language", language, minimum=3))
    table = centred(language.finite_log_pi_b())
    orthonormal = 3 * language.d_vocab
    if d_models is None:
        d_models = [max(2, round(orthonormal * fraction)) for fraction in _FRACTIONS]
    sizes = sorted({check_count("d_models", d_model, minimum=2) for d_model in _listed("d_models", d_models)})
    chosen = [check_count("seeds", seed) for seed in _listed("seeds", seeds)]
    if not sizes or len(set(chosen)) < max(2, len(chosen)):
        raise ValueError(f"d_models must be one at least, and seeds two different ones, got {sizes} and {chosen}")

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
    """Scores of the linear memory, and logits of the hand-written model's."""
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
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"{name} must be several ints, got {given!r:.80}")
    return list(given)
