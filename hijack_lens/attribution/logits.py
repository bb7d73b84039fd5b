"""Every logit as an exact sum over paths through the model."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.direct import check_additive, check_complete, check_heads_add, direct_paths
from hijack_lens.attribution.logit_attribution import LogitAttribution, Path, Source
from hijack_lens.attribution.terms import FirstBlock, FrozenBlock, LastBlock, Local, SummedBlock, Unembedding
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import as_int, check_list, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import all_components
from hijack_lens.core.inputs import Tokens, circuit_of, is_single, model_tokens, token_ids
from hijack_lens.core.tables import widened
from hijack_lens.core.texts import outputs_are_tokens, texts_of, whole_vocab
from hijack_lens.hooks.edges import changes_attn_out, embeddings
from hijack_lens.hooks.intervention import record
from hijack_lens.language.prompts import HijackPrompt
from hijack_lens.models.linear_maps import linear_norm

StreamTerm = tuple[Source, tuple[Component, ...], Any]

_MOST_CELLS = 2**29
"""Numbers in the result for a deep model: 2 GiB in float32."""


@analysis
def attribute(
    model: Any,
    prompt: object,
    position: int | Literal["all"] = -1,
    *,
    circuit: Circuit | None = None,
    answers: Tokens | Sequence[Tokens] | Int[Tensor, "prompt answer"] = None,
    prepend_bos: bool | None = None,
) -> LogitAttribution:
    """Attributes the logits at a position to the paths that wrote them, by source position.

    Given the attention patterns, norm scales and MLP gates of the run, the logits are an exact sum over paths.
    A path leads from an embedding (or a bias) through heads and MLPs to the unembedding; its source is the
    position whose embedding it carries (for a bias, where it enters). Paths through components that write
    nothing are left out.

    Models of more than two layers have too many of these paths, and some models have heads or MLPs of a kind that
    paths are not followed through. In all such models ("deep" below), the logits are the sum of what each head and MLP
    wrote directly into them; a head's source is the position that it attended to. What the circuit's induction heads
    and bigram memories wrote is split by what they read: the embeddings, the circuit's earlier heads (by the position
    that those attended to) and all else ("stream", biases included).

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: text, tokens or a `HijackPrompt`; or a batch of prompts.
        position: the position whose next-token logits to attribute; negative ones count from the end. "all" gives every
            position, summed over sources; not for deep models.
        circuit: the roles of the components, by which paths are named and grouped; by default `model.circuit`. Without
            one, components are named by their places, and nothing counts as the context's.
        answers: the outputs whose logits to attribute, one or several, by id or text (read as by `logit_diff`), in this
            order; by default all of them, or for deep models the prompt's candidates, else (for one prompt) the ten
            with the largest logits. For a batch, they may be one list per prompt, all equally long.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Returns:
        A `LogitAttribution`; with a batch axis if `prompt` has one.

    Raises:
        TypeError, ValueError: for prompts the model cannot take, for more than 2^29 numbers from a deep model, and for
            models whose logits are not a sum over paths, or whose hooks keep them from being one.

    Examples:
        >>> result = hl.attribute(model, prompt)
        >>> print(result.margin("e", "u"))
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> result.completeness_error < 1e-4
        True
    """
    circuit = circuit_of(model, circuit)
    ids = model_tokens(model, prompt)
    length = ids.shape[-1]
    number = None if isinstance(position, str) else as_int(position)
    if not (isinstance(position, str) and position == "all") and (number is None or not -length <= number < length):
        raise ValueError(f"position must be 'all' or an int from {-length} to {length - 1}, got {shown(position)}")
    where: int | Literal["all"] = "all" if number is None else number % length
    candidates = (prompt.in_context, prompt.global_candidate) if isinstance(prompt, HijackPrompt) else None

    too_deep = beyond_whole_paths(model)
    asked = candidates if answers is None and too_deep is not None else answers
    own = _own_answers(model, asked, len(ids))
    chosen = None if asked is None else token_ids(model, "answers", asked, output=True) if own is None else own.unique()
    chosen = None if chosen is None else chosen.to(ids.device)
    if too_deep is None:
        values, logits = _whole_paths(model, ids, where, circuit, chosen)
    else:
        check_additive(model)
        check_heads_add(model)
        if where == "all":
            raise ValueError(f"position must be an int for this model, got 'all': {too_deep}")
        if chosen is None and not is_single(prompt):
            raise ValueError(f"answers must be given for a batch of prompts to this model: {too_deep}")
        n_cells = ids.numel() * (0 if chosen is None else len(chosen)) * len(all_components(model))
        if n_cells > _MOST_CELLS:
            raise ValueError(
                f"answers must be fewer: their parts are {n_cells:,} numbers or more, over {_MOST_CELLS:,}"
            )
        values, logits, chosen = direct_paths(model, ids, where, circuit, chosen)

    check_complete((value if where == "all" else value.sum(1) for value in values.values()), logits)
    as_tokens = outputs_are_tokens(model)
    vocab: tuple[str, ...] | dict[int, str] | None
    if chosen is None or getattr(model, "language", None) is not None:
        vocab = whole_vocab(model)
    else:
        vocab = texts_of(model, torch.cat([ids.flatten(), chosen]) if as_tokens else ids)
    kept = {path: value for path, value in values.items() if path.source != "biases" or bool(value.any())}
    stacked = torch.stack(list(kept.values()), 1)
    named: Any = None if chosen is None else tuple(chosen.tolist())
    if own is not None:
        assert chosen is not None
        named = tuple(map(tuple, own.tolist()))
        at = torch.searchsorted(chosen, own.to(chosen.device))
        stacked, logits = (x.gather(-1, _spread(at, x)) for x in (stacked, logits))
    if is_single(prompt):
        stacked, logits, ids, named = stacked[0], logits[0], ids[0], named if own is None else named[0]
    return LogitAttribution(
        values=widened(stacked),
        logits=widened(logits),
        tokens=ids,
        paths=tuple(kept),
        position=where,
        vocab=vocab,
        joiner=getattr(getattr(model, "language", None), "joiner", ""),
        candidates=candidates,
        answers=named,
        outputs_are_tokens=as_tokens,
    )


def _own_answers(model: Any, answers: Any, n_prompts: int) -> Int[Tensor, "prompt answer"] | None:
    """The ids of each prompt's own answers, where there is a list per prompt."""
    if (
        isinstance(answers, str)
        or as_int(answers) is not None
        or not isinstance(answers, Sequence | Tensor | np.ndarray)
    ):
        return None
    rows = check_list("answers", answers, "tokens, each a text or an id, or a list of them for each prompt")
    if not any(isinstance(row, Iterable) and not isinstance(row, str) and getattr(row, "ndim", 1) for row in rows):
        return None
    if len(rows) != n_prompts:
        raise ValueError(f"answers must be one list, or one for each of {n_prompts} prompts, got {len(rows)} lists")
    ids = [token_ids(model, f"answers[{index}]", row, output=True) for index, row in enumerate(rows)]
    if len({len(row) for row in ids}) > 1:
        raise ValueError(f"answers must be equally many for every prompt, got {[len(row) for row in ids]!s:.80}")
    return torch.stack(ids)


