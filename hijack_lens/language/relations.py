"""Facts of everyday knowledge by relation, for asking a language model what its context denies."""

from dataclasses import dataclass

import torch

from hijack_lens.core.checks import Seed, as_generator
from hijack_lens.language.facts import CAPITALS, Fact


@dataclass(frozen=True)
class Relation:
    """Subjects and their answers, asked by one sentence.

    Attributes:
        template: a statement with "{subject}" and, at its end, "{answer}".
        answers: (subject, answer) pairs; several subjects may share an answer.

    Examples:
        >>> from hijack_lens.language import RELATIONS
        >>> relation = RELATIONS["capital"]
        >>> relation.template
        'The capital of {subject} is {answer}.'
        >>> relation.facts()[0].text(0)
        'The capital of Albania is'
    """

    template: str
    answers: tuple[tuple[str, str], ...]

    def facts(self, seed: Seed = 0) -> tuple[Fact, ...]:
        """Each subject with its answer, and another subject's, drawn at random, that a context says instead."""
        generator, found = as_generator(seed), []
        others = list(dict.fromkeys(answer for _, answer in self.answers))
        for subject, answer in self.answers:
            wrong = [other for other in others if other != answer]
            drawn = int(torch.randint(len(wrong), (), generator=generator))
            found.append(Fact(subject, answer, wrong[drawn], self.template))
        return tuple(found)


def _relation(template: str, listed: str) -> Relation:
    pairs = (pair.split(":") for pair in " ".join(listed.split()).split(","))
    return Relation(template, tuple((subject.strip(), answer.strip()) for subject, answer in pairs))


RELATIONS: dict[str, Relation] = {
    "capital": Relation("The capital of {subject} is {answer}.", CAPITALS),
    "language": _relation(
        "The language spoken in {subject} is {answer}.",
        """
        Argentina: Spanish, Australia: English, Austria: German, Bangladesh: Bengali, Brazil: Portuguese, Bulgaria:
        Bulgarian, Chile: Spanish, China: Chinese, Colombia: Spanish, Croatia: Croatian, Cuba: Spanish, Denmark: Danish,
        Egypt: Arabic, England: English, Estonia: Estonian, Finland: Finnish, France: French, Germany: German, Greece:
        Greek, Hungary: Hungarian, Iceland: Icelandic, Iran: Persian, Iraq: Arabic, Israel: Hebrew, Italy: Italian,
        Japan: Japanese, Korea: Korean, Mexico: Spanish, Morocco: Arabic, Netherlands: Dutch, Norway: Norwegian, Peru:
        Spanish, Poland: Polish, Portugal: Portuguese, Romania: Romanian, Russia: Russian, Spain: Spanish, Sweden:
        Swedish, Thailand: Thai, Turkey: Turkish, Ukraine: Ukrainian, Vietnam: Vietnamese
        """,
    ),
    "colour": _relation(
        "The color of {subject} is {answer}.",
        """
        grass: green, snow: white, coal: black, blood: red, the sky: blue, a banana: yellow, a lemon: yellow, a tomato:
        red, a carrot: orange, a pumpkin: orange, milk: white, chocolate: brown, a crow: black, a swan: white, a frog:
        green, an elephant: gray, a flamingo: pink, the sun: yellow, the ocean: blue, a cherry: red, a strawberry: red,
        spinach: green, broccoli: green, a cucumber: green, gold: yellow, silver: gray, an eggplant: purple, lavender:
        purple, a polar bear: white, a raven: black, salt: white, sugar: white, sand: brown, wood: brown, an emerald:
        green, a ruby: red, a sapphire: blue, cotton: white, soil: brown, a fire engine: red
        """,
    ),
    "opposite": _relation(
        "The opposite of {subject} is {answer}.",
        """
        hot: cold, big: small, up: down, left: right, day: night, good: bad, happy: sad, fast: slow, high: low, old:
        young, rich: poor, hard: soft, light: dark, open: closed, in: out, on: off, full: empty, strong: weak, early:
        late, clean: dirty, wet: dry, black: white, thick: thin, long: short, love: hate, war: peace, life: death, true:
        false, first: last, north: south, east: west, win: lose, push: pull, loud: quiet, sweet: bitter, heavy: light,
        wide: narrow, deep: shallow, tall: short, above: below
        """,
    ),
    "country": _relation(
        "The country whose capital is {subject} is {answer}.",
        ", ".join(f"{capital}: {country}" for country, capital in CAPITALS),
    ),
    "continent": _relation(
        "The continent where {subject} lies is {answer}.",
        """
        Albania: Europe, Argentina: South America, Austria: Europe, Bangladesh: Asia, Belgium: Europe, Bolivia: South
        America, Brazil: South America, Bulgaria: Europe, Canada: North America, Chile: South America, China: Asia,
        Colombia: South America, Croatia: Europe, Denmark: Europe, Ecuador: South America, Egypt: Africa, Ethiopia:
        Africa, Finland: Europe, France: Europe, Germany: Europe, Ghana: Africa, Greece: Europe, Hungary: Europe, India:
        Asia, Iran: Asia, Iraq: Asia, Italy: Europe, Japan: Asia, Kenya: Africa, Mexico: North America, Morocco: Africa,
        Nigeria: Africa, Norway: Europe, Pakistan: Asia, Peru: South America, Poland: Europe, Senegal: Africa, Spain:
        Europe, Sweden: Europe, Thailand: Asia, Uganda: Africa, Vietnam: Asia
        """,
    ),
}
"""Relations by name; facts that hardly change, written for this project."""
