"""An attribution as a table: text for a terminal, HTML for a notebook."""

import io
from html import escape
from typing import TYPE_CHECKING

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hijack_lens.show.style import COLOURS, Picture

if TYPE_CHECKING:
    from hijack_lens.attribution.logit_attribution import LogitAttribution
    from hijack_lens.explanation import Explanation


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


def margin_bars(explanation: "Explanation") -> Picture:
    """The hijack margin by memory, and what is left of it with each component switched off."""
    if not hasattr(explanation, "ablated"):
        raise TypeError(f"explanation must come from hijack_lens.explain, got {type(explanation).__name__}")
    margin, (c, g) = explanation.margin, explanation.names
    rows = ["whole model", *(f"{name} off" for name in explanation.ablated)]
    picture = Picture(8.0, 1.3 + 0.5 * len(rows))
    ax = picture.figure.add_subplot()
    ends = {1: 0.0, -1: 0.0}
    for memory, colour in COLOURS.items():
        value = float(getattr(margin, memory))
        side = 1 if value >= 0 else -1
        ax.barh(0, value, left=ends[side], color=colour, label=memory, height=0.62)
        ends[side] += value
    for row, total in enumerate([float(margin.total), *explanation.ablated.values()]):
        if row:
            ax.barh(row, total, color="#555555", height=0.62)
        ax.plot(total, row, "D", color="black", markersize=6, label="total" if row == 0 else None)
        ax.annotate(
            f"{total:+.2f}",
            (total, row),
            xytext=(9 if total >= 0 else -9, 0),
            textcoords="offset points",
            ha="left" if total >= 0 else "right",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "edgecolor": "none"},
        )
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    extent = [*ends.values(), *explanation.ablated.values()]
    room = 0.15 * ((max(extent) - min(extent)) or 1.0)  # for the numbers beside the bars
    ax.set_xlim(min(extent) - room, max(extent) + room)
    ax.set_xlabel(f"weights win: {g!r}   ←   logit {c!r} − logit {g!r}   →   context wins: {c!r}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return picture


def attention_maps(patterns: dict[str, Float[Tensor, "query key"]], tokens: list[str], width: float = 9.0) -> Picture:
    """Attention patterns side by side, one heat map per head.

    Args:
        patterns: by the head's name.
        tokens: texts of the positions.
        width: of the picture, in inches.
    """
    picture = Picture(width, width / len(patterns) + 0.6)
    axes = picture.figure.subplots(1, len(patterns), squeeze=False)[0]
    step = max(1, len(tokens) // 32)
    ticks = range(0, len(tokens), step)
    for ax, (name, pattern) in zip(axes, patterns.items(), strict=True):
        image = ax.imshow(pattern.detach().cpu().float().numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(name)
        ax.set_xticks(ticks, [tokens[i] for i in ticks], fontsize=7, family="monospace")
        ax.set_yticks(ticks, [tokens[i] for i in ticks], fontsize=7, family="monospace")
        ax.set_xlabel("source token (attended to)")
        ax.set_ylabel("destination token (attending)")
    picture.figure.colorbar(image, ax=axes, label="attention", shrink=0.8)
    return picture
