"""A head's attention scores as an exact sum over (query path, key path).

Given the norm's scale in a run, queries and keys are linear in the residual stream, which is itself the sum of what
every earlier component wrote into it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). A
score is then a sum over pairs of terms, one of the query and one of the key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge

from hijack_lens.attribution.score_attribution import ScoreAttribution, ScoreTerm
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import as_int, check_list, check_position, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import SINK, Site, all_components, is_deep
from hijack_lens.core.inputs import circuit_of, one_head, prompt_texts, single_prompt
from hijack_lens.core.tables import widened
from hijack_lens.hooked import HookedTransformer
from hijack_lens.hooks.edges import Sender, embeddings, norms_of_heads, sender_site
from hijack_lens.hooks.intervention import record
from hijack_lens.models.linear_maps import LinearNorm, linear_norm
from hijack_lens.models.opened import Block, OpenModel, open_model


def senders(model: Any, layer: int) -> tuple[Sender, ...]:
    """What writes into the residual stream before a block."""
    before = (component for component in all_components(model) if component.layer < layer)
    return (*embeddings(model), *before)


def stream_terms(
    model: Any, opened: OpenModel, layer: int, run: Mapping[str, Tensor], positions: Int[Tensor, "pos"]
) -> dict[ScoreTerm, Float[Tensor, "pos d_model"]]:
    """The terms that sum to the residual stream entering a block, at some positions of a run of one prompt.

    Heads' terms leave out their block's bias b_O, which is among the biases; MLPs' terms include their biases. Where a
    norm follows the heads, they write through it, given its scale.
    """
    stream = run[f"blocks.{layer}.hook_resid_pre"][0, positions]
    after = [_norm_after(model, opened, before, run, positions) for before in range(layer)]
    terms: dict[ScoreTerm, Tensor] = {}
    for sender in senders(model, layer):
        site = _written(model, sender)
        output = site.read(run[site.name])[0, positions]
        if isinstance(sender, Component) and sender.head is not None:
            output = after[sender.layer].linear(output @ opened.blocks[sender.layer].W_O[sender.head])
        terms[sender] = output
    terms["biases"] = torch.zeros_like(stream)
    for block, norm in zip(opened.blocks, after, strict=False):
        bias = norm.linear(block.b_O.expand_as(stream))
        terms["biases"] = terms["biases"] + (bias if norm.b is None else bias + norm.b)
    error = float((sum(terms.values()) - stream).abs().max())
    size = float(sum(term.abs() for term in terms.values()).max())  # type: ignore[union-attr]
    # Bridges compute norms in float32, whatever the model's dtype.
    rounded = [torch.float32 for norm in after if norm.scale is not None and not isinstance(model, HookedTransformer)]
    if not error <= tolerance(stream.dtype, *rounded) * size:
        raise ValueError(
            f"the residual stream before layer {layer} is not the sum of embeddings, heads, MLPs and biases (off by "
            f"{error:.2g}): the model, or a hook on it, does something to it that attribution does not cover"
        )
    return terms


def _written(model: Any, sender: Sender) -> Site:
    """Where a sender's output is read; of embeddings, after any scale or norm, where these alone start the stream."""
    alone = sender == "embed" and "pos_embed" not in embeddings(model)
    return Site("blocks.0.hook_resid_pre") if alone else sender_site(model, sender)


