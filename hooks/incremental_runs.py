"""Patched runs, computed only where they can differ from the unpatched run; the results are exact.

A patch at position p changes nothing before p and nothing below its layer. If the metric reads a single position, the
last block is needed only there. So for a patch in layer 0 of a two-layer model, block 1 needs one new key, one new
value and one new attention row: a sweep over all positions costs about one forward pass. In deep models, runs that are
patched at about the same position go up through the blocks together, each from its own layer on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice
from hijack_lens.core.hook_points import is_hooked
from hijack_lens.hooks.intervention import record
from hijack_lens.hooks.patched_runs import BoundMetric
from hijack_lens.hooks.recorded_run import Changed, Layer, RecordedRun
from hijack_lens.hooks.sweep_plan import Job, Patches, hook_name
from hijack_lens.models.opened import OpenModel, UnknownArchitectureError, check_plain, open_model

Method = Literal["auto", "incremental", "forward"]
"""How a sweep is run: on what a patch can change, through the whole model, or the first where it works."""


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


def taken_apart(model: Any, tokens: Int[Tensor, "batch pos"]) -> RecordedRun | None:
    """A run of the model on `tokens` that others can go on from; `None` for a model whose parts are not known."""
    opened, _ = open_for(model, "auto")
    if opened is None:
        return None
    logits, run = record(model, tokens, RecordedRun.names(opened))
    recorded = RecordedRun(opened, run, logits, tokens.shape[1])
    return None if recorded.mismatch() else recorded


class IncrementalRuns(RecordedRun):
    """Patched runs of a model, computed from its parts.

    Args:
        opened: the model's parts.
        run: the unpatched run's activations, by hook point; see `names`.
        logits: the unpatched run's logits.
        reader: reads the metric off the logits.
    """

    name: Literal["incremental"] = "incremental"

    def __init__(self, opened: OpenModel, run: Mapping[str, Tensor], logits: Tensor, reader: BoundMetric):
        self.reader = reader
        # If the metric reads one position, nothing after it can affect the metric.
        super().__init__(opened, run, logits, logits.shape[1] if reader.only is None else reader.only + 1)

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
        starts: list[int] = []
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
                which, row = rows[index]
                by_job.setdefault(which, []).append(row)
            yield [jobs[which][torch.tensor(chosen)] for which, chosen in by_job.items()]

    def bytes_of(self, n_tokens: int) -> int:
        """With the logits that the metric reads."""
        n_read = 1 if self.reader.only is not None else self.length
        d_vocab = self.logits.shape[-1]
        return super().bytes_of(n_tokens) + 2 * self.logits.element_size() * len(self.logits) * n_read * d_vocab

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

    def _z(self, activation: str, here: Layer, source: Tensor) -> Float[Tensor, "batch pos head d_head"]:
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
        here: Layer, patches: Patches, delta: Float[Tensor, "batch pos head d_head"]
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

    def finish(self, entering: Sequence[Changed]) -> Float[Tensor, "patch"]:
        """The rest of the runs, each from the block that its changed stream enters, and the metric."""
        only = self.reader.only
        entering = [self._at_a_point(changed) for changed in entering]
        starts = [
            changed.start if changed.at is None else int(changed.at.min())
            for changed in entering
            if changed.layer < len(self.layers) or only is None
        ]
        start = min(starts, default=self.length - 1)
        after = self.opened.logits(self.finals(entering, start, last_only=only is not None))
        if only is not None:
            return self.reader.each_at(after[:, :, -1])
        return self.reader.each(torch.cat([self.logits[:, :start].expand(len(after), -1, -1, -1), after], 2))

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
        differs = runs.mismatch(every_logit=reader.only is None)
        if differs is None:
            return runs
        why_not = f"{differs} would not be what the model computes"
    if method == "incremental":
        raise ValueError(f"method='incremental' cannot run this {type(model).__name__}: {why_not}")
    return None
