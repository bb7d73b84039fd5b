"""What every head and MLP of a model of any depth wrote into chosen logits, directly or through one named component.

Unlike in `terms`, the outputs of components are taken from the run as they were (patterns, values, MLP outputs). Only
those of induction heads and bigram memories are split further, by which components wrote their inputs, given their
patterns, norm scales and gates.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.logit_attribution import MEMORIES, Memory, Path, Source
from hijack_lens.attribution.terms import biases_after_gate, gates_of, is_gated
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import all_components, rows_at_once
from hijack_lens.hooks.edges import changes_attn_out, embeddings, precedes, read_stream
from hijack_lens.hooks.intervention import Intervention, logits_of
from hijack_lens.models.linear_maps import Readout, linear_norm, rounding

_DEFAULT_ANSWERS = 10


class NotAdditiveError(ValueError):
    """Logits that are no sum over what heads and MLPs write."""


def check_additive(model: Any) -> None:
    """Checks that no setting keeps the logits from being a sum over what heads and MLPs add to the residual stream."""
    cfg = model.cfg
    if getattr(cfg, "output_logits_soft_cap", -1.0) not in (None, -1.0, 0.0):
        raise NotAdditiveError("model caps its logits (cfg.output_logits_soft_cap), so they are not a sum over paths")
    if getattr(cfg, "use_normalization_before_and_after", False):
        raise NotAdditiveError(
            "model has cfg.use_normalization_before_and_after=True, norms of all that heads write together, which "
            "attribution does not cover"
        )


def check_heads_add(model: Any) -> None:
    """Checks that every block's heads write straight into the residual stream."""
    for layer in range(model.cfg.n_layers):
        if changes_attn_out(model, layer):
            raise NotAdditiveError(
                f"model norms or scales what the heads of layer {layer} write, all together, which attribution does "
                "not cover"
            )


def check_unembedded(
    model: Any,
    stream: Float[Tensor, "rows d_model"],
    logits: Float[Tensor, "rows answer"],
    answers: Int[Tensor, "answer"],
) -> None:
    """Checks that a run's logits are the final norm and unembedding of its last residual stream."""
    norm, W_U, b_U = linear_norm(getattr(model, "ln_final", None), stream), model.W_U[:, answers], model.b_U[answers]
    normed = norm(stream)
    errors = (normed @ W_U + b_U - logits).abs()
    if not bool((errors <= rounding(logits.dtype) * (normed.abs() @ W_U.abs() + b_U.abs())).all()):
        raise ValueError(
            "model's logits are not its last residual stream through norm and unembedding (off by up to "
            f"{float(errors.max()):.2g}): a factor follows, hooks change them, or it has parts that are not known here"
        )


def direct_paths(
    model: Any, tokens: Int[Tensor, "batch pos"], query: int, circuit: Circuit, answers: Int[Tensor, "answer"] | None
) -> tuple[dict[Path, Tensor], Float[Tensor, "batch answer"], Int[Tensor, "answer"]]:
    """Values [batch, source, answer] by path, the logits they sum to, and the answers' token ids.

    The prompts are run in parts that fit into memory.

    Args:
        model: a model of any depth.
        tokens: the prompts.
        query: the position of the logits.
        circuit: its induction heads and bigram memories are split by what they read from the embeddings and from the
            circuit's earlier heads. A memory with a norm inside, or without weights of its own, stays whole.
        answers: token ids; by default those of the largest logits, for one prompt.
    """
    found: dict[Path, list[Tensor]] = {}
    of_answers = []
    for rows in tokens.split(rows_at_once(model, tokens.shape[1])):
        run = _Run.of(model, rows, query, circuit)
        if answers is None:
            answers = run.logits[0].topk(min(_DEFAULT_ANSWERS, run.logits.shape[-1])).indices
        values = run.values(model.W_U[:, answers], model.b_U[answers])
        for path, value in values.items():
            found.setdefault(path, []).append(value)
        of_answers.append(run.logits[:, answers])
    assert answers is not None
    return {path: torch.cat(value) for path, value in found.items()}, torch.cat(of_answers), answers


