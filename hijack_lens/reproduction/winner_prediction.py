"""Claim: strengths read off the weights predict which memory wins, prompt by prompt."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.attribution.logits import attribute
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Finding, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import Picture
from hijack_lens.training.fit import agreement_on, conflict_prompts, fit_strengths

STATEMENT = (
    "Four strengths read off a trained model's weights predict which memory wins a conflict: on prompts never asked "
    "before, with calibrated confidence, and better than a regression on the prompts' counts."
)
SOURCE = "beyond the papers; the theory is that of Wang & Sato, arXiv 2412.11459"

AGREEMENT = 0.95
"""Of predicted and measured winners, as a fraction of held-out prompts."""
CALIBRATION_ERROR = 0.1
"""At most, expected: between a predicted probability and how often the context wins."""
BINS = 5
"""Of predicted probability, equally wide: with more, few prompts are in each, and chance alone makes an error."""

LONGER = Recipe(0, fixed=False, length=96, steps=300, evaluate_every=300)
"""Random triggers in longer sequences."""

_COUNTS = ["n_qc", "n_qg", "n_c", "n_g", "log_ratio"]
_RIDGE = 1e-3  # on standardised inputs: without it, separable prompts have no best weights
_AT_ONCE = 50
"""Prompts that are attributed together."""
_PREDICTORS = {"theory": "#0072B2", "counts": "#D55E00"}


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        recipe: of the trained models, for all seeds.
        seeds: of these.
        lengths: of the prompts.
        n_prompts: for each model and length; every other one is held out.
    """

    recipe: Recipe = LONGER
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lengths: tuple[int, ...] = (48, 96)
    n_prompts: int = 600


QUICK = Settings(RANDOM_TRIGGERS, (0, 1, 2), (32,), 300)


def winner_prediction(settings: Settings = Settings(), train: Train = trained) -> Result:
    """Theory at fitted strengths names the winner of conflict prompts, and knows how sure it may be.

    Models are trained with random triggers, so that either memory may win after any token. Prompts hold 0 to 6 repeats.
    `fit_strengths` reads strengths off the weights; theory's margin (Wang & Sato, arXiv 2412.11459) names the winner,
    which takes no prompt at all. Half of the prompts then serve to fit: one scale a >= 0, for
    P(context wins) = sigmoid(a * margin); and all weights of the baseline, a logistic regression of the winner on the
    counts n_qc, n_qg, n_c, n_g and the weights' log-ratio log(pi_b(g|q) / pi_b(c|q)). The other half is held out.

    Holds where, for prompts of each length, by the 95% interval over seeds: theory names at least `AGREEMENT` of the
    held-out winners; it names more of them than the baseline does, seed by seed; and its expected calibration error is
    at most `CALIBRATION_ERROR`, while its Brier score is lower than that of a constant probability, the frequency: to
    be calibrated alone takes no knowledge.

    Beside it stands where theory loses winners: how many are named by what `attribute` gives context and weights, which
    has the model's own attention and copies, and lacks nothing but the rest.
    """
    rows, answers = [], []
    for seed in tqdm(settings.seeds, disable=None, unit="seed"):
        model = train(replace(settings.recipe, seed=seed)).model
        for length in settings.lengths:
            held_out = _predicted(_ask(model, length, settings.n_prompts, seed))
            right = held_out[["guess_theory", "guess_counts", "guess_both"]].eq(held_out["won"], axis=0).mean()
            won = torch.tensor(held_out["won"].to_numpy())
            off = [calibration_error(torch.tensor(held_out[name].to_numpy()), won) for name in _PREDICTORS]
            rows.append(
                (seed, length, held_out["won"].mean(), *right, *off, _skill(held_out["theory"], held_out["won"]))
            )
            answers.append(held_out)
    columns = ["seed", "length", "context_wins", "theory_accuracy", "counts_accuracy", "both_memories_accuracy"]
    table = pd.DataFrame(
        rows, columns=[*columns, *(f"{name}_calibration_error" for name in _PREDICTORS), "theory_skill"]
    )
    findings = [finding for _, part in table.groupby("length", sort=False) for finding in _findings(part, settings)]
    return Result(tuple(findings), table, _picture(table, pd.concat(answers)), _note(table))


def calibration_error(probability: Float[Tensor, "prompt"], won: Bool[Tensor, "prompt"]) -> float:
    """The expected calibration error: |mean probability - frequency| by bin, weighted by prompts."""
    return float(sum(len(p) / len(won) * abs(p.mean() - w.double().mean()) for p, w in _binned(probability, won)))


def _skill(probability: "pd.Series[float]", won: "pd.Series[bool]") -> float:
    """By how much of it the Brier score is below that of a constant, the frequency; NaN where one always wins."""
    spread = float(won.mean() * (1 - won.mean()))
    return 1 - float(((probability - won) ** 2).mean()) / spread if spread > 0 else math.nan


