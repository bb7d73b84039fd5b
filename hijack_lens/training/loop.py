"""Training in many small steps, deterministic and resumable to the bit."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hijack_lens.core.files import locked, make_folder
from hijack_lens.core.memory import check_memory
from hijack_lens.language import BigramLanguage, SampledSequences
from hijack_lens.language.sequences import drawn_per_sequence
from hijack_lens.models.storage import latest_checkpoint
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import TrainConfig
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.recall import behaviour, memory_recall
from hijack_lens.training.run import (
    TrainingRun,
    fingerprint,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)

HeldOut = dict[tuple[str, int], SampledSequences]
"""Sequences for the probes, by continuations (as trained, and the other kind) and length."""

_BLOCK = 16
"""Steps whose sequences are sampled together: the sampler's cost is per time step, hardly per sequence."""


@torch.inference_mode(False)
def train(
    model: BigramTransformer, language: BigramLanguage, config: TrainConfig, out: str | os.PathLike[str] | None = None
) -> TrainingRun:
    """Trains a two-layer model, in place, on sequences of a bigram language with triggers.

    With `out`, checkpoints are written there, each whole or not at all. If a run is killed, the same call again (same
    `out`, model, language and config) resumes it from its last checkpoint; on a CPU, the final weights are the same,
    bit for bit, as without the interruption. Ctrl-C ends the run after the current step, writes a checkpoint and
    returns the run so far.

    Args:
        model: from `trainable_transformer`, on any device; at least one parameter must not be frozen.
        language: the language to train on; it has the model's tokens.
        config: how to train.
        out: folder for checkpoints.

    Raises:
        TypeError, ValueError: for triggers that the language lacks, lengths beyond the model's n_ctx, or an `out` that
            is no folder, that another training is writing to, or that holds a run of another config or model.
    """
    _check(model, language, config)
    held_out = _held_out(model, language, config)
    if out is None:
        return _train(model, language, config, None, held_out)
    folder = make_folder("out", out)
    with locked("out", out, folder / ".lock"):
        return _train(model, language, config, folder, held_out)


