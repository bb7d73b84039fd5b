"""Logits by path: the paths, the labelled tensor that sums to the logits, and views of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    as_int,
    check_choice,
    check_count,
    check_fields,
    check_list,
    check_position,
    check_shapes,
    check_type,
    shown,
)
from hijack_lens.core.circuit import Circuit, Component, Margin
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, tidy, visible
from hijack_lens.core.texts import spellings

Memory = Literal["context", "weights", "rest"]
MEMORIES: tuple[Memory, ...] = ("context", "weights", "rest")

Source = Literal["embed", "pos_embed", "stream", "biases"]
_SOURCE_NAMES: dict[Source, str] = {
    "embed": "embed",
    "pos_embed": "positional embed",
    "stream": "stream",
    "biases": "biases",
}


@dataclass(frozen=True)
class Path:
    """A route from where a term enters the residual stream to the unembedding.

    Attributes:
        source: "embed", "pos_embed", or "biases" (all biases, by any route). In a deep model also "stream": all that
            `through[0]` reads from the residual stream, except what paths that start further back carry.
        through: the heads and MLPs on the way, in order.
        label: the path in words, by the roles of the circuit's components.
        memory: "context" through an induction head; "weights" for biases, or through MLPs only from the embedding, or
            through bigram memories only from the stream; else "rest".

    Examples:
        >>> head = hl.Component.of("L1H0")
        >>> path = hl.Path.of("embed", (head,), model.circuit)
        >>> print(path, "counts as the", path.memory)
        embed → induction head → unembed counts as the context
    """

    source: Source
    through: tuple[Component, ...]
    label: str
    memory: Memory

    def __str__(self) -> str:
        return self.label

    @classmethod
    def of(cls, source: Source, through: tuple[Component, ...], circuit: Circuit) -> "Path":
        """A path, labelled by the roles of a circuit."""
        check_choice("source", source, _SOURCE_NAMES)
        check_type("circuit", circuit, Circuit)
        for component in check_list("through", through, "components"):
            check_type("through", component, Component)
        words = [_SOURCE_NAMES[source], *(circuit.label(component) for component in through)]
        label = words[0] if source == "biases" else " → ".join([*words, "unembed"])
        if any(component in circuit.induction for component in through):
            memory: Memory = "context"
        elif source != "pos_embed" and all(
            component in circuit.bigram if source == "stream" else component.kind == "mlp" for component in through
        ):
            memory = "weights"
        else:
            memory = "rest"
        return cls(source, through, label, memory)


@dataclass(frozen=True, repr=False)
class LogitAttribution(Saved, Drawn):
    """What each path wrote into each logit, exactly.

    Attributes:
        values: in logits; they sum to `logits` over paths and sources. With position="all", they are already summed
            over sources: the axis after the path is the position.
        logits: the run's logits.
        tokens: the prompts.
        paths: the paths along the path axis.
        position: the position of the logits, or "all".
        vocab: text of each vocabulary entry, if the model has a tokenizer; for a deep model, only of the tokens that
            occur here, by id.
        candidates: two token ids that the prompt sets against each other, (in-context, global).
        joiner: what separates two tokens in a text.
        answers: ids of the outputs on the last axis, or each prompt's own; `None` for all of them.
        outputs_are_tokens: whether the model has as many outputs as tokens; if not, outputs are called by their ids.

    Examples:
        >>> result = hl.attribute(model, prompt)
        >>> result.axes, result.values.shape
        (('path', 'source', 'd_vocab'), torch.Size([8, 24, 18]))
        >>> by_path = result.by_path()
        >>> e = language.index("e")
        >>> for path, logit in zip(result.paths, by_path[:, e], strict=True):
        ...     if abs(logit) > 1:
        ...         print(f"{path}: {logit:.2f}")
        embed → induction head → unembed: 9.86
        embed → bigram memory → unembed: -6.60
        >>> result.completeness_error < 1e-4
        True
    """

    values: Float[Tensor, "*batch path source d_vocab"]
    logits: Float[Tensor, "... d_vocab"]
    tokens: Int[Tensor, "*batch pos"]
    paths: tuple[Path, ...]
    position: int | Literal["all"]
    vocab: tuple[str, ...] | Mapping[int, str] | None = None
    candidates: tuple[int, int] | None = None
    joiner: str = ""
    answers: tuple[int | tuple[int, ...], ...] | None = None
    outputs_are_tokens: bool = True

    _by_prompt: ClassVar[tuple[str, ...]] = ("values", "logits", "tokens")

    def __post_init__(self) -> None:
        check_fields(self)
        *batch, n_paths, n_sources, d_vocab = self.values.shape
        expected = (*batch, n_sources, d_vocab) if self.position == "all" else (*batch, d_vocab)
        if n_paths != len(self.paths):
            raise ValueError(f"paths must label all {n_paths} entries of values, got {len(self.paths)}")
        check_shapes(self, {"logits": expected, "tokens": (*batch, n_sources)})
        if self._own and [len(self.answers or ())] != batch:
            raise ValueError(f"answers must be of a batch {batch} of prompts, got those of {len(self.answers or ())}")
        rows: Any = () if self.answers is None else self.answers if self._own else (self.answers,)
        for row in rows:
            if len(row) != d_vocab:
                raise ValueError(f"answers must name all {d_vocab} tokens of the last axis, got {len(row)}")

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        middle = "position" if self.position == "all" else "source"
        last = "d_vocab" if self.answers is None else "answer"
        return (*(("batch",) if self.tokens.ndim > 1 else ()), "path", middle, last)

    @property
    def completeness_error(self) -> float:
        """The largest |sum over paths and sources - logit|; only rounding error, for an unmodified model."""
        return float((self._summed(self.values.sum(-3)) - self.logits).abs().max())

    def __getitem__(self, index: int) -> "LogitAttribution":
        """One prompt of a batch."""
        if self.tokens.ndim == 1:
            raise TypeError("this attribution is of a single prompt, without a batch axis to index")
        index = check_position("index", index, len(self.tokens), len(self.tokens) - 1)
        parts = {name: getattr(self, name)[index] for name in self._by_prompt}
        answers: Any = self.answers
        return replace(self, **parts, answers=answers[index] if self._own else answers)

    @property
    def _own(self) -> bool:
        """Whether each prompt has answers of its own."""
        return any(isinstance(answer, tuple) for answer in self.answers or ())

    def by_path(self) -> Float[Tensor, "... path d_vocab"]:
        """Each path's logits: [*batch, path, d_vocab], or [*batch, path, position, d_vocab] for "all"."""
        return self.values if self.position == "all" else self.values.sum(-2)

    def by_memory(self) -> dict[Memory, Float[Tensor, "... d_vocab"]]:
        """What context, weights and rest add to the logits; shaped like `logits`."""
        return {memory: self._summed(self._of(memory).sum(-3)) for memory in MEMORIES}

    def by_source(self) -> dict[Memory, Float[Tensor, "*batch source d_vocab"]]:
        """What each source position adds through each memory; for one position's logits only."""
        if self.position == "all":
            raise ValueError("by_source needs an attribution of one position; this one, of 'all', sums over sources")
        return {memory: self._of(memory).sum(-3) for memory in MEMORIES}

    def margin(self, a: str | int | None = None, b: str | int | None = None) -> Margin:
        """`logit[a] - logit[b]`, split by memory; by default for those that `pair` gives: answers in their order."""
        first, second = self.pair(a, b)
        context, weights, rest = (part[..., first] - part[..., second] for part in self.by_memory().values())
        return Margin(context, weights, rest)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest logits, each split by memory; for one prompt and one position."""
        self._check_single("top")
        chosen = self.logits.topk(min(check_count("k", k, minimum=1), len(self.logits)))
        table = pd.DataFrame({"token": [self.token_text(int(index)) for index in chosen.indices]})
        table["logit"] = chosen.values.tolist()
        for memory, part in self.by_memory().items():
            table[memory] = part[chosen.indices].tolist()
        return table

    def to_pandas(self) -> pd.DataFrame:
        """A tidy table, one row per value: path, memory, source (or position), token, logit."""
        if self._own:
            tables = {index: self[index].to_pandas() for index in range(len(self.tokens))}
            return pd.concat(tables, names=["batch"]).reset_index(level=0).reset_index(drop=True)
        table = tidy(dict(zip(self.axes, map(range, self.values.shape), strict=True)), logit=self.values)
        texts = [self.token_text(index) for index in range(self.values.shape[-1])]
        table["memory"] = [self.paths[i].memory for i in table["path"]]
        table["path"] = [self.paths[i].label for i in table["path"]]
        table["token"] = [texts[i] for i in table[self.axes[-1]]]
        kept = [axis for axis in self.axes if axis in ("batch", "source", "position")]
        return table[[*kept[:-1], "path", "memory", kept[-1], "token", "logit"]]

    def token_text(self, index: int) -> str:
        """The text of a token on the last axis, with white space visible; its id if there is no text."""
        last = len(self._ids) - 1
        one = self._ids[check_position("index", index, last + 1, last)]
        return self._text(one) if self.outputs_are_tokens else str(one)

    def source_texts(self) -> list[str]:
        """The prompt's tokens, with white space visible; for one prompt."""
        if self.tokens.ndim > 1:
            raise ValueError("source_texts is for one prompt; index the batch first")
        return [self._text(int(token)) for token in self.tokens]

    def pair(self, a: str | int | None = None, b: str | int | None = None) -> tuple[int, int]:
        """Where two tokens to compare are on the last axis.

        By default the first two answers; without answers, the prompt's candidates, else the two largest logits.

        Raises:
            TypeError, ValueError: for tokens that are not on that axis, or if there is no default.
        """
        if a is not None or b is not None:
            return self._index(a, "a"), self._index(b, "b")
        if self.values.shape[-1] == 1:
            raise ValueError(
                f"this attribution is of one answer, {self.token_text(0)!r}, which has no other to go with"
            )
        if self.answers is not None:
            return 0, 1
        if self.candidates is not None and all(token in self._ids for token in self.candidates):
            return self.candidates
        self._check_single("a default for a and b")
        first, second = self.logits.topk(2).indices.tolist()
        return first, second

    @property
    def _ids(self) -> Sequence[int]:
        if self._own:
            raise ValueError("the answers are each prompt's own; index the batch first")
        answers: Any = self.answers
        return range(self.values.shape[-1]) if answers is None else answers

    def _text(self, token: int) -> str:
        return str(token) if self.vocab is None else visible(self.vocab[token])

    def _index(self, token: str | int | None, name: str) -> int:
        ids, among = self._ids, "" if self.answers is None else " among the answers"
        if isinstance(token, str):
            texts = [] if self.vocab is None or not self.outputs_are_tokens else [self.vocab[i] for i in ids]
            place = next((texts.index(text) for text in spellings(token) if text in texts), None)
            if place is None:
                raise ValueError(f"{name} must be a token of the model's vocabulary{among}, got {shown(token)}")
            return place
        number = as_int(token)
        if number is None:
            raise TypeError(f"{name} must be a token's text or its id, got {shown(token)}")
        if number not in ids:
            raise ValueError(f"{name} must be a token id{among or f' from 0 to {len(ids) - 1}'}, got {shown(number)}")
        return ids.index(number)

    def _of(self, memory: Memory) -> Float[Tensor, "*batch path source d_vocab"]:
        chosen = [index for index, path in enumerate(self.paths) if path.memory == memory]
        return self.values.index_select(-3, torch.tensor(chosen, dtype=torch.long, device=self.values.device))

    def _summed(self, values: Tensor) -> Tensor:
        return values if self.position == "all" else values.sum(-2)

    def _check_single(self, name: str) -> None:
        if self.tokens.ndim > 1 or self.position == "all":
            raise ValueError(f"{name} is for one prompt and one position, got axes {self.axes}")
