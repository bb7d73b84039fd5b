"""Whether a trained model's memories formed: what each reached, what was asked of it, and what to do if it failed."""

import math
from dataclasses import dataclass

import pandas as pd

from hijack_lens.core.checks import check_fields
from hijack_lens.core.tables import Drawn

CONTEXT_ASKED = 0.9
"""Of the best in-context accuracy possible: where triggers are the same in all sequences."""

ORDER_ASKED = 0.1
"""Nats by which in-context loss rises without the previous-token head: where triggers are drawn per sequence."""

WEIGHTS_ASKED = 0.1
"""Nats of loss above that of the true bigrams, at most."""


@dataclass(frozen=True, repr=False)
class Formed(Drawn):
    """Whether a trained model's two memories formed; true if both did.

    The context's memory is judged on natural sequences that the model has not seen, with 200 tokens or more that follow
    from the context, where the language has so many. Where the triggers are the same in all sequences, it has formed if
    its accuracy there is 0.9 of the best possible. Where they are drawn per sequence, copying also costs something
    wherever a token that is no trigger comes again, and a model may do best by copying less: then it has formed if the
    in-context loss rises by 0.1 nats or more without the previous-token head, that is, if what is copied depends on
    order. The weights' memory has formed if its loss is at most 0.1 nats above that of the true bigrams.

    Attributes:
        accuracy: how often the model's likeliest token is right where it follows from the context; NaN if none does.
        best: the highest such accuracy possible (`best_accuracy`).
        shortcut: that of guessing what has come up most beyond its frequency, without order (`shortcut_accuracy`).
        order: by how many nats the in-context loss rises with the previous-token head zero-ablated.
        excess: loss above that of the true bigrams, after tokens that are no triggers, in nats.
        random_triggers: whether the triggers are drawn per sequence.
        predictable_only: whether the training's loss saw only what follows from the context, so that no bigrams are
            asked for.
        cause: what most likely kept a memory from forming; empty where both formed.
        remedy: what to change then.

    Examples:
        >>> from hijack_lens.models import Formed
        >>> formed = Formed(accuracy=0.5, best=1.0, shortcut=0.4, order=0.3, excess=0.02)
        >>> formed.context, formed.weights, bool(formed)
        (False, True, False)
        >>> formed.short
        'NOT FORMED: context'
        >>> formed.lines[1]
        "The weights' memory formed: bigram loss 0.020 nats above the true bigrams' (at most 0.1 asked)."
    """

    accuracy: float
    best: float
    shortcut: float
    order: float
    excess: float
    random_triggers: bool = False
    predictable_only: bool = False
    cause: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def context(self) -> bool:
        """Whether the context's memory formed."""
        if self.random_triggers:
            return self.order >= ORDER_ASKED
        return self.accuracy >= CONTEXT_ASKED * self.best

    @property
    def weights(self) -> bool:
        """Whether the weights' memory formed, or was not asked for."""
        return self.predictable_only or self.excess <= WEIGHTS_ASKED

    def __bool__(self) -> bool:
        return self.context and self.weights

    @property
    def lines(self) -> tuple[str, ...]:
        """A sentence for each memory, then the cause and the remedy, if there are any."""
        accuracy = "no token of the sequences follows from the context"
        if not math.isnan(self.accuracy):
            accuracy = (
                f"in-context accuracy {self.accuracy:.3f}; the best possible is {self.best:.3f}, and guessing without "
                f"order reaches {self.shortcut:.3f}"
            )
        order = f"without the previous-token head, in-context loss rises by {self.order:.2f} nats"
        asked = f"at least {ORDER_ASKED} asked" if self.random_triggers else f"{CONTEXT_ASKED} of the best asked"
        context = f"{order} ({asked}); {accuracy}" if self.random_triggers else f"{accuracy} ({asked}); {order}"
        weights = f"bigram loss {self.excess:.3f} nats above the true bigrams'"
        weights += " (not asked for)" if self.predictable_only else f" (at most {WEIGHTS_ASKED} asked)"
        names = {True: "formed", False: "did not form"}
        said = [
            f"The context's memory {names[self.context]}: {context}.",
            f"The weights' memory {names[self.weights]}: {weights}.",
        ]
        if self.cause:
            said.append(f"Likeliest cause: {self.cause}. Remedy: {self.remedy}.")
        return tuple(said)

    def to_pandas(self) -> pd.DataFrame:
        """A row per number that a memory is judged by: memory, measure, reached, and what is asked (NaN: nothing)."""
        by_order, whole = self.random_triggers, not self.predictable_only
        rows = [
            ("context", "in-context accuracy", self.accuracy, math.nan if by_order else CONTEXT_ASKED * self.best),
            (
                "context",
                "in-context loss without previous-token head",
                self.order,
                ORDER_ASKED if by_order else math.nan,
            ),
            ("weights", "bigram loss above the true bigrams'", self.excess, WEIGHTS_ASKED if whole else math.nan),
        ]
        return pd.DataFrame(rows, columns=["memory", "measure", "reached", "asked"])

    @property
    def short(self) -> str:
        """A few words, for a progress bar."""
        missing = [name for name, there in (("context", self.context), ("weights", self.weights)) if not there]
        return "both memories formed" if not missing else f"NOT FORMED: {' and '.join(missing)}"
