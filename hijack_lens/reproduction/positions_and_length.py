"""Claim: with a relative key, the context is read at any length; with absolute positions, not beyond those learned."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.hooks.intervention import record
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.language.prompts import hijack_prompt
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import Finding, Make, Recipe, Result, Train, over_seeds, trained
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "Positions: a relative key gives a previous-token head at any length; absolute positions fail beyond the training "
    "length, so that what the context says there is overlooked."
)
SOURCE = "Wang & Sato, arXiv 2412.11459v2: relative against absolute positional encoding"

TOLERANCE = 1e-9
"""Logits by which theory and hand-written model may differ in float64."""
LEARNED = 0.8
"""In-context accuracy at the training length from which a trained model has learned to read the context."""
KEPT = 0.9
"""Of the positions beyond the training length, the fraction at which a head that works there finds the one before."""
LOST = 0.1
"""The same, of a head that does not."""
FOUND = 0.3
"""The same within the training length, at least, of a head that has lost something beyond."""
SEPARATION = 0.3
"""In-context accuracy beyond the training length by which relative positions must exceed absolute ones."""

_POSITIONS: tuple[Positions, ...] = ("relative", "absolute")
_RECIPE = Recipe(0, d_vocab=12, triggers=3, length=32, steps=600, evaluate_every=600)


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        recipe: of the trained models, for all seeds and both kinds of positions; the hand-written models are of its
            language (its own seed's), triggers and length.
        seeds: of the trained models.
        multiples: lengths of the prompts, as multiples of the training length; from 1, where the evidence is within it.
        repeats: of the evidence.
        candidates: per trigger, tokens that follow it in context.
        n_prompts: per trigger and candidate.
        strengths: of the hand-written models.
        floor: least probability in the hand-written models' bigram memory.
    """

    recipe: Recipe = _RECIPE
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    repeats: int = 3
    candidates: int = 6
    n_prompts: int = 8
    strengths: Strengths = Strengths()
    floor: float = 1e-3


QUICK = Settings(recipe=replace(_RECIPE, steps=300, evaluate_every=300), seeds=(0, 1, 2), n_prompts=4)


