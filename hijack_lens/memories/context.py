"""A context read as a memory: a table of logits, the terms that it is the sum of, and views of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.direct import check_additive, check_unembedded
from hijack_lens.attribution.scores import offset_keys, tolerance
from hijack_lens.core.analysis import analysis, without_autocast
from hijack_lens.core.checks import check_fields, check_shapes
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.files import Saved
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.inputs import Tokens, circuit_of, one_head
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import Drawn, tidy, widened
from hijack_lens.hooks.edges import changes_attn_out
from hijack_lens.hooks.intervention import Intervention, logits_of
from hijack_lens.memories.token_tables import TokenTables, replaced, token_tables
from hijack_lens.models.linear_maps import Readout, linear_norm
from hijack_lens.models.opened import UnknownArchitectureError, open_model
from hijack_lens.models.readable import check_readable


@dataclass(frozen=True, repr=False)
class ContextMemory(TokenTables, Saved, Drawn):
    """What an attention head makes of a context, for every token that may query it.

    Attributes:
        attention: what each query token gives to each position of the prompt, the last of which is its own.
        value_logits: what each position of the context writes if it gets all the attention, in logits, before the final
            norm divides them by its scale.
        own_logits: the same for the query token itself, which is not part of the context.
        scale: the final norm's scale where each query token stands last; 1 without a norm.
        fast_weights: the sum over the context's positions s of (value_s W_O) key_s^T, with keys rotated by their
            positions and divided by the scores' scale. With scores in place of their softmax, the head would write
            `fast_weights @ query_vector` from the context into the residual stream. `None` where scores are not just
            products of queries and keys: capped, with a term for the distance (ALiBi), or computed in an unknown way.
        query_vectors: the query tokens' queries, rotated by the position; `None` where `fast_weights` is.
        head: the head whose memory this is.
        circuit: the roles by which components are named.

    Examples:
        >>> memory = hl.context_memory(model, prompt, query_tokens=["q", "u"], answers=["e", "i"])
        >>> memory.query_texts, memory.answer_texts, memory.position
        (('q', 'u'), ('e', 'i'), 23)
        >>> memory.values
        tensor([[9.8619, 0.0000],
                [4.9397, 0.0000]])
        >>> memory.occurs, len(memory.source_texts)
        (tensor([True, True]), 24)
    """

    attention: Float[Tensor, "query source"]
    value_logits: Float[Tensor, "context answer"]
    own_logits: Float[Tensor, "query answer"]
    scale: Float[Tensor, "query"]
    fast_weights: Float[Tensor, "d_model d_head"] | None
    query_vectors: Float[Tensor, "query d_head"] | None
    head: Component
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_fields(self)
        n_sources, n_queries, n_answers = len(self.tokens), len(self.query_tokens), len(self.answers)
        expected = {
            "attention": (n_queries, n_sources),
            "value_logits": (n_sources - 1, n_answers),
            "own_logits": (n_queries, n_answers),
            "scale": (n_queries,),
        }
        check_shapes(self, expected)

    @cached_property
    def values(self) -> Float[Tensor, "query answer"]:
        """The memory: what the head writes for each answer if the query is the last token, in logits."""
        context, own = self.attention[:, :-1], self.attention[:, -1:]
        with without_autocast():
            return (context @ self.value_logits + own * self.own_logits) / self.scale[:, None]

    def by_source(self, query_token: int | str) -> Float[Tensor, "source answer"]:
        """One row of `values`, split by the position that it comes from.

        Args:
            query_token: the row's token, by id or text.
        """
        row = self.row(query_token)
        written = torch.cat([self.value_logits, self.own_logits[row : row + 1]])
        return self.attention[row, :, None] * written / self.scale[row]

    def to_pandas(self) -> pd.DataFrame:
        """A row per query and answer: their texts, whether the query `occurs` in the context, and the `logit`."""
        frame = tidy({"query": self.query_texts, "answer": self.answer_texts}, logit=self.values)
        frame.insert(1, "occurs", self.occurs.repeat_interleave(len(self.answers)).numpy())
        return frame


_CHECKED = 1000
"""How many logits of each row are compared with the run's."""


