"""What each source token of a prompt wrote into a language model's logits, at any depth, and which heads brought it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hijack_lens.attribution.direct import NotAdditiveError, check_complete
from hijack_lens.attribution.frozen import FrozenModel
from hijack_lens.attribution.logit_attribution import Memory, Path
from hijack_lens.attribution.source_attribution import SourceAttribution
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import as_int, check_count, check_position, shown
from hijack_lens.core.circuit import Component, heads_at
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.inputs import Tokens, components_of, is_single, model_tokens, token_ids
from hijack_lens.core.spans import Span, before_last_sentence, is_text, positions_of
from hijack_lens.core.tables import widened
from hijack_lens.core.texts import outputs_are_tokens, texts_of, tokenizer_of
from hijack_lens.language.prompts import HijackPrompt
from hijack_lens.models.transformer import BigramTransformer

_DEFAULT_ANSWERS = 10

_PARTS: tuple[tuple[str, Memory], ...] = (("context", "context"), ("first token", "weights"), ("query", "weights"))


@analysis
def attribute_sources(
    model: Any,
    prompt: object,
    answers: Tokens = None,
    *,
    position: int = -1,
    context: Span = None,
    carriers: Any = 0,
    prepend_bos: bool | None = None,
) -> SourceAttribution:
    """Attributes logits to the source tokens that wrote them, in a model of any depth, exactly.

    With the attention patterns, the norms' scales and the MLPs' gates of the run held as they were, the model is linear
    in its embeddings. So each logit is a sum of what each token's embedding (its position's included) wrote, by all
    routes together, and of biases by the position where they enter. It takes one run and about one more forward pass
    per answer.

    The memories are told apart by where a term entered. *context*: at a position of the context. *weights*: at the
    first token, which most models use as a sink for attention and which carries their default; at the query's own
    tokens; and biases. What this cannot show is what would have happened otherwise: with another context, patterns,
    scales and gates would change as well.

    Every route from the context to the answer's position goes through one head that attends from there to an earlier
    position, and through no other such. So `links`, what each head brought from each position that it attended to, is
    a second exact cut through the model.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: text, tokens or a `HijackPrompt`; or a batch of prompts of one length.
        answers: the outputs whose logits to attribute, by id or text, in this order; by default the prompt's
            candidates, else (for one prompt) the ten with the largest logits.
        position: the position whose next-token logits to attribute; negative ones count from the end.
        context: which part of the prompt is the context: a text or several, wherever they occur before the position; or
            positions. By default all before the last sentence; for a `BigramTransformer`, and where there is no text,
            all but the query's token. A text, and the default, leave out the first token, except in a
            `BigramTransformer`.
        carriers: heads whose share is split by source token as well: how many (those that bring most of the difference
            between the first two answers from positions after the first), or which, as for `hooks.ablate`. Each takes
            up to another pass per answer.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Returns:
        A `SourceAttribution`; with a batch axis if `prompt` has one.

    Raises:
        TypeError, ValueError: for prompts that the model cannot take, a context that is not in the prompt or not before
            the position, and for models that are not linear once patterns, scales and gates are held.

    Examples:
        >>> result = hl.attribute_sources(model, prompt, ["e", "u"])
        >>> print(result.margin("e", "u"))
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> result.by_token().sum(0)
        tensor([ 3.2580, -0.0152])
    """
    ids = model_tokens(model, prompt)
    query = check_position("position", position, ids.shape[1], ids.shape[1] - 1)
    check_linear(model)
    candidates = (prompt.in_context, prompt.global_candidate) if isinstance(prompt, HijackPrompt) else None
    asked = candidates if answers is None else answers
    chosen = None if asked is None else token_ids(model, "answers", asked, output=True).to(ids.device)
    if chosen is None and not is_single(prompt):
        raise ValueError("answers must be given for a batch of prompts, got None")
    number = as_int(carriers)
    named = components_of(model, carriers, name="carriers", kind="head") if number is None else ()
    count = check_count("carriers", 0 if number is None else number)
    parts = torch.stack([parts_of(model, row, query, context) for row in ids])

    rows = ids[:, : query + 1].split(rows_at_once(model, query + 1))
    runs = [FrozenModel.of(model, some) for some in rows]
    if chosen is None:
        chosen = runs[0].logits[0].topk(min(_DEFAULT_ANSWERS, runs[0].logits.shape[-1])).indices
    found = attribution_of_runs(model, ids, runs, chosen, parts, named, count, candidates)
    return found[0] if is_single(prompt) else found


def attribution_of_runs(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    runs: Sequence[FrozenModel],
    answers: Int[Tensor, "answer"],
    parts: Int[Tensor, "batch source"],
    carriers: Sequence[Component] = (),
    n_carriers: int = 0,
    candidates: tuple[int, int] | None = None,
) -> SourceAttribution:
    """The attribution of frozen runs on prompts up to a position, of which each has a `parts_of`."""
    traced = [run.back(answers) for run in runs]
    embed, biases, links = (torch.cat([getattr(one, what) for one in traced]) for what in ("embed", "biases", "links"))
    logits = torch.cat([run.logits[:, answers] for run in runs])
    check_complete((*embed.unbind(1), *biases.unbind(1)), logits)
    named = _largest(links, n_carriers) if n_carriers else carriers
    routes = torch.cat([run.through(one, named) for run, one in zip(runs, traced, strict=True)], 1)

    values = _by_path(embed, biases, routes, parts, named)
    after = (0, 0, 0, ids.shape[1] - embed.shape[1])
    as_tokens = outputs_are_tokens(model)
    return SourceAttribution(
        values=widened(pad(torch.stack(list(values.values()), 1), after)),
        logits=widened(logits),
        tokens=ids,
        links=widened(pad(links, after)),
        parts=pad(parts, (0, after[-1]), value=len(_PARTS)),
        paths=tuple(values),
        position=embed.shape[1] - 1,
        vocab=texts_of(model, torch.cat([ids.flatten(), answers]) if as_tokens else ids),
        joiner=getattr(getattr(model, "language", None), "joiner", ""),
        candidates=candidates,
        answers=tuple(answers.tolist()),
        outputs_are_tokens=as_tokens,
    )


def check_linear(model: Any) -> None:
    """Checks that no part of the model is of a kind that stays nonlinear with patterns, scales and gates held."""
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        raise NotAdditiveError("model attends to later positions (cfg.attention_dir), which attribution does not cover")
    if getattr(model.cfg, "num_experts", None):
        raise NotAdditiveError("model has mixtures of experts (cfg.num_experts), which attribution does not cover")
    if str(model.cfg.act_fn).endswith("_ln"):
        raise NotAdditiveError(f"model has cfg.act_fn={model.cfg.act_fn!r}, a norm inside the MLP, not covered here")


def parts_of(model: Any, ids: Int[Tensor, "pos"], query: int, context: Span) -> Int[Tensor, "source"]:
    """For each position up to the query, which of `_PARTS` it belongs to."""
    sink = not isinstance(model, BigramTransformer)
    if context is not None:
        at = positions_of(model, ids, context, "context")
    elif not sink or tokenizer_of(model) is None:
        at = list(range(query))
    else:
        at = [i for i in before_last_sentence(model, ids[: query + 1]) if i < query]
    if context is None or is_text(context):
        at = [i for i in at if i < query and not (sink and i == 0)]
    if context is not None and not (at and at[-1] < query):
        first = ", and after its first token" if sink and is_text(context) else ""
        raise ValueError(f"context must lie before the position {query} that is asked for{first}, got {shown(context)}")
    return parts_with(at, query, sink)


def parts_with(context: Sequence[int], query: int, sink: bool = True) -> Int[Tensor, "source"]:
    """The same for a context given by its positions; `sink` sets the first token apart, unless it is the context's."""
    found = torch.full((query + 1,), 2)
    if sink:
        found[0] = 1
    found[list(context)] = 0
    return found


