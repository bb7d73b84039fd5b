"""Regression in context: prompts x_1, y_1, ..., x_n, y_n, x, and ridge regression on the pairs before each x."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.tasks.task import Batch, Predictions


def prompts_of(
    x: Float[Tensor, "prompt asked d"], y: Float[Tensor, "prompt asked"], latent: Mapping[str, Tensor]
) -> Batch:
    """Prompts whose positions of an x ask for its y; the last y is not shown."""
    n, asked, d = x.shape
    inputs = torch.zeros(n, 2 * asked - 1, d + 1)
    inputs[:, ::2, :d], inputs[:, 1::2, d] = x.float(), y[:, :-1].float()
    targets = torch.zeros(n, 2 * asked - 1)
    targets[:, ::2] = y.float()
    mask = torch.zeros(n, 2 * asked - 1, dtype=torch.bool)
    mask[:, ::2] = True
    return Batch(inputs, targets, mask, latent)


def at_each_x(said: Mapping[str, Float[Tensor, "prompt asked"]], batch: Batch) -> dict[str, Predictions]:
    """Predictions of each y, at the position of its x, and 0 where a y stands."""
    found = {name: torch.zeros_like(batch.targets, dtype=torch.float64) for name in said}
    for name, values in said.items():
        found[name][:, ::2] = values
    return {name: values[..., None] for name, values in found.items()}


def seen_before(
    x: Float[Tensor, "prompt asked d"], y: Float[Tensor, "prompt seen"]
) -> tuple[Float[Tensor, "prompt asked d d"], Float[Tensor, "prompt asked d"]]:
    """Before each x: the sum of x x^T, and that of x y."""
    x = x[:, :-1]
    gram = (x[..., None] * x[..., None, :]).cumsum(1)
    return F.pad(gram, (0, 0, 0, 0, 1, 0)), F.pad((x * y[..., None]).cumsum(1), (0, 0, 1, 0))


def ridge(gram: Tensor, moment: Tensor, x: Tensor, penalty: float) -> Float[Tensor, "prompt asked"]:
    """What ridge regression on the pairs before predicts at each x."""
    return (x * torch.linalg.solve(_penalised(gram, penalty), moment)).sum(-1)


def quadratic(gram: Tensor, x: Tensor, penalty: float) -> Float[Tensor, "prompt asked"]:
    """x^T (sum of x x^T before + penalty)^-1 x, at each x."""
    return (x * torch.linalg.solve(_penalised(gram, penalty), x)).sum(-1)


def _penalised(gram: Tensor, penalty: float) -> Tensor:
    return gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype)
