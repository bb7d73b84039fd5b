"""Patched runs, computed only where they can differ from the unpatched run; the results are exact.

A patch at position p changes nothing before p and nothing below its layer. If the metric reads a single position, the
last block is needed only there. So for a patch in layer 0 of a two-layer model, block 1 needs one new key, one new
value and one new attention row: a sweep over all positions costs about one forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.hooks.patched_runs import BoundMetric
from hijack_lens.hooks.sweep_plan import Patches, hook_name
from hijack_lens.models.opened import Block, OpenModel

Rows = Float[Tensor, "patch batch pos d_model"]


@dataclass(frozen=True)
class _Layer:
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
        return self.resid_pre + self.attn_out

    @property
    def resid_post(self) -> Float[Tensor, "batch pos d_model"]:
        return self.resid_mid + self.mlp_out


@dataclass(frozen=True)
class _Changed:
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


class IncrementalRuns:
    """Patched runs of a model, computed from its parts.

    Args:
        opened: the model's parts.
        run: the unpatched run's activations, by hook point; see `names`.
        logits: the unpatched run's logits.
        reader: reads the metric off the logits.
    """

    name: Literal["incremental"] = "incremental"

    def __init__(self, opened: OpenModel, run: Mapping[str, Tensor], logits: Tensor, reader: BoundMetric):
        self.opened = opened
        self.reader = reader
        self.run = run
        self.logits = logits
        # If the metric reads one position, nothing after it can affect the metric.
        self.length = logits.shape[1] if reader.only is None else reader.only + 1
        self.positions = torch.arange(self.length, device=logits.device)
        self.layers = [self._layer(index, block) for index, block in enumerate(opened.blocks)]

    @staticmethod
    def names(opened: OpenModel) -> list[str]:
        """The hook points whose activations the unpatched run must have recorded."""
        return [
            hook_name(activation, layer)
            for layer, block in enumerate(opened.blocks)
            for activation in ("resid_pre", "q", "k", "v", "z", "attn_out", *(("mlp_out",) if block.mlp else ()))
        ]

    def _layer(self, index: int, block: Block) -> _Layer:
        def recorded(activation: str) -> Tensor:
            return self.run[hook_name(activation, index)][:, : self.length]

        attn_out = recorded("attn_out")
        return _Layer(
            block,
            recorded("resid_pre"),
            attn_out,
            recorded("mlp_out") if block.mlp else torch.zeros_like(attn_out),
            block.turned(recorded("q"), self.positions),
            block.turned(recorded("k"), self.positions),
            recorded("v"),
            recorded("z"),
        )

    def mismatch(self) -> str | None:
        """The first result at the last position that the parts fail to reproduce; `None` if they reproduce all."""
        last = self.length - 1
        for index, layer in enumerate(self.layers):
            block, here = layer.block, layer.resid_pre[:, last:]
            normed, at = block.normed(here), self.positions[last:]
            pattern = block.pattern(block.scores(layer.q[:, last:], layer.k, at, self.positions))
            after = self.layers[index + 1].resid_pre if index + 1 < len(self.layers) else None
            pairs = {
                "q": (block.q(normed, at), layer.q[:, last:]),
                "k": (block.k(normed, at), layer.k[:, last:]),
                "v": (block.v(normed), layer.v[:, last:]),
                "z": (block.mixed(pattern, layer.v), layer.z[:, last:]),
                "attn_out": (block.attn_out(layer.z[:, last:]), layer.attn_out[:, last:]),
                "mlp_out": (block.mlp_out(here, layer.attn_out[:, last:]), layer.mlp_out[:, last:]),
            }
            if after is not None:
                pairs["resid_post"] = (layer.resid_post[:, last:], after[:, last:])
            for part, (ours, theirs) in pairs.items():
                if not _agree(ours, theirs):
                    return f"the {part} of layer {index}"
        final = self.opened.logits(self.layers[-1].resid_post[:, last])
        return None if _agree(final, self.logits[:, last]) else "the logits"

    def reaches(self, activation: str, layer: int, patches: Patches) -> Tensor:
        """Which patches can change the metric."""
        only = self.reader.only
        if only is None:
            return torch.ones(len(patches), dtype=torch.bool)
        if layer == len(self.layers) - 1 and activation not in ("resid_pre", "k", "v"):
            return (patches.positions == only).any(-1)  # no later attention reads any other position
        return (patches.positions <= only).any(-1)

    def chunks(self, activation: str, layer: int, patches: Patches, memory: float) -> list[Int[Tensor, "chunk"]]:
        """Indices of patches, sorted by position, in groups that fit into `memory` bytes."""
        order = patches.positions[:, 0].argsort(stable=True)
        last = len(self.layers) - 1
        entered = layer if activation in ("resid_pre", "k", "v") else layer + 1
        alone = patches.positions.shape[1] == 1 and entered >= last and self.reader.only is not None
        batch, _, d_model = self.layers[0].resid_pre.shape
        block = self.layers[0].block
        wide = 8 * d_model + 3 * len(block.b_Q) * self.length + 4 * block.b_Q.numel()
        if block.W_out is not None:
            wide += 3 * len(block.W_out)
        d_vocab = self.logits.shape[-1]
        bytes_each = self.logits.element_size() * batch
        starts = patches.positions[order, 0].tolist()
        groups, first = [], 0
        while first < len(patches):
            tokens = 1 if alone else self.length - starts[first]
            of_vocab = 2 * d_vocab * (1 if self.reader.only is not None else self.length)
            size = max(1, int(memory // (bytes_each * (tokens * wide + of_vocab))))
            groups.append(order[first : first + size])
            first += size
        return groups

    def values(
        self, activation: str, layer: int, patches: Patches, source: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "patch"]:
        """The metric under each patch; arguments as for `ForwardRuns.values`."""
        source, patches = source[:, : self.length], patches.to(self.positions.device)
        if patches.positions.shape[1] > 1:  # all positions; those after the metric's do not matter
            patches = Patches(patches.positions[:, : self.length], patches.units)
        if activation in ("k", "v"):
            changed = self._from_keys_or_values(activation, layer, patches, source)
        else:
            changed = self._from_stream(activation, layer, patches, source)
        return self._finish(changed)

    def _from_stream(self, activation: str, layer: int, patches: Patches, source: Tensor) -> _Changed:
        """A patch whose effect, up to the end of its block, stays at its own position."""
        here, block = self.layers[layer], self.layers[layer].block

        def take(activation: Tensor) -> Tensor:
            return activation[:, patches.positions].movedim(0, 1)

        entered = layer + 1
        if activation == "resid_pre":
            entered, x = layer, take(source)
        elif activation == "resid_post":
            x = take(source)
        elif activation == "mlp_out":
            x = take(here.resid_mid) + take(source)
        elif activation == "post":
            assert block.W_out is not None
            assert patches.units is not None
            delta = source - self.run[hook_name("post", layer)][:, : self.length]
            one = delta[:, patches.positions, patches.units[:, None]].movedim(0, 1)
            x = take(here.resid_post) + one[..., None] * block.W_out[patches.units][:, None, None]
        else:
            resid_pre = take(here.resid_pre)
            if activation == "attn_out":
                attn_out = take(source)
            elif activation == "resid_mid":
                attn_out = take(source) - resid_pre
            else:
                attn_out = self._of_heads(here, patches, self._z(activation, here, source) - here.z)
            mlp_out = take(here.mlp_out) if block.parallel else block.mlp_out(resid_pre, attn_out)
            x = resid_pre + attn_out + mlp_out
        at = patches.positions[:, 0] if patches.positions.shape[1] == 1 else None
        return _Changed(entered, x, at=at)

    def _z(self, activation: str, here: _Layer, source: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """Every head's output with its q, pattern or z patched."""
        if activation == "z":
            return source
        if activation == "pattern":
            pattern = source.transpose(1, 2)[..., : self.length]
        else:
            q = here.block.turned(source, self.positions)
            pattern = here.block.pattern(here.block.scores(q, here.k, self.positions, self.positions))
        return here.block.mixed(pattern, here.v)

    @staticmethod
    def _of_heads(
        here: _Layer, patches: Patches, delta: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "patch batch place d_model"]:
        """What attention adds to the stream when the output of each patch's head changes by `delta`."""
        assert patches.units is not None
        attn_out = here.attn_out[:, patches.positions].movedim(0, 1)
        for head in patches.units.unique():
            rows = patches.units == head
            attn_out[rows] += delta[:, patches.positions[rows], head].movedim(0, 1) @ here.block.W_O[head]
        return attn_out

    def _from_keys_or_values(self, activation: str, layer: int, patches: Patches, source: Tensor) -> _Changed:
        """A patch that all later queries of its heads can see."""
        here, block = self.layers[layer], self.layers[layer].block
        last_only = layer == len(self.layers) - 1 and self.reader.only is not None
        start = self.length - 1 if last_only else int(patches.positions.min())
        at = self.positions[start:]
        assert patches.units is not None
        attn_out = here.attn_out[:, start:].repeat(len(patches), 1, 1, 1)
        source = block.turned(source, self.positions) if activation == "k" else source
        for unit in patches.units.unique():
            heads = slice(int(unit) * block.n_groups, (int(unit) + 1) * block.n_groups)
            shared = slice(int(unit), int(unit) + 1)
            group = block.group(int(unit))
            q, k, v = here.q[:, start:, heads], here.k[:, :, shared], here.v[:, :, shared]
            rows = (patches.units == unit).nonzero()[:, 0]
            changed = (k if activation == "k" else v).repeat(len(rows), 1, 1, 1, 1)
            index = torch.arange(len(rows), device=q.device)[:, None]
            changed[index, :, patches.positions[rows]] = source[:, patches.positions[rows], shared].movedim(0, 2)
            scores = group.scores(q, changed if activation == "k" else k, at, self.positions)
            z = group.mixed(group.pattern(scores), changed if activation == "v" else v)
            attn_out[rows] += (z - here.z[:, start:, heads]).flatten(-2) @ block.W_O[heads].flatten(0, 1)
        resid_pre = here.resid_pre[:, start:].expand_as(attn_out)
        mlp_out = here.mlp_out[:, start:] if block.parallel else block.mlp_out(resid_pre, attn_out)
        return _Changed(layer + 1, resid_pre + attn_out + mlp_out, start)

    def _finish(self, changed: _Changed) -> Float[Tensor, "patch"]:
        """The rest of the runs, and the metric."""
        n_layers, only = len(self.layers), self.reader.only
        if changed.at is not None and only is not None and changed.layer == n_layers - 1:
            changed = self._last_block_at_a_point(changed)
        elif changed.at is not None and not (only is not None and changed.layer == n_layers):
            changed = self._spread(changed)
        x = changed.x
        for layer in range(changed.layer, n_layers):
            x = self._through(layer, x, changed.start, last_only=only is not None and layer == n_layers - 1)
        if only is not None:
            return self.reader.each_at(self.opened.logits(x[:, :, -1]))
        before = self.logits[:, : changed.start].expand(len(x), -1, -1, -1)
        return self.reader.each(torch.cat([before, self.opened.logits(x)], 2))

    def _spread(self, changed: _Changed) -> _Changed:
        """Streams that each change at one position, written out in full from the earliest of these positions on."""
        assert changed.at is not None
        start = int(changed.at.min())
        stream = (
            self.layers[changed.layer].resid_pre if changed.layer < len(self.layers) else self.layers[-1].resid_post
        )
        x = stream[:, start:].repeat(len(changed.x), 1, 1, 1)
        rows = torch.arange(len(x), device=x.device)
        x[rows, :, changed.at - start] = changed.x[:, :, 0]
        return _Changed(changed.layer, x, start)

    def _through(self, layer: int, x: Rows, start: int, last_only: bool) -> Float[Tensor, "patch batch wanted d_model"]:
        """A block's output for a stream that differs from `start` on: from there on, or at the last position only."""
        here, block = self.layers[layer], self.layers[layer].block
        normed, positions = block.normed(x), self.positions[start:]
        k, v = block.k(normed, positions), block.v(normed)
        if last_only:
            x, normed = x[:, :, -1:], normed[:, :, -1:]
        at = positions[-1:] if last_only else positions
        q = block.q(normed, at)
        before = block.scores(q, here.k[:, :start], at, self.positions[:start])
        pattern = block.pattern(torch.cat([before, block.scores(q, k, at, positions)], -1))
        z = block.mixed(pattern[..., :start], here.v[:, :start]) + block.mixed(pattern[..., start:], v)
        attn_out = block.attn_out(z)
        return x + attn_out + block.mlp_out(x, attn_out)

    def _last_block_at_a_point(self, changed: _Changed) -> _Changed:
        """The last block at its last position, where each patch changes one key, one value, and perhaps the query."""
        here, block, at = self.layers[-1], self.layers[-1].block, changed.at
        assert at is not None
        last = self.positions[-1:]
        x = changed.x[:, :, 0]
        normed = block.normed(x)
        k, v = block.k(normed, at[:, None])[:, :, None], block.v(normed)[:, :, None]
        q = here.q[:, -1:].repeat(len(x), 1, 1, 1, 1)
        resid = here.resid_pre[:, -1].repeat(len(x), 1, 1)
        own = at == last
        q[own] = block.q(normed[own], last)[:, :, None]
        resid[own] = x[own]
        scores = block.scores(q, here.k, last, self.positions)
        column = at[:, None, None, None, None]
        one = block.scores(q, k, last, at[:, None, None])
        pattern = block.pattern(scores.scatter(-1, column.expand_as(one), one))
        weight = pattern.gather(-1, column.expand_as(one))
        z = block.mixed(pattern, here.v) + block.mixed(weight, v - here.v[:, at].movedim(0, 1)[:, :, None])
        attn_out = block.attn_out(z[:, :, 0])
        return _Changed(len(self.layers), (resid + attn_out + block.mlp_out(resid, attn_out))[:, :, None])


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = torch.finfo(theirs.dtype).eps ** 0.7  # 1.4e-5 in float32, 1e-11 in float64
    return bool((ours - theirs).abs().max() <= tolerance * (1e-6 + theirs.abs().max()))