def direct_memories(
    model: Any, tokens: Int[Tensor, "batch pos"], query: int, circuit: Circuit, answers: Int[Tensor, "answer"]
) -> tuple[dict[Memory, Float[Tensor, "batch answer"]], Float[Tensor, "batch answer"]]:
    """The same summed over paths and sources, by memory; and the logits that these sum to.

    For many answers, what paths write is summed as vectors of the stream, and unembedded once.
    """
    check_additive(model)
    check_heads_add(model)
    run = _Run.of(model, tokens, query, circuit)
    W_U, b_U = model.W_U[:, answers], model.b_U[answers]
    written = run.values(torch.eye(len(W_U), dtype=W_U.dtype, device=W_U.device), W_U.new_zeros(len(W_U)))
    vectors = {path: value.sum(1) for path, value in written.items()}
    stream, logits = run.kept["stream", None][:, 0], run.logits[:, answers]
    check_complete(vectors.values(), linear_norm(getattr(model, "ln_final", None), stream)(stream))
    check_unembedded(model, stream, logits, answers)
    found = {memory: W_U.new_zeros(len(tokens), len(W_U)) for memory in MEMORIES}
    for path, vector in vectors.items():
        found[path.memory] = found[path.memory] + vector
    by_memory = {memory: vector @ W_U for memory, vector in found.items()}
    return {**by_memory, "weights": by_memory["weights"] + b_U}, logits


