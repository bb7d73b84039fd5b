"""Tables and reports as data, text or HTML; results that display themselves through registered functions."""

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hijack_lens.core.checks import check_path, shown
from hijack_lens.core.files import Saved, check_target, write_atomically
from hijack_lens.core.showing import registered

if TYPE_CHECKING:
    import pandas as pd
    import rich.table

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "Ġ": "␣", "Ċ": "⏎", "▁": "␣"}
_ALIGN = {"l": "left", "r": "right"}
_NUMBER = re.compile(r"[-+−]?[\d.]+%? ± [\d.]+%?|[-+−]?[\d.]+e-\d+")
"""Numbers that a browser would break into two lines."""


def visible(text: str) -> str:
    """A token's text with white space made visible, including the forms of byte-level tokenizers."""
    return "".join(_VISIBLE.get(character, character) for character in text)


def escaped(text: str) -> str:
    """A text as HTML, no number of which is broken into two lines."""
    return _NUMBER.sub(lambda number: f"<span style='white-space:nowrap'>{number[0]}</span>", escape(text))


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
    """A cell, or a part of a report, that is already HTML."""


_LINES, _WIDTH = 15, 120
"""Of a result in a terminal."""

_ROWS = 20
"""Rows of a DataFrame that a report shows."""

_LETTERS = 54
"""As wide as a table may be to fit into 420 pixels: see `NARROW`."""

_PICTURES = (".png", ".svg", ".pdf")

SHOWN_AS = (".html", ".csv", *_PICTURES)
"""The extensions of files that hold what a result shows, not the result itself."""

NARROW = """
@media (max-width: 480px) {
  .hijack-lens .wide table { font-size: 12.5px }
  .hijack-lens .wide :is(th, td) { padding: 0.15em 0.4em }
  .hijack-lens-flowing :is(tbody, tr) { display: block }
  .hijack-lens-flowing tr { padding: 0.4em 0; border-bottom: 1px solid }
  .hijack-lens .wide .hijack-lens-flowing td { display: inline-block; padding: 0 1em 0 0; white-space: normal;
    text-align: left !important }
  .hijack-lens .wide .hijack-lens-flowing :is(thead, td:empty) { display: none }
  .hijack-lens-flowing td::before { content: attr(data-column) " "; opacity: 0.75 }
}
"""
"""On a phone: tables that are too wide have no columns, but cells that bear the columns' names, and flow."""

PRINTED = """
@media print {
  .hijack-lens, .hijack-lens-view { color: #000; background: #fff; filter: none !important }
  .hijack-lens .wide { overflow: visible !important }
  .hijack-lens table { font-size: 80%; overflow-wrap: anywhere }
  :is(.hijack-lens, .hijack-lens-view) :is(svg, img) { min-width: 0 !important; max-width: 100% !important }
  .hijack-lens details::details-content { display: block; content-visibility: visible; block-size: auto }
  :is(.hijack-lens, .hijack-lens-view) :is(tr, svg, img) { break-inside: avoid }
}
"""
"""On paper: black on white, all tables open, and nothing beyond the edge."""

STYLE = (
    """
.hijack-lens { max-width: 100%; line-height: 1.45 }
.hijack-lens > .text { display: none }
.hijack-lens > .shown { display: block !important }
.hijack-lens .wide { overflow-x: auto; max-width: 100% }
.hijack-lens svg, .hijack-lens img { height: auto; max-width: none }
.hijack-lens table { border-collapse: collapse; margin: 0.6em 0; font-size: 90%; color: inherit }
.hijack-lens th, .hijack-lens td { padding: 0.2em 0.8em; color: inherit; background: none; border: 0 }
.hijack-lens thead th { border-bottom: 1px solid }
.hijack-lens td[style*="right"] { white-space: nowrap; font-variant-numeric: tabular-nums }
.hijack-lens summary { cursor: pointer; opacity: 0.8 }
.hijack-lens .note { font-size: 85%; opacity: 0.85 }
"""
    + NARROW
    + PRINTED
)
"""How results look: in the colours of the page that they stand in, be it light or dark, and as narrow as it is."""

