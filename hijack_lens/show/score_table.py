"""Attention scores by path as a table: text for a terminal, HTML for a notebook."""

import io
from html import escape
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hijack_lens.attribution.score_attribution import ScoreAttribution


_SHOWN = 12
_NEGLIGIBLE = 1e-3
"""Cells below this share of the largest one are not shown one by one."""

_KEYS_NAMED = 3

Row = tuple[str, str, tuple[float | None, ...]]
"""Query path, key path, and a number per column where it has one."""


def rich_table(result: "ScoreAttribution") -> Table:
    """The cells that matter most to the key that gets most attention."""
    table = Table(title=_title(result))
    for column in ("query path", "key path"):
        table.add_column(column)
    for column in _columns(result):
        table.add_column(column, justify="right")
    cells, rest, total = _rows(result)
    for index, (query_path, key_path, numbers) in enumerate([*cells, *rest]):
        table.add_row(query_path, key_path, *map(_number, numbers), end_section=index == len(cells) + len(rest) - 1)
    table.add_row(*total[:2], *map(_number, total[2]))
    return table


def as_text(result: "ScoreAttribution") -> str:
    """The table as plain text, under a line that says what it is of."""
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
    console.print(rich_table(result))
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(result.axes, result.values.shape, strict=True))
    head = f"ScoreAttribution({shape}), completeness error {result.completeness_error:.1e}"
    return "\n".join([head, _attention(result), buffer.getvalue().rstrip()])


def as_html(result: "ScoreAttribution") -> str:
    """The heat map over the table."""
    left = " style='text-align:left'"
    head = "".join(f"<th{left}>{column}</th>" for column in ("query path", "key path"))
    head += "".join(f"<th>{escape(column)}</th>" for column in _columns(result))
    cells, rest, total = _rows(result)
    body = "".join(
        f"<tr style='font-weight:{600 if row is total else 400}'>"
        + "".join(f"<td{left}>{escape(word)}</td>" for word in row[:2])
        + "".join(f"<td>{_number(number)}</td>" for number in row[2])
        + "</tr>"
        for row in (*cells, *rest, total)
    )
    return (
        f"<div class='hijack-lens'><p><b>{escape(_title(result))}</b><br>{escape(_attention(result))}</p>"
        f"{result.picture().svg()}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p style='font-size:85%'>Sum over paths minus the model's scores: at most "
        f"{result.completeness_error:.1e}.</p>"
        "</div>"
    )


def _title(result: "ScoreAttribution") -> str:
    head, query, key = result.circuit.label(result.head), result.query, result.top_key
    return f"{head}, from {query} {result.texts[query]!r} to {key} {result.texts[key]!r}: its score, by path"


def _attention(result: "ScoreAttribution") -> str:
    order = result.attention.argsort(descending=True, stable=True)[:_KEYS_NAMED].tolist()
    named = (
        f"{result.keys[i]} {result.texts[result.keys[i]]!r} {float(result.attention[i]):.1%}"
        f" (score {float(result.scores[i]):+.3f})"
        for i in order
    )
    return (
        f"{result.circuit.label(result.head)} at {result.query} {result.texts[result.query]!r} attends to "
        + ", ".join(named)
    )


def _has_odds(result: "ScoreAttribution") -> bool:
    return len(result.keys) == result.query + 1 > 1


def _columns(result: "ScoreAttribution") -> tuple[str, ...]:
    return ("score", "log-odds against all other keys") if _has_odds(result) else ("score",)


def _rows(result: "ScoreAttribution") -> tuple[list[Row], list[Row], Row]:
    """The largest cells, whatever else there is, and the sum of all."""
    tables = [result.values[result.keys.index(result.top_key)]]
    if _has_odds(result):
        odds = result.log_odds()
        tables.append(odds.values)
    # What every key's score shares tells nothing about where the head looks: with competitors, those decide.
    sizes = tables[-1].abs().flatten()
    order = sizes.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    shown = [index for index in order if bool(sizes[index] > _NEGLIGIBLE * sizes.max())]
    width = len(result.key_terms)
    cells: list[Row] = [
        (
            result.query_labels[index // width],
            result.key_labels[index % width],
            tuple(float(table.flatten()[index]) for table in tables),
        )
        for index in shown
    ]
    sums = [float(table.sum()) for table in tables]
    rest: list[Row] = []
    hidden = len(sizes) - len(shown)
    if hidden:
        visible = torch.tensor(shown, dtype=torch.long, device=sizes.device)
        left = tuple(float(table.flatten().index_fill(0, visible, 0.0).sum()) for table in tables)
        rest.append((f"{hidden} more", "", left))
    if _has_odds(result) and len(odds.against) > 1:
        rest.append(("less the entropy of the other keys' shares", "", (None, -odds.entropy)))
        sums[1] -= odds.entropy
    return cells, rest, ("sum", "", tuple(sums))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
