"""Runs of a model that leave it as it was, in parts that fit into memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.hooks.intervention import every_module

_CELLS = 2**25
"""Logits per run: 128 MiB in float32."""

_DRAWS = 1000
_LEVEL = 0.99


def rows_at_once(model: Any, length: int) -> int:
    """How many prompts to run together."""
    return max(1, _CELLS // (length * max(model.cfg.d_vocab, model.cfg.n_heads * length)))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients meanwhile; every module's training flag is what it was afterwards."""
    training = [module for module in every_module(model) if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def chance(values: Float[Tensor, "prompt statistic"], generator: torch.Generator) -> float:
    """What the largest of several means over prompts reaches by chance in one of 100 cases, if all are truly 0.

    Each prompt's deviations from the means keep or change their signs together, at random (a wild bootstrap): so
    however the statistics hang together, the number accounts for how many there are.
    """
    n_prompts = len(values)
    signs = torch.randint(2, (_DRAWS, n_prompts), generator=generator).to(values) * 2 - 1
    means = signs @ (values - values.mean(0)) / (n_prompts * (n_prompts - 1)) ** 0.5
    return float(means.max(1).values.quantile(_LEVEL))
