"""Random tokens said twice, and the same with the first time in another order."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens._checks import as_int, check_tokens
from hijack_lens._inputs import single_token

_TRIES = 8
"""Orders drawn per twin, of which the one that keeps fewest pairs is taken."""


@dataclass(frozen=True)
class Repeats:
    """Prompts whose second half is predictable from their first, and twins of them in which it is not.

    A prompt is one first token, then `period` distinct tokens, then the same again from another starting point: so
    where a query's successor stood differs from prompt to prompt, and a head that looks back a fixed distance finds
    it no more often than chance. A twin has the first half's tokens in another order; all that the two halves share
    but the order is in both. Of the first half's pairs (token, successor), numbered by `pair`:

    Attributes:
        tokens: the prompts.
        twins: the same prompts, their first half in another order.
        query: where the pair's first token stands the second time.
        target: where its second token stood the first time.
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
        """How many tokens are said twice."""
        return self.query.shape[1] + 1

    def __getitem__(self, rows: slice) -> "Repeats":
        return Repeats(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str | None) -> "Repeats":
        """The same on another device."""
        return Repeats(*(getattr(self, field.name).to(device) for field in fields(self)))

    def mean(self, values: Float[Tensor, "... prompt pair"]) -> Float[Tensor, "... prompt"]:
        """The mean over a prompt's scored pairs."""
        counts = self.scored.to(values)
        return (values * counts).sum(-1) / counts.sum(-1)


def repeats(
    vocabulary: Int[Tensor, "token"],
    triggers: Int[Tensor, "trigger"] | None,
    first: int | None,
    n_prompts: int,
    period: int,
    generator: torch.Generator,
) -> Repeats:
    """Draws prompts and their twins.

    Args:
        vocabulary: ids to draw from; more than `period`.
        triggers: ids whose pairs are scored, drawn into every prompt first; `None` scores all pairs.
        first: every prompt's first token; by default one that the prompt does not hold.
        n_prompts: how many.
        period: distinct tokens per prompt.
        generator: of the draws.
    """
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
    """Distinct tokens per prompt: triggers first, as many as there are, but none at either end if others are left."""
    weight = torch.rand(n_prompts, len(vocabulary), generator=generator)
    if triggers is None:
        return vocabulary[weight.topk(count).indices]
    order = (weight + torch.isin(vocabulary, triggers).to(weight)).argsort(1)
    ends, middle = order[:, :2], order[:, 2:].flip(1)[:, : count - 2]
    middle = middle.gather(1, torch.rand(middle.shape, generator=generator).argsort(1))
    return vocabulary[torch.cat([ends[:, :1], middle, ends[:, 1:]], 1)]


def token_ids(model: Any, name: str, tokens: Any) -> Int[Tensor, "token"]:
    """Distinct ids of tokens given as ids or texts.

    Raises:
        TypeError, ValueError: for what is no token of the model's.
    """
    listed = [tokens] if isinstance(tokens, str) or as_int(tokens) is not None else tokens
    if not isinstance(listed, Iterable):
        raise TypeError(f"{name} must be token ids or texts, got {tokens!r:.80}")
    ids = [single_token(model, name, token) if isinstance(token, str) else token for token in listed]
    checked = check_tokens(name, ids, model.cfg.d_vocab)
    if len(checked.unique()) != len(checked):
        raise ValueError(f"{name} must be distinct, got {tokens!r:.80}")
    return checked.cpu()
