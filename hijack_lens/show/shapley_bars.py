"""Shapley values as bars, and interactions as a heat map."""

import math
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from hijack_lens.show.style import Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.attribution.shapley_values import ShapleyValues


_BAR = "#0072B2"  # Okabe & Ito's blue
_NOT_SCORED = "#dcdcdc"
_PLAYERS_NAMED = 40
_PLAYERS_WITH_NUMBERS = 12


def shapley_bars(result: "ShapleyValues") -> Picture:
    """Each player's value with its 95% confidence interval; beside it what pairs add. Grey cells were not scored."""
    n = len(result.players)
    scored = bool(result.interactions.isfinite().any())
    side = max(2.4, min(0.5 * n, 9.0))
    picture = Picture(6.0 + scored * (side + 1.8), 2.0 + side)
    axes = picture.figure.subplots(1, 1 + scored, squeeze=False, sharey=True, width_ratios=[4.5, side][: 1 + scored])[0]
    named = range(0, n, -(-n // _PLAYERS_NAMED))
    names = [result.labels[i] for i in named]

    ax = axes[0]
    values, error = result.values.numpy(), (result.ci[:, 1] - result.values).numpy()
    ax.barh(range(n), values, xerr=None if result.exact else error, color=_BAR, height=0.62, ecolor="black", capsize=3)
    if n <= _PLAYERS_WITH_NUMBERS:
        for row, value in enumerate(values):
            ends = value + np.copysign(error[row], value), value
            ax.annotate(
                f"{value:+.3g}",
                (ends[0], row),
                xytext=(5 if value >= 0 else -5, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
            )
        ax.margins(x=0.2)  # for the numbers beside the bars
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(named, names)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_xlabel(f"worth: change of {result.metric}" + ("" if result.exact else "\n(95% confidence intervals)"))
    ax.set_title(f"Shapley values: {result.empty:+.3g} with none, {result.full:+.3g} with all", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    if not scored:
        return picture

    ax, image = axes[1], result.interactions.numpy()
    spread = float(np.nanmax(np.abs(image))) or 1.0
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad=_NOT_SCORED)
    drawn = ax.imshow(image, cmap=colours, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest")
    ax.set_xticks(named, names, rotation=90)
    ax.set_xlabel("with which player")
    ax.set_title("pairs (+ need each other, − do alike)", fontsize=10)
    if n <= _PLAYERS_WITH_NUMBERS:
        decimals = max(0, 1 - math.floor(math.log10(spread)))
        for (row, column), value in np.ndenumerate(image):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * spread else "black"
                text = f"{value:+.{decimals}f}" if round(value, decimals) else "0"
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    picture.figure.colorbar(drawn, ax=ax, label=f"interaction, in {result.metric}")
    return picture
