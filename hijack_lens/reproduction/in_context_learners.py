"""Claims: what other in-context learners make of their context, each against its own acceptance numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from hijack_lens import tasks
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import BLUE, GREY, Picture
from hijack_lens.tasks import Bar, Task, TaskRun
from hijack_lens.training.data import mixed_seed

TrainTask = Callable[[Task, int], TaskRun]
"""Trains a task's model with a seed: `tasks.train`, or, in a test, something else."""

_COMPARED = 1000  # prompts


@dataclass(frozen=True)
class Settings:
    """Which task, and the seeds of its worlds, weights and prompts."""

    task: Task
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


def in_context_learner(settings: Settings, train: TrainTask = tasks.train) -> Result:
    """A task's models, measured, and held against the task's acceptance numbers, which every seed must meet.

    Beside the task's own measures there are, of each seed, the context's "share" by the strength of a conflict, the
    "rank correlation" (Spearman's) of what is looked at during training with how far the loss has fallen, and, where
    exact Bayes is known, how far the model is above it by position: in "nats above bayes" or "squared error above
    bayes".
    """
    parts, curves = list[pd.DataFrame](), list[pd.DataFrame]()
    for seed in tqdm(settings.seeds, desc=settings.task.name, disable=None, unit="seed"):
        run = train(settings.task.in_world(seed), seed)
        measured = run.task.measure(run.model, seed), _over_training(run), _shares(run), _above_bayes(run)
        found = pd.concat(measured, ignore_index=True)
        parts.append(found.assign(seed=seed))
        curves.append(run.over_time().reset_index().assign(seed=seed))
    table = pd.concat(parts, ignore_index=True)
    findings = tuple(_finding(bar, table, settings) for bar in settings.task.claims)
    return Result(findings, table, _picture(table, pd.concat(curves), settings.task), settings.task.source)


def _over_training(run: TaskRun) -> pd.DataFrame:
    seen = run.over_time()
    fallen = -seen.pop("loss")
    rows = [("rank correlation", name, values.rank().corr(fallen.rank())) for name, values in seen.items()]
    return pd.DataFrame(rows, columns=["measure", "where", "value"])


def _shares(run: TaskRun) -> pd.DataFrame:
    found = tasks.context_share(run.task, run.model, seed=run.seed)
    rows = [
        (measure, f"{strength:g}", value)
        for measure, values in (("share", found.share), ("share of bayes", found.bayes))
        for strength, value in zip(found.strengths, values.tolist(), strict=True)
        if not math.isnan(value)  # exact Bayes, where it is not known
    ]
    return pd.DataFrame(rows, columns=["measure", "where", "value"])


def _above_bayes(run: TaskRun) -> pd.DataFrame:
    """What the loss is expected to exceed exact Bayes' by, at each position that is asked of any prompt.

    Of tokens, that is the divergence of the model's probabilities from Bayes'; of numbers, their squared difference.
    """
    batch = run.task.sample(_COMPARED, mixed_seed(run.seed, "above bayes", 0))
    references = run.task.references(batch)
    if "bayes" not in references:
        return pd.DataFrame(columns=["measure", "where", "value"])
    bayes = references["bayes"].double()
    with torch.no_grad():
        said = run.task.predictions(run.model(batch.inputs)).double()
    if batch.targets.is_floating_point():
        measure, above = "squared error above bayes", (said - bayes).square().sum(-1)
    else:
        measure, above = "nats above bayes", (torch.xlogy(bayes, bayes) - torch.xlogy(bayes, said)).sum(-1)
    asked = [(position, above[rows, position]) for position, rows in enumerate(batch.mask.T) if rows.any()]
    rows = [(measure, str(position), float(values.mean())) for position, values in asked]
    return pd.DataFrame(rows, columns=["measure", "where", "value"])


def _of(table: pd.DataFrame, measure: str, where: str) -> pd.Series:
    return table.loc[(table["measure"] == measure) & (table["where"] == where), "value"]


def _finding(bar: Bar, table: pd.DataFrame, settings: Settings) -> Finding:
    values = _of(table, bar.measure, bar.where)
    worst = values.min() if bar.side == "at least" else values.max()
    steps = settings.task.schedule.steps
    return Finding(
        f"{len(settings.seeds)} models of {settings.task.name}, {steps} steps",
        f"{bar.statement}: {bar.measure} ({bar.where}) {bar.side} {bar.level:g}, at every seed",
        f"{over_seeds(values):.3f}; at worst {worst:.3f}",
        len(values) == len(settings.seeds) and all(map(bar.met, values)),
    )


def _picture(table: pd.DataFrame, curves: pd.DataFrame, task: Task) -> Picture:
    """The loss over training; the latent's decodability by place; the context's share by dose."""
    picture = Picture(15.0, 4.8)
    left, middle, right = picture.figure.subplots(1, 3)
    experiment.draw_by_seed(left, curves, "step", "loss", {"linewidth": 1, "alpha": 0.4}, color=BLUE, linewidth=3)
    left.set(title="training", xlabel="training step", ylabel="loss on held-out prompts")

    places = table.loc[table["measure"] == "decodability", "where"].drop_duplicates().tolist()
    for shift, measure, label, colour in (
        (-0.2, "decodability", "trained", BLUE),
        (0.2, "decodability untrained", "untrained, same seed", GREY),
    ):
        found = [over_seeds(_of(table, measure, place)) for place in places]
        at = [index + shift for index in range(len(places))]
        experiment.bars(middle, at, found, 0.4, color=colour, label=label)
    middle.set_xticks(range(len(places)), [place.replace("after ", "") for place in places], rotation=30, ha="right")
    middle.set(title="the latent, decoded", xlabel="after", ylabel="linear probe's accuracy or R2", ylim=(0, 1.12))
    middle.legend(frameon=False, ncols=2, loc="upper left")

    _draw_shares(right, table, task.doses)
    right.set(title="conflict", xlabel=task.dose, ylabel="context's share (1: the context, 0: the weights)")
    right.legend(frameon=False)
    experiment.finish((left, middle, right))
    return picture


def _draw_shares(ax: Any, table: pd.DataFrame, doses: Sequence[float]) -> None:
    for measure, label, style in (
        ("share", "model", {"color": BLUE, "marker": "o", "linewidth": 3}),
        ("share of bayes", "exact Bayes", {"color": "black", "linestyle": "--", "linewidth": 1.5}),
    ):
        rows = table[table["measure"] == measure]
        if rows.empty:
            continue
        shares = rows.assign(dose=rows["where"].map({f"{dose:g}": dose for dose in doses}))
        experiment.draw_by_seed(ax, shares, "dose", "value", {"linewidth": 1, "alpha": 0.4}, label=label, **style)
