"""The weights' table beside the bigrams', and how many directions each takes."""

from typing import TYPE_CHECKING, Any

import torch

from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.memories.matrix import MemoryMatrix


_NAMED = 45
_MAP = 4.6


def matrix_maps(result: "MemoryMatrix") -> Picture:
    """Heat maps of the memory and of g * log pi_b on one scale, and the singular values of both."""
    what = "what the weights say" if result.part == "weights" else "what the memory writes"
    maps = {what: result.values}
    spectra = {what: (result.singular_values, COLOURS["weights"], "o-")}
    if result.log_pi_b is not None:
        scaled = result.slope * result.log_pi_b
        maps[f"{result.slope:.3g} × log pi_b"] = scaled
        spectra["g × log pi_b"] = (torch.linalg.svdvals(scaled), "black", "--")
    n_maps = len(maps)
    picture = Picture(_MAP * n_maps + 5.2, _MAP + 0.6)
    axes = picture.figure.subplots(1, n_maps + 1, width_ratios=[1.0] * n_maps + [0.85])
    spread = max(float(table.abs().max()) for table in maps.values()) or 1.0
    for ax, (title, table) in zip(axes, maps.items(), strict=False):
        drawn = ax.imshow(
            table.numpy(), cmap=DIVERGING, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest"
        )
        ax.set_title(title, fontsize=11)
        _name(ax.yaxis, result, result.key_tokens)
        _name(ax.xaxis, result, result.value_tokens)
        ax.set_xlabel("value: next token")
    axes[0].set_ylabel("key: current token")
    picture.figure.colorbar(drawn, ax=axes[:n_maps].tolist(), label="logit, relative to its row's mean", pad=0.02)

    ax, largest = axes[-1], float(result.singular_values.max()) or 1.0
    for label, (values, colour, style) in spectra.items():
        above = values[values > 1e-6 * largest]
        ax.plot(range(1, len(above) + 1), above.numpy(), style, color=colour, label=label, markersize=3)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("rank")
    ax.set_ylabel("singular value (logits)")
    ax.set_title(_scores(result), fontsize=11)
    ax.legend(frameon=False, loc="lower left")
    ax.spines[["top", "right"]].set_visible(False)
    return picture


def _name(axis: Any, result: "MemoryMatrix", tokens: tuple[int, ...]) -> None:
    step = -(-len(tokens) // _NAMED)
    ticks = range(0, len(tokens), step)
    names = [result.token_text(tokens[i]).replace("$", r"\$") for i in ticks]
    axis.set_ticks(ticks, names, fontsize=6, family="monospace")
    if axis.axis_name == "x" and max(map(len, names)) > 2:
        axis.set_tick_params(rotation=90)


def _scores(result: "MemoryMatrix") -> str:
    rank = f"rank {result.rank}, effectively {result.effective_rank:.0f}"
    return rank if result.log_pi_b is None else f"recall {result.recall():.0%}, R² {result.r2:.3f}\n{rank}"
