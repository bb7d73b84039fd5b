"""Claim: strengths read off the weights predict which memory wins, prompt by prompt."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hijack_lens.attribution import attribute
from hijack_lens.models import BigramTransformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Finding, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import Picture
from hijack_lens.training import fit_strengths
from hijack_lens.training.fit import agreement_on, conflict_prompts

STATEMENT = (
    "Four strengths read off a trained model's weights predict which memory wins a conflict: on prompts never asked "
    "before, with calibrated confidence, and better than a regression on the prompts' counts."
)
SOURCE = "beyond the papers; the theory is that of Wang & Sato, arXiv 2412.11459"

AGREEMENT = 0.95  # of predicted and measured winners, as a fraction of held-out prompts
CALIBRATION_ERROR = 0.1  # the most allowed, expected between a predicted probability and how often the context wins
BINS = 5  # of predicted probability, equally wide: with more, each holds few prompts, and chance alone makes an error

LONGER = Recipe(0, fixed=False, length=96, steps=300, evaluate_every=300)  # random triggers in longer sequences

_COUNTS = ["n_qc", "n_qg", "n_c", "n_g", "log_ratio"]
_RIDGE = 1e-3  # on standardised inputs: without it, separable prompts have no best weights
_AT_ONCE = 50  # prompts that are attributed together
_PREDICTORS = {"theory": "#0072B2", "counts": "#D55E00"}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    recipe: Recipe = LONGER
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    lengths: tuple[int, ...] = (48, 96)  # of the prompts
    n_prompts: int = 600  # for each model and length; every other one is held out


QUICK = Settings(RANDOM_TRIGGERS, (0, 1, 2), (32,), 300)


def winner_prediction(settings: Settings = Settings(), train: Train = trained) -> Result:
    """Theory at fitted strengths names the winner of conflict prompts, with calibrated confidence.

    Models are trained with random triggers, so that either memory may win after any token. Prompts hold 0 to 6 repeats.
    `fit_strengths` reads strengths off the weights; theory's margin (Wang & Sato, arXiv 2412.11459) names the winner,
    with nothing fitted to prompts. Half of the prompts then serve to fit one scale a >= 0, for
    P(context wins) = sigmoid(a * margin); and all weights of the baseline, a logistic regression of the winner on the
    counts n_qc, n_qg, n_c, n_g and the weights' log-ratio log(pi_b(g|q) / pi_b(c|q)). The other half is held out.

    Calibration alone takes no knowledge, since the frequency of wins, a constant probability, is calibrated; so the
    Brier score is compared with that constant's. The note says where theory misses winners: how many are named by the
    context and weights of `attribute`, which have the model's own attention and copies, and lack only the rest.
    """
    rows, answers = [], []
    for seed, run in experiment.replicates(train, settings.recipe, settings.seeds):
        for length in settings.lengths:
            held_out = _predicted(_ask(run.model, length, settings.n_prompts, seed))
            rows.append({"seed": seed, "length": length, **_scores(held_out)})
            answers.append(held_out)
    table = pd.DataFrame(rows)
    findings = [finding for _, part in table.groupby("length", sort=False) for finding in _findings(part, settings)]
    return Result(tuple(findings), table, _picture(table, pd.concat(answers)), _note(table))


def _scores(held_out: pd.DataFrame) -> dict[str, float]:
    """How good the predictions are on one model's held-out prompts of one length."""
    won = held_out["won"]
    guesses = {
        "theory": held_out["predicted"] > 0,
        "counts": held_out["counts"] > 0.5,
        "both_memories": held_out["both_memories"] > 0,
    }
    right = {f"{name}_accuracy": (guess == won).mean() for name, guess in guesses.items()}
    off = {f"{name}_calibration_error": calibration_error(*_tensors(held_out, name, "won")) for name in _PREDICTORS}
    return {"context_wins": won.mean(), **right, **off, "theory_skill": _skill(held_out["theory"], won)}


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
    for side, (name, colour) in zip((-0.19, 0.19), _PREDICTORS.items(), strict=True):
        left.bar(places + side, table[f"{name}_accuracy"], 0.36, color=colour, label=labels[name])
        bins = _binned(*_tensors(answers, name, "won"))
        right.plot(*torch.tensor([(p.mean(), w.double().mean()) for p, w in bins]).T, "o-", color=colour)
    left.axhline(AGREEMENT, color="black", linestyle="--", linewidth=1, label=f"{AGREEMENT:.0%} of the winners")
    left.set(xlabel="trained model and length of prompts", ylabel="winners named, fraction of held-out prompts")
    left.set_ylim(0.0, 1.0)
    right.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    right.annotate("calibrated", (0.12, 0.16), rotation=45, rotation_mode="anchor", fontsize=9)
    right.set(xlabel="predicted probability that the context wins", ylabel="how often it does")
    picture.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    experiment.finish((left, right), grid=False)
    left.set_xticks(places, names, fontsize=8 if len(names) < 6 else 6)
    return picture
