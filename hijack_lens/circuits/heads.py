"""How much each head attends as previous-token and induction heads do, and what ablating it costs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.tables import widened
from hijack_lens.hooks.ablate_and_patch import patch
from hijack_lens.hooks.incremental_runs import taken_apart
from hijack_lens.hooks.intervention import Intervention, logits_of, record

_MEMORY = 2**28
"""Bytes for the runs that are computed at once."""

_TRIES = 8
"""Orders drawn per twin; the one that keeps the fewest pairs is used."""


@dataclass(frozen=True)
class Repeats:
    """Prompts whose second half is predictable from the first, and twins in which it is not.

    A prompt is one first token, then `period` distinct tokens, then the same tokens again from another starting point.
    So the distance back to a query's successor differs between prompts, and a head that looks back a fixed distance
    finds it only by chance. A twin has the first half's tokens in another order, and is otherwise the same. The axis
    `pair` numbers the first half's pairs (token, successor):

    Attributes:
        tokens: the prompts.
        twins: the same prompts with the first half in another order.
        query: position of the pair's first token in the second half.
        target: position of its second token in the first half.
        answer: its second token, which the context predicts at the query.
        scored: whether the pair counts: whether its first token is a trigger.
    """

    tokens: Int[Tensor, "prompt pos"]
    twins: Int[Tensor, "prompt pos"]
    query: Int[Tensor, "prompt pair"]
    target: Int[Tensor, "prompt pair"]
    answer: Int[Tensor, "prompt pair"]
    scored: Bool[Tensor, "prompt pair"]

    @property
    def period(self) -> int:
        """How many tokens are repeated."""
        return self.query.shape[1] + 1

    def __getitem__(self, rows: slice) -> "Repeats":
        return Repeats(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str | None) -> "Repeats":
        """The prompts on another device."""
        return Repeats(*(getattr(self, field.name).to(device) for field in fields(self)))

    def mean(self, values: Float[Tensor, "... prompt pair"]) -> Float[Tensor, "... prompt"]:
        """The mean over a prompt's scored pairs."""
        counts = self.scored.to(values)
        return (values * counts).sum(-1) / counts.sum(-1)


def draw_repeats(
    vocabulary: Int[Tensor, "token"],
    triggers: Int[Tensor, "trigger"] | None,
    first: int | None,
    n_prompts: int,
    period: int,
    generator: torch.Generator,
) -> Repeats:
    """Prompts of `period` distinct tokens, and their twins; `triggers` are in each, and their pairs alone count."""
    said = _distinct(vocabulary, triggers, n_prompts, period + 1, generator)
    opening, said = said[:, :1], said[:, 1:]
    if first is not None:
        opening = torch.full_like(opening, first)
    start = torch.randint(period, (n_prompts, 1), generator=generator)
    again = said.gather(1, (torch.arange(period) + start) % period)
    orders = torch.rand(_TRIES, n_prompts, period, generator=generator).argsort(-1)
    kept = (orders.diff(dim=-1) == 1).sum(-1)
    order = orders[kept.argmin(0), torch.arange(n_prompts)]
    pair = torch.arange(period - 1).expand(n_prompts, -1)
    scored = torch.ones_like(pair, dtype=torch.bool) if triggers is None else torch.isin(said[:, :-1], triggers)
    return Repeats(
        tokens=torch.cat([opening, said, again], 1),
        twins=torch.cat([opening, said.gather(1, order), again], 1),
        query=1 + period + (pair - start) % period,
        target=2 + pair,
        answer=said[:, 1:],
        scored=scored,
    )


def _distinct(
    vocabulary: Tensor, triggers: Tensor | None, n_prompts: int, count: int, generator: torch.Generator
) -> Int[Tensor, "prompt count"]:
    """Distinct tokens per prompt: all triggers if they fit, but none at either end as long as there are others."""
    weight = torch.rand(n_prompts, len(vocabulary), generator=generator)
    if triggers is None:
        return vocabulary[weight.topk(count).indices]
    order = (weight + torch.isin(vocabulary, triggers).to(weight)).argsort(1)
    ends, middle = order[:, :2], order[:, 2:].flip(1)[:, : count - 2]
    middle = middle.gather(1, torch.rand(middle.shape, generator=generator).argsort(1))
    return vocabulary[torch.cat([ends[:, :1], middle, ends[:, 1:]], 1)]


@dataclass(frozen=True)
class HeadScores:
    """Scores of each prompt.

    Attributes:
        previous: mean attention from the targets to the position before, whose token induction must find there.
        elsewhere: the largest of the targets' attentions to distances from 2 to the period, each the mean over prompts.
        target: mean attention of the queries to the targets, minus that on the twins.
        gain: mean log-probability of the answers, in nats, minus that on the twins.
    """

    previous: Float[Tensor, "prompt layer head"]
    elsewhere: Float[Tensor, "layer head"]
    target: Float[Tensor, "prompt layer head"]
    gain: Float[Tensor, "prompt"]


def head_scores(model: Any, prompts: Repeats, tick: Callable[[], object]) -> HeadScores:
    """Attention on the prompts and their twins, without storing any pattern."""
    step = rows_at_once(model, prompts.tokens.shape[1])
    parts = []
    for start in range(0, len(prompts.tokens), step):
        part = prompts[start : start + step]
        said, shuffled = _AttentionProbe(model, part), _AttentionProbe(model, part)
        answers = said.run(part.tokens)
        tick()
        twins = shuffled.run(part.twins)
        tick()
        distances = torch.stack(said.distances, 2)
        target = torch.stack(said.targets, 1) - torch.stack(shuffled.targets, 1)
        parts.append((distances, target, answers - twins))
    distances, target, gain = (torch.cat(values).double().cpu() for values in zip(*parts, strict=True))
    return HeadScores(previous=distances[:, 0], elsewhere=distances[:, 1:].mean(0).amax(0), target=target, gain=gain)


