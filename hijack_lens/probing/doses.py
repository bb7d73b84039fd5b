"""How a model's margin moves as the context denies a fact again and again, and the theory beside it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.attribution.logits import attribute
from hijack_lens.circuits.finding import find_circuit
from hijack_lens.core.checks import Seed, check_count
from hijack_lens.core.circuit import Circuit, Margin, Strengths
from hijack_lens.core.files import Saved
from hijack_lens.core.hook_points import check_model, evaluating
from hijack_lens.core.inputs import circuit_of
from hijack_lens.core.tables import Drawn
from hijack_lens.language.facts import Bigram, Fact, FactPrompts, fact_prompts
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.theory.flips import Flip
from hijack_lens.training.fit import FittedStrengths, fit_strengths

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
    fit: FittedStrengths, conflicts: Sequence[FactPrompts], measured: Float[Tensor, "fact dose"]
) -> DoseTheory:
    """The closed form at the strengths that `fit_strengths` read off a model."""
    predicted, ahead, flips = torch.zeros_like(measured), [], []
    for row, one in zip(predicted, conflicts, strict=True):
        for n in range(len(row)):
            margin = theory.margin(
                one.tokens(n), fit.language, fit.setting, in_context=one.context, global_candidate=one.weights
            )
            row[n] = margin.total
        ahead.append(-float(margin.weights))
        if one.period == 2:  # the trigger and its successor: the layout that the closed form counts
            trigger, lead = one.prompts[0][-1], one.lengths[0] - 1
            flips.append(theory.min_repeats(fit.language, trigger, one.context, one.weights, fit.setting, lead=lead))
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


_PARTS = ("context", "weights", "rest")


@dataclass(frozen=True, repr=False)
class DoseResponse(Saved, Drawn):
    """`logit[context's answer] - logit[weights' answer]` by fact and number of repeats; in float64, on the CPU.

    Attributes:
        conflicts: the facts, in the model's tokens.
        margin: split by memory, each part [fact, dose]; a dose is a number of repeats, from 0.
        circuit: whose induction heads carry the context's part.
        theory: what the two-layer theory says of the same prompts.
        completeness_error: the largest |sum over paths - logit| of all attributions; rounding alone.
    """

    conflicts: tuple[FactPrompts, ...]
    margin: Margin
    circuit: Circuit
    theory: DoseTheory
    completeness_error: float

    def __post_init__(self) -> None:
        shape = (len(self.conflicts), len(self.conflicts[0].prompts))
        for part in (*(getattr(self.margin, name) for name in _PARTS), self.theory.margin):
            if tuple(part.shape) != shape:
                raise ValueError(f"margin must have shape {shape}, got {tuple(part.shape)}")

    @classmethod
    def _from_older(
        cls, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if "theory" in header:
            return tensors, header
        # Once, margin and theory lay side by side with the rest.
        of_theory = {name: header.pop(name) for name in ("source", "strengths", "flips", "r2")}
        names = {"ahead": "theory.ahead", "theory": "theory.margin"} | {part: f"margin.{part}" for part in _PARTS}
        return {names[name]: tensor for name, tensor in tensors.items()}, {**header, "margin": {}, "theory": of_theory}

    @property
    def repeats(self) -> range:
        """What the dose axis holds."""
        return range(self.margin.total.shape[1])

    @property
    def lengths(self) -> Int[Tensor, "fact dose"]:
        """Tokens in each prompt."""
        return torch.tensor([one.lengths for one in self.conflicts])

    @property
    def known(self) -> tuple[bool, ...]:
        """Whether the weights' answer is ahead without any repeat, by fact; only then is there something to flip."""
        return tuple((self.margin.total[:, 0] < 0).tolist())

    @property
    def flips(self) -> tuple[int | None, ...]:
        """The least number of repeats with a margin above 0, by fact; `None` where none of those measured has one."""
        return tuple(next((n for n in self.repeats if row[n] > 0), None) for row in self.margin.total.tolist())

    @property
    def crossings(self) -> Float[Tensor, "fact"]:
        """The same between repeats, margins joined by straight lines: where the margin reaches 0. NaN for `None`."""
        return torch.tensor([crossing(row) for row in self.margin.total.tolist()], dtype=torch.float64)

    def to_pandas(self) -> pd.DataFrame:
        """A row per fact and number of repeats: fact, repeats, length, context, weights, rest, total, theory."""
        total, lengths = self.margin.total, self.lengths
        rows = [
            (
                one.name,
                n,
                int(lengths[i, n]),
                *(float(getattr(self.margin, part)[i, n]) for part in _PARTS),
                float(total[i, n]),
                float(self.theory.margin[i, n]),
            )
            for i, one in enumerate(self.conflicts)
            for n in self.repeats
        ]
        return pd.DataFrame(rows, columns=["fact", "repeats", "length", *_PARTS, "total", "theory"])

    def by_repeats(self) -> pd.DataFrame:
        """A row per number of repeats: means over facts of length and margins, and the total's standard deviation."""
        grouped = self.to_pandas().drop(columns="fact").groupby("repeats")
        return grouped.mean().assign(spread=grouped["total"].std()).reset_index()

    def by_fact(self) -> pd.DataFrame:
        """A row per fact: the tokens scored, the margin at either end, the flip, and the theory's."""
        total = self.margin.total
        return pd.DataFrame(
            {
                "fact": [one.name for one in self.conflicts],
                "context_token": [one.texts[0] for one in self.conflicts],
                "weights_token": [one.texts[1] for one in self.conflicts],
                "known": self.known,
                "first": total[:, 0].tolist(),
                "last": total[:, -1].tolist(),
                "flip": pd.array(self.flips, dtype="Int64"),
                "crossing": self.crossings.tolist(),
                "theory_flip": pd.array([flip.repeats for flip in self.theory.flips], dtype="Int64"),
            }
        )


