"""What the two-layer theory says of a dose-response: at strengths read off the weights, or fitted to the margins.

With b1 = inf, a prompt of T tokens in which the trigger is followed by c at each of its n occurrences before the last,
c being nowhere else and g nowhere, has (design of `hijack_lens.theory`, with n_qc = n_c = n_q = n)

    margin(n) = b3 a(n) - D,     a(n) = e^b2 n / (e^b2 n + T(n) - n)

where D is what the weights are ahead by. A repeat of L tokens makes T(n) = T(0) + L n, so that the context wins iff

    n > D T(0) / (e^b2 (b3 - D) - D (L - 1)),     never, if b3 <= D (1 + (L - 1) e^-b2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.models import TwoLayerTransformer
from hijack_lens.probing.facts import Conflict
from hijack_lens.theory import Flip, Strengths
from hijack_lens.theory.closed_form import Positions
from hijack_lens.training.fit import FittedStrengths

_LARGEST_MATCH = 20.0
_ZOOMS, _CELLS = 6, 100


@dataclass(frozen=True)
class DoseTheory:
    """The two-layer theory's account of the same prompts.

    Attributes:
        source: "weights", where the strengths were read off the model's weights and the margins are predictions;
            "margins", where strengths and `ahead` were fitted to the margins, one b2 and b3 for all facts.
        strengths: of the memories.
        ahead: D, what the weights are ahead by, in logits.
        margin: in logits.
        flips: the least number of repeats that wins, by fact; not limited to those measured.
        r2: of `margin` for the measured margins, over facts and repeats; each fact's are taken relative to their mean,
            so that knowing which facts are better known explains nothing. NaN where the margins do not change.
    """

    source: Literal["weights", "margins"]
    strengths: Strengths
    ahead: Float[Tensor, "fact"]
    margin: Float[Tensor, "fact dose"]
    flips: tuple[Flip, ...]
    r2: float


def theory_of_weights(
    model: TwoLayerTransformer,
    fit: FittedStrengths,
    conflicts: Sequence[Conflict],
    measured: Float[Tensor, "fact dose"],
) -> DoseTheory:
    """The closed form at the strengths that `fit_strengths` read off a model."""
    positions: Positions = "absolute" if model.positions == "absolute" else "relative"
    setting = (fit.strengths, fit.triggers, positions, model.n_ctx_train)
    predicted, ahead, flips = torch.zeros_like(measured), [], []
    for row, one in zip(predicted, conflicts, strict=True):
        for n in range(len(row)):
            margin = theory.margin(one.tokens(n), fit.language, *setting, in_context=one.context, global_=one.weights)
            row[n] = margin.total
        ahead.append(-float(margin.weights))
        if one.period == 2:  # the trigger and its successor: the layout that the closed form counts
            trigger, lead = one.prompts[0][-1], one.lengths[0] - 1
            flips.append(theory.min_repeats(fit.language, trigger, one.context, one.weights, *setting, lead=lead))
        else:
            flips.append(_first_win(row))
    of_weights = torch.tensor(ahead, dtype=torch.float64)
    return DoseTheory("weights", fit.strengths, of_weights, predicted, tuple(flips), _r2(measured, predicted))


def theory_of_margins(measured: Float[Tensor, "fact dose"], lengths: Int[Tensor, "fact dose"]) -> DoseTheory:
    """The strengths at b1 = inf with the least squared error: b3 and each D in closed form, b2 by search from 0 to 20.

    Args:
        measured: margins with 0, 1, 2, ... repeats; at least 4, since each fact has up to three unknowns.
        lengths: tokens in each prompt.
    """
    n = torch.arange(measured.shape[1]).to(measured)
    change = measured - measured.mean(1, keepdim=True)
    low, high = 0.0, _LARGEST_MATCH
    for _ in range(_ZOOMS):
        match = torch.linspace(low, high, _CELLS + 1, dtype=torch.float64)
        attention = _attention(match[:, None, None], n, lengths)
        rise = attention - attention.mean(-1, keepdim=True)
        copy = ((rise * change).sum((1, 2)) / (rise**2).sum((1, 2))).clamp_min(0.0)
        best = int(((change - copy[:, None, None] * rise) ** 2).sum((1, 2)).argmin())
        step = (high - low) / _CELLS
        low, high = max(0.0, float(match[best]) - step), min(_LARGEST_MATCH, float(match[best]) + step)
    strengths = Strengths(previous_token=math.inf, match=float(match[best]), copy=float(copy[best]))
    pull = copy[best] * attention[best]
    ahead = (pull - measured).mean(1)
    predicted = pull - ahead[:, None]
    flips = [
        _flip(float(d), strengths, int(row[0]), int(row[-1] - row[-2])) for d, row in zip(ahead, lengths, strict=True)
    ]
    return DoseTheory("margins", strengths, ahead, predicted, tuple(flips), _r2(measured, predicted))


def _attention(match: Tensor, n: Float[Tensor, "dose"], lengths: Int[Tensor, "fact dose"]) -> Tensor:
    """a(n), what the induction head attends to c with."""
    return n / (n + (lengths - n) * (-match).exp())


def _flip(ahead: float, strengths: Strengths, length: int, period: int) -> Flip:
    """The least n that wins, by the formula above."""
    unmatched = math.exp(-strengths.match)
    most = strengths.copy / (1 + (period - 1) * unmatched)
    if ahead < 0:
        return Flip(0, f"the context's answer is ahead by {-ahead:.3g} without any repeat")
    if most <= ahead:
        return Flip(None, f"the weights are ahead by {ahead:.3g}, and the context's pull only tends to {most:.3g}")
    tie = ahead * length * unmatched / (strengths.copy - ahead * (1 + (period - 1) * unmatched))
    return Flip(
        math.floor(tie) + 1, f"the weights are ahead by {ahead:.3g}; the context draws level at {tie:.4g} repeats"
    )


def _first_win(margin: Float[Tensor, "dose"]) -> Flip:
    wins = (margin > 0).nonzero().flatten().tolist()
    if wins:
        return Flip(wins[0], f"with so many repeats the margin is {float(margin[wins[0]]):+.3g}")
    return Flip(None, f"up to {len(margin) - 1} repeats the margin is at most {float(margin.max()):+.3g}")


def _r2(measured: Float[Tensor, "fact dose"], predicted: Float[Tensor, "fact dose"]) -> float:
    spread = float(((measured - measured.mean(1, keepdim=True)) ** 2).sum())
    return 1 - float(((measured - predicted) ** 2).sum()) / spread if spread > 0 else math.nan
