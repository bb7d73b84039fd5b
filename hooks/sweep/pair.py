"""Two prompts (or batches), between whose runs patches go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens._checks import check_choice
from hijack_lens._inputs import model_tokens
from hijack_lens.hooks.intervention import check_model
from hijack_lens.hooks.sweep.reader import Reader
from hijack_lens.metrics import Metric

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt, in the roles that the direction gives them.

    Attributes:
        base: tokens of the run that is patched.
        source: tokens of the run that patches come from.
        direction: "denoise" patches the clean run into the corrupted one; "noise" the reverse.
    """

    base: Int[Tensor, "batch pos"]
    source: Int[Tensor, "batch pos"]
    direction: Direction

    @classmethod
    def of(cls, model: Any, clean: object, corrupted: object, direction: Direction) -> "PromptPair":
        """The pair of what a user calls prompts.

        Raises:
            TypeError, ValueError: for what are no prompts of this model, or are not of one shape.
        """
        check_choice("direction", direction, ("denoise", "noise"))
        check_model(model)
        tokens = model_tokens(model, clean, "clean"), model_tokens(model, corrupted, "corrupted")
        if tokens[0].shape != tokens[1].shape:
            shapes = (tuple(one.shape) for one in tokens)
            raise ValueError("clean and corrupted must have one shape [batch, pos], got {} and {}".format(*shapes))
        source, base = tokens if direction == "denoise" else tokens[::-1]
        return cls(base, source, direction)

    def reader(
        self,
        model: Any,
        metric: Metric | Callable[[Tensor], Any],
        base: Float[Tensor, "batch pos d_vocab"],
        source: Float[Tensor, "batch pos d_vocab"],
    ) -> Reader:
        """The metric, with what it needs of the model and of the two runs' logits."""
        if isinstance(metric, Metric):
            clean, corrupted = (source, base) if self.direction == "denoise" else (base, source)
            metric = metric.on(model, clean, corrupted)
        return Reader.of(metric, base.shape[1])
