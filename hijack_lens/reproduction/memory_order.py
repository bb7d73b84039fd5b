"""The order in which the three memories of the induction circuit are learned, and what waits for what."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.trainable import trainable_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import Finding, Result, over_seeds
from hijack_lens.show.style import Picture
from hijack_lens.training.loop import STEPS, gradient_steps, train
from hijack_lens.training.run import TrainConfig, TrainingRun

STATEMENT = (
    "The induction circuit is learned from the top down: copy, then match, then previous token; what is frozen "
    "holds up what builds on it, and one gradient step each, in that order, is enough."
)
SOURCE = "Bietti et al., arXiv 2306.00802, section 5, figure 3, and section 6, theorem 3"

RECALLED = 0.8
"""Fraction of keys that a memory must recall, to the end of training, to count as recalled: half come and go."""

UNLEARNED = 0.25
"""Fraction of keys that a memory recalls at most before its gradient step."""

STEP_RECALLS = 0.5
"""Fraction of keys that a memory recalls at least after its gradient step."""

_FLAT = 20.0
"""Concentration of the languages' rows: tokens follow one another almost at random."""

_NORMS = (10.0, 300.0, 1000.0)
"""Of the gradient steps."""

_NOTHING, _ALL, _NO_MATCH = "nothing", "all steps", "match step left out"
_LINES = {
    "copy": ("copy ($W_{OV}$)", "#0072B2", "-", "o"),
    "match": ("match ($W_{KQ}$)", "#E69F00", "--", "s"),
    "previous_token": ("previous token ($W_K$, layer 0)", "#009E73", ":", "^"),
}

_NOTE = (
    "A memory that is not recalled by the end of training counts as recalled one step after it, so that delays are "
    "understated there. Late positions are learned last."
)

TrainModel = Callable[[BigramTransformer, BigramLanguage, TrainConfig], TrainingRun]
GradientSteps = Callable[..., tuple[BigramTransformer, dict[str, dict[str, float]]]]


