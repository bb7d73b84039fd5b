"""Claim: as the memories grow stronger, a count-smoothed mixture becomes a switch."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.language import BigramLanguage
from hijack_lens.models import associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import FIRST_TRIGGER, GLOBAL, IN_CONTEXT, Make
from hijack_lens.reproduction.findings import Finding, Result
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "As the memories grow stronger, in-context prediction goes from a mixture smoothed by counts to a switch; in one "
    "regime no number of repeats overrules the weights, in another a single one does."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: the logits as the strengths of the memories grow"

FOCUS = 40.0  # b1 of the models here: what the previous-token head leaks, e^-40, is below rounding
TOLERANCE = 1e-9  # of attention and of probabilities, absolute; margins this small, in logits, are ties
DECIDED = 0.01  # a probability this close to 0 or 1 counts as decided
SWITCHED = 0.95  # fraction of all shares that a switch decides


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements: of the mixture, the switch, and the regimes from never to at once."""

    matches: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 40.0)  # b2 of the mixtures; 0 to infinity
    n_prompts: int = 200  # for the mixtures
    length: int = 64  # of the prompts for the mixtures
    copies: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 300.0)  # b3 of the switch, rising
    occurrences: int = 40  # of the trigger in the prompts of the switch
    switch_ahead: float = 0.5  # how many logits the weights prefer g by, in the switch
    n_matches: int = 15  # values of b2 in the regimes
    n_copies: int = 15  # values of b3 in the regimes
    ahead: float = 3.0  # how many logits the weights prefer g by, in the regimes
    lead: int = 10  # neutral tokens before the repeats, in the regimes
    max_repeats: int = 100  # that are tried in the regimes
    seed: int = 0  # of the mixtures' language and prompts


QUICK = Settings(n_prompts=40, n_matches=8, n_copies=8, max_repeats=40)


def stronger_memories(settings: Settings = Settings(), make: Make = associative_transformer) -> Result:
    """As strengths grow, in-context prediction goes from a count-smoothed mixture to a switch.

    Wang & Sato (arXiv 2412.11459), in hand-written float64 models with b1 = `FOCUS`. With n_v and n_qv the counts of
    v, and of v after q, in a prompt of T tokens (position 1 remembers itself, so that z_1 = q adds one to n_qq), the
    induction head's attention to v is (e^b2 n_qv + n_v - n_qv) / (e^b2 n_q + T - n_q): the unigram share n_v / T at
    b2 = 0, and the in-context bigram n_qv / n_q as b2 grows.

    There, P(c) among {c, g} is sigmoid(b3 (share_c - share_g) - D), where D is the weights' lead for g; as b3 grows,
    every share is decided. After N neutral tokens, no number of repeats wins where b3 <= D (1 + e^-b2), one does where
    b3 > D (1 + (N + 2) e^-b2), and in between, the least number is `theory.min_repeats`.
    """
    mixture, switch, regimes = (measured(settings, make) for measured in (_mixtures, _switch, _regimes))
    findings = (
        *_by_counts(mixture, settings),
        *_by_shares(switch, settings),
        *(_by_repeats(name, regimes[regimes["regime"] == name], settings) for name in _REGIMES),
    )
    tables = {"mixture": mixture, "switch": switch, "regimes": regimes}
    table = pd.concat([part.assign(part=name) for name, part in tables.items()], ignore_index=True)
    columns = ["part", "b2", "b3", "share", "regime", "predicted", "measured"]
    return Result(findings, table[columns], _picture(mixture, switch, regimes, settings))


_REGIMES = {
    "never": ("b3 <= D (1 + e^-b2)", "no number of repeats wins"),
    "between": ("b3 between", "theory.min_repeats is the least number that wins"),
    "at once": ("b3 > D (1 + (N + 2) e^-b2)", "one repeat wins"),
}


def _by_counts(mixture: pd.DataFrame, settings: Settings) -> list[Finding]:
    prompts = f"{settings.n_prompts} random prompts of {settings.length} tokens"
    weakest, strongest = settings.matches[0], settings.matches[-1]
    worst = mixture["error"].max(skipna=False)
    unigram, bigram = mixture["unigram_error"].iloc[0], mixture["bigram_error"].iloc[-1]
    return [
        Finding(
            f"{prompts}, b2 from {weakest:g} to {strongest:g}",
            f"attention to every token = smoothed counts, to {TOLERANCE:g}",
            f"largest error {worst:.1e}",
            bool(worst <= TOLERANCE),
        ),
        Finding(
            f"{prompts}, b2 = {weakest:g} and {strongest:g}",
            f"limits: unigram shares, and the in-context bigram, to {TOLERANCE:g}",
            f"largest errors {unigram:.1e} and {bigram:.1e}",
            bool(unigram <= TOLERANCE and bigram <= TOLERANCE),
        ),
    ]


