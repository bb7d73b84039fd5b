"""Every claim that `reproduce` puts to the test."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hijack_lens.reproduction import (
    causal_agreement,
    closed_form,
    competing_continuations,
    data_matters,
    flip_window,
    learning_order,
    memory_order,
    no_positions,
    phase_diagram,
    positions_and_length,
    stronger_memories,
    winner_prediction,
)
from hijack_lens.reproduction import denied_facts as facts
from hijack_lens.reproduction.experiment import Result


@dataclass(frozen=True)
class Claim:
    """A claim, and the experiment that tests it.

    Attributes:
        statement: in a sentence.
        source: where it is made.
        experiment: takes settings.
        full: settings of the full run.
        quick: of one that takes seconds, or a minute or two.
    """

    statement: str
    source: str
    experiment: Callable[[Any], Result]
    full: Any
    quick: Any


def _claim(module: Any, experiment: Callable[..., Result]) -> Claim:
    return Claim(module.STATEMENT, module.SOURCE, experiment, module.Settings(), module.QUICK)


CLAIMS: dict[str, Claim] = {
    "closed-form": _claim(closed_form, closed_form.closed_form),
    "phase-diagram": _claim(phase_diagram, phase_diagram.phase_diagram),
    "stronger-memories": _claim(stronger_memories, stronger_memories.stronger_memories),
    "competing-continuations": _claim(competing_continuations, competing_continuations.competing_continuations),
    "flip-window": _claim(flip_window, flip_window.flip_window),
    "positions": _claim(positions_and_length, positions_and_length.positions_and_length),
    "no-positions": _claim(no_positions, no_positions.no_positions),
    "facts": _claim(facts, facts.facts),
    "learning-order": _claim(learning_order, learning_order.learning_order),
    "memory-order": _claim(memory_order, memory_order.memory_order),
    "data": _claim(data_matters, data_matters.data_matters),
    "winner-prediction": _claim(winner_prediction, winner_prediction.winner_prediction),
    "causal-agreement": _claim(causal_agreement, causal_agreement.causal_agreement),
}
"""By name, in the order of the papers."""


def run_claim(claim: str, settings: str) -> dict[str, str]:
    """Tests one claim, as a point of a sweep: other settings are another point.

    Args:
        claim: its name.
        settings: the repr of its quick or its full ones; others raise a `KeyError`.

    Returns:
        The "verdict", and as JSON the "outcome": verdict, findings, note, table and figure (SVG).
    """
    chosen = CLAIMS[claim]
    known = {repr(one): one for one in (chosen.quick, chosen.full)}
    result = chosen.experiment(known[settings])
    outcome = {
        "verdict": result.verdict,
        "findings": result.to_pandas().to_dict(orient="records"),
        "note": result.note,
        "table": [
            {str(name): _plain(value) for name, value in row.items()} for row in result.table.to_dict(orient="records")
        ],
        "figure": result.figure.svg(),
    }
    return {"verdict": result.verdict, "outcome": json.dumps(outcome)}


def _plain(value: Any) -> Any:
    """A table's value in JSON's types: null where there is none, a string where it is infinite."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, (str, bool)):
        return value
    if pd.isna(value):
        return None
    return str(value) if isinstance(value, float) and math.isinf(value) else value
