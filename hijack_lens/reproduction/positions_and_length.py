"""Claim: with a relative key, the context is read at any length; with absolute positions, not beyond those learned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.hooks.intervention import record
from hijack_lens.language import BigramLanguage, hijack_prompt
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "Positions: a relative key gives a previous-token head at any length; absolute positions fail beyond the training "
    "length, so that what the context says there is overlooked."
)
SOURCE = "Wang & Sato, arXiv 2412.11459v2: relative against absolute positional encoding"

TOLERANCE = 1e-9  # logits by which theory and hand-written model may differ in float64
LEARNED = 0.8  # in-context accuracy at the training length at which a trained model has learned to read the context
KEPT = 0.9  # the least fraction of positions beyond it at which a head that works there attends most to the one before
LOST = 0.1  # the most for a head that does not work there
FOUND = 0.3  # the least within the training length, for a head that has lost something beyond it
SEPARATION = 0.3  # by how much relative positions must exceed absolute ones in in-context accuracy beyond it

_POSITIONS: tuple[Positions, ...] = ("relative", "absolute")
_RECIPE = Recipe(0, d_vocab=12, triggers=3, length=32)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    recipe: Recipe = _RECIPE  # of the trained models; the hand-written ones have its language, triggers and length
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    multiples: tuple[int, ...] = (1, 2, 3, 4)  # of the training length: from 1, where the evidence is within it
    repeats: int = 3  # of the evidence
    candidates: int = 6  # per trigger, tokens that follow it in context
    n_prompts: int = 8  # per trigger and candidate
    strengths: Strengths = Strengths()  # of the hand-written models
    floor: float = 1e-3  # least probability in their bigram memory


QUICK = Settings(recipe=experiment.quicker(_RECIPE), seeds=(0, 1, 2), n_prompts=4)


def positions_and_length(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """A relative key gives a previous-token head at any length; absolute positions fail beyond the training length.

    Wang & Sato (arXiv 2412.11459v2). Prompts are k times as long as the training length T. Their last T tokens hold all
    evidence, the bigrams (q, c), and are the same for every k; before them come (k - 1) T tokens of the language,
    none of them q, c or g. So for k > 1 all evidence lies beyond T, while the task stays the same. In-context
    accuracy is how often c is the likeliest token. With absolute positions, the hand-written model knows the first T.
    """
    if min(settings.multiples) != 1 or max(settings.multiples) == 1:
        raise ValueError(f"multiples must hold 1, and at least one that is greater, got {settings.multiples}")
    models = list(_models(settings, make, train))
    rows = []
    for multiple in settings.multiples:
        for kind, positions, seed, language, model in models:
            prompts = late_conflicts(language, settings, multiple)
            predicted = _predicted(prompts, language, settings, positions) if kind == "hand-written" else None
            row = {"model": kind, "positions": positions, "seed": seed, "multiple": multiple}
            rows.append(row | _measured(model, prompts, settings.recipe.length, predicted))
    table = pd.DataFrame(rows)
    findings = (*_by_construction(table, settings), *_in_training(table, settings))
    return Result(findings, table, _picture(table, settings.recipe))


def _models(
    settings: Settings, make: Make, train: Train
) -> Iterator[tuple[str, Positions, int | None, BigramLanguage, BigramTransformer]]:
    """Each model's kind, positions, seed and the language that it is asked in; then the model."""
    recipe, longest = settings.recipe, max(settings.multiples) * settings.recipe.length
    language, triggers = recipe.language.floored(settings.floor), list(range(recipe.triggers))
    for positions in _POSITIONS:
        learned = recipe.length if positions == "absolute" else None
        options = {"n_ctx": longest, "n_ctx_train": learned, "dtype": torch.float64, "device": "cpu"}
        model = make(language, triggers, positions, settings.strengths, **options)
        yield "hand-written", positions, None, language, model
    for positions in _POSITIONS:
        own = replace(recipe, positions=positions)
        for seed, run in experiment.replicates(train, own, settings.seeds, f"{positions} positions"):
            yield "trained", positions, seed, replace(own, seed=seed).language, run.model


@dataclass(frozen=True)
class LateConflicts:
    """Conflict prompts, each with its two candidates, c and g."""

    tokens: Int[Tensor, "prompt pos"]
    in_context: Int[Tensor, "prompt"]
    global_candidate: Int[Tensor, "prompt"]


