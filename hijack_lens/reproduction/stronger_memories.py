"""Claim: as the memories grow stronger, a count-smoothed mixture becomes a switch."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.associative import associative_transformer
from hijack_lens.reproduction.experiment import (
    FIRST_TRIGGER,
    GLOBAL,
    IN_CONTEXT,
    Finding,
    Make,
    Result,
    conflict_language,
    hijack_margins,
    neutral_then_pairs,
)
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "As the memories grow stronger, in-context prediction goes from a mixture smoothed by counts to a switch; in one "
    "regime no number of repeats overrules the weights, in another a single one does."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: the logits as the strengths of the memories grow"

FOCUS = 40.0
"""b1 of the models here: with e^-40, what the previous-token head lets leak is below rounding."""
TOLERANCE = 1e-9
"""Of attention and of probabilities, absolute; margins this small, in logits, are ties."""
DECIDED = 0.01
"""A probability this close to 0 or 1 is a switch's."""
SWITCHED = 0.95
"""Fraction of all shares that a switch decides."""


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        matches: b2 of the mixtures, rising; the first is 0 and the last as good as infinite.
        n_prompts: for the mixtures.
        length: of those prompts.
        copies: b3 of the switch, rising.
        occurrences: of the trigger in the prompts of the switch.
        switch_ahead: by how many logits the weights prefer g there.
        n_matches, n_copies: of the regimes, how many values of b2 and b3.
        ahead: by how many logits the weights prefer g in the regimes.
        lead: neutral tokens before the repeats in the regimes.
        max_repeats: how many repeats are tried.
        seed: of the mixtures' language and prompts.
    """

    matches: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 40.0)
    n_prompts: int = 200
    length: int = 64
    copies: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 300.0)
    occurrences: int = 40
    switch_ahead: float = 0.5
    n_matches: int = 15
    n_copies: int = 15
    ahead: float = 3.0
    lead: int = 10
    max_repeats: int = 100
    seed: int = 0


QUICK = Settings(n_prompts=40, n_matches=8, n_copies=8, max_repeats=40)


def stronger_memories(settings: Settings = Settings(), make: Make = associative_transformer) -> Result:
    """As strengths grow, in-context prediction goes from a count-smoothed mixture to a switch.

    Wang & Sato (arXiv 2412.11459), in hand-written float64 models with b1 = `FOCUS`. With n_v and n_qv the counts of
    v, and of v after q, in a prompt of T tokens (position 1 remembers itself, so that z_1 = q adds one to n_qq):

    (1) the induction head's attention to v is (e^b2 n_qv + n_v - n_qv) / (e^b2 n_q + T - n_q), and
    (2) so the unigram share n_v / T at b2 = 0, the in-context bigram n_qv / n_q as b2 grows; both to `TOLERANCE`.
    (3) There, P(c) among {c, g} is sigmoid(b3 (share_c - share_g) - D), to `TOLERANCE`, where D is the weights' lead
    for g; and as b3 grows, every share is decided: at the largest b3 at least `SWITCHED` of the shares have P(c) within
    `DECIDED` of 0 or 1, at the smallest b3 none.
    (4) After N neutral tokens, no number of repeats wins where b3 <= D (1 + e^-b2); (5) one does where
    b3 > D (1 + (N + 2) e^-b2); (6) between, the least number is `theory.min_repeats`. Each holds for every model, ties
    left out.
    """
    mixture, worst, limits = _mixtures(settings, make)
    switch = _switch(settings, make)
    regimes = _regimes(settings, make)

    error = float((switch["measured"] - switch["predicted"]).abs().max(skipna=False))
    undecided = switch["measured"].clip(DECIDED, 1 - DECIDED) == switch["measured"]
    decided = 1 - undecided.groupby(switch["b3"]).mean()
    weakest, strongest = float(decided.iloc[0]), float(decided.iloc[-1])
    prompts = f"{settings.n_prompts} random prompts of {settings.length} tokens"
    shares = (
        f"{settings.occurrences + 1} shares of c after q, b3 from {settings.copies[0]:g} to {settings.copies[-1]:g}"
    )
    findings = [
        Finding(
            f"{prompts}, b2 from {settings.matches[0]:g} to {settings.matches[-1]:g}",
            f"attention to every token = smoothed counts, to {TOLERANCE:g}",
            f"largest error {worst:.1e}",
            worst <= TOLERANCE,
        ),
        Finding(
            f"{prompts}, b2 = {settings.matches[0]:g} and {settings.matches[-1]:g}",
            f"limits: unigram shares, and the in-context bigram, to {TOLERANCE:g}",
            f"largest errors {limits[0]:.1e} and {limits[1]:.1e}",
            max(limits) <= TOLERANCE,
        ),
        Finding(
            shares,
            f"P(c) = sigmoid(b3 (share_c - share_g) - {settings.switch_ahead:g}), to {TOLERANCE:g}",
            f"largest error {error:.1e}",
            error <= TOLERANCE,
        ),
        Finding(
            shares,
            f"P(c) within {DECIDED:g} of 0 or 1 at no share for the smallest b3, at {SWITCHED:.0%} for the largest",
            f"{weakest:.0%} and {strongest:.0%}",
            weakest == 0 and strongest >= SWITCHED,
        ),
    ]
    for regime, predicted in _REGIMES.items():
        cells = regimes[(regimes["regime"] == regime) & ~regimes["tie"]]
        right = int((cells["predicted"] == cells["measured"]).sum())
        findings.append(
            Finding(
                f"{len(cells)} models with {predicted[0]}, D = {settings.ahead:g}, N = {settings.lead}, "
                f"0 to {settings.max_repeats} repeats",
                predicted[1],
                f"in {right} of {len(cells)}",
                0 < len(cells) == right,
            )
        )
    tables = {"mixture": mixture, "switch": switch, "regimes": regimes.drop(columns="tie")}
    table = pd.concat([part.assign(part=name) for name, part in tables.items()], ignore_index=True)
    columns = ["part", "b2", "b3", "share", "regime", "predicted", "measured"]
    return Result(tuple(findings), table[columns], _picture(mixture, switch, regimes, settings))


_REGIMES = {
    "never": ("b3 <= D (1 + e^-b2)", "no number of repeats wins"),
    "between": ("b3 between", "theory.min_repeats is the least number that wins"),
    "at once": ("b3 > D (1 + (N + 2) e^-b2)", "one repeat wins"),
}


def _mixtures(settings: Settings, make: Make) -> tuple[pd.DataFrame, float, tuple[float, float]]:
    """Attention to the successor that the counts favour, the largest error of the counts, and those of the limits."""
    d_vocab = 8
    generator = torch.Generator().manual_seed(settings.seed)
    language = BigramLanguage.dirichlet(d_vocab, 1.0, seed=generator)
    tokens = torch.randint(d_vocab, (settings.n_prompts, settings.length), generator=generator)
    tokens[:, -1] = tokens[:, settings.length // 2]  # has occurred before
    q = tokens[:, -1:]
    after_q = torch.cat([tokens[:, :1] == q, tokens[:, :-1] == q], 1)  # position 1 takes itself for its predecessor
    occurrences = one_hot(tokens, d_vocab).double()
    unigram = occurrences.sum(1)
    bigram = (occurrences * after_q[..., None]).sum(1)
    shares = unigram / settings.length, bigram / bigram.sum(-1, keepdim=True)
    favourite = bigram.argmax(-1, keepdim=True)

    rows, worst, errors = [], [], []
    for match in tqdm(settings.matches, desc="mixtures", disable=None, unit="model"):
        strengths = Strengths(FOCUS, match, 1.0, 1.0)
        model = make(language, strengths=strengths, n_ctx=settings.length, dtype=torch.float64)
        with torch.no_grad():
            measured = model(tokens)[:, -1].cpu() - language.log_pi_b[q[:, 0]]
        predicted = _smoothed(unigram, bigram, match)
        worst.append(float((measured - predicted).abs().max()))
        errors.append([float((measured - share).abs().max()) for share in shares])
        means = [float(values.gather(1, favourite).mean()) for values in (predicted, measured)]
        rows.append((match, 1.0, *means))
    # Not max(worst), which NaN would slip through.
    largest = float(torch.tensor(worst).max())
    return pd.DataFrame(rows, columns=["b2", "b3", "predicted", "measured"]), largest, (errors[0][0], errors[-1][1])


def _smoothed(
    unigram: Float[Tensor, "prompt d_vocab"], bigram: Float[Tensor, "prompt d_vocab"], match: float
) -> Float[Tensor, "prompt d_vocab"]:
    """Counts, those after the trigger weighing e^b2 times as much."""
    weighed = unigram + math.expm1(match) * bigram
    return weighed / weighed.sum(-1, keepdim=True)


def _switch(settings: Settings, make: Make) -> pd.DataFrame:
    """P(c) among {c, g}, where c and g share the successors of the trigger."""
    n = settings.occurrences
    language = conflict_language([settings.switch_ahead])
    follow = [[IN_CONTEXT] * k + [GLOBAL] * (n - k) for k in range(n + 1)]
    tokens = torch.stack([neutral_then_pairs(FIRST_TRIGGER, pairs, lead=1) for pairs in follow])
    share = torch.arange(n + 1, dtype=torch.float64) / n
    parts = []
    for copy in tqdm(settings.copies, desc="switch", disable=None, unit="model"):
        strengths = Strengths(FOCUS, FOCUS, copy, 1.0)
        model = make(language, strengths=strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
        predicted = (copy * (2 * share - 1) - settings.switch_ahead).sigmoid()
        measured = hijack_margins(model, tokens)[:, -1].sigmoid()
        columns = {"b2": FOCUS, "b3": copy, "share": share, "predicted": predicted, "measured": measured}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _regimes(settings: Settings, make: Make) -> pd.DataFrame:
    """The least number of repeats that wins, by b2 and b3; infinite where none up to the most that are tried does."""
    lead, ahead = settings.lead, settings.ahead
    language = conflict_language([ahead])
    # A causal model's margins on every shorter prompt are those at the longest one's positions.
    tokens = neutral_then_pairs(FIRST_TRIGGER, [IN_CONTEXT] * settings.max_repeats, lead=lead)[None]
    repeats = torch.arange(settings.max_repeats + 1)
    rows = []
    matches = torch.linspace(0.0, 6.0, settings.n_matches).tolist()
    copies = (ahead * torch.linspace(0.53, 3.47, settings.n_copies)).tolist()
    for match in tqdm(matches, desc="regimes", disable=None, unit="row"):
        for copy in copies:
            setting = theory.Setting(Strengths(FOCUS, match, copy, 1.0))
            model = make(language, strengths=setting.strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
            margins = hijack_margins(model, tokens)[0, lead::2]
            wins = (margins > 0).nonzero().flatten().tolist()
            never = math.inf if bool(margins.isfinite().all()) else math.nan
            if copy <= ahead * (1 + math.exp(-match)):
                regime, predicted = "never", math.inf
            elif copy > ahead * (1 + (lead + 2) * math.exp(-match)):
                regime, predicted = "at once", 1
            else:
                flip = theory.min_repeats(
                    language, FIRST_TRIGGER, IN_CONTEXT, GLOBAL, setting, lead=lead, max_repeats=settings.max_repeats
                )
                regime, predicted = "between", math.inf if flip.repeats is None else flip.repeats
            predicted_margins = theory.phase_boundary(repeats, setting, lead=lead) - ahead
            tie = bool(predicted_margins.abs().min() < TOLERANCE)
            rows.append((match, copy, regime, float(predicted), float(wins[0]) if wins else never, tie))
    return pd.DataFrame(rows, columns=["b2", "b3", "regime", "predicted", "measured", "tie"])


def _picture(mixture: pd.DataFrame, switch: pd.DataFrame, regimes: pd.DataFrame, settings: Settings) -> Picture:
    """Predictions as lines, measurements as dots; the regimes as a map of how many repeats it took."""
    import matplotlib
    import matplotlib.colors

    picture = Picture(16.0, 4.8)
    left, middle, right = picture.figure.subplots(1, 3)

    shown = mixture.assign(b2=mixture["b2"].clip(upper=10))  # beyond, nothing changes
    left.plot(shown["b2"], shown["predicted"], "-", color="black", label="smoothed counts")
    left.plot(shown["b2"], shown["measured"], "o", color=COLOURS["context"], label="model")
    left.set_xlabel(f"b2, strength of the match (last dot: {settings.matches[-1]:g})")
    left.set_ylabel("attention to the likeliest successor in context")
    left.set_ylim(bottom=0)
    left.set_title("from unigram shares to the in-context bigram", fontsize=11)

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(settings.copies)))
    for (copy, part), colour in zip(switch.groupby("b3"), colours, strict=True):
        middle.plot(part["share"], part["predicted"], "-", color=colour)
        middle.plot(part["share"], part["measured"], "o", color=colour, markersize=4, label=f"b3 = {copy:g}")
    middle.set_xlabel("share of c after q in the context")
    middle.set_ylabel("P(c) among {c, g}")
    middle.set_title("from a mixture to a switch", fontsize=11)
    for ax in (left, middle):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)

    least = regimes.pivot(index="b3", columns="b2", values="measured")
    by_repeats = matplotlib.colormaps["viridis_r"].with_extremes(bad=COLOURS["weights"])
    drawn = right.pcolormesh(
        least.columns,
        least.index,
        least.replace(math.inf, math.nan).to_numpy(),
        norm=matplotlib.colors.LogNorm(1, settings.max_repeats),
        cmap=by_repeats,
        shading="nearest",
        alpha=0.75,
    )
    b2 = np.linspace(0, float(regimes["b2"].max()), 200)
    style = {"color": "black", "linewidth": 2}
    right.plot(b2, settings.ahead * (1 + np.exp(-b2)), "-", label="below: never", **style)
    right.plot(b2, settings.ahead * (1 + (settings.lead + 2) * np.exp(-b2)), "--", label="above: one repeat", **style)
    right.set_ylim(least.index.min(), least.index.max())
    right.set_xlabel("b2, strength of the match")
    right.set_ylabel("b3, strength of the copy (logits)")
    right.set_title(f"repeats until the context wins (D = {settings.ahead:g}, N = {settings.lead})", fontsize=11)
    right.legend(frameon=True, loc="upper right", title="theory")
    picture.figure.colorbar(drawn, ax=right, label=f"least repeats (orange: more than {settings.max_repeats})")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    return picture
