"""The order in which the three memories of the induction circuit are learned, and what waits for what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.language import BigramLanguage
from hijack_lens.models import BigramTransformer, trainable_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import TrainModel
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import Picture
from hijack_lens.training import TrainConfig, gradient_steps, train
from hijack_lens.training.one_step import STEPS

STATEMENT = (
    "The induction circuit is learned from the top down: copy, then match, then previous token; what is frozen "
    "holds up what builds on it, and one gradient step each, in that order, is enough."
)
SOURCE = "Bietti et al., arXiv 2306.00802, section 5, figure 3, and section 6, theorem 3"

RECALLED = 0.8  # fraction of keys that a memory must recall to the end of training; recalls of half come and go
UNLEARNED = 0.25  # fraction of keys that a memory recalls at most before its gradient step
STEP_RECALLS = 0.5  # fraction of keys that a memory recalls at least after its gradient step

_FLAT = 20.0  # concentration of the languages' rows: tokens follow one another almost at random
_NORMS = (10.0, 300.0, 1000.0)  # of the gradient steps

_MEMORIES = list(STEPS)
_NOTHING, _ALL, _NO_MATCH = "nothing", "all steps", "match step left out"
_LINES = {
    "copy": {"label": "copy ($W_{OV}$)", "color": "#0072B2", "linestyle": "-", "marker": "o"},
    "match": {"label": "match ($W_{KQ}$)", "color": "#E69F00", "linestyle": "--", "marker": "s"},
    "previous_token": {"label": "previous token ($W_K$, layer 0)", "color": "#009E73", "linestyle": ":", "marker": "^"},
}

GradientSteps = Callable[..., tuple[BigramTransformer, dict[str, dict[str, float]]]]


@dataclass(frozen=True)
class Settings:
    """Models and sequences in the simplified setting of Bietti et al. 2023; `step_` marks those of single steps."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of languages, weights and sequences
    d_vocab: int = 12  # tokens in the language, whose rows are drawn from a flat Dirichlet distribution
    d_model: int = 128
    length: int = 16  # of the sequences
    n_triggers: int = 2  # per sequence, drawn anew
    frozen_steps: int = 100  # of SGD, with one memory frozen
    steps: int = 400  # in all; in the rest nothing is frozen
    lr: float = 20.0  # of SGD, with momentum
    step_d_vocab: int = 8
    step_d_model: int = 384
    step_length: int = 12
    step_sequences: int = 8192  # to average each gradient over


QUICK = Settings((0, 1, 2), d_model=96, frozen_steps=60, steps=200, step_d_model=256, step_sequences=3072)


def memory_order(
    settings: Settings = Settings(), train: TrainModel = train, gradient_steps: GradientSteps = gradient_steps
) -> Result:
    """The order in which memories are learned: in training, with one of them frozen for a while, and by single steps.

    Bietti et al. 2023 (arXiv 2306.00802), section 5, figure 3, in a small version of their setting: no MLP;
    embeddings, unembedding, positions and layer-0 values random and frozen; W_Q and W_O the identity; keys and layer-1
    values starting at 0; the loss on predictable tokens alone; SGD with momentum. A memory's recall is that of
    `memory_recall`; it counts as recalled from the first evaluation from which on recall never falls below `RECALLED`.
    Without copy, no gradient reaches match.

    Section 6, theorem 3: with one large gradient step each (`gradient_steps`), in this order, each memory is recalled
    after its own step and not before. The theorem's recall of 1 is for infinitely many sequences and dimensions. The
    steps are also taken without the match step.
    """
    trained = [(frozen, seed) for frozen in (_NOTHING, *_MEMORIES) for seed in settings.seeds]
    curves = pd.concat(_trained(settings, *which, train) for which in tqdm(trained, disable=None))
    by_seed = curves.groupby(["frozen", "seed"])[["step", *_MEMORIES]]
    recalled_at = by_seed.apply(_recalled_at)
    held = curves[curves["step"] == settings.frozen_steps].set_index(["frozen", "seed"])
    stepped = [(steps, seed) for steps in (_ALL, _NO_MATCH) for seed in settings.seeds]
    singly = pd.concat(_stepped(settings, *which, gradient_steps) for which in tqdm(stepped, disable=None))
    table = pd.concat([recalled_at.reset_index().assign(measured="step from which recalled"), singly])
    singly = singly.set_index(["steps", "after"])
    return Result(
        (*_in_training(recalled_at, held, settings), *_by_single_steps(singly, settings)),
        table[["measured", "frozen", "steps", "after", "seed", *_MEMORIES]],
        _picture(curves, singly, settings),
        "A memory that is not recalled by the end of training counts as recalled one step after it, so that delays are "
        "understated there. Late positions are learned last.",
    )


