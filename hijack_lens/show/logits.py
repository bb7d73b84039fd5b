"""Logits by path: a table, the paths' parts as bars, and the prompt shaded by what each token contributed."""

from html import escape
from typing import Any

from torch import Tensor

from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.attribution.source_attribution import SourceAttribution
from hijack_lens.core.circuit import Margin
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.margins import margins_picture
from hijack_lens.show.style import COLOURS, Picture, frameless, write_beside

_NOTHING = 0.0005
"""Paths below this, in logits, would show as zero, and are left out of tables."""

_MOST_ROWS, _LARGEST = 80, 20
"""A deep model has hundreds of paths: where there are more than the first, as many as the second are shown."""

_HEADS_SHOWN = 8
_BARS = 20
_NAMED = {"context": "blue", "weights": "orange", "rest": "grey"}

Row = tuple[Any, ...]
"""Path, memory, what it wrote into either logit, and the difference; of one answer alone, into its logit."""


@report_of.register
def logit_report(result: LogitAttribution) -> Report:
    """Who won, and paths by candidate; for a batch or for all positions, the margin of each."""
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(result.axes, result.values.shape, strict=True))
    head = f"{type(result).__name__}({shape}), completeness error {result.completeness_error:.1e}"
    if not _is_single(result):
        of, margin = _margin(result)
        rows = zip(*(part.flatten().tolist() for part in margin.parts.values()), strict=True)
        named = [(str(i), *(f"{value:+.3f}" for value in row)) for i, row in enumerate(rows)]
        return Report(head, tables=[Table((_each(result), *margin.parts), named, title=of)])
    tables = [path_table(result), *([head_table(result)] if isinstance(result, SourceAttribution) else [])]
    lines = [f"At position {result.position}, {_verdict(result)}", *filter(None, [incomplete(result)])]
    return Report(head, lines, tables, [*filter(None, [_hidden(result)])], lambda: logit_figure(result))


def logit_figure(result: LogitAttribution) -> str:
    """What the paths wrote, over the shaded prompt."""
    return f"{path_bars(result).html()}{shaded_prompt(result, *_compared(result))}"


@picture_of.register
def path_bars(result: LogitAttribution) -> Picture:
    """What each path made of the difference; for a batch or for all positions, the margin of each, by memory."""
    if not _is_single(result):
        of, margin = _margin(result)
        return margins_picture(margin, of, _each(result))
    rows = _rows(result)[:-1][:_BARS]
    picture = Picture(6.4, 1.2 + 0.28 * max(len(rows), 2))
    ax = picture.figure.add_subplot()
    ax.barh(range(len(rows)), [row[-1] for row in rows], color=[COLOURS[row[1]] for row in rows], height=0.7)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    for place, row in enumerate(rows):
        write_beside(ax, f"{row[-1]:+.2f}", row[-1], place, 4, fontsize=8)
    names = [repr(result.token_text(token)) for token in _compared(result)]
    ax.set_xlabel("adds to logit " + " − logit ".join(names))
    named = [f"{name}: {memory}" for memory, name in _NAMED.items() if memory in {row[1] for row in rows}]
    ax.set_title(f"by path ({', '.join(named)})" if named else "no path writes anything", fontsize=9)
    frameless(ax)
    return picture


def _each(result: LogitAttribution) -> str:
    return (
        "row"
        if result.tokens.ndim > 1 and result.position == "all"
        else "prompt"
        if result.tokens.ndim > 1
        else "position"
    )


def _margin(result: LogitAttribution) -> tuple[str, Margin]:
    """Of a batch or of all positions: of the answers or candidates, else of the two largest logits of each."""
    parts = result.by_memory().values()
    if result.values.shape[-1] == 1:
        return f"logit {result.token_text(0)!r}", Margin(*(part[..., 0] for part in parts))
    try:
        margin = result.margin()
    except ValueError:
        first, second = result.logits.topk(2).indices.unbind(-1)
        pairs = ((part.gather(-1, first[..., None]), part.gather(-1, second[..., None])) for part in parts)
        return "the largest logit − the second", Margin(*((a - b)[..., 0] for a, b in pairs))
    if any(isinstance(answer, tuple) for answer in result.answers or ()):
        return "logit of each first answer − second", margin
    return " − ".join(f"logit {result.token_text(token)!r}" for token in result.pair()), margin


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
        return f"{result.token_text(0)!r} has the logit {float(result.logits[0]):+.2f} ({parts})."
    margin = {part: float(value) for part, value in result.margin().parts.items()}
    first, second = (repr(result.token_text(token)) for token in result.pair())
    winner, loser = (first, second) if margin["total"] > 0 else (second, first)
    split = ", ".join(f"{memory} {margin[memory]:+.2f}" for memory in COLOURS)
    return f"{winner} beats {loser} by {abs(margin['total']):.2f} logits ({first} − {second}: {split})."
