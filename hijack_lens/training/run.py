"""A training run: how the model is trained, its probes over time, and its checkpoints."""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from hijack_lens.core.checks import (
    Seed,
    as_int,
    check_choice,
    check_count,
    check_list,
    check_number,
    check_path,
    check_type,
    fixed_seed,
    plain_scalar,
    shown,
)
from hijack_lens.core.files import read_safetensors, sync, write_atomically, write_safetensors
from hijack_lens.core.tables import Drawn
from hijack_lens.language import BigramLanguage, Token
from hijack_lens.models.storage import checkpoints, latest_checkpoint
from hijack_lens.models.transformer import BigramTransformer


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the same config, model and language give the same run.

    Attributes:
        triggers: tokens whose continuation is fixed per sequence; `()` with `n_triggers`.
        length: tokens per training sequence.
        seed: of the data; kept as an int, so that a run can go on.
        steps: of the optimizer, each on `batch_size` fresh sequences.
        batch_size: sequences per step.
        n_triggers: draw this many triggers per sequence, instead of `triggers`.
        continuations: how the triggers' continuations are drawn: "uniform", or "bigram" (from their own row of pi_b).
        loss: over "all" tokens, or only over those "predictable" in context (Bietti et al. 2023).
        optimizer: "adamw", or "sgd" with momentum.
        lr: peak learning rate, reached after `warmup` steps; then it decays along a cosine to `final_lr` times itself.
        warmup: steps of linear warm-up.
        final_lr: as a fraction of `lr`.
        momentum: SGD's.
        betas: AdamW's.
        weight_decay: for either optimizer.
        evaluate_every: steps between probes.
        eval_sequences: how many held-out sequences the probes see, at each length.
        eval_lengths: the lengths of these, as multiples of `length`; those beyond the model's n_ctx are left out.
        checkpoint_every: steps between checkpoints.
        compile: run the forward pass through torch.compile.
        bf16: compute in bfloat16 where autocast does (CUDA); the weights keep their dtype.
    """

    triggers: Token | Sequence[Token]
    length: int
    seed: Seed
    steps: int = 300
    batch_size: int = 64
    n_triggers: int | None = None
    continuations: Literal["uniform", "bigram"] = "uniform"
    loss: Literal["all", "predictable"] = "all"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-2
    warmup: int = 20
    final_lr: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    evaluate_every: int = 25
    eval_sequences: int = 64
    eval_lengths: tuple[int, ...] = (1, 2, 4)
    checkpoint_every: int = 100
    compile: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        alone = isinstance(self.triggers, str) or as_int(self.triggers) is not None
        listed = [self.triggers] if alone else check_list("triggers", self.triggers, "a token or several")
        triggers = tuple(str(token) if isinstance(token, str) else check_count("triggers", token) for token in listed)
        self._set("triggers", triggers)
        for name in ("betas", "eval_lengths"):
            if not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"{name} must be several numbers, got {getattr(self, name)!r}")
            self._set(name, tuple(map(plain_scalar, getattr(self, name))))
        for field in fields(self):  # plain numbers, since a checkpoint's header holds no others
            self._set(field.name, plain_scalar(getattr(self, field.name)))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {shown(self.betas)}")
        if 1 not in self.eval_lengths:
            raise ValueError(f"eval_lengths must include 1, the training length itself, got {shown(self.eval_lengths)}")
        if bool(triggers) == (self.n_triggers is not None):
            raise ValueError(f"give either triggers or n_triggers, got {shown(triggers)} and {shown(self.n_triggers)}")
        check_count("length", self.length, minimum=2)
        self._set("seed", fixed_seed(self.seed))
        for name in ("steps", "batch_size", "evaluate_every", "eval_sequences", "checkpoint_every"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("warmup", self.warmup)
        if self.n_triggers is not None:
            check_count("n_triggers", self.n_triggers, minimum=1)
        for multiple in self.eval_lengths:
            check_count("eval_lengths", multiple, minimum=1)
        check_choice("continuations", self.continuations, ("uniform", "bigram"))
        check_choice("loss", self.loss, ("all", "predictable"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_number("lr", self.lr, positive=True)
        bounded = {"final_lr": self.final_lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        for name, value in [*bounded.items(), *(("betas", beta) for beta in self.betas)]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {shown(value)}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        check_count("step", step)
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * rising * (self.final_lr + (1 - self.final_lr) * falling)


_FORMAT = "hijack_lens.TrainingRun.1"

COLUMNS = ["step", "seconds", "probe", "continuations", "length", "value"]
"""The columns of a run's table."""


