"""What a head's queries and keys are made of: terms of the residual stream, each through the head's own linear map.

Once the norm's scale is that of a run, queries and keys are linear in the residual stream, which is itself the sum of
what every component before wrote into it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). A
score is then a sum over pairs of terms, one of the query and one of the key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import all_components
from hijack_lens.hooks.edges import Sender, embeddings, sender_site
from hijack_lens.models.linear_maps import LinearNorm, linear_norm
from hijack_lens.models.opened import Block, OpenModel

ScoreTerm = Sender | Literal["biases", "offset"]
"""What writes into the residual stream; every bias together; and, of keys alone, what an offset adds to them."""

_NAMES = {"pos_embed": "positional embed", "offset": "offset key"}


def term_label(term: ScoreTerm, circuit: Circuit) -> str:
    """What to call a term: a component by its role, where it has one to itself."""
    return circuit.label(term) if isinstance(term, Component) else _NAMES.get(term, term)


def senders(model: Any, layer: int) -> tuple[Sender, ...]:
    """What writes into the residual stream before a block."""
    before = (component for component in all_components(model) if component.layer < layer)
    return (*embeddings(model), *before)


def stream_terms(
    model: Any, opened: OpenModel, layer: int, run: Mapping[str, Tensor], positions: Int[Tensor, "pos"]
) -> dict[ScoreTerm, Float[Tensor, "pos d_model"]]:
    """What the residual stream that enters a block is the sum of, at some positions of a run of one prompt.

    Heads write without their block's bias b_O, which is among the biases; MLPs with theirs.

    Raises:
        ValueError: where the stream is not that sum.
    """
    stream = run[f"blocks.{layer}.hook_resid_pre"][0, positions]
    terms: dict[ScoreTerm, Tensor] = {}
    for sender in senders(model, layer):
        site = sender_site(model, sender)
        output = site.read(run[site.name])[0, positions]
        if isinstance(sender, Component) and sender.head is not None:
            output = output @ opened.blocks[sender.layer].W_O[sender.head]
        terms[sender] = output
    terms["biases"] = torch.stack(
        [torch.zeros_like(stream), *(b.b_O.expand_as(stream) for b in opened.blocks[:layer])]
    ).sum(0)
    error = float((sum(terms.values()) - stream).abs().max())
    size = float(sum(term.abs() for term in terms.values()).max())  # type: ignore[union-attr]
    if not error <= tolerance(stream.dtype) * size:
        raise ValueError(
            f"the residual stream before layer {layer} is not the sum of embeddings, heads, MLPs and biases (off by "
            f"{error:.2g}): the model, or a hook on it, does something to it that is not taken apart here"
        )
    return terms


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two ways to compute one sum may differ, relative to the size of what is summed."""
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


@dataclass(frozen=True)
class HeadInput:
    """How one head makes its queries, or its keys, at some positions of a run.

    Attributes:
        block: the head's.
        norm: with the scales at the positions.
        W: from the normed stream.
        b: added to that.
        positions: of the rows.
    """

    block: Block
    norm: LinearNorm
    W: Float[Tensor, "d_head d_model"]
    b: Float[Tensor, "d_head"]
    positions: Int[Tensor, "pos"]

    @classmethod
    def of(
        cls,
        block: Block,
        norm: Any,
        via: Literal["q", "k"],
        head: int,
        stream: Float[Tensor, "pos d_model"],
        positions: Int[Tensor, "pos"],
    ) -> "HeadInput":
        """A head's reading of a residual stream at some positions, by its query or its key.

        Args:
            block: the head's.
            norm: the module before its attention, if any.
            via: "q" or "k".
            head: the query head; its key is the one that its group shares.
            stream: the residual stream.
            positions: of its rows.
        """
        index, weight, bias = (
            (head, block.W_Q, block.b_Q) if via == "q" else (head // block.n_groups, block.W_K, block.b_K)
        )
        return cls(block, linear_norm(norm, stream), weight.unflatten(0, bias.shape)[index], bias[index], positions)

    def parts(self, terms: Mapping[ScoreTerm, Float[Tensor, "pos d_model"]]) -> Float[Tensor, "term pos d_head"]:
        """What each term of the stream adds to the queries or keys, as they enter the scores.

        The norm's bias and `b` count among the biases. Rotary positions turn every part alike, as they are linear.
        """
        rows = []
        for term, x in terms.items():
            row = self.norm.linear(x) @ self.W.T
            if term == "biases":
                row = row + (self.b if self.norm.b is None else self.b + self.W @ self.norm.b)
            rows.append(row)
        return self.block.turned(torch.stack(rows)[:, :, None], self.positions)[:, :, 0]


def offset_keys(block: Block, head: int, query: int, keys: Int[Tensor, "pos"]) -> Float[Tensor, "1 pos d_head"] | None:
    """What relative positions add to a head's keys, as seen from a query: r in q . (k + r); `None` where none do.

    Keys further away than any learned offset get nothing.
    """
    if block.W_R is None:
        return None
    offsets = query - keys
    n_offsets = block.W_R.shape[1]
    return (block.W_R[head, offsets.clamp(max=n_offsets - 1)] * (offsets < n_offsets)[:, None])[None]
