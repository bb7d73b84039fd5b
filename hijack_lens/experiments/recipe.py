"""Small models that experiments train, each made once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hijack_lens.language import BigramLanguage
from hijack_lens.models import TwoLayerTransformer, two_layer_transformer
from hijack_lens.training import TrainConfig, TrainingRun, train


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained on a random bigram language with triggers; one seed is one replicate of all of it.

    Attributes:
        seed: of the language, the weights and the sequences.
        positions: how they enter the model.
        d_vocab: tokens in the language.
        concentration: of the Dirichlet distribution that its rows are drawn from; less is sharper.
        triggers: how many.
        fixed: whether these are the same tokens, the first of the vocabulary, in all sequences, or drawn for each.
        continuations: of the triggers: "uniform", or from the "bigram" rows of the language.
        d_model: of the residual stream.
        n_layers: of the model.
        length: tokens per sequence.
        steps: of the optimizer.
        evaluate_every: steps between probes.
    """

    seed: int
    positions: Literal["relative", "absolute", "none"] = "relative"
    d_vocab: int = 24
    concentration: float = 0.3
    triggers: int = 5
    fixed: bool = True
    continuations: Literal["uniform", "bigram"] = "uniform"
    d_model: int = 64
    n_layers: int = 2
    length: int = 48
    steps: int = 240
    evaluate_every: int = 25

    @property
    def language(self) -> BigramLanguage:
        """Of the sequences."""
        return BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=self.seed)

    @property
    def config(self) -> TrainConfig:
        """For `hijack_lens.train`."""
        return TrainConfig(
            triggers=tuple(range(self.triggers)) if self.fixed else (),
            n_triggers=None if self.fixed else self.triggers,
            continuations=self.continuations,
            length=self.length,
            seed=self.seed,
            steps=self.steps,
            evaluate_every=min(self.evaluate_every, self.steps),
        )

    def untrained(self) -> TwoLayerTransformer:
        """The model before its first step, able to read prompts of four times the training length."""
        return two_layer_transformer(
            self.language,
            self.positions,
            d_model=self.d_model,
            n_layers=self.n_layers,
            seed=self.seed,
            n_ctx=4 * self.length,
            device="cpu",
        )


RANDOM_TRIGGERS = Recipe(0, fixed=False, triggers=4, d_vocab=16, length=32, steps=300, evaluate_every=300)
"""With these, either memory may win after any token."""

Train = Callable[[Recipe], TrainingRun]
"""What experiments get their models from: `trained`, or in a test something that violates the claim."""


@functools.lru_cache(maxsize=64)
def trained(recipe: Recipe) -> TrainingRun:
    """The recipe carried out; the same run for the same recipe, to be treated as read-only."""
    return train(recipe.untrained(), recipe.language, recipe.config)
