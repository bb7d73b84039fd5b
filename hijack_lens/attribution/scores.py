"""A head's attention scores as an exact sum over (query path, key path).

Once the norm's scale is that of a run, queries and keys are linear in the residual stream, which is itself the sum of
what every component before wrote into it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). A
score is then a sum over pairs of terms, one of the query and one of the key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from hijack_lens.attribution.score_attribution import ScoreAttribution, ScoreTerm
from hijack_lens.core.checks import as_int, check_position, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import all_components, check_model
from hijack_lens.core.inputs import circuit_of, one_head, prompt_texts, single_prompt
from hijack_lens.hooks.edges import Sender, embeddings, sender_site
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
    """What the residual stream that enters a block is the sum of, at some positions of a run of one prompt.

    Heads write without their block's bias b_O, which is among the biases; MLPs with theirs.
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
    """How one head makes its queries, or its keys, at some positions of a run: normed stream times W, plus b."""

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
        """A head's reading of a residual stream at some positions: its query, or the key that its group shares."""
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


_MOST_CELLS = 2**27
"""Numbers in a result: 1 GiB in float64."""


@torch.no_grad()
def attribute_scores(
    model: Any,
    prompt: object,
    head: Component | str | tuple[Component, ...] | None = None,
    query: int = -1,
    key: int | Iterable[int] | None = None,
    *,
    circuit: Circuit | None = None,
) -> ScoreAttribution:
    """Splits a head's attention scores at a query position over (query path, key path): why it looked where it looked.

    The residual stream that the head reads is the sum of what the embeddings, every head and MLP before, and biases
    wrote into it. Given the norm's scale of the run, the head's query and keys are linear in that stream, and a score
    is bilinear in query and key. So with q_a and k_b for what terms a and b add to them,

        score[t, s] = sum over a, b of  q_a[t] . k_b[s] / scale

    without remainder. K-composition (Elhage et al. 2021) with the previous-token head is one cell of that table: a =
    the embedding, b = the previous-token head. Rotary positions turn each part alike; keys of a group are shared; what
    a `RelativeAttention` adds to a key for its offset is one more term of the key.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        prompt: a single one: text, tokens or a `HijackPrompt`.
        head: whose scores: a `Component`, its place ("L1H0"), or a role that just one head plays; by default the
            circuit's induction head.
        query: position that attends; negative ones count from the end.
        key: position or positions attended to, none of them after `query`; by default all of these.
        circuit: the roles of the components, by which terms are named; by default `model.circuit`, if there is one.

    Raises:
        TypeError, ValueError: for prompts, heads and positions that the model does not have; for more numbers than
            2^27; and for models whose scores are no such sum, among them those with capped scores or ALiBi.
    """
    check_model(model)
    circuit = circuit_of(model, circuit)
    chosen = one_head(model, head, circuit)
    _check_sum(model)
    ids = single_prompt(model, prompt)
    at = check_position("query", query, ids.shape[1], ids.shape[1] - 1)
    keys = _keys(key, ids.shape[1], at)
    n_cells = len(keys) * (len(senders(model, chosen.layer)) + 2) ** 2
    if n_cells > _MOST_CELLS:
        raise ValueError(
            f"key must be fewer positions: {len(keys)} of them take {n_cells:,} numbers, over {_MOST_CELLS:,}"
        )

    opened = open_model(model)
    block, index = opened.blocks[chosen.layer], chosen.head
    assert index is not None
    _, run = record(model, ids, _names(model, chosen))
    where = torch.tensor([at, *keys], device=ids.device)
    terms = stream_terms(model, opened, chosen.layer, run, where)
    stream, norm = sum(terms.values()), getattr(model.blocks[chosen.layer], "ln1", None)
    assert isinstance(stream, Tensor)

    def read(via: Any, rows: slice) -> Tensor:
        reading = HeadInput.of(block, norm, via, index, stream[rows], where[rows])
        return reading.parts({term: x[rows] for term, x in terms.items()})

    q, k = read("q", slice(0, 1)), read("k", slice(1, None))
    key_terms: tuple[ScoreTerm, ...] = tuple(terms)
    offsets = offset_keys(block, index, at, where[1:])
    if offsets is not None:
        k, key_terms = torch.cat([k, offsets]), (*key_terms, "offset")
    axes = "query_term d_head, key_term key d_head -> key query_term key_term"
    values = (einsum(q[:, 0], k, axes) / block.scale).contiguous()

    scores = _scores(model, block, chosen, run, at)[list(keys)]
    _check_values(model, chosen, values, scores, keys)
    return ScoreAttribution(
        values=values,
        scores=scores,
        attention=run[f"{_at(chosen)}.hook_pattern"][0, index, at, list(keys)],
        head=chosen,
        query=at,
        keys=keys,
        query_terms=tuple(terms),
        key_terms=key_terms,
        texts=prompt_texts(model, ids[0]),
        circuit=circuit,
    )


