"""Claim: theory and model agree on the logits of any prompt."""

import itertools
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.language import BigramLanguage
from hijack_lens.models import associative_transformer
from hijack_lens.reproduction.experiment import Make, finish
from hijack_lens.reproduction.findings import Finding, Result
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "The closed form predicts the logits of the associative-memory transformer on arbitrary prompts: "
    "at every position, for every token."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: logits of the associative-memory transformer"

TOLERANCE = 1e-10  # in logits of order 1 to 100; rounding in float64 leaves about 1e-13

_STRENGTHS = ["b1", "b2", "b3", "g"]
_KINDS = {
    "relative": "relative positions",
    "absolute": "absolute positions, the second half of each prompt beyond the trained ones",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    d_vocabs: tuple[int, ...] = (4, 20, 60)  # of the languages
    lengths: tuple[int, ...] = (8, 32, 128, 256)  # of the prompts
    strengths: tuple[Strengths, ...] = (
        Strengths(0.5, 0.5, 1.0, 0.5),
        Strengths(3.0, 6.0, 5.0, 1.0),
        Strengths(),
        Strengths(30.0, 30.0, 100.0, 3.0),
    )
    n_prompts: int = 10  # per combination, of random tokens, and as many sampled sequences with triggers
    seed: int = 0  # of languages, triggers and prompts


QUICK = Settings(d_vocabs=(4, 20), lengths=(8, 32, 128), n_prompts=5)


def closed_form(settings: Settings = Settings(), make: Make = associative_transformer) -> Result:
    """The closed form predicts the logits of the associative-memory transformer on arbitrary prompts.

    Wang & Sato (arXiv 2412.11459), at finite strengths. `theory.logits`, which knows tokens and strengths but no model,
    is compared with the float64 model's logits, on random tokens and on sampled sequences. A random half of the
    vocabulary are triggers. With absolute positions, the model knows only the first half of them.
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
            predicted = theory.logits(tokens, language, theory.Setting(strengths, triggers, positions, n_ctx_train))
            sizes = [float(logits.abs().max()) for logits in (measured, measured - predicted)]
            rows.append((positions, d_vocab, length, *vars(strengths).values(), *sizes))
    columns = ["positions", "d_vocab", "length", *_STRENGTHS, "largest_logit", "largest_error"]
    table = pd.DataFrame(rows, columns=columns)
    findings = tuple(_finding(kind, table[table["positions"] == kind], settings) for kind in _KINDS)
    return Result(findings, table, _picture(table))


def _finding(kind: str, table: pd.DataFrame, settings: Settings) -> Finding:
    return Finding(
        f"{_KINDS[kind]}; {len(table)} models of {min(settings.d_vocabs)} to {max(settings.d_vocabs)} tokens, "
        f"{2 * settings.n_prompts * len(table)} prompts of {min(settings.lengths)} to {max(settings.lengths)} tokens, "
        "all positions",
        f"theory = model, to {TOLERANCE:g} logits",
        f"largest error {table['largest_error'].max():.1e}, of logits up to {table['largest_logit'].max():.0f}",
        bool((table["largest_error"] <= TOLERANCE).all()),
    )


def _picture(table: pd.DataFrame) -> Picture:
    """Errors by length, one dot per model, against the threshold."""
    picture = Picture(10.0, 4.4)
    axes = picture.figure.subplots(1, 2, sharey=True)
    colours = [COLOURS["context"], COLOURS["weights"], "#009E73", "#CC79A7"]  # Okabe & Ito's
    for ax, positions in zip(axes, _KINDS, strict=True):
        by_strengths = table[table["positions"] == positions].groupby(_STRENGTHS, sort=False)
        for index, (values, dots) in enumerate(by_strengths):
            ax.scatter(
                dots["length"] * 1.07 ** (index - len(by_strengths) / 2 + 0.5),  # side by side
                dots["largest_error"].clip(lower=1e-17),
                10 + dots["d_vocab"],
                colours[index % len(colours)],
                alpha=0.8,
                label=", ".join(f"{value:g}" for value in values),
            )
        ax.axhline(TOLERANCE, color="black", linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", ylim=(3e-18, max(1e-9, 10 * table["largest_error"].max())))
        ax.set(xlabel="length of the prompts (tokens)", title=f"{positions} positions")
    axes[0].annotate("threshold", (table["length"].min(), TOLERANCE), xytext=(0, 4), textcoords="offset points")
    axes[0].set_ylabel("largest |theory − model| (logits)")
    finish(axes)
    picture.figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right upper",
        title="b1, b2, b3, g\n(larger dot: more tokens)",
        frameon=False,
    )
    return picture
