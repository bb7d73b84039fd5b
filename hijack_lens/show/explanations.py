"""An explanation: tables, the margin as bars, and one self-contained HTML file that opens offline."""

import os
from html import escape
from pathlib import Path
from typing import Any

from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.files import check_target, write_atomically
from hijack_lens.core.tables import Report, Table, escaped, page_of, picture_of, report_of
from hijack_lens.explanation import AnswerExplanation, Explanation
from hijack_lens.language import HijackPrompt
from hijack_lens.show.answers import answer_body
from hijack_lens.show.logits import logit_figure, path_table
from hijack_lens.show.style import ON_CELL, PAGE_STYLE, PLAIN, Picture, frameless, stacked_bars, write_beside
from hijack_lens.show.views import attention, circuitsvis_script, token_paths

_HEADS_SHOWN = 2
_NEAR = 0.15
"""Of all bars' lengths: a total as near to the end of its bar is written beyond it, not across that end."""
_AT_ITS_MEAN = "set to its mean over other orders of the prompt's tokens"
_NOTHING_NAMED = "The circuit names no component, so there is none to switch off."


@report_of.register
def explanation_report(explanation: Explanation) -> Report:
    """The verdict; the paths, the ablations, and theory beside the model."""
    tables = [] if explanation.attribution is None else [path_table(explanation.attribution)]
    notes = [] if explanation.not_split is None else [f"No paths: {explanation.not_split}."]
    notes += _half_a_model(explanation)
    if explanation.ablated:
        tables.append(ablation_table(explanation))
        notes += _broken(explanation)
    else:
        notes.append(_NOTHING_NAMED)
    if explanation.flip is not None:
        tables.append(theory_table(explanation))
        notes += [_source(explanation), f"Repeats needed among neutral tokens, at this length: {explanation.flip}."]
    return Report(explanation.verdict, [], tables, notes)


def _half_a_model(explanation: Explanation) -> tuple[str, ...]:
    """What a reader must know of a trained model in which a memory is missing."""
    formed = getattr(explanation.model, "formed", None)
    return () if formed is None or formed else formed.lines


def _source(explanation: Explanation) -> str:
    """What theory predicts from."""
    if explanation.model.strengths is None:
        return (
            "Tables read off the weights predict the same margin, from the prompt's tokens alone. Its parts differ "
            "from attribution's where one memory turns the MLP's neurons on or off, which attribution takes as given."
        )
    return "The closed form predicts the same margin, from the prompt's counts and the memories' strengths alone."


def ablation_table(explanation: Explanation) -> Table:
    """The margin with each role of the circuit switched off."""
    c, g = map(repr, explanation.names)
    total = explanation.total
    rows = [(name, f"{value:+.3f}", f"{value - total:+.3f}") for name, value in explanation.ablated.items()]
    off = _AT_ITS_MEAN if explanation.deep else "switched off"
    title = f"margin, logit {c} - logit {g}, with a component {off}"
    return Table(("set to its mean" if explanation.deep else "switched off", "margin", "change"), rows, title=title)


def _broken(explanation: Explanation) -> list[str]:
    """What a reader must know of ablations that leave a broken model."""
    return [
        f"Without its {role}, the model predicts worse than a uniform guess would: that margin says little."
        for role in explanation.broken
    ]


def theory_table(explanation: Explanation) -> Table:
    """The closed form's margin beside the model's."""
    rows = [
        (part, f"{predicted:+.4f}", f"{found:+.4f}", f"{abs(predicted - found):.1e}")
        for part, (predicted, found) in explanation.theory_beside_model().items()
    ]
    return Table(("margin", "theory", "model", "difference"), rows, title="theory beside model")


