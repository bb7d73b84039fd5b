"""Several in-context learners beside each other: a row per learner, a column per question, on one slide."""

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.findings import over_seeds
from hijack_lens.show.style import BLUE, GREY, ORANGE, Picture, whole_ticks

ABOVE_BAYES = {"nats above bayes": "nats", "squared error above bayes": "squared error"}
"""Measures of how far predictions are above exact Bayes, by position, and their units."""

_WIDTH, _HEIGHT = 40 / 3, 7.5  # inches: a slide of 16:9
_MOVED = (("shift", "random shift"), ("follows the query", ""), ("moved KL", "random KL"))
_UPRIGHT = 10  # bars whose names fit beside each other
_PLACE = r"(after )?(attention|MLP) \d+"
_TITLES = (
    "error above Bayes",
    "context's share",
    "latent decoded\n(grey: before training)",
    "answer moved by patching\n(grey: a random step)",
    "error added by ablation",
)


def comparison(learners: Mapping[str, tuple[str, pd.DataFrame]]) -> Picture:
    """One figure on several learners.

    By row: the error above exact Bayes' by position; the context's share by dose, and exact Bayes'; how well the latent
    is decoded by place, and in the untrained model; how far the answer moves where the latent is patched, 1 being all
    the way, and where as long a step is random; and the error that the mean ablation of each component adds. Bands and
    whiskers are 95% intervals over seeds. What a table does not hold is said in its place.

    Args:
        learners: by name, what the dose of its conflict is, and a table of seed, measure, where and value.
    """
    picture = Picture(_WIDTH, _HEIGHT)
    grid = picture.figure.subplots(len(learners), len(_TITLES), squeeze=False, width_ratios=(1, 1.1, 1.1, 1.1, 1.6))
    for ax, title in zip(grid[0], _TITLES, strict=True):
        ax.set_title(title)
    for row, (name, (dose, table)) in zip(grid, learners.items(), strict=True):
        table = table.assign(value=pd.to_numeric(table["value"], errors="coerce"))
        by = {measure: _by_place(rows) for measure, rows in table.groupby("measure")}
        _above_bayes(row[0], by)
        _shares(row[1], by, dose)
        _bars(row[2], [(by.get("decodability"), BLUE), (by.get("decodability untrained"), GREY)])
        moved, random = next((pair for pair in _MOVED if pair[0] in by), ("", ""))
        found = [
            one if one is None else one[one.index.str.fullmatch(_PLACE)] for one in (by.get(moved), by.get(random))
        ]
        if moved == "moved KL":  # a distance that is left, of 1
            found = [None if one is None else one.assign(mean=1 - one["mean"]) for one in found]
        _bars(row[3], list(zip(found, (BLUE, GREY), strict=True)))
        _bars(row[4], [(by.get("error added without"), ORANGE)])
        row[0].set_ylabel("\n".join([textwrap.fill(name.replace("-", " "), 16), row[0].get_ylabel()]).strip())
    experiment.finish(grid.flat, title=10, label=8, tick=6)
    return picture


def _by_place(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds and half its interval's width, by place, in the table's order."""
    found = {where: over_seeds(one["value"]) for where, one in rows.groupby("where", sort=False)}
    return pd.DataFrame({"mean": one.mean, "reach": one.reach} for one in found.values()).set_axis(list(found))


def _above_bayes(ax: Any, by: Mapping[Any, pd.DataFrame]) -> None:
    for measure, unit in ABOVE_BAYES.items():
        if measure in by:
            _line(ax, by[measure], color=BLUE, marker="o", markersize=2)
            ax.set(xlabel="position", ylabel=f"({unit})", ylim=(0, None))
            whole_ticks(ax.xaxis)
            return
    _none(ax, "none: exact Bayes\nis not known")


def _shares(ax: Any, by: Mapping[Any, pd.DataFrame], dose: str) -> None:
    if "share" not in by:
        return _none(ax)
    _line(ax, by["share"], color=BLUE, label="model")
    if "share of bayes" in by:
        _line(ax, by["share of bayes"], color="black", linestyle="--", linewidth=1, label="exact Bayes")
    ax.set(xlabel=dose, ylim=(min(0.0, ax.get_ylim()[0]), None))
    if ax.get_subplotspec().is_first_row():  # which the other rows share
        ax.legend(frameon=False, fontsize=7)


def _line(ax: Any, found: pd.DataFrame, **options: Any) -> None:
    """A line with its band."""
    at, mean, reach = found.index.astype(float), found["mean"], found["reach"]
    ax.plot(at, mean, **options)
    ax.fill_between(at, mean - reach, mean + reach, color=options["color"], alpha=0.2, linewidth=0)


def _bars(ax: Any, found: list[tuple[pd.DataFrame | None, str]]) -> None:
    """Bars by place, with their whiskers; the first of several in front."""
    known = [(one, colour) for one, colour in found if one is not None]
    if not known:
        return _none(ax)
    places, width = known[0][0].index, 0.8 / len(known)
    for index, (one, colour) in enumerate(known):
        at = [place + index * width for place in range(len(places))]
        one = one.reindex(places)
        ax.bar(at, one["mean"], width, yerr=one["reach"].fillna(0), color=colour, error_kw={"linewidth": 0.7})
    middles = [place + 0.4 - width / 2 for place in range(len(places))]
    ax.set_xticks(middles, [_brief(place) for place in places], rotation=90 if len(places) > _UPRIGHT else 0)
    ax.axhline(0, color="black", linewidth=0.5)


def _brief(place: str) -> str:
    return place.removeprefix("after ").replace("attention ", "A").replace("MLP ", "M")


def _none(ax: Any, why: str = "not measured") -> None:
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color=GREY, fontsize=8)
    ax.set(xticks=[], yticks=[])
