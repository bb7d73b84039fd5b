"""Affine recurrence: each number follows from the one before by a line that the prompt does not say."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.attribution import attribute
from hijack_lens.core.checks import Seed, as_generator, check_count, check_number, check_type, fixed_seed
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import Row, added_without, decoded, followed, watched_loss
from hijack_lens.tasks.outputs import OneNumber
from hijack_lens.tasks.probes import decodability, move_latent
from hijack_lens.tasks.task import (
    Bar,
    Batch,
    Predictions,
    Schedule,
    check_batch,
    check_fits,
    prompt_count,
)
from hijack_lens.training.data import mixed_seed

_WATCHED = 1024
"""Prompts that are looked at while training."""

_MEASURED = 8192
"""Prompts that errors are measured on."""

_KNOWN = 2
"""The first position from which the line is known."""

_PROBED = 2048
"""Of these, the prompts that probes, attributions and ablations take."""


_BY, _OVER = "score by closeness", "error over copying"


@dataclass(frozen=True)
class AffineRecurrence(OneNumber):
    """x_{t+1} = a x_t + b, with a slope and an offset of its own for each prompt: a task of arXiv 2410.17438.

    a and b are uniform in (-1, 1), x_0 is standard normal, and nothing is noisy. Position t holds x_t and predicts
    x_{t+1}. Two transitions give the line away; after one, exact Bayes takes the middle of the feasible segment of
    (a, b). The model has no MLPs. Of the paper only the abstract was at hand: sizes and
    training are ours.

    Attributes:
        n_transitions: numbers that are predicted; the first of them has nothing to go by.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.AffineRecurrence(n_transitions=4)
        >>> batch = task.sample(2000, seed=0)
        >>> for name in ("bayes", "least squares", "copy"):
        ...     off = task.references(batch)[name][..., 0] - batch.targets
        ...     print(name, [round(float(error), 2) for error in off.square().mean(0)])
        bayes [0.66, 0.17, 0.0, 0.0]
        least squares [0.66, 0.18, 0.0, 0.0]
        copy [1.62, 0.61, 0.38, 0.27]
    """

    n_transitions: int = 12
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    schedule: Schedule = Schedule(  # noqa: RUF009 (frozen)
        5000, batch_size=128, warmup=200, final_lr=0.02, evaluate_every=500, checkpoint_every=1000
    )

    name: ClassVar[str] = "affine recurrence"
    source: ClassVar[str] = "after arXiv 2410.17438, of which only the abstract was read: settings are ours"
    dose: ClassVar[str] = "slope of the recurrence, without its sign"
    doses: ClassVar[tuple[float, ...]] = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar(
            "after one transition the error is within 10% of exact Bayes", "error over", "bayes after 1", "at most", 1.1
        ),
        Bar("it is below that of least squares", "error over", "least squares after 1", "at most", 1.0),
        Bar("from two transitions on it is small", "error", "model, after 2 or more", "at most", 0.002),
        Bar("the direct path and the first layer make a first estimate", "R2 up to", "layer 0", "at least", 0.2),
        Bar("in that, the last number is copied", "copied", "up to layer 0", "at least", 0.2),
        Bar("by the direct path, not by heads", "copied", "the direct path", "at least", 0.3),
        Bar("the second layer leaves it rough", "R2 up to", "layer 1", "at most", 0.95),
        Bar("the last one makes it exact", "R2 up to", "layer 2", "at least", 0.99),
        Bar("a head of the last layer scores distant numbers higher", _BY, "lowest of layer 2", "at most", -0.2),
        Bar("a head of the first layer does", _BY, "lowest of layer 0", "at most", -0.1),
        Bar(
            "within the training's range errors stay small", _OVER, "slope within and x within, at 1.5", "at most", 0.05
        ),
        Bar("slopes alone beyond it cost much", _OVER, "slope beyond and x within, at 1.5", "at least", 0.2),
        Bar("numbers alone beyond it do, too", _OVER, "slope within and x beyond, at 1.5", "at least", 0.2),
        Bar("of a slope of 1.5, the weights take part away", "share", "1.5", "at most", 0.8),
    )

    def __post_init__(self) -> None:
        check_count("n_transitions", self.n_transitions, minimum=3)
        for name in ("d_model", "n_layers", "n_heads"):
            check_count(name, getattr(self, name), minimum=1)
        check_type("schedule", self.schedule, Schedule)

    def in_world(self, seed: int) -> "AffineRecurrence":
        """The task itself: nothing is drawn once for all."""
        return self

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latents are the "slope" a and the "offset" b."""
        n, generator = prompt_count(n, 4 * self.n_transitions), as_generator(seed)
        a, b = torch.rand(2, n, generator=generator, dtype=torch.float64) * 2 - 1
        return self._prompts(a, b, torch.randn(n, generator=generator, dtype=torch.float64))

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose slopes all have this size, with either sign.

        Beyond 1 it is the last number that is standard normal, so that numbers stay in the range of the training, and
        nothing but the slope leaves it: such a prompt is one with the slope 1/a, read backwards.
        """
        size = check_number("strength", strength, positive=True)
        return self._of_size(size, size > 1, n, as_generator(seed))

    def _of_size(self, size: float, backwards: bool, n: int, generator: torch.Generator) -> Batch:
        """Prompts with slopes of this size that start, or backwards end, at a standard normal number.

        Those with the inverse size in the other direction are the same numbers in the opposite order.
        """
        n = prompt_count(n, 4 * self.n_transitions)
        sign, b = torch.rand(2, n, generator=generator, dtype=torch.float64) * 2 - 1
        end = torch.randn(n, generator=generator, dtype=torch.float64)
        return self._prompts(size * sign.sign(), min(size, 1) * b, end, backwards)

    def _prompts(self, a: Tensor, b: Tensor, end: Tensor, backwards: bool = False) -> Batch:
        x = [end]
        for _ in range(self.n_transitions):
            x.append((x[-1] - b) / a if backwards else a * x[-1] + b)
        values = torch.stack(x[::-1] if backwards else x, 1).float()
        mask = torch.ones(len(values), self.n_transitions, dtype=torch.bool)
        return Batch(values[:, :-1, None], values[:, 1:], mask, {"slope": a, "offset": b})

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained transformer without MLPs that reads the numbers, with learned positions."""
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return RealTransformer(1, 1, self.n_transitions, **sizes, d_mlp=0, seed=seed, device="cpu")

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes", "least squares" with the shortest (a, b) that fits best, and "copy", the last number.

        Also the true line's prediction as the "context"'s, and 0, the mean before anything is seen, as the "weights"'.
        Of prompts that no line in the prior fits, "bayes" is its limit for transitions with a noise that vanishes: the
        line in the prior that fits best.
        """
        check_batch(batch, ["slope", "offset"], 1)
        x = batch.inputs[..., 0].double()
        slope, offset = batch.latent["slope"][:, None], batch.latent["offset"][:, None]
        found = {
            "bayes": _bayes(x),
            "least squares": _least_squares(x),
            "copy": x,
            "context": slope * x + offset,
            "weights": torch.zeros_like(x),
        }
        return {name: values[..., None] for name, values in found.items()}

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss."""
        return {"loss": watched_loss(self, model, _WATCHED, seed)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Errors by transition, what each part writes, what heads attend to, and what is beyond the training's range.

        Errors are mean squared differences from the next number. Decodability is a linear probe's R2, at the position
        of x_2, the first from which the line is known: of the next number, and of the slope. There the offset's sign is
        moved, and "shift" is how far the prediction follows: 1 is by as much as mean offsets differ. The prediction is
        also taken apart exactly (`attribute`): "copied" and "corrected" are the coefficients with which a part follows
        x_2 and x_3 - x_2, each of which adds up to 1 over the parts of an ideal model; "R2 up to" is that of what the
        direct path and the layers up to one have written. "score by closeness" is the correlation of a head's attention
        scores with -|x_t - x_s|, over prompts and positions before: less what all keys of a query share, and less the
        mean over prompts. For "error over copying", slopes and numbers leave the training's range one by one.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch, self)
        with torch.no_grad():
            said = {"model": self.predictions(logits_of(model, batch.inputs)), **self.references(batch)}
        errors = {name: _errors(said[name], batch) for name in ("model", "bayes", "least squares", "copy")}
        rows = [("error", name, float(by.mean())) for name, by in errors.items()]
        rows.append(("error", "model, after 2 or more", float(errors["model"][2:].mean())))
        for name, by in errors.items():
            rows += [(f"error after {seen}", name, error) for seen, error in enumerate(by.tolist())]
        for name in ("bayes", "least squares"):
            rows.append(("error over", f"{name} after 1", float(errors["model"][1] / errors[name][1])))

        batch = batch[:_PROBED]
        untrained = self.model(mixed_seed(seed, "weights", 0))
        points = {f"after attention {layer}": f"blocks.{layer}.hook_resid_post" for layer in range(self.n_layers)}
        latents = replace(batch, latent={"next": batch.targets[:, _KNOWN], "slope": batch.latent["slope"]})
        for latent, of in (("next", ""), ("slope", " of the slope")):
            scores = decodability(model, untrained, latents, latent, points.values(), _KNOWN)
            rows += decoded(scores, points, f"decodability{of}")
        rows += _moved(model, batch, points, seed)
        rows += _written(model, batch)
        closeness = _scores_by_closeness(model, batch)
        rows += [(_BY, head, value) for head, value in closeness.items()]
        for layer in range(self.n_layers):
            lowest = min(value for head, value in closeness.items() if head.startswith(f"L{layer}H"))
            rows.append((_BY, f"lowest of layer {layer}", lowest))

        rows += added_without(model, batch, lambda outputs: float(_errors(self.predictions(outputs), batch).mean()))
        for name, one in self._ranges(mixed_seed(seed, "ranges", 0)):
            with torch.no_grad():
                off = _errors(self.predictions(logits_of(model, one.inputs)), one)
            # The first two are not known to anyone.
            rows.append((_OVER, name, float(off[2:].sum() / _errors(one.inputs, one)[2:].sum())))
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _ranges(self, seed: int) -> Iterator[tuple[str, Batch]]:
        """Prompts whose slopes, or numbers, or both, leave the range of the training, and such as leave neither.

        Two whose slopes are each other's inverse have the same numbers in opposite orders: one slope is in range, the
        other is not, and the differences of neighbours, which copying errs by, are the same.
        """
        for size in (one for one in self.doses if one > 1):
            for slope, at in (("within", 1 / size), ("beyond", size)):
                for x, backwards in (("within", slope == "beyond"), ("beyond", slope == "within")):
                    batch = self._of_size(at, backwards, _PROBED, as_generator(seed))
                    yield f"slope {slope} and x {x}, at {size:g}", batch


def _errors(predictions: Predictions, batch: Batch) -> Float[Tensor, "pos"]:
    return (predictions[..., 0].double() - batch.targets.double()).square().mean(0)


def _moved(model: RealTransformer, batch: Batch, points: Mapping[str, str], seed: int) -> list[Row]:
    """How far the prediction at the first position that knows the line follows a move of the offset's sign."""
    offset = batch.latent["offset"]
    positive, upto = offset > 0, slice(_KNOWN + 1)
    latent = {**batch.latent, "positive": positive.long()}
    short = Batch(batch.inputs[:, upto], batch.targets[:, upto], batch.mask[:, upto], latent)  # which ends there
    far = offset[positive].mean() - offset[~positive].mean()
    rows = list[Row]()
    for name, point in points.items():
        moved = move_latent(model, short, "positive", point, seed=mixed_seed(seed, "moved", 0))
        asked = (2 * moved.to.double() - 1) * far
        rows += zip(("shift", "random shift"), (name, name), followed(moved, asked), strict=True)
    return rows


def _written(model: RealTransformer, batch: Batch) -> list[tuple[str, str, float]]:
    """How the parts of a prediction follow the last number and the change to the next one."""
    reader, ids = model.reading(batch.inputs)
    found = attribute(reader, ids, _KNOWN, answers=[0])
    direct, layers, heads = torch.zeros(len(batch)), dict[int, Tensor](), dict[str, Tensor]()
    for path, value in zip(found.paths, found.by_path()[..., 0].double().unbind(1), strict=True):
        if path.through:
            head = path.through[-1]
            heads[str(head)] = heads.get(str(head), 0) + value
            layers[head.layer] = layers.get(head.layer, 0) + value
        elif path.source == "embed":
            direct = value
    start, following = found.logits[:, 0].double() - sum(layers.values()), batch.targets[:, _KNOWN].double()
    upto = start
    rows = [("R2 up to", "the direct path", _r2(upto, following))]
    for layer, value in sorted(layers.items()):
        upto = upto + value
        rows.append(("R2 up to", f"layer {layer}", _r2(upto, following)))
    parts = {
        "the direct path": direct,
        "positions and biases": start - direct,
        **{f"layer {layer}": value for layer, value in layers.items()},
        **heads,
    }
    parts["up to layer 0"] = direct + layers[0]
    last = batch.inputs[:, _KNOWN, 0].double()
    read = torch.stack([torch.ones_like(last), last, following - last], 1)
    _, copied, corrected = torch.linalg.lstsq(read, torch.stack(list(parts.values()), 1)).solution.tolist()
    for measure, values in (("copied", copied), ("corrected", corrected)):
        rows += [(measure, name, value) for name, value in zip(parts, values, strict=True)]
    return rows


def _r2(said: Float[Tensor, "prompt"], true: Float[Tensor, "prompt"]) -> float:
    return float(1 - (said - true).square().mean() / true.var(correction=0))


def _scores_by_closeness(model: RealTransformer, batch: Batch) -> dict[str, float]:
    """For each head, how its attention scores go with how close a number is to the one that asks."""
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    scores, x = record(model, batch.inputs, names)[1], batch.inputs[..., 0].double()
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()

    def centred(values: Tensor) -> Tensor:
        values = values.double().masked_fill(~seen, 0)
        shared = values.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)  # which a softmax ignores
        values = (values - shared).masked_fill(~seen, 0)
        return values - values.mean(0)

    closeness = centred(-(x[:, :, None] - x[:, None]).abs())
    return {
        f"L{layer}H{head}": float(F.cosine_similarity(centred(scores[name][:, head]).flatten(), closeness.flatten(), 0))
        for layer, name in enumerate(names)
        for head in range(model.cfg.n_heads)
    }


