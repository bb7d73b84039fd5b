"""The birth of the two memories."""

from hijack_lens.show.style import Picture
from hijack_lens.training.run import TrainingRun


def birth_of_memories(run: TrainingRun) -> Picture:
    """Draws both memories on one axis of steps: how much of each has been learned."""
    from hijack_lens.show.style import COLOURS

    picture = Picture(8.0, 4.2)
    ax = picture.figure.add_subplot()
    excess = run.probe("bigram_excess")
    ax.plot(
        excess.index, 1 - excess / excess.iloc[0], "o-", color=COLOURS["weights"], label="weights: bigram loss learned"
    )
    accuracy = run.probe("in_context_accuracy")
    ax.plot(accuracy.index, accuracy, "s-", color=COLOURS["context"], label="context: in-context accuracy")
    for name, style in (("previous_token_attention", ":"), ("induction_attention", "--")):
        series = run.probe(name)
        ax.plot(series.index, series, style, color=COLOURS["context"], label=name.replace("_", " "), alpha=0.8)
    ax.set_xlabel("training step")
    ax.set_ylabel("fraction (1 = fully learned)")
    ax.set_ylim(-0.03, 1.06)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return picture
