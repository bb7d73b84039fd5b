"""Sweeps as heat maps."""

from typing import TYPE_CHECKING, Any

import numpy as np

from hijack_lens.core.texts import visible
from hijack_lens.show.style import Picture

if TYPE_CHECKING:
    from hijack_lens.hooks.sweep_results import Sweep


# Diverging, told apart also by colour-blind readers: purple one way, orange the other.
DIVERGING = "PuOr_r"

_ROWS_LABELLED = 40
_MAPS_PER_ROW = 3
_FEW_ROWS, _MANY_POSITIONS = 8, 16


def sweep_maps(sweep: "Sweep", normalised: bool | None = None) -> Picture:
    """A heat map per component: layers, or layers with their heads or neurons, against positions.

    Args:
        sweep: what to show.
        normalised: whether on the scale 0 = corrupted, 1 = clean, rather than as the metric's change; by default
            where there is such a scale.

    Raises:
        ValueError: where `normalised` is asked for and there is no such scale.
    """
    if normalised is None:
        normalised = sweep.source is not None and sweep.source != sweep.base
    # Colours are centred on "no effect": the run that is patched into.
    values: np.ndarray = (sweep.normalised if normalised else sweep.effect).detach().cpu().double().numpy()
    centre = 0.0 if not normalised or sweep.direction == "denoise" else 1.0
    n_components, n_layers, n_positions = values.shape[:3]
    by_row = values.reshape(n_components, n_layers, n_positions, -1).transpose(0, 1, 3, 2)
    maps = by_row.reshape(n_components, -1, n_positions)
    n_rows = maps.shape[1]
    flat = n_rows <= _FEW_ROWS and n_positions > _MANY_POSITIONS  # such maps are stacked
    across = 1 if flat else min(n_components, _MAPS_PER_ROW)
    lines = -(-n_components // across)
    picture = Picture(
        2.2 + across * min(6.0, max(2.6, 0.16 * n_positions)), lines * (1.6 + min(7.0, max(1.2, 0.16 * n_rows)))
    )
    axes = picture.figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flatten()
    spread = float(np.nanmax(np.abs(maps - centre))) if np.isfinite(maps).any() else 0.0
    spread = spread or 1.0
    labels = [
        f"L{layer}" if sweep.unit is None else f"L{layer}{'H' if sweep.unit == 'head' else 'N'}{unit}"
        for layer in sweep.layers
        for unit in (sweep.units if sweep.unit else (None,))
    ]
    ticks = range(0, n_rows, max(1, -(-n_rows // _ROWS_LABELLED)))
    for ax, component, image in zip(axes, sweep.components, maps, strict=False):
        drawn = ax.imshow(
            image, cmap=DIVERGING, vmin=centre - spread, vmax=centre + spread, aspect="auto", interpolation="nearest"
        )
        ax.set_title(component)
        ax.set_yticks(ticks, [labels[row] for row in ticks], fontsize=8)
    for ax in axes[n_components:]:
        ax.remove()
    for ax in axes[max(0, n_components - across) : n_components]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
        _label_positions(ax, sweep)
    for line in range(lines):
        axes[line * across].set_ylabel("layer" if sweep.unit is None else f"layer and {sweep.unit}")
    verb = {"denoise": "clean patched into corrupted", "noise": "corrupted patched into clean", "ablate": "ablated"}
    scale = "0 = corrupted, 1 = clean" if normalised else "change from the unpatched run"
    picture.figure.colorbar(drawn, ax=axes[:n_components].tolist(), label=f"{sweep.metric}\n{scale}", pad=0.02)
    picture.figure.suptitle(verb[sweep.direction], fontsize=10)
    return picture


def _label_positions(ax: Any, sweep: "Sweep") -> None:
    positions = sweep.positions
    step = max(1, -(-len(positions) // 64))
    ticks = list(range(0, len(positions), step))
    if sweep.texts is not None:
        names = [f"{visible(sweep.texts[i])} {positions[i]}" for i in ticks]
    else:
        names = ["all" if positions[i] is None else str(positions[i]) for i in ticks]
    ax.set_xticks(ticks, names, fontsize=7, family="monospace", rotation=90 if len(ticks) > 12 or sweep.texts else 0)
    ax.set_xlabel("position" + (" (token, place)" if sweep.texts is not None else ""))
