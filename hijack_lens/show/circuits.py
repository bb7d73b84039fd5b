"""A circuit's places among a model's heads and MLPs."""

from hijack_lens.core.circuit import ROLE_NAMES, Circuit
from hijack_lens.core.tables import picture_of
from hijack_lens.show.style import BLUE, GREEN, ORANGE, Picture

_ROLES = {"previous_token": GREEN, "induction": BLUE, "bigram": ORANGE}


@picture_of.register
def circuit_picture(circuit: Circuit) -> Picture:
    """Layers against heads, the MLPs in a column of their own; as large as the circuit itself needs."""
    from matplotlib.patches import Patch, Rectangle

    parts = [part for _, part in circuit]
    n_layers = 1 + max((part.layer for part in parts), default=0)
    n_heads = 1 + max((part.head for part in parts if part.head is not None), default=0)
    picture = Picture(3.6 + 0.3 * min(n_heads, 32), 1.1 + 0.3 * min(n_layers, 32))
    ax = picture.figure.add_subplot()
    for layer in range(n_layers):
        for place in range(n_heads + 1):
            corner = (place - 0.42, layer - 0.42)
            ax.add_patch(Rectangle(corner, 0.84, 0.84, fill=False, edgecolor="#99999966", linewidth=0.8))
    for role, part in circuit:
        place = n_heads if part.head is None else part.head
        ax.add_patch(Rectangle((place - 0.42, part.layer - 0.42), 0.84, 0.84, color=_ROLES[role]))
    named = range(0, n_heads, -(-n_heads // 16))
    ax.set_xticks([*named, n_heads], [*map(str, named), "MLP"])
    ax.set_yticks(range(0, n_layers, -(-n_layers // 16)))
    ax.set_xlim(-0.6, n_heads + 0.6)
    ax.set_ylim(n_layers - 0.4, -0.6)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    handles = [Patch(color=colour, label=ROLE_NAMES[role]) for role, colour in _ROLES.items()]
    picture.figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return picture
