"""How strongly each of the four associative memories is written."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Strengths:
    """Strengths of the memories of the associative-memory transformer; pure numbers, all >= 0.

    Attributes:
        previous_token: b1, the previous-token head's attention score for the token before. Holds over
            contexts of up to about e^b1 tokens. `math.inf` in theory only.
        match: b2, the induction head's score where a position remembers the current token. One match
            outweighs about e^b2 other positions.
        copy: b3, the logit that the induction head writes for a token it attends to fully.
        bigram: g, the bigram memory's scale: it writes g * log pi_b.
    """

    previous_token: float = 20.0
    match: float = 6.0
    copy: float = 10.0
    bigram: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            infinite = math.isinf(value) and field.name != "previous_token"
            if not value >= 0 or infinite:
                raise ValueError(f"{field.name} must be a finite number >= 0, got {value!r}")
