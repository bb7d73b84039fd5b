"""Algorithm selection: linear regression in context, at a noise level that the prompt does not say."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_count, check_list, check_number, check_type, fixed_seed
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import added_without, decoded, followed, residual_points, watched_loss
from hijack_lens.tasks.pairs import at_each_x, prompts_of, quadratic, ridge, seen_before
from hijack_lens.tasks.probes import decodability, move_latent
from hijack_lens.tasks.task import (
    Bar,
    Batch,
    Predictions,
    Schedule,
    check_batch,
    check_fits,
    check_outputs,
    prompt_count,
)
from hijack_lens.training.data import mixed_seed

_WATCHED = 1024
"""Prompts that are looked at while training."""

_MEASURED = 8192
"""Prompts that errors are measured on."""

_PROBED = 2048
"""Of these, the prompts that probes, moves and ablations take."""

_PENALTIES = 61
"""Ridge penalties that are tried for the best single one."""


@dataclass(frozen=True)
class AlgorithmSelection:
    """Noisy linear regression with several noise levels: Bai et al. (arXiv 2306.04637), section 4.

    A prompt is x_1, y_1, ..., x_n, y_n, x: with w ~ N(0, I/d) and a noise level s, both its own, x_i ~ N(0, I) and
    y_i = w x_i + s e_i. A position of an x predicts its y. For one level, ridge regression with the penalty d s^2 is
    exact Bayes; for several, their mean by the levels' posterior is. No single penalty does as well, so the model must
    tell levels apart. Whether it tries each ridge and weighs them by their fit (the paper's post-ICL validation), or
    tells the level first (its pre-ICL testing), behaviour does not say: both give the same predictions.

    Attributes:
        d: dimensions of x.
        n_pairs: pairs before the last x.
        noises: the levels, equally likely.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.AlgorithmSelection(n_pairs=5, noises=(0.1, 1.0))
        >>> f"{task.name}: the best single ridge penalty is {task.single_penalty:.1f}"
        'algorithm selection in 2 dimensions: the best single ridge penalty is 1.0'
        >>> said = {name: one[:, -1] for name, one in task.references(task.sample(2000, seed=0)).items()}
        >>> errors = [(said[name] - said["context"]).square().mean() for name in ("bayes", "single ridge")]
        >>> [round(float(error), 2) for error in errors]
        [0.18, 0.24]
    """

    d: int = 2
    n_pairs: int = 10
    noises: tuple[float, ...] = (0.1, 1.0)
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    schedule: Schedule = Schedule(6000, warmup=200, final_lr=0.02, evaluate_every=500, checkpoint_every=1000)  # noqa: RUF009 (frozen)

    source: ClassVar[str] = "Bai et al., arXiv 2306.04637, sections 4 and 5, figure 3: noisy linear regression"
    dose: ClassVar[str] = "factor on the true weights"
    doses: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar("the error is within 10% of exact Bayes", "error over", "bayes", "at most", 1.1),
        Bar("it is below that of the best single ridge", "error over", "single ridge", "at most", 1.0),
        Bar("four times the weights it expects, the prior takes part of the answer", "share", "4", "at most", 0.9),
    )

    def __post_init__(self) -> None:
        for name in ("d", "n_pairs", "d_model", "n_layers", "n_heads"):
            check_count(name, getattr(self, name), minimum=1)
        levels = tuple(check_number("noises", s, positive=True) for s in check_list("noises", self.noises, "numbers"))
        if len(levels) < 2 or len(set(levels)) < len(levels):
            raise ValueError(f"noises must be two or more different levels, got {levels}")
        object.__setattr__(self, "noises", levels)
        check_type("schedule", self.schedule, Schedule)

    @property
    def name(self) -> str:
        """Which regression."""
        return f"algorithm selection in {self.d} dimensions"

    def in_world(self, seed: int) -> "AlgorithmSelection":
        """The task itself: nothing is drawn once for all."""
        return self

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latents are the "noise" (which level) and the true "weights"."""
        return self.conflict(1.0, n, seed)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose true weights are larger by the strength than the model has learned to expect."""
        scale, generator = check_number("strength", strength), as_generator(seed)
        n = prompt_count(n, 4 * (2 * self.n_pairs + 1) * (self.d + 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        noise = torch.randint(len(self.noises), (n,), generator=generator)
        w, x = scale * normal(n, self.d) / self.d**0.5, normal(n, self.n_pairs + 1, self.d)
        level = torch.tensor(self.noises, dtype=torch.float64)[noise]
        y = (x @ w[..., None])[..., 0] + level[:, None] * normal(n, self.n_pairs + 1)
        return prompts_of(x, y, {"noise": noise, "weights": w})

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained transformer that reads the x and y, with learned positions."""
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return RealTransformer(self.d + 1, 1, 2 * self.n_pairs + 1, **sizes, seed=seed, device="cpu")

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """The mean squared difference from the noisy y."""
        check_outputs(outputs, 1, batch)
        return (outputs[..., 0] - batch.targets)[batch.mask].square().mean()

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """The one number."""
        check_outputs(outputs, 1)
        return outputs.double()

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes", the "oracle" that is told the level, ridges at each level, the best "single ridge".

        Also w x as the "context"'s answer, and 0, the prior's mean, as the "weights"'. All are 0 where a y stands.
        """
        check_batch(batch, ["noise", "weights"], self.d + 1)
        of_level, log_posterior = zip(*(self._at_level(batch, s) for s in self.noises), strict=True)
        ridges = torch.stack(of_level, -1)
        x, y = batch.inputs[:, ::2, : self.d].double(), batch.inputs[:, 1::2, self.d].double()
        chosen = batch.latent["noise"][:, None, None].expand(*ridges.shape[:2], 1)
        found = {
            "bayes": (ridges * torch.stack(log_posterior, -1).softmax(-1)).sum(-1),
            "oracle": ridges.gather(-1, chosen)[..., 0],
            **{f"ridge {s:g}": one for s, one in zip(self.noises, of_level, strict=True)},
            "single ridge": ridge(*seen_before(x, y), x, self.single_penalty),
            "context": (x @ batch.latent["weights"][..., None])[..., 0],
            "weights": torch.zeros_like(x[..., 0]),
        }
        return at_each_x(found, batch)

    def _at_level(
        self, batch: Batch, level: float
    ) -> tuple[Float[Tensor, "prompt asked"], Float[Tensor, "prompt asked"]]:
        """Predictions if the noise has this level, and the log-likelihood of the y before, up to what levels share."""
        x, y = batch.inputs[:, ::2, : self.d].double(), batch.inputs[:, 1::2, self.d].double()
        gram, moment = seen_before(x, y)
        penalty = self.d * level**2
        predicted = ridge(gram, moment, x, penalty)
        spread = level**2 * (1 + quadratic(gram, x, penalty))  # the predictive variance of each y
        off = (y - predicted[:, :-1]).square() / spread[:, :-1] + spread[:, :-1].log()
        return predicted, torch.nn.functional.pad(-0.5 * off.cumsum(1), (1, 0))

    @functools.cached_property
    def single_penalty(self) -> float:
        """The penalty of the best single ridge: of least error over prompts of all levels."""
        batch = self.sample(_MEASURED, mixed_seed(0, "single ridge", 0))
        x, y = batch.inputs[:, ::2, : self.d].double(), batch.inputs[:, 1::2, self.d].double()
        seen = seen_before(x, y)
        true = (x @ batch.latent["weights"][..., None])[..., 0]
        low, high = (self.d * s**2 for s in (min(self.noises), max(self.noises)))
        tried = torch.logspace(math.log10(low), math.log10(high), _PENALTIES, dtype=torch.float64).tolist()
        return min(tried, key=lambda one: float((ridge(*seen, x, one) - true).square().mean()))

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss."""
        return {"loss": watched_loss(self, model, _WATCHED, seed)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Errors by predictor and level, where the level is decoded, what moving it does, and what each head is worth.

        Errors are mean squared differences from w x, over all x of a prompt. Decodability is a linear probe's accuracy
        at the last position. Moving the level to another one should shift predictions from one level's ridge to the
        other's: "shift" is the slope of the first shift on the second, over prompts.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch)
        with torch.no_grad():
            said = {**self.references(batch), "model": self.predictions(model(batch.inputs))}
        rows = list[tuple[str, str, float]]()
        errors = dict[str, float]()
        for name in ("model", "bayes", "oracle", "single ridge", *(f"ridge {s:g}" for s in self.noises)):
            off = self._errors(said[name], batch)
            errors[name] = float(off.mean())
            rows.append(("error", name, errors[name]))
            for index, level in enumerate(self.noises):
                rows.append((f"error at noise {level:g}", name, float(off[batch.latent["noise"] == index].mean())))
        rows += [("error over", name, errors["model"] / errors[name]) for name in ("bayes", "single ridge")]

        batch = batch[:_PROBED]
        untrained = self.model(mixed_seed(seed, "weights", 0))
        points = residual_points(self.n_layers)
        scores = decodability(model, untrained, batch, "noise", points.values())
        rows += decoded(scores, points)
        rows.append(("decodability gained", "best", float(scores["score"].max() - scores["untrained"].max())))
        for name, point in points.items():
            moved = move_latent(model, batch, "noise", point, seed=mixed_seed(seed, "moved", 0))
            ideal = torch.stack([self._at_level(moved.batch, s)[0][:, -1] for s in self.noises], -1)
            own, to = (ideal.gather(-1, one[:, None])[:, 0] for one in (moved.batch.latent["noise"], moved.to))
            rows += zip(("shift", "random shift"), (name, name), followed(moved, to - own), strict=True)
        rows += added_without(
            model, batch, lambda outputs: float(self._errors(self.predictions(outputs), batch).mean())
        )
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _errors(self, predictions: Predictions, batch: Batch) -> Float[Tensor, "prompt"]:
        """Each prompt's mean squared difference from w x."""
        x = batch.inputs[:, ::2, : self.d].double()
        true = (x @ batch.latent["weights"][..., None])[..., 0]
        return (predictions[:, ::2, 0] - true).square().mean(1)
