"""What experiments share: findings, small trained models, prompts that set memories against each other, and plots."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.checks import check_fields, check_list, check_type, shown
from hijack_lens.core.circuit import Strengths
from hijack_lens.core.statistics import student_quantile
from hijack_lens.language import BigramLanguage, HijackPrompt, hijack_prompt
from hijack_lens.models import BigramTransformer, trainable_transformer
from hijack_lens.show.style import Picture, frameless
from hijack_lens.training import TrainConfig, TrainingRun, train
from hijack_lens.training.forward import PlainForward

Verdict = Literal["reproduced", "in part", "not reproduced", "undecided"]

_SAID = {True: "holds", False: "fails", None: "undecided"}


@dataclass(frozen=True)
class Condition:
    """Whether an estimate meets a threshold.

    Attributes:
        holds: `True` where all of the 95% interval does, `False` where none of it does; `None` where it straddles the
            threshold, so that the seeds decide nothing.
        seeds: how many would, at the spread that was seen; `None` where it is decided, or cannot be told.
    """

    holds: bool | None
    seeds: int | None = None


@dataclass(frozen=True)
class Finding:
    """One prediction of a claim, and what was measured.

    Attributes:
        setting: what was measured on: models, prompts, seeds.
        predicted: what should be seen, with its threshold.
        measured: what was seen, with its uncertainty.
        holds: whether the threshold is met, by all of the 95% interval over seeds, or by every seed where that is said;
            `None` where the interval straddles it: undecided.
    """

    setting: str
    predicted: str
    measured: str
    holds: bool | None

    @classmethod
    def judged(cls, setting: str, predicted: str, measured: str, *conditions: Condition | bool) -> "Finding":
        """Holds where all conditions do and fails where one fails; else it says how many seeds would decide."""
        known = [one if isinstance(one, Condition) else Condition(one) for one in conditions]
        held = [one.holds for one in known]
        holds = False if False in held else None if None in held else True
        if holds is None:
            seeds = [one.seeds for one in known if one.holds is None]
            told = [n for n in seeds if n is not None]
            enough = f": about {max(told)} seeds would tell" if len(told) == len(seeds) else ""
            measured += f"; undecided{enough}"
        return cls(setting, predicted, measured, holds)

    @classmethod
    def at_least(
        cls, setting: str, predicted: str, by_seed: Iterable[float], threshold: float, spec: str = ".1%"
    ) -> "Finding":
        """Holds where all of the 95% interval over seeds is at the threshold or above."""
        values = check_list("by_seed", by_seed, "numbers")
        for name, value in [("threshold", threshold), *(("by_seed", value) for value in values)]:
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
        check_type("spec", spec, str)
        found = over_seeds(values)
        return cls.judged(setting, predicted, f"{found:{spec}}", found.at_least(threshold))


@dataclass(frozen=True, repr=False)
class Result:
    """An experiment's outcome.

    Attributes:
        findings: one for each prediction of the claim.
        table: the measurements, one per row.
        figure: the measurements as a picture.
        note: what else a reader must know, if anything.
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame
    figure: Picture
    note: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.findings:
            raise ValueError("findings must hold at least one, got none")

    @property
    def verdict(self) -> Verdict:
        """ "reproduced" where all findings hold, "not reproduced" where all fail, "in part" where some do either.

        "undecided" where that hangs on findings whose intervals straddle their thresholds.
        """
        held = {finding.holds for finding in self.findings}
        if {True, False} <= held:
            return "in part"
        return "undecided" if None in held else "reproduced" if True in held else "not reproduced"

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding, a column per attribute."""
        return pd.DataFrame([vars(finding) for finding in self.findings])

    def __repr__(self) -> str:
        lines = [f"Result: {self.verdict}"]
        for finding in self.findings:
            lines.append(f"  {_SAID[finding.holds]}: {finding.predicted} — {finding.measured}")
            lines.append(f"         ({finding.setting})")
        return "\n".join(lines + [self.note] * bool(self.note))

    def _repr_png_(self) -> bytes:
        return self.figure.png()


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t); `f"{estimate:.1%}"` shows both.

    Attributes:
        mean: the mean over seeds.
        reach: half the interval's width; NaN for fewer than two seeds, so that no threshold is met.
        seeds: how many there were.
    """

    mean: float
    reach: float
    seeds: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.reach

    def at_least(self, threshold: float) -> Condition:
        """Whether the interval lies at the threshold or above."""
        return self._judged(self.low >= threshold, self.high < threshold, threshold)

    def above(self, threshold: float) -> Condition:
        """Whether it lies above the threshold."""
        return self._judged(self.low > threshold, self.high <= threshold, threshold)

    def at_most(self, threshold: float) -> Condition:
        """Whether it lies at the threshold or below."""
        return self._judged(self.high <= threshold, self.low > threshold, threshold)

    def below(self, threshold: float) -> Condition:
        """Whether it lies below the threshold."""
        return self._judged(self.high < threshold, self.low >= threshold, threshold)

    def _judged(self, met: bool, missed: bool, threshold: float) -> Condition:
        if met or missed:
            return Condition(bool(met))
        away = abs(self.mean - threshold)
        if not away > 0 or math.isnan(self.reach):
            return Condition(None)
        # An interval's width falls with the square root of their number.
        return Condition(None, math.ceil(self.seeds * (self.reach / away) ** 2))

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.reach:{spec.lstrip('+')}}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of a measurement over seeds, and its interval; NaN where a seed has none."""
    found = np.array(list(values), dtype=float)
    n = len(found)
    reach = student_quantile(n - 1) * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(found.mean()), reach, n)


def winners_named(answers: pd.DataFrame, tie: float) -> tuple[int, int]:
    """How many of the winners by "measured" margins the "predicted" ones name, and how many there are; without ties."""
    clear = answers[answers["predicted"].abs() > tie]
    return int((clear["predicted"] * clear["measured"] > 0).sum()), len(clear)


Make = Callable[..., BigramTransformer]
"""Makes an experiment's hand-written models: `associative_transformer`, or, in a test, something else."""

