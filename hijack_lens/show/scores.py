"""Attention scores and log-odds by path: what the query is made of against what the key is made of."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hijack_lens.attribution.score_attribution import LogOdds, ScoreAttribution
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.style import Picture, heatmap, map_axes, spread_of

_SHOWN = 12
_NEGLIGIBLE = 1e-3
"""Cells below this share of the largest one are not shown one by one."""

_KEYS_NAMED = 3
_TERMS_SHOWN = 14
_MAPS_PER_ROW = 3


@report_of.register
def score_report(result: ScoreAttribution) -> Report:
    """The cells that matter most for the key that gets the most attention, a sink apart."""
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(result.axes, result.values.shape, strict=True))
    apart = "" if result.sink is None else f" but {result.sink}"
    columns = ("score", f"log-odds against all other keys{apart}") if _has_odds(result) else ("score",)
    query, key = (f"{at} {result.texts[at]!r}" for at in (result.query, result.top_key))
    rows = _rows(result)
    return Report(
        f"ScoreAttribution({shape}), completeness error {result.completeness_error:.1e}",
        [_attention(result)],
        [
            Table(
                ["query path", "key path", *columns],
                rows,
                align="llr",
                title=f"{result.circuit.label(result.head)}, from {query} to {key}: its score, by path",
                ruled=[len(rows) - 2],
                total=True,
            )
        ],
    )


@report_of.register
def odds_report(odds: LogOdds) -> Report:
    """One line."""
    several = f" - entropy {odds.entropy:.4g}" if len(odds.against) > 1 else ""
    return Report(
        f"LogOdds({odds.total:+.4g} = paths {float(odds.values.sum()):+.4g}{several}) of key {odds.key} against "
        + (f"key {odds.against[0]}" if len(odds.against) == 1 else f"{len(odds.against)} others")
    )


@picture_of.register
def score_maps(result: ScoreAttribution, key: int | Iterable[int] | None = None) -> Picture:
    """One heat map per key position: query paths against key paths, on one colour scale.

    If there are many terms, those with the largest cells are shown, and the others are summed in one more row and
    column, so that cells always add up to the score.

    Args:
        result: what to show.
        key: a position among its keys, or several; by default the one that gets the most attention, a sink apart.
    """
    listed = [result.top_key] if key is None else list(key) if isinstance(key, Iterable) else [key]
    if not listed:
        raise ValueError("key must be one position or several, got none")
    at = [result.keys.index(result.position(one)) for one in listed]
    titles = [
        f"key {result.keys[i]} {result.texts[result.keys[i]]!r}\nscore {float(result.scores[i]):+.3g}, "
        f"attention {float(result.attention[i]):.1%}"
        for i in at
    ]
    return _maps(
        result.values[at].detach().cpu().double().numpy(),
        titles,
        (result.query_labels, result.key_labels),
        "part of the attention score (nats)",
        f"{result.circuit.label(result.head)} at {result.query} {result.texts[result.query]!r}: scores by path",
    )


@picture_of.register
def odds_map(odds: LogOdds) -> Picture:
    """The same for log-odds: the cells add up to these plus the entropy of the competitors' shares."""
    against = f"key {odds.against[0]}" if len(odds.against) == 1 else f"{len(odds.against)} other keys"
    total = f"log-odds {odds.total:+.3g}"
    if len(odds.against) > 1:
        total += f" = cells {float(odds.values.sum()):+.3g} − entropy {odds.entropy:.3g}"
    return _maps(
        odds.values.detach().cpu().double().numpy()[None],
        [total],
        (odds.query_labels, odds.key_labels),
        "part of the log-odds (nats)",
        f"key {odds.key} against {against}: log-odds by path",
    )


def _maps(
    images: np.ndarray, titles: Sequence[str], labels: tuple[Sequence[str], Sequence[str]], unit: str, title: str
) -> Picture:
    images, rows = _fewer(images, labels[0], axis=1)
    images, columns = _fewer(images, labels[1], axis=2)
    across = min(len(images), _MAPS_PER_ROW)
    width, height = 1.4 + across * (1.6 + max(2.2, 0.52 * len(columns))), 2.2 + max(1.2, 0.36 * len(rows))
    picture, axes, lowest, first = map_axes(len(images), across, width, 0.6 + -(-len(images) // across) * height)
    for ax, image, name in zip(axes, images, titles, strict=True):
        drawn = heatmap(ax, image, rows, columns, spread=spread_of(images), decimals=2, rotation=90, fontsize=8)
        ax.set_title(name, fontsize=9)
    for ax in lowest:
        ax.set_xlabel("key path: what wrote the key")
    for ax in first:
        ax.set_ylabel("query path: what wrote the query")
    picture.figure.colorbar(drawn, ax=axes.tolist(), label=unit, pad=0.02)
    picture.figure.suptitle(title, fontsize=10)
    return picture


def _fewer(images: np.ndarray, names: Sequence[str], axis: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The terms with the largest cells, in their order, and the others summed."""
    if len(names) <= _TERMS_SHOWN:
        return images, tuple(names)
    largest = np.abs(images).max(axis=tuple(i for i in range(3) if i != axis))
    kept = np.sort(np.argsort(-largest, kind="stable")[: _TERMS_SHOWN - 1])
    others = np.setdiff1d(np.arange(len(names)), kept)
    summed = images.take(others, axis).sum(axis, keepdims=True)
    shown = (*(names[i] for i in kept), f"{len(others)} others")
    return np.concatenate([images.take(kept, axis), summed], axis), shown


def _attention(result: ScoreAttribution) -> str:
    order = result.attention.argsort(descending=True, stable=True)[:_KEYS_NAMED].tolist()
    named = (
        f"{result.keys[i]} {result.texts[result.keys[i]]!r} {float(result.attention[i]):.1%}"
        f" (score {float(result.scores[i]):+.3f})"
        for i in order
    )
    return (
        f"{result.circuit.label(result.head)} at {result.query} {result.texts[result.query]!r} attends to "
        + ", ".join(named)
    )


def _has_odds(result: ScoreAttribution) -> bool:
    return len(result.keys) == result.query + 1 > 1


def _rows(result: ScoreAttribution) -> list[tuple[str, ...]]:
    """The largest cells, the sum of the rest, and the sum of all."""
    tables = [result.values[result.keys.index(result.top_key)]]
    if _has_odds(result):
        odds = result.log_odds()
        tables.append(odds.values)
    # What all keys' scores share does not affect where the head looks: with competitors, sort by log-odds.
    sizes = tables[-1].abs().flatten()
    order = sizes.argsort(descending=True, stable=True)[:_SHOWN].tolist()
    shown = [index for index in order if bool(sizes[index] > _NEGLIGIBLE * sizes.max())]
    width = len(result.key_terms)
    rows: list[tuple[str, ...]] = [
        (
            result.query_labels[index // width],
            result.key_labels[index % width],
            *(_number(float(table.flatten()[index])) for table in tables),
        )
        for index in shown
    ]
    sums = [float(table.sum()) for table in tables]
    hidden = len(sizes) - len(shown)
    if hidden:
        visible = torch.tensor(shown, dtype=torch.long, device=sizes.device)
        left = (float(table.flatten().index_fill(0, visible, 0.0).sum()) for table in tables)
        rows.append((f"{hidden} more", "", *map(_number, left)))
    if _has_odds(result) and len(odds.against) > 1:
        rows.append(("less the entropy of the other keys' shares", "", "", _number(-odds.entropy)))
        sums[1] -= odds.entropy
    return [*rows, ("sum", "", *map(_number, sums))]


def _number(value: float) -> str:
    return f"{value:+.3f}"