def crossing(margins: list[float]) -> float:
    """Where a line through margins with 0, 1, 2, ... repeats first comes above 0; NaN where it does not."""
    n = next((n for n, margin in enumerate(margins) if margin > 0), None)
    if not n:
        return 0.0 if n == 0 else float("nan")
    return n - margins[n] / (margins[n] - margins[n - 1])


_FEWEST = (
    3  # repeats; with the prompt without any, as many margins as a lone fact needs to leave one of them unexplained
)


def dose_response(
    model: Any,
    facts: Fact | Bigram | Iterable[Fact | Bigram],
    repeats: int = 8,
    *,
    lead: str | Sequence[int] = "",
    circuit: Circuit | None = None,
    seed: Seed = 0,
) -> DoseResponse:
    """Measures `logit[context's answer] - logit[weights' answer]` as the context says its answer 0, 1, 2, ... times.

    Every margin is split by `attribute` into context, weights and rest. Prompts grow with every repeat (their lengths
    are part of the result). Beside the measurement stands the two-layer theory, for prompts of those lengths: of a
    `BigramTransformer` at the strengths that `fit_strengths` reads off its weights; of models where it reads none,
    and of all others, at effective strengths fitted to the margins themselves.

    Args:
        model: a HookedTransformer or TransformerBridge.
        facts: one or several. Answers of several tokens are scored by their first.
        repeats: how often the context says its answer at most; 3 or more.
        lead: neutral text, or tokens of `Bigram`s, before every prompt.
        circuit: the roles of the components; by default the model's own, else what `find_circuit` finds.
        seed: of `find_circuit`'s prompts.

    Raises:
        TypeError, ValueError: for facts and prompts as `conflict` says, and for models that `attribute` refuses.
    """
    check_model(model)
    check_count("repeats", repeats, minimum=_FEWEST)
    if not isinstance(facts, (Fact, Bigram, Iterable)):
        raise TypeError(f"facts must be a Fact or Bigram, or several, got {facts!r:.80}")
    listed = [facts] if isinstance(facts, (Fact, Bigram)) else list(facts)
    if not listed:
        raise ValueError("facts must hold at least one, got none")
    conflicts = tuple(fact_prompts(model, fact, repeats, lead) for fact in listed)
    circuit = circuit_of(model, circuit, lambda: find_circuit(model, seed=seed))

    shape = (len(conflicts), repeats + 1)
    parts = {memory: torch.zeros(shape, dtype=torch.float64) for memory in ("context", "weights", "rest")}
    error = 0.0
    with evaluating(model), tqdm(total=shape[0] * shape[1], desc="dose_response", unit="prompt", disable=None) as bar:
        for row, one in enumerate(conflicts):
            for n in range(repeats + 1):
                found = attribute(model, one.tokens(n), circuit=circuit, answers=[one.context, one.weights])
                margin = found.margin(one.context, one.weights)
                for memory, part in parts.items():
                    part[row, n] = getattr(margin, memory)
                error = max(error, found.completeness_error)
                bar.update()
    margin = Margin(**parts)
    lengths = torch.tensor([one.lengths for one in conflicts])
    fit = _strengths(model)
    if fit is not None:
        predicted = theory_of_weights(fit, conflicts, margin.total)
    else:
        predicted = theory_of_margins(margin.total, lengths)
    return DoseResponse(conflicts, margin, circuit, predicted, error)


def _strengths(model: Any) -> FittedStrengths | None:
    """The strengths of a model's memories, where it is of the theory's architecture."""
    if not isinstance(model, BigramTransformer):
        return None
    try:
        return fit_strengths(model)
    except ValueError:
        return None
