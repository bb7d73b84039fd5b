"""A trained model as the theory sees it: strengths read off weights, tables, and how well they predict."""

import numpy as np

from hijack_lens.core.tables import Report, picture_of, report_of, table_of
from hijack_lens.probing import DoseTheory
from hijack_lens.show.style import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    Picture,
    frameless,
    heatmap,
    spread_of,
    whole_ticks,
    write_beside,
)
from hijack_lens.theory import Tables
from hijack_lens.training import FittedStrengths, TheoryAgreement

_MAPS_PER_ROW = 4


@report_of.register
def strengths_report(fit: FittedStrengths) -> Report:
    """The strength of each memory, and how purely it is one."""
    s = fit.strengths
    title = f"FittedStrengths: b1 = {s.previous_token:.3g}, b2 = {s.match:.3g}, b3 = {s.copy:.3g}, g = {s.bigram:.3g}"
    return Report(title, [f"read off weights; its language: {fit.language!r}"], [table_of(fit.to_pandas())])


@picture_of.register
def strengths_bars(fit: FittedStrengths) -> Picture:
    """The strengths, and the share of each memory's table that they explain."""
    frame = fit.to_pandas()
    picture = Picture(6.4, 2.2)
    axes = picture.figure.subplots(1, 2, sharey=True)
    colours = [COLOURS["weights" if memory == "bigram" else "context"] for memory in frame["memory"]]
    names = [memory.replace("_", " ") for memory in frame["memory"]]
    for ax, column, label in zip(axes, ("strength", "purity"), ("strength", "purity (R² of its table)"), strict=True):
        ax.barh(range(len(frame)), frame[column], color=colours, height=0.65)
        for row, value in enumerate(frame[column]):
            write_beside(ax, f"{value:.3g}", value, row, 4, fontsize=8)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(frame)), names)
    axes[0].invert_yaxis()
    frameless(*axes)
    return picture


@report_of.register
def agreement_report(agreement: TheoryAgreement) -> Report:
    """How well theory predicts logits and winners."""
    n = len(agreement.table)
    title = f"TheoryAgreement on {n} prompts: R² of logits {agreement.r2:.3f}, winners {agreement.winners:.1%}"
    return Report(title, tables=[table_of(agreement.table)])


@picture_of.register
def agreement_scatter(agreement: TheoryAgreement) -> Picture:
    """The theory's margin of each prompt against the model's."""
    picture = Picture(4.4, 4.0)
    ax = picture.figure.add_subplot()
    found = agreement.table
    right = np.sign(found["theory_margin"]) == np.sign(found["model_margin"])
    ax.scatter(found["theory_margin"][right], found["model_margin"][right], s=12, color=BLUE, label="the same winner")
    ax.scatter(
        found["theory_margin"][~right], found["model_margin"][~right], s=16, color=ORANGE, marker="x", label="another"
    )
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_xlabel("margin by theory, in logits")
    ax.set_ylabel("margin of the model, in logits")
    frameless(ax)
    picture.figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return picture


@picture_of.register
def dose_theory_curves(theory: DoseTheory) -> Picture:
    """The predicted margin of each fact by repeats."""
    picture = Picture(5.6, 3.4)
    ax = picture.figure.add_subplot()
    for row in theory.margin.tolist():
        ax.plot(range(len(row)), row, "o-", color=BLUE, markersize=3, linewidth=1, alpha=0.8)
    ax.axhline(0, color="black", linewidth=1)
    whole_ticks(ax.xaxis)
    ax.set_xlabel("how often the context says its answer")
    ax.set_ylabel("margin by theory, in logits")
    frameless(ax)
    return picture


@picture_of.register
def table_maps(tables: Tables) -> Picture:
    """A heat map of each table that is not 0, each on a scale of its own."""
    frame = tables.to_pandas()
    names = [str(name) for name in frame["table"][frame["rms"] > 0]]
    lines = -(-len(names) // _MAPS_PER_ROW)
    picture = Picture(2.4 * _MAPS_PER_ROW, 2.2 * lines)
    axes = picture.figure.subplots(lines, _MAPS_PER_ROW, squeeze=False).flatten()
    for ax in axes[len(names) :]:
        ax.remove()
    for ax, name in zip(axes, names, strict=False):
        table = getattr(tables, name).detach().cpu().double().numpy()
        drawn = heatmap(ax, table, spread=spread_of(table))
        ax.set_title(name.replace("_", " "), fontsize=9)
        ax.set_xlabel("column", fontsize=8)
        ax.tick_params(labelsize=7)
        for axis in (ax.xaxis, ax.yaxis):
            whole_ticks(axis, 5)
        bar = picture.figure.colorbar(drawn, ax=ax)
        bar.ax.tick_params(labelsize=7)
    for ax in axes[: len(names) : _MAPS_PER_ROW]:
        ax.set_ylabel("row (token)", fontsize=8)
    return picture
