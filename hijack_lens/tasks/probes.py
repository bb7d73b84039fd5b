"""What a latent leaves in activations: how well it is read from them, and what moving it there does."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_choice, check_count, check_texts, check_type, shown
from hijack_lens.core.inputs import indices
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.hooks.intervention import Intervention, logits_of, record
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.task import Batch, check_fits


def decodability(
    model: RealTransformer,
    untrained: RealTransformer,
    batch: Batch,
    latent: str,
    points: str | Iterable[str],
    positions: int | Iterable[int] = -1,
    how: Literal["linear", "neighbours"] = "linear",
    neighbours: int = 10,
) -> pd.DataFrame:
    """How well a latent is read from activations, beside the same in the model before training.

    Probes are scikit-learn's, in float64, on standardised activations, fitted on the first half of the prompts and
    scored on the other. Of classes (integers), logistic regression with an L2 penalty, and its accuracy; of numbers,
    ridge regression, and R2 (of several numbers, the mean). An untrained model's activations tell much of a prompt, so
    what counts is how much more the trained model's do.

    Args:
        model: the trained model.
        untrained: the model before training, of the same seed.
        batch: prompts; those of the first half fit the probes.
        latent: the name of one of the batch's latents.
        points: names of hook points, one or several.
        positions: where to read; each is probed on its own.
        how: "linear", or "neighbours": by those nearest in Euclidean distance.
        neighbours: how many of them.

    Returns:
        A row per point and position: point, position, score and untrained, the score in the model before training.

    Raises:
        ImportError: without scikit-learn, which the extra "tasks" installs.
        TypeError, ValueError: for what is not there.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> run, untrained = hl.tasks.train(hl.tasks.shortened(task, steps=60)), task.model(0)
        >>> batch = task.sample(400, seed=0)
        >>> found = hl.tasks.decodability(run.model, untrained, batch, "table", "blocks.0.hook_resid_post")
        >>> (found["score"] > found["untrained"]).tolist()
        [True]
    """
    answers, points, where = _asked(model, batch, latent, points, positions)
    check_type("untrained", untrained, RealTransformer)
    if vars(untrained.cfg) != vars(model.cfg):
        raise ValueError("untrained must be the model before training, got one of another shape")
    check_choice("how", how, ("linear", "neighbours"))
    half = len(batch) // 2
    neighbours = check_count("neighbours", neighbours, minimum=1)
    if neighbours > half:
        raise ValueError(f"neighbours must be at most half of the {len(batch)} prompts, got {neighbours}")
    runs = [record(one, batch.inputs, points)[1] for one in (model, untrained)]
    rows = []
    for point in points:
        for position in where:
            scores = [
                _score(run[point][:, position].flatten(1).double().cpu().numpy(), answers, half, how, neighbours)
                for run in runs
            ]
            rows.append((point, position, *scores))
    return pd.DataFrame(rows, columns=["point", "position", "score", "untrained"])


def _asked(model: Any, batch: Any, latent: Any, points: Any, positions: Any) -> tuple[Any, list[str], list[int]]:
    """The latent's values, the hook points, and the positions from the front."""
    check_type("batch", batch, Batch)
    check_fits(model, batch)
    if not isinstance(latent, str) or latent not in batch.latent:
        raise ValueError(f"latent must be one of {', '.join(batch.latent)}, got {shown(latent)}")
    if len(batch) < 4:
        raise ValueError(f"batch must hold at least 4 prompts, got {len(batch)}")
    named = [points] if isinstance(points, str) else check_texts("points", points)
    where = indices("positions", positions, batch.mask.shape[1], f"prompts have {batch.mask.shape[1]}")
    return batch.latent[latent].cpu().numpy(), named, where


def _score(x: Any, y: Any, half: int, how: str, neighbours: int) -> float:
    try:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("probes need scikit-learn: pip install 'hijack-lens[tasks]'") from error
    classes = y.dtype.kind in "iub"
    if how == "linear":
        probe: Any = LogisticRegression(max_iter=1000) if classes else Ridge()
    else:
        probe = (KNeighborsClassifier if classes else KNeighborsRegressor)(neighbours)
    return float(make_pipeline(StandardScaler(), probe).fit(x[:half], y[:half]).score(x[half:], y[half:]))


