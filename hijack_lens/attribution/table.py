"""An attribution as a table: text for a terminal, HTML for a notebook."""

import io
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hijack_lens.attribution.result import LogitAttribution

# Okabe & Ito's palette, told apart also by colour-blind readers.
COLOURS = {"context": "#0072B2", "weights": "#D55E00", "rest": "#999999"}

_NOTHING = 0.0005
"""Paths below this, in logits, would show as zero, and are left out of tables."""

_MOST_ROWS = 80
"""A deep model has hundreds of paths; those that make the largest difference are shown."""


def rich_table(result: "LogitAttribution") -> Table:
    """Paths by candidate: what each wrote into the two logits, and into their difference."""
    a, b = result.pair()
    first, second = repr(result.token_text(a)), repr(result.token_text(b))
    table = Table(title=f"logits at position {result.position}, by path")
    for column in ("path", "memory"):
        table.add_column(column)
    for column in (f"logit {first}", f"logit {second}", f"{first} - {second}"):
        table.add_column(column, justify="right")
    for label, memory, *numbers in _rows(result):
        table.add_row(label, memory, *(f"{number:+.3f}" for number in numbers), end_section=memory == "")
    return table


def as_text(result: "LogitAttribution") -> str:
    """The table as plain text; for a batch or for all positions, a line that says what it holds."""
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(result.axes, result.values.shape, strict=True))
    head = f"LogitAttribution({shape}), completeness error {result.completeness_error:.1e}"
    if result.tokens.ndim > 1 or result.position == "all":
        return head
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
    console.print(rich_table(result))
    return "\n".join(
        filter(None, [head, incomplete(result), buffer.getvalue().rstrip(), _hidden(result, len(_rows(result)))])
    )


def as_html(result: "LogitAttribution") -> str:
    """The table, the margin's parts as bars, and the prompt shaded by what each token contributed."""
    if result.tokens.ndim > 1 or result.position == "all":
        return f"<pre>{escape(as_text(result))}</pre>"
    a, b = result.pair()
    first, second = (f"<code>{escape(result.token_text(token))}</code>" for token in (a, b))
    shown = _rows(result)
    widest = max(abs(row[4]) for row in shown) or 1.0
    rows = "".join(
        f"<tr style='font-weight:{400 if memory else 600}'><td style='text-align:left'>{escape(label)}</td>"
        f"<td style='text-align:left;color:{COLOURS.get(memory, 'inherit')}'>{memory}</td>"
        + "".join(f"<td>{number:+.3f}</td>" for number in numbers)
        + f"<td>{_bar(numbers[2], widest, memory)}</td></tr>"
        for label, memory, *numbers in shown
    )
    left, narrow = " style='text-align:left'", " style='white-space:nowrap'"
    return (
        f"<div class='hijack-lens'><p><b>{escape(incomplete(result))}</b></p>"
        f"<p><b>Which memory wrote the logits at position {result.position}?</b> "
        f"{_verdict(result, first, second)}</p>{shaded_prompt(result, a, b)}"
        f"<table><thead><tr><th{left}>path</th><th{left}>memory</th><th{narrow}>logit {first}</th>"
        f"<th{narrow}>logit {second}</th><th>difference</th><th style='width:200px'></th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p style='font-size:85%'>{_hidden(result, len(shown))} "
        f"Sum over all paths minus the model's logits: at most {result.completeness_error:.1e}.</p></div>"
    )


def _rows(result: "LogitAttribution") -> list[tuple]:
    a, b = result.pair()
    by_path = result.by_path()
    rows = [
        (
            path.label,
            path.memory,
            float(by_path[i, a]),
            float(by_path[i, b]),
            float(by_path[i, a] - by_path[i, b]),
        )
        for i, path in enumerate(result.paths)
    ]
    shown = sorted((row for row in rows if max(map(abs, row[2:])) >= _NOTHING), key=lambda row: -abs(row[4]))
    shown = sorted(shown[:_MOST_ROWS], key=lambda row: list(COLOURS).index(row[1]))
    first, second = (float(by_path[:, token].sum()) for token in (a, b))
    return [*shown, ("sum", "", first, second, first - second)]


def incomplete(result: "LogitAttribution") -> str:
    """A warning where the paths do not add up: hooks have changed what the attribution rests on."""
    if result.completeness_error <= 1e-3 * (1 + float(result.logits.abs().max())):
        return ""
    return (
        f"The paths miss the logits by up to {result.completeness_error:.2g}: hooks on the model have changed what it "
        "computes from its attention patterns and neurons."
    )


def _hidden(result: "LogitAttribution", n_rows: int) -> str:
    count = len(result.paths) + 1 - n_rows  # the sum has a row of its own
    if n_rows > _MOST_ROWS:
        return f"{count} more paths make less of a difference." if count else ""
    return (
        f"{count} more path{'s' * (count != 1)} write{'s' * (count == 1)} less than {_NOTHING} to either."
        if count
        else ""
    )


def _verdict(result: "LogitAttribution", first: str, second: str) -> str:
    margin = result.margin()
    winner, loser = (first, second) if margin.total > 0 else (second, first)
    split = ", ".join(f"{memory} {float(getattr(margin, memory)):+.2f}" for memory in COLOURS)
    return f"{winner} beats {loser} by {abs(float(margin.total)):.2f} logits ({first} − {second}: {split})."


def _bar(value: float, widest: float, memory: str) -> str:
    width = 50 * abs(value) / widest
    left = 50 - width if value < 0 else 50
    colour = COLOURS.get(memory, "#333333")
    return (
        "<div style='position:relative;width:200px;height:12px'>"
        f"<div style='position:absolute;left:{left:.1f}%;width:{width:.1f}%;height:12px;background:{colour}'></div>"
        "<div style='position:absolute;left:50%;width:1px;height:12px;background:#333'></div></div>"
    )


def shaded_prompt(result: "LogitAttribution", a: int, b: int) -> str:
    """The prompt's tokens, shaded by their pull through the induction head: blue to the first, orange to the second."""
    pull = result.by_source()["context"]
    pull = pull[:, a] - pull[:, b]
    widest = float(pull.abs().max()) or 1.0
    spans = []
    for text, value in zip(result.source_texts(), pull.tolist(), strict=True):
        colour = "0,114,178" if value > 0 else "213,94,0"
        spans.append(
            f"<span title='{value:+.3f}' style='background:rgba({colour},{0.75 * abs(value) / widest:.2f});"
            f"padding:1px'>{escape(text)}</span>{result.joiner}"
        )
    return (
        "<p style='font-family:monospace;line-height:1.6;overflow-wrap:anywhere'>"
        + "".join(spans)
        + "</p><p style='font-size:85%'>Shading: what each source token adds to the "
        "difference through the induction head, blue towards the first candidate, orange towards the second."
        "</p>"
    )