@dataclass(frozen=True)
class _Run:
    """What one position's logits depend on in a run of a model.

    Attributes:
        kept: activations by (what, whose): "embed" and "pos_embed" for `None`; "rows" (patterns at the query) and "v"
            for a layer; "out" for an MLP; "pattern" for a head that others read; "reads" (the stream), "pre", "linear"
            and "post" for a component that is split. Those of MLPs are for the query position only.
    """

    model: Any
    circuit: Circuit
    query: int
    logits: Float[Tensor, "batch d_vocab"]
    kept: dict[tuple[str, Any], Tensor]

    @classmethod
    def of(cls, model: Any, tokens: Int[Tensor, "batch pos"], query: int, circuit: Circuit) -> "_Run":
        """Runs the model and keeps only what is needed."""
        at = (slice(None), slice(query, query + 1))
        learned = "pos_embed" in _sources(model)
        # Any scale or norm of the token embeddings has been applied where the residual stream starts.
        wanted: dict[tuple[str, Any], tuple[str, Any]] = {
            ("embed", None): ("hook_embed" if learned else "blocks.0.hook_resid_pre", ...),
            ("stream", None): (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", at),
        }
        if learned:
            wanted["pos_embed", None] = ("hook_pos_embed", ...)
        for component in all_components(model):
            block = f"blocks.{component.layer}"
            if component.kind == "mlp":
                wanted["out", component] = (f"{block}.hook_mlp_out", at)
            else:
                wanted["rows", component.layer] = (f"{block}.attn.hook_pattern", (slice(None), *at))
                wanted["v", component.layer] = (f"{block}.attn.hook_v", ...)
            if not _is_split(model, circuit, component):
                continue
            wanted["reads", component] = (read_stream(model, component)[0], at if component.kind == "mlp" else ...)
            if component.kind == "mlp":
                linear = "hook_pre_linear" if is_gated(model) else "hook_pre"
                for what, leaf in (("pre", "hook_pre"), ("linear", linear), ("post", "hook_post")):
                    wanted[what, component] = (f"{block}.mlp.{leaf}", at)
            for sender in _senders(model, circuit, component):
                name = f"blocks.{sender.layer}.attn.hook_pattern"
                wanted["pattern", sender] = (name, (slice(None), _alone(sender)))
        kept: dict[tuple[str, Any], Tensor] = {}

        def keep(activation: Tensor, hook: Any, key: tuple[str, Any], index: Any) -> None:
            kept[key] = activation[index].detach().clone()

        look: list[tuple[str, Callable]] = [
            (name, partial(keep, key=key, index=index)) for key, (name, index) in wanted.items()
        ]
        with Intervention(model, look=look):
            logits = logits_of(model, tokens)[:, query].clone()
        return cls(model, circuit, query, logits, kept)

    def values(
        self, W_U: Float[Tensor, "d_model answer"], b_U: Float[Tensor, "answer"]
    ) -> dict[Path, Float[Tensor, "batch source answer"]]:
        """What each path wrote into the answers' logits, by their columns of the unembedding."""
        model = self.model
        stream, at = self.kept["stream", None], slice(self.query, self.query + 1)
        final = linear_norm(getattr(model, "ln_final", None), stream)
        readout = Readout(W_U, stream.new_ones(stream.shape[:2]), at).before(final)
        values: dict[Path, Tensor] = {}

        def put(source: Source, through: tuple[Component, ...], value: Tensor) -> None:
            values[Path.of(source, through, self.circuit)] = value

        for source in _sources(model):
            put(source, (), self._embedding(source, readout))
        bias = b_U if final.b is None else b_U + final.b @ W_U
        biases = bias.expand(len(stream), 1, -1)
        heads: dict[int, Tensor] = {}
        for component in all_components(model):
            layer, head = component.layer, component.head
            if head is None:
                whole = self._at_query(readout.stream(self.kept["out", component]))
            else:
                attn = model.blocks[layer].attn
                if head == 0:
                    heads[layer] = readout.heads(self.kept["rows", layer], self._v(layer), attn.W_O)
                    if attn.b_O is not None:
                        biases = biases + readout.stream(attn.b_O.expand_as(stream))
                whole = heads[layer][:, head]
            for source, sender, value in self._split(component, readout):
                put(source, (component,) if sender is None else (sender, component), value)
                whole = whole - value
            put("stream", (component,), whole)
        put("biases", (), self._at_query(biases))
        return values

    def _split(self, component: Component, readout: Readout) -> list[tuple[Source, Component | None, Tensor]]:
        """What a component passed on from the embeddings and from earlier heads: (source, head, value)."""
        if not _is_split(self.model, self.circuit, component):
            return []
        through = (self._before_head if component.kind == "head" else self._before_mlp)(component, readout)
        split: list[tuple[Source, Component | None, Tensor]] = [
            (source, None, self._embedding(source, through)) for source in _sources(self.model)
        ]
        for sender in _senders(self.model, self.circuit, component):
            one, W_O = _alone(sender), self.model.blocks[sender.layer].attn.W_O
            pattern, v = self.kept["pattern", sender][:, :, through.where], self._v(sender.layer)
            split.append(("stream", sender, through.heads(pattern, v[:, :, one], W_O[one])[:, 0]))
        return split

    def _before_head(self, component: Component, readout: Readout) -> Readout:
        layer, head, n_heads = component.layer, component.head, self.model.cfg.n_heads
        assert head is not None
        attn, stream = self.model.blocks[layer].attn, self.kept["reads", component]
        norm = linear_norm(read_stream(self.model, component)[1], stream)
        W_V = _per_head(attn.W_V, n_heads)[head]
        read = norm(stream) @ W_V
        if attn.b_V is not None:
            read = read + _per_head(attn.b_V, n_heads)[head]
        _check_reads(component, read, self._v(layer)[:, :, head])
        return readout.before_head(self.kept["rows", layer][:, head], W_V, attn.W_O[head]).before(norm)

    def _before_mlp(self, component: Component, readout: Readout) -> Readout:
        mlp, stream = self.model.blocks[component.layer].mlp, self.kept["reads", component]
        pre, linear, post = (self.kept[what, component] for what in ("pre", "linear", "post"))
        norm = linear_norm(read_stream(self.model, component)[1], stream)
        late = biases_after_gate(self.model)
        read = norm(stream) @ mlp.W_in
        _check_reads(component, read if late or mlp.b_in is None else read + mlp.b_in, linear)
        out = self.kept["out", component]
        unexplained = out - post @ mlp.W_out - (0.0 if mlp.b_out is None else mlp.b_out)
        if not bool((unexplained.abs() <= rounding(out.dtype) * (post.abs() @ mlp.W_out.abs() + out.abs())).all()):
            raise ValueError(
                f"what {component} writes cannot be split: it is not its neurons times its W_out. A hook on the model "
                "changes it, or the model has parts that attribution does not know"
            )
        gates = gates_of(self.model, mlp, pre, linear, post)
        return readout.before_mlp(gates[:, 0], mlp.W_in, mlp.W_out).before(norm)

    def _embedding(self, source: str, readout: Readout) -> Float[Tensor, "batch source answer"]:
        x = self.kept[source, None].expand(len(self.logits), -1, -1)
        value = readout.stream(x[:, readout.where])
        return value if value.shape[1] == x.shape[1] else self._at_query(value)

    def _at_query(self, value: Float[Tensor, "batch 1 answer"]) -> Float[Tensor, "batch source answer"]:
        n_sources = self.kept["embed", None].shape[1]
        everywhere = value.new_zeros(value.shape[0], n_sources, value.shape[2])
        everywhere[:, self.query] = value[:, 0]
        return everywhere

    def _v(self, layer: int) -> Float[Tensor, "batch pos head d_head"]:
        return _per_head(self.kept["v", layer], self.model.cfg.n_heads, 2)


def _per_head(shared: Tensor, n_heads: int, dim: int = 0) -> Tensor:
    """Weights or values of each query head; groups of heads may share them."""
    return shared.repeat_interleave(n_heads // shared.shape[dim], dim)


def _alone(head: Component) -> slice:
    """A head, as a slice of its layer's head axis."""
    assert head.head is not None
    return slice(head.head, head.head + 1)


def _sources(model: Any) -> tuple[Source, ...]:
    """The embeddings that are terms of the residual stream."""
    return ("embed", "pos_embed") if "pos_embed" in embeddings(model) else ("embed",)


def _senders(model: Any, circuit: Circuit, component: Component) -> list[Component]:
    """The circuit's heads that a component reads."""
    heads = {sender for role, sender in circuit if sender.kind == "head"}
    return sorted(head for head in heads if precedes(model, head, component))


def _is_split(model: Any, circuit: Circuit, component: Component) -> bool:
    """Whether to split what a component reads by who wrote it: for induction heads, and bigram memories if linear."""
    if component not in (*circuit.induction, *circuit.bigram):
        return False
    if component.kind == "head":
        return True
    # An MLP is linear once its gates are known, unless it is a mixture of experts or has a norm inside.
    mlp = model.blocks[component.layer].mlp
    has_weights = all(isinstance(getattr(mlp, name, None), Tensor) for name in ("W_in", "W_out"))
    return has_weights and not str(model.cfg.act_fn).endswith("_ln")


def _check_reads(component: Component, expected: Tensor, actual: Tensor) -> None:
    if not bool((expected - actual).abs().max() <= rounding(actual.dtype) * actual.abs().max()):
        raise ValueError(
            f"what {component} reads cannot be split: it is not the normed residual stream times its weights. Hooks on "
            "the model may have changed it, or the model has parts that attribution does not know"
        )


def check_complete(parts: Iterable[Float[Tensor, "..."]], logits: Float[Tensor, "..."]) -> None:
    """Checks that the parts, each shaped like the logits, sum to them, up to rounding in proportion to their sizes."""
    total, size = torch.zeros_like(logits), logits.abs()
    for part in parts:
        total, size = total + part, size + part.abs()
    errors = (total - logits).abs()
    if not bool((errors <= rounding(logits.dtype) * size).all()):
        raise NotAdditiveError(
            f"what heads, MLPs, embeddings and biases wrote misses the logits by up to {float(errors.max()):.2g}: "
            "hooks on the model have changed what it computes, or it has parts that attribution does not know"
        )
