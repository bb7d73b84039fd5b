"""Where in a model a circuit's components are: heads and MLPs by layer."""

from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from hijack_lens.core.circuit import ROLE_NAMES
from hijack_lens.show.style import Picture

if TYPE_CHECKING:
    from hijack_lens.circuits.evidence import CircuitEvidence


_FRAME = "#D55E00"  # Okabe & Ito's vermilion, which no colour-blind reader takes for a shade of blue
_TITLES = {
    "previous_token": "attention to the token before",
    "induction": "attention to where the current token's\nsuccessor stood, beyond shuffled prompts",
}


def circuit_map(evidence: "CircuitEvidence") -> Picture:
    """Heat maps of the heads' scores for each role, head by layer, and bars of the MLPs' shares.

    Args:
        evidence: of a circuit that `find_circuit` found; its components are framed or filled.
    """
    n_layers, n_heads = evidence.induction.score.shape
    side = min(0.5, 9 / max(n_layers, n_heads))  # inches per head
    width = max(2.6, side * n_heads)
    picture = Picture(2 * width + 5.6, max(2.0, side * n_layers) + 1.5)
    axes = picture.figure.subplots(1, 3, width_ratios=[width, width, 2.9])
    for ax, (role, title) in zip(axes, _TITLES.items(), strict=False):
        score = getattr(evidence, role).score
        image = ax.imshow(score.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for part in getattr(evidence.circuit, role):
            corner = (part.head - 0.5, part.layer - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_FRAME, linewidth=2.5, clip_on=False, zorder=3))
        ax.set_title(f"{ROLE_NAMES[role]}s\n{title}", fontsize=9)
        ax.set_xlabel("head")
        ax.set_xticks(range(0, n_heads, max(1, n_heads // 12)))
    picture.figure.colorbar(image, ax=axes[:2], label="attention (framed: named)", shrink=0.9)
    ax, share = axes[2], evidence.bigram.share.nan_to_num(0.0).tolist()
    named = {part.layer for part in evidence.circuit.bigram}
    ax.barh(range(n_layers), share, color=[_FRAME if layer in named else "#999999" for layer in range(n_layers)])
    ax.axvline(evidence.bigram.direct_share, color="black", linestyle="--", linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_ylim(n_layers - 0.5, -0.5)
    ax.set_title(f"{ROLE_NAMES['bigram']}\nMLPs (orange: named)\ndashed: the direct path", fontsize=9)
    ax.set_xlabel("share of the context-free prediction")
    ax.spines[["top", "right"]].set_visible(False)
    for ax in axes:
        ax.set_ylabel("layer")
        ax.set_yticks(range(0, n_layers, max(1, n_layers // 12)))
    return picture
