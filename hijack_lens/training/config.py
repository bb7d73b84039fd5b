"""How a model is trained."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hijack_lens._checks import as_int, check_choice, check_count, check_number
from hijack_lens.language import Token


@dataclass(frozen=True)
class TrainConfig:
    """What the training loop does; the same config, model and language give the same run.

    Attributes:
        triggers: tokens whose continuation is fixed per sequence; `()` with `n_triggers`.
        length: tokens per training sequence.
        seed: of the data.
        steps: of the optimizer, each on `batch_size` fresh sequences.
        batch_size: sequences per step.
        n_triggers: instead of `triggers`, this many drawn per sequence.
        continuations: of the triggers, drawn "uniform" or from "bigram" (their own row of pi_b).
        loss: over "all" tokens, or over the in-context "predictable" ones only (Bietti et al. 2023).
        optimizer: "adamw", or "sgd" with momentum.
        lr: peak learning rate; reached after `warmup` steps, and lowered along a cosine to `final_lr` times itself.
        warmup: steps of linear warm-up.
        final_lr: as a fraction of `lr`.
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: of either.
        evaluate_every: steps between probes.
        eval_sequences: how many held-out sequences the probes see, at each length.
        eval_lengths: lengths they see, as multiples of `length`; those beyond the model's n_ctx are left out.
        checkpoint_every: steps between checkpoints.
        compile: run the forward pass through torch.compile.
        bf16: compute in bfloat16 where autocast does (CUDA), weights staying as they are.
    """

    triggers: Token | Sequence[Token]
    length: int
    seed: int
    steps: int = 300
    batch_size: int = 64
    n_triggers: int | None = None
    continuations: Literal["uniform", "bigram"] = "uniform"
    loss: Literal["all", "predictable"] = "all"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-2
    warmup: int = 20
    final_lr: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    evaluate_every: int = 25
    eval_sequences: int = 64
    eval_lengths: tuple[int, ...] = (1, 2, 4)
    checkpoint_every: int = 100
    compile: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        listed = (
            [self.triggers] if isinstance(self.triggers, str) or as_int(self.triggers) is not None else self.triggers
        )
        if not isinstance(listed, Iterable):
            raise TypeError(f"triggers must be a token or several, got {self.triggers!r}")
        triggers = tuple(token if isinstance(token, str) else check_count("triggers", token) for token in listed)
        object.__setattr__(self, "triggers", triggers)
        for name in ("betas", "eval_lengths"):
            if not isinstance(getattr(self, name), Sequence):
                raise TypeError(f"{name} must be several numbers, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        if 1 not in self.eval_lengths:
            raise ValueError(f"eval_lengths must include 1, the training length itself, got {self.eval_lengths!r}")
        if bool(triggers) == (self.n_triggers is not None):
            raise ValueError(f"give either triggers or n_triggers, got {triggers!r} and {self.n_triggers!r}")
        check_count("length", self.length, minimum=2)
        check_count("seed", self.seed)
        for name in ("steps", "batch_size", "evaluate_every", "eval_sequences", "checkpoint_every"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("warmup", self.warmup)
        if self.n_triggers is not None:
            check_count("n_triggers", self.n_triggers, minimum=1)
        for multiple in self.eval_lengths:
            check_count("eval_lengths", multiple, minimum=1)
        check_choice("continuations", self.continuations, ("uniform", "bigram"))
        check_choice("loss", self.loss, ("all", "predictable"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_number("lr", self.lr, positive=True)
        bounded = {"final_lr": self.final_lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        for name, value in [*bounded.items(), *(("betas", beta) for beta in self.betas)]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * rising * (self.final_lr + (1 - self.final_lr) * falling)
