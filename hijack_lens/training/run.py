"""A training run: its probes over time, and its checkpoints."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hijack_lens.core.checks import (
    check_columns,
    check_count,
    check_fields,
    check_number,
    check_path,
    check_type,
    shown,
)
from hijack_lens.core.files import read_safetensors, sync, write_atomically, write_safetensors
from hijack_lens.core.tables import SHOWN_AS, Drawn
from hijack_lens.language import BigramLanguage
from hijack_lens.models.formed import Formed
from hijack_lens.models.storage import checkpoints, latest_checkpoint
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.config import TrainConfig
from hijack_lens.training.forming import last_step

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
        forming_steps: how many steps forming took; `None` before it has ended, and where steps are counted.

    Examples:
        >>> small = hl.trainable_transformer(language, d_model=16, n_ctx=64, seed=0)
        >>> config = hl.TrainConfig(seed=0, triggers="frequent", n_triggers=2, length=16, steps=4)
        >>> run = hl.train(small, language, config)
        >>> run.finished, bool(run.formed)
        (True, False)
        >>> run.probe("bigram_excess")
        step
        0    1.976410
        4    1.899232
        Name: bigram_excess, dtype: float64
    """

    model: BigramTransformer
    config: TrainConfig
    step: int
    table: pd.DataFrame
    forming_steps: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_columns("table", self.table, COLUMNS)

    @property
    def formed(self) -> Formed | None:
        """Whether both memories have formed, what each has reached, and the remedy if not; true if both have.

        `None` for runs that were stored by a version that did not judge them.
        """
        return self.model.formed

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == last_step(self.config, self.model.cfg.d_vocab, self.forming_steps)

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

    def to_pandas(self) -> pd.DataFrame:
        """The probes over time, in tidy form: a copy of `table`."""
        return self.table.copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as `save_pretrained` does, and the table as `probes.csv`, into the folder `path`.

        With an extension, ".html" for example, what other results write by that name.
        """
        folder = check_path("path", path)
        if folder.suffix.lower() in SHOWN_AS:
            super().save(path)
            return
        self.model.save_pretrained(path)
        write_atomically(folder / "probes.csv", self.table.to_csv(index=False).encode())

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
    header = {
        "config": asdict(run.config),
        "step": run.step,
        "language": fingerprint(language),
        "forming_steps": run.forming_steps,
        "table": run.table.to_dict(orient="list"),
    }

    def write(partial: Path) -> None:
        run.model.save_pretrained(partial)
        state = optimizer_state(optimizer)
        write_safetensors(partial / "training.safetensors", _FORMAT, state or {"empty": torch.zeros(1)}, header)

    keep_checkpoint(folder, run.step, write)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state, as `restore_optimizer` takes it."""
    return {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def keep_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Has a checkpoint's files written to `folder/checkpoint-STEP`, whole or not at all, in place of older ones."""
    target = folder / f"checkpoint-{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
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
        plain: dict[str, Any] = {
            name: tuple(one) if isinstance(one, list) else one for name, one in header["config"].items()
        }
        config = TrainConfig(**plain)
        table = pd.DataFrame(header["table"])
        step = check_count("step", header["step"], minimum=1)
        forming_steps = header.get("forming_steps")
        if forming_steps is not None and check_count("forming_steps", forming_steps, minimum=1) > step:
            raise ValueError(f"forming took {forming_steps} of {step} steps")
        most = last_step(config, model.cfg.d_vocab, forming_steps)
        if step > most or list(table.columns) != COLUMNS:
            raise ValueError(f"step {step} of {most}, with a table of {list(table.columns)}")
        for row in header["table"]["step"]:
            check_count("table.step", row)
        for row in header["table"]["seconds"]:
            check_number("table.seconds", row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a training run of hijack-lens: {error}") from error
    state.pop("empty", None)
    return TrainingRun(model, config, step, table, forming_steps), state, str(header.get("language"))


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
