"""Claim: what attribution credits a memory with is what the memory is worth by ablation."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from hijack_lens.attribution import attribute, shapley
from hijack_lens.metrics import margin as hijack_margin
from hijack_lens.models import BigramTransformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training.fit import conflict_prompts

STATEMENT = (
    "What attribution credits the context and the weights with, from one run, agrees with what their components are "
    "worth when ablated in all combinations; the two part by what one memory writes through the other."
)
SOURCE = "beyond the papers; Shapley 1953, and attribution as in the README"

CORRELATION = 0.9  # least, over a model's prompts, between a memory's part of the margin by attribution and by ablation
ROUNDING = 1e-4  # in logits: a root mean square difference below this is float32's, and needs no explanation


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    recipe: Recipe = RANDOM_TRIGGERS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    length: int = 32  # of the prompts
    n_prompts: int = 300  # for each model


QUICK = Settings(seeds=(0, 1, 2), n_prompts=60)


def causal_agreement(settings: Settings = Settings(), train: Train = trained) -> Result:
    """Attribution's split by memory against Shapley values by ablation, on conflict prompts.

    `attribute` splits the margin, given the run's attention and the MLP's gates in it, into context (through the
    induction head), weights (embeddings, biases and the MLP's reading of them) and rest. `shapley` divides the same
    margin between two players, the circuit's heads and its bigram memory, by the 4 runs in which each is present or
    zero-ablated. The context is worth the heads' value; the weights are worth the bigram memory's value plus the run
    without either, which is the direct path. If the memories act side by side, as written by hand, the splits coincide.

    Elsewhere they differ, because the heads' output passes through the bigram memory's MLP. Attribution takes the
    neurons that are on as given: what the heads write through them is the context's, and what they read of the
    embedding is the weights'. Shapley values credit the MLP with half of what the heads change in it. So without a
    norm, and apart from the heads' own biases, the weights' parts differ by exactly

        (what the heads write through the MLP  +  what the MLP alone writes  -  what its embedding path does) / 2

    The note states how much of their difference this explains. It is not a finding, since only norms and the heads'
    biases could make it less than all.
    """
    runs = experiment.replicates(train, settings.recipe, settings.seeds)
    table = pd.concat([_ask(run.model, settings, seed).assign(seed=seed) for seed, run in runs], ignore_index=True)
    return Result(_findings(table, settings), table, _picture(table), _note(table))


@torch.no_grad()
def _ask(model: BigramTransformer, settings: Settings, seed: int) -> pd.DataFrame:
    """A row per prompt: the parts of the margin by attribution and by ablation, and what they should differ by."""
    circuit = model.circuit
    players = {"context": (*circuit.previous_token, *circuit.induction), "weights": circuit.bigram}
    triggers = range(model.cfg.d_vocab) if model.triggers is None else model.triggers
    rows = []
    for prompt in conflict_prompts(model.language, triggers, settings.n_prompts, settings.length, seed):
        found = attribute(model, prompt, answers=[prompt.in_context, prompt.global_candidate])
        split = found.margin()
        by_path = found.by_path()[:, 0] - found.by_path()[:, 1]
        through_mlp = [p.memory != "weights" and any(c in circuit.bigram for c in p.through) for p in found.paths]
        values = shapley(model, prompt, hijack_margin(prompt), players)
        assert values.worth is not None  # of two players, all combinations are run
        rows.append(
            {
                **{part: float(value) for part, value in split.parts.items() if part != "total"},
                "context_ablated": values["context"],
                "weights_ablated": values["weights"] + values.empty,
                "heads_through_mlp": float(by_path[torch.tensor(through_mlp)].sum()),
                "mlp_alone": float(values.worth[0, 1] - split.weights),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(
        difference=table["weights_ablated"] - table["weights"],
        predicted_difference=(table["heads_through_mlp"] + table["mlp_alone"]) / 2,
    )


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    by_seed = table.groupby("seed")
    setting = f"{by_seed.ngroups} trained models, random triggers; {settings.n_prompts} prompts of {settings.length} "
    setting += "tokens for each"
    return tuple(
        Finding.at_least(
            setting,
            f"the {memory} parts by attribution and by ablation correlate at {CORRELATION:g} or more",
            [part[memory].corr(part[f"{memory}_ablated"]) for _, part in by_seed],
            CORRELATION,
            ".3f",
        )
        for memory in ("context", "weights")
    )


def _explained(table: pd.DataFrame) -> float:
    """The share of the mean square difference that its prediction accounts for; 1 where there is none."""
    difference = float((table["difference"] ** 2).mean())
    if difference < ROUNDING**2:
        return 1.0
    return 1 - float(((table["difference"] - table["predicted_difference"]) ** 2).mean()) / difference


def _note(table: pd.DataFrame) -> str:
    mean = table[["heads_through_mlp", "mlp_alone", "rest", "difference"]].abs().mean()
    explained = over_seeds([_explained(part) for _, part in table.groupby("seed")])
    return (
        f"In the weights' part the two differ by {mean['difference']:.2f} logits on average, of which half of what the "
        f"heads change in the MLP explains {explained:.2%}. "
        f"On average the heads write {mean['heads_through_mlp']:.2f} logits of the margin through the MLP, which "
        "attribution counts as theirs and ablation shares with the bigram memory; that other neurons are on "
        f"without them accounts for {mean['mlp_alone']:.2f}, and attribution's rest is {mean['rest']:.2f}."
    )


def _picture(table: pd.DataFrame) -> Picture:
    """A dot per prompt: each memory's part by ablation against attribution; the difference against its prediction."""
    picture = Picture(13.0, 4.8)
    axes = picture.figure.subplots(1, 3)
    for ax, memory in zip(axes, ("context", "weights"), strict=False):
        _dots(ax, table[memory], table[f"{memory}_ablated"], COLOURS[memory])
        ax.set(xlabel=f"{memory}: attribution (logits)", ylabel=f"{memory}: Shapley value by ablation (logits)")
    _dots(axes[2], table["predicted_difference"], table["difference"], COLOURS["rest"])
    axes[2].set_xlabel("half of what the heads change in the MLP (logits)")
    axes[2].set_ylabel("weights' part: Shapley value − attribution (logits)")
    experiment.finish(axes, grid=False)
    return picture


def _dots(ax: Any, x: pd.Series, y: pd.Series, colour: str) -> None:
    """A scatter plot with the line on which both are the same."""
    ax.scatter(x, y, 14, colour, alpha=0.5, linewidths=0)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="the same")
    ax.legend(frameon=False, loc="lower right")
