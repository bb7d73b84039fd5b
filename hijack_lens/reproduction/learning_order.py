"""Claim: bigrams are learned first, the induction circuit later, and never in one layer."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training import TrainingRun

STATEMENT = "Global bigrams are learned first and fast, the induction circuit later; one layer never learns to induce."
SOURCE = "Bietti et al., arXiv 2306.00802, sections 3 and 5, figure 4 (left)"

LEARNED = 0.9  # in-context accuracy, and the fraction of a loss that must be gone, to count as learned
ONE_LAYER_FAILS = 0.8  # in-context accuracy that one layer must stay below


@dataclass(frozen=True)
class Settings:
    """What is trained."""

    d_vocab: int = 24  # tokens in the language
    triggers: int = 5  # the same in all sequences
    d_model: int = 64
    length: int = 48  # of the sequences
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the models with two layers, and with one


QUICK = Settings(12, 4, 32, 24, 600, (0, 1, 2))


def learning_order(settings: Settings = Settings(), train: Train = trained) -> Result:
    """The order in which the two memories are learned, by two layers and by one.

    Bietti et al. 2023 (arXiv 2306.00802): the loss on global bigrams falls within the first steps, that on tokens which
    follow from the context later (section 5, figure 4, left); one layer cannot solve the task, two can (section 3). A
    loss counts as learned when `LEARNED` of it is gone: for the bigram loss, of what exceeds that of the true bigrams;
    for the in-context loss, of all of it, since the answers are certain. A loss that is never learned counts as learned
    one step after the last.
    """
    data: dict[str, Any] = {"d_vocab": settings.d_vocab, "triggers": settings.triggers, "length": settings.length}
    recipe = Recipe(
        0, **data, d_model=settings.d_model, steps=settings.steps, lr=experiment.COUNTED_LR, evaluate_every=10
    )
    curves = pd.concat(
        _curves(run).assign(layers=n_layers, seed=seed)
        for n_layers in (2, 1)
        for seed, run in experiment.replicates(train, replace(recipe, n_layers=n_layers), settings.seeds)
    )
    table = pd.DataFrame(
        {
            "layers": n_layers,
            "seed": seed,
            **_summary(curve),
            "without_order": experiment.without_order(replace(recipe, seed=seed)),
        }
        for (n_layers, seed), curve in curves.groupby(["layers", "seed"], sort=False)
    )
    two, one = table[table["layers"] == 2], table[table["layers"] == 1]
    later = two["steps_to_in_context"] - two["steps_to_bigrams"]
    before, after = two["accuracy_once_bigrams_are_learned"], two["final_accuracy"]
    guessed = f"guessing without order would reach {over_seeds(two['without_order']):.2f}"
    n = len(settings.seeds)
    setting = f"{n} models, {settings.d_vocab} tokens, {settings.triggers} triggers, {settings.steps} steps"
    findings = (
        Finding(
            f"two layers: {setting}",
            f"the bigram loss is {LEARNED:.0%} learned before the in-context loss is, at every seed",
            f"after {over_seeds(two['steps_to_bigrams']):.0f} against {over_seeds(two['steps_to_in_context']):.0f} "
            f"steps: {over_seeds(later):.0f} later",
            bool(
                (later > 0).all()
                and (two[["final_bigrams_learned", "final_in_context_learned"]] >= LEARNED).all(axis=None)
            ),
        ),
        Finding(
            f"two layers: {setting}",
            f"in-context accuracy is below {LEARNED} once the bigrams are learned, and at least that in the end, "
            "at every seed",
            f"from at most {before.max():.2f} to at least {after.min():.2f}; gained {over_seeds(after - before):.2f}; "
            f"{guessed}",
            bool(before.max() < LEARNED <= after.min()),
        ),
        Finding(
            f"one layer: {setting}",
            f"the bigrams are {LEARNED:.0%} learned, yet in-context accuracy stays below {ONE_LAYER_FAILS}, "
            "at every seed",
            f"bigrams {one['final_bigrams_learned'].min():.0%} learned or more; highest accuracy "
            f"{over_seeds(one['highest_accuracy']):.2f}, at most {one['highest_accuracy'].max():.2f}; {guessed}",
            bool(one["final_bigrams_learned"].min() >= LEARNED and one["highest_accuracy"].max() < ONE_LAYER_FAILS),
        ),
    )
    return Result(findings, table, _picture(curves))


def _curves(run: TrainingRun) -> pd.DataFrame:
    """How much of each loss is learned, and how well the model does in context, by step."""
    bigrams, in_context = run.probe("bigram_excess"), run.probe("in_context_loss")
    accuracy, attention = run.probe("in_context_accuracy"), run.probe("induction_attention")
    learned = {
        "bigrams_learned": 1 - bigrams / bigrams.iloc[0],
        "in_context_learned": 1 - in_context / in_context.iloc[0],
    }
    return pd.DataFrame({**learned, "in_context_accuracy": accuracy, "induction_attention": attention}).reset_index()


def _summary(curve: pd.DataFrame) -> dict[str, float]:
    """When a model has learned each loss, and what it can do then and in the end."""
    bigrams, in_context = (_first(curve, column) for column in ("bigrams_learned", "in_context_learned"))
    final = curve.iloc[-1]
    return {
        "steps_to_bigrams": bigrams,
        "steps_to_in_context": in_context,
        "accuracy_once_bigrams_are_learned": curve.loc[curve["step"] <= bigrams, "in_context_accuracy"].iloc[-1],
        "final_accuracy": final["in_context_accuracy"],
        "highest_accuracy": curve["in_context_accuracy"].max(),
        "final_bigrams_learned": final["bigrams_learned"],
        "final_in_context_learned": final["in_context_learned"],
    }


def _first(curve: pd.DataFrame, column: str) -> float:
    """The step of the first evaluation at which `LEARNED` is reached; the one after the last where none is."""
    reached = curve.loc[curve[column] >= LEARNED, "step"]
    return float(curve["step"].max() + 1 if reached.empty else reached.iloc[0])


def _picture(curves: pd.DataFrame) -> Picture:
    """How much of each memory is learned over training, in two layers and in one, with a thin line per seed."""
    picture = Picture(11.0, 4.6)
    axes = picture.figure.subplots(1, 2, sharey=True)
    lines = {
        "bigrams_learned": ("bigram loss learned", COLOURS["weights"], "-"),
        "in_context_accuracy": ("in-context accuracy", COLOURS["context"], "-"),
        "induction_attention": ("attention to what followed\nthe trigger before", COLOURS["context"], ":"),
    }
    for ax, n_layers, title in zip(axes, (2, 1), ("two layers", "one layer"), strict=True):
        of_kind = curves[curves["layers"] == n_layers]
        for column, (label, colour, style) in lines.items():
            thick = {"color": colour, "linestyle": style, "linewidth": 3, "label": label}
            experiment.draw_by_seed(ax, of_kind, "step", column, {"linewidth": 1, "alpha": 0.4}, **thick)
        ax.set(title=title, xlabel="training step", ylim=(-0.03, 1.04))
    axes[1].axhline(ONE_LAYER_FAILS, color="black", linestyle="--", linewidth=1, label="one layer stays below")
    axes[0].set_ylabel("fraction (1 = fully learned)")
    picture.figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=12)
    experiment.finish(axes, title=14, label=13, tick=12)
    return picture
