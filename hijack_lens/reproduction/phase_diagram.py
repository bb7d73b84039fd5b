"""Claim: theory draws the boundary between the prompts that the context wins and those that the weights win."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import (
    FIRST_TRIGGER,
    GLOBAL,
    IN_CONTEXT,
    RANDOM_TRIGGERS,
    Finding,
    Make,
    Recipe,
    Result,
    Train,
    conflict_language,
    hijack_margins,
    neutral_then_pairs,
    over_seeds,
    trained,
)
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training.fit import fit_strengths, theory_agreement

STATEMENT = (
    "Knowledge hijack: whether the context or the weights win follows from how often (or in what share) the context "
    "shows a bigram, and from how strongly the weights prefer another continuation."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: knowledge hijack"

TIE = 1e-9
"""Predicted margins closer to 0, in logits, are ties: rounding decides them."""
NEAR = 1e-6
"""How far beside the boundary, in nats of log-ratio, the winner is asked for."""
AGREEMENT = 0.95
"""Of predicted and measured winners in trained models, as a fraction of the prompts."""

_ASKED = {
    "repeats": "0 to all repeats that fit, times the log-ratios",
    "share": "the share of c after the trigger, g following else, times the log-ratios",
    "boundary": f"{NEAR:g} nats above and below the boundary of each number of repeats",
}


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        strengths: of the hand-written models; the first is drawn.
        length: of their prompts.
        n_log_ratios: of the diagrams' vertical axis.
        occurrences: in the diagram by share, of the trigger before the prompt's end.
        recipes: of the trained models, by name, each for all seeds; the last is drawn.
        seeds: of the trained models.
        n_prompts: per trained model.
    """

    strengths: tuple[Strengths, ...] = (
        Strengths(20.0, 3.0, 10.0, 1.0),
        Strengths(),
        Strengths(20.0, 1.0, 4.0, 1.0),
        Strengths(3.0, 6.0, 10.0, 1.0),
        Strengths(20.0, 4.0, 10.0, 2.5),
    )
    length: int = 48
    n_log_ratios: int = 30
    occurrences: int = 20
    recipes: tuple[tuple[str, Recipe], ...] = (
        ("fixed triggers", Recipe(0)),
        ("fixed triggers, trained for longer", Recipe(0, steps=400, evaluate_every=400)),
        ("random triggers", RANDOM_TRIGGERS),
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_prompts: int = 300


QUICK = Settings(
    strengths=Settings.strengths[:2],
    n_log_ratios=20,
    recipes=(Settings.recipes[0], Settings.recipes[-1]),
    seeds=(0, 1, 2),
    n_prompts=200,
)


def phase_diagram(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """Theory's boundary separates the prompts that the context wins from those that the weights win.

    Knowledge hijack (Wang & Sato, arXiv 2412.11459), at finite strengths, over the evidence in context and the weights'
    log-ratio log(pi_b(g|q) / pi_b(c|q)). Hand-written models, float64, are asked (1) for each number of repeats of
    (q, c) after neutral tokens; (2) for each share of c where g follows q otherwise; (3) at `NEAR` on both sides of the
    boundary, for each number of repeats. Each holds where theory (`phase_boundary`, `margin`) names the winner of
    every prompt, ties (`TIE`) left out.

    Trained models are asked on random conflict prompts of their training length, with 0 to 6 repeats. Theory has what
    `fit_strengths` reads off the weights, and no prediction. By the 95% interval over seeds, it names (1) at least
    `AGREEMENT` of the winners, and (2) more of them, seed by seed, than the rule "the context wins once it has spoken",
    which knows no strengths.
    """
    cells: dict[str, list[pd.DataFrame]] = {kind: [] for kind in (*_ASKED, *dict(settings.recipes))}
    rows = []
    for strengths in tqdm(settings.strengths, disable=None, unit="model"):
        for kind, answers in _ask_hand_written(strengths, settings, make).items():
            cells[kind].append(answers)
            rows.append((kind, None, *vars(strengths).values(), *_counted(answers)))
    boundaries: list[Tensor] = []
    for name, recipe in settings.recipes:
        boundaries = []
        for seed in tqdm(settings.seeds, desc=name, disable=None, unit="seed"):
            model = train(replace(recipe, seed=seed)).model
            answers, strengths = _ask_trained(model, recipe.length, settings.n_prompts, seed)
            cells[name].append(answers)
            rows.append((name, seed, *vars(strengths).values(), *_counted(answers)))
            repeats = torch.arange(int(answers["evidence"].max()) + 1)
            boundaries.append(theory.phase_boundary(repeats, theory.Setting(strengths), length=recipe.length))
    columns = ["diagram", "seed", "b1", "b2", "b3", "g", "prompts", "ties", "agreement", "agreement_of_rule"]
    table = pd.DataFrame(rows, columns=columns)

    findings = []
    for kind, asked in _ASKED.items():
        n_prompts, ties, named, _ = _counted(pd.concat(cells[kind]))
        findings.append(
            Finding(
                f"{len(settings.strengths)} hand-written models, prompts of {settings.length} tokens: {asked}",
                "theory names the winner of every prompt, ties left out",
                f"{named:.2%} of {n_prompts - ties} winners; {ties} ties",
                named == 1,
            )
        )
    for name, recipe in settings.recipes:
        part = table[table["diagram"] == name]
        setting = f"{len(part)} trained models, {name}; {settings.n_prompts} prompts of {recipe.length} tokens for each"
        agreement = over_seeds(part["agreement"])
        lead = over_seeds(part["agreement"] - part["agreement_of_rule"])
        findings += [
            Finding(
                setting,
                f"theory at fitted strengths names at least {AGREEMENT:.0%} of the winners",
                f"{agreement:.1%}",
                agreement.low >= AGREEMENT,
            ),
            Finding(
                setting,
                "theory names more winners than the rule that the context wins once it has spoken",
                f"by {lead:.1%} of the prompts; the rule names {over_seeds(part['agreement_of_rule']):.1%}",
                lead.low > 0,
            ),
        ]
    return Result(tuple(findings), table, _picture(cells, boundaries, settings))


@dataclass(frozen=True)
class _Context:
    """What stands before the prompt's end, and where theory draws the boundary.

    Attributes:
        evidence: for c: repeats, or a share.
        follow: what follows the trigger, in turn.
        boundary: the log-ratio at which the memories pull alike.
    """

    evidence: float
    follow: tuple[int, ...]
    boundary: float


def _ask_hand_written(strengths: Strengths, settings: Settings, make: Make) -> dict[str, pd.DataFrame]:
    """Predictions and answers by kind of question, a row per prompt."""
    length, occurrences, setting = settings.length, settings.occurrences, theory.Setting(strengths)
    repeats = torch.arange((length - 2) // 2 + 1)
    boundary = theory.phase_boundary(repeats, setting, length=length)
    counted = zip(repeats.tolist(), boundary.tolist(), strict=True)
    by_repeats = [_Context(float(n), (IN_CONTEXT,) * n, x) for n, x in counted]

    by_share = []
    language, generator = conflict_language([0.0]), torch.Generator().manual_seed(0)
    for n in range(occurrences + 1):
        order = torch.randperm(occurrences, generator=generator).tolist()
        follow = tuple(IN_CONTEXT if place < n else GLOBAL for place in order)
        prompt = neutral_then_pairs(FIRST_TRIGGER, follow, length=length)
        pull = theory.margin(prompt, language, setting, in_context=IN_CONTEXT, global_candidate=GLOBAL).context
        by_share.append(_Context(n / occurrences, follow, float(pull) / strengths.bigram))

    # Up to beyond what the context can pull, and between round numbers: without repeats, 0 is a tie.
    grid = (
        (torch.arange(settings.n_log_ratios) + 0.5) / settings.n_log_ratios * 1.25 * strengths.copy / strengths.bigram
    )
    asked = {
        "repeats": [(context, ratio) for context in by_repeats for ratio in grid.tolist()],
        "share": [(context, ratio) for context in by_share for ratio in (2 * grid - grid.max()).tolist()],
        "boundary": [(context, context.boundary + side) for context in by_repeats for side in (-NEAR, NEAR)],
    }
    return {kind: _answers(questions, strengths, length, make) for kind, questions in asked.items()}


def _answers(
    questions: Sequence[tuple[_Context, float]], strengths: Strengths, length: int, make: Make
) -> pd.DataFrame:
    """A hand-written model's margin for each context and log-ratio, and theory's."""
    ratios = sorted({ratio for _, ratio in questions})
    trigger = {ratio: FIRST_TRIGGER + number for number, ratio in enumerate(ratios)}
    model = make(conflict_language(ratios), strengths=strengths, n_ctx=length, dtype=torch.float64)
    prompts = [neutral_then_pairs(trigger[ratio], context.follow, length=length) for context, ratio in questions]
    measured = hijack_margins(model, torch.stack(prompts))[:, -1].tolist()
    rows = [
        (context.evidence, ratio, context.boundary, strengths.bigram * (context.boundary - ratio), margin)
        for (context, ratio), margin in zip(questions, measured, strict=True)
    ]
    return pd.DataFrame(rows, columns=["evidence", "log_ratio", "boundary", "predicted", "measured"])


def _ask_trained(model: BigramTransformer, length: int, n_prompts: int, seed: int) -> tuple[pd.DataFrame, Strengths]:
    """Predictions and answers, a row per prompt, and the strengths that the predictions rest on."""
    fit = fit_strengths(model)
    table = theory_agreement(model, fit, n_prompts=n_prompts, length=length, seed=seed).table
    q, c, g = ([fit.language.index(token) for token in table[role]] for role in ("trigger", "in_context", "global"))
    log_pi_b = fit.language.log_pi_b
    answers = {
        "evidence": table["repeats"],
        "log_ratio": (log_pi_b[q, g] - log_pi_b[q, c]).tolist(),
        "predicted": table["theory_margin"],
        "measured": table["model_margin"],
    }
    return pd.DataFrame(answers), fit.strengths


def _counted(answers: pd.DataFrame) -> tuple[int, int, float, float]:
    """Prompts, ties, and the fractions of the winners that theory, and the rule without strengths, name."""
    tied = answers["predicted"].abs() < TIE
    clear = answers[~tied]
    context_spoke = (clear["evidence"] > 0).map({True: 1, False: -1})
    by_theory, by_rule = (
        float((guess * clear["measured"] > 0).mean()) for guess in (clear["predicted"], context_spoke)
    )
    return len(answers), int(tied.sum()), by_theory, by_rule


def _picture(cells: dict[str, list[pd.DataFrame]], boundaries: Sequence[Tensor], settings: Settings) -> Picture:
    """The first hand-written model's two diagrams, and the last recipe's: measured winners, predicted boundary."""
    import matplotlib.colors
    import matplotlib.lines
    import matplotlib.patches

    trained_ones = [name for name, _ in settings.recipes]
    picture = Picture(5.0 * (2 + bool(trained_ones)) + 0.5, 5.0)
    axes = picture.figure.subplots(1, 2 + bool(trained_ones), squeeze=False)[0]
    labels = {"repeats": "repeats of (q, c) in the context", "share": "share of c after q in the context"}
    light = {winner: matplotlib.colors.to_rgba(COLOURS[winner], 0.45) for winner in ("context", "weights")}
    for ax, (kind, label) in zip(axes, labels.items(), strict=False):
        first = cells[kind][0]
        won = first.assign(won=first["measured"] > 0).pivot(index="log_ratio", columns="evidence", values="won")
        colours = matplotlib.colors.ListedColormap([light["weights"], light["context"]])
        ax.pcolormesh(won.columns, won.index, won.to_numpy(float), cmap=colours, vmin=0, vmax=1, shading="nearest")
        line = first.drop_duplicates("evidence")
        ax.plot(line["evidence"], line["boundary"], "k-o", markersize=3)
        ax.set_title(f"written by hand ({_described(settings.strengths[0])})", fontsize=11)
        ax.set_xlabel(label)
    if trained_ones:
        ax, answers = axes[2], pd.concat(cells[trained_ones[-1]])
        for winner, part in answers.groupby((answers["measured"] > 0).map({True: "context", False: "weights"})):
            for n in range(int(part["evidence"].max()) + 1):
                dots = part[part["evidence"] == n]
                beside = np.linspace(-0.33, 0.33, len(dots))
                ax.scatter(n + beside, dots["log_ratio"], 9, COLOURS[winner], alpha=0.6, linewidths=0)
        for boundary in boundaries:
            ax.plot(np.arange(len(boundary)), boundary, "k-", linewidth=1, alpha=0.8)
        ax.set_title(f"trained, {len(boundaries)} seeds ({trained_ones[-1]})", fontsize=11)
        ax.set_xlabel(labels["repeats"])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel("log π(g|q) − log π(c|q), the weights' preference (nats)")
    patches = [matplotlib.patches.Patch(color=light[winner], label=f"{winner} won") for winner in light]
    label = "theory's boundary"
    if trained_ones:
        label += "; of trained models each seed's, where c and g occur nowhere else"
    black = matplotlib.lines.Line2D([], [], color="black", label=label)
    picture.figure.legend(handles=[*patches, black], loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    return picture


def _described(strengths: Strengths) -> str:
    return "b1 = {:g}, b2 = {:g}, b3 = {:g}, g = {:g}".format(*vars(strengths).values())