@dataclass(frozen=True, repr=False)
class TrainingRun(Drawn):
    """What training returns.

    Attributes:
        model: the model as trained so far.
        config: the config it was trained with.
        step: optimizer steps taken.
        table: probes over time, in tidy form: step, seconds, probe, continuations, length, value. Probes of the weights
            have no continuations and no length.
    """

    model: BigramTransformer
    config: TrainConfig
    step: int
    table: pd.DataFrame

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.config.steps

    def probe(self, name: str, length: int | None = None, continuations: str | None = None) -> pd.Series:
        """One probe over time, indexed by step; by default, at the training length and continuations.

        Raises:
            ValueError: for a probe that the table lacks.
        """
        check_type("name", name, str)
        rows = self.table[self.table["probe"] == name]
        if rows["length"].notna().any():
            rows = rows[rows["length"] == (self.config.length if length is None else length)]
            rows = rows[rows["continuations"] == (continuations or self.config.continuations)]
        if rows.empty:
            raise ValueError(
                f"name must be a probe of the table, got {shown(name)}; it has {sorted(set(self.table['probe']))}"
            )
        return rows.set_index("step")["value"].rename(name)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as `save_pretrained` does, and the table as `probes.csv`."""
        self.model.save_pretrained(folder)
        write_atomically(check_path("folder", folder) / "probes.csv", self.table.to_csv(index=False).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TrainingRun":
        """The latest checkpoint of a run.

        Raises:
            ValueError: if there is none, or its files are truncated or hold something else.
        """
        checkpoint = latest_checkpoint(check_path("folder", folder))
        if checkpoint is None:
            raise ValueError(f"{folder} is not a folder with checkpoints")
        return read_checkpoint(checkpoint)[0]


def fingerprint(language: BigramLanguage) -> str:
    """A hash that identifies the language of a run's sequences."""
    return hashlib.sha256(language.pi_b.numpy().tobytes() + language.pi_u.numpy().tobytes()).hexdigest()


def write_checkpoint(
    folder: Path, run: TrainingRun, optimizer: torch.optim.Optimizer, language: BigramLanguage
) -> None:
    """Writes everything needed to resume a run to `folder/checkpoint-STEP`, whole or not at all."""
    target = folder / f"checkpoint-{run.step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run.model.save_pretrained(partial)
        state = {
            f"{index}.{name}": value
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        header = {
            "config": asdict(run.config),
            "step": run.step,
            "language": fingerprint(language),
            "table": run.table.to_dict(orient="list"),
        }
        write_safetensors(partial / "training.safetensors", _FORMAT, state or {"empty": torch.zeros(1)}, header)
        if not target.exists():
            os.rename(partial, target)
            sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for older in checkpoints(folder):
        if older.name < target.name:
            shutil.rmtree(older)
    for abandoned in folder.glob(".checkpoint-*.partial"):  # left by runs that were killed
        shutil.rmtree(abandoned, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[TrainingRun, dict[str, torch.Tensor], str]:
    """A checkpoint's run, its optimizer's state, and the fingerprint of the training language."""
    path = folder / "training.safetensors"
    state, header = read_safetensors(path, _FORMAT)
    model = BigramTransformer.from_pretrained(folder)
    try:
        fields = header["config"]
        tuples = {name: tuple(fields[name]) for name in ("triggers", "betas", "eval_lengths")}
        config = TrainConfig(**{**fields, **tuples})
        table = pd.DataFrame(header["table"])
        step = check_count("step", header["step"], minimum=1)
        if step > config.steps or list(table.columns) != COLUMNS:
            raise ValueError(f"step {step} of {config.steps}, with a table of {list(table.columns)}")
        for row in header["table"]["step"]:
            check_count("table.step", row)
        for row in header["table"]["seconds"]:
            check_number("table.seconds", row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a training run of hijack-lens: {error}") from error
    state.pop("empty", None)
    return TrainingRun(model, config, step, table), state, str(header.get("language"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor], path: Path) -> None:
    """Restores a stored state into an optimizer of the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, torch.optim.AdamW):
        kind = {"exp_avg", "exp_avg_sq", "step"}
    else:
        kind = {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    nested: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        known = index.isdigit() and int(index) < len(parameters) and name in kind
        # A fused optimizer writes to these tensors without checking their shapes again.
        if not known or value.shape != (() if name == "step" else parameters[int(index)].shape):
            raise ValueError(f"{path} holds an optimizer's state of other parameters ({key})")
        nested.setdefault(int(index), {})[name] = value
    if bool(nested) != bool(kind) or any(set(values) != kind for values in nested.values()):
        raise ValueError(f"{path} lacks part of its optimizer's state")
    optimizer.load_state_dict({"state": nested, "param_groups": optimizer.state_dict()["param_groups"]})