def positions_and_length(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """A relative key gives a previous-token head at any length; absolute positions fail beyond the training length.

    Wang & Sato (arXiv 2412.11459v2). Prompts are k times as long as the training length T. Their last T tokens hold all
    evidence, the bigrams (q, c), and are the same for every k; before them stand (k - 1) T tokens of the language that
    hold neither q nor c nor g. So for k > 1 all evidence lies beyond T, while the task stays the same.

    In-context accuracy is how often c is the likeliest token. By construction, float64: it is 1 with relative
    positions, at every length; with absolute ones, of which the model knows the first T, it is 1 at T and 0 beyond; and
    the margins are theory's, to `TOLERANCE`.

    Trained: all seeds must have learned to read the context at T, to an in-context accuracy of `LEARNED`. Beyond T, the
    previous-token head attends most to the position before at `KEPT` of the positions at least with relative positions,
    and at `LOST` at most with absolute ones (where it is at `FOUND` at least within T), in every seed and length. And
    the in-context accuracy, its mean over these lengths, is higher with relative positions by more than `SEPARATION`,
    by the 95% interval over seeds.

    Raises:
        ValueError: for `multiples` without 1, or nothing but it.
    """
    if min(settings.multiples) != 1 or max(settings.multiples) == 1:
        raise ValueError(f"multiples must hold 1, and at least one that is greater, got {settings.multiples}")
    recipe = settings.recipe
    triggers = list(range(recipe.triggers))
    language = recipe.language.floored(settings.floor)
    longest = max(settings.multiples) * recipe.length
    written = {
        positions: make(
            language,
            triggers,
            positions,
            settings.strengths,
            n_ctx=longest,
            n_ctx_train=recipe.length if positions == "absolute" else None,
            dtype=torch.float64,
            device="cpu",
        )
        for positions in _POSITIONS
    }
    models: list[tuple[str, Positions, int | None, BigramTransformer]] = [
        ("hand-written", positions, None, model) for positions, model in written.items()
    ]
    for positions in _POSITIONS:
        for own in tqdm(settings.seeds, desc=f"{positions} positions", disable=None, unit="seed"):
            models.append(("trained", positions, own, train(replace(recipe, positions=positions, seed=own)).model))

    languages = {own: replace(recipe, seed=own).language for own in settings.seeds} | {None: language}
    rows = []
    for multiple in settings.multiples:
        asked = {own: late_conflicts(spoken, settings, multiple) for own, spoken in languages.items()}
        for kind, positions, seed, model in models:
            prompts = asked[seed]
            predicted = _predicted(prompts, language, settings, positions) if kind == "hand-written" else None
            row = {"model": kind, "positions": positions, "seed": seed, "multiple": multiple}
            rows.append(row | _measured(model, prompts, recipe.length, predicted))
    table = pd.DataFrame(rows)
    return Result((*_by_construction(table, settings), *_in_training(table, settings)), table, _picture(table, recipe))


@dataclass(frozen=True)
class LateConflicts:
    """Conflict prompts, each with its two candidates.

    Attributes:
        tokens: the prompts.
        in_context: c of each.
        global_candidate: g of each.
    """

    tokens: Int[Tensor, "prompt pos"]
    in_context: Int[Tensor, "prompt"]
    global_candidate: Int[Tensor, "prompt"]


def late_conflicts(language: BigramLanguage, settings: Settings, multiple: int) -> LateConflicts:
    """Conflict prompts of `multiple` times the training length, all their evidence in the last of these stretches."""
    generator = torch.Generator().manual_seed(0)
    length = settings.recipe.length
    ends = []
    for q in range(settings.recipe.triggers):
        g = language.global_candidate(q)
        order = torch.randperm(language.d_vocab, generator=generator).tolist()
        for c in [token for token in order if token not in (q, g)][: settings.candidates]:
            options: dict[str, Any] = {"filler": "avoid", "n_prompts": settings.n_prompts, "seed": generator}
            ends.append(hijack_prompt(language, q, c, settings.repeats, length, **options))
    tokens = torch.cat([end.tokens for end in ends])
    if multiple > 1:
        # Prompts without evidence, but for the trigger that ends them.
        quiet = [
            hijack_prompt(language, end.trigger, end.in_context, 0, (multiple - 1) * length + 1, **options).tokens
            for end in ends
        ]
        tokens = torch.cat([torch.cat(quiet)[:, :-1], tokens], 1)
    in_context, global_candidate = (
        torch.tensor([getattr(end, role) for end in ends]).repeat_interleave(settings.n_prompts)
        for role in ("in_context", "global_candidate")
    )
    return LateConflicts(tokens, in_context, global_candidate)


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
    # Of the last stretch's positions but its first, which in the shortest prompts has none before it.
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
    length, longest = settings.recipe.length, max(settings.multiples)
    findings = []
    for positions in _POSITIONS:
        part = table[(table["model"] == "hand-written") & (table["positions"] == positions)]
        within, beyond = (part[part["multiple"] > 1] if late else part[part["multiple"] == 1] for late in (False, True))
        reads = positions == "relative"
        agrees = bool((part["theory_error"] <= TOLERANCE).all())
        accuracies = zip(part["multiple"], part["in_context_accuracy"], strict=True)
        listed = ", ".join(f"{accuracy:.2f} at {multiple} T" for multiple, accuracy in accuracies)
        findings.append(
            Finding(
                f"hand-written, {positions} positions; T = {length}, prompts of up to {longest} T",
                f"in-context accuracy of 1 at T, and of {int(reads)} beyond; margins are theory's to {TOLERANCE:g}",
                f"{listed}; margins off by at most {part['theory_error'].max():.1e}",
                agrees
                and bool((within["in_context_accuracy"] == 1).all())
                and bool((beyond["in_context_accuracy"] == int(reads)).all()),
            )
        )
    return findings


def _in_training(table: pd.DataFrame, settings: Settings) -> list[Finding]:
    part = table[table["model"] == "trained"]
    within, beyond = part[part["multiple"] == 1], part[part["multiple"] > 1]
    setting = f"{len(settings.seeds)} trained models each, T = {settings.recipe.length}, {settings.recipe.steps} steps"

    def by_seed(rows: pd.DataFrame, positions: str, column: str, how: str) -> pd.Series:
        return rows[rows["positions"] == positions].groupby("seed")[column].agg(how)

    learned = {positions: by_seed(within, positions, "in_context_accuracy", "min") for positions in _POSITIONS}
    lowest = by_seed(beyond, "relative", "finds_previous", "min")
    highest = by_seed(beyond, "absolute", "finds_previous", "max")
    before = by_seed(within, "absolute", "finds_previous", "min")
    after = {positions: by_seed(beyond, positions, "in_context_accuracy", "mean") for positions in _POSITIONS}
    gap = over_seeds(after["relative"] - after["absolute"])
    return [
        Finding(
            f"{setting}; prompts of T tokens",
            f"both kinds read the context at T: in-context accuracy of at least {LEARNED:g} in every seed",
            "; ".join(
                f"{positions} {over_seeds(values):.2f}, lowest {values.min():.2f}"
                for positions, values in learned.items()
            ),
            all(bool((values >= LEARNED).all()) for values in learned.values()),
        ),
        Finding(
            f"{setting}; the last T tokens of prompts of 2 T to {max(settings.multiples)} T",
            f"relative: the head attends most to the position before at {KEPT:.0%} of the positions or more, in every "
            "seed and length",
            f"lowest over lengths {over_seeds(lowest):.2f}, lowest seed {lowest.min():.2f}",
            bool((lowest >= KEPT).all()),
        ),
        Finding(
            f"{setting}; the last T tokens of prompts of T to {max(settings.multiples)} T",
            f"absolute: at {FOUND:.0%} or more within T, and at {LOST:.0%} or less beyond, in every seed and length",
            f"within T {over_seeds(before):.2f}, lowest seed {before.min():.2f}; beyond, highest over lengths "
            f"{over_seeds(highest):.2f}, highest seed {highest.max():.2f}",
            bool((before >= FOUND).all() and (highest <= LOST).all()),
        ),
        Finding(
            f"{setting}; prompts of 2 T to {max(settings.multiples)} T, all evidence beyond T",
            f"in-context accuracy is higher with relative positions by more than {SEPARATION:g}",
            f"relative {over_seeds(after['relative']):.2f}, absolute {over_seeds(after['absolute']):.2f}, "
            f"difference {gap:.2f}",
            gap.low > SEPARATION,
        ),
    ]


def _picture(table: pd.DataFrame, recipe: Recipe) -> Picture:
    """By length: the hand-written models' margins with theory's, and the trained models' accuracy and attention."""
    picture = Picture(13.0, 4.4)
    axes = picture.figure.subplots(1, 3)
    colours = {"relative": COLOURS["context"], "absolute": COLOURS["weights"]}
    markers = {"relative": "o", "absolute": "s"}
    for positions in _POSITIONS:
        style = {"color": colours[positions], "markersize": 8}
        written = table[(table["model"] == "hand-written") & (table["positions"] == positions)]
        axes[0].plot(written["multiple"], written["predicted_margin"], "-", **style, label=f"{positions}, theory")
        axes[0].plot(
            written["multiple"], written["margin"], markers[positions], **style, label=f"{positions}, measured"
        )
        own = table[(table["model"] == "trained") & (table["positions"] == positions)]
        for ax, column in zip(axes[1:], ("in_context_accuracy", "finds_previous"), strict=True):
            for _, seed in own.groupby("seed"):
                ax.plot(seed["multiple"], seed[column], "-", color=colours[positions], alpha=0.3, linewidth=1)
            mean = own.groupby("multiple")[column].mean()
            ax.plot(mean.index, mean, f"{markers[positions]}-", **style, label=positions)
    axes[0].axhline(0, color="black", linewidth=1)
    axes[0].set_ylabel("margin: logit c − logit g")
    axes[0].set_title("hand-written")
    axes[1].set_ylabel("in-context accuracy")
    axes[1].set_title("trained: what they say")
    axes[2].set_ylabel("fraction that attends most\nto the position before")
    axes[2].set_title("trained: previous-token head")
    for ax in axes:
        ax.axvspan(
            1.03, max(table["multiple"]) + 0.15, color="#999999", alpha=0.12, linewidth=0, label="evidence beyond T"
        )
        ax.set_xticks(sorted(set(table["multiple"])))
        ax.set_xlim(0.85, max(table["multiple"]) + 0.15)
        ax.set_xlabel(f"length / training length (T = {recipe.length})")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    for ax in axes[1:]:
        ax.set_ylim(-0.04, 1.06)
    return picture
