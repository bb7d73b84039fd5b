"""Training a task's model: the loop of `hijack_lens.train`, over the protocol."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hijack_lens.core.analysis import without_autocast
from hijack_lens.core.checks import check_columns, check_count, check_fields, fixed_seed
from hijack_lens.core.files import locked, make_folder, read_safetensors, write_safetensors
from hijack_lens.core.tables import Drawn
from hijack_lens.models.real import RealTransformer
from hijack_lens.models.storage import latest_checkpoint
from hijack_lens.tasks.task import Batch, Task, check_task
from hijack_lens.training.config import scheduled_lr
from hijack_lens.training.data import BLOCK, mixed_seed
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.run import keep_checkpoint, optimizer_state, restore_optimizer
from hijack_lens.training.steps import run_course

_FORMAT = "hijack_lens.TaskRun.1"
_FILE = "training.safetensors"
_COLUMNS = ["step", "seconds", "measure", "value"]


@dataclass(frozen=True, repr=False)
class TaskRun(Drawn):
    """A task's model, trained.

    Attributes:
        model: as trained so far.
        task: what it was trained on.
        seed: of the weights and the prompts.
        step: optimizer steps taken.
        table: what was looked at over time: step, seconds, measure, value.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> run = hl.tasks.train(hl.tasks.shortened(task, steps=2))
        >>> run.step, run.finished
        (2, True)
        >>> run.over_time().columns.tolist()
        ['decodability', 'loss']
    """

    model: RealTransformer
    task: Task
    seed: int
    step: int
    table: pd.DataFrame

    def __post_init__(self) -> None:
        check_fields(self)
        check_columns("table", self.table, _COLUMNS)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.task.schedule.steps

    def to_pandas(self) -> pd.DataFrame:
        """What was looked at over time, in tidy form: a copy of `table`."""
        return self.table.copy()

    def over_time(self) -> pd.DataFrame:
        """A column per measure, by step."""
        return self.table.pivot(index="step", columns="measure", values="value")


@torch.inference_mode(False)
@without_autocast()
def train(task: Task, seed: int = 0, out: str | os.PathLike[str] | None = None) -> TaskRun:
    """Trains a fresh model of a task by its schedule, each step on fresh prompts.

    With `out`, checkpoints are written there, each whole or not at all, and the same call again resumes a run that was
    killed, or returns one that is finished; on a CPU the weights are the same, bit for bit, as without interruption.
    Ctrl-C ends the run after the current step, writes a checkpoint and returns the run so far.

    Args:
        task: what to train on.
        seed: of the weights and the prompts.
        out: folder for checkpoints.

    Raises:
        TypeError, ValueError: for what is no task or no seed, and for an `out` that is no folder, that another training
            writes to, or that holds a run of another task or seed.

    Examples:
        >>> task = hl.tasks.AlgorithmSelection(n_pairs=4, d_model=16, n_layers=1)
        >>> run = hl.tasks.train(hl.tasks.shortened(task, steps=2), seed=1, out="regression")
        >>> again = hl.tasks.train(run.task, seed=1, out="regression")  # there already: nothing is trained
        >>> again.table.equals(run.table)
        True
    """
    check_task(task)
    seed = fixed_seed(seed)
    if out is None:
        return _run(_TaskCourse(task, seed, None))
    folder = make_folder("out", out)
    with locked("out", out, folder / ".lock"):
        return _run(_TaskCourse(task, seed, folder))


def _run(course: "_TaskCourse") -> TaskRun:
    step = run_course(course, course.resumed_at, course.rows[-1]["seconds"] if course.rows else 0.0)
    return TaskRun(course.model, course.task, course.seed, step, pd.DataFrame(course.rows, columns=_COLUMNS))


class _TaskCourse:
    """A training on a task's prompts, in counted steps."""

    def __init__(self, task: Task, seed: int, folder: Path | None):
        self.task, self.seed, self.folder, self.schedule = task, seed, folder, task.schedule
        self.end = self.schedule.steps
        self.evaluate_every, self.checkpoint_every = self.schedule.evaluate_every, self.schedule.checkpoint_every
        self.model = task.model(mixed_seed(seed, "weights", 0))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.schedule.lr, betas=(0.9, 0.99), weight_decay=self.schedule.weight_decay, fused=True
        )
        self.forward = PlainForward(self.model)
        self.rows: list[dict[str, Any]] = []
        self.resumed_at = self._resume()
        self.block: tuple[int, Batch] | None = None

    def take(self, step: int) -> int:
        s = self.schedule
        block, index = divmod(step, BLOCK)
        if self.block is None or self.block[0] != block:
            self.block = block, self.task.sample(BLOCK * s.batch_size, mixed_seed(self.seed, "train", block))
        batch = self.block[1][index * s.batch_size : (index + 1) * s.batch_size]
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_lr(step, s.steps, s.lr, s.warmup, s.final_lr)
        loss = self.task.loss(self.forward(batch.inputs), batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return batch.mask.numel()

    def look(self, step: int, seconds: float) -> str:
        found = self.task.watch(self.model, self.seed)
        self.rows += [{"step": step, "seconds": seconds, "measure": name, "value": x} for name, x in found.items()]
        return ", ".join(f"{name} {value:.3f}" for name, value in found.items())

    def turn(self, step: int) -> None:
        """There is one phase."""

    def save(self, step: int) -> None:
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_state(self.optimizer).items()}
        table = pd.DataFrame(self.rows).to_dict(orient="list")
        header = {"task": repr(self.task), "seed": self.seed, "step": step, "table": table}

        def write(partial: Path) -> None:
            partial.mkdir()
            write_safetensors(partial / _FILE, _FORMAT, tensors, header)

        keep_checkpoint(self.folder, step, write)

    def _resume(self) -> int:
        checkpoint = None if self.folder is None else latest_checkpoint(self.folder)
        if checkpoint is None:
            return 0
        path = checkpoint / _FILE
        tensors, header = read_safetensors(path, _FORMAT)
        for name, ours in (("task", repr(self.task)), ("seed", self.seed)):
            if header.get(name) != ours:
                there = header.get(name)
                raise ValueError(f"out={str(self.folder)!r} holds a run of another {name}: {there} there, {ours} here")
        try:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    stored = tensors.pop(f"model.{name}")
                    if stored.shape != parameter.shape:
                        raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(parameter.shape)}")
                    parameter.copy_(stored)
            self.rows = [
                {str(k): v for k, v in row.items()} for row in pd.DataFrame(header["table"]).to_dict("records")
            ]
            step = check_count("step", header["step"], minimum=1)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a run of a task: {error}") from error
        restore_optimizer(self.optimizer, {n.removeprefix("optimizer."): x for n, x in tensors.items()}, path)
        return step
