"""A run of a model, taken apart: its blocks with their activations, from which runs that differ in part go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.circuit import Component
from hijack_lens.hooks.sweep_plan import hook_name
from hijack_lens.models.opened import Block, OpenModel

Rows = Float[Tensor, "patch batch pos d_model"]


@dataclass(frozen=True)
class Layer:
    """A block and its activations in the unpatched run. Rotary embeddings are already applied to queries and keys."""

    block: Block
    resid_pre: Float[Tensor, "batch pos d_model"]
    attn_out: Float[Tensor, "batch pos d_model"]
    mlp_out: Float[Tensor, "batch pos d_model"]
    q: Float[Tensor, "batch pos head d_head"]
    k: Float[Tensor, "batch pos kv_head d_head"]
    v: Float[Tensor, "batch pos kv_head d_head"]
    z: Float[Tensor, "batch pos head d_head"]

    @property
    def resid_mid(self) -> Float[Tensor, "batch pos d_model"]:
        """The stream between attention and MLP."""
        return self.resid_pre + self.attn_out

    @property
    def resid_post(self) -> Float[Tensor, "batch pos d_model"]:
        """The stream after the block."""
        return self.resid_mid + self.mlp_out


@dataclass(frozen=True)
class Changed:
    """The residual stream that enters a block in patched runs, where it differs from the unpatched run's.

    Attributes:
        layer: the layer of the block entered; the number of layers for the final stream.
        x: the stream at the positions from `start` on; or, given `at`, at one position per patch.
        start: the first position of `x`.
        at: the position of each patch.
    """

    layer: int
    x: Rows
    start: int = 0
    at: Int[Tensor, "patch"] | None = None


class RecordedRun:
    """An unpatched run, with what it takes to compute others from it.

    Args:
        opened: the model's parts.
        run: the run's activations, by hook point; see `names`.
        logits: its logits.
        length: how many positions are needed, from the first on.
    """

    def __init__(self, opened: OpenModel, run: Mapping[str, Tensor], logits: Tensor, length: int):
        self.opened = opened
        self.run = run
        self.logits = logits
        self.length = length
        self.positions = torch.arange(length, device=logits.device)
        self.layers = [self._layer(index, block) for index, block in enumerate(opened.blocks)]

    @staticmethod
    def names(opened: OpenModel) -> list[str]:
        """The hook points whose activations the unpatched run must have recorded."""
        return [
            hook_name(activation, layer)
            for layer, block in enumerate(opened.blocks)
            for activation in ("resid_pre", "q", "k", "v", "z", "attn_out", *(("mlp_out",) if block.mlp else ()))
        ]

    def _layer(self, index: int, block: Block) -> Layer:
        def recorded(activation: str) -> Tensor:
            return self.run[hook_name(activation, index)][:, : self.length]

        attn_out = recorded("attn_out")
        return Layer(
            block,
            recorded("resid_pre"),
            attn_out,
            recorded("mlp_out") if block.mlp else torch.zeros_like(attn_out),
            block.turned(recorded("q"), self.positions),
            block.turned(recorded("k"), self.positions),
            recorded("v"),
            recorded("z"),
        )

    def mismatch(self, every_logit: bool = False) -> str | None:
        """The first result that the parts fail to reproduce; `None` if they reproduce all.

        All positions are compared, since what was put into a model may act on some of them alone; logits at the last
        position, or at every one.
        """
        at = self.positions
        for index, layer in enumerate(self.layers):
            block, here = layer.block, layer.resid_pre
            normed = block.normed(here)
            pattern = block.pattern(block.scores(layer.q, layer.k, at, at))
            after = self.layers[index + 1].resid_pre if index + 1 < len(self.layers) else None
            pairs = {
                "q": (block.q(normed, at), layer.q),
                "k": (block.k(normed, at), layer.k),
                "v": (block.v(normed), layer.v),
                "z": (block.mixed(pattern, layer.v), layer.z),
                "attn_out": (block.attn_out(layer.z), layer.attn_out),
                "mlp_out": (block.mlp_out(here, layer.attn_out), layer.mlp_out),
            }
            if after is not None:
                pairs["resid_post"] = (layer.resid_post, after)
            for part, (ours, theirs) in pairs.items():
                if not agree(ours, theirs):
                    return f"the {part} of layer {index}"
        rows = slice(0 if every_logit else self.length - 1, self.length)
        final = self.opened.logits(self.layers[-1].resid_post[:, rows])
        return None if agree(final, self.logits[:, rows]) else "the logits"

    def after_attention(self, layer: int, attn_out: Rows, start: int) -> Changed:
        """What attention writes in patched runs from `start` on, taken through the block's MLP."""
        here, block = self.layers[layer], self.layers[layer].block
        resid_pre = here.resid_pre[:, start:].expand_as(attn_out)
        mlp_out = here.mlp_out[:, start:] if block.parallel else block.mlp_out(resid_pre, attn_out)
        return Changed(layer + 1, resid_pre + attn_out + mlp_out, start)

    def bytes_of(self, n_tokens: int) -> int:
        """Roughly how much memory one patched run takes, if so many positions of each prompt are run again."""
        batch, _, d_model = self.layers[0].resid_pre.shape
        block = self.layers[0].block
        wide = 8 * d_model + 3 * len(block.b_Q) * self.length + 4 * block.b_Q.numel()
        if block.W_out is not None:
            wide += 3 * len(block.W_out)
        return self.logits.element_size() * batch * n_tokens * wide

    def finals(self, entering: Sequence[Changed], start: int, last_only: bool) -> Rows:
        """Streams after the last block, from `start` on or at the last position only, of runs that go on from theirs.

        Each takes part from the block that its changed stream enters; no stream may differ before `start`.
        """
        n_layers = len(self.layers)
        rows = torch.arange(sum(len(changed.x) for changed in entering), device=self.positions.device)
        by_entry = rows.split([len(changed.x) for changed in entering])
        x: list[Tensor] = []
        order: list[Tensor] = []
        for layer in range(min(changed.layer for changed in entering), n_layers + 1):
            for changed, places in zip(entering, by_entry, strict=True):
                if changed.layer == layer:
                    x.append(self._spread(changed, start, last_only))
                    order.append(places)
            if layer < n_layers:
                streams = torch.cat(x)
                z = self.z(layer, streams, start, last_only and layer == n_layers - 1)
                x = [self.after(layer, streams[:, :, -z.shape[2] :], z)]
        return torch.cat(x)[torch.cat(order).argsort()]

    def _spread(self, changed: Changed, start: int, last_only: bool) -> Rows:
        """The changed streams, written out in full from `start` on; after the last block, only where they are read."""
        after_last = changed.layer == len(self.layers)
        if after_last and last_only:
            return changed.x[:, :, -1:]
        if changed.at is None and changed.start == start:
            return changed.x
        stream = self.layers[-1].resid_post if after_last else self.layers[changed.layer].resid_pre
        x = stream[:, start:].repeat(len(changed.x), 1, 1, 1)
        if changed.at is None:
            x[:, :, changed.start - start :] = changed.x
        else:
            x[torch.arange(len(x), device=x.device), :, changed.at - start] = changed.x[:, :, 0]
        return x

    def z(
        self, layer: int, x: Rows, start: int = 0, last_only: bool = False
    ) -> Float[Tensor, "patch batch wanted head d_head"]:
        """What a block's heads make of a stream that differs from `start` on: there, or at the last position."""
        here, block = self.layers[layer], self.layers[layer].block
        normed, positions = block.normed(x), self.positions[start:]
        k, v = block.k(normed, positions), block.v(normed)
        at = positions[-1:] if last_only else positions
        q = block.q(normed[:, :, -len(at) :], at)
        if start == 0:
            return block.mixed(block.pattern(block.scores(q, k, at, positions)), v)
        before = block.scores(q, here.k[:, :start], at, self.positions[:start])
        pattern = block.pattern(torch.cat([before, block.scores(q, k, at, positions)], -1))
        return block.mixed(pattern[..., :start], here.v[:, :start]) + block.mixed(pattern[..., start:], v)

    def after(self, layer: int, x: Rows, z: Float[Tensor, "patch batch pos head d_head"]) -> Rows:
        """The stream after a block, from the one before it and what its heads write."""
        block = self.layers[layer].block
        attn_out = block.attn_out(z)
        return x + attn_out + block.mlp_out(x, attn_out)

    def with_heads_from(
        self, theirs: Mapping[int, Float[Tensor, "batch pos head d_head"]], groups: Sequence[tuple[Component, ...]]
    ) -> Float[Tensor, "group batch pos d_model"]:
        """Streams after the last block in runs in which each group's heads write what they write in another run.

        Runs go their own ways only from the first head on in which their groups differ.

        Args:
            theirs: the other run's z, by layer.
            groups: heads; none of the groups is empty.
        """
        # The runs so far, by the heads that were replaced in them; the first is the unpatched one.
        found: dict[tuple[Component, ...], int] = {(): 0}
        first = min(head.layer for group in groups for head in group)
        changed = self.layers[first].resid_pre[None][:0]
        for layer, here in list(enumerate(self.layers))[first:]:
            x = torch.cat([here.resid_pre[None], changed])
            z = torch.cat([here.z[None], *([self.z(layer, changed)] if len(changed) else [])])
            below = [tuple(head for head in group if head.layer <= layer) for group in groups]
            wanted = [heads for heads in dict.fromkeys(below) if heads]
            rows = [found[tuple(head for head in heads if head.layer < layer)] for heads in wanted]
            x, z = x[rows], z[rows]
            for row, heads in enumerate(wanted):
                for head in heads:
                    if head.layer == layer:
                        z[row, :, :, head.head] = theirs[layer][:, :, head.head]
            changed = self.after(layer, x, z)
            found = {(): 0} | {heads: row + 1 for row, heads in enumerate(wanted)}
        return changed[[found[group] - 1 for group in groups]]


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two ways of computing an activation give the same, to rounding."""
    tolerance = torch.finfo(theirs.dtype).eps ** 0.7  # 1.4e-5 in float32, 1e-11 in float64
    return bool((ours - theirs).abs().max() <= tolerance * (1e-6 + theirs.abs().max()))
