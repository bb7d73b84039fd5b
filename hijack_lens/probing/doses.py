"""How a model's margin changes as the context contradicts a fact repeatedly, compared with the theory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.attribution.frozen import FrozenModel
from hijack_lens.attribution.logit_attribution import MEMORIES, LogitAttribution
from hijack_lens.attribution.logits import attribute
from hijack_lens.attribution.sources import attribution_of_runs, check_linear, parts_with
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_count, check_fields, check_list
from hijack_lens.core.circuit import Circuit, Margin, Strengths
from hijack_lens.core.files import Saved
from hijack_lens.core.inputs import circuit_of, own_circuit
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import Drawn, tidy, widened
from hijack_lens.language.facts import Bigram, Fact, FactPrompts, fact_prompts
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.theory.flips import Flip
from hijack_lens.training.fit import FittedStrengths, fit_strengths

_LARGEST_MATCH = 20.0
_ZOOMS, _CELLS = 6, 100


@dataclass(frozen=True, repr=False)
class DoseTheory(Saved, Drawn):
    """What the two-layer theory predicts for the same prompts.

    Attributes:
        source: "weights" if the strengths were read off the model's weights and the margins are predictions;
            "margins" if strengths and `ahead` were fitted to the margins, with one b2 and b3 for all facts.
        strengths: the strengths of the memories.
        ahead: D, the lead of the weights' answer without the context's pull, in logits.
        margin: the theory's margin, in logits.
        flips: for each fact, the smallest number of repeats at which the context wins; may exceed those measured.
        r2: R² of `margin` as a prediction of the measured margins, over facts and repeats. The variance is around each
            fact's own mean, so differences between facts explain nothing. NaN if the margins never change.

    Examples:
        >>> theory = hl.dose_response(model, hl.Bigram("q", weights="u", context="e"), repeats=3).theory
        >>> theory.source, theory.flips[0].repeats, round(theory.r2, 3)
        ('weights', 2, 1.0)
    """

    source: Literal["weights", "margins"]
    strengths: Strengths
    ahead: Float[Tensor, "fact"]
    margin: Float[Tensor, "fact dose"]
    flips: tuple[Flip, ...]
    r2: float

    def __repr__(self) -> str:
        facts, doses = self.margin.shape
        s = self.strengths
        strengths = f"b1 = {s.previous_token:.3g}, b2 = {s.match:.3g}, b3 = {s.copy:.3g}, g = {s.bigram:.3g}"
        return f"DoseTheory(fact={facts}, dose={doses}) from {self.source}, R² {self.r2:.3f}: {strengths}"

    def to_pandas(self) -> pd.DataFrame:
        """A row per fact and number of repeats: fact, by its place, repeats, margin."""
        return tidy(dict(zip(("fact", "repeats"), map(range, self.margin.shape), strict=True)), margin=self.margin)


def theory_of_weights(
    fit: FittedStrengths, conflicts: Sequence[FactPrompts], measured: Float[Tensor, "fact dose"]
) -> DoseTheory:
    """The closed form with the strengths that `fit_strengths` read off a model."""
    predicted, ahead, flips = torch.zeros_like(measured), [], []
    for row, one in zip(predicted, conflicts, strict=True):
        for n in range(len(row)):
            margin = theory.margin(
                one.tokens(n), fit.language, fit.setting, in_context=one.context, global_candidate=one.weights
            )
            row[n] = margin.total
        ahead.append(-float(margin.weights))
        if one.period == 2:  # the trigger and its successor: the layout that the closed form assumes
            trigger, lead = one.prompts[0][-1], one.lengths[0] - 1
            flips.append(theory.min_repeats(fit.language, trigger, one.context, one.weights, fit.setting, lead=lead))
        else:
            flips.append(_first_win(row))
    of_weights = torch.tensor(ahead, dtype=torch.float64)
    return DoseTheory("weights", fit.strengths, of_weights, predicted, tuple(flips), _r2(measured, predicted))


def theory_of_margins(measured: Float[Tensor, "fact dose"], lengths: Int[Tensor, "fact dose"]) -> DoseTheory:
    """Least-squares strengths with b1 = inf: b3 and each D in closed form, b2 by search from 0 to 20.

    Args:
        measured: margins with 0, 1, 2, ... repeats; at least 4 of them, since each fact has up to three unknowns.
        lengths: the number of tokens in each prompt.
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
    """a(n), the induction head's attention to c."""
    return n / (n + (lengths - n) * (-match).exp())


def _flip(ahead: float, strengths: Strengths, length: int, period: int) -> Flip:
    """The smallest n at which the context wins, by the formula in `_attention`."""
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


