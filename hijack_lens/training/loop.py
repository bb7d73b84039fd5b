"""Training on a bigram language in many small steps, deterministic and resumable to the bit."""

import os
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from hijack_lens.core.analysis import without_autocast
from hijack_lens.core.files import locked, make_folder
from hijack_lens.core.memory import check_memory
from hijack_lens.language import BigramLanguage, SampledSequences
from hijack_lens.models.formed import Formed
from hijack_lens.models.storage import latest_checkpoint
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import UNTIL_FORMED, TrainConfig
from hijack_lens.training.data import BLOCK, HeldOut, held_out
from hijack_lens.training.forming import last_step, phase_at
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.recall import behaviour, memory_recall
from hijack_lens.training.run import (
    COLUMNS,
    TrainingRun,
    fingerprint,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from hijack_lens.training.steps import run_course
from hijack_lens.training.verdict import Judge


@torch.inference_mode(False)
@without_autocast()
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

    Examples:
        >>> small = hl.trainable_transformer(language, d_model=16, n_ctx=64, seed=0)
        >>> config = hl.TrainConfig(seed=0, triggers="frequent", n_triggers=2, length=16, steps=4)
        >>> run = hl.train(small, language, config)
        >>> run.step, run.finished
        (4, True)
    """
    _check(model, language, config)
    probed = held_out(model, language, config)
    if out is None:
        return _train(model, language, config, None, probed)
    folder = make_folder("out", out)
    with locked("out", out, folder / ".lock"):
        return _train(model, language, config, folder, probed)


def _train(
    model: BigramTransformer, language: BigramLanguage, config: TrainConfig, folder: Path | None, probed: HeldOut
) -> TrainingRun:
    course = _BigramCourse(model, language, config, folder, probed)
    elapsed = course.rows[-1]["seconds"] if course.rows else 0.0
    return course.so_far(run_course(course, course.resumed_at, elapsed))


class _BigramCourse:
    """A training on sequences of a bigram language: counted steps, or forming and finishing."""

    def __init__(
        self,
        model: BigramTransformer,
        language: BigramLanguage,
        config: TrainConfig,
        folder: Path | None,
        probed: HeldOut,
    ):
        self.model, self.language, self.config, self.folder, self.probed = model, language, config, folder, probed
        self.checkpoint_every = config.checkpoint_every
        self.optimizer = _optimizer(model, config)
        model.formed = None
        self.resumed_at, self.rows, self.forming_steps = _resume(model, language, config, self.optimizer, folder)
        model.strengths = None  # training is about to change them
        if config.random_triggers:
            model.triggers = None
        else:
            model.triggers = language.fixed_triggers(config.triggers, config.n_triggers).tolist()
        model.n_ctx_train = config.length if model.positions == "absolute" else None

        self.forward: Any = PlainForward(model)
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.sequences: SampledSequences | None = None
        self.weights: Tensor | None = None
        self.phase = phase_at(config, language, model.positions, self.forming_steps)
        self.judge = Judge(model, language, config)
        self.loss: Tensor | None = None
        self.enough = False  # for forming to end

    @property
    def evaluate_every(self) -> int:
        # A look takes as long as several steps, and while finishing nothing hangs on it.
        return self.config.evaluate_every * (5 if self.phase.name == "finishing" else 1)

    @property
    def end(self) -> int:
        return last_step(self.config, self.language.d_vocab, self.forming_steps)

    def take(self, step: int) -> int:
        config, phase, device = self.config, self.phase, self.model.W_E.device
        block, index = divmod(step - phase.start, BLOCK)
        if self.sequences is None or index == 0:
            self.sequences = phase.sequences(self.language, block)
            self.weights = phase.weights(self.sequences)
        part = slice(index * phase.batch_size, (index + 1) * phase.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.lr_at(step) * (1.0 if group["attends"] else phase.token_lr)
        tokens = self.sequences.tokens[part].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            logits = self.forward(tokens)[:, :-1]
        logits, answers = logits.flatten(0, 1).float() if config.bf16 else logits.flatten(0, 1), tokens[:, 1:].flatten()
        if self.weights is None:
            self.loss = F.cross_entropy(logits, answers)
        else:
            weights = self.weights[part].to(logits).flatten()
            counted = weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)  # there may be nothing to learn
            self.loss = F.cross_entropy(logits, answers, reduction="none") @ weights / counted
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        self.enough = False
        return tokens.numel()

    def look(self, step: int, seconds: float) -> str:
        self.rows, formed = _evaluate(self.model, self.config, self.probed, self.judge, self.rows, step, seconds)
        self.model.formed = formed
        self.enough = formed.accuracy >= self.judge.enough
        return formed.short if self.loss is None else f"loss {self.loss.item():.3f}, {formed.short}"

    def turn(self, step: int) -> None:
        if self.phase.forming and (step == self.phase.end or self.enough):
            self.forming_steps, self.sequences = step, None
            self.phase = phase_at(self.config, self.language, self.model.positions, self.forming_steps)

    def save(self, step: int) -> None:
        if self.folder is not None:
            write_checkpoint(self.folder, self.so_far(step), self.optimizer, self.language)

    def so_far(self, step: int) -> TrainingRun:
        """The run after so many steps."""
        return TrainingRun(self.model, self.config, step, pd.DataFrame(self.rows, columns=COLUMNS), self.forming_steps)


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
        if config.steps == UNTIL_FORMED:
            tokens = max(config.tokens_per_step, config.length)
            asked = {"tokens_per_step": config.tokens_per_step, "length": config.length}
        else:
            tokens = config.batch_size * config.length
            asked = {"batch_size": config.batch_size, "length": config.length}
        check_memory(model.W_E.itemsize * tokens * rows, **asked)
        longest = max(n * config.length for n in config.eval_lengths if n * config.length <= model.cfg.n_ctx)
        cells = config.eval_sequences * longest * 2 * (language.d_vocab + model.cfg.n_heads * longest)
        check_memory(model.W_E.itemsize * cells, eval_sequences=config.eval_sequences, length=longest)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameter left to train: all are frozen")


def _optimizer(model: BigramTransformer, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer of what is not frozen, in the model's order, in groups that say whether they make attention."""
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [
        {"params": [parameter for _, parameter in group], "attends": attends}
        for attends, group in groupby(learned, lambda one: ".attn." in one[0] or one[0].endswith("W_pos"))
    ]
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
) -> tuple[int, list[dict[str, Any]], int | None]:
    """Steps taken, rows written and steps that forming took; restores the model and the optimizer."""
    checkpoint = None if folder is None else latest_checkpoint(folder)
    if checkpoint is None:
        return 0, [], None
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
    model.formed = stored.model.formed
    restore_optimizer(optimizer, state, checkpoint)
    rows = [{str(k): v for k, v in row.items()} for row in stored.table.to_dict(orient="records")]
    return stored.step, rows, stored.forming_steps


def _shown(theirs: object, ours: object) -> str:
    return f", {theirs} there and {ours} here" if len(f"{theirs}{ours}") < 600 else ""


def _evaluate(
    model: BigramTransformer,
    config: TrainConfig,
    probed: HeldOut,
    judge: Judge,
    before: list[dict[str, Any]],
    step: int,
    seconds: float,
) -> tuple[list[dict[str, Any]], Formed]:
    """The rows of the table, with this step's, and what has formed."""
    base = {"step": step, "seconds": seconds}
    rows = before + [
        {**base, "probe": probe, "continuations": None, "length": None, "value": value}
        for probe, value in memory_recall(model, config.length, model.triggers).items()
    ]
    for (continuations, length), sequences in probed.items():
        at = {**base, "continuations": continuations, "length": length}
        rows += [{**at, "probe": probe, "value": value} for probe, value in behaviour(model, sequences).items()]
    formed = judge.formed(TrainingRun(model, config, step, pd.DataFrame(rows, columns=COLUMNS)))
    at = {**base, "continuations": config.continuations, "length": config.length}
    for name in ("accuracy", "best", "shortcut", "order", "context", "weights"):
        rows.append({**at, "probe": f"formed_{name}", "value": float(getattr(formed, name))})
    return rows, formed
