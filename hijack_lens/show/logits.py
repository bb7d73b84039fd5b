"""Logits by path: a table, the paths' parts as bars, and the prompt shaded by what each token contributed."""

from html import escape
from typing import Any

from torch import Tensor

from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.attribution.source_attribution import SourceAttribution
from hijack_lens.core.tables import Markup, Report, Table, html_of, report_of
from hijack_lens.show.style import COLOURS

_NOTHING = 0.0005
"""Paths below this, in logits, would show as zero, and are left out of tables."""

_MOST_ROWS, _LARGEST = 80, 20
"""A deep model has hundreds of paths: where there are more than the first, as many as the second are shown."""

_HEADS_SHOWN = 8

Row = tuple[Any, ...]
"""Path, memory, what it wrote into either logit, and the difference; of one answer alone, into its logit."""


@report_of.register
def logit_report(result: LogitAttribution) -> Report:
    """Paths by candidate; for a batch or for all positions, a line that says what it holds."""
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(result.axes, result.values.shape, strict=True))
    head = f"{type(result).__name__}({shape}), completeness error {result.completeness_error:.1e}"
    if not _is_single(result):
        return Report(head)
    tables = [path_table(result), *([head_table(result)] if isinstance(result, SourceAttribution) else [])]
    return Report(head, [*filter(None, [incomplete(result)])], tables, [*filter(None, [_hidden(result)])])


@html_of.register
def logit_html(result: LogitAttribution) -> str:
    """The verdict and the shaded prompt over the table, with a bar for each path."""
    if not _is_single(result):
        return f"<pre>{escape(report_of(result).text())}</pre>"
    compared, rows = _compared(result), _rows(result)
    columns = ["path", "memory", *(f"logit {result.token_text(token)}" for token in compared)]
    columns += ["difference"] * (len(compared) - 1) + [""]
    widest = max(abs(row[-1]) for row in rows) or 1.0
    table = path_table(result)
    drawn = [
        (
            cells[0],
            Markup(f"<span style='color:{COLOURS.get(row[1], 'inherit')}'>{row[1]}</span>"),
            *cells[2:],
            _bar(row[-1], widest, row[1]),
        )
        for cells, row in zip(table.rows, rows, strict=True)
    ]
    return (
        f"<div class='hijack-lens'><p><b>{escape(incomplete(result))}</b></p>"
        f"<p><b>Which memory wrote the logits at position {result.position}?</b> {_verdict(result)}</p>"
        f"{shaded_prompt(result, *compared)}{Table(columns, drawn, table.align, total=True).html()}"
        f"{head_table(result).html() if isinstance(result, SourceAttribution) else ''}"
        f"<p style='font-size:85%'>{_hidden(result)} "
        f"Sum over all paths minus the model's logits: at most {result.completeness_error:.1e}.</p></div>"
    )


def path_table(result: LogitAttribution) -> Table:
    """What each path wrote into the two logits, and into their difference; of one answer alone, into its logit."""
    names = [repr(result.token_text(token)) for token in _compared(result)]
    return Table(
        ["path", "memory", *(f"logit {name}" for name in names), *([" - ".join(names)] if len(names) > 1 else [])],
        [(label, memory, *(f"{number:+.3f}" for number in numbers)) for label, memory, *numbers in _rows(result)],
        align="llr",
        title=f"logits at position {result.position}, by path",
        total=True,
    )


def head_table(result: SourceAttribution) -> Table:
    """The heads that brought most of the difference to the answer's position, and what they read there."""
    names = " - ".join(repr(result.token_text(token)) for token in _compared(result))
    rows = [
        (row.head, f"{row.margin:+.3f}", f"{row.token!r} at {row.position}", f"{row.from_token:+.3f}")
        for row in result.by_head(_HEADS_SHOWN).itertuples()
    ]
    return Table(
        ("head", names, "most of it from", "from there"),
        rows,
        align="lrlr",
        title="brought by heads to the answer's position, from all but the first and its own",
    )


