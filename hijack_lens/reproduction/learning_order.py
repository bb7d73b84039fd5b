"""Bigrams first, the induction circuit later, and never in one layer."""

from dataclasses import dataclass, replace

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.reproduction.experiment import Finding, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = "Global bigrams are learned first and fast, the induction circuit later; one layer never learns to induce."
SOURCE = "Bietti et al., arXiv 2306.00802, sections 3 and 5, figure 4 (left)"

LEARNED = 0.9
"""In-context accuracy, and the fraction of a loss that must be gone, to count as learned."""

ONE_LAYER_FAILS = 0.8
"""In-context accuracy that one layer must stay below."""


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        d_vocab: tokens in the language.
        triggers: how many, the same in all sequences.
        d_model: of the models.
        length: of the sequences.
        steps: of training.
        seeds: of the models with two layers, and with one.
    """

    d_vocab: int = 24
    triggers: int = 5
    d_model: int = 64
    length: int = 48
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


QUICK = Settings(12, 4, 32, 24, 320, (0, 1, 2))


def learning_order(settings: Settings = Settings(), train: Train = trained) -> Result:
    """The order in which the two memories are learned, by two layers and by one.

    Bietti et al. 2023 (arXiv 2306.00802): the loss on global bigrams falls within the first steps, that on tokens that
    follow from the context later (section 5, figure 4, left); one layer cannot solve the task, two can (section 3). A
    loss has been learned when `LEARNED` of it is gone: of the bigram loss, what lies above that of the true bigrams; of
    the in-context loss, all of it, since the answers are certain. Steps are those of the first evaluation that finds it
    so; a loss that is never learned counts as the step after the last. Every seed must show it.
    """
    recipe = Recipe(
        0,
        d_vocab=settings.d_vocab,
        triggers=settings.triggers,
        d_model=settings.d_model,
        length=settings.length,
        steps=settings.steps,
        evaluate_every=10,
    )
    runs = [
        (n_layers, seed, train(replace(recipe, n_layers=n_layers, seed=seed)))
        for n_layers, seed in tqdm([(n, s) for n in (2, 1) for s in settings.seeds], disable=None, unit="model")
    ]
    curves = pd.concat(
        pd.DataFrame(
            {
                "layers": n_layers,
                "seed": seed,
                "bigrams_learned": 1 - run.probe("bigram_excess") / run.probe("bigram_excess").iloc[0],
                "in_context_learned": 1 - run.probe("in_context_loss") / run.probe("in_context_loss").iloc[0],
                "in_context_accuracy": run.probe("in_context_accuracy"),
                "induction_attention": run.probe("induction_attention"),
            }
        ).reset_index()
        for n_layers, seed, run in runs
    )
    rows = []
    for (n_layers, seed), curve in curves.groupby(["layers", "seed"], sort=False):
        bigrams = _first(curve, "bigrams_learned")
        then = curve[curve["step"] <= bigrams].iloc[-1]
        rows.append(
            {
                "layers": n_layers,
                "seed": seed,
                "steps_to_bigrams": bigrams,
                "steps_to_in_context": _first(curve, "in_context_learned"),
                "accuracy_once_bigrams_are_learned": then["in_context_accuracy"],
                "final_accuracy": curve["in_context_accuracy"].iloc[-1],
                "highest_accuracy": curve["in_context_accuracy"].max(),
                "final_bigrams_learned": curve["bigrams_learned"].iloc[-1],
                "final_in_context_learned": curve["in_context_learned"].iloc[-1],
            }
        )
    table = pd.DataFrame(rows)
    two, one = table[table["layers"] == 2], table[table["layers"] == 1]
    n = len(settings.seeds)
    setting = f"{n} models, {settings.d_vocab} tokens, {settings.triggers} triggers, {settings.steps} steps"

    later = two["steps_to_in_context"] - two["steps_to_bigrams"]
    gained = over_seeds(two["final_accuracy"] - two["accuracy_once_bigrams_are_learned"])
    findings = (
        Finding(
            f"two layers: {setting}",
            f"the bigram loss is {LEARNED:.0%} learned before the in-context loss is, at every seed",
            f"after {over_seeds(two['steps_to_bigrams']):.0f} against {over_seeds(two['steps_to_in_context']):.0f} "
            f"steps: {over_seeds(later):.0f} later",
            bool(
                two["final_bigrams_learned"].min() >= LEARNED
                and (later > 0).all()
                and two["final_in_context_learned"].min() >= LEARNED
            ),
        ),
        Finding(
            f"two layers: {setting}",
            f"in-context accuracy is below {LEARNED} once the bigrams are learned, and at least that in the end, "
            "at every seed",
            f"from at most {two['accuracy_once_bigrams_are_learned'].max():.2f} to at least "
            f"{two['final_accuracy'].min():.2f}; gained {gained:.2f}",
            bool(two["accuracy_once_bigrams_are_learned"].max() < LEARNED <= two["final_accuracy"].min()),
        ),
        Finding(
            f"one layer: {setting}",
            f"the bigrams are {LEARNED:.0%} learned, yet in-context accuracy stays below {ONE_LAYER_FAILS}, "
            "at every seed",
            f"bigrams {one['final_bigrams_learned'].min():.0%} learned or more; highest accuracy "
            f"{over_seeds(one['highest_accuracy']):.2f}, at most {one['highest_accuracy'].max():.2f}",
            bool(one["final_bigrams_learned"].min() >= LEARNED and one["highest_accuracy"].max() < ONE_LAYER_FAILS),
        ),
    )
    return Result(findings, table, _drawn(curves))


def _first(curve: pd.DataFrame, column: str) -> float:
    """The step of the first evaluation at which `LEARNED` is reached; the one after the last where none is."""
    reached = curve.loc[curve[column] >= LEARNED, "step"]
    return float(curve["step"].max() + 1 if reached.empty else reached.iloc[0])


def _drawn(curves: pd.DataFrame) -> Picture:
    """What has been learned of each memory over training, two layers beside one, a thin line per seed."""
    picture = Picture(11.0, 4.6)
    axes = picture.figure.subplots(1, 2, sharey=True)
    lines = {
        "bigrams_learned": ("bigram loss learned", COLOURS["weights"], "-"),
        "in_context_accuracy": ("in-context accuracy", COLOURS["context"], "-"),
        "induction_attention": ("attention to what followed\nthe trigger before", COLOURS["context"], ":"),
    }
    for ax, n_layers in zip(axes, (2, 1), strict=True):
        of_kind = curves[curves["layers"] == n_layers]
        for column, (label, colour, style) in lines.items():
            for _, curve in of_kind.groupby("seed"):
                ax.plot(curve["step"], curve[column], style, color=colour, linewidth=1, alpha=0.4)
            mean = of_kind.groupby("step")[column].mean()
            ax.plot(mean.index, mean, style, color=colour, linewidth=3, label=label)
        ax.set_title("two layers" if n_layers == 2 else "one layer", fontsize=14)
        ax.set_xlabel("training step", fontsize=13)
        ax.set_ylim(-0.03, 1.04)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=12)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].axhline(ONE_LAYER_FAILS, color="black", linestyle="--", linewidth=1, label="one layer stays below")
    axes[0].set_ylabel("fraction (1 = fully learned)", fontsize=13)
    picture.figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=12)
    return picture