@dataclass(frozen=True, repr=False)
class DoseResponse(Saved, Drawn):
    """`logit[context's answer] - logit[weights' answer]` for each fact and number of repeats; in float64, on the CPU.

    Attributes:
        conflicts: the facts and their prompts, in the model's tokens.
        margin: split by memory, each part [fact, dose]; a dose is a number of repeats, from 0.
        circuit: the circuit whose induction heads carry the context's part.
        theory: what the two-layer theory predicts for the same prompts.
        completeness_error: the largest |sum over paths - logit| of all attributions; only rounding error.
        by_source: whether margins are split by source tokens, without a circuit.
        statements: without a circuit, how much of the margin's change against the prompt without statements is due to
            what the question's tokens read: more of the statements, and less of each other and of the first token. The
            rest of the change is how they respond to it, by norm scales and MLP gates. Both are means of two exact
            differences, one with the other half as it is with the statements, one as it is without (Shapley values).

    Examples:
        >>> doses = hl.dose_response(model, hl.Bigram("q", weights="u", context="e"), repeats=3)
        >>> doses.repeats, doses.lengths.tolist(), doses.known
        (range(0, 4), [[1, 3, 5, 7]], (True,))
        >>> doses.flips, [f"{crossing:.2f}" for crossing in doses.crossings]
        ((2,), ['1.95'])
    """

    conflicts: tuple[FactPrompts, ...]
    margin: Margin
    circuit: Circuit
    theory: DoseTheory
    completeness_error: float
    by_source: bool = False
    statements: Float[Tensor, "fact dose"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.conflicts:
            raise ValueError("conflicts must hold at least one, got none")
        shape = (len(self.conflicts), len(self.conflicts[0].prompts))
        for part in (*self.margin.parts.values(), self.theory.margin):
            if tuple(part.shape) != shape:
                raise ValueError(f"margin must have shape {shape}, got {tuple(part.shape)}")
        if self.statements is not None and tuple(self.statements.shape) != shape:
            raise ValueError(f"statements must have shape {shape}, got {tuple(self.statements.shape)}")

    @classmethod
    def _from_older(
        cls, tensors: dict[str, Tensor], header: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if "theory" in header:
            return tensors, header
        # In older files, the fields of margin and theory were stored at the top level.
        of_theory = {name: header.pop(name) for name in ("source", "strengths", "flips", "r2")}
        names = {"ahead": "theory.ahead", "theory": "theory.margin"} | {part: f"margin.{part}" for part in MEMORIES}
        return {names[name]: tensor for name, tensor in tensors.items()}, {**header, "margin": {}, "theory": of_theory}

    @property
    def repeats(self) -> range:
        """The numbers of repeats along the dose axis."""
        return range(self.margin.total.shape[1])

    @property
    def lengths(self) -> Int[Tensor, "fact dose"]:
        """The number of tokens in each prompt."""
        return torch.tensor([one.lengths for one in self.conflicts])

    @property
    def known(self) -> tuple[bool, ...]:
        """For each fact, whether the weights' answer is ahead without any repeat; only then can the answer flip."""
        return tuple((self.margin.total[:, 0] < 0).tolist())

    @property
    def flips(self) -> tuple[int | None, ...]:
        """For each fact, the smallest measured number of repeats with a margin above 0; `None` if there is none."""
        return tuple(next((n for n in self.repeats if row[n] > 0), None) for row in self.margin.total.tolist())

    @property
    def crossings(self) -> Float[Tensor, "fact"]:
        """Where the margin reaches 0, interpolated linearly between repeats; NaN where `flips` is `None`."""
        return torch.tensor([crossing(row) for row in self.margin.total.tolist()], dtype=torch.float64)

    def to_pandas(self) -> pd.DataFrame:
        """One row per fact and number of repeats: fact, repeats, length, context, weights, rest, total, theory.

        Before theory, statements, where there are any.
        """
        parts, lengths = self.margin.parts, self.lengths
        if self.statements is not None:
            parts = {**parts, "statements": self.statements}
        rows = [
            (
                one.name,
                n,
                int(lengths[i, n]),
                *(float(part[i, n]) for part in parts.values()),
                float(self.theory.margin[i, n]),
            )
            for i, one in enumerate(self.conflicts)
            for n in self.repeats
        ]
        return pd.DataFrame(rows, columns=["fact", "repeats", "length", *parts, "theory"])

    def by_repeats(self) -> pd.DataFrame:
        """One row per number of repeats: mean length and margins over facts, and the total's standard deviation."""
        grouped = self.to_pandas().drop(columns="fact").groupby("repeats")
        return grouped.mean().assign(spread=grouped["total"].std()).reset_index()

    def by_fact(self) -> pd.DataFrame:
        """One row per fact: the tokens scored, the first and last margins, the measured flip and the theory's."""
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
    """Where a line through the margins with 0, 1, 2, ... repeats first rises above 0; NaN if it never does."""
    n = next((n for n, margin in enumerate(margins) if margin > 0), None)
    if not n:
        return 0.0 if n == 0 else float("nan")
    return n - margins[n] / (margins[n] - margins[n - 1])


_FEWEST = 3  # repeats; with the prompt without repeats, this gives one margin more than a single fact has unknowns


@analysis
def dose_response(
    model: Any,
    facts: Fact | Bigram | Iterable[Fact | Bigram],
    repeats: int = 8,
    *,
    lead: str | Sequence[int] = "",
    circuit: Circuit | None = None,
    prepend_bos: bool | None = None,
) -> DoseResponse:
    """Measures `logit[context's answer] - logit[weights' answer]` as the context repeats its answer 0, 1, 2, ... times.

    `attribute`, or without a circuit `attribute_sources`, splits every margin by memory. Prompts grow with every repeat
    (their lengths are part of the result). The two-layer theory is evaluated for prompts of the same lengths. For a
    `BigramTransformer`, it uses the strengths that `fit_strengths` reads off the weights. For all other models, and
    where none can be read, it uses effective strengths fitted to the margins themselves.

    Args:
        model: a HookedTransformer or TransformerBridge.
        facts: one or several. An answer of several tokens is scored by its first token.
        repeats: the largest number of times that the context repeats its answer; 3 or more.
        lead: neutral text before every prompt, or tokens for `Bigram`s.
        circuit: the roles of the components; by default the model's own circuit. Without one, margins are split by
            source tokens, as by `attribute_sources`: the context is all that was said before the question.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for facts and prompts that `fact_prompts` rejects, and models that `attribute` (without a
            circuit `attribute_sources`) rejects.

    Examples:
        >>> doses = hl.dose_response(model, hl.Bigram("q", weights="u", context="e"), repeats=3)
        >>> doses.by_repeats()[["repeats", "context", "weights", "total"]]
           repeats   context   weights     total
        0        0  0.000000 -6.580639 -6.580639
        1        1  4.993811 -6.580639 -1.586829
        2        2  6.655668 -6.580639  0.075029
        3        3  7.486083 -6.580639  0.905443
    """
    repeats = check_count("repeats", repeats, minimum=_FEWEST)
    alone = isinstance(facts, (Fact, Bigram))
    listed: list[Any] = [facts] if alone else check_list("facts", facts, "a Fact or Bigram, or several")
    if not listed:
        raise ValueError("facts must hold at least one, got none")
    conflicts = tuple(fact_prompts(model, fact, repeats, lead) for fact in listed)
    by_sources = circuit is None and own_circuit(model) is None
    circuit = circuit_of(model, circuit)

    shape = (len(conflicts), repeats + 1)
    parts = {memory: torch.zeros(shape, dtype=torch.float64) for memory in MEMORIES}
    statements = torch.zeros(shape, dtype=torch.float64)
    error = 0.0
    with progress(shape[0] * shape[1], "prompt", "dose_response") as advance:
        for row, one in enumerate(conflicts):
            doses = _by_sources(model, one) if by_sources else _by_paths(model, one, circuit)
            for n, (found, statements[row, n]) in enumerate(doses):
                split = found.margin(one.context, one.weights).parts
                for memory, part in parts.items():
                    part[row, n] = split[memory]
                error = max(error, found.completeness_error)
                advance(1)
    margin, fit = Margin(**parts), _strengths(model)
    if fit is None:
        predicted = theory_of_margins(margin.total, torch.tensor([one.lengths for one in conflicts]))
    else:
        predicted = theory_of_weights(fit, conflicts, margin.total)
    return DoseResponse(conflicts, margin, circuit, predicted, error, by_sources, statements if by_sources else None)


def _by_paths(model: Any, one: FactPrompts, circuit: Circuit) -> Iterator[tuple[LogitAttribution, float]]:
    for n in range(len(one.prompts)):
        yield attribute(model, one.tokens(n), circuit=circuit, answers=[one.context, one.weights]), math.nan


def _by_sources(model: Any, one: FactPrompts) -> Iterator[tuple[LogitAttribution, float]]:
    """Each dose's attribution, and what its statements do by being read.

    Each prompt is the beginning of the next: a single run of the longest holds them all.
    """
    check_linear(model)
    device = model.cfg.device
    answers = torch.tensor([one.context, one.weights], device=device)
    longest = torch.tensor(one.prompts[-1], device=device)[None]
    runs = FrozenModel.at(model, longest, [length - 1 for length in one.lengths])
    # Where nothing leads, the question's first token is the prompt's first without statements, and is no other's twin.
    question = max(1, min(one.query, one.lengths[0] - 1))

    def margin(logits: Float[Tensor, "1 answer"]) -> float:
        context, weights = widened(logits)[0].tolist()
        return context - weights

    alone = runs[0]
    for run in runs:
        length = run.query + 1
        stated = range(1, length - one.query) if length > one.lengths[0] else ()
        parts = parts_with(stated, run.query)[None]
        read = 0.0
        if stated:
            at_its_own = run.logits[:, answers] - alone.answering(answers, question, run)
            at_other = run.answering(answers, question, alone) - alone.logits[:, answers]
            read = margin(at_its_own + at_other) / 2
        yield attribution_of_runs(model, longest[:, :length], [run], answers, parts)[0], read


def _strengths(model: Any) -> FittedStrengths | None:
    """The strengths of a model's memories, if it has the theory's architecture and they can be read; else `None`."""
    if not isinstance(model, BigramTransformer):
        return None
    try:
        return fit_strengths(model)
    except ValueError:
        return None
