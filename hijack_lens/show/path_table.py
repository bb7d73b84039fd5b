"""A path patching sweep as a table: text for a terminal, HTML for a notebook."""

import io
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import Tensor

from hijack_lens.hooks.edges import name_of

if TYPE_CHECKING:
    from hijack_lens.hooks.sweep_results import PathSweep


_SHOWN = 20
_NEGLIGIBLE = 1e-3
"""Edges below this share of the largest effect are left out of tables."""


def rich_table(sweep: "PathSweep") -> Table:
    """The edges with the largest effects."""
    table = Table(title=_title(sweep))
    for column in ("sender", "receiver", "via"):
        table.add_column(column)
    for column in _numbers(sweep):
        table.add_column(column, justify="right")
    for words, numbers in _rows(sweep):
        table.add_row(*words, *numbers)
    return table


def as_text(sweep: "PathSweep") -> str:
    """The table as plain text."""
    buffer = io.StringIO()
    if _shown(sweep):
        # In a notebook a console would display the table at once, beside returning it.
        console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
        console.print(rich_table(sweep))
    head = f"PathSweep(edge={len(sweep.edges)}); {_runs(sweep)}"
    return "\n".join(filter(None, [head, buffer.getvalue().rstrip(), _hidden(sweep)]))


def as_html(sweep: "PathSweep") -> str:
    """The heat map over the table."""
    left = " style='text-align:left'"
    head = "".join(f"<th{left}>{column}</th>" for column in ("sender", "receiver", "via"))
    head += "".join(f"<th>{column}</th>" for column in _numbers(sweep))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{left}>{escape(word)}</td>" for word in words)
        + "".join(f"<td>{number}</td>" for number in numbers)
        + "</tr>"
        for words, numbers in _rows(sweep)
    )
    return (
        f"<div class='hijack-lens'><p><b>{escape(_title(sweep))}</b><br>{escape(_runs(sweep))}</p>"
        f"{sweep.picture().svg()}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p style='font-size:85%'>{_hidden(sweep)}</p></div>"
    )


def _title(sweep: "PathSweep") -> str:
    clean, corrupted = ("messages", "run") if sweep.direction == "denoise" else ("run", "messages")
    return f"{sweep.metric}, edge by edge: clean {clean}, corrupted {corrupted}"


def _runs(sweep: "PathSweep") -> str:
    return f"{sweep.metric}: {sweep.clean:+.4g} clean, {sweep.corrupted:+.4g} corrupted"


def _numbers(sweep: "PathSweep") -> tuple[str, ...]:
    return ("value", "effect") if sweep.clean == sweep.corrupted else ("value", "effect", "normalised")


def _sizes(sweep: "PathSweep") -> Tensor:
    """How large each effect is, without its sign; what was not scored comes last."""
    return sweep.effect.nan_to_num(0.0).abs()


def _shown(sweep: "PathSweep") -> list[int]:
    sizes = _sizes(sweep)
    largest = sizes.argsort(descending=True, stable=True)[:_SHOWN]
    return [index for index in largest.tolist() if bool(sizes[index] > _NEGLIGIBLE * sizes.max())]


def _rows(sweep: "PathSweep") -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    columns = [sweep.values, sweep.effect]
    if sweep.clean != sweep.corrupted:
        columns.append(sweep.normalised)
    rows: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for index in _shown(sweep):
        edge = sweep.edges[index]
        words = (name_of(edge.sender, sweep.circuit), name_of(edge.receiver, sweep.circuit), edge.via)
        rows.append((words, tuple(f"{float(column[index]):+.4g}" for column in columns)))
    return rows


def _hidden(sweep: "PathSweep") -> str:
    sizes, shown = _sizes(sweep).tolist(), set(_shown(sweep))
    rest = [size for index, size in enumerate(sizes) if index not in shown]
    if not shown:
        return f"None of the {len(rest)} edges has an effect."
    several = len(rest) != 1
    return f"{len(rest)} more edge{'s' * several}, with effects of at most {max(rest):.2g}." if rest else ""