def _spread(
    index: Int[Tensor, "batch answer"], x: Float[Tensor, "batch ... answers"]
) -> Int[Tensor, "batch ... answer"]:
    """An index per prompt, to gather the last axis of `x` by."""
    middle = x.shape[1:-1]
    return index.view(len(index), *[1] * len(middle), -1).expand(-1, *middle, -1)


def _whole_paths(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    position: int | Literal["all"],
    circuit: Circuit,
    answers: Int[Tensor, "answer"] | None,
) -> tuple[dict[Path, Tensor], Float[Tensor, "batch ... answer"]]:
    """All paths of a model of at most two blocks, from the embeddings on, and the logits that they sum to."""
    all_logits, run = record(model, ids, _names(model))
    blocks = [FrozenBlock.of(block, run, layer) for layer, block in enumerate(model.blocks)]
    final = linear_norm(getattr(model, "ln_final", None), run[f"blocks.{len(blocks) - 1}.hook_resid_post"])
    W_U, b_U = model.W_U, model.b_U
    if answers is not None:
        W_U, b_U, all_logits = W_U[:, answers], b_U[answers], all_logits[..., answers]
    constant = b_U if final.b is None else b_U + final.b @ W_U
    sources: list[tuple[Source, Tensor]] = [("embed", run["hook_embed"])]
    if "hook_pos_embed" in run and bool(run["hook_pos_embed"].any()):
        sources.append(("pos_embed", run["hook_pos_embed"]))

    values: dict[Path, Tensor] = {}
    if position == "all":
        for source, through, x in _follow(sources, [SummedBlock(block) for block in blocks], Tensor.clone):
            _add(values, Path.of(source, through, circuit), final.linear(x) @ W_U)
        _add(values, Path.of("biases", (), circuit), constant.expand(*ids.shape, -1).clone())
        return values, all_logits
    length = ids.shape[-1]
    last = LastBlock(blocks[-1], position)
    unembedding = Unembedding.of(final, W_U, last)
    for source, through, term in _follow(sources, [*map(FirstBlock, blocks[:-1]), last], Local):
        _add(values, Path.of(source, through, circuit), unembedding.logits(term, length))
    at_query = torch.zeros(*ids.shape, len(constant)).to(W_U)
    at_query[:, position] = constant
    _add(values, Path.of("biases", (), circuit), at_query)
    return values, all_logits[:, position]


