"""A fact in a model's own tokens: prompts in which the context denies it again and again."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import check_count, check_tokens
from hijack_lens.core.hook_points import check_model
from hijack_lens.core.inputs import text_tokens, token_ids
from hijack_lens.language.facts import Bigram, Fact


@dataclass(frozen=True)
class FactPrompts:
    """A fact in a model's own tokens: the prompts in which the context denies it 0, 1, 2, ... times.

    Each prompt is the one before it, the context's answer, and on to the query again; so lengths differ, and nothing is
    padded.

    Attributes:
        name: of the fact.
        prompts: token ids, by the number of repeats.
        context: the token that the context says, the first of its answer.
        weights: likewise.
        texts: of these two tokens.
        whole: whether each of the two is the whole answer.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    context: int
    weights: int
    texts: tuple[str, str]
    whole: tuple[bool, bool]

    def tokens(self, repeats: int) -> Int[Tensor, "pos"]:
        """The prompt with so many repeats."""
        return torch.tensor(self.prompts[repeats])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each prompt."""
        return tuple(map(len, self.prompts))

    @property
    def period(self) -> int:
        """Tokens that another repeat adds."""
        return self.lengths[-1] - self.lengths[-2]


def fact_prompts(model: Any, fact: Fact | Bigram, repeats: int = 8, lead: str | Sequence[int] = "") -> FactPrompts:
    """The prompts of a fact, for a model's tokenizer, with 0 to `repeats` repeats.

    Args:
        model: a HookedTransformer or TransformerBridge; a `Bigram` of token ids needs no tokenizer.
        fact: what to ask.
        repeats: how often the context says it at most.
        lead: neutral text before all prompts, which holds neither answer; for a `Bigram` also token ids.

    Raises:
        TypeError, ValueError: for answers that begin with the same token, or that the tokenizer cuts differently in a
            statement and after the query; for prompts that hold an answer elsewhere; and for prompts too long.
    """
    check_model(model)
    check_count("repeats", repeats, minimum=1)
    if isinstance(fact, Fact):
        found = _of_text(model, fact, repeats, lead)
    elif isinstance(fact, Bigram):
        found = _of_tokens(model, fact, repeats, lead)
    else:
        raise TypeError(f"fact must be a Fact or a Bigram, got {fact!r:.80}")
    last = found.prompts[-1]
    if last.count(found.context) != repeats or found.weights in last:
        raise ValueError(
            f"fact {found.name!r}: the prompt must hold the context's {found.texts[0]!r} once per repeat and the "
            f"weights' {found.texts[1]!r} never, got {last.count(found.context)} in {repeats} repeats and "
            f"{last.count(found.weights)}"
        )
    return found


def _of_text(model: Any, fact: Fact, repeats: int, lead: str | Sequence[int]) -> FactPrompts:
    if not isinstance(lead, str):
        raise TypeError(f"lead must be text, as the fact is, got {lead!r:.80}")

    def read(text: str) -> tuple[int, ...]:
        return tuple(text_tokens(model, text, "fact").tolist())

    prompts = tuple(read(fact.text(k, lead)) for k in range(repeats + 1))
    start, n = fact.text(0, lead).removesuffix(fact.query), len(prompts[0])
    ids, texts, whole = [], [], []
    for answer in (fact.context, fact.weights):
        said, cut_off = read(start + fact.statement(answer)), read(start + fact.statement(answer, end=""))
        if len(cut_off) <= n or {said[:n], cut_off[:n]} != {prompts[0]} or said[n] != cut_off[n]:
            raise ValueError(
                f"template {fact.template!r}: the tokenizer does not part the answer {answer!r} from the words around"
            )
        ids.append(said[n])
        texts.append(model.tokenizer.decode([said[n]]))
        whole.append(len(cut_off) == n + 1)
    if ids[0] == ids[1]:
        raise ValueError(
            f"fact {fact.name!r}: both answers begin with the token {texts[0]!r}, by which they would be scored"
        )
    for before, after in pairwise(prompts):
        if after[: len(before) + 1] != (*before, ids[0]):
            raise ValueError(f"template {fact.template!r}: the tokenizer reads it otherwise when it is repeated")
    return FactPrompts(fact.name, prompts, ids[0], ids[1], (texts[0], texts[1]), (whole[0], whole[1]))


def _of_tokens(model: Any, fact: Bigram, repeats: int, lead: str | Sequence[int]) -> FactPrompts:
    q, c, g = token_ids(model, "bigram", [fact.trigger, fact.context, fact.weights]).tolist()
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(lead, str):
        before = check_tokens("lead", lead, model.cfg.d_vocab).tolist() if len(lead) else []
    elif lead:
        before = text_tokens(model, lead, "lead").tolist()
    elif tokenizer is not None and getattr(model.cfg, "default_prepend_bos", False):
        before = [tokenizer.bos_token_id]
    else:
        before = []
    if q in before:
        raise ValueError(f"lead must not hold the trigger {fact.trigger!r}, got {lead!r:.80}")
    prompts = tuple((*before, *[q, c] * k, q) for k in range(repeats + 1))
    check_tokens("bigram's prompts", torch.tensor(prompts[-1]), model.cfg.d_vocab, model.cfg.n_ctx)
    texts = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in (q, c, g)]
    return FactPrompts(f"{texts[0]}: {texts[1]}, not {texts[2]}", prompts, c, g, (texts[1], texts[2]), (True, True))
