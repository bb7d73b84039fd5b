"""A path patching sweep as a heat map."""

import math
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from hijack_lens.hooks.edges import name_of
from hijack_lens.show.style import Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.hooks.sweep_results import PathSweep


_NO_EDGE = "#dcdcdc"
_CELLS_WITH_NUMBERS = 250
_NAMES_SHOWN = 60


def edge_map(sweep: "PathSweep") -> Picture:
    """Effects of a sweep's edges: senders against the inputs of receivers. Cells without an edge are grey.

    Colours are centred on no effect.
    """
    senders = list(dict.fromkeys(edge.sender for edge in sweep.edges))
    # The embedding comes first and reaches every input, in the model's order.
    inputs = list(dict.fromkeys((edge.receiver, edge.via) for edge in sweep.edges))
    image = np.full((len(senders), len(inputs)), np.nan)
    for edge, effect in zip(sweep.edges, sweep.effect.cpu().double().tolist(), strict=True):
        image[senders.index(edge.sender), inputs.index((edge.receiver, edge.via))] = effect
    spread = float(np.max(np.abs(image), initial=0.0, where=np.isfinite(image))) or 1.0

    picture = Picture(3.4 + min(0.55 * len(inputs), 14.0), 2.6 + min(0.38 * len(senders), 12.0))
    ax = picture.figure.add_subplot()
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad=_NO_EDGE)
    drawn = ax.imshow(image, cmap=colours, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest")
    every = [name_of(receiver, sweep.circuit) + (f" {via}" if via != "unembed" else "") for receiver, via in inputs]
    columns, rows = (range(0, size, -(-size // _NAMES_SHOWN)) for size in (len(inputs), len(senders)))
    ax.set_xticks(columns, [every[column] for column in columns], rotation=90, fontsize=9)
    ax.set_yticks(rows, [name_of(senders[row], sweep.circuit) for row in rows], fontsize=9)
    ax.set_xlabel("receiver and its input (grey: no such edge)")
    ax.set_ylabel("sender")
    if image.size <= _CELLS_WITH_NUMBERS:
        decimals = max(0, 1 - math.floor(math.log10(spread)))
        for (row, column), effect in np.ndenumerate(image):
            if np.isfinite(effect):
                colour = "white" if abs(effect) > 0.6 * spread else "black"
                text = f"{effect:+.{decimals}f}" if round(effect, decimals) else "0"
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    picture.figure.colorbar(drawn, ax=ax, label=f"change of {sweep.metric}", pad=0.02)
    sent = "clean messages, corrupted run" if sweep.direction == "denoise" else "corrupted messages, clean run"
    picture.figure.suptitle(f"path patching, edge by edge: {sent}", fontsize=10)
    return picture
