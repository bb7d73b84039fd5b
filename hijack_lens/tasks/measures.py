"""Rows that the tables of several tasks hold: where a latent is decoded, and what each component is worth."""

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import Tensor

from hijack_lens.core.checks import fixed_seed
from hijack_lens.core.hook_points import all_components
from hijack_lens.hooks.ablate_and_patch import ablate
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.task import Batch, Task, check_fits
from hijack_lens.training.data import mixed_seed

Row = tuple[str, str, float]
"""Measure, where, and value."""


def watched_loss(task: Task, model: RealTransformer, n: int, seed: int) -> float:
    """The loss on as many held-out prompts, which are the same throughout a training."""
    batch = task.sample(n, mixed_seed(fixed_seed(seed), "watched", 0))
    check_fits(model, batch)
    with torch.no_grad():
        return float(task.loss(model(batch.inputs), batch))


def residual_points(n_layers: int) -> dict[str, str]:
    """The residual stream's hook points, by what has written last."""
    return {
        f"after {what} {layer}": f"blocks.{layer}.hook_resid_{point}"
        for layer in range(n_layers)
        for what, point in (("attention", "mid"), ("MLP", "post"))
    }


def decoded(scores: pd.DataFrame, places: Iterable[str], measure: str = "decodability") -> list[Row]:
    """What `decodability` found at each place, the untrained model's beside it."""
    rows = list[Row]()
    for place, one in zip(places, scores.itertuples(), strict=True):
        rows += [(measure, place, one.score), (f"{measure} untrained", place, one.untrained)]
    return rows


def added_without(model: RealTransformer, batch: Batch, error: Callable[[Tensor], float]) -> list[Row]:
    """What the mean ablation of each component adds to the error of the model's outputs."""
    reader, ids = model.reading(batch.inputs)
    with torch.no_grad():
        whole = error(model(batch.inputs))
    rows = list[Row]()
    for component in all_components(model):
        with ablate(reader, component, how="mean", reference=ids), torch.no_grad():
            rows.append(("error added without", str(component), error(reader(ids)) - whole))
    return rows
