"""What the command line says: tables for a terminal of any width, and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

import hijack_lens as hl
from hijack_lens.core.tables import Report, Table


def intro(prompt: hl.HijackPrompt) -> list[str | Text]:
    """A conflict's prompt, and what each memory says."""
    show, tokens = prompt.language.display, prompt.tokens.tolist()
    q, c, g = (repr(show(token)) for token in (prompt.trigger, prompt.in_context, prompt.global_candidate))
    shown = Text("prompt  ", style="bold")
    for i, token in enumerate(tokens):
        after_trigger = i > 0 and tokens[i - 1] == prompt.trigger
        style = "bold blue" if after_trigger else "bold" if token == prompt.trigger else "dim"
        shown.append(show(token) + (" " if prompt.language.level == "word" else ""), style=style)
    return [shown, f"After {q}, the context says {c}; the weights say {g}. ({prompt.language.d_vocab} tokens known.)"]


def print_report(said: Report, intro: Sequence[str | Text]) -> None:
    """What was asked, what was found in a line, and the tables."""
    print_lines(*intro, Text(f"\n{said.title}\n", style="bold"), soft_wrap=False)
    print_tables(said)


def print_tables(said: Report) -> None:
    """A report's tables, and the notes under them."""
    for table in said.tables:
        print_table(table)
    print_lines(*said.notes, soft_wrap=False)


def print_table(table: Table) -> None:
    """A table in the width of the terminal."""
    console = Console(markup=False)
    console.print(table.rich(console.width))


def print_lines(*lines: str | Text, style: str = "", soft_wrap: bool = True) -> None:
    """Lines as they are: tokens and paths may contain brackets."""
    console = Console(markup=False)
    for line in lines:
        console.print(line, style=style, soft_wrap=soft_wrap)


def print_json(found: dict[str, Any]) -> None:
    """What was found, for another program."""
    print(json.dumps(found, indent=2, ensure_ascii=False))


def found(explanation: hl.Explanation, prompt: hl.HijackPrompt) -> dict[str, Any]:
    """What JSON holds of a conflict, beyond `outcome`."""
    tokens, formed = prompt.language.tokens, explanation.model.formed
    return {
        "prompt": prompt.text,
        "trigger": tokens[prompt.trigger],
        "in_context": tokens[prompt.in_context],
        "global": tokens[prompt.global_candidate],
        "theory": {part: predicted for part, (predicted, _) in explanation.theory_beside_model().items()},
        "repeats_needed": None if explanation.flip is None else explanation.flip.repeats,
        "formed": None if formed is None else list(formed.lines),
    }


def outcome(explanation: hl.Explanation | hl.AnswerExplanation) -> dict[str, Any]:
    """What is reported for the explanation of any prompt."""
    if isinstance(explanation, hl.AnswerExplanation):
        by_source = explanation.attribution
        return {
            "winner": explanation.winner,
            "verdict": explanation.verdict,
            "tokens": list(explanation.texts),
            "margin": {part: float(value) for part, value in explanation.margin.parts.items()},
            "shares": {path.label: wrote[0] - wrote[1] for path, wrote in _paths(by_source)},
            "checks": [asdict(check) for check in explanation.checks],
            "doses": explanation.doses,
            "heads": by_source.by_head().to_dict(orient="records"),
            "log_probs": explanation.whole,
            "completeness_error": by_source.completeness_error,
        }
    attribution = explanation.attribution
    said = {"winner": explanation.winner, "verdict": explanation.verdict, "ablated": explanation.ablated}
    if attribution is None:
        return {**said, "margin": {"total": explanation.total}, "not_split": explanation.not_split}
    sides = ("in_context", "global") if isinstance(explanation.prompt, hl.HijackPrompt) else ("answer", "foil")
    return {
        **said,
        "margin": {part: float(value) for part, value in explanation.margin.parts.items()},
        "paths": [
            {"path": path.label, "memory": path.memory, **dict(zip(sides, wrote, strict=True))}
            for path, wrote in _paths(attribution)
        ],
        "completeness_error": attribution.completeness_error,
    }


def _paths(attribution: hl.LogitAttribution) -> list[tuple[hl.Path, list[float]]]:
    """Each path, and what it wrote into the two logits."""
    by_path = attribution.by_path()[:, list(attribution.pair())].tolist()
    return list(zip(attribution.paths, by_path, strict=True))