def _norm_after(
    model: Any, opened: OpenModel, layer: int, run: Mapping[str, Tensor], positions: Int[Tensor, "pos"]
) -> LinearNorm:
    """The norm of what a block's heads write together, as it acted in the run."""
    norm = norms_of_heads(model, layer)[1]
    if norm is None:
        return LinearNorm()
    return linear_norm(norm, opened.blocks[layer].attn_out(run[f"blocks.{layer}.attn.hook_z"][0, positions]))


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two ways of computing a sum may differ, relative to the size of its terms."""
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


@dataclass(frozen=True)
class HeadInput:
    """How one head computes its queries, or its keys, at some positions of a run: normed stream times W, plus b.

    In some models these are normed in turn: `own`.
    """

    block: Block
    norm: LinearNorm
    W: Float[Tensor, "d_head d_model"]
    b: Float[Tensor, "d_head"]
    own: LinearNorm
    positions: Int[Tensor, "pos"]

    @classmethod
    def of(
        cls,
        model: Any,
        block: Block,
        via: Literal["q", "k"],
        head: Component,
        stream: Float[Tensor, "pos d_model"],
        made: Float[Tensor, "pos heads d_head"],
        positions: Int[Tensor, "pos"],
    ) -> "HeadInput":
        """A head's reading of a residual stream at some positions: its query, or the key that its group shares.

        `made` are all heads' queries or keys in the run, before they are normed.
        """
        assert head.head is not None
        index, weight, bias = (
            (head.head, block.W_Q, block.b_Q) if via == "q" else (head.head // block.n_groups, block.W_K, block.b_K)
        )
        norm = linear_norm(norms_of_heads(model, head.layer)[0], stream)
        own = _own_norm(getattr(model.blocks[head.layer].attn, f"{via}_norm", None), made, index)
        return cls(block, norm, weight.unflatten(0, bias.shape)[index], bias[index], own, positions)

    def parts(self, terms: Mapping[ScoreTerm, Float[Tensor, "pos d_model"]]) -> Float[Tensor, "term pos d_head"]:
        """What each term of the stream adds to the queries or keys, as they enter the scores.

        The norm's bias and `b` count among the biases. Rotary embeddings, being linear, rotate every part alike.
        """
        rows = []
        for term, x in terms.items():
            row = self.norm.linear(x) @ self.W.T
            if term == "biases":
                row = row + (self.b if self.norm.b is None else self.b + self.W @ self.norm.b)
            row = self.own.linear(row)
            rows.append(row if self.own.b is None or term != "biases" else row + self.own.b)
        return self.block.turned(torch.stack(rows)[:, :, None], self.positions)[:, :, 0]


def _own_norm(norm: nn.Module | None, made: Float[Tensor, "pos heads d_head"], index: int) -> LinearNorm:
    """A norm of queries or keys as it acted on one head's: each head's alone, as in Qwen 3, or all, as in OLMo 2."""
    if norm is None:
        return LinearNorm()
    weight = next(norm.parameters(), None)
    each = weight is None or weight.shape[-1] == made.shape[-1]
    found = linear_norm(norm, made if each else made.flatten(1))
    assert found.scale is not None

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1, made.shape[-1]).expand(made.shape[1:])[index]

    return replace(found, scale=found.scale[:, index] if each else found.scale, w=part(found.w), b=part(found.b))


def offset_keys(block: Block, head: int, query: int, keys: Int[Tensor, "pos"]) -> Float[Tensor, "1 pos d_head"] | None:
    """What relative positions add to a head's keys, as seen from a query: r in q . (k + r); `None` if there are none.

    Keys further away than any learned offset get nothing.
    """
    if block.W_R is None:
        return None
    offsets = query - keys
    n_offsets = block.W_R.shape[1]
    return (block.W_R[head, offsets.clamp(max=n_offsets - 1)] * (offsets < n_offsets)[:, None])[None]


_MOST_CELLS = 2**27
"""Numbers in a result: 1 GiB in float64."""


@analysis
def attribute_scores(
    model: Any,
    prompt: object,
    head: Component | str | tuple[Component, ...] | None = None,
    query: int = -1,
    key: int | Iterable[int] | None = None,
    *,
    circuit: Circuit | None = None,
    prepend_bos: bool | None = None,
) -> ScoreAttribution:
    """Splits a head's attention scores at a query position over (query path, key path): why it looked where it did.

    The residual stream that the head reads is the sum of what the embeddings, all earlier heads and MLPs, and biases
    wrote into it. Given the norm's scale in the run, the head's query and keys are linear in that stream, and a score
    is bilinear in query and key. So if q_a and k_b are what terms a and b add to them, then

        score[t, s] = sum over a, b of  q_a[t] . k_b[s] / scale

    without remainder. K-composition (Elhage et al. 2021) with the previous-token head is one cell of that table: a =
    the embedding, b = the previous-token head. Rotary embeddings rotate each part alike; the heads of a group share
    their keys; what a `RelativeAttention` adds to a key for its offset is one more term of the key. The scales of norms
    of queries and keys, and of norms that follow heads, are the run's too.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        prompt: a single prompt: text, tokens or a `HijackPrompt`.
        head: the head that attends: a `Component`, its place ("L1H0"), or a role that just one head plays; by default
            the circuit's induction head.
        query: the position that attends; negative ones count from the end.
        key: the position or positions attended to, none of them after `query`; by default all that the head is free to
            attend to, which a sliding window limits.
        circuit: the roles of the components, by which terms are named; by default `model.circuit`, if there is one.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for prompts, heads and positions that the model does not have; for more than 2^27
            numbers; and for models whose scores are not such a sum, such as those with capped scores or ALiBi.

    Examples:
        >>> scores = hl.attribute_scores(model, prompt)
        >>> by_key = scores.cell("embed", model.circuit.previous_token)  # K-composition
        >>> [(position, f"{score:.1f}") for position, score in enumerate(by_key) if score > 1]
        [(4, '6.0'), (6, '6.0'), (16, '6.0')]
    """
    circuit = circuit_of(model, circuit)
    chosen = one_head(model, head, circuit)
    _check_sum(model)
    ids = single_prompt(model, prompt)
    at = check_position("query", query, ids.shape[1], ids.shape[1] - 1)
    keys = tuple(range(at + 1)) if key is None else _keys(key, ids.shape[1], at)
    n_cells = len(keys) * (len(senders(model, chosen.layer)) + 2) ** 2
    if n_cells > _MOST_CELLS:
        raise ValueError(
            f"key must be fewer positions: {len(keys)} of them take {n_cells:,} numbers, over {_MOST_CELLS:,}"
        )

    opened = open_model(model)
    block, index = opened.blocks[chosen.layer], chosen.head
    assert index is not None
    _, run = record(model, ids, _names(model, chosen))
    every = _scores(model, block, chosen, run, at)
    if key is None:
        keys = tuple((every > -torch.inf).nonzero()[:, 0].tolist())
    where = torch.tensor([at, *keys], device=ids.device)
    terms = stream_terms(model, opened, chosen.layer, run, where)
    stream = sum(terms.values())
    assert isinstance(stream, Tensor)

    def read(via: Any, rows: slice) -> Tensor:
        made = run[f"{_at(chosen)}.hook_{via}"][0, where[rows]]
        reading = HeadInput.of(model, block, via, chosen, stream[rows], made, where[rows])
        return reading.parts({term: x[rows] for term, x in terms.items()})

    q, k = read("q", slice(0, 1)), read("k", slice(1, None))
    key_terms: tuple[ScoreTerm, ...] = tuple(terms)
    offsets = offset_keys(block, index, at, where[1:])
    if offsets is not None:
        k, key_terms = torch.cat([k, offsets]), (*key_terms, "offset")
    axes = "query_term d_head, key_term key d_head -> key query_term key_term"
    values = (einsum(q[:, 0], k, axes) / block.scale).contiguous()

    scores, attention = every[list(keys)], run[f"{_at(chosen)}.hook_pattern"][0, index, at]
    _check_values(model, chosen, values, scores, keys)
    return ScoreAttribution(
        values=widened(values),
        scores=widened(scores),
        attention=widened(attention[list(keys)]),
        head=chosen,
        query=at,
        keys=keys,
        query_terms=tuple(terms),
        key_terms=key_terms,
        texts=prompt_texts(model, ids[0]),
        sink=0 if 0 in keys and is_deep(model) and float(attention[0]) > SINK else None,
        circuit=circuit,
    )


def _at(head: Component) -> str:
    return f"blocks.{head.layer}.attn"


def _names(model: Any, head: Component) -> list[str]:
    written = dict.fromkeys(_written(model, sender).name for sender in senders(model, head.layer))
    leaves = ["hook_q", "hook_k", "hook_pattern"]
    if _shows_scores(model, head):
        leaves.append("hook_attn_scores")
    return [*written, f"blocks.{head.layer}.hook_resid_pre", *(f"{_at(head)}.{leaf}" for leaf in leaves)]


def _shows_scores(model: Any, head: Component) -> bool:
    """Whether hook_attn_scores shows scores; some bridges show attention patterns there."""
    attn = model.blocks[head.layer].attn
    return isinstance(model, HookedTransformer) or isinstance(attn, PositionEmbeddingsAttentionBridge)


def _scores(model: Any, block: Block, head: Component, run: dict[str, Tensor], query: int) -> Float[Tensor, "key"]:
    """The head's scores in the run, for every key up to the query."""
    assert head.head is not None
    if _shows_scores(model, head):
        scores = run[f"{_at(head)}.hook_attn_scores"][0, head.head, query, : query + 1]
        # Bridges write the least number there is where a head may not look.
        scores = scores.masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)
    else:
        positions = torch.arange(query + 1, device=run[f"{_at(head)}.hook_q"].device)
        q, k = (block.turned(run[f"{_at(head)}.hook_{via}"][:, : query + 1], positions) for via in "qk")
        scores = block.scores(q[:, -1:], k, positions[-1:], positions)[0, head.head, 0]
    if isinstance(model, HookedTransformer):
        return scores
    # Whether the scores are all there is to its attention.
    pattern = run[f"{_at(head)}.hook_pattern"][0, head.head, query]
    ours = block.pattern(scores[None, None])[0, 0]
    error = float((ours - pattern[: query + 1]).abs().max())
    if not error <= tolerance(pattern.dtype, torch.float32):
        raise ValueError(
            f"head {head}: its attention is not the softmax of its query's products with its keys (off by {error:.2g}):"
            " the model, or a hook on it, changes scores in a way that attribution does not cover"
        )
    return scores


