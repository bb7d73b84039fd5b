"""Claim: a fact is a bigram that the weights hold, and a context overrules it by repetition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from tqdm.auto import tqdm

from hijack_lens.core.circuit import Strengths
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.language.facts import CAPITALS, Bigram
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.probing.doses import DoseResponse, dose_response, theory_of_weights
from hijack_lens.reproduction.experiment import Finding, Make, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training.fit import fit_strengths

STATEMENT = (
    "Facts: a country's capital, held as a bigram by the weights, is overruled by a context that denies it often "
    "enough; the better the fact is known, the more repeats it takes, and theory says how many."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: knowledge hijack on analogies and facts"

ROUNDING = 1e-9
"""By how much theory and a hand-written float64 model may differ, in logits."""
KNOWN = 0.95
"""Of the facts, how many a trained model must know: its weights win where the context says nothing."""
OVERRULED = 0.95
"""Of the facts, how many the most repeats must overrule in a trained model."""
BY_CONTEXT = 0.9
"""Of the rise of a trained model's margin, how much must be written through the induction head."""
AGREEMENT = 0.95
"""Of predicted and measured winners in trained models, as a fraction of the prompts."""

WORDS = ("we", "went", "to", "and", "then", "by", "train")
"""What stands between the facts."""
_OTHERWISE = 0.1
"""The probability that a token other than a country is followed by any token at all, alike."""


