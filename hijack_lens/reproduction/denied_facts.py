"""Claim: a fact is a bigram that the weights hold, and a context overrules it by repetition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.language import CAPITALS, Bigram, BigramLanguage
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.probing import DoseResponse, dose_response
from hijack_lens.probing.doses import theory_of_weights
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training import fit_strengths

STATEMENT = (
    "Facts: a country's capital, held as a bigram by the weights, is overruled by a context that denies it often "
    "enough; the better the fact is known, the more repeats it takes, and theory says how many."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: knowledge hijack on analogies and facts"

ROUNDING = 1e-9  # by how much theory and a hand-written float64 model may differ, in logits
KNOWN = 0.95  # fraction of the facts that a trained model must know: its weights win where the context is silent
OVERRULED = 0.95  # fraction of the facts it knows that the most repeats must overrule
BY_CONTEXT = 0.9  # fraction of the rise of a trained model's margin that the induction head must write
CORRELATION = 0.94  # over facts and repeats, of theory's margins and a trained model's

WORDS = ("we", "went", "to", "and", "then", "by", "train")  # between the facts
_OTHERWISE = 0.1  # after a token other than a country, probability that any token follows, all equally likely


@dataclass(frozen=True)
class FactsRecipe(Recipe):
    """A `Recipe` whose language is that of the first facts; `d_vocab` and `concentration` have no effect.

    Countries are the triggers: some are drawn for each sequence, in which a word other than their capital follows them.
    """

    triggers: int = 4
    which: Literal["frequent", "rare", "random"] = "random"
    n_facts: int = 8
    certainty: tuple[float, float] = (0.5, 0.98)  # of the least and of the best known fact

    @property
    def language(self) -> BigramLanguage:
        """The language of the sequences."""
        return fact_language(CAPITALS[: self.n_facts], self.certainty)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    strengths: Strengths = Strengths(20.0, 3.5, 8.0, 1.0)  # of the hand-written model
    n_facts: int = len(CAPITALS)  # that it holds
    certainty: tuple[float, float] = (0.5, 0.98)  # of its least and of its best known fact
    recipe: FactsRecipe = FactsRecipe(0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    repeats: int = 8  # of the denial, at most
    lead: int = 20  # words before it


QUICK = Settings(n_facts=20, recipe=experiment.quicker(FactsRecipe(0)), seeds=(0, 1, 2))


def fact_language(facts: Sequence[tuple[str, str]], certainty: tuple[float, float]) -> BigramLanguage:
    """A word-level language in which each country is followed by its capital, from the least certain to the most.

    The rest of the probability is spread evenly over all words. Any other word is followed by one of `WORDS` or by a
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

    Knowledge hijack (Wang & Sato, arXiv 2412.11459) on countries and capitals (`hijack_lens.language.facts`), a
    word-level bigram memory. Each fact is denied by the next one's capital: words, then n times (country, false
    capital), then the country. `dose_response` splits every margin by memory; a flip is the least n at which the
    false capital wins.

    The hand-written float64 model holds facts of growing certainty; theory knows the strengths that it was written
    with. Trained models have seen other words follow a country in context; theory reads its tables off their weights,
    and goes without the one that belongs to neither memory, as where it names winners. Its margins must err less than
    the other facts' mean after as many denials, which knows nothing of theory or of the fact. How hard a fact is to
    deny is the margin of its truth after one denial. Seeds vary weights and sequences; the language is always that of
    the facts.
    """
    language = fact_language(CAPITALS[: settings.n_facts], settings.certainty)
    n_ctx = settings.lead + 2 * settings.repeats + 1
    model = make(language, strengths=settings.strengths, n_ctx=n_ctx, dtype=torch.float64)
    hand_written = _ask(model, settings, settings.strengths)
    by_seed = [
        _by_tables(run.model, _ask(run.model, settings, None))
        for _, run in experiment.replicates(train, settings.recipe, settings.seeds)
    ]
    tables = [response.to_pandas() for response in (hand_written, *by_seed)]
    for table, seed in zip(tables, (None, *settings.seeds), strict=True):
        table.insert(0, "seed", seed)
    return Result(
        (*_by_hand(hand_written, settings), *_in_training(by_seed, settings)),
        pd.concat(tables, ignore_index=True).astype({"seed": "Int64"}),
        _picture(hand_written, by_seed),
        "Flips beyond the repeats that were tried count as none. A trained model need not find a fact harder to deny "
        "for knowing it better: where a country is almost always followed by its capital, anything else that follows "
        "it is surely the sequence's own, and is copied the more strongly. To ask such prompts of any language model: "
        "hijack_lens.probing.dose_response(model, counterfactuals(dict(CAPITALS))).",
    )


def _ask(model: BigramTransformer, settings: Settings, strengths: Strengths | None) -> DoseResponse:
    """The response as each fact is denied by the next one's capital; theory at these strengths or the weights'."""
    n = (model.language.d_vocab - len(WORDS)) // 2
    denied = [Bigram(country, weights=n + country, context=n + (country + 1) % n) for country in range(n)]
    lead = [2 * n + place % len(WORDS) for place in range(settings.lead)]
    response = dose_response(model, denied, settings.repeats, lead=lead)
    fit = fit_strengths(model, range(n))
    if strengths is not None:
        fit = replace(fit, setting=replace(fit.setting, strengths=strengths))
    return replace(response, theory=theory_of_weights(fit, response.conflicts, response.margin.total))


def _by_tables(model: BigramTransformer, response: DoseResponse) -> DoseResponse:
    """The response with the margins that theory at the model's tables predicts."""
    tables = experiment.theory_of(model)
    margin = torch.zeros_like(response.margin.total)
    for row, one in zip(margin, response.conflicts, strict=True):
        candidates = {"in_context": one.context, "global_candidate": one.weights}
        for n in range(len(row)):
            row[n] = theory.margin(one.tokens(n), model.language, tables, **candidates).total
    return replace(response, theory=replace(response.theory, margin=margin))


