"""Neurons as key-value pairs: a row of tokens that turn each on, and a row of tokens that it writes."""

from typing import TYPE_CHECKING

import numpy as np

from hijack_lens.show.style import Picture
from hijack_lens.show.sweep_maps import DIVERGING

if TYPE_CHECKING:
    from hijack_lens.memories.neurons import MemoryNeurons


_RANKS = 6
_LETTERS = 9


def neuron_map(result: "MemoryNeurons", most: int = 12) -> Picture:
    """The strongest neurons: their keys, shaded by activation, and what they write for the first of these, by logit."""
    rows = result.strongest(most)
    sides = (
        ("turned on by", "activation (post)", result.keys, result.post),
        ("writes for the first of them", "logits, relative to their mean", result.values, result.value_logits),
    )
    picture = Picture(12.0, 1.7 + 0.36 * len(rows))
    axes = picture.figure.subplots(1, 2, sharey=True)
    for ax, (title, label, tokens, numbers) in zip(axes, sides, strict=True):
        image = numbers[rows, :_RANKS].numpy()
        spread = float(np.abs(image).max()) or 1.0
        drawn = ax.imshow(image, cmap=DIVERGING, vmin=-spread, vmax=spread, aspect="auto", interpolation="nearest")
        for (row, rank), value in np.ndenumerate(image):
            # Tokens that leave a neuron off are no keys of it.
            text = result.token_text(int(tokens[rows[row], rank])) if value else "·"
            short = text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
            colour = "white" if abs(value) > 0.6 * spread else "black"
            ax.text(rank, row, short.replace("$", r"\$"), ha="center", va="center", fontsize=9, color=colour)
        ax.set_xticks(range(image.shape[1]), [str(rank + 1) for rank in range(image.shape[1])])
        ax.set_xlabel("rank")
        ax.set_title(title, fontsize=11)
        picture.figure.colorbar(drawn, ax=ax, label=label, pad=0.02)
    axes[0].set_yticks(range(len(rows)), [str(int(result.neurons[row])) for row in rows])
    axes[0].set_ylabel(f"neuron of {result.component}")
    return picture