def _in_training(recalled_at: pd.DataFrame, held: pd.DataFrame, settings: Settings) -> list[Finding]:
    order = recalled_at.loc[_NOTHING]
    in_order = (order["copy"] < order["match"]) & (order["match"] < order["previous_token"])
    in_order &= order["previous_token"] <= settings.steps
    stuck, free = held.loc["copy", "match"].max(), held.loc[_NOTHING, "match"].min()
    previous = held["previous_token"]
    lost = {frozen: over_seeds(previous[_NOTHING] - previous[frozen]) for frozen in ("copy", "match")}
    built = held.loc["previous_token", ["copy", "match"]].min(axis=None)
    waited = {
        f"{_spaced(memory)} for {frozen}": over_seeds(recalled_at.loc[frozen, memory] - order[memory])
        for frozen, memory in (("copy", "match"), ("copy", "previous_token"), ("match", "previous_token"))
    }
    n, held_back = len(settings.seeds), f"frozen for {settings.frozen_steps} steps"
    setting = f"{n} models, d_model {settings.d_model}, length {settings.length}, {settings.steps} steps"
    return [
        Finding(
            f"nothing frozen: {setting}",
            "copy is recalled first, then match, then previous token, at every seed",
            f"from steps {', '.join(f'{over_seeds(order[memory]):.0f}' for memory in _MEMORIES)}; in this order at "
            f"{in_order.sum()} of {n} seeds",
            bool(in_order.all()),
        ),
        Finding(
            f"copy {held_back}: {setting}",
            f"match recalls nothing then, but {RECALLED} or more where nothing is frozen, at every seed",
            f"recalls of at most {stuck:.2f}, against at least {free:.2f}",
            bool(stuck == 0 and free >= RECALLED),
        ),
        Finding.judged(
            f"copy, or match, {held_back}: {setting}",
            "previous token then recalls less than where nothing is frozen",
            "; ".join(f"without {frozen}, {less:.2f} less" for frozen, less in lost.items()),
            *(less.above(0.0) for less in lost.values()),
        ),
        Finding(
            f"previous token {held_back}: {setting}",
            f"copy and match recall at least {RECALLED} then, at every seed",
            f"recalls of at least {built:.2f}",
            bool(built >= RECALLED),
        ),
        Finding.judged(
            f"copy or match {held_back}: {setting}",
            "what waited is recalled later than where nothing was frozen",
            "; ".join(f"{name}: {late:.0f} steps" for name, late in waited.items()),
            *(late.above(0.0) for late in waited.values()),
        ),
    ]


def _by_single_steps(singly: pd.DataFrame, settings: Settings) -> list[Finding]:
    steps = zip(("start", *_MEMORIES), _MEMORIES, strict=False)  # each memory's own step, after the one before
    before = {memory: over_seeds(singly.loc[(_ALL, earlier), memory]) for earlier, memory in steps}
    after = {memory: over_seeds(singly.loc[(_ALL, memory), memory]) for memory in _MEMORIES}
    last = singly.xs("previous_token", level="after").set_index("seed", append=True)["previous_token"]
    missing = over_seeds(last[_ALL] - last[_NO_MATCH])
    setting = f"{len(settings.seeds)} models, d_model {settings.step_d_model}, {settings.step_sequences} sequences"
    return [
        Finding.judged(
            f"one gradient step each: {setting}",
            f"each memory recalls less than {UNLEARNED} before its own step and more than {STEP_RECALLS} after it",
            "; ".join(f"{_spaced(memory)} from {before[memory]:.2f} to {after[memory]:.2f}" for memory in _MEMORIES),
            *(before[memory].below(UNLEARNED) for memory in _MEMORIES),
            *(after[memory].above(STEP_RECALLS) for memory in _MEMORIES),
        ),
        Finding.judged(
            f"the match step left out: {setting}",
            "the previous-token step then recalls less than after a match step",
            f"{missing:.2f} less",
            missing.above(0.0),
        ),
    ]


def _spaced(memory: str) -> str:
    return memory.replace("_", " ")


def _trained(settings: Settings, frozen: str, seed: int, train: TrainModel) -> pd.DataFrame:
    """Recalls over training, with one memory frozen for its first part."""
    language = BigramLanguage.dirichlet(settings.d_vocab, _FLAT, seed=seed)
    init = {"W_Q": "identity", "W_O": "identity", "W_K": "zeros", STEPS["copy"]: "zeros"}
    options: dict[str, Any] = {"mlp": None, "init": init, "n_ctx": settings.length, "device": "cpu"}
    model = trainable_transformer(language, "absolute", d_model=settings.d_model, seed=seed, **options)
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
    """For each memory, the step from which on it recalls `RECALLED` of its keys; if none, one after the last."""
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
    table = pd.DataFrame(recalls).T.rename(columns=lambda name: name.removesuffix("_recall"))
    return table.rename_axis("after").reset_index().assign(measured="recall", steps=steps, seed=seed)


def _picture(curves: pd.DataFrame, singly: pd.DataFrame, settings: Settings) -> Picture:
    """Recalls over training by what is frozen, and after each single step, averaged over seeds."""
    picture = Picture(12.0, 7.2)
    axes = picture.figure.subplots(2, 3)
    for ax, frozen in zip(axes[:, :2].flat, (_NOTHING, *_MEMORIES), strict=True):
        if frozen != _NOTHING:
            ax.axvspan(0, settings.frozen_steps, color="#dddddd", zorder=0)
        for memory, style in _LINES.items():
            thick = {**style, "marker": None, "linewidth": 3}
            part = curves[curves["frozen"] == frozen]
            experiment.draw_by_seed(ax, part, "step", memory, {"linewidth": 0.8, "alpha": 0.35}, **thick)
        ax.set_title(f"{_spaced(frozen)} frozen" + " at first" * (frozen != _NOTHING))
        ax.set_xlabel("training step")
    for ax, kind, title in zip(axes[:, 2], (_ALL, _NO_MATCH), ("one gradient step each", _NO_MATCH), strict=True):
        recalls = singly.loc[kind].groupby("after", sort=False)
        for memory, style in _LINES.items():
            reach = recalls[memory].agg(lambda values: over_seeds(values).reach)
            ax.errorbar(range(4), recalls[memory].mean(), reach, **style, markersize=8, linewidth=3, capsize=4)
        ax.set_xticks(range(4), ["start", "copy", "match", "previous\ntoken"])
        ax.set(title=title, xlabel="after the step of")
    for ax in axes.flat:
        ax.set_ylim(-0.05, 1.08)
    for ax in axes[:, 0]:
        ax.set_ylabel("recall (fraction of keys)")
    picture.figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=13
    )
    experiment.finish(axes.flat, title=13, label=12, tick=11)
    return picture