def _bayes(x: Float[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """The posterior mean of the next number."""
    mean, following, spread, slope = _fits(x)
    offset = following - slope * mean
    lines = [(slope, offset)]
    for edge in (-1.0, 1.0):  # of the prior, beyond which lines have no share: on each, the best line
        one = torch.full_like(slope, edge)
        lines.append((one, (following - one * mean).clamp(-1, 1)))
        best = (spread * slope + mean * (following - one)) / (spread + mean.square())
        lines.append((best.clamp(-1, 1), one))
    a, b = (torch.stack(one) for one in zip(*lines, strict=True))
    misfit = spread * (a - slope).square() + (following - a * mean - b).square()
    misfit[0, (slope.abs() > 1) | (offset.abs() > 1)] = torch.inf
    chosen = misfit.argmin(0, keepdim=True)
    slope, offset = a.gather(0, chosen)[0], b.gather(0, chosen)[0]
    # After one transition, slopes whose offsets are in (-1, 1) are equally likely.
    ends = (x[:, 1:2] + torch.tensor([-1.0, 1.0])) / x[:, :1]
    slope[:, 0] = ends.clamp(-1, 1).mean(1)
    offset[:, 0] = (x[:, 1] - slope[:, 0] * x[:, 0]).clamp(-1, 1)
    return F.pad(slope * x[:, 1:] + offset, (1, 0))


def _least_squares(x: Float[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """What the line of least squares says, and of several, that with the least a^2 + b^2."""
    mean, following, _, slope = _fits(x)
    said = following + slope * (x[:, 1:] - mean)
    first, second = x[:, :1], x[:, 1:2]
    said[:, :1] = second * (first * second + 1) / (first.square() + 1)
    return F.pad(said, (1, 0))


def _fits(x: Float[Tensor, "prompt pos"]) -> tuple[Float[Tensor, "prompt seen"], ...]:
    """Of the transitions seen, from one on: the mean before, the mean after, the variance before, and the slope.

    Of numbers that are all the same, the slope is 0.
    """
    before, after = (
        (x[:, :-1] - x[:, :1]),
        (x[:, 1:] - x[:, :1]),
    )  # small where a prompt hardly moves, so that less is lost
    seen = torch.arange(1, x.shape[1], dtype=x.dtype)
    mean, following = before.cumsum(1) / seen, after.cumsum(1) / seen
    spread = before.square().cumsum(1) / seen - mean.square()
    slope = ((before * after).cumsum(1) / seen - mean * following) / spread
    return mean + x[:, :1], following + x[:, :1], spread, slope.where(spread > 0, 0.0)