def _by_shares(switch: pd.DataFrame, settings: Settings) -> list[Finding]:
    error = (switch["measured"] - switch["predicted"]).abs().max(skipna=False)
    undecided = switch["measured"].clip(DECIDED, 1 - DECIDED) == switch["measured"]
    decided = 1 - undecided.groupby(switch["b3"]).mean()
    weakest, strongest = decided.iloc[0], decided.iloc[-1]
    copies = f"b3 from {settings.copies[0]:g} to {settings.copies[-1]:g}"
    setting = f"{settings.occurrences + 1} shares of c after q, {copies}"
    return [
        Finding(
            setting,
            f"P(c) = sigmoid(b3 (share_c - share_g) - {settings.switch_ahead:g}), to {TOLERANCE:g}",
            f"largest error {error:.1e}",
            bool(error <= TOLERANCE),
        ),
        Finding(
            setting,
            f"P(c) within {DECIDED:g} of 0 or 1 at no share for the smallest b3, at {SWITCHED:.0%} for the largest",
            f"{weakest:.0%} and {strongest:.0%}",
            bool(weakest == 0 and strongest >= SWITCHED),
        ),
    ]


def _by_repeats(regime: str, cells: pd.DataFrame, settings: Settings) -> Finding:
    condition, predicted = _REGIMES[regime]
    clear = cells[~cells["tie"]]
    right = int((clear["predicted"] == clear["measured"]).sum())
    return Finding(
        f"{len(clear)} models with {condition}, D = {settings.ahead:g}, N = {settings.lead}, "
        f"0 to {settings.max_repeats} repeats",
        predicted,
        f"in {right} of {len(clear)}",
        0 < len(clear) == right,
    )


def _mixtures(settings: Settings, make: Make) -> pd.DataFrame:
    """Attention to the successor that the counts favour, by b2; the largest errors of the counts and of both limits."""
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
    favourite = bigram.argmax(-1, keepdim=True)

    rows = []
    for match in tqdm(settings.matches, desc="mixtures", disable=None, unit="model"):
        model = make(language, strengths=Strengths(FOCUS, match, 1.0, 1.0), n_ctx=settings.length, dtype=torch.float64)
        with torch.no_grad():
            measured = model(tokens)[:, -1].cpu() - language.log_pi_b[q[:, 0]]
        counts = (unigram + math.expm1(match) * bigram, unigram, bigram)  # smoothed, and both limits
        shares = [count / count.sum(-1, keepdim=True) for count in counts]
        means = [float(values.gather(1, favourite).mean()) for values in (shares[0], measured)]
        rows.append((match, 1.0, *means, *(float((measured - share).abs().max()) for share in shares)))
    columns = ["b2", "b3", "predicted", "measured", "error", "unigram_error", "bigram_error"]
    return pd.DataFrame(rows, columns=columns)


def _switch(settings: Settings, make: Make) -> pd.DataFrame:
    """P(c) among {c, g}, by the share of c where the trigger's successors are c or g."""
    n = settings.occurrences
    follow = [[IN_CONTEXT] * k + [GLOBAL] * (n - k) for k in range(n + 1)]
    share = torch.arange(n + 1, dtype=torch.float64) / n
    parts = []
    for copy in tqdm(settings.copies, desc="switch", disable=None, unit="model"):
        strengths = Strengths(FOCUS, FOCUS, copy, 1.0)
        predicted = (copy * (2 * share - 1) - settings.switch_ahead).sigmoid()
        measured = experiment.margins_by_pairs(make, strengths, settings.switch_ahead, follow, lead=1)[:, -1].sigmoid()
        rows = {"share": share, "predicted": predicted, "measured": measured}
        parts.append(pd.DataFrame({"b2": FOCUS, "b3": copy, **rows}))
    return pd.concat(parts, ignore_index=True)