def _binned(probability: Tensor, won: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The prompts in each bin of predicted probability that has any."""
    number = (probability * BINS).long().clamp(0, BINS - 1)
    return [(probability[number == i], won[number == i]) for i in number.unique()]


@torch.no_grad()
def _ask(model: BigramTransformer, length: int, n_prompts: int, seed: int) -> pd.DataFrame:
    """A row per prompt: counts, theory's margin, the model's, and what the two memories add to it."""
    fit, language = fit_strengths(model), model.language
    prompts = conflict_prompts(language, fit.setting.triggers, n_prompts, length, seed)
    rows: list[tuple[float, ...]] = []
    for start in range(0, n_prompts, _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        parts = attribute(model, torch.stack([prompt.tokens for prompt in some])).by_memory()
        for prompt, logits in zip(some, parts["context"] + parts["weights"], strict=True):
            q, c, g = prompt.trigger, prompt.in_context, prompt.global_candidate
            after = prompt.tokens[1:][prompt.tokens[:-1] == q]
            counts = [float((tokens == v).sum()) for tokens in (after, prompt.tokens) for v in (c, g)]
            log_ratio = float(language.log_pi_b[q, g] - language.log_pi_b[q, c])
            rows.append((*counts, log_ratio, float(logits[c] - logits[g])))
    table = pd.DataFrame(rows, columns=[*_COUNTS, "both_memories"])
    agreement = agreement_on(model, fit, prompts).table
    return table.assign(predicted=agreement["theory_margin"], measured=agreement["model_margin"])


def _predicted(asked: pd.DataFrame) -> pd.DataFrame:
    """The held-out prompts: who won, P(context wins) by predictor ("theory", "counts"), and guesses at the winner."""
    held_out = torch.arange(len(asked)) % 2 == 1
    won = torch.tensor((asked["measured"] > 0).to_numpy())
    margin = torch.tensor(asked[["predicted"]].to_numpy())
    counts = _standardised(torch.tensor(asked[_COUNTS].to_numpy(float)), ~held_out)
    weights = [_logistic(x[~held_out], won[~held_out]) for x in (margin, counts)]
    # A margin that foretells the opposite says nothing. The loss is convex: of scales from 0 on, 0 is then the best.
    weights[0].clamp_(min=0)
    probability = [(x @ w).sigmoid() for x, w in zip((margin, counts), weights, strict=True)]
    rows = asked.assign(
        won=won.numpy(),
        theory=probability[0].numpy(),
        counts=probability[1].numpy(),
        guess_theory=asked["predicted"] > 0,
        guess_counts=(probability[1] > 0.5).numpy(),
        guess_both=asked["both_memories"] > 0,
    )
    return rows[held_out.numpy()]


def _standardised(x: Float[Tensor, "prompt input"], fitted: Bool[Tensor, "prompt"]) -> Float[Tensor, "prompt column"]:
    """Inputs in units of their spread over the prompts that are fitted to, and a column of ones."""
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
    setting = f"{len(table)} trained models, random triggers, sequences of {settings.recipe.length} tokens; "
    setting += f"{settings.n_prompts // 2} held-out prompts of {table['length'].iloc[0]} tokens for each"

    base_rate = 0.5 + (table["context_wins"] - 0.5).abs()
    named = over_seeds(table["theory_accuracy"])
    ahead = over_seeds(table["theory_accuracy"] - table["counts_accuracy"])
    off, skill = over_seeds(table["theory_calibration_error"]), over_seeds(table["theory_skill"])
    return (
        Finding(
            setting,
            f"theory names at least {AGREEMENT:.0%} of the winners",
            f"{named:.1%}; the more frequent winner alone would name {over_seeds(base_rate):.1%}",
            named.low >= AGREEMENT,
        ),
        Finding(
            setting,
            "theory names more winners than a logistic regression on counts",
            f"by {ahead:.1%} of the prompts; the regression names {over_seeds(table['counts_accuracy']):.1%}",
            ahead.low > 0,
        ),
        Finding(
            setting,
            f"theory's expected calibration error is at most {CALIBRATION_ERROR:g}, and its Brier score below that of "
            "the winners' frequency",
            f"{off:.3f}, the regression's {over_seeds(table['counts_calibration_error']):.3f}; Brier score lower by "
            f"{skill:.0%}",
            off.high <= CALIBRATION_ERROR and skill.low > 0,
        ),
    )


def _note(table: pd.DataFrame) -> str:
    by_theory, by_both = (table[f"{name}_accuracy"].mean() for name in ("theory", "both_memories"))
    return (
        f"Theory names {by_theory:.1%} of all winners; context and weights as attribution splits them, with the "
        f"model's own attention and copies, {by_both:.1%}: the difference is what four numbers leave out of the two "
        f"memories. The other {1 - by_both:.1%} are decided by attribution's rest: what the previous-token head writes "
        "past the induction head."
    )


def _picture(table: pd.DataFrame, answers: pd.DataFrame) -> Picture:
    """Accuracy by seed, theory against baseline; and reliability diagrams."""
    picture = Picture(11.0, 4.8)
    left, right = picture.figure.subplots(1, 2)
    places = np.arange(len(table))
    names = [f"seed {seed}\n{length} tokens" for seed, length in zip(table["seed"], table["length"], strict=True)]
    labels = {"theory": "theory, strengths from the weights", "counts": "logistic regression on counts"}
    for number, (name, colour) in enumerate(_PREDICTORS.items()):
        left.bar(places + 0.38 * (number - 0.5), table[f"{name}_accuracy"], 0.36, color=colour, label=labels[name])
        bins = _binned(torch.tensor(answers[name].to_numpy()), torch.tensor(answers["won"].to_numpy()))
        right.plot(
            [float(p.mean()) for p, _ in bins],
            [float(w.double().mean()) for _, w in bins],
            "o-",
            color=colour,
        )
    left.axhline(AGREEMENT, color="black", linestyle="--", linewidth=1, label=f"{AGREEMENT:.0%} of the winners")
    left.set_xticks(places, names, fontsize=8 if len(names) < 6 else 6)
    left.set_ylim(0.0, 1.0)
    left.set_xlabel("trained model and length of prompts")
    left.set_ylabel("winners named, fraction of held-out prompts")
    right.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    right.annotate("calibrated", (0.12, 0.16), rotation=45, rotation_mode="anchor", fontsize=9)
    right.set_xlabel("predicted probability that the context wins")
    right.set_ylabel("how often it does")
    picture.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return picture
