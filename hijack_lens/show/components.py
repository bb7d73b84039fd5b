"""Which components play which role, with what evidence, and what each is worth."""

from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np

from hijack_lens.attribution.shapley_values import ShapleyValues
from hijack_lens.circuits.evidence import CircuitEvidence
from hijack_lens.core.circuit import ROLE_NAMES
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.style import BLUE, GREY, ORANGE, Picture, frameless, heatmap, name_rows, write_beside

_LEGEND = (
    "Heads: score is attention; effect, the nats of in-context gain lost without the head; on its own, those it brings "
    "back when the role's other candidates are off. MLPs: score is the share of the context-free prediction; effect "
    "is in logits."
)
_TITLES = {
    "previous_token": "attention to the token before",
    "induction": "attention to where the current token's\nsuccessor stood, beyond shuffled prompts",
}
_LAYERS_NAMED = 12

_PLAYERS_SHOWN, _PAIRS_SHOWN = 30, 10
_PLAYERS_NAMED, _PLAYERS_WITH_NUMBERS = 40, 12
_ABLATION = {
    "zero": "absent components write zeros",
    "mean": "absent components write the reference's mean",
    "resample": "absent components write what a reference prompt has",
    "patch": "absent components write what the reference has",
}


@report_of.register
def evidence_report(evidence: CircuitEvidence) -> Report:
    """The verdicts in words; each role's named components, and the best of the rest."""
    found = evidence.to_pandas().sort_values(["named", "score"], ascending=False)
    rows, ruled = [], []
    for role, name in ROLE_NAMES.items():
        part = found[(found["role"] == role) & found["score"].notna()]
        part = part.head(int(part["named"].sum()) + 1)
        numbers = part[["score", "null", "effect", "regained", "effect_null"]].to_numpy()
        for i, (component, row, named) in enumerate(zip(part["component"], numbers, part["named"], strict=True)):
            cells = ("–" if isnan(number) else f"{number:.3f}" for number in row)
            rows.append([name if i == 0 else "", component, *cells, "yes" if named else "no"])
        ruled.append(len(rows) - 1)
    columns = ("role", "component", "score", "null", "effect", "on its own", "effect's null", "named")
    title = "evidence for the circuit's components"
    return Report(
        f"CircuitEvidence from {evidence.n_prompts} prompts of {evidence.period} repeated tokens: in-context gain "
        f"{evidence.gain:.2f} nats (null {evidence.gain_null:.2f}); context-free information "
        f"{evidence.bigram.information:.2f} nats, {evidence.bigram.direct_share:.0%} of it on the direct path",
        evidence.verdicts.splitlines(),
        [Table(columns, rows, align="llrrrrrl", title=title, ruled=ruled)],
        [_LEGEND],
    )


