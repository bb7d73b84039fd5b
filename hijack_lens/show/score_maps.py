"""Attention scores by path as heat maps: what the query is made of against what the key is made of."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hijack_lens.attribution.score_terms import term_label
from hijack_lens.show.style import Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.attribution.score_attribution import LogOdds, ScoreAttribution


_TERMS_SHOWN = 14
_MAPS_PER_ROW = 3


def score_maps(result: "ScoreAttribution", keys: Sequence[int]) -> Picture:
    """One heat map per key position: query paths against key paths, in one scale of colours.

    Of many terms, those with the largest cells are shown, and the others summed up in one more row and column: cells
    always add up to the score.

    Args:
        result: what to show.
        keys: positions among its own.
    """
    at = [result.keys.index(key) for key in keys]
    titles = [
        f"key {key} {result.texts[key]!r}\nscore {float(result.scores[i]):+.3g}, "
        f"attention {float(result.attention[i]):.1%}"
        for key, i in zip(keys, at, strict=True)
    ]
    head, query = result.circuit.label(result.head), result.query
    return _maps(
        result.values[at].detach().cpu().double().numpy(),
        titles,
        (result.query_labels, result.key_labels),
        "part of the attention score (nats)",
        f"{head} at {query} {result.texts[query]!r}: scores by path",
    )


def odds_map(odds: "LogOdds") -> Picture:
    """The same of log-odds, whose cells add up to them and to the entropy of the competitors' shares."""
    against = f"key {odds.against[0]}" if len(odds.against) == 1 else f"{len(odds.against)} other keys"
    total = f"log-odds {odds.total:+.3g}"
    if len(odds.against) > 1:
        total += f" = cells {float(odds.values.sum()):+.3g} − entropy {odds.entropy:.3g}"
    rows, columns = (
        tuple(term_label(term, odds.circuit) for term in terms) for terms in (odds.query_terms, odds.key_terms)
    )
    return _maps(
        odds.values.detach().cpu().double().numpy()[None],
        [total],
        (rows, columns),
        "part of the log-odds (nats)",
        f"key {odds.key} against {against}: log-odds by path",
    )


def _maps(
    images: np.ndarray, titles: Sequence[str], labels: tuple[Sequence[str], Sequence[str]], unit: str, title: str
) -> Picture:
    images, rows = _fewer(images, labels[0], axis=1)
    images, columns = _fewer(images, labels[1], axis=2)
    spread = float(np.abs(images).max()) or 1.0
    decimals = 0 if spread >= 100 else max(2, 1 - math.floor(math.log10(spread)))
    across = min(len(images), _MAPS_PER_ROW)
    lines = -(-len(images) // across)
    picture = Picture(3.0 + across * max(2.2, 0.52 * len(columns)), 0.6 + lines * (2.2 + max(1.2, 0.36 * len(rows))))
    axes = picture.figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, image, name in zip(axes, images, titles, strict=False):
        drawn = ax.imshow(image, cmap=DIVERGING, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        for (row, column), value in np.ndenumerate(image):
            colour = "white" if abs(value) > 0.6 * spread else "black"
            text = f"{value:+.{decimals}f}" if round(float(value), decimals) else "0"
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    for ax in axes[len(images) :]:
        ax.remove()
    for ax in axes[max(0, len(images) - across) : len(images)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("key path: what wrote the key")
    for ax in axes[::across]:
        ax.set_ylabel("query path: what wrote the query")
    picture.figure.colorbar(drawn, ax=axes[: len(images)].tolist(), label=unit, pad=0.02)
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
