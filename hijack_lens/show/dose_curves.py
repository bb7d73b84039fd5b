"""A dose-response as curves, with the theory's drawn over the measured one."""

from typing import TYPE_CHECKING

from hijack_lens.show.style import COLOURS, Picture

if TYPE_CHECKING:
    from hijack_lens.probing.doses import DoseResponse


_THEORY = "#CC79A7"  # Okabe & Ito's reddish purple


def dose_curves(result: "DoseResponse") -> Picture:
    """Means over facts of the margin and its parts; behind them one standard deviation, and a line per fact."""
    from hijack_lens.probing.doses import crossing

    means, n = result.by_repeats(), list(result.repeats)
    several = len(result.conflicts) > 1
    of = f"mean of {len(result.conflicts)} facts" if several else result.conflicts[0].name
    picture = Picture(8.0, 5.6)
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
    ax.plot(n, means["theory"], color=_THEORY, linewidth=2.5, linestyle="--", label=label, zorder=4)
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
    ax.spines[["top", "right"]].set_visible(False)
    picture.figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return picture