@dataclass(frozen=True)
class Settings:
    """Models and sequences in the simplified setting of Bietti et al. 2023.

    Attributes:
        seeds: of languages, weights and sequences.
        d_vocab: tokens in the language, whose rows are drawn from a flat Dirichlet distribution.
        d_model: of the trained models.
        length: of the sequences.
        n_triggers: per sequence, drawn anew.
        frozen_steps: of SGD, with one memory frozen.
        steps: in all; the rest is trained with none frozen.
        lr: of SGD, with momentum.
        step_d_vocab: tokens, where each memory takes a single gradient step.
        step_d_model: there.
        step_length: of the sequences there.
        step_sequences: there, to average each gradient over.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    d_vocab: int = 12
    d_model: int = 128
    length: int = 16
    n_triggers: int = 2
    frozen_steps: int = 100
    steps: int = 400
    lr: float = 20.0
    step_d_vocab: int = 8
    step_d_model: int = 384
    step_length: int = 12
    step_sequences: int = 8192


QUICK = Settings((0, 1, 2), d_model=96, frozen_steps=60, steps=200, step_d_model=256, step_sequences=3072)


def memory_order(
    settings: Settings = Settings(), train: TrainModel = train, gradient_steps: GradientSteps = gradient_steps
) -> Result:
    """The order in which memories are recalled: as trained, with one of them frozen for a while, and by single steps.

    Bietti et al. 2023 (arXiv 2306.00802). The setting is theirs, in small: no MLP; embeddings, unembedding, positions
    and layer-0 values random and frozen; W_Q and W_O the identity; keys and layer-1 values from 0; the loss on
    predictable tokens alone; SGD with momentum. A memory's recall is `memory_recall`'s; it counts as recalled from the
    evaluation on after which recall never falls below `RECALLED`.

    Section 5, figure 3: (1) copy is recalled first, then match, then previous token, at every seed. With a memory's
    matrix frozen for `frozen_steps`: (2) without copy, match recalls nothing, for no gradient reaches it; (3) without
    copy, and without match, previous token recalls less than in the models where nothing was frozen; (4) without
    previous token, copy and match are recalled all the same, at every seed; (5) after that, all that waited is recalled
    later than where nothing was frozen.

    Section 6, theorem 3: (6) one large gradient step each (`gradient_steps`), in this order, recalls each memory after
    its own step and not before: its recall is above `STEP_RECALLS` after it, and below `UNLEARNED` before. The
    theorem's recall of 1 is for infinitely many sequences and dimensions. (7) With the match step left out, the
    previous-token step recalls less than with it.

    Where not every seed must, the 95% interval over seeds does.
    """
    memories = list(STEPS)
    curves = pd.concat(
        _trained(settings, frozen, seed, train)
        for frozen, seed in tqdm([(f, s) for f in (_NOTHING, *memories) for s in settings.seeds], disable=None)
    )
    recalled_at = curves.groupby(["frozen", "seed"])[["step", *memories]].apply(_recalled_at)
    held = curves[curves["step"] == settings.frozen_steps].set_index(["frozen", "seed"])
    stepped = pd.concat(
        _stepped(settings, steps, seed, gradient_steps)
        for steps, seed in tqdm([(f, s) for f in (_ALL, _NO_MATCH) for s in settings.seeds], disable=None)
    ).set_index(["steps", "after"])

    order = recalled_at.loc[_NOTHING]
    in_order = (order["copy"] < order["match"]) & (order["match"] < order["previous_token"])
    in_order &= order["previous_token"] <= settings.steps
    stuck, free = float(held.loc["copy", "match"].max()), float(held.loc[_NOTHING, "match"].min())
    lost = {
        frozen: over_seeds(held.loc[_NOTHING, "previous_token"] - held.loc[frozen, "previous_token"])
        for frozen in ("copy", "match")
    }
    built = float(held.loc["previous_token", ["copy", "match"]].to_numpy().min())
    waited = {
        f"{memory.replace('_', ' ')} for {frozen}": over_seeds(recalled_at.loc[frozen, memory] - order[memory])
        for frozen, memory in (("copy", "match"), ("copy", "previous_token"), ("match", "previous_token"))
    }
    earlier = dict(zip(memories, ("start", *memories), strict=False))
    before = {memory: over_seeds(stepped.loc[(_ALL, earlier[memory]), memory]) for memory in memories}
    after = {memory: over_seeds(stepped.loc[(_ALL, memory), memory]) for memory in memories}
    last = stepped.xs("previous_token", level="after").set_index("seed", append=True)["previous_token"]
    missing = over_seeds(last[_ALL] - last[_NO_MATCH])

    n = len(settings.seeds)
    setting = f"{n} models, d_model {settings.d_model}, length {settings.length}, {settings.steps} steps"
    step_setting = f"{n} models, d_model {settings.step_d_model}, {settings.step_sequences} sequences"
    findings = (
        Finding(
            f"nothing frozen: {setting}",
            "copy is recalled first, then match, then previous token, at every seed",
            "from steps "
            + ", ".join(f"{over_seeds(order[memory]):.0f}" for memory in memories)
            + f"; in this order at {int(in_order.sum())} of {n} seeds",
            bool(in_order.all()),
        ),
        Finding(
            f"copy frozen for {settings.frozen_steps} steps: {setting}",
            f"match recalls nothing then, where it else recalls {RECALLED} or more, at every seed",
            f"recalls of at most {stuck:.2f}, else of at least {free:.2f}",
            stuck == 0 and free >= RECALLED,
        ),
        Finding(
            f"copy, or match, frozen for {settings.frozen_steps} steps: {setting}",
            "previous token recalls less then than where nothing is frozen",
            "; ".join(f"without {frozen}, {less:.2f} less" for frozen, less in lost.items()),
            all(less.low > 0 for less in lost.values()),
        ),
        Finding(
            f"previous token frozen for {settings.frozen_steps} steps: {setting}",
            f"copy and match recall at least {RECALLED} then, at every seed",
            f"recalls of at least {built:.2f}",
            built >= RECALLED,
        ),
        Finding(
            f"copy or match frozen for {settings.frozen_steps} steps: {setting}",
            "what waited is recalled later than where nothing was frozen",
            "; ".join(f"{name}: {late:.0f} steps" for name, late in waited.items()),
            all(late.low > 0 for late in waited.values()),
        ),
        Finding(
            f"one gradient step each: {step_setting}",
            f"each memory recalls less than {UNLEARNED} before its own step and more than {STEP_RECALLS} after it",
            "; ".join(
                f"{memory.replace('_', ' ')} from {before[memory]:.2f} to {after[memory]:.2f}" for memory in memories
            ),
            all(recall.high < UNLEARNED for recall in before.values())
            and all(recall.low > STEP_RECALLS for recall in after.values()),
        ),
        Finding(
            f"the match step left out: {step_setting}",
            "the previous-token step then recalls less than after a match step",
            f"{missing:.2f} less",
            missing.low > 0,
        ),
    )
    table = pd.concat([recalled_at.reset_index().assign(measured="step from which recalled"), stepped.reset_index()])[
        ["measured", "frozen", "steps", "after", "seed", *memories]
    ]
    return Result(findings, table, _drawn(curves, stepped, settings), _NOTE)


def _trained(settings: Settings, frozen: str, seed: int, train: TrainModel) -> pd.DataFrame:
    """Recalls over training, with one memory frozen for its first part."""
    language = BigramLanguage.dirichlet(settings.d_vocab, _FLAT, seed=seed)
    model = trainable_transformer(
        language,
        "absolute",
        d_model=settings.d_model,
        mlp=None,
        init={"W_Q": "identity", "W_O": "identity", "W_K": "zeros", STEPS["copy"]: "zeros"},
        seed=seed,
        n_ctx=settings.length,
        device="cpu",
    )
    parts = []
    for first, steps in ((0, settings.frozen_steps), (settings.frozen_steps, settings.steps - settings.frozen_steps)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in STEPS.values() and (first > 0 or name != STEPS.get(frozen)))
        config = TrainConfig(
            triggers=(),
            n_triggers=settings.n_triggers,
            length=settings.length,
            seed=2 * seed + (first > 0),
            steps=steps,
            loss="predictable",
            optimizer="sgd",
            lr=settings.lr,
            final_lr=1.0,
            evaluate_every=5,
            eval_sequences=1,  # only the weights are asked
            eval_lengths=(1,),
        )
        run = train(model, language, config)
        recalls = pd.DataFrame({memory: run.probe(f"{memory}_recall") for memory in STEPS}).reset_index()
        parts.append(recalls[recalls["step"] > 0] if first else recalls)
        parts[-1]["step"] += first
    return pd.concat(parts).assign(frozen=frozen, seed=seed)


def _recalled_at(curve: pd.DataFrame) -> pd.Series:
    """By memory, the step from which on it recalls `RECALLED` of its keys; one after the last if there is none."""
    missed = {memory: curve.loc[curve[memory] < RECALLED, "step"].max() for memory in STEPS}
    later = {memory: curve.loc[~(curve["step"] <= missed[memory]), "step"].min() for memory in STEPS}
    return pd.Series(later, dtype=float).fillna(curve["step"].max() + 1)


def _stepped(settings: Settings, steps: str, seed: int, gradient_steps: GradientSteps) -> pd.DataFrame:
    """Recalls before and after each gradient step."""
    _, recalls = gradient_steps(
        BigramLanguage.dirichlet(settings.step_d_vocab, _FLAT, seed=seed),
        d_model=settings.step_d_model,
        length=settings.step_length,
        n_sequences=settings.step_sequences,
        n_triggers=settings.n_triggers,
        step_norms=_NORMS if steps == _ALL else (_NORMS[0], 0.0, _NORMS[2]),
        seed=seed,
    )
    rows = [
        {"after": after, **{memory: scores[f"{memory}_recall"] for memory in STEPS}}
        for after, scores in recalls.items()
    ]
    return pd.DataFrame(rows).assign(measured="recall", steps=steps, seed=seed)


def _drawn(curves: pd.DataFrame, stepped: pd.DataFrame, settings: Settings) -> Picture:
    """Recalls over training by what is frozen, and after each single step, in the mean over seeds."""
    picture = Picture(12.0, 7.2)
    axes = picture.figure.subplots(2, 3)
    titles = {
        (0, 0): (_NOTHING, "nothing frozen"),
        (0, 1): ("copy", "copy frozen at first"),
        (1, 0): ("match", "match frozen at first"),
        (1, 1): ("previous_token", "previous token frozen at first"),
    }
    for place, (frozen, title) in titles.items():
        ax = axes[place]
        of_kind = curves[curves["frozen"] == frozen]
        if frozen != _NOTHING:
            ax.axvspan(0, settings.frozen_steps, color="#dddddd", zorder=0)
        for memory, (label, colour, style, _) in _LINES.items():
            for _, curve in of_kind.groupby("seed"):
                ax.plot(curve["step"], curve[memory], style, color=colour, linewidth=0.8, alpha=0.35)
            mean = of_kind.groupby("step")[memory].mean()
            ax.plot(mean.index, mean, style, color=colour, linewidth=3, label=label)
        ax.set_title(title, fontsize=13)
        ax.set_xlabel("training step", fontsize=12)
    for place, (steps, title) in {(0, 2): (_ALL, "one gradient step each"), (1, 2): (_NO_MATCH, _NO_MATCH)}.items():
        ax = axes[place]
        recalls = stepped.loc[steps].groupby("after", sort=False)
        for memory, (_, colour, style, marker) in _LINES.items():
            ax.errorbar(
                range(1 + len(STEPS)),
                recalls[memory].mean(),
                recalls[memory].agg(lambda values: over_seeds(values).reach),
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=8,
                linewidth=3,
                capsize=4,
            )
        ax.set_xticks(range(1 + len(STEPS)), ["start", "copy", "match", "previous\ntoken"])
        ax.set_title(title, fontsize=13)
        ax.set_xlabel("after the step of", fontsize=12)
    for ax in axes.flat:
        ax.set_ylim(-0.05, 1.08)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("recall (fraction of keys)", fontsize=12)
    picture.figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=13
    )
    return picture
