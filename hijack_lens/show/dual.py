"""A head's dual model: its error by the number of features, and the answer's by the number of updates."""

from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.memories.dual import DualModel
from hijack_lens.show.style import BLUE, GREY, Picture, frameless


@report_of.register
def dual_report(dual: DualModel) -> Report:
    """The error by the number of features."""
    low, median, high = dual.error.quantile(dual.error.new_tensor([0, 0.5, 1]), 0).tolist()
    rows = [(str(m), *(f"{x:.3g}" for x in found)) for m, *found in zip(dual.features, median, low, high, strict=True)]
    return Report(
        f"DualModel(draws={len(dual.error)}, sizes={len(dual.features)}), {dual.circuit.label(dual.head)}: a linear "
        f"model that {len(dual.updates)} positions train, against the head's output",
        tables=[Table(("features", "median error", "least", "most"), rows, align="rrrr")],
        notes=[f"Errors are relative to the output's norm. The softmax kernel itself: {dual.exact_error:.1e}."],
    )


@picture_of.register
def dual_curves(dual: DualModel) -> Picture:
    """Error by the number of features, of each draw and their median; error by the updates made so far."""
    picture = Picture(10.0, 4.2)
    left, right = picture.figure.subplots(1, 2)
    for number, draw in enumerate(dual.error):
        label = None if number else "a draw"
        left.plot(dual.features, draw, color=GREY, linewidth=1, alpha=0.6, label=label)
    left.plot(dual.features, dual.error.median(0).values, color=BLUE, marker="o", linewidth=3, label="median")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set(
        title=f"{dual.circuit.label(dual.head)}, in random features",
        xlabel="number of features",
        ylabel="error, relative to the head's output",
    )
    made = range(1, len(dual.updates) + 1)
    right.plot(made, dual.exact_updates, color="black", linestyle="--", label="softmax kernel")
    right.plot(made, dual.updates, color=BLUE, linewidth=2, label=f"{dual.features[-1]} features")
    right.set(
        title="training by the context",
        xlabel="updates made (positions read)",
        ylabel="error, relative to the head's output",
        ylim=(0, None),
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        frameless(ax)
    return picture