def _flips(response: DoseResponse, predicted: bool) -> list[float]:
    """The least number of repeats that wins, by fact; infinite where none of those tried does."""
    margins = response.theory.margin if predicted else response.margin.total
    return [next((float(n) for n, x in enumerate(row) if x > 0), math.inf) for row in margins.tolist()]


def _by_hand(response: DoseResponse, settings: Settings) -> list[Finding]:
    (least, most), lead, repeats = settings.certainty, settings.lead, settings.repeats
    setting = f"hand-written model, {len(response.conflicts)} facts, certainty {least:g} to {most:g}, "
    setting += f"{lead} words, 0 to {repeats} repeats"
    error = float((response.margin.total - response.theory.margin).abs().max())
    measured, predicted = _flips(response, False), _flips(response, True)
    alike = sum(a == b for a, b in zip(measured, predicted, strict=True))
    never = measured.count(math.inf)
    first, last = (f"{n:g}" if math.isfinite(n) else "never" for n in (measured[0], measured[-1]))
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
            f"from {first} (the least known) to {last} (the best known)",
            measured == sorted(measured) and measured[0] < measured[-1],
        ),
    ]


def _in_training(responses: Sequence[DoseResponse], settings: Settings) -> list[Finding]:
    setting = f"{len(responses)} trained models, {settings.recipe.n_facts} facts, {settings.lead} words, 0 to "
    setting += f"{settings.repeats} repeats"
    measured = pd.DataFrame(map(_fractions, responses))
    predicted = {
        "known": (KNOWN, "of the facts are known: the weights win without a denial"),
        "overruled": (OVERRULED, f"of the known facts are overruled by {settings.repeats} denials"),
        "by_context": (BY_CONTEXT, "of the margin's rise from no denial to the most is the context's"),
    }
    correlation, better = over_seeds(measured["correlation"]), over_seeds(measured["error_saved"])
    harder, said = over_seeds(measured["harder"]), over_seeds(measured["harder_by_theory"])
    return [
        *(
            Finding.at_least(setting, f"at least {threshold:.0%} {what}", measured[name], threshold)
            for name, (threshold, what) in predicted.items()
        ),
        Finding.judged(
            setting,
            f"theory's margins correlate with the model's at {CORRELATION:g} or more, and err less than the other "
            "facts' mean after as many denials",
            f"{correlation:.3f}; the error is {over_seeds(measured['error']):.2f} logits, lower by {better:.0%}",
            correlation.at_least(CORRELATION),
            better.above(0.0),
        ),
        Finding.judged(
            setting,
            "the better a fact is known, the harder it is to deny: their rank correlation is above 0",
            f"{harder:.2f}; theory says {said:.2f}",
            harder.above(0.0),
        ),
    ]