def _follow(sources: list[tuple[Source, Tensor]], views: list[Any], enter: Any) -> list[StreamTerm]:
    """All terms of the final residual stream: each block passes on its input directly, via heads and via the MLP."""
    terms: list[StreamTerm] = [(source, (), enter(x)) for source, x in sources]
    for layer, view in enumerate(views):
        block: FrozenBlock = view.block
        through_heads: list[StreamTerm] = [
            (source, _via(source, through, Component(layer, "head", head)), view.head(term, head))
            for head in block.heads
            for source, through, term in terms
        ]
        bias: StreamTerm = ("biases", (), view.bias(block.bias()))
        terms = [(source, through, view.keep(term)) for source, through, term in terms] + through_heads + [bias]
        if block.mlp is not None:
            mlp = Component(layer, "mlp")
            terms += [
                (source, _via(source, through, mlp), view.mlp(term, block.mlp)) for source, through, term in terms
            ]
            terms.append(("biases", (), view.mlp_bias(block.mlp)))
    return terms


def _via(source: Source, through: tuple[Component, ...], component: Component) -> tuple[Component, ...]:
    # All biases are one path, whatever route they take.
    return () if source == "biases" else (*through, component)


def _add(values: dict[Path, Tensor], path: Path, value: Tensor) -> None:
    values[path] = values[path] + value if path in values else value


def _names(model: Any) -> list[str]:
    names = ["hook_embed"]
    if "pos_embed" in embeddings(model):
        names.append("hook_pos_embed")
    for layer, block in enumerate(model.blocks):
        names += [f"blocks.{layer}.{name}" for name in ("hook_resid_pre", "hook_resid_post", "attn.hook_pattern")]
        if hasattr(block, "mlp"):
            names += [f"blocks.{layer}.{name}" for name in ("hook_resid_mid", "mlp.hook_pre", "mlp.hook_post")]
    return names


def beyond_whole_paths(model: Any) -> str | None:
    """Why a model's paths are not all followed, or `None`: it is deep, or not linear in the ways that `terms` knows."""
    cfg = model.cfg
    if cfg.n_layers > 2:
        return f"model has {cfg.n_layers} layers; paths are followed through at most 2"
    for flag in ("parallel_attn_mlp", "gated_mlp", "use_normalization_before_and_after", "post_embedding_ln"):
        if getattr(cfg, flag, False):
            return f"model has cfg.{flag}=True, and paths are not followed through that"
    if any(changes_attn_out(model, layer) for layer in range(cfg.n_layers)):
        return "model norms or scales what its heads write, and paths are not followed through that"
    if getattr(cfg, "n_key_value_heads", None) not in (None, cfg.n_heads):
        return "model has grouped-query attention (cfg.n_key_value_heads), and paths are not followed through that"
    if getattr(cfg, "output_logits_soft_cap", -1.0) not in (None, -1.0, 0.0):
        return "model caps its logits (cfg.output_logits_soft_cap), so they are not a sum over paths"
    if getattr(cfg, "num_experts", None):
        return "model has mixtures of experts (cfg.num_experts), and paths are not followed through these"
    if str(cfg.act_fn).endswith("_ln"):
        return f"model has cfg.act_fn={cfg.act_fn!r}, a norm inside the MLP, and paths are not followed through that"
    return None