@analysis
def context_memory(
    model: Any,
    prompt: object,
    head: Component | str | tuple[Component, ...] | None = None,
    position: int = -1,
    *,
    query_tokens: Tokens = None,
    answers: Tokens = None,
    circuit: Circuit | None = None,
    prepend_bos: bool | None = None,
) -> ContextMemory:
    """The associative memory that a head makes of a context, as a table from query token to logits.

    At one position t, the keys and values of all positions before it are given, and attention is a function of the
    query alone: a memory that the context has written and the query reads (the dual view of attention: Irie, Csordás &
    Schmidhuber 2022, arXiv 2202.05798). In token coordinates it is a table. Row q is what the head would write straight
    into the logits, if the position's token were q:

        M[q, v] = (sum over s < t of attention[q, s] value_logits[s, v] + attention[q, t] own_logits[q, v]) / scale[q]

    The position's own key and value, and the final norm's scale, are those of the run with q. Each row is read off such
    a run (many in one forward pass), so it holds for any depth and kind of attention. With linear attention instead of
    the softmax, what the head makes of the context is one matrix times the query, `fast_weights` (Schlag, Irie &
    Schmidhuber 2021, arXiv 2102.11174).

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        prompt: a single prompt: text, tokens or a `HijackPrompt`. What comes after the position does not matter.
        head: the head to read: a `Component`, its place ("L1H0"), or a role that just one head plays; by default the
            circuit's induction head.
        position: where it is read; negative ones count from the end.
        query_tokens: tokens to put there, by id or text; by default the whole vocabulary, or, where that is too large
            for a table, the prompt's own tokens.
        answers: outputs whose logits to give; by default all.
        circuit: the roles of the components; by default `model.circuit`, if there is one.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for prompts, heads, positions and tokens that the model does not have; for tables of more
            than 2^27 numbers, as with a large vocabulary; and for models whose logits are not sums of what heads write.

    Examples:
        >>> memory = hl.context_memory(model, prompt)
        >>> language.tokens[memory.values[memory.row("q")].argmax()]
        'e'
    """
    tables = token_tables(model, prompt, position, query_tokens, answers)
    circuit = circuit_of(model, circuit)
    chosen = one_head(model, head, circuit)
    check_additive(model)
    if changes_attn_out(model, chosen.layer):
        raise ValueError(f"head {chosen}: this model norms or scales what its heads write, all together")

    some = torch.tensor(tables.answers[:_CHECKED], device=tables.tokens.device)
    run = run_with(model, chosen, replaced(tables.tokens, tables.query_tokens), some)
    check_unembedded(model, run["stream"][:, 0], run["logits"], some)
    at = tables.position
    attention, z, v = run["attention"], run["z"], run["v"]
    mixed = attention[:, :at] @ v[:at] + attention[:, at:] * run["own_v"]
    if not bool((mixed - z).abs().max() <= tolerance(z.dtype) * z.abs().max().clamp_min(torch.finfo(z.dtype).tiny)):
        raise ValueError(
            f"head {chosen} does not write its values mixed by its attention: a hook on the model changes its output"
        )
    check_readable(model, chosen.layer, "attn.W_O")
    W_O = model.blocks[chosen.layer].attn.W_O[chosen.head]
    final = linear_norm(getattr(model, "ln_final", None), run["stream"])
    plain = Readout(model.W_U[:, list(tables.answers)], torch.ones_like(attention[:, :1]), slice(at, at + 1))
    readout = plain.before(final)
    to_logits = W_O @ readout.directions

    query_vectors, keys, _ = products_of(model, chosen, run) or (None, None, None)
    return ContextMemory(
        **vars(tables),
        attention=widened(attention),
        value_logits=widened(v[:at] @ to_logits),
        own_logits=widened(run["own_v"] @ to_logits),
        scale=widened(1 / readout.weight[:, 0]),
        fast_weights=None if keys is None else widened((v[:at] @ W_O).T @ keys),
        query_vectors=None if query_vectors is None else widened(query_vectors),
        head=chosen,
        circuit=circuit,
    )


