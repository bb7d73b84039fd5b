"""Algorithm selection: regression in context, of a kind that the prompt does not say."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_count,
    check_number,
    check_type,
    fixed_seed,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.kinds import (
    Kind,
    LinearPrompts,
    check_kinds,
    draw_answers,
    draw_weights,
    expected,
    fitted,
    posteriors,
    spread,
    supports,
)
from hijack_lens.tasks.measures import Row, added_without, decoded, followed, residual_points, watched_loss
from hijack_lens.tasks.outputs import OneNumber
from hijack_lens.tasks.pairs import at_each_x, prompts_of, ridge, seen_before
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

_PROBED = 2048
"""Of these, the prompts that probes, moves and ablations take."""

_PENALTIES = 61
"""Ridge penalties that are tried for the best single one."""

_FITTED = 1024
"""Of those that errors are measured on, the prompts that scikit-learn's estimators are fitted to, one by one."""


@dataclass(frozen=True)
class AlgorithmSelection(OneNumber):
    """Regression of several kinds, of which a prompt is one: Bai et al. (arXiv 2306.04637), section 4.

    A prompt is x_1, y_1, ..., x_n, y_n, x, with weights w of its own and x_i ~ N(0, I). Its kind says what w is drawn
    from, and how y is drawn, given w x: at which noise, whether few of the weights are not 0, or a label instead of a
    number. A position of an x predicts its y. For one kind there is one best algorithm (exact Bayes), whose place
    ridge regression, Lasso and logistic regression take in practice; for several, their mean by the kinds' posterior
    is exact Bayes. No algorithm alone does as well, so the model must tell kinds apart. Whether it tries each and
    weighs them by their fit (the paper's post-ICL validation), or tells the kind first (its pre-ICL testing),
    behaviour does not say: both give the same predictions.

    Attributes:
        d: dimensions of x.
        n_pairs: pairs before the last x.
        kinds: which prompts there are, equally often.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.AlgorithmSelection(n_pairs=5)
        >>> f"{task.name}: the best single ridge penalty is {task.single_penalty:.1f}"
        'algorithm selection in 2 dimensions: the best single ridge penalty is 1.0'
        >>> said = {name: one[:, -1] for name, one in task.references(task.sample(2000, seed=0)).items()}
        >>> errors = [(said[name] - said["context"]).square().mean() for name in ("bayes", "single ridge")]
        >>> [round(float(error), 2) for error in errors]
        [0.18, 0.24]
        >>> labels = hl.tasks.AlgorithmSelection(kinds=(hl.tasks.LinearPrompts(0.3), hl.tasks.LogisticPrompts()))
        >>> labels.claims[-1].statement
        "on logistic prompts it is no worse than scikit-learn's logistic regression"
    """

    d: int = 2
    n_pairs: int = 10
    kinds: tuple[Kind, ...] = (LinearPrompts(0.1), LinearPrompts(1.0))
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    schedule: Schedule = Schedule(6000, warmup=200, final_lr=0.02, evaluate_every=500, checkpoint_every=1000)  # noqa: RUF009 (frozen)

    source: ClassVar[str] = "Bai et al., arXiv 2306.04637, sections 4 and 5: noisy, sparse and logistic regression"
    dose: ClassVar[str] = "factor on the true weights"
    doses: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        for name in ("d", "n_pairs", "d_model", "n_layers", "n_heads"):
            check_count(name, getattr(self, name), minimum=1)
        object.__setattr__(self, "kinds", check_kinds(self.kinds, self.d))
        check_type("schedule", self.schedule, Schedule)

    @property
    def name(self) -> str:
        """Which regressions."""
        families = dict.fromkeys(kind.family for kind in self.kinds)
        which = f": {' or '.join(families)}" if list(families) != ["linear"] else ""
        return f"algorithm selection in {self.d} dimensions{which}"

    @property
    def claims(self) -> tuple[Bar, ...]:
        """The acceptance numbers: against Bayes, the best single ridge, and scikit-learn's estimators beyond ridge."""
        estimators = {"sparse": "Lasso", "logistic": "logistic regression"}
        return (
            Bar("the error is within 10% of exact Bayes", "error over", "bayes", "at most", 1.1),
            Bar("it is below that of the best single ridge", "error over", "single ridge", "at most", 1.0),
            Bar("four times the weights it expects, the prior takes part of the answer", "share", "4", "at most", 0.9),
            *(
                Bar(
                    f"on {kind.family} prompts it is no worse than scikit-learn's {estimators[kind.family]}",
                    "error over scikit-learn's",
                    kind.name,
                    "at most",
                    1.0,
                )
                for kind in self.kinds
                if kind.family in estimators
            ),
        )

    def in_world(self, seed: int) -> "AlgorithmSelection":
        """The task itself: nothing is drawn once for all."""
        return self

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latents are the "kind" (which of them) and the true "weights"."""
        return self.conflict(1.0, n, seed)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose true weights are larger by the strength than the model has learned to expect."""
        scale, generator = check_number("strength", strength), as_generator(seed)
        n = prompt_count(n, 4 * (2 * self.n_pairs + 1) * (self.d + 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        which = torch.randint(len(self.kinds), (n,), generator=generator)
        drawn, x, off = normal(n, self.d), normal(n, self.n_pairs + 1, self.d), normal(n, self.n_pairs + 1)
        order = torch.rand(n, self.d, generator=generator, dtype=torch.float64)
        w, y = torch.empty_like(drawn), torch.empty_like(off)
        for index, kind in enumerate(self.kinds):
            rows = which == index
            w[rows] = scale * draw_weights(kind, drawn[rows], order[rows])
            y[rows] = draw_answers(kind, (x[rows] @ w[rows][..., None])[..., 0], off[rows])
        return prompts_of(x, y, {"kind": which, "weights": w})

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained transformer that reads the x and y, with learned positions."""
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return RealTransformer(self.d + 1, 1, 2 * self.n_pairs + 1, **sizes, seed=seed, device="cpu")

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes", the "oracle" that is told the kind, exact Bayes by kind, and the best "single ridge".

        Also the mean of y given w x, as the "context"'s answer, and 0, the prior's mean, as the "weights"'. All are 0
        where a y stands. Exact Bayes for labels takes numbers by their signs.
        """
        check_batch(batch, ["kind", "weights"], self.d + 1)
        if int(batch.latent["kind"].max()) >= len(self.kinds):
            raise ValueError(f"batch must be of this task's {len(self.kinds)} kinds, got one of others")
        sets = sum(supports(kind, self.d) for kind in self.kinds)
        check_memory(8 * batch.targets.numel() * (2 * sets + 2 * self.d**2), batch=len(batch))
        x, y = self._pairs(batch)
        of_kind, log_p = map(torch.stack, zip(*posteriors(self.kinds, x, y), strict=True))
        found = {
            "bayes": (of_kind * log_p.softmax(0)).sum(0),
            "oracle": _chosen(of_kind, batch),
            **{kind.name: one for kind, one in zip(self.kinds, of_kind, strict=True)},
            "single ridge": ridge(*seen_before(x, y), x, self.single_penalty),
            "context": self._expected(batch),
            "weights": torch.zeros_like(x[..., 0]),
        }
        return at_each_x(found, batch)

    def _pairs(self, batch: Batch) -> tuple[Float[Tensor, "prompt asked d"], Float[Tensor, "prompt seen"]]:
        return batch.inputs[:, ::2, : self.d].double(), batch.inputs[:, 1::2, self.d].double()

    def _expected(self, batch: Batch) -> Float[Tensor, "prompt asked"]:
        """The mean of each y, given the true weights."""
        z = (self._pairs(batch)[0] @ batch.latent["weights"][..., None])[..., 0]
        return _chosen(torch.stack([expected(kind, z) for kind in self.kinds]), batch)

    @functools.cached_property
    def single_penalty(self) -> float:
        """The penalty of the best single ridge: of least error over prompts of all kinds."""
        batch = self.sample(_MEASURED, mixed_seed(0, "single ridge", 0))
        x, y = self._pairs(batch)
        seen, true = seen_before(x, y), self._expected(batch)
        low, high = (self.d * one(map(spread, self.kinds)) ** 2 for one in (min, max))
        tried = torch.logspace(math.log10(low), math.log10(high), _PENALTIES, dtype=torch.float64).tolist()
        return min(tried, key=lambda one: float((ridge(*seen, x, one) - true).square().mean()))

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss."""
        return {"loss": watched_loss(self, model, _WATCHED, seed)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Errors by predictor and kind, where the kind is decoded, what moving it does, and what each head is worth.

        Errors are mean squared differences from the mean of y given w x, over all x of a prompt. "error at the last x"
        is that at one x, where scikit-learn's own estimator of each kind is fitted to the pairs of each prompt; of
        several penalties, it is the one that is best on the first half of the prompts, and all errors are of the other
        half. Decodability is a linear probe's accuracy at the last position. Moving the kind to another one should
        shift predictions from exact Bayes of one kind to that of the other: "shift" is the slope of the first shift on
        the second, over prompts.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch, self)
        with torch.no_grad():
            said = {**self.references(batch), "model": self.predictions(logits_of(model, batch.inputs))}
        rows = list[Row]()
        errors = dict[str, float]()
        for name in ("model", "bayes", "oracle", "single ridge", *(kind.name for kind in self.kinds)):
            off = self._errors(said[name], batch)
            errors[name] = float(off.mean())
            rows.append(("error", name, errors[name]))
            for index, kind in enumerate(self.kinds):
                rows.append((f"error of {kind.name}", name, float(off[batch.latent["kind"] == index].mean())))
        rows += [("error over", name, errors["model"] / errors[name]) for name in ("bayes", "single ridge")]
        rows += self._beside_estimators({name: said[name][:, -1, 0] for name in ("model", "bayes")}, batch)

        batch = batch[:_PROBED]
        untrained = self.model(mixed_seed(seed, "weights", 0))
        points = residual_points(self.n_layers)
        scores = decodability(model, untrained, batch, "kind", points.values())
        rows += decoded(scores, points)
        rows.append(("decodability gained", "best", float(scores["score"].max() - scores["untrained"].max())))
        moved_ones = self._pairs(batch[len(batch) // 2 :])  # the same at each point
        ideal = torch.stack([one[:, -1] for one, _ in posteriors(self.kinds, *moved_ones)], -1)
        for name, point in points.items():
            moved = move_latent(model, batch, "kind", point, seed=mixed_seed(seed, "moved", 0))
            own, to = (ideal.gather(-1, one[:, None])[:, 0] for one in (moved.batch.latent["kind"], moved.to))
            rows += zip(("shift", "random shift"), (name, name), followed(moved, to - own), strict=True)
        rows += added_without(
            model, batch, lambda outputs: float(self._errors(self.predictions(outputs), batch).mean())
        )
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _beside_estimators(self, said: dict[str, Float[Tensor, "prompt"]], batch: Batch) -> list[Row]:
        """Errors at the last x, of each kind, beside those of scikit-learn's own estimator."""
        rows = list[Row]()
        wanted = self._expected(batch)[:, -1]
        for index, kind in enumerate(self.kinds):
            chosen = (batch.latent["kind"][:_FITTED] == index).nonzero()[:, 0]
            x, y = (one[chosen].numpy() for one in self._pairs(batch))
            off = (torch.tensor(fitted(kind, x, y), dtype=torch.float64) - wanted[chosen]).square()
            half = len(chosen) // 2
            errors = {name: float((one - wanted)[chosen][half:].square().mean()) for name, one in said.items()}
            errors["scikit-learn"] = float(off[off[:, :half].mean(1).argmin(), half:].mean())
            rows += [(f"error of {kind.name} at the last x", name, error) for name, error in errors.items()]
            rows.append(("error over scikit-learn's", kind.name, errors["model"] / errors["scikit-learn"]))
        return rows

    def _errors(self, predictions: Predictions, batch: Batch) -> Float[Tensor, "prompt"]:
        """Each prompt's mean squared difference from the mean of y."""
        return (predictions[:, ::2, 0] - self._expected(batch)).square().mean(1)


def _chosen(of_kind: Float[Tensor, "kind prompt asked"], batch: Batch) -> Float[Tensor, "prompt asked"]:
    """Of each prompt, that of its own kind."""
    return of_kind[batch.latent["kind"], torch.arange(len(batch))]
