"""What every in-context learner here is: prompts, a model, exact references, a conflict, and measures."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_real,
    check_tensor,
    check_tokens,
    check_type,
    shown,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.models.real import RealTransformer, check_inputs

Predictions = Float[Tensor, "prompt pos value"]
"""Of the next token, probabilities; of a real number, that number alone."""


@dataclass(frozen=True, repr=False)
class Batch(Drawn):
    """Prompts, and what is known of them.

    Attributes:
        inputs: token ids, or vectors.
        targets: what each position should say.
        mask: the positions that are asked; the last one always is.
        latent: by name, what each prompt was drawn with and does not say: a concept, a noise level, weights.

    Examples:
        >>> batch = hl.tasks.LatentConcepts(length=8).sample(5, seed=0)
        >>> batch.inputs.shape, list(batch.latent)
        (torch.Size([5, 8]), ['table'])
        >>> len(batch[:2])
        2
    """

    inputs: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt pos d_in"]
    targets: Int[Tensor, "prompt pos"] | Float[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    latent: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "mask"):
            check_type(name, getattr(self, name), Tensor)
        check_type("latent", self.latent, Mapping)
        shape = tuple(self.mask.shape)
        if self.mask.dtype != torch.bool or len(shape) != 2 or not all(shape) or not bool(self.mask[:, -1].all()):
            raise ValueError(f"mask must be bools [prompt, pos] that ask the last position, got {shown(self.mask)}")
        n_axes = 3 if self.inputs.is_floating_point() else 2
        for name, one, fits in (
            ("inputs", self.inputs, self.inputs.ndim == n_axes and self.inputs.shape[:2] == shape),
            ("targets", self.targets, self.targets.shape == shape),
        ):
            if not fits:
                raise ValueError(f"{name} must have the mask's axes {shape}, got shape {tuple(one.shape)}")
        for name, values in self.latent.items():
            if not isinstance(values, Tensor) or values.shape[:1] != shape[:1]:
                raise ValueError(f"latent must have a value per prompt, {shape[0]}, got {shown(values)} for {name!r}")

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        n, length = self.mask.shape
        return f"Batch(prompt={n}, pos={length}; latent: {', '.join(self.latent) or 'none'})"

    def to_pandas(self) -> pd.DataFrame:
        """A row per token: prompt, position, input (or, of a vector, input_0, ...), target, and whether it is asked."""
        inputs = {"input": self.inputs}
        if self.inputs.ndim == 3:
            inputs = {f"input_{i}": one for i, one in enumerate(self.inputs.unbind(-1))}
        axes = dict(zip(("prompt", "position"), map(range, self.mask.shape), strict=True))
        frame = tidy(axes, **inputs, target=self.targets, asked=self.mask).astype({"asked": bool})
        ids = [name for name, one in (*inputs.items(), ("target", self.targets)) if not one.is_floating_point()]
        return frame.astype(dict.fromkeys(ids, int))

    def __getitem__(self, rows: slice | Int[Tensor, "row"]) -> "Batch":
        """Some of the prompts.

        Raises:
            TypeError, ValueError: for rows that are no slice and no ids of prompts, and for none.
        """
        if not isinstance(rows, slice):
            rows = check_tokens("rows", rows, len(self))
            if rows.ndim != 1:
                raise ValueError(f"rows must be a slice or ids of prompts [row], got {shown(rows)}")
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

    Examples:
        >>> task = hl.tasks.LatentConcepts(schedule=hl.tasks.Schedule(steps=800, lr=4e-3))
        >>> task.schedule.steps, task.schedule.batch_size
        (800, 64)
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

    Examples:
        >>> bar = hl.tasks.Bar("the loss is within 0.03 nats of exact Bayes", "loss", "above bayes", "at most", 0.03)
        >>> bar.met(0.02), bar.met(0.04), bar.met(float("nan"))
        (True, False, False)
    """

    statement: str
    measure: str
    where: str
    side: Literal["at least", "at most"]
    level: float

    def __post_init__(self) -> None:
        for name in ("statement", "measure", "where"):
            check_type(name, getattr(self, name), str)
        check_choice("side", self.side, ("at least", "at most"))
        check_real("level", self.level)

    def met(self, value: float) -> bool:
        """Whether a value is on the right side; NaN is on none."""
        value = check_real("value", value)
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

    Examples:
        >>> task = hl.tasks.LatentConcepts()
        >>> isinstance(task, hl.tasks.Task), task.name, task.source[:40]
        (True, 'latent concepts', 'after Han et al., arXiv 2412.12276, sect')
        >>> f"after {task.schedule.steps} steps, {task.claims[0].statement}"
        'after 1600 steps, the loss is within 0.03 nats of exact Bayes'
        >>> task.dose, task.doses[:3]
        ('last steps that follow another table', (1.0, 2.0, 3.0))
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def source(self) -> str: ...  # noqa: D102

    @property
    def schedule(self) -> Schedule: ...  # noqa: D102

    @property
    def dose(self) -> str: ...  # noqa: D102

    @property
    def doses(self) -> tuple[float, ...]: ...  # noqa: D102

    @property
    def claims(self) -> tuple[Bar, ...]: ...  # noqa: D102

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
        """What ideal predictors say; of a conflict's prompts, also its "context" and "weights".

        Exact Bayes is among them, as "bayes", where it is known.
        """

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose context denies what the weights hold, the more the stronger."""

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """What is looked at while training with this seed, the "loss" among it, on held-out prompts."""

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """The paper's own measures of a model trained with this seed: a row per measure, where and value."""


