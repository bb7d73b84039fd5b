"""Facts that a language model's weights may hold, and what a context says instead."""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    subject: str
    weights: str
    context: str
    template: str = _TEMPLATE

    def __post_init__(self) -> None:
        for name in ("subject", "weights", "context"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be a text, got {value!r}")
        if self.weights == self.context:
            raise ValueError(f"context must differ from what the weights say, got {self.context!r} for both")
        if not isinstance(self.template, str) or self.template.count("{answer}") != 1 or not self.query:
            raise ValueError(f"template must hold '{{answer}}' once, after some text, got {self.template!r}")

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
        after = self.template.split("{answer}")[1] if end is None else end
        return self._before + answer + after.replace("{subject}", self.subject)

    def text(self, repeats: int, lead: str = "") -> str:
        """The prompt in which the context gives its answer `repeats` times, after `lead`."""
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
    """

    trigger: Token
    weights: Token
    context: Token


def counterfactuals(answers: Mapping[str, str], template: str = _TEMPLATE) -> tuple[Fact, ...]:
    """Facts from {subject: what the weights say}; the context gives each subject the next subject's answer.

    Raises:
        ValueError: for fewer than two subjects, or neighbours with the same answer.
    """
    if len(answers) < 2:
        raise ValueError(f"answers must hold two subjects or more, got {dict(answers)!r:.80}")
    said = list(answers.values())
    return tuple(
        Fact(subject, own, other, template)
        for (subject, own), other in zip(answers.items(), said[1:] + said[:1], strict=True)
    )


CAPITALS: tuple[tuple[str, str], ...] = (
    ("Albania", "Tirana"),
    ("Australia", "Canberra"),
    ("Austria", "Vienna"),
    ("Belgium", "Brussels"),
    ("Bulgaria", "Sofia"),
    ("Canada", "Ottawa"),
    ("Chile", "Santiago"),
    ("China", "Beijing"),
    ("Croatia", "Zagreb"),
    ("Cuba", "Havana"),
    ("Denmark", "Copenhagen"),
    ("Egypt", "Cairo"),
    ("England", "London"),
    ("Estonia", "Tallinn"),
    ("Finland", "Helsinki"),
    ("France", "Paris"),
    ("Germany", "Berlin"),
    ("Ghana", "Accra"),
    ("Greece", "Athens"),
    ("Hungary", "Budapest"),
    ("Iceland", "Reykjavik"),
    ("Iran", "Tehran"),
    ("Iraq", "Baghdad"),
    ("Ireland", "Dublin"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Kenya", "Nairobi"),
    ("Latvia", "Riga"),
    ("Morocco", "Rabat"),
    ("Norway", "Oslo"),
    ("Peru", "Lima"),
    ("Poland", "Warsaw"),
    ("Portugal", "Lisbon"),
    ("Romania", "Bucharest"),
    ("Russia", "Moscow"),
    ("Senegal", "Dakar"),
    ("Spain", "Madrid"),
    ("Sweden", "Stockholm"),
    ("Thailand", "Bangkok"),
    ("Turkey", "Ankara"),
)
"""Countries and their capitals."""