def _train(
    model: BigramTransformer, language: BigramLanguage, config: TrainConfig, folder: Path | None, held_out: HeldOut
) -> TrainingRun:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, config)
    step, rows = _resume(model, language, config, optimizer, folder)
    model.strengths = None  # training is about to change them
    if drawn_per_sequence(config.triggers, config.n_triggers):
        model.triggers = None
    else:
        model.triggers = language.fixed_triggers(config.triggers, config.n_triggers).tolist()
    model.n_ctx_train = config.length if model.positions == "absolute" else None

    forward: Any = PlainForward(model)
    if config.compile:
        forward = torch.compile(forward)
    device = model.W_E.device
    sequences: SampledSequences | None = None
    elapsed = rows[-1]["seconds"] if rows else 0.0
    started = time.monotonic() - elapsed

    def so_far() -> TrainingRun:
        return TrainingRun(model, config, step, pd.DataFrame(rows))

    with _interruptible() as interrupted, tqdm(total=config.steps, initial=step, disable=None, unit="step") as bar:
        if step == 0:
            rows += _evaluate(model, config, held_out, step, 0.0)
        while step < config.steps:
            if sequences is None or step % _BLOCK == 0:
                sequences = _sequences(language, config, step // _BLOCK)
            part = slice(step % _BLOCK * config.batch_size, (step % _BLOCK + 1) * config.batch_size)
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            tokens = sequences.tokens[part].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                logits = forward(tokens)[:, :-1]
            answers = tokens[:, 1:]
            if config.loss == "predictable":
                chosen = sequences.predictable[part][:, :-1].to(device)
                logits, answers = logits[chosen], answers[chosen]
            loss = F.cross_entropy(
                logits.flatten(0, -2).float() if config.bf16 else logits.flatten(0, -2), answers.flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

            last = step == config.steps or bool(interrupted)
            if step % config.evaluate_every == 0 or last:
                seconds = time.monotonic() - started
                rows += _evaluate(model, config, held_out, step, seconds)
                accuracy = so_far().probe("in_context_accuracy").iloc[-1]
                speed = step * config.batch_size * config.length / seconds
                bar.set_postfix_str(f"loss {loss.item():.3f}, in context {accuracy:.3f}, {speed:,.0f} tokens/s")
            bar.update()
            if folder is not None and (step % config.checkpoint_every == 0 or last):
                write_checkpoint(folder, so_far(), optimizer, language)
            if interrupted:
                break
    return so_far()


def _check(model: BigramTransformer, language: BigramLanguage, config: TrainConfig) -> None:
    if not isinstance(model, BigramTransformer):
        raise TypeError(f"model must be a BigramTransformer, got {type(model).__name__}")
    if not isinstance(language, BigramLanguage):
        raise TypeError(f"language must be a BigramLanguage, got {type(language).__name__}")
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    if language.tokens != model.language.tokens:
        raise ValueError("language must have the model's tokens")
    if config.length > model.cfg.n_ctx:
        raise ValueError(f"config.length is {config.length}; the model takes at most n_ctx={model.cfg.n_ctx}")
    if model.W_E.device.type == "cpu":  # logits and their gradient; with relative positions, scores and theirs
        rows = 3 * language.d_vocab + (3 * model.cfg.n_heads * config.length if model.positions == "relative" else 0)
        needed = model.W_E.itemsize * config.batch_size * config.length * rows
        check_memory(needed, batch_size=config.batch_size, length=config.length)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameter left to train: all are frozen")


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def _resume(
    model: BigramTransformer,
    language: BigramLanguage,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    folder: Path | None,
) -> tuple[int, list[dict[str, Any]]]:
    """Steps taken and rows written so far; restores the model and the optimizer."""
    checkpoint = None if folder is None else latest_checkpoint(folder)
    if checkpoint is None:
        return 0, []
    stored, state, trained_on = read_checkpoint(checkpoint)
    if asdict(stored.config) != asdict(config):
        differing = [name for name, value in asdict(config).items() if asdict(stored.config)[name] != value]
        raise ValueError(f"out={str(folder)!r} holds a run of another config: they differ in {', '.join(differing)}")
    for what, theirs, ours in (
        ("architecture", stored.model.architecture, model.architecture),
        ("dtype", stored.model.cfg.dtype, model.cfg.dtype),
        (
            "frozen parameters",
            *([n for n, p in m.named_parameters() if not p.requires_grad] for m in (stored.model, model)),
        ),
        ("language", trained_on, fingerprint(language)),
    ):
        if theirs != ours:
            raise ValueError(
                f"out={str(folder)!r} holds a run of another model: its {what} differs{_shown(theirs, ours)}"
            )
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), stored.model.parameters(), strict=True):
            parameter.copy_(value)
    restore_optimizer(optimizer, state, checkpoint)
    return stored.step, [{str(k): v for k, v in row.items()} for row in stored.table.to_dict(orient="records")]


def _shown(theirs: object, ours: object) -> str:
    return f", {theirs} there and {ours} here" if len(f"{theirs}{ours}") < 600 else ""


def _sequences(language: BigramLanguage, config: TrainConfig, block: int) -> SampledSequences:
    """The training sequences of a block of steps; they depend on the seed and the block alone."""
    return language.sample(
        _BLOCK * config.batch_size,
        config.length,
        config.triggers,
        n_triggers=config.n_triggers,
        continuations=config.continuations,
        seed=_seed(config, "train", block),
    )


def _held_out(model: BigramTransformer, language: BigramLanguage, config: TrainConfig) -> HeldOut:
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
            seed=_seed(config, "held out", length),
        )
        for continuations, length in cases
    }


def _evaluate(
    model: BigramTransformer,
    config: TrainConfig,
    held_out: HeldOut,
    step: int,
    seconds: float,
) -> list[dict[str, Any]]:
    base = {"step": step, "seconds": seconds}
    rows = [
        {**base, "probe": probe, "continuations": None, "length": None, "value": value}
        for probe, value in memory_recall(model, config.length, model.triggers).items()
    ]
    for (continuations, length), sequences in held_out.items():
        rows += [
            {**base, "probe": probe, "continuations": continuations, "length": length, "value": value}
            for probe, value in behaviour(model, sequences).items()
        ]
    return rows


def _seed(config: TrainConfig, purpose: str, index: int) -> int:
    """A seed of its own for each use: mixed, so that neighbouring seeds and blocks share nothing."""
    digest = hashlib.sha256(f"hijack-lens {config.seed} {purpose} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Records a Ctrl-C in the list, so that the current step can finish; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        yield received
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