def incomplete(result: LogitAttribution) -> str:
    """A warning if the paths do not add up: hooks have changed what the attribution relies on."""
    if result.completeness_error <= 1e-3 * (1 + float(result.logits.abs().max())):
        return ""
    return (
        f"The paths miss the logits by up to {result.completeness_error:.2g}: hooks on the model have changed what it "
        "computes from its attention patterns and neurons."
    )


def shaded_prompt(result: LogitAttribution, *compared: int) -> str:
    """The prompt's tokens, shaded by their pull: blue to the first answer, orange to the second.

    Their pull is what they add through the induction head, or, by source token, in all. Of one answer alone, blue is
    up, orange down.
    """
    if isinstance(result, SourceAttribution):
        pull, way = _difference(result.by_token()[:, list(compared)]), "by all routes"
    else:
        pull, way = _difference(result.by_source()["context"][:, list(compared)]), "through the induction head"
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
        + (
            f"difference {way}, blue towards the first candidate, orange towards the second."
            if len(compared) > 1
            else f"logit {way}, blue up, orange down."
        )
        + "</p>"
    )


def _compared(result: LogitAttribution) -> list[int]:
    """The two answers to show, or the only one."""
    return [0] if result.values.shape[-1] == 1 else list(result.pair())


def _difference(logits: Tensor) -> Tensor:
    return logits[..., 0] - logits[..., 1] if logits.shape[-1] > 1 else logits[..., 0]


def _is_single(result: LogitAttribution) -> bool:
    return result.tokens.ndim == 1 and result.position != "all"


def _rows(result: LogitAttribution) -> list[Row]:
    """The paths that make the largest difference, by memory, and their sum."""
    by_path = result.by_path()[:, _compared(result)]

    def row(path: str, memory: str, wrote: Tensor) -> Row:
        return (path, memory, *wrote.tolist(), *([float(_difference(wrote))] if len(wrote) > 1 else []))

    rows = [row(path.label, path.memory, wrote) for path, wrote in zip(result.paths, by_path, strict=True)]
    shown = sorted((one for one in rows if max(map(abs, one[2:])) >= _NOTHING), key=lambda one: -abs(one[-1]))
    shown = shown if len(shown) <= _MOST_ROWS else shown[:_LARGEST]
    shown = sorted(shown, key=lambda one: list(COLOURS).index(one[1]))
    return [*shown, row("sum", "", by_path.sum(0))]


def _hidden(result: LogitAttribution) -> str:
    *rows, total = _rows(result)
    count = len(result.paths) - len(rows)
    if not count:
        return ""
    if count > _MOST_ROWS - _LARGEST and len(rows) == _LARGEST:
        left = total[-1] - sum(row[-1] for row in rows)
        return f"{count} more paths make less of a difference each, {left:+.3f} together."
    return f"{count} more path{'s' * (count != 1)} write{'s' * (count == 1)} less than {_NOTHING} to either."


def _verdict(result: LogitAttribution) -> str:
    if len(_compared(result)) == 1:
        parts = ", ".join(f"{memory} {float(part[0]):+.2f}" for memory, part in result.by_memory().items())
        return f"<code>{escape(result.token_text(0))}</code> has the logit {float(result.logits[0]):+.2f} ({parts})."
    margin = {part: float(value) for part, value in result.margin().parts.items()}
    first, second = (f"<code>{escape(result.token_text(token))}</code>" for token in result.pair())
    winner, loser = (first, second) if margin["total"] > 0 else (second, first)
    split = ", ".join(f"{memory} {margin[memory]:+.2f}" for memory in COLOURS)
    return f"{winner} beats {loser} by {abs(margin['total']):.2f} logits ({first} − {second}: {split})."


def _bar(value: float, widest: float, memory: str) -> Markup:
    width = 50 * abs(value) / widest
    left = 50 - width if value < 0 else 50
    colour = COLOURS.get(memory, "#333333")
    return Markup(
        "<div style='position:relative;width:200px;height:12px'>"
        f"<div style='position:absolute;left:{left:.1f}%;width:{width:.1f}%;height:12px;background:{colour}'></div>"
        "<div style='position:absolute;left:50%;width:1px;height:12px;background:#333'></div></div>"
    )
