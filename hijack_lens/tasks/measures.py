"""Rows that the tables of several tasks hold: where a latent is decoded, and what each component is worth."""

from collections.abc import Callable, Iterable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import fixed_seed
from hijack_lens.core.hook_points import all_components
from hijack_lens.hooks.ablate_and_patch import ablate
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.probes import Moved, move_latent
from hijack_lens.tasks.task import Batch, Predictions, Task, check_fits
from hijack_lens.training.data import mixed_seed

Row = tuple[str, str, float]
"""Measure, where, and value."""


def watched_loss(task: Task, model: RealTransformer, n: int, seed: int) -> float:
    """The loss on as many held-out prompts, which are the same throughout a training."""
    batch = task.sample(n, mixed_seed(fixed_seed(seed), "watched", 0))
    check_fits(model, batch, task)
    with torch.no_grad():
        return float(task.loss(model(batch.inputs), batch))


def nats(predictions: Predictions, targets: Int[Tensor, "prompt pos"]) -> float:
    """The mean cross-entropy of probabilities."""
    return float(-predictions.gather(-1, targets[..., None]).log().mean())


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


def moved_to_class(
    model: RealTransformer, batch: Batch, latent: str, points: Mapping[str, str], seed: int
) -> list[Row]:
    """How far the last answer turns to the class that a latent is moved to, at each place, and at random.

    For models whose outputs are logits of the latent's classes: the divergence of the prediction from that class, over
    what it is unmoved.
    """
    rows = list[Row]()
    for place, point in points.items():
        moved = move_latent(model, batch, latent, point, seed=mixed_seed(seed, "moved", 0))
        left, random, whole = (
            float(F.cross_entropy(outputs[:, -1].double(), moved.to))
            for outputs in (moved.outputs, moved.at_random, moved.unmoved)
        )
        rows += [("moved KL", place, left / whole), ("random KL", place, random / whole)]
    return rows


def followed(moved: Moved, asked: Float[Tensor, "prompt"]) -> tuple[float, float]:
    """How far the last answers follow what a move asks for, and those of random moves.

    1 is all the way: the slope of the shifts of the one number on the shifts that are asked for.
    """
    shifts = ((outputs - moved.unmoved)[:, -1, 0].double() for outputs in (moved.outputs, moved.at_random))
    ours, random = (float((shift * asked).sum() / asked.square().sum()) for shift in shifts)
    return ours, random


def added_without(model: RealTransformer, batch: Batch, error: Callable[[Tensor], float]) -> list[Row]:
    """What the mean ablation of each component adds to the error of the model's outputs."""
    reader, ids = model.reading(batch.inputs)
    with torch.no_grad():
        whole = error(logits_of(model, batch.inputs))
    rows = list[Row]()
    for component in all_components(model):
        with ablate(reader, component, how="mean", reference=ids), torch.no_grad():
            rows.append(("error added without", str(component), error(reader(ids)) - whole))
    return rows
