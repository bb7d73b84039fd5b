"""Figures drawn with matplotlib, without its global state."""

import io
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from hijack_lens.attribution.table import COLOURS

if TYPE_CHECKING:
    from hijack_lens.explain import Explanation


class Picture:
    """A finished figure: shows itself in a notebook, and can be saved.

    Attributes:
        figure: the `matplotlib.figure.Figure`.
    """

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained")

    def __repr__(self) -> str:
        return f"Picture({'; '.join(ax.get_xlabel() for ax in self.figure.axes if ax.get_xlabel())})"

    def save(self, path: Any) -> None:
        """Writes the picture; the format follows from the name."""
        self.figure.savefig(path, dpi=150)

    def svg(self) -> str:
        """The picture as an SVG element, its text drawn as outlines."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()[buffer.getvalue().index("<svg") :]

    def png(self, dpi: int = 120) -> bytes:
        """The picture as a PNG file's content."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def margin_bars(explanation: "Explanation") -> Picture:
    """The hijack margin by memory, and what is left of it with each component switched off."""
    if not hasattr(explanation, "ablated"):
        raise TypeError(f"explanation must come from hijack_lens.explain, got {type(explanation).__name__}")
    margin, (c, g) = explanation.margin, explanation.names
    rows = ["whole model", *(f"{name} off" for name in explanation.ablated)]
    picture = Picture(8.0, 1.3 + 0.5 * len(rows))
    ax = picture.figure.add_subplot()
    ends = {1: 0.0, -1: 0.0}
    for memory, colour in COLOURS.items():
        value = float(getattr(margin, memory))
        side = 1 if value >= 0 else -1
        ax.barh(0, value, left=ends[side], color=colour, label=memory, height=0.62)
        ends[side] += value
    for row, total in enumerate([float(margin.total), *explanation.ablated.values()]):
        if row:
            ax.barh(row, total, color="#555555", height=0.62)
        ax.plot(total, row, "D", color="black", markersize=6, label="total" if row == 0 else None)
        ax.annotate(
            f"{total:+.2f}",
            (total, row),
            xytext=(9 if total >= 0 else -9, 0),
            textcoords="offset points",
            ha="left" if total >= 0 else "right",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "edgecolor": "none"},
        )
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    extent = [*ends.values(), *explanation.ablated.values()]
    room = 0.15 * ((max(extent) - min(extent)) or 1.0)  # for the numbers beside the bars
    ax.set_xlim(min(extent) - room, max(extent) + room)
    ax.set_xlabel(f"weights win: {g!r}   ←   logit {c!r} − logit {g!r}   →   context wins: {c!r}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return picture


def attention_maps(patterns: dict[str, Float[Tensor, "query key"]], tokens: list[str], width: float = 9.0) -> Picture:
    """Attention patterns side by side, one heat map per head.

    Args:
        patterns: by the head's name.
        tokens: texts of the positions.
        width: of the picture, in inches.
    """
    picture = Picture(width, width / len(patterns) + 0.6)
    axes = picture.figure.subplots(1, len(patterns), squeeze=False)[0]
    step = max(1, len(tokens) // 32)
    ticks = range(0, len(tokens), step)
    for ax, (name, pattern) in zip(axes, patterns.items(), strict=True):
        image = ax.imshow(pattern.detach().cpu().float().numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(name)
        ax.set_xticks(ticks, [tokens[i] for i in ticks], fontsize=7, family="monospace")
        ax.set_yticks(ticks, [tokens[i] for i in ticks], fontsize=7, family="monospace")
        ax.set_xlabel("source token (attended to)")
        ax.set_ylabel("destination token (attending)")
    picture.figure.colorbar(image, ax=axes, label="attention", shrink=0.8)
    return picture
