"""Claim: the memories' tables, read off the weights, predict which memory wins, prompt by prompt."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hijack_lens.models import BigramTransformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import Picture
from hijack_lens.theory.tables import TERMS
from hijack_lens.training import fit_strengths, read_tables
from hijack_lens.training.fit import agreement_on, conflict_prompts

STATEMENT = (
    "The two memories, as tables read off a trained model's weights, predict which of them wins a conflict: on prompts "
    "never asked before, with calibrated confidence, and better than what knows of the prompts' counts alone."
)
SOURCE = "beyond the papers; the theory is that of Wang & Sato, arXiv 2412.11459, token by token"

AGREEMENT = 0.95  # of predicted and measured winners, as a fraction of held-out prompts
CORRELATION = 0.94  # of predicted and measured margins
CALIBRATION_ERROR = 0.1  # the most allowed, expected between a predicted probability and how often the context wins
BINS = 5  # of predicted probability, equally wide: with more, each holds few prompts, and chance alone makes an error

LONGER = Recipe(0, which="random", length=96)  # random triggers in longer sequences

_COUNTS = ["n_qc", "n_qg", "n_c", "n_g", "log_ratio"]
_RIDGE = 1e-3  # on standardised inputs: without it, separable prompts have no best weights
_CALIBRATED = ("theory", "counts")  # predictors that give probabilities
_BARS = {  # what each predictor is called, and its colour
    "theory": ("two memories, tables from the weights", "#0072B2"),
    "strengths": ("two memories, four strengths from the weights", "#56B4E9"),
    "counts": ("logistic regression on counts", "#D55E00"),
    "rule": ("the context, once it has spoken", "#999999"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    recipes: tuple[Recipe, ...] = (LONGER, replace(LONGER, which="frequent"))
    seeds: tuple[int, ...] = tuple(range(10, 20))  # of the trained models
    lengths: tuple[int, ...] = (32, 48, 96)  # of the prompts
    n_prompts: int = 600  # for each model and length; every other one is held out


_SHORT = experiment.quicker(RANDOM_TRIGGERS)
QUICK = Settings((_SHORT, replace(_SHORT, which="frequent")), (0, 1, 2), (32,), 300)


def winner_prediction(settings: Settings = Settings(), train: Train = trained) -> Result:
    """Theory at a trained model's tables names the winner of conflict prompts, with calibrated confidence.

    Models are trained with random triggers, so that either memory may win after any token, and with fixed ones. Prompts
    hold 0 to 6 repeats. `read_tables` reads the theory's tables off the weights. All of them would be the model itself;
    so theory does without the one that belongs to neither memory, what the previous-token head writes past the
    induction head. Its margin (Wang & Sato, arXiv 2412.11459, token by token) names the winner, with nothing fitted to
    prompts. Half of the prompts then serve to fit one scale a >= 0, for P(context wins) = sigmoid(a * margin); and all
    weights of a baseline, a logistic regression of the winner on the counts n_qc, n_qg, n_c, n_g and the true bigrams'
    log-ratio log(pi_b(g|q) / pi_b(c|q)). The other half is held out. A second baseline is a rule: the context wins once
    it has spoken, n_qc > 0. Theory must name more winners than the better of the two, for each model.

    Calibration alone takes no knowledge, since the frequency of wins, a constant probability, is calibrated; so the
    Brier score is compared with that constant's. The table also has the winners that four strengths name
    (`fit_strengths`), and that theory names without any single term: what each table is worth.
    """
    rows, answers = [], []
    for recipe in settings.recipes:
        for seed, run in experiment.replicates(train, recipe, settings.seeds):
            for length in settings.lengths:
                held_out = _predicted(_ask(run.model, length, settings.n_prompts, seed))
                kind = "random" if recipe.which == "random" else "fixed"
                rows.append({"triggers": kind, "seed": seed, "length": length, **_scores(held_out)})
                answers.append(held_out)
    table = pd.DataFrame(rows)
    findings = [
        finding
        for _, part in table.groupby(["triggers", "length"], sort=False)
        for finding in _findings(part, settings)
    ]
    return Result(tuple(findings), table, _picture(table, pd.concat(answers)), _note(table))


def _scores(held_out: pd.DataFrame) -> dict[str, float]:
    """How good the predictions are on one model's held-out prompts of one length."""
    won = held_out["won"]
    guesses = {
        "theory": held_out["predicted"] > 0,
        "strengths": held_out["by_strengths"] > 0,
        "counts": held_out["counts"] > 0.5,
        "rule": held_out["n_qc"] > 0,
        **{f"without_{term}": held_out[f"without_{term}"] > 0 for term in TERMS},
    }
    right = {f"{name}_accuracy": (guess == won).mean() for name, guess in guesses.items()}
    off = {f"{name}_calibration_error": calibration_error(*_tensors(held_out, name, "won")) for name in _CALIBRATED}
    correlation = held_out["predicted"].corr(held_out["measured"])
    return {
        "context_wins": won.mean(),
        **right,
        "margin_correlation": correlation,
        **off,
        "theory_skill": _skill(held_out["theory"], won),
    }


