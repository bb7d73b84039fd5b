"""What the training data does to the speed of in-context learning, and to how far it generalises."""

from dataclasses import dataclass, replace

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.reproduction.experiment import Finding, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import Picture
from hijack_lens.training.recall import behaviour
from hijack_lens.training.run import TrainingRun

STATEMENT = (
    "Few triggers and random ones slow in-context learning down; continuations drawn from the bigrams make it fail on "
    "others, uniform ones do not; and a model trained on fixed triggers overlooks the rest."
)
SOURCE = (
    "Bietti et al., arXiv 2306.00802, section 5, figure 4 (left, centre), and section 4 (fixed and random triggers)"
)

LEARNED = 0.9
"""In-context accuracy that counts as learned."""

COST = 1.5
"""Uniform continuations may take at most this many times the steps that bigram-drawn ones take."""

_BASE, _FEW, _RANDOM, _BIGRAM = "fixed triggers, uniform", "fewer triggers", "random triggers", "bigram-drawn"
_LINES = {_BASE: ("#000000", "-"), _FEW: ("#E69F00", "--"), _RANDOM: ("#0072B2", "-."), _BIGRAM: ("#D55E00", ":")}


@dataclass(frozen=True)
class Settings:
    """What is trained, and on what it is asked.

    Attributes:
        d_vocab: tokens in the language.
        triggers: how many.
        few: how many where there are fewer.
        d_model: of the models.
        length: of the sequences.
        steps: of training.
        seeds: of the models of each kind.
        n_sequences: to ask each model on, with triggers that were none in training.
    """

    d_vocab: int = 16
    triggers: int = 4
    few: int = 2
    d_model: int = 48
    length: int = 32
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_sequences: int = 256

    @property
    def recipes(self) -> dict[str, Recipe]:
        """By kind of data, for all seeds."""
        base = Recipe(
            0,
            d_vocab=self.d_vocab,
            triggers=self.triggers,
            d_model=self.d_model,
            length=self.length,
            steps=self.steps,
            evaluate_every=10,
        )
        return {
            _BASE: base,
            _FEW: replace(base, triggers=self.few),
            _RANDOM: replace(base, fixed=False),
            _BIGRAM: replace(base, continuations="bigram"),
        }


QUICK = Settings(d_vocab=12, d_model=32, length=24, steps=240, seeds=(0, 1, 2))


def data_matters(settings: Settings = Settings(), train: Train = trained) -> Result:
    """How soon models trained on different data learn the in-context task, and where they can do it.

    Bietti et al. 2023 (arXiv 2306.00802, section 5, figure 4). Speed is the step of the first evaluation with an
    in-context accuracy of `LEARNED` on held-out sequences of the training distribution; a model that never gets there
    counts as there one step after the last. (1) Fewer triggers, and (2) random instead of fixed ones, take more steps.
    (3) Trained on bigram-drawn continuations, a model has learned them, and is less accurate on uniform ones; (4)
    trained on uniform ones, it has learned both, at every seed, and (5) takes at most `COST` times the steps.

    The match memory of models with fixed triggers has no need for other keys (section 4; the paper does not test it):
    (6) on triggers that were none in training they are less accurate than on their own, and than models trained on
    random triggers.

    Differences and ratios are of models of the same seed; one counts where its 95% interval over seeds is beyond its
    bound.

    Raises:
        ValueError: for a vocabulary that is too small for as many other triggers.
    """
    if 2 * settings.triggers > settings.d_vocab:
        raise ValueError(
            f"d_vocab must be at least twice the number of triggers, {settings.triggers}, got {settings.d_vocab}"
        )
    runs = {
        (kind, seed): train(replace(recipe, seed=seed))
        for kind, recipe in tqdm(settings.recipes.items(), disable=None, unit="kind of data")
        for seed in settings.seeds
    }
    table = pd.DataFrame(
        {"data": kind, "seed": seed, **_measured(settings, run, replace(settings.recipes[kind], seed=seed))}
        for (kind, seed), run in runs.items()
    )
    by_kind = table.set_index(["data", "seed"])
    steps, uniform, bigram = by_kind["steps"], by_kind["uniform"], by_kind["bigram"]
    own, others = by_kind["own"], by_kind["other_triggers"]

    fewer = over_seeds(steps[_FEW] - steps[_BASE])
    random = over_seeds(steps[_RANDOM] - steps[_BASE])
    dropped = over_seeds(bigram[_BIGRAM] - uniform[_BIGRAM])
    both = float(min(uniform[_BASE].min(), bigram[_BASE].min()))
    ratio = over_seeds(steps[_BASE] / steps[_BIGRAM])
    lost = over_seeds(own[_BASE] - others[_BASE])
    behind = over_seeds(others[_RANDOM] - others[_BASE])
    n = len(settings.seeds)
    setting = f"{n} models of each kind, {settings.d_vocab} tokens, {settings.steps} steps"
    findings = (
        Finding(
            f"{settings.few} against {settings.triggers} fixed triggers; {setting}",
            f"fewer triggers take more steps to in-context accuracy {LEARNED}",
            f"{over_seeds(steps[_FEW]):.0f} against {over_seeds(steps[_BASE]):.0f}: {fewer:+.0f}",
            fewer.low > 0,
        ),
        Finding(
            f"random against fixed triggers; {setting}",
            f"random triggers take more steps to in-context accuracy {LEARNED}",
            f"{over_seeds(steps[_RANDOM]):.0f} against {over_seeds(steps[_BASE]):.0f}: {random:+.0f}",
            random.low > 0,
        ),
        Finding(
            f"trained on bigram-drawn continuations; {setting}",
            f"in-context accuracy is at least {LEARNED} on bigram-drawn ones at every seed, and lower on uniform ones",
            f"at least {bigram[_BIGRAM].min():.2f}; {over_seeds(uniform[_BIGRAM]):.2f} on uniform ones, lower by "
            f"{dropped:.2f}",
            bool(bigram[_BIGRAM].min() >= LEARNED) and dropped.low > 0,
        ),
        Finding(
            f"trained on uniform continuations; {setting}",
            f"in-context accuracy is at least {LEARNED} on uniform and on bigram-drawn ones, at every seed",
            f"at least {uniform[_BASE].min():.2f} and {bigram[_BASE].min():.2f}",
            both >= LEARNED,
        ),
        Finding(
            f"uniform against bigram-drawn continuations; {setting}",
            f"uniform ones are learned at every seed, in at most {COST} times the steps",
            f"{over_seeds(steps[_BASE]):.0f} against {over_seeds(steps[_BIGRAM]):.0f}: {ratio:.2f} times",
            bool((steps[_BASE] <= settings.steps).all()) and ratio.high <= COST,
        ),
        Finding(
            f"asked on triggers that were none where triggers were fixed; {setting}",
            "models of fixed triggers are less accurate than on their own triggers, and than models of random triggers",
            f"{over_seeds(others[_BASE]):.2f}: {lost:.2f} lower than on their own, "
            f"{behind:.2f} lower than models of random triggers",
            lost.low > 0 and behind.low > 0,
        ),
    )
    return Result(findings, table, _drawn(runs, by_kind))


