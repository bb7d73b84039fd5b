"""Patched runs, computed only where they can differ from the unpatched run; the results are exact.

A patch at position p changes nothing before p and nothing below its layer. If the metric reads a single position, the
last block is needed only there. So for a patch in layer 0 of a two-layer model, block 1 needs one new key, one new
value and one new attention row: a sweep over all positions costs about one forward pass. In deep models, runs that are
patched at about the same position go up through the blocks together, each from its own layer on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice
from hijack_lens.core.hook_points import is_hooked
from hijack_lens.hooks.patched_runs import BoundMetric
from hijack_lens.hooks.sweep_plan import Job, Patches, hook_name
from hijack_lens.models.opened import Block, OpenModel, UnknownArchitectureError, check_plain, open_model

Method = Literal["auto", "incremental", "forward"]
"""How a sweep is run: on what a patch can change, through the whole model, or the first where it works."""

Rows = Float[Tensor, "patch batch pos d_model"]


def open_for(model: Any, method: Method) -> tuple[OpenModel | None, str | None]:
    """The parts of a model whose runs can be incremental, or why they cannot; neither for "forward"."""
    check_choice("method", method, ("auto", "incremental", "forward"))
    if is_hooked(model):
        return None, "there are hooks on the model"
    if method == "forward":
        return None, None
    try:
        check_plain(model)
        return open_model(model), None
    except UnknownArchitectureError as error:
        return None, str(error)


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

    def values(
        self, jobs: Sequence[Job], memory: float
    ) -> Iterator[tuple[Int[Tensor, "patch"], Float[Tensor, "patch"]]]:
        """The metric under each patch of all jobs, in parts that fit into `memory` bytes, with their places."""
        for parts in self._together(jobs, memory):
            yield torch.cat([part.places for part in parts]), self.finish([self._changed(part) for part in parts])

    def _together(self, jobs: Sequence[Job], memory: float) -> Iterator[list[Job]]:
        """Parts of jobs to be run at once: patched at about the same position, or read where they were patched."""
        last, only = len(self.layers) - 1, self.reader.only
        rows = [(job, row) for job in range(len(jobs)) for row in range(len(jobs[job].patches))]
        starts = []
        for job in jobs:
            entered = job.layer if job.activation in ("resid_pre", "k", "v") else job.layer + 1
            one = job.patches.positions.shape[1] == 1
            ends = only is not None and ((one and entered >= last) or entered > last)
            first = job.patches.positions[:, 0]
            starts += [self.length - 1] * len(first) if ends else first.tolist()
        order = sorted(range(len(rows)), key=starts.__getitem__)
        while order:
            start = starts[order[0]]
            n_tokens = self.length - start
            most = max(1, int(memory // self.bytes_of(n_tokens)))
            # What starts a little later goes along: a batch of few rows takes longer per row.
            near = [index for index in order[:most] if starts[index] <= start + n_tokens // 8]
            order = order[len(near) :]
            by_job: dict[int, list[int]] = {}
            for index in near:
                job, row = rows[index]
                by_job.setdefault(job, []).append(row)
            yield [jobs[job][torch.tensor(chosen)] for job, chosen in by_job.items()]

    def bytes_of(self, n_tokens: int) -> int:
        """Roughly how much memory one patched run takes, if so many positions of each prompt are run again."""
        batch, _, d_model = self.layers[0].resid_pre.shape
        block = self.layers[0].block
        wide = 8 * d_model + 3 * len(block.b_Q) * self.length + 4 * block.b_Q.numel()
        if block.W_out is not None:
            wide += 3 * len(block.W_out)
        of_vocab = 2 * self.logits.shape[-1] * (1 if self.reader.only is not None else self.length)
        return self.logits.element_size() * batch * (n_tokens * wide + of_vocab)

    def _changed(self, job: Job) -> Changed:
        source, patches = job.source[:, : self.length], job.patches.to(self.positions.device)
        if patches.positions.shape[1] > 1:  # all positions; those after the metric's do not matter
            patches = Patches(patches.positions[:, : self.length], patches.units)
        build = self._from_keys_or_values if job.activation in ("k", "v") else self._from_stream
        return build(job.activation, job.layer, patches, source)

    def _from_stream(self, activation: str, layer: int, patches: Patches, source: Tensor) -> Changed:
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
        return Changed(entered, x, at=at)

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

    def _from_keys_or_values(self, activation: str, layer: int, patches: Patches, source: Tensor) -> Changed:
        """A patch that all later queries of its heads can see."""
        here, block = self.layers[layer], self.layers[layer].block
        start = self.read_from(layer, int(patches.positions.min()))
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
        return self.after_attention(layer, attn_out, start)

    def read_from(self, layer: int, start: int) -> int:
        """From which position on a block's output is needed, if its input changes from `start` on."""
        return self.length - 1 if layer == len(self.layers) - 1 and self.reader.only is not None else start

    def after_attention(self, layer: int, attn_out: Rows, start: int) -> Changed:
        """What attention writes in patched runs from `start` on, taken through the block's MLP."""
        here, block = self.layers[layer], self.layers[layer].block
        resid_pre = here.resid_pre[:, start:].expand_as(attn_out)
        mlp_out = here.mlp_out[:, start:] if block.parallel else block.mlp_out(resid_pre, attn_out)
        return Changed(layer + 1, resid_pre + attn_out + mlp_out, start)

    def finish(self, entering: Sequence[Changed]) -> Float[Tensor, "patch"]:
        """The rest of the runs, each from the block that its changed stream enters, and the metric."""
        n_layers, only = len(self.layers), self.reader.only
        entering = [self._at_a_point(changed) for changed in entering]
        starts = [self._start(changed) for changed in entering if changed.layer < n_layers or only is None]
        start = min(starts, default=self.length - 1)
        rows = torch.arange(sum(len(changed.x) for changed in entering), device=self.positions.device)
        by_entry = rows.split([len(changed.x) for changed in entering])
        x, order = [], []
        for layer in range(min(changed.layer for changed in entering), n_layers + 1):
            for changed, places in zip(entering, by_entry, strict=True):
                if changed.layer == layer:
                    x.append(self._spread(changed, start))
                    order.append(places)
            if layer < n_layers:
                x = [self._through(layer, torch.cat(x), start, last_only=only is not None and layer == n_layers - 1)]
        after, given = torch.cat(x), torch.cat(order).argsort()
        if only is not None:
            return self.reader.each_at(self.opened.logits(after[:, :, -1]))[given]
        before = self.logits[:, :start].expand(len(after), -1, -1, -1)
        return self.reader.each(torch.cat([before, self.opened.logits(after)], 2)[given])

    @staticmethod
    def _start(changed: Changed) -> int:
        """The first position that is changed in any of the runs."""
        return changed.start if changed.at is None else int(changed.at.min())

    def _spread(self, changed: Changed, start: int) -> Rows:
        """The changed streams, written out in full from `start` on; after the last block, only where they are read."""
        after_last = changed.layer == len(self.layers)
        if after_last and self.reader.only is not None:
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

    def _at_a_point(self, changed: Changed) -> Changed:
        """Streams that change at a point before the last block, if the metric reads one position: those after it."""
        at_a_point = changed.at is not None and changed.layer == len(self.layers) - 1
        return self._last_block_at_a_point(changed) if at_a_point and self.reader.only is not None else changed

    def _last_block_at_a_point(self, changed: Changed) -> Changed:
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
        return Changed(len(self.layers), (resid + attn_out + block.mlp_out(resid, attn_out))[:, :, None])


def checked_runs(
    model: Any,
    method: Method,
    opened: OpenModel | None,
    why_not: str | None,
    run: Mapping[str, Tensor],
    logits: Tensor,
    reader: BoundMetric,
) -> IncrementalRuns | None:
    """Incremental runs that compute what the model does; `None` where they do not.

    Args:
        model: the model.
        method: how the sweep is to be run.
        opened: what `open_for` gave,
        why_not: and its reason.
        run: arguments of `IncrementalRuns`, as
        logits: are these,
        reader: and this.

    Raises:
        ValueError: where they do not, with method="incremental".
    """
    if opened is not None:
        runs = IncrementalRuns(opened, run, logits, reader)
        differs = runs.mismatch()
        if differs is None:
            return runs
        why_not = f"{differs} would not be what the model computes"
    if method == "incremental":
        raise ValueError(f"method='incremental' cannot run this {type(model).__name__}: {why_not}")
    return None


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = torch.finfo(theirs.dtype).eps ** 0.7  # 1.4e-5 in float32, 1e-11 in float64
    return bool((ours - theirs).abs().max() <= tolerance * (1e-6 + theirs.abs().max()))
