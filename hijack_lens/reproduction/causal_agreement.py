"""Claim: what attribution credits a memory with is what the memory is worth by ablation."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from hijack_lens.attribution import attribute, shapley
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import all_components
from hijack_lens.hooks.edges import embeddings
from hijack_lens.metrics import margin as hijack_margin
from hijack_lens.models import BigramTransformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import RANDOM_TRIGGERS, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training.fit import conflict_prompts

STATEMENT = (
    "What attribution credits the context and the weights with, from one run, agrees with what either is worth when it "
    "is taken out of what the last MLP and the unembedding read. To ablate the MLP itself is another question, since "
    "the context writes through it, too."
)
SOURCE = "beyond the papers; Shapley 1953, and attribution as in the README"

# Least correlation, over a model's prompts, between a memory's part of the margin by attribution and by intervention.
CORRELATION = {"context": 0.97, "weights": 0.85}
ROUNDING = 1e-4  # in logits: a root mean square difference below this is float32's, and needs no explanation


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    recipe: Recipe = RANDOM_TRIGGERS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    length: int = 32  # of the prompts
    n_prompts: int = 300  # for each model


QUICK = Settings(experiment.quicker(RANDOM_TRIGGERS), seeds=(0, 1, 2), n_prompts=60)


def causal_agreement(settings: Settings = Settings(), train: Train = trained) -> Result:
    """Attribution's split by memory against Shapley values by intervention, on conflict prompts.

    `attribute` splits the margin, given the run's attention and the MLP's gates in it, into context (through the
    induction head), weights (embeddings, biases and the MLP's reading of them) and rest. `shapley` divides the same
    margin among players that are present or absent, in all combinations, in one of two ways.

    *Sources*: what the induction head wrote, the current token's embedding, and what the first layer wrote, each taken
    out of the stream that the last MLP and the unembedding read. *Components*: the circuit's heads and its bigram
    memory, zero-ablated wherever they write. The weights are also worth the run without any player, which in the
    second game has the embedding's direct path. If the memories act side by side, as written by hand, all of these
    splits coincide.

    In trained models the heads' output passes through the bigram memory's MLP. Attribution takes the neurons that are
    on as given: what the heads write through them is the context's, and what they read of the embedding is the
    weights'. So do sources, except that neurons are on which would not be on in the run itself, and the other way
    round: that is all by which they differ from attribution. A game of components asks what becomes of the context
    without the MLP, and credits the MLP with half of what the heads change in it. So without a norm, and apart from the
    heads' own biases, its weights' part differs from attribution's by exactly

        (what the heads write through the MLP  +  what the MLP alone writes  -  what its embedding path does) / 2

    The note states how much of their difference this explains. It is not a finding, since only norms and the heads'
    biases could make it less than all.
    """
    runs = experiment.replicates(train, settings.recipe, settings.seeds)
    table = pd.concat([_ask(run.model, settings, seed).assign(seed=seed) for seed, run in runs], ignore_index=True)
    return Result(_findings(table, settings), table, _picture(table), _note(table))


def _sources(model: BigramTransformer) -> dict[str, list[Component | str]]:
    """Who wrote what the last MLP reads: the induction head, the embeddings, and the layers before."""
    last = model.cfg.n_layers - 1
    induction = model.circuit.induction
    before = [part for part in all_components(model) if part not in induction and part < Component(last, "mlp")]
    embedded = [f"hook_{name}" for name in embeddings(model)]
    return {"context": [*induction], "weights": [*embedded], "rest": [*before]}


@torch.no_grad()
def _ask(model: BigramTransformer, settings: Settings, seed: int) -> pd.DataFrame:
    """A row per prompt: the parts of the margin by attribution and in both games, and what they should differ by."""
    circuit = model.circuit
    components = {"context": (*circuit.previous_token, *circuit.induction), "weights": circuit.bigram}
    last_mlp_reads = f"blocks.{model.cfg.n_layers - 1}.hook_resid_mid"
    triggers = range(model.cfg.d_vocab) if model.triggers is None else model.triggers
    rows = []
    for prompt in conflict_prompts(model.language, triggers, settings.n_prompts, settings.length, seed):
        found = attribute(model, prompt, answers=[prompt.in_context, prompt.global_candidate])
        split = found.margin()
        by_path = found.by_path()[:, 0] - found.by_path()[:, 1]
        through_mlp = [p.memory != "weights" and any(c in circuit.bigram for c in p.through) for p in found.paths]
        margin = hijack_margin(prompt)
        sources = shapley(model, prompt, margin, _sources(model), at=last_mlp_reads)
        values = shapley(model, prompt, margin, components)
        assert values.worth is not None  # of two players, all combinations are run
        rows.append(
            {
                **{part: float(value) for part, value in split.parts.items() if part != "total"},
                "context_source": sources["context"],
                "weights_source": sources["weights"] + sources.empty,
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


def _correlations(table: pd.DataFrame, memory: str, game: str) -> pd.Series:
    """Between a memory's part by attribution and in a game, by seed."""
    return pd.Series([part[memory].corr(part[f"{memory}_{game}"]) for _, part in table.groupby("seed")])


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    setting = f"{table['seed'].nunique()} trained models, random triggers; {settings.n_prompts} prompts of "
    setting += f"{settings.length} tokens for each"
    by_source = [
        Finding.at_least(
            setting,
            f"the {memory} parts by attribution and with sources as players correlate at {least:g} or more",
            _correlations(table, memory, "source"),
            least,
            ".3f",
        )
        for memory, least in CORRELATION.items()
    ]
    components = _correlations(table, "weights", "ablated")
    ahead = over_seeds(_correlations(table, "weights", "source") - components)
    better = Finding.judged(
        setting,
        "in the weights' parts, sources agree better with attribution than components do, whose ablation takes the "
        "context's way through the MLP with it",
        f"by {ahead:.3f}; components correlate at {over_seeds(components):.3f} (in the context's parts "
        f"{over_seeds(_correlations(table, 'context', 'ablated')):.3f})",
        ahead.above(0.0),
    )
    return (*by_source, better)


def _explained(table: pd.DataFrame) -> float:
    """The share of the mean square difference that its prediction accounts for; 1 where there is none."""
    difference = float((table["difference"] ** 2).mean())
    if difference < ROUNDING**2:
        return 1.0
    return 1 - float(((table["difference"] - table["predicted_difference"]) ** 2).mean()) / difference


def _note(table: pd.DataFrame) -> str:
    mean = table[["heads_through_mlp", "mlp_alone", "rest", "difference"]].abs().mean()
    explained = over_seeds([_explained(part) for _, part in table.groupby("seed")])
    switched = {memory: (table[f"{memory}_source"] - table[memory]).abs().mean() for memory in CORRELATION}
    return (
        f"With sources as players, neurons that switch change the context's part by {switched['context']:.2f} logits "
        f"on average, and the weights' by {switched['weights']:.2f}. "
        f"With components as players, the weights' parts differ by {mean['difference']:.2f} logits on average, of "
        f"which half of what the heads change in the MLP explains {explained:.2%}. "
        f"On average the heads write {mean['heads_through_mlp']:.2f} logits of the margin through the MLP, which "
        "attribution counts as theirs and ablation shares with the bigram memory; that other neurons are on "
        f"without them accounts for {mean['mlp_alone']:.2f}, and attribution's rest is {mean['rest']:.2f}."
    )


def _picture(table: pd.DataFrame) -> Picture:
    """A dot per prompt: each memory's part with sources as players against attribution, and the weights' by ablation;
    and the correlations by seed, with 95% intervals."""
    picture = Picture(16.0, 4.8)
    axes = picture.figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.8))
    for ax, memory in zip(axes, CORRELATION, strict=False):
        _dots(ax, table[memory], table[f"{memory}_source"], COLOURS[memory])
        ax.set(xlabel=f"{memory}: attribution (logits)", ylabel=f"{memory}: Shapley value of the source (logits)")
    _dots(axes[2], table["weights"], table["weights_ablated"], COLOURS["rest"])
    axes[2].set(xlabel="weights: attribution (logits)", ylabel="weights: Shapley value of the MLP (logits)")
    games = {"source": "sources", "ablated": "components"}
    cases = [(memory, game) for memory in CORRELATION for game in games]
    found = [over_seeds(_correlations(table, memory, game)) for memory, game in cases]
    colours = [COLOURS[memory if game == "source" else "rest"] for memory, game in cases]
    experiment.bars(axes[3], [float(place) for place in range(len(cases))], found, 0.7, color=colours)
    axes[3].set_ylabel("correlation with attribution over prompts")
    experiment.finish(axes, grid=False)
    names = [f"{memory}\n{games[game]}" for memory, game in cases]
    axes[3].set_xticks(range(len(names)), names, fontsize=8, rotation=30)
    return picture


def _dots(ax: Any, x: pd.Series, y: pd.Series, colour: str) -> None:
    """A scatter plot with the line on which both are the same."""
    ax.scatter(x, y, 14, colour, alpha=0.5, linewidths=0)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="the same")
    ax.legend(frameon=False, loc="lower right")
