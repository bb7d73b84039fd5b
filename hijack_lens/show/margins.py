"""Margins by memory: stacked bars, or lines where there are many."""

from hijack_lens.core.circuit import Margin
from hijack_lens.core.tables import picture_of
from hijack_lens.show.style import COLOURS, Picture, frameless, stacked_bars

_BARS = 24


@picture_of.register
def margin_picture(margin: Margin) -> Picture:
    """The parts and the total of each margin of a batch."""
    return margins_picture(margin, "margin", "prompt")


def margins_picture(margin: Margin, label: str, row: str) -> Picture:
    """The parts and the total of margins.

    Args:
        margin: of one prompt or position, or several.
        label: what is drawn.
        row: what each of several stands for, "prompt" or "position".
    """
    flat = Margin(*(part.detach().cpu().double().flatten() for part in (margin.context, margin.weights, margin.rest)))
    n = flat.total.numel()
    picture = Picture(6.4, 3.4 if n > _BARS else 1.4 + 0.26 * n)
    ax = picture.figure.add_subplot()
    if n > _BARS:
        for memory, colour in COLOURS.items():
            ax.plot(range(n), flat.parts[memory], color=colour, label=memory, linewidth=1.5)
        ax.plot(range(n), flat.total, color="black", label="total", linewidth=1)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set_xlabel(row)
        ax.set_ylabel(label)
    else:
        stacked_bars(ax, range(n), flat, 0.7)
        ax.plot(flat.total, range(n), "D", color="black", markersize=5, label="total")
        ax.set_yticks(range(n) if margin.total.ndim else [], [str(i) for i in range(n)] if margin.total.ndim else [])
        ax.set_ylim(n - 0.5, -0.5)
        ax.set_ylabel(row if margin.total.ndim else "")
        ax.set_xlabel(f"{label}, in logits")
    frameless(ax)
    picture.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return picture
