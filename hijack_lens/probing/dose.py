"""How a model's margin moves as the context denies a fact again and again."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hijack_lens._checks import check_count
from hijack_lens._runs import evaluating
from hijack_lens.attribution import attribute
from hijack_lens.circuit import Circuit
from hijack_lens.find_circuit import find_circuit
from hijack_lens.hooks.intervention import check_model
from hijack_lens.models import TwoLayerTransformer
from hijack_lens.probing.curve import theory_of_margins, theory_of_weights
from hijack_lens.probing.facts import Bigram, Fact, conflict
from hijack_lens.probing.result import DoseResponse
from hijack_lens.theory import Margin
from hijack_lens.training import fit_strengths
from hijack_lens.training.fit import FittedStrengths

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
    seed: int | torch.Generator = 0,
) -> DoseResponse:
    """Measures `logit[context's answer] - logit[weights' answer]` as the context says its answer 0, 1, 2, ... times.

    Every margin is split by `attribute` into context, weights and rest. Prompts grow with every repeat (their lengths
    are part of the result). Beside the measurement stands the two-layer theory, for prompts of those lengths: of a
    `TwoLayerTransformer` at the strengths that `fit_strengths` reads off its weights; of models where it reads none,
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
    conflicts = tuple(conflict(model, fact, repeats, lead) for fact in listed)
    circuit = getattr(model, "circuit", None) if circuit is None else circuit
    circuit = find_circuit(model, seed=seed) if circuit is None else circuit

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
        predicted = theory_of_weights(model, fit, conflicts, margin.total)
    else:
        predicted = theory_of_margins(margin.total, lengths)
    return DoseResponse(conflicts, margin, circuit, predicted, error)


def _strengths(model: Any) -> FittedStrengths | None:
    """The strengths of a model's memories, where it is of the theory's architecture."""
    if not isinstance(model, TwoLayerTransformer):
        return None
    try:
        return fit_strengths(model)
    except ValueError:
        return None
