"""Shapley values as tables: text for a terminal, HTML for a notebook."""

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hijack_lens.attribution.shapley_values import ShapleyValues


_PLAYERS_SHOWN = 30
_PAIRS_SHOWN = 10
_ABLATION = {
    "zero": "absent components write zeros",
    "mean": "absent components write the reference's mean",
    "resample": "absent components write what a reference prompt has",
    "patch": "absent components write what the reference has",
}

Rows = Sequence[Sequence[str]]


def rich_tables(result: "ShapleyValues") -> list[Table]:
    """The players' values, largest first, and the pairs with the strongest interactions."""
    tables = []
    for title, (columns, rows) in (("Shapley values", _values(result)), ("interactions", _interactions(result))):
        if not rows:
            continue
        table = Table(title=title)
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def as_text(result: "ShapleyValues") -> str:
    """The tables as plain text."""
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
    for table in rich_tables(result):
        console.print(table)
    head = f"ShapleyValues(player={len(result.players)}) of {result.metric}; {_ABLATION[result.how]}"
    return "\n".join(filter(None, [head, _runs(result), efficiency(result), buffer.getvalue().rstrip()]))


def as_html(result: "ShapleyValues") -> str:
    """The picture over the tables."""
    tables = []
    for columns, rows in (_values(result), _interactions(result)):
        if not rows:
            continue
        head, *body = (_html_row(cells, tag) for cells, tag in [(columns, "th"), *((row, "td") for row in rows)])
        tables.append(f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")
    return (
        f"<div class='hijack-lens'><p><b>What each component is worth: {escape(result.metric)}</b><br>"
        f"{_ABLATION[result.how]}; {_runs(result)}</p>{result.picture().svg()}{''.join(tables)}"
        f"<p style='font-size:85%'>{efficiency(result)}</p></div>"
    )


def efficiency(result: "ShapleyValues") -> str:
    """The check that nothing was lost in sharing out."""
    return (
        f"{result.full:+.4g} with all, {result.empty:+.4g} with none: the values sum to the difference, "
        f"{result.full - result.empty:+.4g}, within {result.efficiency_error:.1e}"
    )


def _runs(result: "ShapleyValues") -> str:
    if result.exact:
        return f"exact, from all {result.n_runs} coalitions"
    return f"estimated from {result.n_samples} random orders and their reverses, {result.n_runs} coalitions in all"


def _values(result: "ShapleyValues") -> tuple[tuple[str, ...], Rows]:
    """Names of columns, and rows."""
    table = result.to_pandas().sort_values("value", key=abs, ascending=False, kind="stable")
    columns = ("player", "value", *(("on its own", "last to come") if result.exact else ("95% interval",)))
    rows = [
        [str(row.player), f"{row.value:+.4g}"]
        + ([f"{row.alone:+.4g}", f"{row.last:+.4g}"] if result.exact else [_ci(row)])
        for row in table.head(_PLAYERS_SHOWN).itertuples()
    ]
    hidden = table["value"][_PLAYERS_SHOWN:]
    if len(hidden):
        rows.append([f"{len(hidden)} more", f"{hidden.sum():+.4g}"] + [""] * (len(columns) - 2))
    return columns, rows


def _interactions(result: "ShapleyValues") -> tuple[tuple[str, ...], Rows]:
    """The same, of pairs that were scored."""
    table = result.interactions_to_pandas().dropna()
    table = table.sort_values("interaction", key=abs, ascending=False, kind="stable")
    rows = [
        [f"{row.first} × {row.second}", f"{row.interaction:+.4g}"] + ([] if result.exact else [_ci(row)])
        for row in table.head(_PAIRS_SHOWN).itertuples()
    ]
    return ("pair", "interaction", *(() if result.exact else ("95% interval",))), rows


def _ci(row: Any) -> str:
    return f"{row.low:+.4g} … {row.high:+.4g}"


def _html_row(cells: Sequence[str], tag: str) -> str:
    first, *numbers = cells
    return (
        f"<tr><{tag} style='text-align:left'>{escape(first)}</{tag}>"
        + "".join(f"<{tag}>{escape(number)}</{tag}>" for number in numbers)
        + "</tr>"
    )