@picture_of.register
def margin_bars(explanation: Explanation) -> Picture:
    """The hijack margin by memory, and what is left of it with each component switched off.

    Examples:
        >>> hl.show.margin_bars(hl.explain(model, prompt)).save("margin.png")
    """
    _check(explanation)
    (c, g), split = explanation.names, explanation.attribution is not None
    off = "at its mean" if explanation.deep else "off"
    rows = ["whole model", *(f"{name} {off}" for name in explanation.ablated)]
    picture = Picture(6.4, 1.3 + 0.5 * len(rows))
    ax = picture.figure.add_subplot()
    if split:
        stacked_bars(ax, 0, explanation.margin, 0.62)
    parts = [float(part) for part in explanation.margin.parts.values()][:3] if split else [explanation.total]
    beyond, across = sum(part for part in parts if (part > 0) == (explanation.total >= 0)), sum(map(abs, parts))
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "edgecolor": "none"}
    for row, total in enumerate([explanation.total, *explanation.ablated.values()]):
        if row or not split:
            ax.barh(row, total, color=PLAIN, height=0.62)
        ax.plot(total, row, "D", color="black", markersize=6, label="total" if row == 0 else None)
        inside = row == 0 and abs(beyond - total) > _NEAR * across
        style: dict[str, Any] = {"bbox": box, "color": ON_CELL} if inside else {}
        write_beside(ax, f"{total:+.2f}", total if inside or row else beyond, row, 9, **style)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel(f"weights win: {g!r}   ←   logit {c!r} − logit {g!r}   →   context wins: {c!r}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    frameless(ax)
    return picture


@page_of.register(Explanation)
@page_of.register(AnswerExplanation)
def explanation_page(explanation: Explanation | AnswerExplanation) -> str:
    """The explanation with all that it rests on, and circuitsvis views that need no network."""
    body = _of_answer(explanation) if isinstance(explanation, AnswerExplanation) else _of_circuit(explanation)
    return _page(explanation, body)


def write_report(explanation: Explanation | AnswerExplanation, path: str | os.PathLike[str]) -> Path:
    """Writes an explanation as one HTML file, with circuitsvis views that need no network.

    The file is written whole or not at all.

    Args:
        explanation: from `hijack_lens.explain`.
        path: the file to write; its folder must exist.

    Raises:
        TypeError, ValueError: if the path is a folder, cannot be written, or lies in no existing folder.

    Examples:
        >>> explanation = hl.explain(model, prompt)
        >>> hl.write_report(explanation, "report.html").name
        'report.html'
    """
    if not isinstance(explanation, AnswerExplanation):
        _check(explanation)
    target = check_target("path", path)
    return write_atomically(target, explanation_page(explanation).encode())


def _check(explanation: object) -> None:
    if not isinstance(explanation, Explanation):
        raise TypeError(f"explanation must come from hijack_lens.explain, got {type(explanation).__name__}")


def _page(explanation: Explanation | AnswerExplanation, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>hijack-lens: which memory wrote the logit?</title>
<style>{PAGE_STYLE}</style><script>{circuitsvis_script()}</script></head><body class="hijack-lens">
<h1>Which memory wrote the logit?</h1>
<p class="verdict {explanation.winner}">{escaped(explanation.verdict)}</p>
{body}
</body></html>
"""


def _of_answer(explanation: AnswerExplanation) -> str:
    heads = [Component.of(name) for name in explanation.attribution.by_head(_HEADS_SHOWN)["head"]]
    view = attention(explanation.model, explanation.prompt, [head for head in heads if head], Circuit())
    return f"{answer_body(explanation)}<h2>Where the heads that brought most look</h2>\n{view.fragment()}"


def _of_circuit(explanation: Explanation) -> str:
    return f"""
{"".join(f'<p class="warning">{escaped(line)}</p>' for line in _half_a_model(explanation))}
{_question(explanation)}
<div class="wide">{margin_bars(explanation).html(explanation.verdict)}</div>
<h2>Which paths wrote it</h2>
{_paths(explanation)}
<h2>What each component is for</h2>
{_ablations(explanation)}
{_theory(explanation)}
{_heads(explanation)}
{_tokens(explanation)}
"""


def _paths(explanation: Explanation) -> str:
    if explanation.attribution is None:
        return f"<p>No paths: {escaped(str(explanation.not_split))}.</p>"
    report = report_of(explanation.attribution)
    tables = "".join(table.html() for table in report.tables)
    return f"<div class='wide'>{logit_figure(explanation.attribution)}{tables}</div>"


def _tokens(explanation: Explanation) -> str:
    if explanation.attribution is None:
        return ""
    return f"<h2>Which tokens spoke, through which path</h2>\n{token_paths(explanation.attribution).fragment()}"


def _question(explanation: Explanation) -> str:
    """The question; and the evidence for the circuit, if it was found."""
    evidence = explanation.circuit.evidence
    q, c, g = (f"<code>{escape(text)}</code>" for text in (explanation.texts[-1], *explanation.names))
    if isinstance(explanation.prompt, HijackPrompt):
        return (
            f"<p>The prompt ends with {q}. Its context says that {c} follows; the weights, which hold the bigrams of "
            f"the language, say {g}.</p>"
        )
    found = ""
    if evidence is not None:
        verdicts = "".join(f"<li>{escaped(line)}</li>" for line in evidence.verdicts.splitlines())
        found = f"<p>The circuit, as found on repeated random tokens:</p><ul>{verdicts}</ul>"
    return (
        f"<p>The prompt ends with {q}. The answer {c}, which stands for the context, is compared with the foil {g}, "
        f"which stands for the weights.</p>{found}"
    )


def _heads(explanation: Explanation) -> str:
    """The named heads' attention; if none is named, that of the heads that wrote most of the margin."""
    attribution, title = explanation.attribution, "Where the heads look"
    heads = [part for _, part in explanation.circuit if part.kind == "head"]
    if not heads and attribution is not None:
        a, b = attribution.pair()
        wrote = (attribution.by_path()[:, a] - attribution.by_path()[:, b]).abs().tolist()
        by_size = sorted(zip(wrote, attribution.paths, strict=True), key=lambda pair: -pair[0])
        last = [path.through[-1] for _, path in by_size if path.through]
        heads = list(dict.fromkeys(part for part in last if part.kind == "head"))[:2]
        title = "Where the heads that wrote most look; the circuit names none"
    if not heads:
        return ""
    view = attention(explanation.model, explanation.prompt, heads, explanation.circuit)
    return f"<h2>{title}</h2>\n{view.fragment()}"


def _ablations(explanation: Explanation) -> str:
    if not explanation.ablated:
        return f"<p>{_NOTHING_NAMED}</p>"
    off = _AT_ITS_MEAN if explanation.deep else "set to zero"
    broken = "".join(f"<p>{escaped(line)}</p>" for line in _broken(explanation))
    return (
        f"<p>The margin, in logits, with a component's output {off}; the whole model's is {explanation.total:+.3f}.</p>"
        f"<div class='wide'>{ablation_table(explanation).html()}</div>{broken}"
    )


def _theory(explanation: Explanation) -> str:
    if explanation.flip is None:
        return ""
    return (
        "<h2>What the theory says</h2>"
        f"<p>{_source(explanation)}</p>"
        f"<div class='wide'>{theory_table(explanation).html()}</div>"
        f"<p>Repeats needed among neutral tokens, at this length: {escaped(str(explanation.flip))}.</p>"
    )