PAGE = f"""
:root {{ color-scheme: light dark }}
body {{ font-family: system-ui, sans-serif; max-width: 1040px; margin: 1.5em auto; padding: 0 1em; line-height: 1.45 }}
@media print {{ :root {{ color-scheme: light }} body {{ max-width: none; margin: 0; padding: 0 }} }}
{NARROW}{PRINTED}"""
"""How a page of its own begins, whatever stands in it."""


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
        if width is not None and self._letters() + 1 > width:
            table.show_header, table.box = False, box.SIMPLE
            for name in ("column", "cell"):
                table.add_column(name, overflow="fold")
            for row in self.rows:
                for column, cell in zip(self.columns, row, strict=True):
                    table.add_row(column, cell)
                table.add_section()
            return table
        for column, side in zip(self.columns, self._sides(), strict=True):
            table.add_column(column, justify=side)
        for index, row in enumerate(self.rows):
            table.add_row(*row, end_section=index in self.ruled)
        return table

    def first(self, n: int) -> "Table":
        """Its first rows, how many more there are, and the total."""
        last = self.rows[len(self.rows) - self.total :]
        rows = self.rows[: len(self.rows) - self.total]
        if len(rows) <= n:
            return self
        rows, more = rows[:n], _more(len(rows) - n, len(self.columns))
        return replace(self, rows=[*rows, more, *last], ruled=[row for row in self.ruled if row < n])

    def text(self) -> str:
        """As plain text, 120 characters wide at most."""
        from rich.console import Console

        # In a notebook, a console would display the table as well.
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH, color_system=None, force_jupyter=False, markup=False).print(self.rich())
        return buffer.getvalue().rstrip()

    def html(self) -> str:
        """As an HTML table with its title above."""
        sides = self._sides()
        flows = self._letters() > _LETTERS
        names = [f" data-column='{escape(name)}'" if flows else "" for name in self.columns]

        def line(cells: Sequence[str], tag: str, weight: str = "") -> str:
            written = (
                f"<{tag}{name if tag == 'td' else ''} style='text-align:{side}{weight}'>"
                f"{cell if isinstance(cell, Markup) else escaped(cell)}</{tag}>"
                for cell, side, name in zip(cells, sides, names, strict=True)
            )
            return f"<tr>{''.join(written)}</tr>"

        last = len(self.rows) - 1 if self.total else None
        body = "".join(line(row, "td", ";font-weight:600" * (index == last)) for index, row in enumerate(self.rows))
        title = f"<p>{escaped(self.title)}</p>" if self.title else ""
        kind = " class='hijack-lens-flowing'" if flows else ""
        return f"{title}<table{kind}><thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"

    def _letters(self) -> int:
        """How wide it is, with three letters between columns, if no word or number is cut."""
        cells = zip(self.columns, *self.rows, strict=True)
        return sum(3 + max(len(word) for cell in column for word in cell.split() or [""]) for column in cells)

    def _sides(self) -> list[Any]:
        align = self.align + self.align[-1] * (len(self.columns) - len(self.align))
        return [_ALIGN[letter] for letter in align]


def _more(rows: int, columns: int) -> list[str]:
    """The row that says how many are left out."""
    return [f"… {rows} more", *[""] * (columns - 1)]


def table_of(frame: "pd.DataFrame", title: str = "", rows: int = _ROWS) -> Table:
    """A DataFrame's first rows as a table: four digits of every number."""

    import pandas as pd

    def cell(value: Any) -> str:
        if pd.isna(value):
            return "–"
        if isinstance(value, float):
            return f"{value:.4g}"
        text = str(value)
        return text if text.strip() == text else visible(text)  # of words in a sentence, it would only disturb

    numbers = [str(kind)[:3] in ("flo", "int", "uin") for kind in frame.dtypes]
    listed = [[cell(value) for value in row] for row in frame.head(rows).itertuples(index=False, name=None)]
    align = "".join("r" if number else "l" for number in numbers) or "l"
    if len(frame) > rows:
        listed.append(_more(len(frame) - rows, len(numbers)))
    return Table([str(name).replace("_", " ") for name in frame.columns], listed, align, title)


