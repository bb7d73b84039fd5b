"""The context's memory, and both memories side by side: query tokens against answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.circuit import Margin
from hijack_lens.core.inputs import Tokens
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.memories.conflict import MemoryConflict
from hijack_lens.memories.context import ContextMemory
from hijack_lens.memories.token_tables import centred
from hijack_lens.show.style import MAP_WIDEST, ON_CELL, Picture, frameless, heatmap, name_rows, spread_of, stacked_bars

_ROWS_SHOWN = 20
_MOST = 32
_CELL = 0.24  # inches
_PARTS = ("context", "weights", "rest", "margin")


@report_of.register
def context_report(memory: ContextMemory) -> Report:
    """What the memory says after each token that the context holds."""
    table, rows = centred(memory.values), []
    for row in memory.chosen(None, None, _ROWS_SHOWN)[0]:
        best = table[row].topk(min(2, len(memory.answers)))
        says = [(memory.answer_texts[i], f"{x:+.3f}") for x, i in zip(*(y.tolist() for y in best), strict=True)]
        source = int(memory.attention[row].argmax())
        text = memory.query_texts[row] if source == memory.position else memory.source_texts[source]
        cells = [cell for pair in [*says, ("", "")][:2] for cell in pair]
        rows.append(
            [memory.query_texts[row], *cells, f"{source} {text!r}", f"{float(memory.attention[row, source]):.1%}"]
        )
    hidden = len(memory.chosen(None, None, len(memory.query_tokens))[0]) - len(rows)
    more = f"; {hidden} more of them are not shown" if hidden else ""
    note = f"Query tokens that occur in the context{more}."
    if not bool(memory.occurs.any()):
        note = f"None of the query tokens occurs in the context{more}."
    columns = ["query", "says", "logit above the mean", "then", "logit above the mean", "attends most to", "attention"]
    return Report(
        f"ContextMemory({len(memory.query_tokens)} queries, {len(memory.answers)} answers), "
        f"{memory.circuit.label(memory.head)}: what it makes of {memory.position} tokens of context",
        tables=[Table(columns, rows, align="llrlrll")],
        notes=[note],
    )


@report_of.register
def conflict_report(conflict: MemoryConflict) -> Report:
    """Who says what, and who wins, for each token that the context holds."""
    found = conflict.to_pandas()
    seen = found[found["occurs"]]
    against = seen[seen["conflict"]]["winner"]
    won = ", ".join(f"{who} {int((against == who).sum())}" for who in ("context", "weights", "neither"))
    rows = [
        [row["query"], row["in_context"], row["global"]]
        + [f"{row[part]:+.3f}" if row["conflict"] else "" for part in _PARTS]
        + [row["winner"], row["predicted"]]
        for _, row in found.iloc[conflict.chosen(None, None, _ROWS_SHOWN)[0]].iterrows()
    ]
    hidden = len(conflict.chosen(None, None, len(conflict.query_tokens))[0]) - len(rows)
    more = f"{hidden} more query tokens that it holds are not shown. " if hidden else ""
    return Report(
        f"MemoryConflict({len(conflict.query_tokens)} queries, {len(conflict.answers)} answers): of {len(seen)} query "
        f"tokens in the context, {len(against)} in conflict; won by {won}",
        tables=[
            Table(["query", "context says", "weights say", *_PARTS, "winner", "predicted"], rows, align="lllrrrrl")
        ],
        notes=[
            "Margins are logit[what the context says] - logit[what the weights say]. "
            f"{more}Sum of the memories minus the model's logits: at most {conflict.completeness_error:.1e}."
        ],
    )


@picture_of.register
def context_map(memory: ContextMemory, query_tokens: Tokens = None, answers: Tokens = None) -> Picture:
    """A context's memory, each row less its mean over the answers shown.

    Args:
        memory: what to show.
        query_tokens: rows, by id or text; by default tokens that the context holds, the most frequent first.
        answers: columns, likewise.
    """
    rows, columns = memory.chosen(query_tokens, answers, _MOST)
    picture = Picture(2.0 + min(1.2 * _CELL * len(columns), MAP_WIDEST), 1.4 + 1.2 * _CELL * len(rows))
    ax = picture.figure.add_subplot()
    drawn = _map(ax, memory, _image(memory.values, rows, columns), rows, columns)
    ax.set_ylabel("query: the last token")
    ax.set_title(f"{memory.circuit.label(memory.head)}: the context's memory", fontsize=10)
    picture.figure.colorbar(drawn, ax=ax, label="logit, less the row's mean", pad=0.02)
    return picture


@picture_of.register
def conflict_maps(conflict: MemoryConflict, query_tokens: Tokens = None, answers: Tokens = None) -> Picture:
    """Both memories side by side in one scale of colours, and the margins between what they say.

    Each row is shown minus its mean over the answers shown, since what these share makes no difference.
    A ring marks what the context says, a square what the weights say. In rows in conflict, both are drawn in
    bold, and the margin shows who wins.

    Args:
        conflict: what to show.
        query_tokens: rows, by id or text; by default tokens that the context holds, the most frequent first.
        answers: columns, likewise; by default these and what either memory says in one of the rows.
    """
    rows, columns = conflict.chosen(query_tokens, answers, _MOST)
    c, g = (candidate[rows].tolist() for candidate in (conflict.in_context, conflict.global_candidate))
    if answers is None:
        columns = sorted({*columns, *c, *g})
    images = [_image(table, rows, columns) for table in (conflict.context, conflict.weights)]
    wide = min(_CELL * len(columns), MAP_WIDEST)
    cell = wide / len(columns) / _CELL
    picture = Picture(7.0 + 2 * wide, 1.6 + _CELL * max(len(rows), 4))
    axes = picture.figure.subplots(1, 3, sharey=True, width_ratios=[wide, wide, 3.0])
    name_rows(*axes)
    for ax, image, title in zip(axes, images, ("○ the context's memory", "□ the weights' memory"), strict=False):
        drawn = _map(ax, conflict, image, rows, columns, spread_of(np.stack(images)))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("answer (bold: in conflict)")
        for colour, halo in (("white", 1.6), (ON_CELL, 0.0)):  # legible on cells of any colour
            for candidates, marker in ((c, "o"), (g, "s")):
                for row, answer in enumerate(candidates):
                    if answer in columns:
                        width = halo + (1.8 if c[row] != g[row] else 0.7)
                        ax.plot(
                            columns.index(answer), row, marker, mfc="none", mec=colour, ms=9 * cell, mew=width * cell
                        )
    axes[0].set_ylabel("query: the last token")
    picture.figure.colorbar(drawn, ax=axes[:2].tolist(), label="logit, less the row's mean", pad=0.02)
    _margins(axes[2], conflict, rows)
    return picture


def _margins(ax: Any, conflict: MemoryConflict, rows: Sequence[int]) -> None:
    """Margins of the rows in conflict, by memory."""
    margin = conflict.margin
    against = [place for place, row in enumerate(rows) if bool(conflict.conflicts[row])]
    chosen = [rows[place] for place in against]
    stacked_bars(ax, against, Margin(*(part[chosen] for part in (margin.context, margin.weights, margin.rest))), 0.7)
    total = margin.total[chosen].detach().cpu().double().numpy()
    ax.plot(total, against, "D", color="black", ms=5, label="total")
    ax.set_xlabel("← weights win      context wins →")
    ax.set_title("margin: logit ○ − logit □", fontsize=10)
    frameless(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False, fontsize=9)


def _image(table: Float[Tensor, "query answer"], rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    return centred(table[list(rows)][:, list(columns)]).detach().cpu().double().numpy()


def _map(
    ax: Any, table: Any, image: np.ndarray, rows: Sequence[int], columns: Sequence[int], spread: float | None = None
) -> Any:
    ax.set_xlabel("answer")
    return heatmap(
        ax,
        image,
        [table.query_texts[i] for i in rows],
        [table.answer_texts[i] for i in columns],
        spread=spread,
        fontsize=8,
        family="monospace",
    )
