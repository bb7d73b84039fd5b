"""Sweeps: patches and edges as heat maps, and the largest effects in words."""

from typing import Any

import numpy as np
from torch import Tensor

from hijack_lens.core.tables import Report, Table, picture_of, report_of, table_of, visible
from hijack_lens.hooks.edges import name_of
from hijack_lens.hooks.sweep_results import Comparison, EdgeScreen, PathSweep, Sweep
from hijack_lens.show.style import BLUE, GREY, MAP_WIDEST, Picture, frameless, heatmap, map_axes, spread_of

_LARGEST = 5
_ROWS_NAMED, _POSITIONS_NAMED = 40, 64
_MAPS_PER_ROW = 3
_FEW_ROWS, _MANY_POSITIONS = 8, 16

_EDGES_SHOWN = 20
_NEGLIGIBLE = 1e-3
"""Edges below this share of the largest effect are left out of tables."""

_SENDERS_WITH_NUMBERS, _EDGES_WIDEST = 8, 3.5
_POINTS = 2000


@report_of.register
def sweep_report(sweep: Sweep) -> Report:
    """The patches with the largest effects."""
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(sweep.axes, sweep.values.shape, strict=True))
    head = f"Sweep({shape}) of {sweep.metric}, {sweep.direction}, by {sweep.method} runs; unpatched: {sweep.base:.4g}"
    if sweep.source is not None:
        head += f", source run: {sweep.source:.4g}"
    effect, values = sweep.effect.detach().flatten(), sweep.values.flatten()
    largest = effect.nan_to_num().abs().argsort(descending=True, stable=True)[:_LARGEST].tolist()
    return Report(head, [f"  {sweep.describe(i)}: {float(values[i]):.4g} ({float(effect[i]):+.4g})" for i in largest])


@report_of.register
def comparison_report(comparison: Comparison) -> Report:
    """How far the estimates are off, and where most."""
    frame = comparison.to_pandas()
    worst = frame.reindex(frame["error"].abs().sort_values(ascending=False, kind="stable").index)[:_LARGEST]
    return Report(
        f"Comparison of {len(frame)} effects on {comparison.exact.metric}: largest error {comparison.max_error:.3g}, "
        f"relative error {comparison.relative_error:.3g}, correlation {comparison.correlation:.4f}",
        tables=[table_of(worst, "largest errors")],
    )


@picture_of.register
def comparison_scatter(comparison: Comparison) -> Picture:
    """Each patch's estimated effect against its exact one."""
    picture = Picture(4.6, 4.0)
    ax = picture.figure.add_subplot()
    found = comparison.to_pandas()
    ax.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":")
    ax.scatter(found["exact"], found["estimate"], s=14, color=BLUE, alpha=0.7, rasterized=len(found) > _POINTS)
    ax.set_xlabel(f"exact change of {comparison.exact.metric}")
    ax.set_ylabel("estimate by gradients")
    ax.set_title(f"correlation {comparison.correlation:.3f} (dotted: equal)", fontsize=9)
    frameless(ax)
    return picture


@picture_of.register
def screen_picture(screen: EdgeScreen) -> Picture:
    """The metric with each chosen edge, by estimate, and with each drawn one, by a run."""
    picture = Picture(6.0, 2.4)
    ax = picture.figure.add_subplot()
    for row, values, colour in ((0, screen.estimates, BLUE), (1, screen.values, GREY)):
        ax.plot(values.detach().cpu().double(), [row] * len(values), "|", markersize=18, color=colour)
    ax.set_yticks([0, 1], [f"{len(screen.estimates)} chosen\n(estimates)", f"{len(screen.values)} drawn\n(by runs)"])
    ax.set_ylim(1.6, -0.6)
    ax.set_xlabel("metric with the edge's message replaced")
    frameless(ax)
    return picture