def late_conflicts(language: BigramLanguage, settings: Settings, multiple: int) -> LateConflicts:
    """Conflict prompts of `multiple` times the training length, with all evidence in the last of these stretches."""
    generator = torch.Generator().manual_seed(0)
    ends = experiment.conflicts_by_trigger(language, settings, settings.recipe.length, generator)
    tokens = torch.cat([end.tokens for end in ends])
    if multiple > 1:
        options: dict[str, Any] = {"filler": "avoid", "n_prompts": settings.n_prompts, "seed": generator}
        lead = (multiple - 1) * settings.recipe.length  # without evidence
        quiet = [hijack_prompt(language, end.trigger, end.in_context, 0, lead + 1, **options).tokens for end in ends]
        tokens = torch.cat([torch.cat(quiet)[:, :-1], tokens], 1)
    candidates = torch.tensor([(end.in_context, end.global_candidate) for end in ends])
    return LateConflicts(tokens, *repeat(candidates, "end role -> role (end prompt)", prompt=settings.n_prompts))


def _predicted(
    prompts: LateConflicts, language: BigramLanguage, settings: Settings, positions: Positions
) -> Float[Tensor, "prompt"]:
    """The margins that theory expects of the hand-written model."""
    learned = settings.recipe.length if positions == "absolute" else None
    setting = theory.Setting(settings.strengths, range(settings.recipe.triggers), positions, learned)
    return _margins(theory.logits(prompts.tokens, language, setting)[:, -1], prompts)


def _margins(logits: Float[Tensor, "prompt d_vocab"], prompts: LateConflicts) -> Float[Tensor, "prompt"]:
    candidates = torch.stack([prompts.in_context, prompts.global_candidate], 1)
    c, g = logits.gather(1, candidates).unbind(1)
    return c - g


@torch.no_grad()
def _measured(
    model: BigramTransformer, prompts: LateConflicts, length: int, predicted: Float[Tensor, "prompt"] | None
) -> dict[str, float]:
    """What the model says at the prompts' ends, and where its previous-token head looks from their last tokens."""
    head = model.circuit.previous_token[0]
    name = f"blocks.{head.layer}.attn.hook_pattern"
    logits, run = record(model, prompts.tokens, [name])
    margins = _margins(logits[:, -1], prompts)
    # For the last stretch's positions but its first, which in the shortest prompts has none before it.
    pattern = run[name][:, head.head, -(length - 1) :]
    before = torch.arange(prompts.tokens.shape[1])[-length:-1]
    attention = pattern.gather(-1, before[None, :, None].expand(len(pattern), -1, 1))
    return {
        "margin": float(margins.mean()),
        "predicted_margin": torch.nan if predicted is None else float(predicted.mean()),
        "theory_error": torch.nan if predicted is None else float((margins - predicted).abs().max()),
        "context_wins": float((margins > 0).double().mean()),
        "in_context_accuracy": float((logits[:, -1].argmax(-1) == prompts.in_context).double().mean()),
        "previous_token_attention": float(attention.mean()),
        "finds_previous": float((pattern.argmax(-1) == before).double().mean()),
    }


def _by_construction(table: pd.DataFrame, settings: Settings) -> list[Finding]:
    findings = []
    for positions in _POSITIONS:
        part = table[(table["model"] == "hand-written") & (table["positions"] == positions)]
        beyond = int(positions == "relative")
        expected = (part["multiple"] == 1) | beyond
        accuracies = zip(part["multiple"], part["in_context_accuracy"], strict=True)
        listed = ", ".join(f"{accuracy:.2f} at {multiple} T" for multiple, accuracy in accuracies)
        findings.append(
            Finding(
                f"hand-written, {positions} positions; T = {settings.recipe.length}, prompts of up to "
                f"{max(settings.multiples)} T",
                f"in-context accuracy of 1 at T, and of {beyond} beyond; margins are theory's to {TOLERANCE:g}",
                f"{listed}; margins off by at most {part['theory_error'].max():.1e}",
                bool((part["theory_error"] <= TOLERANCE).all() and (part["in_context_accuracy"] == expected).all()),
            )
        )
    return findings