def _at(head: Component) -> str:
    return f"blocks.{head.layer}.attn"


def _names(model: Any, head: Component) -> list[str]:
    written = dict.fromkeys(sender_site(model, sender).name for sender in senders(model, head.layer))
    leaves = ["hook_q", "hook_k", "hook_pattern"]
    if isinstance(model, HookedTransformer):
        leaves.append("hook_attn_scores")
    return [*written, f"blocks.{head.layer}.hook_resid_pre", *(f"{_at(head)}.{leaf}" for leaf in leaves)]


def _scores(model: Any, block: Block, head: Component, run: dict[str, Tensor], query: int) -> Float[Tensor, "key"]:
    """The head's scores in the run, for every key up to the query."""
    assert head.head is not None
    if isinstance(model, HookedTransformer):
        return run[f"{_at(head)}.hook_attn_scores"][0, head.head, query, : query + 1]
    # Some bridges show attention patterns at hook_attn_scores. Their queries and keys give the scores, and the pattern
    # shows whether these are all there is to it.
    positions = torch.arange(query + 1, device=run[f"{_at(head)}.hook_q"].device)
    q, k = (block.turned(run[f"{_at(head)}.hook_{via}"][:, : query + 1], positions) for via in "qk")
    scores = block.scores(q[:, -1:], k, positions[-1:], positions)
    pattern = run[f"{_at(head)}.hook_pattern"][0, head.head, query]
    ours = block.pattern(scores)[0, head.head, 0]
    error = float((ours - pattern[: query + 1]).abs().max())
    if not error <= tolerance(pattern.dtype, torch.float32):
        raise ValueError(
            f"head {head}: its attention is not the softmax of its query's products with its keys (off by {error:.2g}):"
            " the model, or a hook on it, changes scores in a way that is not taken apart here"
        )
    return scores[0, head.head, 0]


def _check_sum(model: Any) -> None:
    """Nothing that the model is known for makes its scores more than products of queries and keys."""
    cfg = model.cfg
    if getattr(cfg, "attn_scores_soft_cap", -1.0) not in (None, -1.0, 0.0):
        raise ValueError(
            "model caps its attention scores (cfg.attn_scores_soft_cap), so that they are no sum over paths"
        )
    if cfg.positional_embedding_type == "alibi":
        raise ValueError("model adds to its scores by distance (ALiBi), which attribution does not cover")
    if getattr(cfg, "use_qk_norm", False):
        raise ValueError("model norms its queries and keys (cfg.use_qk_norm), which attribution does not cover")


def _check_values(
    model: Any,
    head: Component,
    values: Float[Tensor, "key query_term key_term"],
    scores: Float[Tensor, "key"],
    keys: tuple[int, ...],
) -> None:
    """The sums are the run's scores: there is nothing in the model that the terms do not hold."""
    masked = [key for key, score in zip(keys, scores.tolist(), strict=True) if score == -torch.inf]
    if masked:
        raise ValueError(f"key must hold no positions that head {head} is kept from attending to, got {masked}")
    error = float((values.sum((1, 2)) - scores).abs().max())
    # Bridges compute norms in float32, whatever the model's dtype.
    allowed = tolerance(values.dtype, *(() if isinstance(model, HookedTransformer) else (torch.float32,)))
    if not error <= allowed * float(values.abs().sum((1, 2)).max()):
        raise ValueError(
            f"head {head}: its scores are not the sum over terms of its query and keys (off by {error:.2g}): the "
            "model, or a hook on it, does something that is not taken apart here"
        )


def _keys(key: Any, length: int, query: int) -> tuple[int, ...]:
    if key is None:
        return tuple(range(query + 1))
    several = isinstance(key, Iterable) and not isinstance(key, str) and as_int(key) is None
    listed = list(key) if several else [key]
    keys = tuple(check_position("key", one, length, query) for one in listed)
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"key must be one position or several different ones, got {shown(key)}")
    return keys
