"""Tables and reports as data, text or HTML; results that display themselves through registered functions."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hijack_lens.core.showing import registered

if TYPE_CHECKING:
    import rich.table

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "Ġ": "␣", "Ċ": "⏎", "▁": "␣"}
_ALIGN = {"l": "left", "r": "right"}


def visible(text: str) -> str:
    """A token's text with white space made visible, including the forms of byte-level tokenizers."""
    return "".join(_VISIBLE.get(character, character) for character in text)


def widened(x: Tensor) -> Tensor:
    """Numbers in half precision as float32, since sums and differences of them need more digits; others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tidy(axes: Mapping[str, Iterable[Any]], **columns: Tensor) -> Any:
    """Tensors of one shape as a DataFrame: a row per cell, a column per axis with its labels, and one per tensor."""
    import pandas as pd

    index = pd.MultiIndex.from_product(map(list, axes.values()), names=list(axes))
    flat = {name: tensor.detach().cpu().double().flatten().numpy() for name, tensor in columns.items()}
    return pd.DataFrame(flat, index=index).reset_index()


class Markup(str):
    """A cell that is already HTML."""


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns.

    Attributes:
        columns: their names.
        rows: cells, each text or `Markup`.
        align: a letter per column, "l" or "r"; the last one holds for all further columns.
        title: the table's title; may be empty.
        ruled: rows with a line below them.
        total: whether the last row is the sum of the others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = "lr"
    title: str = ""
    ruled: Sequence[int] = ()
    total: bool = False

    def rich(self, width: int | None = None) -> "rich.table.Table":
        """The table for a terminal; a line per cell where its words and numbers do not fit in the width."""
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None)
        cells = zip(self.columns, *self.rows, strict=True)
        needed = sum(3 + max(len(word) for cell in column for word in cell.split() or [""]) for column in cells) + 1
        if width is not None and needed > width:
            table.show_header, table.box = False, box.SIMPLE
            for name in ("column", "cell"):
                table.add_column(name, overflow="fold")
            for row in self.rows:
                for column, cell in zip(self.columns, row, strict=True):
                    table.add_row(column, cell, end_section=column == self.columns[-1])
            return table
        for column, side in zip(self.columns, self._sides(), strict=True):
            table.add_column(column, justify=side)
        for index, row in enumerate(self.rows):
            table.add_row(*row, end_section=index in self.ruled)
        return table

    def text(self) -> str:
        """As plain text, 120 characters wide at most."""
        from rich.console import Console

        # In a notebook, a console would display the table as well.
        buffer = io.StringIO()
        Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False).print(self.rich())
        return buffer.getvalue().rstrip()

    def html(self) -> str:
        """As an HTML table with its title above."""
        sides = self._sides()

        def line(cells: Sequence[str], tag: str, weight: str = "") -> str:
            written = (
                f"<{tag} style='text-align:{side}{weight}'>{cell if isinstance(cell, Markup) else escape(cell)}</{tag}>"
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{''.join(written)}</tr>"

        last = len(self.rows) - 1 if self.total else None
        body = "".join(line(row, "td", ";font-weight:600" * (index == last)) for index, row in enumerate(self.rows))
        title = f"<p><b>{escape(self.title)}</b></p>" if self.title else ""
        return f"{title}<table><thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"

    def _sides(self) -> list[Any]:
        align = self.align + self.align[-1] * (len(self.columns) - len(self.align))
        return [_ALIGN[letter] for letter in align]


@dataclass(frozen=True)
class Report:
    """What a result says of itself.

    Attributes:
        title: what it is.
        lines: what it found, in words.
        tables: the full numbers.
        notes: what else a reader should know.
        figure: draws it as an SVG element; called only when shown.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    figure: Callable[[], str] | None = None

    def text(self) -> str:
        """For a terminal."""
        return "\n".join([self.title, *self.lines, *(table.text() for table in self.tables), *self.notes])

    def html(self) -> str:
        """For a notebook or a page: the figure above the tables."""
        lines = "".join(f"<br>{escape(line)}" for line in self.lines)
        figure = "" if self.figure is None else self.figure()
        notes = "".join(f"<p style='font-size:85%'>{escape(note)}</p>" for note in self.notes)
        tables = "".join(table.html() for table in self.tables)
        return f"<div class='hijack-lens'><p><b>{escape(self.title)}</b>{lines}</p>{figure}{tables}{notes}</div>"


@singledispatch
def report_of(result: Any) -> Report:
    """What a result says of itself, as lines and tables.

    Raises:
        TypeError: if it is not a result.

    Examples:
        >>> report = hl.show.report_of(hl.explain(model, prompt))
        >>> report.title
        "The context hijacks the weights: after 'q' the model prefers 'e' to 'u', by 3.27 logits."
        >>> [table.title for table in report.tables][0]
        'logits at position 23, by path'
    """
    raise TypeError(f"result must be a result of hijack_lens, got {type(result).__name__}")


@singledispatch
def picture_of(result: Any) -> Any:
    """A result drawn: a `show.Picture`.

    The options depend on the result: `normalised=` for a `Sweep`, `key=` for a `ScoreAttribution`, `query_tokens=`
    and `answers=` for a `ContextMemory` or `MemoryConflict`, `most=` for `MemoryNeurons`.

    Raises:
        TypeError: if it has no picture.

    Examples:
        >>> hl.show.picture_of(hl.find_circuit(model).evidence).save("circuit.png")
    """
    raise TypeError(f"result must be a result of hijack_lens with a picture, got {type(result).__name__}")


@singledispatch
def html_of(result: Any) -> str | None:
    """A result for a notebook; `None` if its picture says it all.

    Examples:
        >>> hl.show.html_of(hl.attribute_scores(model, prompt))[:4]
        '<div'
    """
    return report_of(result).html()


class Shown:
    """A result that prints and displays itself, with the functions registered by the module that `shown_by` names."""

    def __repr__(self) -> str:
        registered()
        return report_of(self).text()

    def _repr_html_(self) -> str | None:
        registered()
        return html_of(self)


class Drawn(Shown):
    """A result that also draws itself."""

    def picture(self, *chosen: Any, **options: Any) -> Any:
        """The result drawn: a `show.Picture`. The options depend on the result: see `show.picture_of`."""
        registered()
        return picture_of(self, *chosen, **options)