def _measured(settings: Settings, run: TrainingRun, recipe: Recipe) -> dict[str, float]:
    """Steps to `LEARNED`, and final in-context accuracies."""
    name = "in_context_accuracy"
    curve = run.probe(name)
    reached = curve.index[curve >= LEARNED]
    unseen = recipe.language.sample(
        settings.n_sequences,
        recipe.length,
        range(settings.triggers, 2 * settings.triggers),
        continuations=recipe.continuations,
        seed=recipe.seed,
    )
    return {
        "steps": float(reached[0] if len(reached) else curve.index[-1] + 1),
        "own": curve.iloc[-1],
        "uniform": run.probe(name, continuations="uniform").iloc[-1],
        "bigram": run.probe(name, continuations="bigram").iloc[-1],
        "other_triggers": behaviour(run.model, unseen)[name],
    }


def _drawn(runs: dict[tuple[str, int], TrainingRun], by_kind: pd.DataFrame) -> Picture:
    """In-context accuracy over training, and at its end on data that models were not trained on."""
    picture = Picture(14.0, 5.0)
    left, right = picture.figure.subplots(1, 2, width_ratios=(1, 1.15))
    for kind, (colour, style) in _LINES.items():
        curves = [run.probe("in_context_accuracy") for (of_kind, _), run in runs.items() if of_kind == kind]
        for curve in curves:
            left.plot(curve.index, curve, style, color=colour, linewidth=0.8, alpha=0.35)
        mean = pd.concat(curves, axis=1).mean(axis=1)
        left.plot(mean.index, mean, style, color=colour, linewidth=3, label=kind)
    left.axhline(LEARNED, color="#999999", linewidth=1)
    left.set_xlabel("training step", fontsize=13)
    left.set_ylabel("in-context accuracy", fontsize=13)
    left.legend(frameon=False, fontsize=12, loc="lower right")

    pairs = (
        (_BASE, "uniform", "bigram", "uniform\ncontinuations", "bigram-drawn"),
        (_BIGRAM, "bigram", "uniform", "bigram-drawn\ncontinuations", "uniform"),
        (_BASE, "own", "other_triggers", "fixed\ntriggers", "other triggers"),
        (_FEW, "own", "other_triggers", "fewer\ntriggers", "other triggers"),
        (_RANDOM, "own", "other_triggers", "random\ntriggers", "other triggers"),
    )
    for place, (kind, own, other, _, asked) in enumerate(pairs):
        for side, column in ((-0.2, own), (0.2, other)):
            values = by_kind.loc[kind, column]
            colour = "#999999" if side < 0 else _LINES[kind][0]
            right.bar(place + side, values.mean(), width=0.36, color=colour, alpha=0.4)
            right.plot([place + side] * len(values), values, "o", color="black", markersize=4)
        right.annotate(asked, (place + 0.2, 0.13), rotation=90, ha="center", va="bottom", fontsize=11)
        right.annotate("as trained", (place - 0.2, 0.13), rotation=90, ha="center", va="bottom", fontsize=11)
    right.set_xticks(range(len(pairs)), [label for *_, label, _ in pairs], fontsize=11)
    right.set_xlabel("trained on", fontsize=13)
    for ax in (left, right):
        ax.set_ylim(0, 1.04)
        ax.grid(alpha=0.3, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
    left.set_title("how soon", fontsize=14)
    right.set_title("how far: asked on ...", fontsize=14)
    return picture
