"""The result of setting the two memories side by side: tables that sum to the logits, and who wins where."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.memories.context_result import labels_of
from hijack_lens.memories.context_tables import Tokens, TokenTables
from hijack_lens.theory.margin import Margin

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

Winner = Literal["context", "weights", "both", "neither"]

_FORMAT = "hijack_lens.MemoryConflict.1"
_TENSORS = ("tokens", "context", "weights", "rest", "logits")


@dataclass(frozen=True, repr=False)
class MemoryConflict(TokenTables):
    """What each memory adds to the logits, for every token that may stand last.

    What the memories say, and who wins, is among the `answers`.

    Attributes:
        context: written through the induction heads; in logits.
        weights: written by the bigram memory, the direct path and the biases.
        rest: written any other way.
        logits: of the model; the sum of the three.
    """

    context: Float[Tensor, "query answer"]
    weights: Float[Tensor, "query answer"]
    rest: Float[Tensor, "query answer"]
    logits: Float[Tensor, "query answer"]

    def __post_init__(self) -> None:
        shape = (len(self.queries), len(self.answers))
        for name in _TENSORS[1:]:
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")

    @property
    def completeness_error(self) -> float:
        """The largest |context + weights + rest - logit|; rounding alone, for an untouched model."""
        return float((self.context + self.weights + self.rest - self.logits).abs().max())

    @property
    def in_context(self) -> Int[Tensor, "query"]:
        """The context's candidate for each query token: on the answer axis, where its row is largest."""
        return self.context.argmax(1)

    @property
    def global_(self) -> Int[Tensor, "query"]:
        """The weights' candidate, likewise."""
        return self.weights.argmax(1)

    @property
    def conflicts(self) -> Bool[Tensor, "query"]:
        """Where the two differ. Of query tokens that do not occur in the context, it knows nothing in particular."""
        return self.in_context != self.global_

    @property
    def margin(self) -> Margin:
        """logit[in-context candidate] - logit[global candidate] of each query token, split by memory."""

        def difference(table: Float[Tensor, "query answer"]) -> Float[Tensor, "query"]:
            a, b = (table.gather(1, candidate[:, None])[:, 0] for candidate in (self.in_context, self.global_))
            return a - b

        return Margin(*map(difference, (self.context, self.weights, self.rest)))

    @property
    def winners(self) -> tuple[Winner, ...]:
        """Whose candidate has the largest logit: "both" where they say the same, "neither" for a third answer."""
        top, c, g = (x.tolist() for x in (self.logits.argmax(1), self.in_context, self.global_))
        return tuple(map(_winner, top, c, g))

    def to_pandas(self) -> pd.DataFrame:
        """A row per query token.

        Its text, whether it `occurs` in the context, the candidates `in_context` and `global`, whether they `conflict`,
        the parts of the margin and their sum, the `winner`, and the answer `predicted`, of the largest logit.
        """
        texts, margin = self.answer_texts, self.margin
        frame = pd.DataFrame({"query": self.query_texts, "occurs": self.occurs.numpy()})
        frame["in_context"] = [texts[i] for i in self.in_context.tolist()]
        frame["global"] = [texts[i] for i in self.global_.tolist()]
        frame["conflict"] = self.conflicts.cpu().numpy()
        for name in ("context", "weights", "rest"):
            frame[name] = getattr(margin, name).detach().cpu().double().numpy()
        frame["margin"] = margin.total.detach().cpu().double().numpy()
        frame["winner"] = self.winners
        frame["predicted"] = [texts[i] for i in self.logits.argmax(1).tolist()]
        return frame

    def picture(self, queries: Tokens = None, answers: Tokens = None) -> "Picture":
        """Both memories as heat maps side by side, conflicts marked, and beside them the margins.

        Args:
            queries: rows to show, by id or text; by default tokens that the context holds.
            answers: columns, likewise; by default these and what either memory says.

        Raises:
            ValueError: for tokens that are not in the tables.
        """
        from hijack_lens.visual.memory_maps import conflict_maps

        return conflict_maps(self, queries, answers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {"format": _FORMAT, "queries": self.queries, "answers": self.answers, "vocab": self.vocab}
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryConflict":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            rest: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            return cls(**labels_of(header), **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved MemoryConflict: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.memories.conflict_report import conflict_text

        return conflict_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.memories.conflict_report import conflict_html

        return conflict_html(self)


def _winner(top: int, in_context: int, global_: int) -> Winner:
    if in_context == global_:
        return "both" if top == in_context else "neither"
    return "context" if top == in_context else "weights" if top == global_ else "neither"
