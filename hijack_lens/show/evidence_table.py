"""A circuit's evidence as a table: text for a terminal, HTML for a notebook."""

import io
from html import escape
from math import isnan
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hijack_lens.core.circuit import ROLE_NAMES

if TYPE_CHECKING:
    from hijack_lens.circuits.evidence import CircuitEvidence


_COLUMNS = ("component", "score", "null", "effect", "on its own", "effect's null", "named")


def rich_table(evidence: "CircuitEvidence") -> Table:
    """The named components and, of each role, the best of the rest."""
    table = Table(title="evidence for the circuit's components")
    for column in ("role", *_COLUMNS):
        table.add_column(column, justify="left" if column in ("role", "component", "named") else "right")
    for role, rows in _rows(evidence).items():
        for i, row in enumerate(rows):
            table.add_row(ROLE_NAMES[role] if i == 0 else "", *row, end_section=i == len(rows) - 1)
    return table


def as_text(evidence: "CircuitEvidence") -> str:
    """The verdicts in words, and the table."""
    # In a notebook a console would display the table at once, beside returning it.
    buffer = io.StringIO()
    console = Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False)
    console.print(rich_table(evidence))
    return "\n".join([_head(evidence), evidence.verdicts, buffer.getvalue().rstrip(), _LEGEND])


def as_html(evidence: "CircuitEvidence") -> str:
    """The verdicts, the picture and the table."""
    verdicts = "".join(f"<li>{escape(line)}</li>" for line in evidence.verdicts.splitlines())
    header = "".join(f"<th style='text-align:left'>{column}</th>" for column in ("role", *_COLUMNS))
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in (ROLE_NAMES[role], *row))
        + "</tr>"
        for role, rows in _rows(evidence).items()
        for row in rows
    )
    return (
        f"<div class='hijack-lens'><p>{escape(_head(evidence))}</p><ul>{verdicts}</ul>{evidence.picture().svg()}"
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
        f"<p style='font-size:85%'>{escape(_LEGEND)}</p></div>"
    )


_LEGEND = (
    "Heads: score is attention; effect, the nats of in-context gain lost without the head; on its own, those it brings "
    "back when the role's other candidates are off. MLPs: score is the share of the context-free prediction; effect "
    "is in logits."
)


def _head(evidence: "CircuitEvidence") -> str:
    return (
        f"CircuitEvidence from {evidence.n_prompts} prompts of {evidence.period} repeated tokens: in-context gain "
        f"{evidence.gain:.2f} nats (null {evidence.gain_null:.2f}); context-free information "
        f"{evidence.bigram.information:.2f} nats, {evidence.bigram.direct_share:.0%} of it on the direct path"
    )


def _rows(evidence: "CircuitEvidence") -> dict[str, list[list[str]]]:
    """Cells of the rows shown, by role: the named components, best first, and the best of those not named."""
    shown: dict[str, list[list[str]]] = {}
    table = evidence.to_pandas().sort_values(["named", "score"], ascending=False)
    for role in ROLE_NAMES:
        part = table[(table["role"] == role) & table["score"].notna()]
        part = part.head(int(part["named"].sum()) + 1)
        numbers = part[["score", "null", "effect", "regained", "effect_null"]].to_numpy()
        shown[role] = [
            [name, *("–" if isnan(number) else f"{number:.3f}" for number in row), "yes" if named else "no"]
            for name, row, named in zip(part["component"], numbers, part["named"], strict=True)
        ]
    return shown