IN_CONTEXT, GLOBAL, NEUTRAL, FIRST_TRIGGER = range(4)
"""c, g, a token that is neither, and the first of the triggers q, in a `conflict_language`."""


def conflict_language(log_ratios: Sequence[float]) -> BigramLanguage:
    """A language in which trigger i has log(pi_b(g|q_i) / pi_b(c|q_i)) = log_ratios[i], and all else is uniform.

    The tokens are "c", "g", "x" (the neutral one), and the triggers "q0", "q1", ...
    """
    size = FIRST_TRIGGER + len(log_ratios)
    log_pi_b = torch.zeros(size, size, dtype=torch.float64)
    ratios = torch.tensor(list(log_ratios), dtype=torch.float64)
    log_pi_b[FIRST_TRIGGER:, GLOBAL], log_pi_b[FIRST_TRIGGER:, IN_CONTEXT] = ratios / 2, -ratios / 2
    names = ["c", "g", "x", *(f"q{i}" for i in range(len(log_ratios)))]
    return BigramLanguage(log_pi_b.softmax(-1), torch.full((size,), 1 / size), names)


def neutral_then_pairs(
    trigger: int, continuations: Sequence[int], *, length: int | None = None, lead: int | None = None
) -> Int[Tensor, "pos"]:
    """Neutral tokens (`lead`, or as many as fill the `length`), the trigger with each continuation, and the trigger."""
    pairs = [token for continuation in continuations for token in (trigger, continuation)]
    neutral = lead if lead is not None else (length or 0) - len(pairs) - 1
    if neutral < 0:
        raise ValueError(f"length must be at least {len(pairs) + 1} for {len(continuations)} pairs, got {length}")
    return torch.tensor([NEUTRAL] * neutral + pairs + [trigger])


