"""The data of a training: a seed for each use, the probes' sequences, and those that a model is judged on."""

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack_lens.language import BigramLanguage, SampledSequences
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import TrainConfig

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
    return mixed_seed(config.seed, purpose, index)


def mixed_seed(seed: object, purpose: str, index: int) -> int:
    """A seed of its own for each use of a training's seed."""
    digest = hashlib.sha256(f"hijack-lens {seed} {purpose} {index}".encode()).digest()
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


def in_context(forward: Callable[[Tensor], Tensor], sequences: SampledSequences) -> tuple[float, float]:
    """How often the likeliest token is right where it follows from the context, and the loss there, in nats.

    NaN if it never does.

    Args:
        forward: a model, or what computes the same logits.
        sequences: on the model's device.
    """
    rows = max(1, 2**16 // sequences.tokens.shape[1])
    right, loss = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for tokens, known in zip(sequences.tokens.split(rows), sequences.predictable.split(rows), strict=True):
            logits, answers = forward(tokens)[:, :-1][known[:, :-1]], tokens[:, 1:][known[:, :-1]]
            right.append(logits.argmax(-1) == answers)
            loss.append(F.cross_entropy(logits.double(), answers, reduction="none"))
    return float(torch.cat(right).double().mean()), float(torch.cat(loss).mean())


def _fields(sequences: SampledSequences) -> tuple[Tensor, ...]:
    one = sequences
    return one.tokens, one.predictable, one.triggers, one.continuations, one.jumped


def moved(sequences: SampledSequences, device: torch.device) -> SampledSequences:
    """The sequences on another device."""
    return SampledSequences(*(values.to(device) for values in _fields(sequences)))


def _rows(sequences: SampledSequences, chosen: Tensor) -> SampledSequences:
    return SampledSequences(*(values[chosen] for values in _fields(sequences)))
