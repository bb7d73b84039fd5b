"""How strongly each of the four associative memories is written."""

import math
from dataclasses import dataclass, fields

from hijack_lens._checks import check_number


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
            if field.name == "previous_token" and isinstance(value, float) and value == math.inf:
                continue
            object.__setattr__(self, field.name, check_number(field.name, value))
