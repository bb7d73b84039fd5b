"""Facts that a language model's weights may hold, and prompts in which the context denies them again and again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import check_count, check_list, check_tokens, check_type, shown
from hijack_lens.core.hook_points import check_model
from hijack_lens.core.inputs import token_ids
from hijack_lens.core.memory import check_memory
from hijack_lens.core.texts import decoded, n_outputs, outputs_are_tokens, text_ids, tokenizer_of
from hijack_lens.language.vocabulary import Token

_TEMPLATE = "{subject}'s capital is {answer}."


@dataclass(frozen=True)
class Fact:
    """What a language model's weights say, and what a context says instead.

    Answers may have several tokens; only the first tells them apart and is scored.

    Attributes:
        subject: what the fact is about.
        weights: the answer that the weights hold.
        context: the answer that the context gives.
        template: a statement with "{answer}" once, after the text that asks for it.

    Examples:
        >>> fact = hl.Fact("France", "Paris", "London")
        >>> fact.text(1)
        "France's capital is London. France's capital is"
        >>> fact.name, fact.query
        ('France: London, not Paris', "France's capital is")
    """

    subject: str
    weights: str
    context: str
    template: str = _TEMPLATE

    def __post_init__(self) -> None:
        for name in ("subject", "weights", "context"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be a text, got {shown(value)}")
        if self.weights.strip() == self.context.strip():
            raise ValueError(f"context must differ from what the weights say, got {shown(self.context)} for both")
        if not isinstance(self.template, str) or self.template.count("{answer}") != 1 or not self.query:
            raise ValueError(f"template must hold '{{answer}}' once, after some text, got {shown(self.template)}")

    @property
    def name(self) -> str:
        """A name for tables and legends."""
        return f"{self.subject}: {self.context}, not {self.weights}"

    @property
    def query(self) -> str:
        """The template up to the space before the answer."""
        return self._before.rstrip()

    def statement(self, answer: str, end: str | None = None) -> str:
        """The template with the subject and an answer; `end`, if given, replaces what follows the answer."""
        check_type("answer", answer, str)
        check_type("end", "" if end is None else end, str)
        after = self.template.split("{answer}")[1] if end is None else end
        answer = answer.lstrip() if self._before[-1:].isspace() else answer  # one space is enough
        return self._before + answer + after.replace("{subject}", self.subject)

    def text(self, repeats: int, lead: str = "") -> str:
        """The prompt in which the context gives its answer `repeats` times, after `lead`."""
        check_type("lead", lead, str)
        repeats = check_count("repeats", repeats)
        # The text, and before it is joined a list of its parts.
        check_memory(repeats * (len(self.statement(self.context)) + 9), repeats=repeats)
        return " ".join([*([lead] if lead else []), *[self.statement(self.context)] * repeats, self.query])

    @property
    def _before(self) -> str:
        return self.template.split("{answer}")[0].replace("{subject}", self.subject)


@dataclass(frozen=True)
class Bigram:
    """A fact of single tokens, by id or text: the context says (trigger, context); the prompt ends with the trigger.

    Attributes:
        trigger: q.
        weights: g, what the weights say follows it.
        context: c, what the context says.

    Examples:
        >>> bigram = hl.Bigram("q", weights="u", context="e")
        >>> hl.probing.fact_prompts(model, bigram, repeats=2).tokens(2).tolist() == language.encode("qeqeq").tolist()
        True
    """

    trigger: Token
    weights: Token
    context: Token


def counterfactuals(answers: Mapping[str, str], template: str = _TEMPLATE) -> tuple[Fact, ...]:
    """Facts from {subject: what the weights say}; the context gives each subject the next subject's answer.

    Raises:
        ValueError: for fewer than two subjects, or neighbours with the same answer.

    Examples:
        >>> from hijack_lens.language import counterfactuals
        >>> facts = counterfactuals({"grass": "green", "snow": "white"}, "The colour of {subject} is {answer}.")
        >>> facts[0].text(1)
        'The colour of grass is white. The colour of grass is'
    """
    check_type("answers", answers, Mapping)
    if len(answers) < 2:
        raise ValueError(f"answers must hold two subjects or more, got {shown(dict(answers))}")
    said = list(answers.values())
    return tuple(
        Fact(subject, own, other, template)
        for (subject, own), other in zip(answers.items(), said[1:] + said[:1], strict=True)
    )


_CAPITALS = """
Albania Tirana, Australia Canberra, Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago,
China Beijing, Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo, England London, Estonia Tallinn, Finland
Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, Iran Tehran,
Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Latvia Riga, Morocco Rabat, Norway Oslo, Peru
Lima, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia Moscow, Senegal Dakar, Spain Madrid, Sweden Stockholm,
Thailand Bangkok, Turkey Ankara
"""
CAPITALS: tuple[tuple[str, str], ...] = tuple(
    (country, capital) for country, capital in map(str.split, _CAPITALS.split(","))
)
"""Countries and their capitals."""


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
        query: tokens of the question at the end.

    Examples:
        >>> prompts = hl.probing.fact_prompts(model, hl.Bigram("q", weights="u", context="e"), repeats=2)
        >>> prompts.lengths, prompts.period
        ((1, 3, 5), 2)
        >>> language.decode(prompts.tokens(2))
        'qeqeq'
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    context: int
    weights: int
    texts: tuple[str, str]
    whole: tuple[bool, bool]
    query: int = 1

    def tokens(self, repeats: int) -> Int[Tensor, "pos"]:
        """The prompt with so many repeats."""
        most = len(self.prompts) - 1
        if check_count("repeats", repeats) > most:
            raise ValueError(f"repeats must be at most {most}, got {repeats}")
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

    Examples:
        >>> prompts = hl.probing.fact_prompts(model, hl.Bigram("q", weights="u", context="e"), repeats=2)
        >>> [language.decode(prompts.tokens(n)) for n in range(3)]
        ['q', 'qeq', 'qeqeq']
    """
    check_model(model)
    repeats = check_count("repeats", repeats, minimum=1)
    if isinstance(fact, Fact):
        found = _of_text(model, fact, repeats, lead)
    elif isinstance(fact, Bigram):
        found = _of_tokens(model, fact, repeats, lead)
    else:
        raise TypeError(f"fact must be a Fact or a Bigram, got {shown(fact)}")
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
        raise TypeError(f"lead must be text, as the fact is, got {shown(lead)}")
    if not outputs_are_tokens(model):
        raise ValueError(
            f"fact is of words, but the model's {n_outputs(model)} outputs are not its {model.cfg.d_vocab} tokens: ask "
            "a Bigram of ids"
        )

    def read(text: str) -> tuple[int, ...]:
        ids = check_tokens("fact", text_ids(model, text, "fact"), model.cfg.d_vocab, model.cfg.n_ctx)
        return tuple(ids.tolist())

    prompts = tuple(read(fact.text(k, lead)) for k in range(repeats + 1))
    start, n = fact.text(0, lead).removesuffix(fact.query), len(prompts[0])
    ids, texts, whole, stated = [], [], [], 0
    for answer in (fact.context, fact.weights):
        said, cut_off = read(start + fact.statement(answer)), read(start + fact.statement(answer, end=""))
        if len(cut_off) <= n or {said[:n], cut_off[:n]} != {prompts[0]} or said[n] != cut_off[n]:
            raise ValueError(
                f"template {fact.template!r}: the tokenizer does not part the answer {answer!r} from the words around"
            )
        stated = stated or len(said)
        ids.append(said[n])
        texts += decoded(model.tokenizer, [said[n]])
        whole.append(len(cut_off) == n + 1)
    if ids[0] == ids[1]:
        raise ValueError(
            f"fact {fact.name!r}: both answers begin with the token {texts[0]!r}, by which they would be scored"
        )
    for before, after in pairwise(prompts):
        if after[: len(before) + 1] != (*before, ids[0]):
            raise ValueError(f"template {fact.template!r}: the tokenizer reads it otherwise when it is repeated")
    question = len(prompts[1]) - stated
    return FactPrompts(fact.name, prompts, ids[0], ids[1], (texts[0], texts[1]), (whole[0], whole[1]), question)


