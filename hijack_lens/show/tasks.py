"""The context's share of in-context learners' predictions, by the dose of a conflict."""

from collections.abc import Sequence
from typing import Any

from hijack_lens.core.checks import check_list, check_type
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.style import BLUE, COLOURS, GREY, Picture, frameless, heatmap, whole_ticks
from hijack_lens.tasks import Batch, Moved, TaskRun
from hijack_lens.tasks.conflicts import ContextShare

_WIDTH, _HEIGHT = 4.6, 4.2
_PROMPTS = 16


@report_of.register
def share_report(result: ContextShare) -> Report:
    """A row per strength."""
    rows = [
        (f"{strength:g}", f"{ours:.3f}", f"{bayes:.3f}")
        for strength, ours, bayes in zip(result.strengths, result.share.tolist(), result.bayes.tolist(), strict=True)
    ]
    return Report(
        f"ContextShare(dose={len(result.strengths)}): {result.task}; 1: as the context says, 0: as the weights say",
        tables=[Table((result.dose, "model", "exact Bayes"), rows)],
    )


@picture_of.register
def share_curve(result: ContextShare) -> Picture:
    """The model's share by strength, and that of exact Bayes."""
    return context_shares([result])


@report_of.register
def task_run_report(run: TaskRun) -> Report:
    """Each measure at the start, and now."""
    over_time = run.over_time()
    rows = [(str(name), f"{one.iloc[0]:.4g}", f"{one.iloc[-1]:.4g}") for name, one in over_time.items()]
    title = f"TaskRun of {type(run.task).__name__}: step {run.step} of {run.task.schedule.steps}, seed {run.seed}"
    return Report(title, [], [Table(("measure", "at the start", "now"), rows)])


@picture_of.register
def task_run_curves(run: TaskRun) -> Picture:
    """Each measure over the steps, in a panel of its own."""
    over_time = run.over_time()
    picture = Picture(1.0 + 3.2 * over_time.shape[1], 2.8)
    panels = picture.figure.subplots(1, over_time.shape[1], squeeze=False)[0]
    for ax, (name, values) in zip(panels, over_time.items(), strict=True):
        ax.plot(values.index, values, "o-", color=BLUE, markersize=3)
        ax.set_xlabel("training step")
        ax.set_ylabel(str(name))
        whole_ticks(ax.xaxis, 5)
    frameless(*panels)
    return picture


@picture_of.register
def moved_curves(moved: Moved) -> Picture:
    """How far the outputs moved at each position, beside a step at random."""
    found = moved.to_pandas().groupby("position")[["moved", "moved_at_random"]].mean()
    picture = Picture(5.6, 3.0)
    ax = picture.figure.add_subplot()
    for name, colour, label in (("moved", BLUE, "latent moved"), ("moved_at_random", GREY, "a random step as long")):
        ax.plot(found.index, found[name], "o-", color=colour, markersize=4, label=label)
    ax.set_xlabel("position")
    ax.set_ylabel("change of the outputs\n(root mean square)")
    whole_ticks(ax.xaxis)
    frameless(ax)
    picture.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return picture


@picture_of.register
def batch_map(batch: Batch) -> Picture:
    """The first prompts: their inputs, or of vectors the first number of each, over their targets."""
    first = batch.inputs[:_PROMPTS] if batch.inputs.ndim == 2 else batch.inputs[:_PROMPTS, :, 0]
    width = max(3.6, min(9.0, 0.12 * first.shape[1] + 2.0))
    picture = Picture(width, 1.4 + 2 * max(0.9, 0.13 * len(first)))
    axes = picture.figure.subplots(2, 1, sharex=True)
    for ax, image, title in zip(axes, (first, batch.targets[:_PROMPTS]), ("inputs", "targets"), strict=True):
        image = image.detach().cpu().double()
        ids = not batch.inputs.is_floating_point()
        drawn = heatmap(ax, image, attention=ids, spread=(float(image.max()) or 1.0) if ids else None)
        ax.set_title(title if ids or title == "targets" else f"{title}: the first number", fontsize=9)
        ax.set_ylabel("prompt")
        picture.figure.colorbar(drawn, ax=ax, label="id" if ids else "value", pad=0.02)
    axes[1].set_xlabel("position")
    return picture


def context_shares(results: Sequence[ContextShare]) -> Picture:
    """Shares of several tasks in one picture, a panel each; those of one task at several seeds share theirs.

    Raises:
        TypeError, ValueError: for no results, and for what are none.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> seeds = [hl.tasks.context_share(task, task.model(seed), [1, 2, 4], n=100) for seed in (0, 1)]
        >>> hl.show.context_shares(seeds)
        Picture(last steps that follow another table)
    """
    listed = check_list("results", results, "several ContextShare")
    if not listed:
        raise ValueError("results must hold at least one, got none")
    by_task: dict[str, list[ContextShare]] = {}
    for one in listed:
        check_type("results", one, ContextShare)
        by_task.setdefault(one.task, []).append(one)
    picture = Picture(_WIDTH * len(by_task), _HEIGHT)
    panels = picture.figure.subplots(1, len(by_task), sharey=True, squeeze=False)[0]
    for ax, (task, of_task) in zip(panels, by_task.items(), strict=True):
        _draw(ax, of_task)
        ax.set(title=task, xlabel=of_task[0].dose)
    panels[0].set_ylabel("context's share of the prediction\n(1: the context, 0: the weights)")
    picture.figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return picture


def _draw(ax: Any, results: Sequence[ContextShare]) -> None:
    for level in (0, 1):
        ax.axhline(level, color="black", linewidth=0.8, linestyle=":")
    for number, one in enumerate(results):
        ours = {"color": COLOURS["context"], "marker": "o", "markersize": 4, "linewidth": 2, "alpha": 0.8}
        ax.plot(one.strengths, one.bayes, color="black", linestyle="--", label=None if number else "exact Bayes")
        ax.plot(one.strengths, one.share, label=None if number else "model", **ours)
    ax.grid(alpha=0.3)
    frameless(ax)
