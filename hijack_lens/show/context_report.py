"""A context's memory in words: text for a terminal, HTML for a notebook."""

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hijack_lens.memories.token_tables import centred

if TYPE_CHECKING:
    from hijack_lens.memories.context import ContextMemory
    from hijack_lens.show.style import Picture


ROWS_SHOWN = 20


def memory_text(memory: "ContextMemory") -> str:
    """What the memory says to each token that the context holds, as plain text."""
    return "\n".join([_head(memory), text_table(_COLUMNS, _rows(memory)), _foot(memory)])


def memory_html(memory: "ContextMemory") -> str:
    """The heat map over the table."""
    return (
        f"<div class='hijack-lens'><p><b>{escape(_head(memory))}</b></p>{fitted_svg(memory.picture())}"
        f"{html_table(_COLUMNS, _rows(memory))}<p style='font-size:85%'>{escape(_foot(memory))}</p></div>"
    )


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text; numbers, which begin with a sign, are aligned to the right."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if any(_is_number(row[index]) for row in rows) else "left")
    for row in rows:
        table.add_row(*row)
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False).print(table)
    return buffer.getvalue().rstrip()


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in HTML."""
    numbers = [any(_is_number(row[index]) for row in rows) for index in range(len(columns))]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag} style='text-align:{'right' if number else 'left'}'>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, numbers, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def fitted_svg(picture: "Picture") -> str:
    """A picture as an SVG element that is as wide as it should be, or as the page is."""
    return picture.svg().replace("<svg", "<svg style='max-width:100%;height:auto'", 1)


_COLUMNS = ("query", "says", "logit above the mean", "then", "logit above the mean", "attends most to", "attention")


def _head(memory: "ContextMemory") -> str:
    return (
        f"ContextMemory({len(memory.queries)} queries, {len(memory.answers)} answers), "
        f"{memory.circuit.label(memory.head)}: what it makes of {memory.position} tokens of context"
    )


def _foot(memory: "ContextMemory") -> str:
    hidden = len(memory.chosen(None, None, len(memory.queries))[0]) - len(_rows(memory))
    more = f"; {hidden} more of them are not shown" if hidden else ""
    if not bool(memory.occurs.any()):
        return f"None of the query tokens occurs in the context{more}."
    return f"Query tokens that occur in the context{more}."


def _rows(memory: "ContextMemory") -> list[list[str]]:
    table, rows = centred(memory.values), []
    sources = memory.source_texts
    for row in memory.chosen(None, None, ROWS_SHOWN)[0]:
        best = table[row].topk(min(2, len(memory.answers)))
        says = [(memory.answer_texts[i], f"{x:+.3f}") for x, i in zip(*(y.tolist() for y in best), strict=True)]
        source = int(memory.attention[row].argmax())
        text = memory.query_texts[row] if source == memory.position else sources[source]
        cells = [cell for pair in [*says, ("", "")][:2] for cell in pair]
        rows.append(
            [memory.query_texts[row], *cells, f"{source} {text!r}", f"{float(memory.attention[row, source]):.1%}"]
        )
    return rows


def _is_number(cell: str) -> bool:
    return len(cell) > 1 and cell[0] in "+-" and cell[1].isdigit()
