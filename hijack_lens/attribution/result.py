"""The result of an attribution: a labelled tensor that sums to the logits, and views of it."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from hijack_lens._checks import check_count
from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.attribution.paths import MEMORIES, Memory, Path
from hijack_lens.circuit import Component
from hijack_lens.language import visible
from hijack_lens.theory.margin import Margin

_FORMAT = "hijack_lens.LogitAttribution.1"


@dataclass(frozen=True, repr=False)
class LogitAttribution:
    """What each path wrote into each logit, exactly.

    Attributes:
        values: in logits; summed over paths and sources they give `logits`. With position="all" the third
            axis from the end is still the path, and the next the position, summed over sources.
        logits: of the run.
        tokens: the prompts.
        paths: what the path axis holds.
        position: whose logits these are, or "all".
        vocab: text of each vocabulary entry, where the model has a tokenizer.
        candidates: two token ids that the prompt sets against each other, (in-context, global).
        joiner: what stands between two tokens in a text.
    """

    values: Float[Tensor, "*batch path source d_vocab"]
    logits: Float[Tensor, "... d_vocab"]
    tokens: Int[Tensor, "*batch pos"]
    paths: tuple[Path, ...]
    position: int | Literal["all"]
    vocab: tuple[str, ...] | None = None
    candidates: tuple[int, int] | None = None
    joiner: str = ""

    def __post_init__(self) -> None:
        *batch, n_paths, n_sources, d_vocab = self.values.shape
        expected = (*batch, n_sources, d_vocab) if self.position == "all" else (*batch, d_vocab)
        if n_paths != len(self.paths):
            raise ValueError(f"paths must label all {n_paths} entries of values, got {len(self.paths)}")
        if tuple(self.logits.shape) != expected:
            raise ValueError(f"logits must have shape {expected}, got {tuple(self.logits.shape)}")
        if tuple(self.tokens.shape) != (*batch, n_sources):
            raise ValueError(f"tokens must have shape {(*batch, n_sources)}, got {tuple(self.tokens.shape)}")

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        middle = "position" if self.position == "all" else "source"
        return (*(("batch",) if self.tokens.ndim > 1 else ()), "path", middle, "d_vocab")

    @property
    def completeness_error(self) -> float:
        """The largest |sum over paths and sources - logit|; rounding alone, for an untouched model."""
        return float((self._summed(self.values.sum(-3)) - self.logits).abs().max())

    def __getitem__(self, index: int) -> "LogitAttribution":
        """One prompt of a batch."""
        if self.tokens.ndim == 1:
            raise TypeError("this attribution is of a single prompt, without a batch axis to index")
        return LogitAttribution(
            self.values[index],
            self.logits[index],
            self.tokens[index],
            self.paths,
            self.position,
            self.vocab,
            self.candidates,
            self.joiner,
        )

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
        """`logit[a] - logit[b]`, split by memory; by default of the prompt's two candidates."""
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
        index = pd.MultiIndex.from_product([range(size) for size in self.values.shape], names=self.axes)
        table = pd.Series(
            self.values.detach().cpu().double().flatten().numpy(), index=index, name="logit"
        ).reset_index()
        texts = [self.token_text(token) for token in range(self.values.shape[-1])]
        table["memory"] = [self.paths[i].memory for i in table["path"]]
        table["path"] = [self.paths[i].label for i in table["path"]]
        table["token"] = [texts[i] for i in table["d_vocab"]]
        kept = [axis for axis in self.axes if axis in ("batch", "source", "position")]
        return table[[*kept[:-1], "path", "memory", kept[-1], "token", "logit"]]

    def token_text(self, token: int) -> str:
        """A vocabulary entry's text with white space visible; its id where there is no tokenizer."""
        return str(token) if self.vocab is None else visible(self.vocab[token])

    def source_texts(self) -> list[str]:
        """The prompt's tokens, with white space visible; for one prompt."""
        if self.tokens.ndim > 1:
            raise ValueError("source_texts is for one prompt; index the batch first")
        return [self.token_text(int(token)) for token in self.tokens]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; either whole or not at all."""
        header = {
            "format": _FORMAT,
            "paths": [asdict(path) for path in self.paths],
            "position": self.position,
            "vocab": self.vocab,
            "candidates": self.candidates,
            "joiner": self.joiner,
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("values", "logits", "tokens")}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LogitAttribution":
        """Reads what `save` wrote.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            paths = tuple(
                Path(**{**fields, "through": tuple(Component(**component) for component in fields["through"])})
                for fields in header["paths"]
            )
            vocab, candidates = header["vocab"], header["candidates"]
            return cls(
                values=tensors["values"],
                logits=tensors["logits"],
                tokens=tensors["tokens"],
                paths=paths,
                position=header["position"],
                vocab=None if vocab is None else tuple(vocab),
                candidates=None if candidates is None else (candidates[0], candidates[1]),
                joiner=header["joiner"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved LogitAttribution: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.attribution.table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from hijack_lens.attribution.table import as_html

        return as_html(self)

    def pair(self, a: str | int | None = None, b: str | int | None = None) -> tuple[int, int]:
        """Ids of two tokens to compare; by default the prompt's candidates, else the two largest logits.

        Raises:
            TypeError, ValueError: for tokens outside the vocabulary, and where there is no default.
        """
        if a is not None or b is not None:
            return self._index(a, "a"), self._index(b, "b")
        if self.candidates is not None:
            return self.candidates
        self._check_single("a default for a and b")
        first, second = self.logits.topk(2).indices.tolist()
        return first, second

    def _index(self, token: str | int | None, name: str) -> int:
        if isinstance(token, str):
            if self.vocab is None or token not in self.vocab:
                raise ValueError(f"{name} must be a token of the model's vocabulary, got {token!r}")
            return self.vocab.index(token)
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must be a token's text or its id, got {token!r}")
        if not 0 <= token < self.values.shape[-1]:
            raise ValueError(f"{name} must be a token id from 0 to {self.values.shape[-1] - 1}, got {token}")
        return token

    def _of(self, memory: Memory) -> Float[Tensor, "*batch path source d_vocab"]:
        chosen = [index for index, path in enumerate(self.paths) if path.memory == memory]
        return self.values.index_select(-3, torch.tensor(chosen, dtype=torch.long, device=self.values.device))

    def _summed(self, values: Tensor) -> Tensor:
        return values if self.position == "all" else values.sum(-2)

    def _check_single(self, name: str) -> None:
        if self.tokens.ndim > 1 or self.position == "all":
            raise ValueError(f"{name} is for one prompt and one position, got axes {self.axes}")
