"""An explanation of a language model's answer: ten rows, one picture, and a page."""

from typing import Any

import numpy as np

from hijack_lens.core.tables import Report, Table, escaped, picture_of, report_of
from hijack_lens.explanation import AnswerExplanation
from hijack_lens.show.logits import head_table, shaded_prompt
from hijack_lens.show.style import COLOURS, PLAIN, Picture, frameless, write_beside

_TOKENS, _HEADS = 24, 6


@report_of.register
def answer_report(found: AnswerExplanation) -> Report:
    """The verdict; the shares of the prompt's parts, and attribution beside interventions."""
    return Report(found.verdict, [], _tables(found), _notes(found), lambda: _drawn(found))


def _drawn(found: AnswerExplanation) -> str:
    """The picture over the shaded prompt."""
    shaded = shaded_prompt(found.attribution, *found.attribution.pair())
    return f"{answer_picture(found).html(found.verdict)}{shaded}"


def _notes(found: AnswerExplanation) -> list[str]:
    notes = [
        "Shares are exact with this run's attention patterns, norm scales and gates held; interventions let all follow."
    ]
    if found.whole:
        each = "; ".join(f"{text!r}: {value:.2f}" for text, value in found.whole.items())
        notes.append(f"Log-probabilities of the whole answers, each token given those before it: {each}.")
    return notes


def share_table(found: AnswerExplanation) -> Table:
    """What each part of the prompt wrote into the margin."""
    attribution = found.attribution
    a, b = attribution.pair()
    wrote = (attribution.by_path()[:, a] - attribution.by_path()[:, b]).tolist()
    rows = [
        *((path.label, path.memory, f"{value:+.3f}") for path, value in zip(attribution.paths, wrote, strict=True)),
        ("sum", "", f"{sum(wrote):+.3f}"),
    ]
    share = f"{found.names[0]!r} - {found.names[1]!r}"
    return Table(("part of the prompt", "memory", share), rows, "llr", "the margin, by where it entered", total=True)


def check_table(found: AnswerExplanation) -> Table:
    """Attributed shares beside what interventions change."""
    rows = [
        (check.what, f"{check.attributed:+.3f}", f"{check.measured:+.3f}", "part" if check.parts else "agree")
        for check in found.checks
    ]
    columns = ("intervention", "attributed", "margin loses", "they")
    return Table(columns, rows, "lrrl", "attribution beside interventions")


def candidate_table(found: AnswerExplanation) -> Table:
    """Each candidate's logit, by memory."""
    attribution, by_memory = found.attribution, found.attribution.by_memory()
    columns = by_memory["context"].tolist(), by_memory["weights"].tolist(), attribution.logits.tolist()
    rows = [
        (attribution.token_text(index), *(f"{value:+.3f}" for value in values))
        for index, values in enumerate(zip(*columns, strict=True))
    ]
    return Table(("candidate", "context", "weights", "logit"), rows, "lrrr", "the candidates' logits, by memory")


def contrast_table(found: AnswerExplanation) -> Table:
    """The heads that carry the difference from the contrast to the answer's position."""
    assert found.contrast is not None
    rows = [(check.what, f"{check.attributed:+.3f}", f"{check.measured:+.3f}") for check in found.contrast.carriers]
    title = f"what heads carry of the difference from the contrast, {found.total - found.contrast.total:+.3f}"
    return Table(("head", "to first order", "margin loses, patched"), rows, "lrr", title)


def dose_table(found: AnswerExplanation) -> Table:
    """The margin by how often the context is said."""
    said = ("not at all", "once", "twice")
    rows = [(said[dose], f"{value:+.3f}") for dose, value in found.doses.items()]
    return Table(("the context said", "margin"), rows)


def _tables(found: AnswerExplanation) -> list[Table]:
    checks = [check_table(found)] if found.checks else []
    contrast = [] if found.contrast is None else [contrast_table(found)]
    candidates = [candidate_table(found)] if found.attribution.logits.shape[-1] > 2 else []
    doses = [dose_table(found)] if found.doses else []
    return [share_table(found), *candidates, *checks, *contrast, *doses, head_table(found.attribution)]


def answer_body(found: AnswerExplanation) -> str:
    """The picture, the shaded prompt and the tables, for a page."""
    tables = "".join(table.html() for table in _tables(found))
    notes = "".join(f"<p style='font-size:85%'>{escaped(note)}</p>" for note in _notes(found))
    return f"<div class='wide'>{_drawn(found)}{tables}</div>{notes}"


@picture_of.register
def answer_picture(found: AnswerExplanation) -> Picture:
    """What each token wrote into the margin, what the largest heads brought, and the margin by dose."""
    attribution = found.attribution
    a, b = attribution.pair()
    wrote = attribution.by_token().double().cpu()
    shares = wrote[:, a] - wrote[:, b]
    texts = attribution.source_texts()
    kept = sorted(shares.abs().topk(min(_TOKENS, len(shares))).indices.tolist())
    heads = attribution.by_head(_HEADS)
    picture = Picture(11.0, max(3.2, 0.9 + 0.2 * len(kept)))
    widths = [3, 2, 1.6] if found.doses else [3, 2]
    axes = picture.figure.subplots(1, len(widths), width_ratios=widths)
    parts = attribution.parts.tolist()
    colours = [COLOURS["context" if parts[i] == 0 else "weights"] for i in kept]
    drawn = {COLOURS["context"]: "blue: context", COLOURS["weights"]: "orange: weights"}
    named = ", ".join(name for colour, name in drawn.items() if colour in colours)
    _bars(axes[0], [f"{texts[i]}  {i}" for i in kept], shares[kept].numpy(), colours)
    axes[0].set_xlabel(f"each token's share of the margin {float(found.total):+.2f}\n({named})")
    _bars(axes[1], [f"{r.head} reads {r.token}" for r in heads.itertuples()], heads["margin"].to_numpy(), [PLAIN])
    axes[1].set_xlabel("brought by heads, in logits")
    if found.doses:
        doses, margins = list(found.doses), list(found.doses.values())
        axes[2].plot(doses, margins, "o-", color=COLOURS["context"])
        axes[2].axhline(0, color="black", linewidth=1)
        axes[2].set_xticks(doses)
        axes[2].set_xlabel("times the context is said")
        axes[2].set_ylabel(f"{found.names[1]!r} ← margin → {found.names[0]!r}")
        frameless(axes[2])
    return picture


def _bars(ax: Any, names: list[str], values: np.ndarray, colours: list[str]) -> None:
    ax.barh(range(len(names)), values, color=colours, height=0.7)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=8, family="monospace")
    ax.invert_yaxis()
    for row, value in enumerate(values):
        write_beside(ax, f"{value:+.2f}", float(value), row, 3, fontsize=7)
    frameless(ax)