@dataclass(frozen=True)
class Report:
    """What a result says of itself.

    Attributes:
        title: what it is, and what it found, in a line.
        lines: more of that, in words.
        tables: the full numbers.
        notes: what else a reader should know.
        figure: draws it, as HTML; called only when shown.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    figure: Callable[[], str] | None = None

    def text(self) -> str:
        """For a terminal, in full."""
        return "\n".join([self.title, *self.lines, *(table.text() for table in self.tables), *self.notes])

    def short(self) -> str:
        """For a terminal, in 15 lines at most: what it is, and the top of the first table."""
        said = "\n".join([self.title, *self.lines]).splitlines()[:_LINES]
        for table in self.tables[:1]:
            for n in range(min(len(table.rows), _LINES - len(said)), 0, -1):
                top = table.first(n).text().splitlines()
                if len(said) + len(top) <= _LINES:
                    return "\n".join([*said, *top])
        return "\n".join(said)

    def html(self) -> str:
        """For a notebook or a page: what it is, its figure, and the tables folded below.

        Where a notebook is not trusted, or shown by a site that strips styles, the text stands in for all that.
        """
        return (
            f"<div class='hijack-lens'><style>{STYLE}</style><pre class='text'>{escape(self.short())}</pre>"
            f"<div class='shown' hidden=''>{self.body()}</div></div>"
        )

    def body(self) -> str:
        """The same, to stand in a page that has the style and runs."""
        lines = "".join(f"<br>{escaped(line)}" for line in self.lines)
        figure = "" if self.figure is None else f"<div class='wide'>{self.figure()}</div>"
        notes = "".join(f"<p class='note'>{escaped(note)}</p>" for note in self.notes)
        tables = "".join(table.html() for table in self.tables)
        if tables:
            rows = sum(len(table.rows) for table in self.tables)
            tables = (
                f"<details{'' if figure else ' open'}><summary>{len(self.tables)} table{'s' * (len(self.tables) > 1)}, "
                f"{rows} row{'s' * (rows > 1)}</summary><div class='wide'>{tables}</div></details>"
            )
        return f"<p><b>{escaped(self.title)}</b>{lines}</p>{figure}{tables}{notes}"


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
def page_of(result: Any) -> str:
    """A result as a page of its own, which needs no network.

    Raises:
        TypeError: if it is not a result.

    Examples:
        >>> hl.show.page_of(hl.attribute_scores(model, prompt))[:15]
        '<!DOCTYPE html>'
    """
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(report_of(result).title)}</title><style>{PAGE}</style></head>"
        f"<body>{html_of(result)}</body></html>"
    )


def html_of(result: Any) -> str:
    """A result for a notebook.

    Raises:
        TypeError: if it is not a result.

    Examples:
        >>> hl.show.html_of(hl.attribute_scores(model, prompt))[:4]
        '<div'
    """
    report = report_of(result)
    if report.figure is None and isinstance(result, Drawn):
        title = report.title
        report = replace(report, figure=lambda: picture_of(result).html(title))
    if not report.tables:
        report = replace(report, tables=[table_of(result.to_pandas())])
    return report.html()


class Shown:
    """A result that shows itself, by what the module that `shown_by` names has registered for it in `report_of`.

    It has `to_pandas()`. One that measures something is `Drawn`; these are only names: a metric, an intervention.
    """

    def to_pandas(self) -> Any:
        """The result as a DataFrame."""
        raise TypeError(f"result must be a result of hijack_lens with a table, got {type(self).__name__}")

    def __repr__(self) -> str:
        registered()
        return report_of(self).short()

    def __str__(self) -> str:
        """In full; of those whose repr is their own, the same line."""
        if type(self).__repr__ is not Shown.__repr__:
            return repr(self)
        registered()
        return report_of(self).text()

    def _repr_html_(self) -> str:
        registered()
        return html_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result, whole or not at all, in the format that the path's extension names.

        ".html" is the page that a notebook shows; ".csv" the table of `to_pandas`; ".png", ".svg" and ".pdf" the
        picture. With any other, results that have `load` are kept as data, in a safetensors file.

        Raises:
            TypeError, ValueError: for a path that cannot be written, and for a format that the result does not have.
        """
        registered()
        kind = check_path("path", path).suffix.lower()
        drawn = isinstance(self, Drawn)
        if kind in _PICTURES and drawn:
            picture_of(self).save(path)
        elif kind in (".html", ".csv"):
            target = check_target("path", path)
            text = page_of(self) if kind == ".html" else self.to_pandas().to_csv(index=False)
            write_atomically(target, text.encode())
        elif isinstance(self, Saved) and kind not in SHOWN_AS:
            self._save_data(path)
        else:
            known = SHOWN_AS if drawn else SHOWN_AS[:2]
            kept = isinstance(self, Saved)
            data = "any other keeps the data" if kept else f"{type(self).__name__} is not kept as data"
            raise ValueError(f"path must end in one of {', '.join(known)}, got {shown(str(path))}; {data}")


@report_of.register
def plain_report(result: Shown) -> Report:
    """A result of a kind for which nothing else is registered: its own repr, if it has one, and its table."""
    kind = type(result)
    title = kind.__name__ if kind.__repr__ is Shown.__repr__ else repr(result)
    return Report(title, tables=[table_of(result.to_pandas())])


class Drawn(Shown):
    """A result that also draws itself, by what is registered for it in `picture_of`."""

    def picture(self, *chosen: Any, **options: Any) -> Any:
        """The result drawn: a `show.Picture`. The options depend on the result: see `show.picture_of`."""
        registered()
        return picture_of(self, *chosen, **options)
