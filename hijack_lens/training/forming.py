"""The phases of a training: counted steps; or forming the circuit on boosted data, then finishing on natural ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.language import BigramLanguage, SampledSequences, Token
from hijack_lens.language.sequences import ranked_by_frequency
from hijack_lens.training.config import UNTIL_FORMED, TrainConfig
from hijack_lens.training.data import BLOCK, data_seed

KEPT = 0.1
"""Share of tokens that follow from the context while finishing, at least, where triggers are the same throughout."""

AGAIN = 0.2
"""What a token counts for in the loss that a trigger is followed by since it continues with itself, while finishing."""


@dataclass(frozen=True)
class Phase:
    """Steps of one kind.

    Attributes:
        name: what the phase is called; its data depend on it.
        start: its first step.
        end: the step that it ends before, at the latest.
        length: tokens per sequence.
        batch_size: sequences per step.
        triggers: as in `BigramLanguage.sample`.
        n_triggers: likewise.
        jump: likewise.
        token_lr: the rate of all but attention and positions, as a multiple of theirs.
        config: the training's.
    """

    name: str
    start: int
    end: int
    length: int
    batch_size: int
    triggers: Token | Sequence[Token]
    n_triggers: int | None
    jump: float
    token_lr: float
    config: TrainConfig

    @property
    def forming(self) -> bool:
        """Whether it goes on only until the circuit has formed."""
        return self.name == "forming"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from the training's first."""
        if self.forming:
            return self.config.forming_lr * min(1.0, (step + 1) / max(self.config.warmup, 1))
        return self.config.lr_at(step - self.start, self.end - self.start)

    def sequences(self, language: BigramLanguage, block: int) -> SampledSequences:
        """The sequences of a block of the phase's steps; they depend on the seed, the phase and the block alone."""
        return language.sample(
            BLOCK * self.batch_size,
            self.length,
            self.triggers,
            n_triggers=self.n_triggers,
            continuations=self.config.continuations,
            jump=self.jump,
            seed=data_seed(self.config, self.name, block),
        )

    def weights(self, sequences: SampledSequences) -> Float[Tensor, "n next"] | None:
        """What each next token counts for in the loss; `None` if all count alike."""
        weighted = self.name == "finishing" and not self.config.random_triggers
        if self.config.loss == "predictable":
            weights = sequences.predictable[:, :-1].float()
        elif self.forming or weighted:  # nothing tells where jumps come, and the bigrams must not learn them
            weights = 1.0 - sequences.jumped[:, :-1].float()
        else:
            return None
        if not weighted:
            return weights
        # A trigger that continues with itself is followed by nothing else: by their number such tokens would teach that
        # the trigger comes again, in place of its match.
        again = sequences.predictable[:, :-1] & (sequences.tokens[:, 1:] == sequences.tokens[:, :-1])
        return weights * torch.where(again, AGAIN, 1.0)


def phase_at(config: TrainConfig, language: BigramLanguage, positions: str, forming_steps: int | None) -> Phase:
    """The phase that a training is in: `forming_steps` is how many forming took, `None` if it has not ended.

    Raises:
        ValueError: for triggers that the language lacks.
    """
    triggers, n_triggers, length = config.triggers, config.n_triggers, config.length
    if isinstance(config.steps, int):
        return Phase("train", 0, config.steps, length, config.batch_size, triggers, n_triggers, 0.0, 1.0, config)
    boost, token_lr = config.boost or 0.0, 1.0
    if forming_steps is not None:
        name, start, end = "finishing", forming_steps, forming_steps + config.finishing(language.d_vocab)
        token_lr = min(max(language.d_vocab / 50, 1.0), 3.0) if config.token_lr is None else config.token_lr
        # Where triggers come by too seldom, the circuit fades. What is jumped to is not learned, so that the optimum is
        # the natural one; but drawn triggers are guessed by how often they come, which must be natural then.
        boost = 0.0 if config.random_triggers else min(boost, KEPT)
    else:
        name, start, end = "forming", 0, config.max_steps
        # Absolute positions are learned one by one, so each of them must occur.
        length = length if positions == "absolute" else min(length, config.forming_length)
        triggers, n_triggers = _with_decoys(config, language)
    jump = 0.0
    if boost:
        sequences = language.sample(
            256,
            length,
            triggers,
            n_triggers=n_triggers,
            continuations=config.continuations,
            seed=data_seed(config, "natural share", 0),
        )
        share = float(sequences.predictable.double().mean())
        # Jumps from what is no trigger raise the share from p to (p + jump) / (1 + jump).
        jump = min(max(0.0, (boost - share) / (1 - boost)), 1.0)
    batch_size = math.ceil(config.tokens_per_step / length)
    return Phase(name, start, end, length, batch_size, triggers, n_triggers, jump, token_lr, config)


def last_step(config: TrainConfig, d_vocab: int, forming_steps: int | None) -> int:
    """The step that a training ends at, or at the latest can."""
    if config.steps != UNTIL_FORMED:
        return int(config.steps)
    return (config.max_steps if forming_steps is None else forming_steps) + config.finishing(d_vocab)


def _with_decoys(config: TrainConfig, language: BigramLanguage) -> tuple[tuple[Token, ...], int | None]:
    """Triggers to form with: where there are fewer than asked for, the most frequent of the other tokens join them."""
    if config.random_triggers:
        possible = int((language.pi_u > 0).sum())
        return (), max(config.n_triggers or 0, min(config.min_triggers, possible))
    ids = language.fixed_triggers(config.triggers, config.n_triggers).tolist()
    others = [token for token in ranked_by_frequency(language.long_run).tolist() if token not in ids]
    return (*ids, *others[: max(config.min_triggers - len(ids), 0)]), None
