"""The data of a training: a seed for each use, the probes' sequences, and those that a model is judged on."""

import hashlib

import torch
from torch import Tensor

from hijack_lens.language import BigramLanguage, SampledSequences, best_accuracy
from hijack_lens.language.sequences import drawn_per_sequence
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import TrainConfig
from hijack_lens.training.forward import PlainForward

HeldOut = dict[tuple[str, int], SampledSequences]
"""Sequences for the probes, by continuations (as trained, and the other kind) and length."""

BLOCK = 16
"""Steps whose sequences are sampled together: the sampler's cost is per time step, hardly per sequence."""

ENOUGH = 200
"""Tokens that follow from the context: on fewer, accuracy says too little."""

_MOST = 2**20
"""Tokens that are sampled in search of enough."""


def data_seed(config: TrainConfig, purpose: str, index: int) -> int:
    """A seed of its own for each use: mixed, so that neighbouring seeds and blocks share nothing."""
    digest = hashlib.sha256(f"hijack-lens {config.seed} {purpose} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def held_out(model: BigramTransformer, language: BigramLanguage, config: TrainConfig) -> HeldOut:
    """What the probes see."""
    lengths = [config.length * multiple for multiple in config.eval_lengths]
    cases = [(config.continuations, length) for length in lengths if length <= model.cfg.n_ctx]
    cases.append(("bigram" if config.continuations == "uniform" else "uniform", config.length))
    return {
        (continuations, length): language.sample(
            config.eval_sequences,
            length,
            config.triggers,
            n_triggers=config.n_triggers,
            continuations=continuations,
            seed=data_seed(config, "held out", length),
        )
        for continuations, length in cases
    }


def judged_on(language: BigramLanguage, config: TrainConfig) -> tuple[SampledSequences, int]:
    """Natural sequences with `ENOUGH` tokens that follow from the context, if they are to be had.

    Returns:
        The sequences that hold any such token (at least one sequence), and how many were sampled in all.
    """
    kept: list[SampledSequences] = []
    found = sampled = 0
    while found < ENOUGH and sampled * config.length < _MOST:
        count = max(64, sampled)  # each time twice as many
        some = language.sample(
            count,
            config.length,
            config.triggers,
            n_triggers=config.n_triggers,
            continuations=config.continuations,
            seed=data_seed(config, "judged on", sampled),
        )
        sampled += count
        known = some.predictable[:, :-1].any(1)
        found += int(some.predictable[:, :-1].sum())
        known[0] |= not kept  # so that there is a sequence
        kept.append(_rows(some, known))
    return SampledSequences(*(torch.cat(list(parts)) for parts in zip(*map(_fields, kept), strict=True))), sampled


def best_possible(language: BigramLanguage, sequences: SampledSequences, config: TrainConfig) -> float:
    """The accuracy of the best predictor that is trained as this config says."""
    # Trained only where tokens follow from the context, it need not ask whether they do.
    drawn = drawn_per_sequence(config.triggers, config.n_triggers) and config.loss == "all"
    return best_accuracy(language, sequences, random_triggers=drawn, continuations=config.continuations)


def in_context_accuracy(model: BigramTransformer, sequences: SampledSequences) -> float:
    """How often the model's likeliest token is right, where it follows from the context; NaN if it never does."""
    forward, device = PlainForward(model), model.W_E.device
    rows = max(1, 2**23 // (sequences.tokens.shape[1] * model.cfg.d_vocab))
    right: list[Tensor] = []
    with torch.no_grad():
        for tokens, known in zip(sequences.tokens.split(rows), sequences.predictable.split(rows), strict=True):
            guesses = forward(tokens.to(device)).argmax(-1).cpu()
            right.append((guesses[:, :-1] == tokens[:, 1:])[known[:, :-1]])
    return float(torch.cat(right).double().mean())


def _fields(sequences: SampledSequences) -> tuple[Tensor, ...]:
    one = sequences
    return one.tokens, one.predictable, one.triggers, one.continuations, one.jumped


def _rows(sequences: SampledSequences, chosen: Tensor) -> SampledSequences:
    return SampledSequences(*(values[chosen] for values in _fields(sequences)))
