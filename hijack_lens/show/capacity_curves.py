"""Recall and cross-talk of a memory against d_model."""

from typing import TYPE_CHECKING

from hijack_lens.show.style import COLOURS, Picture

if TYPE_CHECKING:
    from hijack_lens.memories.capacity import MemoryCapacity


def capacity_curves(result: "MemoryCapacity") -> Picture:
    """What was measured as points with standard errors over seeds, theory as lines."""
    from hijack_lens.memories.capacity import MEMORIES

    picture = Picture(11.0, 4.4)
    axes = picture.figure.subplots(1, 2)
    errors = result.crosstalk.std(-1) / len(result.seeds) ** 0.5
    panels = (
        ("recall: fraction of keys", result.recall, result.recall_stderr, result.expected_recall),
        ("cross-talk: root mean square, in logits", result.crosstalk, errors, result.expected_crosstalk),
    )
    for ax, (label, measured, error, expected) in zip(axes, panels, strict=True):
        looks = ((COLOURS["weights"], "o"), (COLOURS["context"], "s"))
        for i, (memory, (colour, marker)) in enumerate(zip(MEMORIES, looks, strict=True)):
            points = measured[i].mean(-1).numpy()
            ax.plot(result.d_models, expected[i].numpy(), color=colour, linewidth=1.5, label=f"{memory}, theory")
            ax.errorbar(
                result.d_models,
                points,
                error[i].numpy(),
                fmt=marker,
                color=colour,
                capsize=3,
                markersize=6,
                label=f"{memory}, measured",
            )
        ax.axvline(3 * result.d_vocab, color="#555555", linewidth=1, linestyle=":", label="orthonormal directions")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_xlabel("d_model")
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(-0.02, 1.04)
    axes[1].legend(frameon=False)
    picture.figure.suptitle(f"{result.d_vocab} tokens, three directions each; {len(result.seeds)} seeds", fontsize=11)
    return picture
