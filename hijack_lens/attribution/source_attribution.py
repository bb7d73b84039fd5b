"""Logits by source token: the result of `attribute_sources`."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.core.checks import check_count, check_shapes
from hijack_lens.core.circuit import Component


@dataclass(frozen=True, repr=False, kw_only=True)
class SourceAttribution(LogitAttribution):
    """What each source token wrote into each logit, exactly, and what each head brought to the answer's position.

    Its paths are the parts of the prompt (context, first token, query), by carrier if any were asked for, and biases;
    so `by_source` shares the logits among the tokens, and `margin` between context and weights, without a rest.

    Attributes:
        links: what each head brought to the answer's position from each that it attended to, in logits, whatever had
            come there before: a second sum. What it misses of the logits was at the answer's position all along.
        parts: what each position belongs to: 0 the context, 1 the first token, 2 the query, 3 what comes after it.

    Examples:
        >>> result = hl.attribute_sources(model, prompt, ["e", "u"])
        >>> result.axes, result.values.shape
        (('path', 'source', 'answer'), torch.Size([2, 24, 2]))
        >>> len(result.context), prompt.tokens.shape
        (23, torch.Size([24]))
        >>> result.by_head()[["head", "margin"]]
           head    margin
        0  L1H0  9.861933
        1  L0H0  0.000000
        >>> result.completeness_error < 1e-4
        True
    """

    links: Float[Tensor, "*batch layer head source answer"]
    parts: Int[Tensor, "*batch source"]

    _by_prompt: ClassVar[tuple[str, ...]] = (*LogitAttribution._by_prompt, "links", "parts")

    def __post_init__(self) -> None:
        super().__post_init__()
        *batch, _, n_sources, n_answers = self.values.shape
        links = (*batch, *self.links.shape[-4:-2], n_sources, n_answers)
        check_shapes(self, {"links": links, "parts": (*batch, n_sources)})

    def __getitem__(self, index: int) -> "SourceAttribution":
        """One prompt of a batch."""
        found = super().__getitem__(index)
        assert isinstance(found, SourceAttribution)
        return found

    @property
    def context(self) -> tuple[int, ...]:
        """The positions of the context; for one prompt."""
        if self.tokens.ndim > 1:
            raise ValueError("context is for one prompt; index the batch first")
        return tuple((self.parts == 0).nonzero().flatten().tolist())

    def by_token(self) -> Float[Tensor, "*batch source answer"]:
        """What each token's embedding wrote into the logits, by all routes: all but the biases."""
        embedded = [index for index, path in enumerate(self.paths) if path.source == "embed"]
        return self.values[..., embedded, :, :].sum(-3)

    def by_head(self, k: int = 10) -> pd.DataFrame:
        """The k heads that brought most of the margin from positions other than the first and the answer's own.

        The margin is that of `pair`; of one answer alone, it is its logit. One row per head, with what it brought there
        ("margin"), and from the first position ("sink"); and the token that it brought most from, its position, and
        what it brought from there alone.
        """
        self._check_single("by_head")
        first, *others = (0,) if self.values.shape[-1] == 1 else self.pair()
        brought = self.links[..., first] - sum(self.links[..., other] for other in others)
        assert isinstance(self.position, int)
        inner = brought[..., 1 : self.position]
        total, texts, rows = inner.sum(-1), self.source_texts(), []
        for index in total.abs().flatten().topk(min(check_count("k", k, minimum=1), total.numel())).indices.tolist():
            layer, head = divmod(index, total.shape[1])
            at = int(inner[layer, head].abs().argmax()) + 1 if inner.shape[-1] else 0
            read = (texts[at], at, float(brought[layer, head, at]), float(brought[layer, head, 0]))
            rows.append((str(Component(layer, "head", head)), float(total[layer, head]), *read))
        return pd.DataFrame(rows, columns=["head", "margin", "token", "position", "from_token", "sink"])
