"""Runs with an edge patched, computed only where they can differ from the unpatched run; the results are exact.

Only the receiver is computed anew, and the blocks above it; all edges into the inputs of one block share its norm and
the product with its weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.hooks.edges import Edge, Sender, Via
from hijack_lens.hooks.incremental_runs import IncrementalRuns
from hijack_lens.hooks.recorded_run import Changed

Message = Float[Tensor, "batch pos d_model"]


class EdgeRuns:
    """Path-patched runs of a model, computed from its parts.

    Args:
        runs: runs from the parts, and the unpatched run's activations.
        message: by how much a sender's output in the other run differs from that in this one, as the residual stream
            has it.
    """

    def __init__(self, runs: IncrementalRuns, message: Callable[[Sender], Message]):
        self.runs = runs
        self.message = message

    def values(
        self, edges: Sequence[Edge], memory: float
    ) -> Iterator[tuple[Int[Tensor, "edge"], Float[Tensor, "edge"]]]:
        """The metric with each edge patched, in parts that fit into `memory` bytes, with their places in `edges`.

        Edges whose message changes nothing are left out.
        """
        order = sorted(range(len(edges)), key=lambda index: self._height(edges[index]))
        size = max(1, int(memory // self.runs.bytes_of(self.runs.length)))
        for first in range(0, len(order), size):
            part = order[first : first + size]
            changes = self._changes([edges[index] for index in part])
            live = [index for index in part if edges[index].sender in changes]
            if live:
                entering, places = self._entering([edges[index] for index in live], changes)
                yield torch.tensor(live)[torch.tensor(places)], self.runs.finish(entering)

    def _height(self, edge: Edge) -> tuple[int, bool]:
        """Where an edge's receiver stands: its layer, heads before the MLP, and the unembedding after all."""
        if isinstance(edge.receiver, str):
            return len(self.runs.layers), False
        return edge.receiver.layer, edge.receiver.kind == "mlp"

    def _changes(self, edges: Sequence[Edge]) -> dict[Sender, Message]:
        every = {sender: self.message(sender)[:, : self.runs.length] for sender in {edge.sender for edge in edges}}
        return {sender: change for sender, change in every.items() if bool(change.any())}

    def _entering(self, edges: Sequence[Edge], changes: Mapping[Sender, Message]) -> tuple[list[Changed], list[int]]:
        """The streams after the receivers, and which edge each of them belongs to."""
        row = {sender: index for index, sender in enumerate(changes)}
        stacked = torch.stack(list(changes.values()))
        # Before the first token that differs, no message does.
        start = int(stacked.any(-1).any(0).any(0).nonzero()[0])
        groups: dict[tuple[int, bool], dict[tuple[int, Via], list[int]]] = {}
        for place, edge in enumerate(edges):
            head = 0 if isinstance(edge.receiver, str) else edge.receiver.head or 0
            groups.setdefault(self._height(edge), {}).setdefault((head, edge.via), []).append(place)
        entering, order = [], []
        for (layer, _), inputs in groups.items():
            senders = {
                one: torch.tensor([row[edges[place].sender] for place in places], device=stacked.device)
                for one, places in inputs.items()
            }
            if (0, "unembed") in senders:
                x = self.runs.layers[-1].resid_post[:, start:] + stacked[senders[0, "unembed"]][:, :, start:]
                entering.append(Changed(layer, x, start))
            elif (0, "mlp_in") in senders:
                entering.append(self._into_mlp(layer, stacked[senders[0, "mlp_in"]], start))
            else:
                entering.append(self._into_heads(layer, senders, stacked, start))
            order += [place for places in inputs.values() for place in places]
        return entering, order

    def _into_mlp(self, layer: int, changes: Float[Tensor, "edge batch pos d_model"], start: int) -> Changed:
        here, start = self.runs.layers[layer], self.runs.read_from(layer, start)
        read = here.resid_pre[:, start:] + changes[:, :, start:]
        attn_out = here.attn_out[:, start:].expand_as(read)
        return Changed(layer + 1, here.resid_mid[:, start:] + here.block.mlp_out(read, attn_out), start)

    def _into_heads(
        self,
        layer: int,
        senders: Mapping[tuple[int, Via], Int[Tensor, "edge"]],
        changes: Float[Tensor, "sender batch pos d_model"],
        start: int,
    ) -> Changed:
        """Every edge into a head of this block, by head and input."""
        here, block, positions = self.runs.layers[layer], self.runs.layers[layer].block, self.runs.positions
        first = self.runs.read_from(layer, start)
        used = torch.cat(list(senders.values())).unique()
        normed = block.normed(here.resid_pre[:, start:] + changes[used][:, :, start:])
        # Every head's inputs at once: products with whole matrices are as fast as those with a head's part.
        read: dict[str, Tensor] = {}
        for via in {via for _, via in senders}:
            if via == "q":
                read[via] = block.q(normed[:, :, first - start :], positions[first:])
            else:
                read[via] = block.k(normed, positions[start:]) if via == "k" else block.v(normed)
        attn_out = []
        for (head, via), chosen in senders.items():
            one, own, shared = block.one(head), slice(head, head + 1), head // block.n_groups
            kv_head = slice(shared, shared + 1)
            new = read[via][torch.searchsorted(used, chosen)][..., own if via == "q" else kv_head, :]
            q, k, v = here.q[:, first:, own], here.k[:, :, kv_head], here.v[:, :, kv_head]
            if via == "q":
                q = new
            elif via == "k":
                k = torch.cat([k[:, :start].expand(len(new), -1, -1, -1, -1), new], 2)
            else:
                v = torch.cat([v[:, :start].expand(len(new), -1, -1, -1, -1), new], 2)
            z = one.mixed(one.pattern(one.scores(q, k, positions[first:], positions)), v)
            attn_out.append(here.attn_out[:, first:] + (z - here.z[:, first:, own])[..., 0, :] @ block.W_O[head])
        return self.runs.after_attention(layer, torch.cat(attn_out), first)