@picture_of.register
def sweep_maps(sweep: Sweep, normalised: bool | None = None) -> Picture:
    """A heat map per activation: layers, or layers with their heads or neurons, against positions.

    Args:
        sweep: what to show.
        normalised: whether to use the scale 0 = corrupted, 1 = clean, instead of the metric's change; by default,
            if there is such a scale.
    """
    if normalised is None:
        normalised = sweep.source is not None and sweep.source != sweep.base
    # Colours are centred on "no effect": the run that is patched into.
    values: np.ndarray = (sweep.normalised if normalised else sweep.effect).detach().cpu().double().numpy()
    centre = 0.0 if not normalised or sweep.direction == "denoise" else 1.0
    n_maps, n_layers, n_positions = values.shape[:3]
    by_row = values.reshape(n_maps, n_layers, n_positions, -1).transpose(0, 1, 3, 2)
    maps = by_row.reshape(n_maps, -1, n_positions)
    n_rows = maps.shape[1]
    flat = n_rows <= _FEW_ROWS and n_positions > _MANY_POSITIONS  # such maps are stacked
    across = 1 if flat else min(n_maps, _MAPS_PER_ROW)
    of_map = 1.0 + max(0.5, 0.16 * n_rows) if flat else 1.6 + min(7.0, max(1.2, 0.16 * n_rows))
    below = across == 1 and n_positions > _MANY_POSITIONS  # the colour bar, so that positions have all the width
    height = 0.6 + 0.7 * below + -(-n_maps // across) * of_map
    widest = MAP_WIDEST + 1.2 * below
    width = (0.2 if below else 1.4) + across * (0.6 + min(widest, max(2.6, 0.16 * n_positions)))
    picture, axes, lowest, first = map_axes(n_maps, across, width, height)
    labels = [
        f"L{layer}" if sweep.unit is None else f"L{layer}{'H' if sweep.unit == 'head' else 'N'}{unit}"
        for layer in sweep.layers
        for unit in (sweep.units if sweep.unit else (None,))
    ]
    for ax, name, image in zip(axes, sweep.activations, maps, strict=True):
        drawn = heatmap(ax, image, labels, centre=centre, spread=spread_of(maps, centre), named=_ROWS_NAMED, fontsize=8)
        ax.set_title(name)
    for ax in lowest:
        _name_positions(ax, sweep)
    for ax in first:
        ax.set_ylabel("layer" if sweep.unit is None else f"layer and {sweep.unit}")
    verb = {"denoise": "clean patched into corrupted", "noise": "corrupted patched into clean", "ablate": "ablated"}
    scale = "0 = corrupted, 1 = clean" if normalised else "change from the unpatched run"
    place: dict[str, Any] = {"location": "bottom", "aspect": 40} if below else {"pad": 0.02}
    picture.figure.colorbar(drawn, ax=axes.tolist(), label=f"{sweep.metric}\n{scale}", **place)
    picture.figure.suptitle(verb[sweep.direction], fontsize=10)
    return picture


def _name_positions(ax: Any, sweep: Sweep) -> None:
    positions = sweep.positions
    ticks = list(range(0, len(positions), max(1, -(-len(positions) // _POSITIONS_NAMED))))
    if sweep.texts is not None:
        names = [f"{visible(sweep.texts[i])} {positions[i]}" for i in ticks]
    else:
        names = ["all" if positions[i] is None else str(positions[i]) for i in ticks]
    ax.set_xticks(ticks, names, fontsize=7, family="monospace", rotation=90 if len(ticks) > 12 or sweep.texts else 0)
    ax.set_xlabel("position" + (" (token, place)" if sweep.texts is not None else ""))


@report_of.register
def path_report(sweep: PathSweep) -> Report:
    """The edges with the largest effects."""
    clean, corrupted = ("messages", "run") if sweep.direction == "denoise" else ("run", "messages")
    columns = {"value": sweep.values, "effect": sweep.effect}
    if sweep.clean != sweep.corrupted:
        columns["normalised"] = sweep.normalised
    sizes = sweep.effect.nan_to_num(0.0).abs()  # what was not scored comes last
    shown = _shown(sizes)
    edges = [(sweep.edges[i], [f"{float(column[i]):+.4g}" for column in columns.values()]) for i in shown]
    table = Table(
        ["sender", "receiver", "via", *columns],
        [
            (name_of(edge.sender, sweep.circuit), name_of(edge.receiver, sweep.circuit), edge.via, *numbers)
            for edge, numbers in edges
        ],
        align="lllr",
        title=f"{sweep.metric}, edge by edge: clean {clean}, corrupted {corrupted}",
    )
    runs = f"{sweep.metric}: {sweep.clean:+.4g} clean, {sweep.corrupted:+.4g} corrupted"
    return Report(
        f"PathSweep(edge={len(sweep.edges)}); {runs}",
        tables=[table] if shown else [],
        notes=[*filter(None, [_hidden(sizes, shown), _screened(sweep)])],
    )


def _screened(sweep: PathSweep) -> str:
    if sweep.screen is None:
        return ""
    others, drawn = sweep.screen.n_edges - len(sweep.edges), sweep.screen.drawn
    largest = float((sweep.screen.values - sweep.base).abs().max())
    return (
        f"Chosen by gradients among {sweep.screen.n_edges:,} edges. Of the {others:,} others, {len(drawn)} drawn at "
        f"random have effects of at most {largest:.2g}; with 95% confidence, at most {sweep.missed(largest):,} have "
        "larger ones."
    )


def _shown(sizes: Tensor) -> list[int]:
    largest = sizes.argsort(descending=True, stable=True)[:_EDGES_SHOWN]
    return [index for index in largest.tolist() if bool(sizes[index] > _NEGLIGIBLE * sizes.max())]


def _hidden(sizes: Tensor, shown: list[int]) -> str:
    rest = [size for index, size in enumerate(sizes.tolist()) if index not in shown]
    if not shown:
        return f"None of the {len(rest)} edges has an effect."
    several = len(rest) != 1
    return f"{len(rest)} more edge{'s' * several}, with effects of at most {max(rest):.2g}." if rest else ""


@picture_of.register
def edge_map(sweep: PathSweep) -> Picture:
    """Effects of a sweep's edges: the inputs of receivers against senders. Cells without an edge are grey.

    Colours are centred on no effect.
    """
    senders = list(dict.fromkeys(edge.sender for edge in sweep.edges))
    # The embedding comes first and reaches every input, in the model's order.
    inputs = list(dict.fromkeys((edge.receiver, edge.via) for edge in sweep.edges))
    image = np.full((len(inputs), len(senders)), np.nan)
    row, column = ({end: place for place, end in enumerate(ends)} for ends in (inputs, senders))
    for edge, effect in zip(sweep.edges, sweep.effect.cpu().double().tolist(), strict=True):
        image[row[edge.receiver, edge.via], column[edge.sender]] = effect
    picture = Picture(3.2 + min(0.55 * len(senders), _EDGES_WIDEST), 2.6 + min(0.34 * len(inputs), 14.0))
    ax = picture.figure.add_subplot()
    drawn = heatmap(
        ax,
        image,
        [name_of(receiver, sweep.circuit) + (f" {via}" if via != "unembed" else "") for receiver, via in inputs],
        [name_of(sender, sweep.circuit) for sender in senders],
        decimals=0 if len(senders) <= _SENDERS_WITH_NUMBERS else None,
        rotation=90,
        fontsize=9,
    )
    ax.set_xlabel("sender (grey: no such edge)")
    ax.set_ylabel("receiver and its input")
    picture.figure.colorbar(drawn, ax=ax, label=f"change of {sweep.metric}", pad=0.02)
    sent = "clean messages, corrupted run" if sweep.direction == "denoise" else "corrupted messages, clean run"
    picture.figure.suptitle(f"path patching, edge by edge: {sent}", fontsize=10)
    return picture
