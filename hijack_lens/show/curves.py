"""Curves: a dose-response with the theory's prediction, and the birth of the two memories over training."""

import math

from hijack_lens.core.tables import Report, Table, picture_of, report_of, visible
from hijack_lens.models.formed import Formed
from hijack_lens.probing.doses import DoseResponse, crossing
from hijack_lens.show.style import COLOURS, PLAIN, PURPLE, Picture, frameless, whole_ticks, write_beside
from hijack_lens.training.run import TrainingRun

_GOOD_FIT = 0.8
_FACTS_SHOWN = 30


@report_of.register
def dose_report(result: DoseResponse) -> Report:
    """Means by number of repeats, and a row per fact."""
    facts, doses = result.margin.total.shape
    return Report(
        f"DoseResponse(fact={facts}, dose={doses}): logit of the context's answer − logit of the weights', in logits; "
        f"attributions complete within {result.completeness_error:.1e}",
        tables=[_by_repeats(result), _by_fact(result)],
        notes=_notes(result),
    )


def _by_repeats(result: DoseResponse) -> Table:
    several = len(result.conflicts) > 1
    last = (("statements",) if result.statements is not None else ()) + (("theory",) if _fits(result) else ())
    columns = ("repeats", "tokens", "context", "weights", "rest", "total", *(("± sd",) if several else ()), *last)
    rows = [
        [
            str(row["repeats"]),
            f"{row['length']:.4g}",
            *(f"{row[part]:+.3f}" for part in ("context", "weights", "rest", "total")),
            *([f"{row['spread']:.3f}"] if several else []),
            *(f"{row[name]:+.3f}" for name in last),
        ]
        for row in result.by_repeats().to_dict("records")
    ]
    return Table(columns, rows, title="mean over facts, by repeats" if several else "by repeats")


def _by_fact(result: DoseResponse) -> Table:
    fits = _fits(result)
    rows = [
        [
            row["fact"],
            f"{visible(row['context_token'])} / {visible(row['weights_token'])}",
            f"{row['first']:+.2f}",
            f"{row['last']:+.2f}",
            _or_none(flip),
            "–" if math.isnan(row["crossing"]) else f"{row['crossing']:.2f}",
            *([_or_none(predicted.repeats)] if fits else []),
        ]
        for row, flip, predicted in zip(
            result.by_fact().head(_FACTS_SHOWN).to_dict("records"), result.flips, result.theory.flips, strict=False
        )
    ]
    if len(result.conflicts) > _FACTS_SHOWN:
        rows.append([f"{len(result.conflicts) - _FACTS_SHOWN} more", *[""] * (5 + fits)])
    measured = ("fact", "tokens scored", "margin at 0", f"at {result.repeats[-1]}", "flip", "crossing")
    columns = (*measured, *(("theory's flip",) if fits else ()))
    return Table(columns, rows, title="repeats that flip the prediction")


def _fits(result: DoseResponse) -> bool:
    """Whether theory is worth showing: a prediction always, a fit where it explains what is measured."""
    return result.theory.source == "weights" or result.theory.r2 >= _GOOD_FIT


def _notes(result: DoseResponse) -> list[str]:
    theory, s = result.theory, result.theory.strengths
    if theory.source == "weights":
        how = f"predicted at strengths read off the weights: b1 = {s.previous_token:.3g}, "
    else:
        how = "fitted to these margins, with b1 = inf: "
    notes = [f"Theory, {how}b2 = {s.match:.3g}, b3 = {s.copy:.3g}; R² = {theory.r2:.3f} of the change over repeats."]
    if not _fits(result):
        notes = [f"The two-layer theory does not fit these margins (R² = {theory.r2:.3f}), and is not shown."]
    if result.by_source:
        notes.append("Margins are split by source tokens: the context is all that was said before the question.")
    elif not result.circuit.induction:
        notes.append("No induction head is named in the circuit, so nothing counts as the context's.")
    if result.statements is not None:
        notes.append(
            "Statements: how much of the change against 0 repeats is due to what the question's tokens read, of the "
            "statements and no longer elsewhere; norms and MLPs responding make up for the rest."
        )
    if not all(result.known):
        unknown = [one.name for one, known in zip(result.conflicts, result.known, strict=True) if not known]
        notes.append(
            f"The weights do not prefer their answer to begin with: {'; '.join(unknown[:3])}"
            + (f"; and {len(unknown) - 3} more." if len(unknown) > 3 else ".")
        )
    cut = [one for one in result.conflicts if not all(one.whole)]
    if cut:
        notes.append(f"Answers of several tokens are scored by the first: {len(cut)} of the facts.")
    return notes


def _or_none(repeats: int | None) -> str:
    return "none" if repeats is None else str(repeats)