class _AttentionProbe:
    """Reads attention while the model runs."""

    def __init__(self, model: Any, prompts: Repeats):
        self.model = model
        self.prompts = prompts
        self.distances: list[Float[Tensor, "prompt distance head"]] = []
        self.targets: list[Float[Tensor, "prompt head"]] = []

    def run(self, tokens: Tensor) -> Float[Tensor, "prompt"]:
        """The mean log-probability of each prompt's answers."""
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.model.cfg.n_layers)]
        with Intervention(self.model, look=[(name, self.read) for name in names]):
            return answer_log_prob(self.model, tokens, self.prompts)

    def read(self, pattern: Tensor, hook: Any) -> None:
        query, target = self.prompts.query, self.prompts.target
        rows = torch.arange(len(pattern), device=pattern.device)[:, None]
        back = target[..., None] - torch.arange(1, self.prompts.period + 1, device=pattern.device)
        # Indices on both sides of a slice put their axes first: [prompt, pair, distance, head].
        distances = pattern[rows[..., None], :, target[..., None], back.clamp_min(0)].float()
        distances = distances * (back >= 0)[..., None]
        self.distances.append(self.prompts.mean(distances.permute(2, 3, 0, 1)).movedim(-1, 0))
        at_targets = pattern[rows, :, query, target].float()
        self.targets.append(self.prompts.mean(at_targets.movedim(-1, 0)).T)


def answer_log_prob(model: Any, tokens: Tensor, prompts: Repeats) -> Float[Tensor, "prompt"]:
    """The mean log-probability of each prompt's scored answers, in nats."""
    return _of_answers(_at_queries(logits_of(model, tokens), prompts), prompts)


def _at_queries(
    values: Float[Tensor, "prompt pos features"], prompts: Repeats
) -> Float[Tensor, "prompt pair features"]:
    return values[torch.arange(len(values), device=values.device)[:, None], prompts.query]


def _of_answers(logits: Float[Tensor, "prompt pair d_vocab"], prompts: Repeats) -> Float[Tensor, "prompt"]:
    logits = widened(logits)
    picked = logits.gather(-1, prompts.answer[..., None])[..., 0] - logits.logsumexp(-1)
    return prompts.mean(picked)


@dataclass(frozen=True)
class AblationEffects:
    """Log-probability of each prompt's right answers, in nats.

    Attributes:
        lost: lost without one candidate.
        regained: regained with that candidate alone, compared with none.
        lost_together: lost without all candidates.
    """

    lost: Float[Tensor, "prompt candidate"]
    regained: Float[Tensor, "prompt candidate"]
    lost_together: Float[Tensor, "prompt"]


def ablation_effects(
    model: Any,
    prompts: Repeats,
    candidates: Sequence[Component],
    tick: Callable[[], object],
    measured: Sequence[Component] | None = None,
) -> AblationEffects:
    """Ablates candidates one by one, and all but one; by default each of them, else those to be measured."""
    every = tuple(candidates)
    each = every if measured is None else tuple(measured)
    alone = [tuple(other for other in every if other != head) for head in each]
    intact, none, *rest = _log_probs(model, prompts, [(), every, *((head,) for head in each), *alone], tick)
    without, with_it = (torch.stack(part, 1) for part in (rest[: len(each)], rest[len(each) :]))
    return AblationEffects(intact[:, None] - without, with_it - none[:, None], intact - none)


def lost_alone(
    model: Any, prompts: Repeats, groups: Sequence[Sequence[Component]], tick: Callable[[], object]
) -> Float[Tensor, "prompt group"]:
    """Log-probability of each prompt's right answers that is lost without each of some groups of heads, in nats."""
    intact, *without = _log_probs(model, prompts, [(), *map(tuple, groups)], tick)
    return intact[:, None] - torch.stack(without, 1)


def _log_probs(
    model: Any, prompts: Repeats, offs: Sequence[tuple[Component, ...]], tick: Callable[[], object]
) -> list[Float[Tensor, "prompt"]]:
    """The answers' log-probability with each of some groups of heads ablated.

    An ablated head writes what it writes on the prompt's twin, which has the same tokens in another order. So exactly
    what the head knew of the order is lost (resample ablation).
    """
    layers = sorted({head.layer for off in offs for head in off})
    names = {layer: f"blocks.{layer}.attn.hook_z" for layer in layers}
    step = rows_at_once(model, prompts.tokens.shape[1])
    found: dict[tuple[Component, ...], list[Tensor]] = {off: [] for off in offs}
    for start in range(0, len(prompts.tokens), step):
        part = prompts[start : start + step]
        run = taken_apart(model, part.tokens)
        _, twins = record(model, part.twins, list(names.values()))
        if run is None:
            for off, parts in found.items():
                tick()
                with patch(model, off, twins) if off else nullcontext():
                    parts.append(answer_log_prob(model, part.tokens, part))
            continue
        found[()].append(_of_answers(_at_queries(run.logits, part), part))
        theirs = {layer: twins[name] for layer, name in names.items()}
        groups = sorted(filter(None, found), key=lambda off: (len(off) > 1, off))  # those that begin alike together
        at_once = max(1, _MEMORY // run.bytes_of(run.length))
        for first in range(0, len(groups), at_once):
            some = groups[first : first + at_once]
            for off, stream in zip(some, run.with_heads_from(theirs, some), strict=True):
                tick()
                found[off].append(_of_answers(run.opened.logits(_at_queries(stream, part)), part))
    return [torch.cat(found[off]).double().cpu() for off in offs]
