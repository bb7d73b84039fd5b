"""What the training data does to the speed of in-context learning, and to how far it generalises."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import Picture
from hijack_lens.training import TrainingRun, behaviour

STATEMENT = (
    "Few triggers, rare ones and random ones slow in-context learning down; continuations drawn from the bigrams make "
    "it fail on others, uniform ones do not; and a model trained on fixed triggers overlooks the rest."
)
SOURCE = (
    "Bietti et al., arXiv 2306.00802, section 5, figure 4 (left, centre), and section 4 (fixed and random triggers)"
)

LEARNED = 0.9  # in-context accuracy that counts as learned
COST = 1.5  # uniform continuations may take at most this many times the steps that bigram-drawn ones take

_ACCURACY = "in_context_accuracy"
_BASE, _FEW, _RARE = "fixed triggers, uniform", "fewer triggers", "rare triggers"
_RANDOM, _BIGRAM = "random triggers", "bigram-drawn"
_LINES = {
    _BASE: ("#000000", "-"),
    _FEW: ("#E69F00", "--"),
    _RARE: ("#009E73", (0, (5, 1))),
    _RANDOM: ("#0072B2", "-."),
    _BIGRAM: ("#D55E00", ":"),
}


@dataclass(frozen=True)
class Settings:
    """What is trained, and what it is asked."""

    d_vocab: int = 16  # tokens in the language
    triggers: int = 4
    few: int = 1  # triggers of the models that have fewer
    d_model: int = 48
    length: int = 32  # of the sequences
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the models of each kind
    n_sequences: int = 256  # to ask each model on, with triggers other than those of training

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe for each kind of data, the same for all seeds."""
        data: dict[str, Any] = {"d_vocab": self.d_vocab, "triggers": self.triggers, "length": self.length}
        base = Recipe(0, **data, d_model=self.d_model, steps=self.steps, lr=experiment.COUNTED_LR, evaluate_every=10)
        return {
            _BASE: base,
            _FEW: replace(base, triggers=self.few),
            _RARE: replace(base, which="rare"),
            _RANDOM: replace(base, which="random"),
            _BIGRAM: replace(base, continuations="bigram"),
        }


QUICK = Settings(d_vocab=12, d_model=32, length=24, steps=300, seeds=(0, 1, 2))


def data_matters(settings: Settings = Settings(), train: Train = trained) -> Result:
    """How soon models trained on different data learn the in-context task, and where they can do it.

    Bietti et al. 2023 (arXiv 2306.00802, section 5, figure 4). Speed is the step of the first evaluation with an
    in-context accuracy of `LEARNED` on held-out sequences of the training distribution; a model that never reaches it
    counts as reaching it one step after the last. Models trained on uniform and on bigram-drawn continuations are asked
    on both. The match memory of models with fixed triggers needs no other keys (section 4; the paper does not test it):
    they are asked on other triggers too. Differences and ratios are between models of the same seed.
    """
    if 2 * settings.triggers > settings.d_vocab:
        raise ValueError(
            f"d_vocab must be at least twice the number of triggers, {settings.triggers}, got {settings.d_vocab}"
        )
    rows, curves = [], []
    for kind, recipe in settings.recipes.items():
        for seed, run in experiment.replicates(train, recipe, settings.seeds, kind):
            rows.append({"data": kind, "seed": seed, **_measured(settings, run, replace(recipe, seed=seed))})
            curves.append(run.probe(_ACCURACY).reset_index().assign(data=kind, seed=seed))
    table = pd.DataFrame(rows)
    by_kind = table.set_index(["data", "seed"])
    return Result(_findings(by_kind, settings), table, _picture(pd.concat(curves), by_kind))


def _measured(settings: Settings, run: TrainingRun, recipe: Recipe) -> dict[str, float]:
    """Steps to `LEARNED`, and final in-context accuracies."""
    curve = run.probe(_ACCURACY)
    reached = curve.index[curve >= LEARNED]
    others = range(settings.triggers, 2 * settings.triggers)
    drawn: dict[str, Any] = {"continuations": recipe.continuations, "seed": recipe.seed}
    unseen = recipe.language.sample(settings.n_sequences, recipe.length, others, **drawn)
    return {
        "steps": float(reached[0] if len(reached) else curve.index[-1] + 1),
        "own": curve.iloc[-1],
        "uniform": run.probe(_ACCURACY, continuations="uniform").iloc[-1],
        "bigram": run.probe(_ACCURACY, continuations="bigram").iloc[-1],
        "other_triggers": behaviour(run.model, unseen)[_ACCURACY],
        "without_order": experiment.without_order(recipe),
    }


