"""What experiments share: small trained models, prompts that set memories against each other, and findings."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.statistics import student_quantile
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.trainable import trainable_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.show.style import Picture
from hijack_lens.training.loop import train
from hijack_lens.training.run import TrainConfig, TrainingRun

Verdict = Literal["reproduced", "in part", "not reproduced"]


@dataclass(frozen=True)
class Finding:
    """One thing that a claim predicts, and what was measured.

    Attributes:
        setting: of the measurement: models, prompts, seeds.
        predicted: what should be seen, its threshold stated.
        measured: what was seen, its uncertainty with it.
        holds: whether it meets the threshold.
    """

    setting: str
    predicted: str
    measured: str
    holds: bool


@dataclass(frozen=True, repr=False)
class Result:
    """An experiment's outcome.

    Attributes:
        findings: one for each thing that the claim predicts.
        table: the measurements, a row each.
        figure: the same as a picture.
        note: what a reader must know beside the findings, if anything.
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame
    figure: Picture
    note: str = ""

    def __post_init__(self) -> None:
        if not self.findings:
            raise ValueError("findings must hold at least one, got none")

    @property
    def verdict(self) -> Verdict:
        """ "reproduced" where all findings hold, "not reproduced" where none does."""
        held = [finding.holds for finding in self.findings]
        return "reproduced" if all(held) else "in part" if any(held) else "not reproduced"

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding."""
        rows = [(f.setting, f.predicted, f.measured, f.holds) for f in self.findings]
        return pd.DataFrame(rows, columns=["setting", "predicted", "measured", "holds"])

    def __repr__(self) -> str:
        lines = [f"Result: {self.verdict}"]
        for finding in self.findings:
            lines.append(f"  {'holds' if finding.holds else 'fails'}: {finding.predicted} — {finding.measured}")
            lines.append(f"         ({finding.setting})")
        return "\n".join(lines + [self.note] * bool(self.note))

    def _repr_png_(self) -> bytes:
        return self.figure.png()


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t), as `f"{estimate:.1%}"` shows them.

    Attributes:
        mean: of the seeds.
        reach: of the interval, to either side; NaN for fewer than two seeds, so that no threshold is met.
    """

    mean: float
    reach: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.reach

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.reach:{spec.lstrip('+')}}"


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean of a measurement, and how far it can be trusted; NaN where a seed has none."""
    found = np.array(list(values), dtype=float)
    n = len(found)
    reach = student_quantile(n - 1) * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(found.mean()), reach)


Make = Callable[..., BigramTransformer]
"""What experiments get their hand-written models from: `associative_transformer`, or in a test something else."""

IN_CONTEXT, GLOBAL, NEUTRAL, FIRST_TRIGGER = range(4)
"""c, g, a token that is neither, and the first of the triggers q, in a language of `conflict_language`."""


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
    """Neutral tokens, then the trigger with each of its continuations in turn, then the trigger.

    Args:
        trigger: q.
        continuations: what follows each earlier occurrence of q.
        length: of the prompt: as many neutral tokens as fill it.
        lead: instead, how many neutral tokens.

    Raises:
        ValueError: for a length that the pairs exceed.
    """
    pairs = [token for continuation in continuations for token in (trigger, continuation)]
    neutral = lead if lead is not None else (length or 0) - len(pairs) - 1
    if neutral < 0:
        raise ValueError(f"length must be at least {len(pairs) + 1} for {len(continuations)} pairs, got {length}")
    return torch.tensor([NEUTRAL] * neutral + pairs + [trigger])


@torch.no_grad()
def hijack_margins(model: BigramTransformer, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """logit[c] - logit[g] of a model of `conflict_language`, at every position."""
    logits = model(tokens)
    return logits[..., IN_CONTEXT] - logits[..., GLOBAL]


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained on a random bigram language with triggers; one seed is one replicate of all of it.

    Attributes:
        seed: of the language, the weights and the sequences.
        positions: how they enter the model.
        d_vocab: tokens in the language.
        concentration: of the Dirichlet distribution that its rows are drawn from; less is sharper.
        triggers: how many.
        fixed: whether these are the same tokens, the first of the vocabulary, in all sequences, or drawn for each.
        continuations: of the triggers: "uniform", or from the "bigram" rows of the language.
        d_model: of the residual stream.
        n_layers: of the model.
        length: tokens per sequence.
        steps: of the optimizer.
        evaluate_every: steps between probes.
    """

    seed: int
    positions: Literal["relative", "absolute", "none"] = "relative"
    d_vocab: int = 24
    concentration: float = 0.3
    triggers: int = 5
    fixed: bool = True
    continuations: Literal["uniform", "bigram"] = "uniform"
    d_model: int = 64
    n_layers: int = 2
    length: int = 48
    steps: int = 240
    evaluate_every: int = 25

    @property
    def language(self) -> BigramLanguage:
        """Of the sequences."""
        return BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=self.seed)

    @property
    def config(self) -> TrainConfig:
        """For `hijack_lens.train`."""
        return TrainConfig(
            triggers=tuple(range(self.triggers)) if self.fixed else (),
            n_triggers=None if self.fixed else self.triggers,
            continuations=self.continuations,
            length=self.length,
            seed=self.seed,
            steps=self.steps,
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
"""With these, either memory may win after any token."""

Train = Callable[[Recipe], TrainingRun]
"""What experiments get their models from: `trained`, or in a test something that violates the claim."""


@functools.lru_cache(maxsize=64)
def trained(recipe: Recipe) -> TrainingRun:
    """The recipe carried out; the same run for the same recipe, to be treated as read-only."""
    return train(recipe.untrained(), recipe.language, recipe.config)