@torch.no_grad()
def hijack_margins(model: BigramTransformer, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """logit[c] - logit[g] of a model of `conflict_language`, at every position."""
    logits = model(tokens).cpu()
    return logits[..., IN_CONTEXT] - logits[..., GLOBAL]


def margins_by_pairs(
    make: Make, strengths: Strengths, ahead: float, continuations: Sequence[Sequence[int]], lead: int
) -> Float[Tensor, "prompt pairs"]:
    """A hand-written float64 model's margin of c over g after 0, 1, 2, ... pairs of the trigger and a continuation.

    Each prompt has `lead` neutral tokens, then its continuations, all c or g; the weights prefer g by `ahead` nats.
    """
    tokens = torch.stack([neutral_then_pairs(FIRST_TRIGGER, row, lead=lead) for row in continuations])
    model = make(conflict_language([ahead]), strengths=strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
    # A causal model's margins on every shorter prompt are those at the longest one's positions.
    return hijack_margins(model, tokens)[:, lead::2]


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained on a random bigram language with triggers; each seed is a replicate of all of it."""

    seed: int  # of the language, the weights and the sequences
    positions: Literal["relative", "absolute", "none"] = "relative"
    d_vocab: int = 24  # tokens in the language
    concentration: float = 0.3  # of the Dirichlet distribution that its rows are drawn from; less is sharper
    triggers: int = 5  # how many
    fixed: bool = True  # whether these are the first tokens of the vocabulary in all sequences, or drawn for each
    continuations: Literal["uniform", "bigram"] = "uniform"  # of the triggers; "bigram": from the language's rows
    d_model: int = 64
    n_layers: int = 2
    length: int = 48  # tokens per sequence
    steps: int = 240  # of the optimizer
    evaluate_every: int = 25  # steps between probes

    @property
    def language(self) -> BigramLanguage:
        """The language of the sequences."""
        return BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=self.seed)

    @property
    def config(self) -> TrainConfig:
        """The configuration for `hijack_lens.train`."""
        return TrainConfig(
            triggers=tuple(range(self.triggers)) if self.fixed else (),
            n_triggers=None if self.fixed else self.triggers,
            continuations=self.continuations,
            length=self.length,
            seed=self.seed,
            steps=self.steps,
            lr=1e-2,
            evaluate_every=min(self.evaluate_every, self.steps),
        )

    def untrained(self) -> BigramTransformer:
        """The model before its first step, able to read prompts of four times the training length."""
        return trainable_transformer(
            self.language,
            self.positions,
            d_model=self.d_model,
            n_layers=self.n_layers,
            seed=self.seed,
            n_ctx=4 * self.length,
            device="cpu",
        )


RANDOM_TRIGGERS = Recipe(0, fixed=False, triggers=4, d_vocab=16, length=32, steps=300, evaluate_every=300)
"""With this recipe, either memory may win after any token."""

Train = Callable[[Recipe], TrainingRun]
"""Trains an experiment's models: `trained`, or, in a test, something that violates the claim."""


@functools.lru_cache(maxsize=64)
def trained(recipe: Recipe) -> TrainingRun:
    """The recipe's run; the same object for the same recipe, to be treated as read-only."""
    return train(recipe.untrained(), recipe.language, recipe.config)


def replicates(
    train: Train, recipe: Recipe, seeds: Sequence[int], desc: str | None = None
) -> Iterator[tuple[int, TrainingRun]]:
    """Each seed and its run of the recipe, with a progress bar."""
    for seed in tqdm(seeds, desc=desc, disable=None, unit="seed"):
        yield seed, train(replace(recipe, seed=seed))


def conflicts_by_trigger(
    language: BigramLanguage, settings: Any, length: int, generator: torch.Generator
) -> list[HijackPrompt]:
    """A batch of prompts for each trigger (the first tokens) and each of several random in-context candidates.

    Neither candidate occurs outside the evidence. The settings say how many `recipe.triggers` and `candidates` there
    are, how many prompts (`n_prompts`) for each pair of them, and how often the evidence `repeats`.
    """
    prompts = []
    for q in range(settings.recipe.triggers):
        g = language.global_candidate(q)
        order = torch.randperm(language.d_vocab, generator=generator).tolist()
        for c in [token for token in order if token not in (q, g)][: settings.candidates]:
            options: dict[str, Any] = {"filler": "avoid", "n_prompts": settings.n_prompts, "seed": generator}
            prompts.append(hijack_prompt(language, q, c, settings.repeats, length, **options))
    return prompts


def random_conflicts(
    model: BigramTransformer, n_prompts: int, length: int, seed: int, *, draw_global: bool = False
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt 3"]]:
    """Prompts without evidence, which end with a trigger's first occurrence; and q, c and g of each, drawn at random.

    By default g is what the weights say; with `draw_global` it is drawn as well. Neither c nor g is in the prompt.
    """
    language, generator = model.language, torch.Generator().manual_seed(seed)
    triggers = language.trigger_ids(model.triggers)

    def drawn(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    prompts, asked = list[Tensor](), list[tuple[int, int, int]]()
    while len(prompts) < n_prompts:
        q, c = int(triggers[drawn(len(triggers))]), drawn(language.d_vocab)
        g = drawn(language.d_vocab) if draw_global else language.global_candidate(q)
        if len({q, c, g}) == 3:
            prompts.append(
                hijack_prompt(language, q, c, 0, length, filler="avoid", global_candidate=g, seed=generator).tokens
            )
            asked.append((q, c, g))
    return torch.stack(prompts), torch.tensor(asked)


@torch.no_grad()
def margins_of(
    model: BigramTransformer, tokens: Int[Tensor, "prompt pos"], asked: Int[Tensor, "prompt 3"]
) -> Float[Tensor, "prompt pos"]:
    """A trained model's logit[c] - logit[g] at every position, with q, c and g of each prompt."""
    logits = PlainForward(model)(tokens.to(model.W_E.device)).cpu()
    prompt, (_, c, g) = torch.arange(len(tokens)), asked.T
    return logits[prompt, :, c] - logits[prompt, :, g]


def finish(axes: Iterable[Any], *, grid: bool = True, title: int = 12, label: int = 10, tick: int = 10) -> None:
    """Removes the upper and right sides of the frames, draws a faint grid, and sets the text sizes in points."""
    for ax in axes:
        frameless(ax)
        ax.title.set_fontsize(title)
        ax.xaxis.label.set_fontsize(label)
        ax.yaxis.label.set_fontsize(label)
        ax.tick_params(labelsize=tick)
        if grid:
            ax.grid(alpha=0.3)


def draw_by_seed(ax: Any, table: pd.DataFrame, x: str, y: str, thin: dict[str, Any], **thick: Any) -> None:
    """A line for each seed, with the options `thin` as well, and a line for their mean."""
    for _, one in table.groupby("seed"):
        ax.plot(one[x], one[y], **{**thick, "label": None, "marker": None, **thin})
    mean = table.groupby(x)[y].mean()
    ax.plot(mean.index, mean, **thick)
