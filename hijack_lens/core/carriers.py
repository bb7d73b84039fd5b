"""The heads that carry a context's answer to where it is asked for."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import check_fields, check_shapes
from hijack_lens.core.circuit import Component, heads_at
from hijack_lens.core.files import Saved
from hijack_lens.core.statistics import student_quantile
from hijack_lens.core.tables import Drawn


@dataclass(frozen=True, repr=False)
class Carriers(Saved, Drawn):
    """Heads that carry what the context says to the answer's position, and how far to turn them.

    Attributes:
        heads: those named, the largest flow first.
        strength: by how much to multiply what they read at the context's answer, so that the model follows the context.
        flow: for each prompt and head, what the head brings of the margin logit[context's answer] - logit[weights'
            answer] from the tokens of the context's answer, with patterns, scales and gates held.
        chance: the mean flow that the largest of all heads exceeds by chance in 1% of cases.
        counts: numbers of heads that were tried, at the middle strength.
        strengths: strengths that were tried, with the chosen heads.
        by_count: for each count, the shares of prompts whose largest logit is the context's answer, and the weights'.
        by_strength: likewise for each strength.

    Examples:
        >>> told = [hl.hijack_prompt(language, "q", c, 2, 16, seed=0).text for c in "aeis"]
        >>> carriers = hl.find_carriers(model, told, context=list("aeis"), weights=list("uuuu"))
        >>> carriers.tried().tail(1)
           heads  strength  context  weights
        6      1       8.0      1.0      0.0
        >>> carriers.save("carriers.safetensors")
        >>> print(*hl.Carriers.load("carriers.safetensors").heads)
        L1H0
    """

    heads: tuple[Component, ...]
    strength: float
    flow: Float[Tensor, "prompt layer head"]
    chance: float
    counts: tuple[int, ...]
    strengths: tuple[float, ...]
    by_count: Float[Tensor, "count 2"]
    by_strength: Float[Tensor, "strength 2"]

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"by_count": (len(self.counts), 2), "by_strength": (len(self.strengths), 2)})

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, the largest mean flow first: head, flow, half its 95% interval, and whether it is named."""
        n_prompts, _, n_heads = self.flow.shape
        mean, spread = self.flow.mean(0).flatten(), self.flow.std(0).flatten()
        reach = student_quantile(n_prompts - 1) / n_prompts**0.5
        order = mean.argsort(descending=True).tolist()
        heads = heads_at(order, n_heads)
        return pd.DataFrame(
            {
                "head": [str(head) for head in heads],
                "flow": mean[order].tolist(),
                "interval": (reach * spread[order]).tolist(),
                "named": [head in self.heads for head in heads],
            }
        )

    def tried(self) -> pd.DataFrame:
        """One row per setting that was tried: heads, strength, and the shares that say each memory's answer."""
        rows = [(count, TRIED_AT, *shares) for count, shares in zip(self.counts, self.by_count.tolist(), strict=True)]
        chosen = len(self.heads)
        rows += [(chosen, at, *shares) for at, shares in zip(self.strengths, self.by_strength.tolist(), strict=True)]
        return pd.DataFrame(rows, columns=["heads", "strength", "context", "weights"])


TRIED_AT = 4.0
"""The strength at which numbers of heads are compared."""
