"""What every in-context learner here is: prompts, a model, exact references, a conflict, and measures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.checks import Seed, check_count, check_fraction, check_number, shown
from hijack_lens.models.real import RealTransformer

Predictions = Float[Tensor, "prompt pos value"]
"""Of the next token, probabilities; of a real number, that number alone."""


@dataclass(frozen=True)
class Batch:
    """Prompts, and what is known of them.

    Attributes:
        inputs: token ids, or vectors.
        targets: what each position should say.
        mask: the positions that are asked; the last one always is.
        latent: by name, what each prompt was drawn with and does not say: a concept, a noise level, weights.
    """

    inputs: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt pos d_in"]
    targets: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    latent: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> "Batch":
        """Some of the prompts."""
        latent = {name: values[rows] for name, values in self.latent.items()}
        return Batch(self.inputs[rows], self.targets[rows], self.mask[rows], latent)


@dataclass(frozen=True)
class Schedule:
    """How a task's model is trained, by AdamW.

    Attributes:
        steps: each on fresh prompts.
        batch_size: prompts per step.
        lr: peak learning rate; it falls along a cosine to `final_lr` times itself.
        warmup: steps of linear warm-up.
        final_lr: as a fraction of `lr`.
        weight_decay: AdamW's.
        evaluate_every: steps between looks.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 50
    final_lr: float = 0.05
    weight_decay: float = 0.0
    evaluate_every: int = 100
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "checkpoint_every"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("warmup", self.warmup)
        check_number("lr", self.lr, positive=True)
        check_fraction("final_lr", self.final_lr)
        check_fraction("weight_decay", self.weight_decay)


@dataclass(frozen=True)
class Bar:
    """An acceptance number: what a task claims of one of its measures, at every seed.

    Attributes:
        statement: the claim in words.
        measure: the measure's name in the task's table.
        where: its place there.
        side: whether it must be "at least" or "at most" the level.
        level: the number.
    """

    statement: str
    measure: str
    where: str
    side: Literal["at least", "at most"]
    level: float

    def met(self, value: float) -> bool:
        """Whether a value is on the right side; NaN is on none."""
        return value >= self.level if self.side == "at least" else value <= self.level


@runtime_checkable
class Task(Protocol):
    """A family of prompts that a model learns in context; a frozen dataclass of its settings.

    Attributes:
        name: short, in words.
        source: the paper, and what is changed here.
        schedule: how a model of it is trained.
        dose: what the strength of its conflict is, with its unit.
        doses: strengths to try.
        claims: the acceptance numbers.
    """

    name: str
    source: str
    dose: str
    doses: tuple[float, ...]
    claims: tuple[Bar, ...]

    @property
    def schedule(self) -> Schedule: ...  # noqa: D102

    def in_world(self, seed: int) -> "Task":
        """The task with what it draws once for all prompts, if anything, drawn from another seed."""

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts."""

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained model."""

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """What training lowers: the mean over the positions asked."""

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """What a model's outputs predict."""

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """What ideal predictors say, "bayes" among them; of a conflict's prompts, also its "context" and "weights"."""

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose context denies what the weights hold, the more the stronger."""

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """What is looked at while training with this seed, the "loss" among it, on held-out prompts."""

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """The paper's own measures of a model trained with this seed: a row per measure, where and value."""


def check_task(task: object) -> None:
    """`task` follows the protocol."""
    if not isinstance(task, Task):
        raise TypeError(f"task must be a task of hijack_lens.tasks, or one of its members, got {shown(task)}")


def shortened(task: Task, steps: int) -> Task:
    """The task with fewer steps of training, for a first look.

    Raises:
        TypeError, ValueError: for what is no task, and no number of steps.
    """
    check_task(task)
    schedule = replace(task.schedule, steps=steps, evaluate_every=min(task.schedule.evaluate_every, steps))
    return replace(task, schedule=schedule)  # type: ignore[type-var]
