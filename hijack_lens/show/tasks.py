"""The context's share of in-context learners' predictions, by the dose of a conflict."""

from collections.abc import Sequence
from typing import Any

from hijack_lens.core.checks import check_list, check_type
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.style import COLOURS, Picture, frameless
from hijack_lens.tasks.conflicts import ContextShare

_WIDTH, _HEIGHT = 4.6, 4.2


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
        figure=lambda: share_curve(result).svg(),
    )


@picture_of.register
def share_curve(result: ContextShare) -> Picture:
    """The model's share by strength, and that of exact Bayes."""
    return context_shares([result])


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
