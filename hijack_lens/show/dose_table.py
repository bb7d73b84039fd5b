"""A dose-response as tables: text for a terminal, HTML for a notebook."""

import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hijack_lens.core.texts import visible

if TYPE_CHECKING:
    from hijack_lens.probing.doses import DoseResponse


_FACTS_SHOWN = 30

Rows = Sequence[Sequence[str]]


def as_text(result: "DoseResponse") -> str:
    """The tables as plain text."""
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
    for title, columns, rows in _tables(result):
        table = Table(title=title)
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    return "\n".join([_head(result), buffer.getvalue().rstrip(), *_notes(result)])


def as_html(result: "DoseResponse") -> str:
    """The picture over the tables."""
    tables = []
    for title, columns, rows in _tables(result):
        head, *body = (_html_row(cells, tag) for cells, tag in [(columns, "th"), *((row, "td") for row in rows)])
        tables.append(
            f"<p><b>{escape(title)}</b></p><table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
        )
    notes = "".join(f"<p style='font-size:85%'>{escape(note)}</p>" for note in _notes(result))
    return (
        f"<div class='hijack-lens'><p>{escape(_head(result))}</p>{result.picture().svg()}{''.join(tables)}{notes}</div>"
    )


def _head(result: "DoseResponse") -> str:
    facts, doses = result.margin.total.shape
    return (
        f"DoseResponse(fact={facts}, dose={doses}): logit of the context's answer − logit of the weights', in logits; "
        f"attributions complete within {result.completeness_error:.1e}"
    )


def _tables(result: "DoseResponse") -> list[tuple[str, tuple[str, ...], Rows]]:
    """Title, names of columns, and rows: by number of repeats, and by fact."""
    several = len(result.conflicts) > 1
    means = result.by_repeats()
    title = "mean over facts, by repeats" if several else "by repeats"
    columns = ("repeats", "tokens", "context", "weights", "rest", "total", *(("± sd",) if several else ()), "theory")
    doses = [
        [
            str(row["repeats"]),
            f"{row['length']:.4g}",
            *(f"{row[part]:+.3f}" for part in ("context", "weights", "rest", "total")),
            *([f"{row['spread']:.3f}"] if several else []),
            f"{row['theory']:+.3f}",
        ]
        for row in means.to_dict("records")
    ]
    last = result.repeats[-1]
    facts = [
        [
            row["fact"],
            f"{visible(row['context_token'])} / {visible(row['weights_token'])}",
            f"{row['first']:+.2f}",
            f"{row['last']:+.2f}",
            _or_none(flip),
            "–" if math.isnan(row["crossing"]) else f"{row['crossing']:.2f}",
            _or_none(predicted.repeats),
        ]
        for row, flip, predicted in zip(
            result.by_fact().head(_FACTS_SHOWN).to_dict("records"), result.flips, result.theory.flips, strict=False
        )
    ]
    if len(result.conflicts) > _FACTS_SHOWN:
        facts.append([f"{len(result.conflicts) - _FACTS_SHOWN} more", *[""] * 6])
    by_fact = ("fact", "tokens scored", "margin at 0", f"at {last}", "flip", "crossing", "theory's flip")
    return [(title, columns, doses), ("repeats that flip the prediction", by_fact, facts)]


def _notes(result: "DoseResponse") -> list[str]:
    theory, s = result.theory, result.theory.strengths
    if theory.source == "weights":
        how = f"predicted at strengths read off the weights: b1 = {s.previous_token:.3g}, "
    else:
        how = "fitted to these margins, with b1 = inf: "
    notes = [f"Theory, {how}b2 = {s.match:.3g}, b3 = {s.copy:.3g}; R² = {theory.r2:.3f} of the change over repeats."]
    if not result.circuit.induction:
        notes.append("No induction head is named in the circuit, so that nothing counts as the context's.")
    if not all(result.known):
        unknown = [one.name for one, known in zip(result.conflicts, result.known, strict=True) if not known]
        notes.append(
            f"The weights do not prefer their answer to begin with: {'; '.join(unknown[:3])}"
            + (f"; and {len(unknown) - 3} more." if len(unknown) > 3 else ".")
        )
    cut = [one for one in result.conflicts if not all(one.whole)]
    if cut:
        notes.append(f"Scored by the first token of answers of several tokens: {len(cut)} of the facts.")
    return notes


def _or_none(repeats: int | None) -> str:
    return "none" if repeats is None else str(repeats)


def _html_row(cells: Sequence[str], tag: str) -> str:
    first, *rest = (escape(cell) for cell in cells)
    return (
        f"<tr><{tag} style='text-align:left'>{first}</{tag}>"
        + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
        + "</tr>"
    )