@dataclass(frozen=True, repr=False)
class Moved(Drawn):
    """Runs with a latent moved to another class.

    Attributes:
        batch: the prompts that were run: the second half of those given.
        to: the class that each was moved to.
        outputs: with it moved.
        unmoved: without.
        at_random: with as long a step in a random direction.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> moved = hl.tasks.move_latent(task.model(0), task.sample(20, seed=0), "table", "blocks.1.hook_resid_mid")
        >>> len(moved.batch), moved.outputs.shape
        (10, torch.Size([10, 8, 6]))
        >>> bool((moved.to == moved.batch.latent["table"]).any())
        False
    """

    batch: Batch
    to: Int[Tensor, "prompt"]
    outputs: Float[Tensor, "prompt pos d_out"]
    unmoved: Float[Tensor, "prompt pos d_out"]
    at_random: Float[Tensor, "prompt pos d_out"]

    def __repr__(self) -> str:
        return f"Moved(prompt={len(self.batch)}, pos={self.outputs.shape[1]}, d_out={self.outputs.shape[2]})"

    def to_pandas(self) -> pd.DataFrame:
        """A row per prompt and position: to, and how far the outputs moved, and moved at random (root mean squares)."""
        n, length = self.outputs.shape[:2]
        far = ((one - self.unmoved).square().mean(-1).sqrt() for one in (self.outputs, self.at_random))
        axes = {"prompt": range(n), "position": range(length)}
        frame = tidy(axes, **dict(zip(("moved", "moved_at_random"), far, strict=True)))
        frame.insert(2, "to", self.to.repeat_interleave(length).tolist())
        return frame


def move_latent(
    model: RealTransformer,
    batch: Batch,
    latent: str,
    point: str,
    positions: int | Iterable[int] = -1,
    seed: Seed = 0,
) -> Moved:
    """Moves a latent at a hook point: adds the mean of another class and takes off that of the prompt's own.

    Means are of the first half of the prompts, at each position by itself; the others are run, each moved to another
    class drawn at random; and again with a step as long in a random direction, at each position.

    Args:
        model: the model.
        batch: prompts; those of the first half give the means.
        latent: the name of one of the batch's latents, whose values are classes 0, 1, ...
        point: the name of a hook point [batch, pos, d].
        positions: where to move it.
        seed: of the classes moved to, and of the random directions.

    Raises:
        TypeError, ValueError: for what is not there, a latent without classes, and classes that the first half lacks.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> batch = task.sample(20, seed=0)
        >>> moved = hl.tasks.move_latent(task.model(0), batch, "table", "blocks.1.hook_resid_mid", positions=[-2, -1])
        >>> (moved.outputs != moved.unmoved).any(-1).any(0).nonzero().flatten()  # the positions that say otherwise
        tensor([6, 7])
    """
    check_type("point", point, str)
    _, _, where = _asked(model, batch, latent, point, positions)
    classes, half, generator = batch.latent[latent], len(batch) // 2, as_generator(seed)
    if classes.is_floating_point() or classes.ndim != 1:
        raise ValueError(f"latent must be one of classes, got {latent!r}, which holds numbers")
    if int(classes.min()) < 0:
        raise ValueError(f"latent must be one of classes 0, 1, ..., got {latent!r}, which holds {int(classes.min())}")
    count = int(classes.max()) + 1
    counts = torch.bincount(classes[:half], minlength=count)
    if count < 2 or int(counts.min()) == 0:
        raise ValueError(f"batch must hold each of {max(count, 2)} classes in its first half, got {counts.tolist()}")
    seen = record(model, batch.inputs[:half], [point])[1][point]
    if seen.ndim != 3:
        raise ValueError(f"point must be [batch, pos, d], got {point!r}, which is {list(seen.shape)}")
    means = torch.stack([seen[classes[:half] == one][:, where].mean(0) for one in range(count)])
    rest = batch[half:]
    own = rest.latent[latent]
    to = (own + 1 + torch.randint(count - 1, own.shape, generator=generator)) % count
    step = means[to] - means[own]
    drawn = torch.randn(step.shape, generator=generator, dtype=torch.float64).to(step)
    drawn *= step.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)

    def run(added: Tensor) -> Tensor:
        def hook_fn(activation: Tensor, hook: Any) -> Tensor:
            edited = activation.clone()
            edited[:, where] += added
            return edited

        with torch.no_grad(), Intervention(model, edit=[(point, hook_fn)]):
            return logits_of(model, rest.inputs)

    return Moved(rest, to, run(step), run(torch.zeros_like(step)), run(drawn))