@dataclass(frozen=True)
class FactsRecipe(Recipe):
    """A `Recipe` whose language is that of the first facts; `d_vocab` and `concentration` have no say.

    Countries are the triggers: some are drawn for each sequence, in which another word follows them than their capital.

    Attributes:
        n_facts: how many.
        certainty: of the least and of the best known.
    """

    triggers: int = 4
    fixed: bool = False
    steps: int = 300
    evaluate_every: int = 300
    n_facts: int = 8
    certainty: tuple[float, float] = (0.7, 0.9)

    @property
    def language(self) -> BigramLanguage:
        """Of the sequences."""
        return fact_language(CAPITALS[: self.n_facts], self.certainty)


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        strengths: of the hand-written model.
        n_facts: that it holds.
        certainty: of its least and its best known fact.
        recipe: of the trained models.
        seeds: of these.
        repeats: of the denial, at most.
        lead: words before it.
    """

    strengths: Strengths = Strengths(20.0, 3.5, 8.0, 1.0)
    n_facts: int = len(CAPITALS)
    certainty: tuple[float, float] = (0.5, 0.98)
    recipe: FactsRecipe = FactsRecipe(0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    repeats: int = 8
    lead: int = 20


QUICK = Settings(n_facts=20, seeds=(0, 1, 2))


def fact_language(facts: Sequence[tuple[str, str]], certainty: tuple[float, float]) -> BigramLanguage:
    """A word-level language in which each country is followed by its capital, from the least certain to the most.

    What is left of the probability is the same for all words. Any other word is followed by one of `WORDS` or by a
    country. The first word is a country.

    Args:
        facts: countries and capitals.
        certainty: probabilities of the first country's capital and of the last's; the others lie between,
            their log-odds evenly spaced.
    """
    n = len(facts)
    names = [*(country for country, _ in facts), *(capital for _, capital in facts), *WORDS]
    size = len(names)
    least, most = torch.tensor(certainty, dtype=torch.float64).logit()
    known = torch.linspace(least, most, n, dtype=torch.float64).sigmoid()
    after_country = torch.ones(n, size, dtype=torch.float64) / size * (1 - known)[:, None]
    after_country[:, n : 2 * n] += known.diag()
    countries, words = torch.zeros(2, size, dtype=torch.float64)
    countries[:n], words[2 * n :] = 1 / n, 1 / len(WORDS)
    after_other = (1 - _OTHERWISE) * (countries + words) / 2 + _OTHERWISE / size
    pi_b = torch.cat([after_country, after_other.expand(size - n, -1)])
    return BigramLanguage(pi_b, countries, names, level="word")


def facts(settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained) -> Result:
    """A context that denies a fact overrules the weights after as many repeats as theory says.

    Knowledge hijack (Wang & Sato, arXiv 2412.11459) on countries and capitals (`hijack_lens.facts`), a word-level
    bigram memory. Each fact is denied by the next one's capital: words, then n times (country, false capital), then
    the country. `dose_response` splits every margin by memory; a flip is the least n with which the false capital wins.

    The hand-written model, float64, holds facts of growing certainty. Holds where theory's margins, at the strengths
    that it was written with, are met to
    `ROUNDING`; where theory's flips are the measured ones, for all facts; and where no fact that is better known than
    another flips sooner, and the best known later than the least.

    Trained models have seen other words follow a country in context. Holds where they know at least `KNOWN` of the
    facts, of which `repeats` denials overrule at least `OVERRULED`; where at least `BY_CONTEXT` of the margin's rise is
    the context's; and where theory at fitted strengths names at least `AGREEMENT` of the winners, the context among
    them: each by the 95% interval over seeds, which are of weights and sequences, the language being that of the facts.

    The same prompts for any language model: `hijack_lens.probing`, with `counterfactuals(dict(CAPITALS))`.
    """
    language = fact_language(CAPITALS[: settings.n_facts], settings.certainty)
    n_ctx = settings.lead + 2 * settings.repeats + 1
    hand_written = _ask(
        make(language, strengths=settings.strengths, n_ctx=n_ctx, dtype=torch.float64), settings, settings.strengths
    )
    by_seed = [
        _ask(train(replace(settings.recipe, seed=seed)).model, settings, None)
        for seed in tqdm(settings.seeds, disable=None, unit="seed")
    ]
    tables = [response.to_pandas() for response in (hand_written, *by_seed)]
    for table, seed in zip(tables, (None, *settings.seeds), strict=True):
        table.insert(0, "seed", seed)
    return Result(
        (*_exact_findings(hand_written, settings), *_trained_findings(by_seed, settings)),
        pd.concat(tables, ignore_index=True).astype({"seed": "Int64"}),
        _picture(hand_written, by_seed),
        "Flips beyond the repeats that were asked count as none. The same prompt family for any language model: "
        "hijack_lens.probing.dose_response(model, counterfactuals(dict(CAPITALS))).",
    )


def _ask(model: BigramTransformer, settings: Settings, strengths: Strengths | None) -> DoseResponse:
    """Every fact of a model's language, denied by the next one's capital; theory's triggers are the countries.

    Theory's strengths are those given; else those that the weights show.
    """
    n = (model.language.d_vocab - len(WORDS)) // 2
    denied = [Bigram(country, weights=n + country, context=n + (country + 1) % n) for country in range(n)]
    lead = [2 * n + place % len(WORDS) for place in range(settings.lead)]
    response = dose_response(model, denied, settings.repeats, lead=lead)
    fit = fit_strengths(model, range(n))
    if strengths is not None:
        fit = replace(fit, setting=replace(fit.setting, strengths=strengths))
    return replace(response, theory=theory_of_weights(fit, response.conflicts, response.margin.total))


def _flips(response: DoseResponse, predicted: bool) -> list[float]:
    """The least number of repeats that wins, by fact; infinite where none of those asked does."""
    margins = response.theory.margin if predicted else response.margin.total
    return [next((float(n) for n, x in enumerate(row) if x > 0), math.inf) for row in margins.tolist()]


def _exact_findings(response: DoseResponse, settings: Settings) -> list[Finding]:
    setting = f"hand-written model, {len(response.conflicts)} facts, certainty {settings.certainty[0]:g} to "
    setting += f"{settings.certainty[1]:g}, {settings.lead} words, 0 to {settings.repeats} repeats"
    error = float((response.margin.total - response.theory.margin).abs().max())
    measured, predicted = _flips(response, False), _flips(response, True)
    alike = sum(a == b for a, b in zip(measured, predicted, strict=True))
    never = sum(map(math.isinf, measured))
    ends = [f"{n:g}" if math.isfinite(n) else "never" for n in (measured[0], measured[-1])]
    return [
        Finding(setting, f"margins are theory's, to {ROUNDING:g} logits", f"within {error:.1g}", error <= ROUNDING),
        Finding(
            setting,
            "each fact flips with as many repeats as theory says",
            f"{alike} of {len(measured)} do; {never} never flip",
            alike == len(measured) > never,
        ),
        Finding(
            setting,
            "the better a fact is known, the more repeats it takes",
            f"from {ends[0]} (the least known) to {ends[1]} (the best known)",
            measured == sorted(measured) and measured[0] < measured[-1],
        ),
    ]


def _trained_findings(responses: Sequence[DoseResponse], settings: Settings) -> list[Finding]:
    recipe = settings.recipe
    setting = f"{len(responses)} trained models, {recipe.n_facts} facts, {settings.lead} words, 0 to "
    setting += f"{settings.repeats} repeats"
    known, overruled, by_context, agreement = [], [], [], []
    for response in responses:
        total, context = response.margin.total, response.margin.context
        knows = total[:, 0] < 0
        known.append(float(knows.double().mean()))
        overruled.append(float((total[knows, -1] > 0).double().mean()) if bool(knows.any()) else 0.0)
        rise = float((total[:, -1] - total[:, 0]).mean())
        by_context.append(float((context[:, -1] - context[:, 0]).mean()) / rise if rise > 0 else 0.0)
        # Where the context never wins there is no winner to predict.
        named = (total > 0) == (response.theory.margin > 0)
        agreement.append(float(named.double().mean()) if bool((total > 0).any()) else 0.0)
    finding = partial(_at_least, setting)
    return [
        finding("of the facts are known: the weights win without a denial", known, KNOWN),
        finding(f"of the known facts are overruled by {settings.repeats} denials", overruled, OVERRULED),
        finding("of the margin's rise from no denial to most is the context's", by_context, BY_CONTEXT),
        finding("of the winners are named by theory at fitted strengths", agreement, AGREEMENT),
    ]


def _at_least(setting: str, what: str, values: Sequence[float], threshold: float) -> Finding:
    """Holds where the 95% interval over seeds is at least the threshold."""
    found = over_seeds(values)
    return Finding(setting, f"at least {threshold:.0%} {what}", f"{found:.1%}", found.low >= threshold)


def _picture(hand_written: DoseResponse, by_seed: Sequence[DoseResponse]) -> Picture:
    """Flips by certainty, predicted over measured; and the margin by memory against repeats."""
    picture = Picture(13.0, 5.0)
    left, middle, right = picture.figure.subplots(1, 3)
    beyond = len(hand_written.repeats)  # where facts that never flip are drawn
    for values, style, label in (
        (_flips(hand_written, False), {"color": COLOURS["context"], "marker": "o", "ms": 9, "ls": ""}, "measured"),
        (_flips(hand_written, True), {"color": "black", "marker": ".", "ms": 5, "ls": "-", "lw": 1}, "theory"),
    ):
        left.plot(range(1, len(values) + 1), [min(n, beyond) for n in values], label=label, **style)
    ticks = list(range(0, beyond + 1, 2 if beyond % 2 == 0 else 1))
    left.set_yticks([*(n for n in ticks if n < beyond), beyond], [*(str(n) for n in ticks if n < beyond), "never"])
    left.set_xlabel("fact, from the least to the best known")
    left.set_ylabel("repeats until the false capital wins")
    left.set_title("written by hand")
    left.legend(frameon=False)
    for ax, responses, title in (
        (middle, [hand_written], f"written by hand, mean of {len(hand_written.conflicts)} facts"),
        (right, by_seed, f"trained, {len(by_seed)} seeds"),
    ):
        for memory in ("context", "weights", "rest", "total"):
            for number, response in enumerate(responses):
                ax.plot(
                    response.repeats,
                    getattr(response.margin, memory).mean(0),
                    color=COLOURS.get(memory, "black"),
                    linewidth=2,
                    alpha=1 if len(responses) == 1 else 0.7,
                    label=None if number else memory,
                )
        for number, response in enumerate(responses):
            predicted = response.theory.margin.mean(0)
            ax.plot(
                response.repeats, predicted, "o", mfc="white", mec="black", ms=5, label=None if number else "theory"
            )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xlabel("times the context denies the fact")
        ax.set_title(title)
    middle.set_ylabel("logit of the false capital − of the true one")
    middle.legend(frameon=False, ncols=2, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.12))
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    return picture