def _tensors(table: pd.DataFrame, *columns: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(table[column].to_numpy()) for column in columns)


def calibration_error(probability: Float[Tensor, "prompt"], won: Bool[Tensor, "prompt"]) -> float:
    """The expected calibration error: |mean probability - frequency| by bin, weighted by prompts."""
    return float(sum(len(p) / len(won) * abs(p.mean() - w.double().mean()) for p, w in _binned(probability, won)))


def _skill(probability: pd.Series, won: pd.Series) -> float:
    """The fraction by which the Brier score is below the constant frequency's; NaN where one memory always wins."""
    spread = float(won.mean() * (1 - won.mean()))
    return 1 - float(((probability - won) ** 2).mean()) / spread if spread > 0 else math.nan


def _binned(probability: Tensor, won: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The prompts in each bin of predicted probability that has any."""
    number = (probability * BINS).long().clamp(0, BINS - 1)
    return [(probability[number == i], won[number == i]) for i in number.unique()]


@torch.no_grad()
def _ask(model: BigramTransformer, length: int, n_prompts: int, seed: int) -> pd.DataFrame:
    """A row per prompt: counts, the margin by theory, with tables left out and by strengths, and the model's."""
    fit, tables, language = fit_strengths(model), read_tables(model), model.language
    prompts = conflict_prompts(language, fit.setting.triggers, n_prompts, length, seed)
    rows: list[tuple[float, ...]] = []
    for prompt in prompts:
        q, c, g = prompt.trigger, prompt.in_context, prompt.global_candidate
        after = prompt.tokens[1:][prompt.tokens[:-1] == q]
        counts = [float((tokens == v).sum()) for tokens in (after, prompt.tokens) for v in (c, g)]
        rows.append((*counts, float(language.log_pi_b[q, g] - language.log_pi_b[q, c])))
    agreement = agreement_on(model, fit, prompts).table
    by_tables = {
        f"without_{term}": experiment.predicted_margins(prompts, tables.without(term)).numpy() for term in TERMS
    }
    return pd.DataFrame(rows, columns=_COUNTS).assign(
        predicted=by_tables[f"without_{experiment.PAST_THE_CIRCUIT}"],
        by_strengths=agreement["theory_margin"],
        measured=agreement["model_margin"],
        **by_tables,
    )


def _predicted(asked: pd.DataFrame) -> pd.DataFrame:
    """The held-out prompts: whether the context "won", and how probable that is by "theory" and by "counts"."""
    held_out = np.arange(len(asked)) % 2 == 1
    fitted = torch.tensor(~held_out)
    won = torch.tensor((asked["measured"] > 0).to_numpy())
    margin = torch.tensor(asked[["predicted"]].to_numpy())
    counts = _standardised(torch.tensor(asked[_COUNTS].to_numpy(float)), fitted)
    by_margin, by_counts = (_logistic(x[fitted], won[fitted]) for x in (margin, counts))
    # A margin that predicts the opposite says nothing. The loss is convex: the best scale of at least 0 is then 0.
    by_margin.clamp_(min=0)
    rows = asked.assign(won=won, theory=(margin @ by_margin).sigmoid(), counts=(counts @ by_counts).sigmoid())
    return rows[held_out]


def _standardised(x: Float[Tensor, "prompt input"], fitted: Bool[Tensor, "prompt"]) -> Float[Tensor, "prompt column"]:
    """Inputs in units of their spread over the fitted prompts, and a column of ones."""
    spread = x[fitted].std(0)
    scaled = (x - x[fitted].mean(0)) / torch.where(spread > 0, spread, 1.0)
    return torch.cat([scaled, torch.ones_like(x[:, :1])], 1)


def _logistic(x: Float[Tensor, "prompt input"], won: Bool[Tensor, "prompt"]) -> Float[Tensor, "input"]:
    """The weights of a logistic regression without intercept: P(context wins) = sigmoid(x @ weights)."""
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, won.to(x))
        total = error + _RIDGE * (weights**2).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    kind, length = table["triggers"].iloc[0], table["length"].iloc[0]
    recipe = next(one for one in settings.recipes if (one.which == "random") == (kind == "random"))
    setting = f"{len(table)} trained models, {kind} triggers, sequences of {recipe.length} tokens; "
    setting += f"{settings.n_prompts // 2} held-out prompts of {length} tokens for each"

    base_rate = 0.5 + (table["context_wins"] - 0.5).abs()
    named = over_seeds(table["theory_accuracy"])
    counts, rule = (table[f"{name}_accuracy"] for name in ("counts", "rule"))
    ahead = over_seeds(table["theory_accuracy"] - np.maximum(counts, rule))
    off, skill = over_seeds(table["theory_calibration_error"]), over_seeds(table["theory_skill"])
    return (
        Finding.judged(
            setting,
            f"theory names at least {AGREEMENT:.0%} of the winners",
            f"{named:.1%}; the more frequent winner alone would name {over_seeds(base_rate):.1%}",
            named.at_least(AGREEMENT),
        ),
        Finding.judged(
            setting,
            "theory names more winners than a logistic regression on counts and than the rule that the context wins "
            "once it has spoken, whichever is better",
            f"by {ahead:.1%} of the prompts; the regression names {over_seeds(counts):.1%}, the rule "
            f"{over_seeds(rule):.1%}",
            ahead.above(0.0),
        ),
        Finding.at_least(
            setting,
            f"theory's margins and the model's correlate at {CORRELATION:g} or more",
            table["margin_correlation"],
            CORRELATION,
            ".3f",
        ),
        Finding.judged(
            setting,
            f"theory's expected calibration error is at most {CALIBRATION_ERROR:g}, and its Brier score below that of "
            "the winners' frequency",
            f"{off:.3f}, the regression's {over_seeds(table['counts_calibration_error']):.3f}; Brier score lower by "
            f"{skill:.0%}",
            off.at_most(CALIBRATION_ERROR),
            skill.above(0.0),
        ),
    )