def _findings(by_kind: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    steps, uniform, bigram = by_kind["steps"], by_kind["uniform"], by_kind["bigram"]
    own, others = by_kind["own"], by_kind["other_triggers"]
    took = {kind: f"{over_seeds(steps[kind]):.0f}" for kind in _LINES}
    fewer, rare, random = (over_seeds(steps[kind] - steps[_BASE]) for kind in (_FEW, _RARE, _RANDOM))
    guessed = {
        kind: f"guessing without order: {over_seeds(by_kind.loc[kind, 'without_order']):.2f}"
        for kind in (_BASE, _BIGRAM)
    }
    dropped = over_seeds(bigram[_BIGRAM] - uniform[_BIGRAM])
    ratio = over_seeds(steps[_BASE] / steps[_BIGRAM])
    lost, behind = (over_seeds(better - others[_BASE]) for better in (own[_BASE], others[_RANDOM]))
    setting = f"{len(settings.seeds)} models of each kind, {settings.d_vocab} tokens, {settings.steps} steps"
    return (
        Finding.judged(
            f"{settings.few} against {settings.triggers} fixed triggers; {setting}",
            f"fewer triggers take more steps to in-context accuracy {LEARNED}",
            f"{took[_FEW]} against {took[_BASE]}: {fewer:+.0f}",
            fewer.above(0.0),
        ),
        Finding.judged(
            f"the rarest against the most frequent tokens as {settings.triggers} fixed triggers; {setting}",
            f"rare triggers take more steps to in-context accuracy {LEARNED}",
            f"{took[_RARE]} against {took[_BASE]}: {rare:+.0f}",
            rare.above(0.0),
        ),
        Finding.judged(
            f"random against fixed triggers; {setting}",
            f"random triggers take more steps to in-context accuracy {LEARNED}",
            f"{took[_RANDOM]} against {took[_BASE]}: {random:+.0f}",
            random.above(0.0),
        ),
        Finding.judged(
            f"trained on bigram-drawn continuations; {setting}",
            f"in-context accuracy is at least {LEARNED} on bigram-drawn ones at every seed, and lower on uniform ones",
            f"at least {bigram[_BIGRAM].min():.2f} ({guessed[_BIGRAM]}); "
            f"{over_seeds(uniform[_BIGRAM]):.2f} on uniform ones, lower by {dropped:.2f}",
            bool(bigram[_BIGRAM].min() >= LEARNED),
            dropped.above(0.0),
        ),
        Finding(
            f"trained on uniform continuations; {setting}",
            f"in-context accuracy is at least {LEARNED} on uniform and on bigram-drawn ones, at every seed",
            f"at least {uniform[_BASE].min():.2f} and {bigram[_BASE].min():.2f} ({guessed[_BASE]})",
            bool(min(uniform[_BASE].min(), bigram[_BASE].min()) >= LEARNED),
        ),
        Finding.judged(
            f"uniform against bigram-drawn continuations; {setting}",
            f"uniform ones are learned at every seed, in at most {COST} times the steps",
            f"{took[_BASE]} against {took[_BIGRAM]}: {ratio:.2f} times",
            bool((steps[_BASE] <= settings.steps).all()),
            ratio.at_most(COST),
        ),
        Finding.judged(
            f"asked on triggers other than the fixed ones; {setting}",
            "models with fixed triggers are less accurate than on their own, and than models with random triggers",
            f"{over_seeds(others[_BASE]):.2f}: {lost:.2f} lower than on their own, "
            f"{behind:.2f} lower than models with random triggers",
            lost.above(0.0),
            behind.above(0.0),
        ),
    )


def _picture(curves: pd.DataFrame, by_kind: pd.DataFrame) -> Picture:
    """In-context accuracy over training, and at its end on data that models were not trained on."""
    picture = Picture(14.0, 5.0)
    left, right = picture.figure.subplots(1, 2, width_ratios=(1, 1.15))
    for kind, (colour, style) in _LINES.items():
        thick = {"color": colour, "linestyle": style, "linewidth": 3, "label": kind}
        of_kind = curves[curves["data"] == kind]
        experiment.draw_by_seed(left, of_kind, "step", _ACCURACY, {"linewidth": 0.8, "alpha": 0.35}, **thick)
    left.axhline(LEARNED, color="#999999", linewidth=1)
    left.set(title="how soon", xlabel="training step", ylabel="in-context accuracy")
    left.legend(frameon=False, fontsize=12, loc="lower right")

    bars = (
        (_BASE, "uniform", "bigram", "uniform\ncontinuations", "bigram-drawn"),
        (_BIGRAM, "bigram", "uniform", "bigram-drawn\ncontinuations", "uniform"),
        (_BASE, "own", "other_triggers", "fixed\ntriggers", "other triggers"),
        (_FEW, "own", "other_triggers", "fewer\ntriggers", "other triggers"),
        (_RARE, "own", "other_triggers", "rare\ntriggers", "other triggers"),
        (_RANDOM, "own", "other_triggers", "random\ntriggers", "other triggers"),
    )
    for place, (kind, own, other, _, asked) in enumerate(bars):
        for x, column, colour in ((place - 0.2, own, "#999999"), (place + 0.2, other, _LINES[kind][0])):
            values = by_kind.loc[kind, column]
            found = over_seeds(values)
            experiment.bars(right, [x], [found], 0.36, color=colour, alpha=0.4)
            right.plot([x] * len(values), values, "o", color="black", markersize=4)
            # Above the dots and the interval where these are low, else well below them.
            text, above = asked if column == other else "as trained", max(values.max(), found.high) + 0.05
            right.annotate(
                text, (x, above if above < 0.5 else 0.05), rotation=90, ha="center", va="bottom", fontsize=11
            )
    right.set(title="how far: asked on ...", xlabel="trained on")
    for ax in (left, right):
        ax.set_ylim(0, 1.04)
        ax.grid(alpha=0.3, axis="y")
    experiment.finish((left, right), grid=False, title=14, label=13)
    right.set_xticks(range(len(bars)), [label for *_, label, _ in bars], fontsize=10)
    return picture