def _check_sum(model: Any) -> None:
    """Checks that no setting makes the model's scores more than products of queries and keys."""
    cfg = model.cfg
    if getattr(cfg, "attn_scores_soft_cap", -1.0) not in (None, -1.0, 0.0):
        raise ValueError("model caps its attention scores (cfg.attn_scores_soft_cap), so they are not a sum over paths")
    if cfg.positional_embedding_type == "alibi":
        raise ValueError("model adds to its scores by distance (ALiBi), which attribution does not cover")


def _check_values(
    model: Any,
    head: Component,
    values: Float[Tensor, "key query_term key_term"],
    scores: Float[Tensor, "key"],
    keys: tuple[int, ...],
) -> None:
    """Checks that the sums are the run's scores, so that the terms leave nothing out."""
    masked = [key for key, score in zip(keys, scores.tolist(), strict=True) if score == -torch.inf]
    if masked:
        raise ValueError(f"key must hold no positions that head {head} is kept from attending to, got {masked}")
    error = float((values.sum((1, 2)) - scores).abs().max())
    # Bridges compute norms in float32, whatever the model's dtype.
    allowed = tolerance(values.dtype, *(() if isinstance(model, HookedTransformer) else (torch.float32,)))
    if not error <= allowed * float(values.abs().sum((1, 2)).max()):
        raise ValueError(
            f"head {head}: its scores are not the sum over terms of its query and keys (off by {error:.2g}): the "
            "model, or a hook on it, does something that attribution does not cover"
        )


def _keys(key: Any, length: int, query: int) -> tuple[int, ...]:
    several = isinstance(key, Iterable) and not isinstance(key, str) and as_int(key) is None
    listed = check_list("key", key, "one position or several") if several else [key]
    keys = tuple(check_position("key", one, length, query) for one in listed)
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"key must be one position or several different ones, got {shown(key)}")
    return keys