@picture_of.register
def dose_curves(result: DoseResponse) -> Picture:
    """Means over facts of the margin and its parts; behind them one standard deviation, and a line per fact."""
    means, n = result.by_repeats(), list(result.repeats)
    several = len(result.conflicts) > 1
    of = f"mean of {len(result.conflicts)} facts" if several else result.conflicts[0].name
    picture = Picture(6.4, 4.8)
    ax = picture.figure.add_subplot()
    ax.axhline(0, color="black", linewidth=0.8)
    if several:
        for row in result.margin.total.tolist():
            ax.plot(n, row, color="black", alpha=0.25, linewidth=0.7)
        low, high = means["total"] - means["spread"], means["total"] + means["spread"]
        ax.fill_between(n, low, high, color="black", alpha=0.1, label="± 1 standard deviation")
    for memory, colour in COLOURS.items():
        ax.plot(n, means[memory], color=colour, linewidth=2, marker="o", markersize=4, label=memory)
    ax.plot(n, means["total"], color="black", linewidth=2.5, marker="D", markersize=5, label="total")
    how = "predicted from weights" if result.theory.source == "weights" else "fitted"
    label = f"two-layer theory, {how} (R² = {result.theory.r2:.3f})"
    if _fits(result):
        ax.plot(n, means["theory"], color=PURPLE, linewidth=2.5, linestyle="--", label=label, zorder=4)
    flip = crossing(means["total"].tolist())
    if flip > 0:
        ax.axvline(flip, color="black", linestyle=":", linewidth=1.5)
        ax.annotate(
            f"flip at {flip:.2f}",
            (flip, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
        )
    ax.set_xticks(n[:: -(-len(n) // 16)])
    ax.set_xlabel("how often the context says its answer")
    ax.set_ylabel("logit of the context's answer\n− logit of the weights'")
    ax.set_title(of, fontsize=11, pad=18)
    frameless(ax)
    picture.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return picture


@report_of.register
def run_report(run: TrainingRun) -> Report:
    """Whether both memories formed; each at the start, and now."""
    probes = ("in_context_accuracy", "bigram_excess", "previous_token_attention", "induction_attention")
    series = {name.replace("_", " "): run.probe(name) for name in probes}
    rows = [(name, f"{one.iloc[0]:.3f}", f"{one.iloc[-1]:.3f}") for name, one in series.items()]
    taken = (
        f"step {run.step}, {run.config.steps}"
        if isinstance(run.config.steps, str)
        else f"{run.step} of {run.config.steps} steps"
    )
    return Report(
        f"TrainingRun: {taken}",
        [] if run.formed is None else run.formed.lines,
        [Table(("probe", "at the start", "now"), rows)],
    )


@report_of.register
def formed_report(formed: Formed) -> Report:
    """A sentence for each memory, the cause and the remedy."""
    return Report(f"Formed: {formed.short}", formed.lines)


@picture_of.register
def formed_bars(formed: Formed) -> Picture:
    """What each memory reached, and what was asked of it."""
    frame = formed.to_pandas()
    picture = Picture(6.4, 1.9)
    ax = picture.figure.add_subplot()
    colours = [COLOURS[memory] for memory in frame["memory"]]
    ax.barh(range(len(frame)), frame["reached"].fillna(0.0), color=colours, height=0.6)
    ax.plot(frame["asked"], range(len(frame)), "|", color="black", markersize=22, markeredgewidth=2, label="asked")
    for row, value in enumerate(frame["reached"]):
        end = max(0.0, *frame.loc[row, ["reached", "asked"]].fillna(0.0))
        write_beside(ax, "none" if math.isnan(value) else f"{value:.3f}", end, row, 8)
    ax.set_yticks(range(len(frame)), frame["measure"])
    ax.set_ylim(len(frame) - 0.4, -0.6)
    ax.set_title(f"{formed.short} (black: asked)", fontsize=9)
    ax.set_xlabel("fraction, or nats")
    frameless(ax)
    return picture


@picture_of.register
def birth_of_memories(run: TrainingRun) -> Picture:
    """How much of each memory has been learned, by training step."""
    picture = Picture(6.4, 4.4)
    ax = picture.figure.add_subplot()
    excess = run.probe("bigram_excess")
    ax.plot(
        excess.index, 1 - excess / excess.iloc[0], "o-", color=COLOURS["weights"], label="weights: bigram loss learned"
    )
    accuracy = run.probe("in_context_accuracy")
    ax.plot(accuracy.index, accuracy, "s-", color=COLOURS["context"], label="context: in-context accuracy")
    for name, style in (("previous_token_attention", ":"), ("induction_attention", "--")):
        series = run.probe(name)
        ax.plot(series.index, series, style, color=COLOURS["context"], label=name.replace("_", " "), alpha=0.8)
    if run.formed is not None:
        for value, name, style in (
            (run.formed.best, "best possible", "-"),
            (run.formed.shortcut, "without order", ":"),
        ):
            if not math.isnan(value):
                ax.axhline(value, color=PLAIN, linewidth=1, linestyle=style, label=f"in-context accuracy: {name}")
    if run.forming_steps is not None:
        ax.axvline(run.forming_steps, color=PLAIN, linewidth=1, linestyle="--", label="forming ends")
    whole_ticks(ax.xaxis)
    ax.set_xlabel("training step")
    ax.set_ylabel("fraction (1 = fully learned)")
    ax.set_ylim(-0.03, 1.06)
    ax.grid(alpha=0.3)
    frameless(ax)
    picture.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return picture
