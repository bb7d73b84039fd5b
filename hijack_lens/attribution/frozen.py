"""A run of a model of any depth with its patterns, norm scales and gates held, read backwards from the logits.

With these held, the model is linear in the embeddings, so a logit is a reading of every position's embedding, plus what
the biases add where they enter. One pass from the last block to the first, about as long as a forward pass, gives
these readings at every depth (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.terms import biases_after_gate, gates_of, is_gated
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import all_components
from hijack_lens.hooks.edges import norms_of_heads, norms_of_mlp, read_stream
from hijack_lens.hooks.intervention import Intervention, logits_of
from hijack_lens.models.linear_maps import LinearNorm, linear_norm
from hijack_lens.models.readable import check_readable

Readings = Float[Tensor, "batch answer pos d_model"]
"""What each answer's logit reads of the residual stream at each position."""


@dataclass(frozen=True)
class FrozenAttention:
    """A block's heads with their patterns, and the norms before and after them with their scales.

    Attributes:
        v: the values, by the key-value head that has them.
    """

    pattern: Float[Tensor, "batch head query key"]
    v: Float[Tensor, "batch key kv_head d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_V: Float[Tensor, "kv_head d_head"] | None
    b_O: Float[Tensor, "d_model"] | None
    ln: LinearNorm
    after: LinearNorm
    factor: float

    def z(self, out: Readings, rows: slice) -> tuple[Float[Tensor, "batch answer query head d_head"], Tensor]:
        """Readings of the heads' outputs at some positions, from those of the stream; and what the biases add."""
        g = _transposed(self.after, out * self.factor, rows)
        biases = _constant(self.after.b, out * self.factor) + _constant(self.b_O, g)
        return torch.einsum("bapm,hem->baphe", g, self.W_O), biases

    def links(self, z: Float[Tensor, "batch answer head d_head"], query: int) -> Float[Tensor, "batch answer head key"]:
        """What each head brings to one position from each that it attends to, by readings of its output there."""
        seen = torch.einsum("bske,bakge->bakgs", self.v, z.unflatten(2, (self.v.shape[2], -1)))
        return seen.flatten(2, 3) * self.pattern[:, None, :, query]

    def stream(self, z: Float[Tensor, "batch answer query head d_head"], queries: slice, keys: slice) -> Readings:
        """Readings of the stream before the heads at `keys`, from those of their outputs at `queries`."""
        pattern = self.pattern[:, None, :, queries, keys].expand(-1, z.shape[1], -1, -1, -1)
        v = self._shared(torch.einsum("bahqs,baqhe->bashe", pattern, z))
        return _transposed(self.ln, torch.einsum("baske,kme->basm", v, self.W_V), keys)

    def out(self, x: Float[Tensor, "batch row d_model"], responses: "FrozenAttention") -> Tensor:
        """What the heads write at the last positions, from the stream there, with another run's scales of the norms.

        At positions before these, their values are those of this run.
        """
        n = x.shape[1]
        v = torch.einsum("brm,kme->brke", _last(responses.ln, n)(x), self.W_V)
        v = torch.cat([self.v[:, :-n], v if self.b_V is None else v + self.b_V], 1)
        v = v.repeat_interleave(self.pattern.shape[1] // v.shape[2], 2)
        z = torch.einsum("bhrs,bshe->brhe", self.pattern[:, :, -n:], v)
        wrote = torch.einsum("brhe,hem->brm", z, self.W_O)
        return _last(responses.after, n)(wrote if self.b_O is None else wrote + self.b_O) * self.factor

    def value_biases(self, z: Float[Tensor, "batch answer row head d_head"], rows: slice) -> Tensor:
        """What the biases of values, and of the norm before them, add where the heads write."""
        constant = z.new_zeros(self.W_V.shape[0], self.W_V.shape[2]) if self.b_V is None else self.b_V
        if self.ln.b is not None:
            constant = constant + self.ln.b @ self.W_V
        read = self._shared(z * self.pattern[:, :, rows].sum(-1).transpose(1, 2)[:, None, ..., None])
        return torch.einsum("baqke,ke->baq", read, constant)

    def _shared(self, x: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... kv_head d_head"]:
        """Sums over the heads that share values."""
        return x.unflatten(-2, (self.v.shape[2], -1)).sum(-2)


@dataclass(frozen=True)
class LinearMLP:
    """An MLP with its gates, and the norms before and after it with their scales.

    Attributes:
        late: whether its b_in comes after the gate, as in a gated MLP of a HookedTransformer.
    """

    gates: Float[Tensor, "batch pos d_mlp"]
    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, "d_mlp"] | None
    b_out: Float[Tensor, "d_model"] | None
    ln: LinearNorm
    after: LinearNorm
    factor: float
    late: bool

    def stream(self, out: Readings, rows: slice) -> tuple[Readings, Tensor]:
        """Readings of the stream before the MLP at some positions, from those after it; and what the biases add."""
        g = _transposed(self.after, out * self.factor, rows)
        biases = _constant(self.after.b, out * self.factor) + _constant(self.b_out, g)
        post = g @ self.W_out.T
        pre = post * self.gates[:, None, rows]
        g = pre @ self.W_in.T
        biases = biases + _constant(self.b_in, post if self.late else pre) + _constant(self.ln.b, g)
        return _transposed(self.ln, g, rows), biases

    def out(self, x: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row d_model"]:
        """What the MLP writes at the last positions, from the stream there."""
        n = x.shape[1]
        b_in = self.W_in.new_zeros(1) if self.b_in is None else self.b_in
        pre = _last(self.ln, n)(x) @ self.W_in
        post = self.gates[:, -n:] * (pre if self.late else pre + b_in) + (b_in if self.late else 0.0)
        wrote = post @ self.W_out
        return _last(self.after, n)(wrote if self.b_out is None else wrote + self.b_out) * self.factor


@dataclass(frozen=True)
class FrozenModel:
    """All blocks of a run up to a position, and how logits there read the last stream.

    Attributes:
        start: the residual stream that the first block reads.
        blocks: each block's heads, its MLP if there is one, and whether the MLP reads what attention reads.
        final: the last norm.
        last: the residual stream that the last norm reads.
        logits: of the position, as the model gives them.
    """

    model: Any
    start: Float[Tensor, "batch pos d_model"]
    blocks: tuple[tuple[FrozenAttention, LinearMLP | None], ...]
    parallel: bool
    final: LinearNorm
    last: Float[Tensor, "batch 1 d_model"]
    logits: Float[Tensor, "batch d_vocab"]

    @property
    def query(self) -> int:
        """The position whose logits are read: the last."""
        return self.start.shape[1] - 1

    @classmethod
    def of(cls, model: Any, tokens: Int[Tensor, "batch pos"]) -> "FrozenModel":
        """Runs a model."""
        return cls.at(model, tokens, [tokens.shape[1] - 1])[0]

    @classmethod
    def at(cls, model: Any, tokens: Int[Tensor, "batch pos"], queries: Sequence[int]) -> "list[FrozenModel]":
        """Runs a model once, and cuts the run off after each of some positions: later ones change nothing before."""
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), Intervention(model, look=list(_looks(model, kept))):
            logits = logits_of(model, tokens)[:, list(queries)].clone()
        for layer in range(model.cfg.n_layers):
            has_mlp = f"blocks.{layer}.mlp.hook_pre" in kept
            check_readable(model, layer, "attn.W_V", "attn.W_O", *(("mlp.W_in", "mlp.W_out") if has_mlp else ()))
        found = []
        for row, query in enumerate(queries):
            cut = {name: _cut(name, activation, query + 1) for name, activation in kept.items()}
            blocks = tuple(_block(model, layer, cut) for layer in range(model.cfg.n_layers))
            last = cut[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][:, -1:]
            final = linear_norm(getattr(model, "ln_final", None), last)
            parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
            start = cut["blocks.0.hook_resid_pre"]
            found.append(cls(model, start, blocks, parallel, final, last, logits[:, row]))
        return found

    def back(self, answers: Int[Tensor, "answer"]) -> "Traced":
        """Follows some outputs' logits back to the embeddings."""
        g, added = self._unembedded(answers)
        everywhere = slice(0, self.query + 1)
        g, biases = (torch.cat([x.new_zeros(*x.shape[:2], self.query, *x.shape[3:]), x], 2) for x in (g, added))
        links, at_query = [], []
        for block in reversed(self.blocks):
            g, z, added = self._step(block, g, everywhere)
            biases = biases + added
            at_query.append(z[:, :, self.query])
            links.append(block[0].links(at_query[-1], self.query))
        return Traced(
            embed=torch.einsum("bapm,bpm->bpa", g, self.start),
            biases=biases.transpose(1, 2),
            links=torch.stack(links[::-1], 1).permute(0, 1, 3, 4, 2),
            z=tuple(at_query[::-1]),
        )

    def through(self, traced: "Traced", carriers: Sequence[Component]) -> Float[Tensor, "carrier batch pos answer"]:
        """What each position's embedding wrote through each carrier's links to the query from earlier positions."""
        n_prompts, n_sources, n_answers = traced.embed.shape
        found = self.start.new_zeros(len(carriers), n_prompts, n_sources, n_answers)
        before, order = slice(0, self.query), sorted(range(len(carriers)), key=lambda i: -carriers[i].layer)
        g = self.start.new_zeros(n_prompts, 0, self.query, self.start.shape[-1])
        for layer in range(max((head.layer for head in carriers), default=-1), -1, -1):
            if g.shape[1]:
                g, _, _ = self._step(self.blocks[layer], g, before)
            for head in (carriers[i] for i in order if carriers[i].layer == layer):
                z = torch.zeros_like(traced.z[layer])
                z[:, :, head.head] = traced.z[layer][:, :, head.head]
                here = slice(self.query, self.query + 1)
                g = torch.cat([g, self.blocks[layer][0].stream(z[:, :, None], here, before)], 1)
        wrote = torch.einsum("bapm,bpm->bpa", g, self.start[:, before]).unflatten(-1, (len(carriers), n_answers))
        found[order, :, before] = wrote.permute(2, 0, 1, 3)
        return found

    def answering(
        self, answers: Int[Tensor, "answer"], n: int, responses: "FrozenModel"
    ) -> Float[Tensor, "batch answer"]:
        """Some logits, if the last n positions read what they read here and respond to it as they do in another run.

        What they read: by the patterns of this run, and at positions before these the values of this run. How they
        respond: the norms' scales and the MLPs' gates.
        """
        x = self.start[:, -n:]
        for (heads, _), (their_heads, their_mlp) in zip(self.blocks, responses.blocks, strict=True):
            brought = heads.out(x, their_heads)
            into = x if self.parallel else x + brought
            x = x + brought + (0.0 if their_mlp is None else their_mlp.out(into))
        W_U, b_U, caps = responses._unembedding(answers)
        return caps * (responses.final(x[:, -1:])[:, 0] @ W_U.T + b_U)

    def _step(
        self, block: tuple[FrozenAttention, LinearMLP | None], g: Readings, rows: slice
    ) -> tuple[Readings, Float[Tensor, "batch answer row head d_head"], Tensor]:
        """Readings before a block, of its heads' outputs, and of its biases, from those after it."""
        heads, mlp = block
        through, added = (torch.zeros_like(g), 0.0) if mlp is None else mlp.stream(g, rows)
        z, more = heads.z(g if self.parallel else g + through, rows)
        biases = added + more + heads.value_biases(z, rows)
        return g + through + heads.stream(z, rows, rows), z, biases

    def _unembedding(self, answers: Int[Tensor, "answer"]) -> tuple[Tensor, Tensor, Float[Tensor, "batch answer"]]:
        """Some columns of the unembedding, and what this run's cap of the logits multiplies each by."""
        W_U, b_U = self.model.W_U[:, answers].T, self.model.b_U[answers]
        caps = self.logits.new_ones(len(self.logits), len(answers))
        if getattr(self.model.cfg, "output_logits_soft_cap", None) not in (None, -1.0, 0.0):
            before = self.final(self.last)[:, 0] @ W_U.T + b_U
            caps = torch.where(before == 0, 1.0, self.logits[:, answers] / before)
        return W_U, b_U, caps

    def _unembedded(self, answers: Int[Tensor, "answer"]) -> tuple[Readings, Tensor]:
        """How the answers' logits read the last stream at the query; and what the biases add."""
        W_U, b_U, caps = self._unembedding(answers)
        g = (caps[..., None] * W_U)[:, :, None]
        biases = caps[..., None] * b_U[:, None] + _constant(self.final.b, g)
        return _transposed(self.final, g, slice(None)), biases


@dataclass(frozen=True)
class Traced:
    """Some answers' logits, as two sums: of what entered at each position, and of what heads brought to the query.

    Attributes:
        embed: what each position's embedding wrote; with `biases` it sums to the logits.
        biases: what biases wrote, by the position where they enter.
        links: what each head brought to the query's position from each that it attended to.
        z: by layer, how the logits read each head's output at the query.
    """

    embed: Float[Tensor, "batch pos answer"]
    biases: Float[Tensor, "batch pos answer"]
    links: Float[Tensor, "batch layer head pos answer"]
    z: tuple[Float[Tensor, "batch answer head d_head"], ...]


def _transposed(norm: LinearNorm, g: Readings, rows: slice) -> Readings:
    return norm.transposed(g, None if norm.scale is None else norm.scale[:, None, rows])


def _last(norm: LinearNorm, n: int) -> LinearNorm:
    """A norm at the last positions alone."""
    return norm if norm.scale is None else replace(norm, scale=norm.scale[:, -n:])


def _constant(bias: Tensor | None, g: Tensor) -> Tensor:
    """What is read of a bias, at each position."""
    return g.new_zeros(g.shape[:-1]) if bias is None else g @ bias


def _cut(name: str, activation: Tensor, length: int) -> Tensor:
    """An activation at the first positions alone."""
    return activation[:, :, :length, :length] if name.endswith("hook_pattern") else activation[:, :length]


def _looks(model: Any, kept: dict[str, Tensor]) -> Iterator[tuple[str, Callable]]:
    """Hooks that keep what a frozen run needs."""
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def keep(activation: Tensor, hook: Any, name: str) -> None:
        kept[name] = activation.detach().clone()

    names = [last]
    for component in all_components(model):
        at = f"blocks.{component.layer}"
        if component.head == 0:
            names += [f"{at}.hook_resid_pre", f"{at}.attn.hook_pattern", f"{at}.attn.hook_v"]
        elif component.kind == "mlp":
            names += [read_stream(model, component)[0], f"{at}.mlp.hook_pre", f"{at}.mlp.hook_post"]
            names += [f"{at}.mlp.hook_pre_linear"] * is_gated(model)
    for name in dict.fromkeys(names):
        yield name, partial(keep, name=name)


def _block(model: Any, layer: int, kept: dict[str, Tensor]) -> tuple[FrozenAttention, LinearMLP | None]:
    block, at = model.blocks[layer], f"blocks.{layer}"
    attn, v, pattern = block.attn, kept[f"{at}.attn.hook_v"], kept[f"{at}.attn.hook_pattern"]
    before, after = norms_of_heads(model, layer)
    factor = float(getattr(block, "residual_contribution_scale", 1.0))
    every = len(attn.W_V) // v.shape[2]
    W_V, b_V = (None if given is None else given[:: max(1, every)] for given in (attn.W_V, attn.b_V))
    assert W_V is not None
    if after is not None:
        n_groups = pattern.shape[1] // v.shape[2]
        z = torch.einsum("bhqs,bshe->bqhe", pattern, v.repeat_interleave(n_groups, 2))
        wrote = torch.einsum("bqhe,hem->bqm", z, attn.W_O) + (0.0 if attn.b_O is None else attn.b_O)
    heads = FrozenAttention(
        pattern=pattern,
        v=v,
        W_V=W_V,
        W_O=attn.W_O,
        b_V=b_V,
        b_O=attn.b_O,
        ln=linear_norm(before, kept[f"{at}.hook_resid_pre"]),
        after=LinearNorm() if after is None else linear_norm(after, wrote),
        factor=factor,
    )
    return heads, _mlp(model, layer, kept, factor)


def _mlp(model: Any, layer: int, kept: dict[str, Tensor], factor: float) -> LinearMLP | None:
    block, at = model.blocks[layer], f"blocks.{layer}"
    if f"{at}.mlp.hook_pre" not in kept:
        return None
    mlp = block.mlp
    pre, post = kept[f"{at}.mlp.hook_pre"], kept[f"{at}.mlp.hook_post"]
    linear = kept.get(f"{at}.mlp.hook_pre_linear", pre)
    stream = read_stream(model, Component(layer, "mlp"))[0]
    before, after = norms_of_mlp(model, layer)
    if after is not None:
        wrote = post @ mlp.W_out + (0.0 if mlp.b_out is None else mlp.b_out)
    return LinearMLP(
        gates=gates_of(model, mlp, pre, linear, post),
        W_in=mlp.W_in,
        W_out=mlp.W_out,
        b_in=mlp.b_in,
        b_out=mlp.b_out,
        ln=linear_norm(before, kept[stream]),
        after=LinearNorm() if after is None else linear_norm(after, wrote),
        factor=factor,
        late=biases_after_gate(model),
    )