def run_with(
    model: Any, head: Component, prompts: Int[Tensor, "query source"], answers: Int[Tensor, "answer"]
) -> dict[str, Tensor]:
    """What the head has at the last position of each prompt, and the keys and values that all of them share.

    Returns:
        "attention" [query, source], "q", "z", "own_k" and "own_v" [query, d_head], the "stream" that is unembedded
        [query, 1, d_model], and "logits" of some answers; "k" and "v" [source, d_head], shared but for the last rows.
    """
    attn, h = f"blocks.{head.layer}.attn", head.head
    assert h is not None

    def shared(x: Tensor) -> Tensor:  # heads may share keys and values in groups
        return x[:, :, h * x.shape[2] // model.cfg.n_heads]

    wanted: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "attention": (f"{attn}.hook_pattern", lambda x: x[:, h, -1]),
        "q": (f"{attn}.hook_q", lambda x: x[:, -1, h]),
        "z": (f"{attn}.hook_z", lambda x: x[:, -1, h]),
        "own_k": (f"{attn}.hook_k", lambda x: shared(x)[:, -1]),
        "own_v": (f"{attn}.hook_v", lambda x: shared(x)[:, -1]),
        "stream": (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", lambda x: x[:, -1:]),
    }
    once = {"k": (f"{attn}.hook_k", lambda x: shared(x)[0]), "v": (f"{attn}.hook_v", lambda x: shared(x)[0])}
    kept: dict[str, list[Tensor]] = {}

    def keep(activation: Tensor, hook: Any, key: str, read: Callable[[Tensor], Tensor]) -> None:
        kept.setdefault(key, []).append(read(activation).detach().clone())

    with progress(len(prompts), "prompt", "context_memory") as advance:
        for rows in prompts.split(rows_at_once(model, prompts.shape[1])):
            look = [(name, partial(keep, key=key, read=read)) for key, (name, read) in (wanted | once).items()]
            with Intervention(model, look=look):
                logits = logits_of(model, rows)
            kept.setdefault("logits", []).append(logits[:, -1, answers])
            once = {}
            advance(len(rows))
    return {key: torch.cat(parts) for key, parts in kept.items()}


def products_of(
    model: Any, head: Component, run: dict[str, Tensor]
) -> tuple[Float[Tensor, "query d_head"], Float[Tensor, "context d_head"], Float[Tensor, "query d_head"]] | None:
    """Query vectors, the context's keys and the queries' own over the scores' scale, if their products are the scores.

    `None` where they are not: scores are capped or depend on distance (ALiBi), or attention is of an unknown kind.
    """
    try:
        block = open_model(model).blocks[head.layer]
    except UnknownArchitectureError:
        return None
    assert head.head is not None
    positions = torch.arange(len(run["k"]), device=run["k"].device)
    at = len(positions) - 1
    q, own = (block.turned(run[name][:, None], positions[-1:].expand(len(run[name])))[:, 0] for name in ("q", "own_k"))
    k = block.turned(run["k"][:, None], positions)[:, 0]
    offsets = offset_keys(block, head.head, at, positions)
    if offsets is not None:
        k, own = k + offsets[0], own + offsets[0, at]
    k, own = k[:at] / block.scale, own / block.scale
    scores = torch.cat([q @ k.T, (q * own).sum(1, keepdim=True)], 1)
    # Rotary angles and the softmax may be computed in float32, whatever the model's dtype.
    off = (scores.softmax(-1) - run["attention"]).abs().max()
    return (q, k, own) if bool(off <= tolerance(q.dtype, torch.float32)) else None
