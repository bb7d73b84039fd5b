"""The conflict of two memories in words: text for a terminal, HTML for a notebook."""

from html import escape
from typing import TYPE_CHECKING

from hijack_lens.show.context_report import ROWS_SHOWN, fitted_svg, html_table, text_table

if TYPE_CHECKING:
    from hijack_lens.memories.conflict import MemoryConflict


_PARTS = ("context", "weights", "rest", "margin")
_COLUMNS = ("query", "context says", "weights say", *_PARTS, "winner", "predicted")


def conflict_text(conflict: "MemoryConflict") -> str:
    """Who says what, and who wins, for each token that the context holds; as plain text."""
    return "\n".join([_head(conflict), text_table(_COLUMNS, _rows(conflict)), _foot(conflict)])


def conflict_html(conflict: "MemoryConflict") -> str:
    """The picture over the table."""
    return (
        f"<div class='hijack-lens'><p><b>{escape(_head(conflict))}</b></p>{fitted_svg(conflict.picture())}"
        f"{html_table(_COLUMNS, _rows(conflict))}<p style='font-size:85%'>{escape(_foot(conflict))}</p></div>"
    )


def _head(conflict: "MemoryConflict") -> str:
    table = conflict.to_pandas()
    seen = table[table["occurs"]]
    against = seen[seen["conflict"]]["winner"]
    won = ", ".join(f"{who} {int((against == who).sum())}" for who in ("context", "weights", "neither"))
    return (
        f"MemoryConflict({len(conflict.queries)} queries, {len(conflict.answers)} answers): of {len(seen)} query "
        f"tokens in the context, {len(against)} in conflict; won by {won}"
    )


def _foot(conflict: "MemoryConflict") -> str:
    hidden = len(conflict.chosen(None, None, len(conflict.queries))[0]) - len(_rows(conflict))
    more = f"{hidden} more query tokens that it holds are not shown. " if hidden else ""
    return (
        "Margins are logit[what the context says] - logit[what the weights say]. "
        f"{more}Sum of the memories minus the model's logits: at most {conflict.completeness_error:.1e}."
    )


def _rows(conflict: "MemoryConflict") -> list[list[str]]:
    table = conflict.to_pandas().iloc[conflict.chosen(None, None, ROWS_SHOWN)[0]]
    return [
        [row["query"], row["in_context"], row["global"]]
        + [f"{row[part]:+.3f}" if row["conflict"] else "" for part in _PARTS]
        + [row["winner"], row["predicted"]]
        for _, row in table.iterrows()
    ]
