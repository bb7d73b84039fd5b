"""Claim: theory and model agree on the logits of any prompt."""

import itertools
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.associative import associative_transformer
from hijack_lens.reproduction.experiment import Finding, Make, Result
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "The closed form predicts the logits of the associative-memory transformer on arbitrary prompts: "
    "at every position, for every token."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: logits of the associative-memory transformer"

TOLERANCE = 1e-10
"""In logits of order 1 to 100; rounding in float64 leaves about 1e-13."""


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        d_vocabs: sizes of the languages.
        lengths: of the prompts.
        strengths: of the memories.
        n_prompts: per combination and kind: tokens drawn uniformly, and sequences of the language with triggers.
        seed: of languages, triggers and prompts.
    """

    d_vocabs: tuple[int, ...] = (4, 20, 60)
    lengths: tuple[int, ...] = (8, 32, 128, 256)
    strengths: tuple[Strengths, ...] = (
        Strengths(0.5, 0.5, 1.0, 0.5),
        Strengths(3.0, 6.0, 5.0, 1.0),
        Strengths(),
        Strengths(30.0, 30.0, 100.0, 3.0),
    )
    n_prompts: int = 10
    seed: int = 0


QUICK = Settings(d_vocabs=(4, 20), lengths=(8, 32, 128), n_prompts=5)


def closed_form(settings: Settings = Settings(), make: Make = associative_transformer) -> Result:
    """The closed form predicts the logits of the associative-memory transformer on arbitrary prompts.

    Wang & Sato (arXiv 2412.11459), with strengths that are finite: `theory.logits`, which knows tokens and strengths
    but no model, against the float64 model's own logits, at every position and for every token of prompts of random
    tokens and of sampled sequences; a random half of the vocabulary are triggers. Holds where the largest error is at
    most `TOLERANCE`; for relative positions, and for absolute ones of which the model knows the first half only.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    cells = list(itertools.product(settings.d_vocabs, settings.lengths, settings.strengths))
    rows = []
    for d_vocab, length, strengths in tqdm(cells, disable=None, unit="model"):
        language = BigramLanguage.dirichlet(d_vocab, 1.0, seed=generator)
        triggers = torch.randperm(d_vocab, generator=generator)[: d_vocab // 2].tolist()
        random = torch.randint(d_vocab, (settings.n_prompts, length), generator=generator)
        sampled = language.sample(settings.n_prompts, length, triggers, seed=generator).tokens
        tokens = torch.cat([random, sampled])
        kinds: list[tuple[Positions, int | None]] = [("relative", None), ("absolute", length // 2)]
        for positions, n_ctx_train in kinds:
            model = make(
                language, triggers, positions, strengths, n_ctx=length, n_ctx_train=n_ctx_train, dtype=torch.float64
            )
            with torch.no_grad():
                measured = model(tokens).cpu()
            setting = theory.Setting(strengths, triggers, positions, n_ctx_train)
            predicted = theory.logits(tokens, language, setting)
            error = float((measured - predicted).abs().max())
            scale = float(measured.abs().max())
            rows.append((positions, d_vocab, length, *vars(strengths).values(), scale, error))
    names = ["positions", "d_vocab", "length", "b1", "b2", "b3", "g", "largest_logit", "largest_error"]
    table = pd.DataFrame(rows, columns=names)
    compared = {
        "relative": "relative positions",
        "absolute": "absolute positions, the second half of each prompt beyond the trained ones",
    }
    findings = []
    for name, described in compared.items():
        part = table[table["positions"] == name]
        n_prompts = 2 * settings.n_prompts * len(part)
        findings.append(
            Finding(
                f"{described}; {len(part)} models of {min(settings.d_vocabs)} to {max(settings.d_vocabs)} tokens, "
                f"{n_prompts} prompts of {min(settings.lengths)} to {max(settings.lengths)} tokens, all positions",
                f"theory = model, to {TOLERANCE:g} logits",
                f"largest error {part['largest_error'].max():.1e}, of logits up to {part['largest_logit'].max():.0f}",
                bool((part["largest_error"] <= TOLERANCE).all()),
            )
        )
    return Result(tuple(findings), table, _picture(table))


def _picture(table: pd.DataFrame) -> Picture:
    """Errors by length, one dot per model, against the threshold."""
    picture = Picture(10.0, 4.4)
    axes = picture.figure.subplots(1, 2, sharey=True)
    colours = [COLOURS["context"], COLOURS["weights"], "#009E73", "#CC79A7"]  # Okabe & Ito's
    strengths = table[["b1", "b2", "b3", "g"]].drop_duplicates().to_numpy().tolist()
    for ax, positions in zip(axes, ("relative", "absolute"), strict=True):
        part = table[table["positions"] == positions]
        for index, values in enumerate(strengths):
            dots = part[(part[["b1", "b2", "b3", "g"]] == values).all(axis=1)]
            ax.scatter(
                dots["length"] * 1.07 ** (index - len(strengths) / 2 + 0.5),  # side by side
                dots["largest_error"].clip(lower=1e-17),
                10 + dots["d_vocab"],
                colours[index % len(colours)],
                alpha=0.8,
                label=", ".join(f"{value:g}" for value in values),
            )
        ax.axhline(TOLERANCE, color="black", linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(3e-18, max(1e-9, 10 * table["largest_error"].max()))
        ax.set_xlabel("length of the prompts (tokens)")
        ax.set_title(f"{positions} positions")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].annotate("threshold", (table["length"].min(), TOLERANCE), xytext=(0, 4), textcoords="offset points")
    axes[0].set_ylabel("largest |theory − model| (logits)")
    picture.figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        title="b1, b2, b3, g\n(larger dot: more tokens)",
        frameon=False,
    )
    return picture