def _regimes(settings: Settings, make: Make) -> pd.DataFrame:
    """The least number of repeats that wins, by b2 and b3; infinite where none of those tried does."""
    lead, ahead = settings.lead, settings.ahead
    evidence = [[IN_CONTEXT] * settings.max_repeats]
    repeats = torch.arange(settings.max_repeats + 1)
    rows = []
    matches = torch.linspace(0.0, 6.0, settings.n_matches).tolist()
    copies = (ahead * torch.linspace(0.53, 3.47, settings.n_copies)).tolist()
    for match in tqdm(matches, desc="regimes", disable=None, unit="row"):
        for copy in copies:
            strengths = Strengths(FOCUS, match, copy, 1.0)
            (margins,) = experiment.margins_by_pairs(make, strengths, ahead, evidence, lead)
            wins = (margins > 0).nonzero().flatten().tolist()
            never = math.inf if bool(margins.isfinite().all()) else math.nan
            predicted_margins = theory.phase_boundary(repeats, theory.Setting(strengths), lead=lead) - ahead
            tie = bool(predicted_margins.abs().min() < TOLERANCE)
            rows.append((match, copy, *_regime(strengths, settings), float(wins[0]) if wins else never, tie))
    return pd.DataFrame(rows, columns=["b2", "b3", "regime", "predicted", "measured", "tie"])


def _regime(strengths: Strengths, settings: Settings) -> tuple[str, float]:
    """Which of `_REGIMES` the strengths are in, and the least number of repeats that wins there."""
    lead, ahead, blur = settings.lead, settings.ahead, math.exp(-strengths.match)
    if strengths.copy <= ahead * (1 + blur):
        return "never", math.inf
    if strengths.copy > ahead * (1 + (lead + 2) * blur):
        return "at once", 1.0
    language, most = experiment.conflict_language([ahead]), settings.max_repeats
    flip = theory.min_repeats(
        language, FIRST_TRIGGER, IN_CONTEXT, GLOBAL, theory.Setting(strengths), lead=lead, max_repeats=most
    )
    return "between", math.inf if flip.repeats is None else float(flip.repeats)


def _picture(mixture: pd.DataFrame, switch: pd.DataFrame, regimes: pd.DataFrame, settings: Settings) -> Picture:
    """Predictions as lines, measurements as dots; the regimes as a map of how many repeats it took."""
    import matplotlib
    import matplotlib.colors

    picture = Picture(16.0, 4.8)
    left, middle, right = picture.figure.subplots(1, 3)

    shown = mixture.assign(b2=mixture["b2"].clip(upper=10))  # beyond, nothing changes
    left.plot(shown["b2"], shown["predicted"], "-", color="black", label="smoothed counts")
    left.plot(shown["b2"], shown["measured"], "o", color=COLOURS["context"], label="model")
    left.set(xlabel=f"b2, strength of the match (last dot: {settings.matches[-1]:g})", ylim=(0, None))
    left.set_ylabel("attention to the likeliest successor in context")
    left.set_title("from unigram shares to the in-context bigram")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(settings.copies)))
    for (copy, part), colour in zip(switch.groupby("b3"), colours, strict=True):
        middle.plot(part["share"], part["predicted"], "-", color=colour)
        middle.plot(part["share"], part["measured"], "o", color=colour, markersize=4, label=f"b3 = {copy:g}")
    middle.set(xlabel="share of c after q in the context", ylabel="P(c) among {c, g}")
    middle.set_title("from a mixture to a switch")
    for ax in (left, middle):
        ax.legend(frameon=False)

    least = regimes.pivot(index="b3", columns="b2", values="measured")
    by_repeats = matplotlib.colormaps["viridis_r"].with_extremes(bad=COLOURS["weights"])
    scale = {"cmap": by_repeats, "norm": matplotlib.colors.LogNorm(1, settings.max_repeats)}
    cells = least.replace(math.inf, math.nan).to_numpy()
    drawn = right.pcolormesh(least.columns, least.index, cells, **scale, shading="nearest", alpha=0.75)
    b2 = np.linspace(0, float(regimes["b2"].max()), 200)
    style = {"color": "black", "linewidth": 2}
    right.plot(b2, settings.ahead * (1 + np.exp(-b2)), "-", label="below: never", **style)
    right.plot(b2, settings.ahead * (1 + (settings.lead + 2) * np.exp(-b2)), "--", label="above: one repeat", **style)
    right.set(xlabel="b2, strength of the match", ylabel="b3, strength of the copy (logits)")
    right.set_title(f"repeats until the context wins (D = {settings.ahead:g}, N = {settings.lead})")
    right.set_ylim(least.index.min(), least.index.max())
    right.legend(frameon=True, loc="upper right", title="theory")
    picture.figure.colorbar(drawn, ax=right, label=f"least repeats (orange: more than {settings.max_repeats})")
    experiment.finish((left, middle), title=11)
    experiment.finish([right], title=11, grid=False)
    return picture