def _in_training(table: pd.DataFrame, settings: Settings) -> list[Finding]:
    part = table[table["model"] == "trained"].assign(beyond=lambda row: row["multiple"] > 1)
    by_seed = part.groupby(["positions", "beyond", "seed"])[["in_context_accuracy", "finds_previous"]]
    lowest, highest, mean = by_seed.min(), by_seed.max(), by_seed.mean()["in_context_accuracy"]
    learned = {positions: lowest["in_context_accuracy"][positions, False] for positions in _POSITIONS}
    kept, found = lowest["finds_previous"]["relative", True], lowest["finds_previous"]["absolute", False]
    lost = highest["finds_previous"]["absolute", True]
    relative, absolute = (mean[positions, True] for positions in _POSITIONS)
    gap = over_seeds(relative - absolute)
    longest = max(settings.multiples)
    setting = f"{len(settings.seeds)} trained models each, T = {settings.recipe.length}"
    return [
        Finding(
            f"{setting}; prompts of T tokens",
            f"both kinds read the context at T: in-context accuracy of at least {LEARNED:g} in every seed",
            "; ".join(f"{kind} {over_seeds(low):.2f}, lowest {low.min():.2f}" for kind, low in learned.items()),
            all((low >= LEARNED).all() for low in learned.values()),
        ),
        Finding(
            f"{setting}; the last T tokens of prompts of 2 T to {longest} T",
            f"relative: the head attends most to the position before at {KEPT:.0%} of the positions or more, in every "
            "seed and length",
            f"lowest over lengths {over_seeds(kept):.2f}, lowest seed {kept.min():.2f}",
            bool((kept >= KEPT).all()),
        ),
        Finding(
            f"{setting}; the last T tokens of prompts of T to {longest} T",
            f"absolute: at {FOUND:.0%} or more within T, and at {LOST:.0%} or less beyond, in every seed and length",
            f"within T {over_seeds(found):.2f}, lowest seed {found.min():.2f}; beyond, highest over lengths "
            f"{over_seeds(lost):.2f}, highest seed {lost.max():.2f}",
            bool((found >= FOUND).all() and (lost <= LOST).all()),
        ),
        Finding.judged(
            f"{setting}; prompts of 2 T to {longest} T, all evidence beyond T",
            f"in-context accuracy is higher with relative positions by more than {SEPARATION:g}",
            f"relative {over_seeds(relative):.2f}, absolute {over_seeds(absolute):.2f}, difference {gap:.2f}",
            gap.above(SEPARATION),
        ),
    ]


def _picture(table: pd.DataFrame, recipe: Recipe) -> Picture:
    """By length: the hand-written models' margins and theory's, and the trained models' accuracy and attention."""
    picture = Picture(13.0, 4.4)
    axes = picture.figure.subplots(1, 3)
    longest = table["multiple"].max()
    for positions, memory, marker in (("relative", "context", "o"), ("absolute", "weights", "s")):
        style = {"color": COLOURS[memory], "markersize": 8}
        written, own = (
            table[(table["model"] == kind) & (table["positions"] == positions)] for kind in ("hand-written", "trained")
        )
        axes[0].plot(written["multiple"], written["predicted_margin"], "-", **style, label=f"{positions}, theory")
        axes[0].plot(written["multiple"], written["margin"], marker, **style, label=f"{positions}, measured")
        thin = {"alpha": 0.3, "linewidth": 1}
        for ax, column in zip(axes[1:], ("in_context_accuracy", "finds_previous"), strict=True):
            experiment.draw_by_seed(ax, own, "multiple", column, thin, **style, marker=marker, label=positions)
    axes[0].axhline(0, color="black", linewidth=1)
    axes[0].set(title="hand-written", ylabel="margin: logit c − logit g")
    axes[1].set(title="trained: what they say", ylabel="in-context accuracy", ylim=(-0.04, 1.06))
    axes[2].set(title="trained: previous-token head", ylim=(-0.04, 1.06))
    axes[2].set_ylabel("fraction that attends most\nto the position before")
    for ax in axes:
        ax.axvspan(1.03, longest + 0.15, color="#999999", alpha=0.12, linewidth=0, label="evidence beyond T")
        ax.set(xticks=sorted(set(table["multiple"])), xlim=(0.85, longest + 0.15))
        ax.set_xlabel(f"length / training length (T = {recipe.length})")
        ax.legend(frameon=False)
    experiment.finish(axes)
    return picture
