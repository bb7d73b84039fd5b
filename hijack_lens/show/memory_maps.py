"""The memories as heat maps: query tokens against answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hijack_lens.memories.token_tables import Tokens, centred
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.memories.conflict import MemoryConflict
    from hijack_lens.memories.context import ContextMemory


_MOST = 32
_CELL = 0.24  # inches


def context_map(memory: "ContextMemory", queries: Tokens = None, answers: Tokens = None) -> Picture:
    """A context's memory, each row less its mean over the answers shown.

    Args:
        memory: what to show.
        queries: rows, by id or text; by default tokens that the context holds, the most frequent first.
        answers: columns, likewise.
    """
    rows, columns = memory.chosen(queries, answers, _MOST)
    picture = Picture(2.2 + 1.2 * _CELL * len(columns), 1.4 + 1.2 * _CELL * len(rows))
    ax = picture.figure.add_subplot()
    image = _image(memory.values, rows, columns)
    drawn = _map(ax, image, float(np.abs(image).max()) or 1.0)
    _name_axes(ax, memory, rows, columns)
    ax.set_title(f"{memory.circuit.label(memory.head)}: the context's memory", fontsize=10)
    picture.figure.colorbar(drawn, ax=ax, label="logit, less the row's mean", pad=0.02)
    return picture


def conflict_maps(conflict: "MemoryConflict", queries: Tokens = None, answers: Tokens = None) -> Picture:
    """Both memories side by side in one scale of colours, and the margins between what they say.

    Each row is less its mean over the answers shown, since what these share decides nothing between them.
    A ring marks what the context says, a square what the weights say; in a row of conflict both are drawn in
    bold, and the margin shows who wins.

    Args:
        conflict: what to show.
        queries: rows, by id or text; by default tokens that the context holds, the most frequent first.
        answers: columns, likewise; by default these and what either memory says in one of the rows.
    """
    rows, columns = conflict.chosen(queries, answers, _MOST)
    c, g = (candidate[rows].tolist() for candidate in (conflict.in_context, conflict.global_candidate))
    if answers is None:
        columns = sorted({*columns, *c, *g})
    images = [_image(table, rows, columns) for table in (conflict.context, conflict.weights)]
    spread = max(float(np.abs(image).max()) for image in images) or 1.0
    wide = _CELL * len(columns)
    picture = Picture(6.0 + 2 * wide, 1.6 + _CELL * max(len(rows), 4))
    axes = picture.figure.subplots(1, 3, sharey=True, width_ratios=[wide, wide, 3.0])
    for ax, image, title in zip(axes, images, ("the context's memory", "the weights' memory"), strict=False):
        drawn = _map(ax, image, spread)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("answer")
        for colour, halo in (("white", 1.6), ("black", 0.0)):  # legible on cells of any colour
            for candidates, marker in ((c, "o"), (g, "s")):
                for row, answer in enumerate(candidates):
                    if answer in columns:
                        width = halo + (1.8 if c[row] != g[row] else 0.7)
                        ax.plot(columns.index(answer), row, marker, mfc="none", mec=colour, ms=9, mew=width)
    _name_axes(axes[0], conflict, rows, columns)
    axes[1].set_xticks(range(len(columns)), [conflict.answer_texts[i] for i in columns])
    for ax in axes[:2]:
        ax.tick_params(axis="x", labelsize=8, labelfontfamily="monospace")
    picture.figure.colorbar(drawn, ax=axes[:2].tolist(), label="logit, less the row's mean", pad=0.02)
    _margins(axes[2], conflict, rows)
    picture.figure.suptitle("○ what the context says   □ what the weights say   (bold: in conflict)", fontsize=10)
    return picture


def _margins(ax: Any, conflict: "MemoryConflict", rows: Sequence[int]) -> None:
    """Margins of the rows in conflict, by memory."""
    margin = conflict.margin
    against = [place for place, row in enumerate(rows) if bool(conflict.conflicts[row])]
    ends = {side: np.zeros(len(against)) for side in (1, -1)}
    chosen = [rows[place] for place in against]
    for memory, colour in COLOURS.items():
        values = getattr(margin, memory)[chosen].detach().cpu().double().numpy()
        left = np.where(values >= 0, ends[1], ends[-1])
        ax.barh(against, values, left=left, color=colour, height=0.7, label=memory)
        ends[1], ends[-1] = ends[1] + np.maximum(values, 0), ends[-1] + np.minimum(values, 0)
    total = margin.total[chosen].detach().cpu().double().numpy()
    ax.plot(total, against, "D", color="black", ms=5, label="total")
    ax.axvline(0, color="black", linewidth=1)
    ax.set_xlabel("← weights win      context wins →")
    ax.set_title("margin: logit ○ − logit □", fontsize=10)
    ax.tick_params(axis="y", labelleft=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False, fontsize=9)


def _image(table: Float[Tensor, "query answer"], rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    return centred(table[list(rows)][:, list(columns)]).detach().cpu().double().numpy()


def _map(ax: Any, image: np.ndarray, spread: float) -> Any:
    return ax.imshow(image, cmap=DIVERGING, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest")


def _name_axes(ax: Any, table: Any, rows: Sequence[int], columns: Sequence[int]) -> None:
    ax.set_xticks(range(len(columns)), [table.answer_texts[i] for i in columns], fontsize=8, family="monospace")
    ax.set_yticks(range(len(rows)), [table.query_texts[i] for i in rows], fontsize=8, family="monospace")
    ax.set_xlabel("answer")
    ax.set_ylabel("query: the last token")