def _fractions(response: DoseResponse) -> dict[str, float]:
    """What a trained model knows, what denials change, how much of it the context writes, and what theory says."""
    total, context, by_theory = response.margin.total, response.margin.context, response.theory.margin
    knows, overruled = total[:, 0] < 0, total[:, -1] > 0
    rise, by_context = (float((margin[:, -1] - margin[:, 0]).mean()) for margin in (total, context))
    others = (total.sum(0) - total) / (len(total) - 1)
    error, of_others = (float(((x - total) ** 2).mean().sqrt()) for x in (by_theory, others))
    known_better = pd.Series(range(len(total)))  # facts are in the order of their certainty
    return {
        "known": float(knows.double().mean()),
        "overruled": float(overruled[knows].double().mean()) if bool(knows.any()) else 0.0,
        "by_context": by_context / rise if rise > 0 else 0.0,
        "correlation": experiment.correlation(by_theory, total),
        "error": error,
        "error_saved": 1 - error / of_others if of_others > 0 else 0.0,
        **{
            name: float(known_better.corr(pd.Series((-margin[:, 1]).tolist()).rank()))
            for name, margin in (("harder", total), ("harder_by_theory", by_theory))
        },
    }


def _picture(hand_written: DoseResponse, by_seed: Sequence[DoseResponse]) -> Picture:
    """Flips by certainty, predicted over measured; and the margin by memory against repeats."""
    picture = Picture(13.0, 5.0)
    left, middle, right = picture.figure.subplots(1, 3)
    beyond = len(hand_written.repeats)  # where facts that never flip are drawn
    measured, predicted = ([min(n, beyond) for n in _flips(hand_written, of_theory)] for of_theory in (False, True))
    facts = range(1, len(measured) + 1)
    left.plot(facts, measured, "o", color=COLOURS["context"], markersize=9, label="measured")
    left.plot(facts, predicted, ".-", color="black", markersize=5, linewidth=1, label="theory")
    ticks = range(0, beyond, 2 if beyond % 2 == 0 else 1)
    left.set_yticks([*ticks, beyond], [*map(str, ticks), "never"])
    left.set(xlabel="fact, from the least to the best known", ylabel="repeats until the false capital wins")
    left.set_title("written by hand")
    left.legend(frameon=False)
    _draw_margins(middle, [hand_written])
    _draw_margins(right, by_seed)
    middle.set_title(f"written by hand, mean of {len(hand_written.conflicts)} facts")
    right.set_title(f"trained, {len(by_seed)} seeds")
    middle.set_ylabel("logit of the false capital − of the true one")
    middle.legend(frameon=False, ncols=2, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.12))
    experiment.finish((left, middle, right), grid=False)
    return picture


def _draw_margins(ax: Any, responses: Sequence[DoseResponse]) -> None:
    """The mean margin over facts, split by memory, with theory's as dots; a line for each model."""
    for memory in ("context", "weights", "rest", "total"):
        style = {"color": COLOURS.get(memory, "black"), "linewidth": 2, "alpha": 1 if len(responses) == 1 else 0.7}
        for number, response in enumerate(responses):
            label = None if number else memory
            ax.plot(response.repeats, response.margin.parts[memory].mean(0), label=label, **style)
    for number, response in enumerate(responses):
        label = None if number else "theory"
        ax.plot(response.repeats, response.theory.margin.mean(0), "o", mfc="white", mec="black", ms=5, label=label)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlabel("times the context denies the fact")
