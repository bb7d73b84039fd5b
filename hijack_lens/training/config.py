"""How a model is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from hijack_lens.core.checks import (
    Seed,
    as_int,
    check_choice,
    check_count,
    check_fraction,
    check_list,
    check_number,
    fixed_seed,
    plain_scalar,
    shown,
)
from hijack_lens.language import Token
from hijack_lens.language.sequences import drawn_per_sequence

UNTIL_FORMED = "until formed"


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the same config, model and language give the same run.

    Attributes:
        triggers: tokens whose continuation is fixed per sequence. With `n_triggers`, "frequent" or "rare" (the tokens
            that occur most or least often), or "random" or `()`, drawn per sequence.
        length: tokens per training sequence.
        seed: of the data; kept as an int, so that a run can go on.
        steps: of the optimizer, each on fresh sequences; or "until formed": first as many as the circuit
            takes to form, on sequences that jump to triggers, then `finish_steps` on natural ones.
        batch_size: sequences per step, where steps are counted; until formed, as many as hold `tokens_per_step`.
        n_triggers: how many triggers, where `triggers` does not name them.
        continuations: how the triggers' continuations are drawn: "uniform", or "bigram" (from their own row of pi_b).
        loss: over "all" tokens, or only over those "predictable" in context (Bietti et al. 2023).
        optimizer: "adamw", or "sgd" with momentum.
        lr: peak learning rate, reached after `warmup` steps; then it decays along a cosine to `final_lr` times itself.
            Until formed, this is how the finishing steps go.
        warmup: steps of linear warm-up.
        final_lr: as a fraction of `lr`.
        momentum: SGD's.
        betas: AdamW's.
        weight_decay: for either optimizer.
        evaluate_every: steps between probes; while finishing, five times as many.
        eval_sequences: how many held-out sequences the probes see, at each length.
        eval_lengths: the lengths of these, as multiples of `length`; those beyond the model's n_ctx are left out.
        checkpoint_every: steps between checkpoints.
        compile: run the forward pass through torch.compile.
        bf16: compute in bfloat16 where autocast does (CUDA); the weights keep their dtype.
        boost: while forming, the share of tokens that shall follow from the context: where fewer do, sequences jump to
            their triggers (`BigramLanguage.sample(jump=)`), and the loss leaves out what they jumped to. `None` for no
            boost.
        min_triggers: while forming, how many triggers there are at least: the most frequent of the other tokens join
            those asked for.
        formed_at: forming ends when in-context accuracy on natural sequences is this fraction of the best possible,
            looked at every `evaluate_every` steps.
        max_steps: forming ends after so many steps in any case.
        finish_steps: steps after forming, on natural sequences, save that triggers which are the same in all of them
            make at least a tenth of the tokens follow from the context (with a boost). By default 400, and for larger
            vocabularies than 100 tokens 6 more for each, up to 1,000.
        token_lr: the rate of embeddings, MLPs and unembedding in finishing steps, as a multiple of `lr`, which is that
            of attention and positions: these lose the circuit at rates that suit the bigrams. By default d_vocab / 50,
            but at least 1 and at most 3, since of more tokens each comes by less often.
        forming_lr: constant learning rate while forming, after `warmup` steps.
        forming_length: tokens per sequence while forming, at most; absolute positions need all of `length`.
        tokens_per_step: tokens per step, while forming and finishing.

    Examples:
        >>> config = hl.TrainConfig(length=64, seed=0, triggers="frequent", n_triggers=2, steps=300)
        >>> config.random_triggers
        False
        >>> config.lr_at(150) < config.lr_at(0)
        False
    """

    triggers: Token | Sequence[Token]
    length: int
    seed: Seed
    steps: int | Literal["until formed"] = "until formed"
    batch_size: int = 64
    n_triggers: int | None = None
    continuations: Literal["uniform", "bigram"] = "uniform"
    loss: Literal["all", "predictable"] = "all"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 6e-3
    warmup: int = 20
    final_lr: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    evaluate_every: int = 20
    eval_sequences: int = 64
    eval_lengths: tuple[int, ...] = (1, 2, 4)
    checkpoint_every: int = 100
    compile: bool = False
    bf16: bool = False
    boost: float | None = 0.35
    min_triggers: int = 5
    formed_at: float = 0.95
    max_steps: int = 600
    finish_steps: int | None = None
    token_lr: float | None = None
    forming_lr: float = 3e-3
    forming_length: int = 64
    tokens_per_step: int = 4096

    def __post_init__(self) -> None:
        self._set("triggers", self._plain_triggers())
        for name in ("betas", "eval_lengths"):
            if not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"{name} must be several numbers, got {shown(getattr(self, name))}")
            self._set(name, tuple(map(plain_scalar, check_list(name, getattr(self, name), "numbers"))))
        for field in fields(self):  # plain numbers, since a checkpoint's header holds no others
            self._set(field.name, plain_scalar(getattr(self, field.name)))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {shown(self.betas)}")
        if not any(as_int(length) == 1 for length in self.eval_lengths):  # `in` would compare arrays
            raise ValueError(f"eval_lengths must include 1, the training length itself, got {shown(self.eval_lengths)}")
        if not self.triggers and self.n_triggers is None:
            raise ValueError("give either triggers or n_triggers, got () and None")
        check_count("length", self.length, minimum=2)
        self._set("seed", fixed_seed(self.seed))
        if isinstance(self.steps, str):
            check_choice("steps", self.steps, (UNTIL_FORMED,))
        else:
            check_count("steps", self.steps, minimum=1)
        for name in ("batch_size", "evaluate_every", "eval_sequences", "checkpoint_every"):
            check_count(name, getattr(self, name), minimum=1)
        self._check_forming()
        check_count("warmup", self.warmup)
        if self.n_triggers is not None:
            check_count("n_triggers", self.n_triggers, minimum=1)
        for multiple in self.eval_lengths:
            check_count("eval_lengths", multiple, minimum=1)
        check_choice("continuations", self.continuations, ("uniform", "bigram"))
        check_choice("loss", self.loss, ("all", "predictable"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_number("lr", self.lr, positive=True)
        for name in ("final_lr", "momentum", "weight_decay"):
            check_fraction(name, getattr(self, name))
        for beta in self.betas:
            check_fraction("betas", beta)

    def _check_forming(self) -> None:
        if self.boost is not None and not 0 <= check_fraction("boost", self.boost) < 1:
            raise ValueError(f"boost must be below 1, got {shown(self.boost)}")
        check_count("min_triggers", self.min_triggers)
        check_fraction("formed_at", self.formed_at)
        for name, minimum in (("max_steps", 1), ("forming_length", 2), ("tokens_per_step", 1)):
            check_count(name, getattr(self, name), minimum=minimum)
        if self.finish_steps is not None:
            check_count("finish_steps", self.finish_steps)
        if self.token_lr is not None:
            check_number("token_lr", self.token_lr, positive=True)
        check_number("forming_lr", self.forming_lr, positive=True)

    def _plain_triggers(self) -> str | tuple[Token, ...]:
        """The triggers as a rule's name or as tokens; drawn per sequence, they are `()`, however asked for."""
        given = self.triggers
        alone = isinstance(given, str) or as_int(given) is not None
        if self.n_triggers is not None and (alone or not isinstance(given, Sequence) or len(given)):
            return () if drawn_per_sequence(given, self.n_triggers) else str(given)
        listed = [given] if alone else check_list("triggers", given, "a token or several")
        return tuple(str(token) if isinstance(token, str) else check_count("triggers", token) for token in listed)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def random_triggers(self) -> bool:
        """Whether the triggers are drawn anew for each sequence."""
        return not self.triggers

    def finishing(self, d_vocab: int) -> int:
        """How many steps there are after forming, with a vocabulary of `d_vocab` tokens."""
        d_vocab = check_count("d_vocab", d_vocab, minimum=1)
        if self.finish_steps is not None:
            return self.finish_steps
        return min(400 + 6 * max(d_vocab - 100, 0), 1000)

    def lr_at(self, step: int, steps: int | None = None) -> float:
        """The learning rate of a step, counted from 0; until formed, of a finishing step.

        Args:
            step: which.
            steps: of how many; by default as many as are counted, or as a small vocabulary takes to finish.
        """
        step = check_count("step", step)
        if steps is None:
            steps = self.finishing(1) if isinstance(self.steps, str) else self.steps
        return scheduled_lr(step, check_count("steps", steps), self.lr, self.warmup, self.final_lr)


def scheduled_lr(step: int, steps: int, lr: float, warmup: int, final_lr: float) -> float:
    """The learning rate of a step: a linear warm-up to `lr`, times a cosine that falls to the fraction `final_lr`."""
    rising = min(1.0, (step + 1) / max(warmup, 1))
    falling = 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    return lr * rising * (final_lr + (1 - final_lr) * falling)