def _of_tokens(model: Any, fact: Bigram, repeats: int, lead: str | Sequence[int]) -> FactPrompts:
    q, c, g = token_ids(model, "bigram", [fact.trigger, fact.context, fact.weights]).tolist()
    token_ids(model, "bigram", [fact.context, fact.weights], output=True)  # they are also looked for in the logits
    tokenizer = tokenizer_of(model)
    if not isinstance(lead, str):
        given = check_list("lead", lead, "a text or token ids")
        before = check_tokens("lead", given, model.cfg.d_vocab).tolist() if given else []
        if before and isinstance(before[0], list):
            raise ValueError(f"lead must be the tokens of one prompt, got {shown(lead)}")
    elif lead:
        before = text_ids(model, lead, "lead")
    elif tokenizer is not None and getattr(model.cfg, "default_prepend_bos", False):
        before = [tokenizer.bos_token_id]
    else:
        before = []
    if q in before:
        raise ValueError(f"lead must not hold the trigger {fact.trigger!r}, got {shown(lead)}")
    check_memory(8 * (repeats + 1) * (len(before) + repeats + 1), repeats=repeats)
    prompts = tuple((*before, *[q, c] * k, q) for k in range(repeats + 1))
    check_tokens("bigram's prompts", torch.tensor(prompts[-1]), model.cfg.d_vocab, model.cfg.n_ctx)
    texts = [str(i) for i in (q, c, g)] if tokenizer is None else decoded(model.tokenizer, [q, c, g])
    return FactPrompts(f"{texts[0]}: {texts[1]}, not {texts[2]}", prompts, c, g, (texts[1], texts[2]), (True, True))
