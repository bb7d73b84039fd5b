"""Languages and prompts that set the memories of a model against each other to order."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.language import BigramLanguage
from hijack_lens.models import TwoLayerTransformer

Make = Callable[..., TwoLayerTransformer]
"""What experiments get their hand-written models from: `associative_transformer`, or in a test something else."""

IN_CONTEXT, GLOBAL, NEUTRAL, FIRST_TRIGGER = range(4)
"""c, g, a token that is neither, and the first of the triggers q, in a language of `conflict_language`."""


def conflict_language(log_ratios: Sequence[float]) -> BigramLanguage:
    """A language in which trigger i has log(pi_b(g|q_i) / pi_b(c|q_i)) = log_ratios[i], and all else is uniform.

    The tokens are "c", "g", "x" (the neutral one), and the triggers "q0", "q1", ...
    """
    size = FIRST_TRIGGER + len(log_ratios)
    log_pi_b = torch.zeros(size, size, dtype=torch.float64)
    ratios = torch.tensor(list(log_ratios), dtype=torch.float64)
    log_pi_b[FIRST_TRIGGER:, GLOBAL], log_pi_b[FIRST_TRIGGER:, IN_CONTEXT] = ratios / 2, -ratios / 2
    names = ["c", "g", "x", *(f"q{i}" for i in range(len(log_ratios)))]
    return BigramLanguage(log_pi_b.softmax(-1), torch.full((size,), 1 / size), names)


def neutral_then_pairs(
    trigger: int, continuations: Sequence[int], *, length: int | None = None, lead: int | None = None
) -> Int[Tensor, "pos"]:
    """Neutral tokens, then the trigger with each of its continuations in turn, then the trigger.

    Args:
        trigger: q.
        continuations: what follows each earlier occurrence of q.
        length: of the prompt: as many neutral tokens as fill it.
        lead: instead, how many neutral tokens.

    Raises:
        ValueError: for a length that the pairs exceed.
    """
    pairs = [token for continuation in continuations for token in (trigger, continuation)]
    neutral = lead if lead is not None else (length or 0) - len(pairs) - 1
    if neutral < 0:
        raise ValueError(f"length must be at least {len(pairs) + 1} for {len(continuations)} pairs, got {length}")
    return torch.tensor([NEUTRAL] * neutral + pairs + [trigger])


@torch.no_grad()
def hijack_margins(model: TwoLayerTransformer, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """logit[c] - logit[g] of a model of `conflict_language`, at every position."""
    logits = model(tokens)
    return logits[..., IN_CONTEXT] - logits[..., GLOBAL]