@picture_of.register
def circuit_map(evidence: CircuitEvidence) -> Picture:
    """Heat maps of the heads' scores for each role, and bars of the MLPs' shares; named ones stand out."""
    from matplotlib.patches import Rectangle

    n_layers, n_heads = evidence.induction.score.shape
    side = min(0.5, 9 / max(n_layers, n_heads))  # inches per head
    width = max(2.6, side * n_heads)
    picture = Picture(2 * width + 5.6, max(2.0, side * n_layers) + 1.5)
    axes = picture.figure.subplots(1, 3, width_ratios=[width, width, 2.9])
    heads = [str(head) for head in range(n_heads)]
    for ax, (role, title) in zip(axes, _TITLES.items(), strict=False):
        image = heatmap(ax, getattr(evidence, role).score, columns=heads, attention=True, named=_LAYERS_NAMED)
        for part in getattr(evidence.circuit, role):
            corner = (part.head - 0.5, part.layer - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False, zorder=3))
        ax.set_title(f"{ROLE_NAMES[role]}s\n{title}", fontsize=9)
        ax.set_xlabel("head")
    picture.figure.colorbar(image, ax=axes[:2], label="attention (framed: named)", shrink=0.9)
    ax, share = axes[2], evidence.bigram.share.nan_to_num(0.0).tolist()
    named = {part.layer for part in evidence.circuit.bigram}
    ax.barh(range(n_layers), share, color=[ORANGE if layer in named else GREY for layer in range(n_layers)])
    ax.axvline(evidence.bigram.direct_share, color="black", linestyle="--", linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_ylim(n_layers - 0.5, -0.5)
    ax.set_title(f"{ROLE_NAMES['bigram']}\nMLPs (orange: named)\ndashed: the direct path", fontsize=9)
    ax.set_xlabel("share of the context-free prediction")
    frameless(ax)
    for ax in axes:
        ax.set_ylabel("layer")
        ax.set_yticks(range(0, n_layers, max(1, n_layers // _LAYERS_NAMED)))
    return picture


@report_of.register
def shapley_report(result: ShapleyValues) -> Report:
    """The players' values, largest first, and the pairs with the strongest interactions."""
    runs = f"exact, from all {result.n_runs} coalitions"
    if not result.exact:
        runs = f"estimated from {result.n_samples} random orders and their reverses, {result.n_runs} coalitions in all"
    efficiency = (
        f"{result.full:+.4g} with all, {result.empty:+.4g} with none: the values sum to the difference, "
        f"{result.full - result.empty:+.4g}, within {result.efficiency_error:.1e}"
    )
    return Report(
        f"ShapleyValues(player={len(result.players)}) of {result.metric}; {_ABLATION[result.how]}"
        + ("" if result.at is None else f", from {result.at} on"),
        [runs, efficiency],
        [table for table in (_values(result), _interactions(result)) if table.rows],
    )


@picture_of.register
def shapley_bars(result: ShapleyValues) -> Picture:
    """Each player's value with its 95% confidence interval, and the pairs' interactions. Grey cells were not scored."""
    n = len(result.players)
    scored = bool(result.interactions.isfinite().any())
    side = max(2.4, min(0.5 * n, 9.0))
    picture = Picture(6.0 + scored * (side + 2.8), 2.0 + side)
    axes = picture.figure.subplots(1, 1 + scored, squeeze=False, sharey=True, width_ratios=[4.5, side][: 1 + scored])[0]

    ax = axes[0]
    values, error = result.values.numpy(), (result.ci[:, 1] - result.values).numpy()
    ax.barh(range(n), values, xerr=None if result.exact else error, color=BLUE, height=0.62, ecolor="black", capsize=3)
    if n <= _PLAYERS_WITH_NUMBERS:
        for row, value in enumerate(values):
            write_beside(ax, f"{value:+.3g}", value + np.copysign(error[row], value), row, 5)
    ax.axvline(0, color="black", linewidth=1)
    named = range(0, n, -(-n // _PLAYERS_NAMED))
    ax.set_yticks(named, [result.labels[i] for i in named])
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_xlabel(f"worth: change of {result.metric}" + ("" if result.exact else "\n(95% confidence intervals)"))
    ax.set_title(f"Shapley values: {result.empty:+.3g} with none, {result.full:+.3g} with all", fontsize=10)
    frameless(ax)
    if scored:
        name_rows(*axes)
        ax, decimals = axes[1], 0 if n <= _PLAYERS_WITH_NUMBERS else None
        drawn = heatmap(
            ax, result.interactions, columns=result.labels, decimals=decimals, named=_PLAYERS_NAMED, rotation=90
        )
        ax.set_xlabel("with which player")
        ax.set_title("pairs (+ need each other, − do the same)", fontsize=10)
        picture.figure.colorbar(drawn, ax=ax, label=f"interaction, in {result.metric}")
    return picture


def _values(result: ShapleyValues) -> Table:
    table = result.to_pandas().sort_values("value", key=abs, ascending=False, kind="stable")
    columns = ("player", "value", *(("on its own", "last to come") if result.exact else ("95% interval",)))
    rows: list[Sequence[str]] = [
        [str(row.player), f"{row.value:+.4g}"]
        + ([f"{row.alone:+.4g}", f"{row.last:+.4g}"] if result.exact else [_ci(row)])
        for row in table.head(_PLAYERS_SHOWN).itertuples()
    ]
    hidden = table["value"][_PLAYERS_SHOWN:]
    if len(hidden):
        rows.append([f"{len(hidden)} more", f"{hidden.sum():+.4g}"] + [""] * (len(columns) - 2))
    return Table(columns, rows, title="Shapley values")


def _interactions(result: ShapleyValues) -> Table:
    """The pairs that were scored."""
    table = result.interactions_to_pandas().dropna()
    table = table.sort_values("interaction", key=abs, ascending=False, kind="stable")
    rows = [
        [f"{row.first} × {row.second}", f"{row.interaction:+.4g}"] + ([] if result.exact else [_ci(row)])
        for row in table.head(_PAIRS_SHOWN).itertuples()
    ]
    return Table(("pair", "interaction", *(() if result.exact else ("95% interval",))), rows, title="interactions")


def _ci(row: Any) -> str:
    return f"{row.low:+.4g} … {row.high:+.4g}"