def _largest(links: Float[Tensor, "batch layer head pos answer"], count: int) -> tuple[Component, ...]:
    """The heads that bring most of the difference between the first two answers, from positions after the first."""
    wanted = links[..., 0] - links[..., 1] if links.shape[-1] > 1 else links[..., 0]
    size = wanted[..., 1:-1].sum(-1).abs().mean(0)
    best = size.flatten().topk(min(count, size.numel())).indices.tolist()
    return tuple(heads_at(best, size.shape[1]))


def _by_path(
    embed: Float[Tensor, "batch pos answer"],
    biases: Float[Tensor, "batch pos answer"],
    routes: Float[Tensor, "carrier batch pos answer"],
    parts: Int[Tensor, "batch pos"],
    carriers: Sequence[Component],
) -> dict[Path, Float[Tensor, "batch pos answer"]]:
    """What each part of the prompt wrote, by carrier."""
    values: dict[Path, Tensor] = {}
    for index, (label, memory) in enumerate(_PARTS):
        inside = (parts == index)[..., None]
        if not bool(inside.any()):
            continue
        for head, wrote in zip(carriers, routes, strict=True):
            values[Path("embed", (head,), f"{label} → {head}", memory)] = wrote * inside
        rest = embed - routes.sum(0)
        others = " → otherwise" if len(carriers) else ""
        values[Path("embed", (), f"{label}{others}", memory)] = rest * inside
    if bool(biases.any()):
        values[Path("biases", (), "biases", "weights")] = biases
    return values