_MEMBERS = tuple(name for name in vars(Task) if not name.startswith("_"))


def prompt_count(n: object, numbers: int) -> int:
    """`n` as a number of prompts that take so many numbers each to draw, for which there is memory."""
    count = check_count("n", n, minimum=1)
    check_memory(8 * count * numbers, n=count)
    return count


def check_fits(model: object, batch: Batch, task: Task | None = None) -> None:
    """`model` is one that reads the prompts, and writes what the task, if it is given, takes for predictions."""
    check_type("model", model, RealTransformer)
    assert isinstance(model, RealTransformer)
    try:
        check_inputs(model, "prompts", batch.inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model must be one that reads the prompts: {error}") from error
    if task is not None:
        try:
            task.predictions(torch.zeros(1, batch.mask.shape[1], model.cfg.d_vocab_out))
        except ValueError as error:
            raise ValueError(f"model must be one that writes the task's outputs: {error}") from error


def check_outputs(outputs: object, d_out: int, batch: Batch | None = None) -> None:
    """`outputs` are what a model that writes `d_out` numbers writes at each position, of the batch if it is given."""
    check_tensor("outputs", outputs, "a model's outputs")
    assert isinstance(outputs, Tensor)
    if outputs.ndim != 3 or outputs.shape[2] != d_out:
        raise ValueError(f"outputs must be [prompt, pos, {d_out}], got shape {tuple(outputs.shape)}")
    if batch is not None:
        check_type("batch", batch, Batch)
        if outputs.shape[:2] != batch.mask.shape:
            raise ValueError(f"outputs must be of the batch's prompts {tuple(batch.mask.shape)}, got {outputs.shape}")


def check_batch(batch: object, latents: Sequence[str], d_in: int | None, most: int | None = None) -> None:
    """`batch` has these latents; its inputs are vectors of `d_in` numbers, or else token ids below `most`."""
    check_type("batch", batch, Batch)
    assert isinstance(batch, Batch)
    found = batch.inputs.shape[2] if batch.inputs.is_floating_point() else None
    if found != d_in or not set(latents) <= set(batch.latent) or (most and int(batch.inputs.max()) >= most):
        raise ValueError(
            f"batch must be of this task's prompts, with {' and '.join(latents)}, got one with "
            f"{' and '.join(batch.latent)} and inputs {shown(batch.inputs)}"
        )


def check_task(task: object) -> None:
    """`task` follows the protocol."""
    if any(inspect.getattr_static(task, name, None) is None for name in _MEMBERS):  # which runs none of its code
        raise TypeError(f"task must be a task of hijack_lens.tasks, or one of its members, got {shown(task)}")


def shortened(task: Task, steps: int) -> Task:
    """The task with fewer steps of training, for a first look.

    Raises:
        TypeError, ValueError: for what is no task, and no number of steps.

    Examples:
        >>> task = hl.tasks.shortened(hl.tasks.LatentConcepts(), steps=20)
        >>> task.schedule.steps, task.schedule.evaluate_every
        (20, 20)
    """
    check_task(task)
    steps = check_count("steps", steps, minimum=1)
    schedule = replace(task.schedule, steps=steps, evaluate_every=min(task.schedule.evaluate_every, steps))
    return replace(task, schedule=schedule)  # type: ignore[type-var]
