"""Claim: theory draws the boundary between the prompts that the context wins and those that the weights win."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training import fit_strengths
from hijack_lens.training.fit import agreement_on, conflict_prompts

STATEMENT = (
    "Knowledge hijack: whether the context or the weights win follows from how often (or in what share) the context "
    "shows a bigram, and from how strongly the weights prefer another continuation."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: knowledge hijack"

TIE = 1e-9  # predicted margins closer to 0, in logits, are ties: rounding decides them
NEAR = 1e-6  # distance from the boundary, in nats of log-ratio, at which the winner is asked for
AGREEMENT = 0.95  # of predicted and measured winners in trained models, as a fraction of the prompts

_ASKED = {
    "repeats": "every number of repeats that fits, at each log-ratio",
    "share": "every share of c after the trigger, where g follows otherwise, at each log-ratio",
    "boundary": f"{NEAR:g} nats above and below the boundary of each number of repeats",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    strengths: tuple[Strengths, ...] = (  # of the hand-written models; the first is plotted
        Strengths(20.0, 3.0, 10.0, 1.0),
        Strengths(),
        Strengths(20.0, 1.0, 4.0, 1.0),
        Strengths(3.0, 6.0, 10.0, 1.0),
        Strengths(20.0, 4.0, 10.0, 2.5),
    )
    length: int = 48  # of their prompts
    n_log_ratios: int = 30  # on the diagrams' vertical axis
    occurrences: int = 20  # of the trigger before the prompt's end, in the diagram by share
    recipes: tuple[tuple[str, Recipe], ...] = (  # of the trained models, by name; the last is plotted
        ("fixed triggers", Recipe(0)),
        ("fixed triggers, trained for longer", Recipe(0, finish_steps=400)),
        ("random triggers", RANDOM_TRIGGERS),
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of each recipe
    n_prompts: int = 300  # per trained model


_FIRST_AND_LAST = tuple((name, experiment.quicker(recipe)) for name, recipe in Settings.recipes[::2])
QUICK = Settings(Settings.strengths[:2], n_log_ratios=20, recipes=_FIRST_AND_LAST, seeds=(0, 1, 2), n_prompts=200)


def phase_diagram(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """Theory's boundary separates the prompts that the context wins from those that the weights win.

    Knowledge hijack (Wang & Sato, arXiv 2412.11459), at finite strengths, over the evidence in context and the weights'
    log-ratio log(pi_b(g|q) / pi_b(c|q)). Hand-written float64 models are asked for each number of repeats of (q, c)
    after neutral tokens; for each share of c where g follows q otherwise; and at `NEAR` on both sides of the boundary
    (`phase_boundary`), for each number of repeats.

    Trained models are asked on random conflict prompts of their training length, with 0 to 6 repeats. Theory gets the
    tables that `read_tables` reads off the weights, as in the claim on winners, and none of the models' predictions. It
    is compared with the rule "the context wins once it has spoken", which knows no tables. The boundaries drawn are
    those of four strengths, the same for all tokens (`fit_strengths`).
    """
    answers: dict[str, list[pd.DataFrame]] = {kind: [] for kind in (*_ASKED, *dict(settings.recipes))}
    rows = []
    for strengths in tqdm(settings.strengths, disable=None, unit="model"):
        for kind, found in _ask_hand_written(strengths, settings, make).items():
            answers[kind].append(found)
            rows.append((kind, None, *vars(strengths).values(), *_counted(found)))
    boundaries: list[Tensor] = []
    for name, recipe in settings.recipes:
        boundaries = []
        for seed, run in experiment.replicates(train, recipe, settings.seeds, name):
            found, strengths = _ask_trained(run.model, recipe.length, settings.n_prompts, seed)
            answers[name].append(found)
            rows.append((name, seed, *vars(strengths).values(), *_counted(found)))
            repeats = torch.arange(int(found["evidence"].max()) + 1)
            boundaries.append(theory.phase_boundary(repeats, theory.Setting(strengths), length=recipe.length))
    columns = ["diagram", "seed", "b1", "b2", "b3", "g", "prompts", "ties", "agreement", "agreement_of_rule"]
    table = pd.DataFrame(rows, columns=columns)
    findings = [_by_hand(kind, pd.concat(answers[kind]), settings) for kind in _ASKED]
    for name, recipe in settings.recipes:
        findings += _in_training(name, recipe, table[table["diagram"] == name], settings)
    return Result(tuple(findings), table, _picture(answers, boundaries, settings))


def _by_hand(kind: str, answers: pd.DataFrame, settings: Settings) -> Finding:
    n_prompts, ties, named, _ = _counted(answers)
    return Finding(
        f"{len(settings.strengths)} hand-written models, prompts of {settings.length} tokens: {_ASKED[kind]}",
        "theory names the winner of every prompt, ties left out",
        f"{named:.2%} of {n_prompts - ties} winners; {ties} ties",
        named == 1,
    )


def _in_training(name: str, recipe: Recipe, table: pd.DataFrame, settings: Settings) -> list[Finding]:
    setting = f"{len(table)} trained models, {name}; {settings.n_prompts} prompts of {recipe.length} tokens for each"
    lead = over_seeds(table["agreement"] - table["agreement_of_rule"])
    named = f"theory by tables names at least {AGREEMENT:.0%} of the winners"
    return [
        Finding.at_least(setting, named, table["agreement"], AGREEMENT),
        Finding.judged(
            setting,
            "theory names more winners than the rule that the context wins once it has spoken",
            f"by {lead:.1%} of the prompts; the rule names {over_seeds(table['agreement_of_rule']):.1%}",
            lead.above(0.0),
        ),
    ]


class _Context(NamedTuple):
    """What comes before the prompt's end: evidence for c, and what follows the trigger each time.

    By theory, the boundary is at the log-ratio at which the memories pull equally.
    """

    evidence: float
    follow: Sequence[int]
    boundary: float


def _ask_hand_written(strengths: Strengths, settings: Settings, make: Make) -> dict[str, pd.DataFrame]:
    """Predictions and answers by kind of question, a row per prompt."""
    length, n = settings.length, settings.occurrences
    c, g, q = experiment.IN_CONTEXT, experiment.GLOBAL, experiment.FIRST_TRIGGER
    repeats = torch.arange((length - 2) // 2 + 1)
    boundary = theory.phase_boundary(repeats, theory.Setting(strengths), length=length).tolist()
    by_repeats = [_Context(float(count), [c] * count, boundary[count]) for count in repeats.tolist()]

    by_share = []
    language, generator = experiment.conflict_language([0.0]), torch.Generator().manual_seed(0)
    for count in range(n + 1):
        follow = [c if place < count else g for place in torch.randperm(n, generator=generator).tolist()]
        prompt = experiment.neutral_then_pairs(q, follow, length=length)
        pull = theory.margin(prompt, language, theory.Setting(strengths), in_context=c, global_candidate=g).context
        by_share.append(_Context(count / n, follow, float(pull) / strengths.bigram))

    # To beyond the context's strongest pull, and between round numbers: without repeats, 0 is a tie.
    steps = (torch.arange(settings.n_log_ratios) + 0.5) / settings.n_log_ratios
    grid = steps * 1.25 * strengths.copy / strengths.bigram
    asked = {
        "repeats": list(product(by_repeats, grid.tolist())),
        "share": list(product(by_share, (2 * grid - grid.max()).tolist())),
        "boundary": [(context, context.boundary + side) for context in by_repeats for side in (-NEAR, NEAR)],
    }
    return {kind: _answers(questions, strengths, length, make) for kind, questions in asked.items()}


def _answers(
    questions: Sequence[tuple[_Context, float]], strengths: Strengths, length: int, make: Make
) -> pd.DataFrame:
    """A hand-written model's margin for each context and log-ratio, and theory's."""
    ratios = sorted({ratio for _, ratio in questions})
    trigger = {ratio: experiment.FIRST_TRIGGER + number for number, ratio in enumerate(ratios)}
    model = make(experiment.conflict_language(ratios), strengths=strengths, n_ctx=length, dtype=torch.float64)
    asked = [(trigger[ratio], context.follow) for context, ratio in questions]
    prompts = [experiment.neutral_then_pairs(q, follow, length=length) for q, follow in asked]
    measured = experiment.hijack_margins(model, torch.stack(prompts))[:, -1].tolist()
    rows = [
        (context.evidence, ratio, context.boundary, strengths.bigram * (context.boundary - ratio), margin)
        for (context, ratio), margin in zip(questions, measured, strict=True)
    ]
    return pd.DataFrame(rows, columns=["evidence", "log_ratio", "boundary", "predicted", "measured"])


def _ask_trained(model: BigramTransformer, length: int, n_prompts: int, seed: int) -> tuple[pd.DataFrame, Strengths]:
    """Predictions and answers, a row per prompt, and the strengths that the predictions rest on."""
    fit = fit_strengths(model)
    prompts = conflict_prompts(model.language, fit.setting.triggers, n_prompts, length, seed)
    table = agreement_on(model, fit, prompts).table
    q, c, g = torch.tensor([(one.trigger, one.in_context, one.global_candidate) for one in prompts]).T
    log_pi_b = fit.language.log_pi_b
    answers = {
        "evidence": table["repeats"],
        "log_ratio": (log_pi_b[q, g] - log_pi_b[q, c]).tolist(),
        "predicted": experiment.predicted_margins(prompts, experiment.theory_of(model)).tolist(),
        "measured": table["model_margin"],
    }
    return pd.DataFrame(answers), fit.strengths


def _counted(answers: pd.DataFrame) -> tuple[int, int, float, float]:
    """Prompts, ties, and the fractions of the winners that theory, and the rule without strengths, name."""
    tied = answers["predicted"].abs() < TIE
    clear = answers[~tied]
    rule = np.where(clear["evidence"] > 0, 1, -1)
    by_theory, by_rule = (float((guess * clear["measured"] > 0).mean()) for guess in (clear["predicted"], rule))
    return len(answers), int(tied.sum()), by_theory, by_rule


def _picture(answers: dict[str, list[pd.DataFrame]], boundaries: Sequence[Tensor], settings: Settings) -> Picture:
    """The first hand-written model's two diagrams, and the last recipe's: measured winners, predicted boundary."""
    import matplotlib.colors
    import matplotlib.lines
    import matplotlib.patches

    recipes = [name for name, _ in settings.recipes[-1:]]  # none, or the one to plot
    picture = Picture(5.0 * (2 + len(recipes)) + 0.5, 5.0)
    axes = picture.figure.subplots(1, 2 + len(recipes))
    labels = {"repeats": "repeats of (q, c) in the context", "share": "share of c after q in the context"}
    light = {winner: matplotlib.colors.to_rgba(COLOURS[winner], 0.45) for winner in ("context", "weights")}
    for ax, (kind, label) in zip(axes, labels.items(), strict=False):
        first = answers[kind][0]
        won = first.assign(won=first["measured"] > 0).pivot(index="log_ratio", columns="evidence", values="won")
        colours = matplotlib.colors.ListedColormap([light["weights"], light["context"]])
        ax.pcolormesh(won.columns, won.index, won.to_numpy(float), cmap=colours, vmin=0, vmax=1, shading="nearest")
        line = first.drop_duplicates("evidence")
        ax.plot(line["evidence"], line["boundary"], "k-o", markersize=3)
        strengths = "b1 = {:g}, b2 = {:g}, b3 = {:g}, g = {:g}".format(*vars(settings.strengths[0]).values())
        ax.set(title=f"written by hand ({strengths})", xlabel=label)
    black = "theory's boundary"
    for name in recipes:
        _draw_trained(axes[2], pd.concat(answers[name]), boundaries)
        axes[2].set(title=f"trained, {len(boundaries)} seeds ({name})", xlabel=labels["repeats"])
        black += " (for trained models one a seed, from four fitted strengths)"
    for ax in axes:
        ax.set_ylabel("log π(g|q) − log π(c|q), the weights' preference (nats)")
    patches = [matplotlib.patches.Patch(color=light[winner], label=f"{winner} won") for winner in light]
    line = matplotlib.lines.Line2D([], [], color="black", label=black)
    picture.figure.legend(handles=[*patches, line], loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    experiment.finish(axes, title=11, grid=False)
    return picture


def _draw_trained(ax: Any, answers: pd.DataFrame, boundaries: Sequence[Tensor]) -> None:
    """A dot per prompt, coloured by its winner, side by side for each number of repeats; and each seed's boundary."""
    for winner, part in answers.groupby(np.where(answers["measured"] > 0, "context", "weights")):
        for n, dots in part.groupby("evidence"):
            beside = np.linspace(-0.33, 0.33, len(dots))
            ax.scatter(n + beside, dots["log_ratio"], 9, COLOURS[winner], alpha=0.6, linewidths=0)
    for boundary in boundaries:
        ax.plot(range(len(boundary)), boundary, "k-", linewidth=1, alpha=0.8)
