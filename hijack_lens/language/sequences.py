"""Sequences of a triggered bigram language, and which tokens are their triggers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_count, check_fields, shown
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.language.vocabulary import Token

TRIGGER_RULES = ("frequent", "rare", "random")
"""With a number of triggers: the most or least frequent tokens, the same in all sequences; or drawn per sequence."""


@dataclass(frozen=True, repr=False)
class SampledSequences(Saved, Drawn):
    """Sequences of a triggered bigram language (Bietti et al. 2023, section 3).

    Attributes:
        tokens: token ids.
        predictable: true at t where the token at t+1 follows from the context: z_t is a trigger that
            has occurred before.
        triggers: each sequence's trigger tokens.
        continuations: what follows each trigger in its sequence, every time.
        jumped: true at t where the token at t+1 is a jump to a trigger instead of the chain's choice; nowhere by
            default.

    Examples:
        >>> sequences = language.sample(2, 8, triggers="q", seed=0)
        >>> sequences.tokens.shape, sequences.predictable.dtype
        (torch.Size([2, 8]), torch.bool)
    """

    tokens: Int[Tensor, "sequence length"]
    predictable: Bool[Tensor, "sequence length"]
    triggers: Int[Tensor, "sequence trigger"]
    continuations: Int[Tensor, "sequence trigger"]
    jumped: Bool[Tensor, "sequence length"] = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.jumped is None and isinstance(self.predictable, Tensor):
            object.__setattr__(self, "jumped", torch.zeros_like(self.predictable))
        check_fields(self)

    def __repr__(self) -> str:
        n, length = self.tokens.shape
        return f"SampledSequences(sequence={n}, length={length}, trigger={self.triggers.shape[1]})"

    def to_pandas(self) -> pd.DataFrame:
        """A row per token: sequence, position, token, predictable, jumped."""
        n, length = self.tokens.shape
        columns = {"token": self.tokens, "predictable": self.predictable, "jumped": self.jumped}
        frame = tidy({"sequence": range(n), "position": range(length)}, **columns)
        return frame.astype({"token": int, "predictable": bool, "jumped": bool})


def drawn_per_sequence(triggers: Token | Sequence[Token] | None, n_triggers: int | None) -> bool:
    """Whether these arguments ask for triggers that are drawn anew for each sequence.

    Raises:
        ValueError: for tokens together with a number of triggers.
    """
    if n_triggers is None:
        return False
    if isinstance(triggers, str) and triggers in TRIGGER_RULES:
        return triggers == "random"
    if triggers is not None and isinstance(triggers, Sequence) and not len(triggers):
        return True
    rules = ", ".join(map(repr, TRIGGER_RULES))
    raise ValueError(
        f"give either triggers or n_triggers, got {shown(triggers)} and {shown(n_triggers)}; with n_triggers, triggers "
        f"must be one of {rules}"
    )


def ranked_by_frequency(long_run: Float[Tensor, "d_vocab"]) -> Int[Tensor, "token"]:
    """The ids of the tokens that occur in the long run, the most frequent first."""
    order = long_run.argsort(descending=True, stable=True)
    return order[long_run[order] > 1e-12]  # what is left for good keeps a trace of rounding


def ranked_triggers(long_run: Float[Tensor, "d_vocab"], rule: object, n_triggers: int) -> Int[Tensor, "trigger"]:
    """The ids of the most frequent tokens in the long run, or, by the rule "rare", of the least frequent that occur."""
    n_triggers = check_count("n_triggers", n_triggers)
    ranked = ranked_by_frequency(long_run)
    if n_triggers > len(ranked):
        raise ValueError(f"n_triggers is {n_triggers}; only {len(ranked)} tokens ever occur")
    return ranked[:n_triggers] if rule == "frequent" else ranked.flip(0)[:n_triggers]


def drawn_triggers(
    pi_u: Float[Tensor, "d_vocab"], n_sequences: int, n_triggers: int, generator: torch.Generator
) -> Int[Tensor, "sequence trigger"]:
    """Distinct triggers for each sequence, drawn from `pi_u` one after the other."""
    n_triggers = check_count("n_triggers", n_triggers)
    possible = int((pi_u > 0).sum())
    if n_triggers > possible:
        raise ValueError(f"n_triggers is {n_triggers}; only {possible} tokens can be drawn from pi_u")
    # Exponential races: the n smallest arrival times are a draw without replacement.
    arrivals = -torch.rand(n_sequences, len(pi_u), generator=generator, dtype=torch.float64).log()
    return (arrivals / pi_u).topk(n_triggers, largest=False).indices


def drawn_jumps(
    jump: float, triggers: Int[Tensor, "sequence trigger"], length: int, generator: torch.Generator
) -> Int[Tensor, "length sequence"]:
    """Where the chain is to jump, and to which trigger, each as likely: its id; -1 where it goes on."""
    uniform = torch.rand(length, len(triggers), generator=generator, dtype=torch.float64)
    # Below `jump`, the same number says which: it is uniform there.
    which = (uniform / jump * triggers.shape[1]).long().clamp(max=triggers.shape[1] - 1)
    return torch.where(uniform < jump, triggers.T.gather(0, which), -1)