def _note(table: pd.DataFrame) -> str:
    named = {term: table[f"without_{term}_accuracy"].mean() for term in TERMS}
    worth = ", ".join(f"{term} {share:.1%}" for term, share in sorted(named.items(), key=lambda item: item[1]))
    return (
        "All tables together are the model, and name every winner. Winners that are named without one of them: "
        f"{worth}. Four strengths, the same for all tokens, name {table['strengths_accuracy'].mean():.1%}."
    )


def _picture(table: pd.DataFrame, answers: pd.DataFrame) -> Picture:
    """Winners named by theory and by all that it is compared with, with 95% intervals; and reliability diagrams."""
    picture = Picture(12.0, 4.8)
    left, right = picture.figure.subplots(1, 2, width_ratios=(1.6, 1))
    cases = [
        (f"{kind}\n{length} tokens", part) for (kind, length), part in table.groupby(["triggers", "length"], sort=False)
    ]
    for place, (name, (label, colour)) in enumerate(_BARS.items()):
        found = [over_seeds(part[f"{name}_accuracy"]) for _, part in cases]
        at = [case + 0.2 * (place - 1.5) for case in range(len(cases))]
        experiment.bars(left, at, found, 0.19, color=colour, label=label)
    for name in _CALIBRATED:
        bins = _binned(*_tensors(answers, name, "won"))
        right.plot(*torch.tensor([(p.mean(), w.double().mean()) for p, w in bins]).T, "o-", color=_BARS[name][1])
    left.axhline(AGREEMENT, color="black", linestyle="--", linewidth=1, label=f"{AGREEMENT:.0%} of the winners")
    left.set(xlabel="triggers, and length of prompts", ylabel="winners named, fraction of held-out prompts")
    left.set_ylim(0.0, 1.05)
    right.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    right.annotate("calibrated", (0.12, 0.16), rotation=45, rotation_mode="anchor", fontsize=9)
    right.set(xlabel="predicted probability that the context wins", ylabel="how often it does")
    picture.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    experiment.finish((left, right), grid=False)
    left.set_xticks(np.arange(len(cases)), [name for name, _ in cases], fontsize=8)
    return picture
