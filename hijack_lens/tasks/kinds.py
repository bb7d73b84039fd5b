"""Kinds of regression: how y is drawn given x, what exact Bayes makes of the pairs before, and scikit-learn's way."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import check_count, check_list, check_number, shown
from hijack_lens.tasks.pairs import quadratic, ridge, seen_before

Posterior = tuple[Float[Tensor, "prompt asked"], Float[Tensor, "prompt asked"]]
"""At each x: the mean of its y given the pairs before, and the log-likelihood of these, up to what kinds share."""

_STEEPEST = 8.0
"""The steepest of logistic curves: beyond, a label is as good as the sign, and a grid too fine."""

_REACH = 7.0
"""Of a grid, in standard deviations of the prior: beyond, there is exp(-24.5) of it."""

_DECAY = 30.0
"""What falls off as a grid grows finer is below exp(-30)."""

_MOST_POINTS = 2**22
"""Of a grid."""

_AT_ONCE = 2**21
"""Numbers on a grid, for all prompts that are taken together."""

_LASSO = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Lasso's penalties that are tried, over noise * sqrt(2 log(d) / pairs), what theory asks for up to a constant."""


@dataclass(frozen=True)
class LinearPrompts:
    """Noisy linear regression, of all coordinates of x or of a few: y = w x + noise.

    The weights that are not 0 are normal, of mean 0, and so large that w x has variance 1. Given which they are, exact
    Bayes is ridge regression on their coordinates; it is the mean of these over all sets, by their likelihood.

    Attributes:
        noise: standard deviation of y around w x.
        nonzero: how many weights are not 0, any so many of them alike; all, if None.

    Examples:
        >>> kinds = hl.tasks.LinearPrompts(0.1), hl.tasks.LinearPrompts(0.1, nonzero=1)
        >>> batch = hl.tasks.AlgorithmSelection(d=4, n_pairs=6, kinds=kinds).sample(4, seed=0)
        >>> batch.latent["kind"], (batch.latent["weights"] != 0).sum(-1)
        (tensor([0, 1, 1, 0]), tensor([4, 1, 1, 4]))
        >>> [(kind.family, kind.name) for kind in kinds]
        [('linear', 'linear, noise 0.1'), ('sparse', '1-sparse, noise 0.1')]
    """

    noise: float = 0.1
    nonzero: int | None = None

    def __post_init__(self) -> None:
        check_number("noise", self.noise, positive=True)
        if self.nonzero is not None:
            check_count("nonzero", self.nonzero, minimum=1)

    @property
    def family(self) -> str:
        """A word for it."""
        return "linear" if self.nonzero is None else "sparse"

    @property
    def name(self) -> str:
        """The word, with its numbers."""
        return f"{'linear' if self.nonzero is None else f'{self.nonzero}-sparse'}, noise {self.noise:g}"


@dataclass(frozen=True)
class LogisticPrompts:
    """Logistic regression: y is 1 with probability sigmoid(slope w x), else -1; w ~ N(0, I/d).

    Exact Bayes is an integral over w: the trapezoidal rule on a grid whose step follows from how near the integrand's
    poles are, which errs by less than 1e-8. There must be one or two dimensions.

    Attributes:
        slope: of the log odds, as w x grows; at most 8.

    Examples:
        >>> kinds = hl.tasks.LinearPrompts(), hl.tasks.LogisticPrompts()
        >>> batch = hl.tasks.AlgorithmSelection(n_pairs=3, kinds=kinds).sample(4, seed=0)
        >>> batch.latent["kind"], batch.targets[1, ::2]
        (tensor([0, 1, 1, 0]), tensor([ 1.,  1.,  1., -1.]))
        >>> kinds[1].name
        'logistic, slope 3'
    """

    slope: float = 3.0

    family: ClassVar[str] = "logistic"

    def __post_init__(self) -> None:
        if check_number("slope", self.slope, positive=True) > _STEEPEST:
            raise ValueError(f"slope must be at most {_STEEPEST:g}, got {self.slope:g}")

    @property
    def name(self) -> str:
        """The word, with its number."""
        return f"logistic, slope {self.slope:g}"


Kind = LinearPrompts | LogisticPrompts


def check_kinds(given: object, d: int) -> tuple[Kind, ...]:
    """`given` as the argument `kinds`: different ones, for which exact Bayes can be had in so many dimensions."""
    kinds = tuple(check_list("kinds", given, "kinds of prompts"))
    for kind in kinds:
        if not isinstance(kind, Kind):
            raise TypeError(f"kinds must be LinearPrompts and LogisticPrompts, got {shown(kind)}")
        if isinstance(kind, LogisticPrompts) and d > 2:
            raise ValueError(f"kinds must be linear where d is more than 2, got {kind} and d={d}")
        if isinstance(kind, LinearPrompts) and (kind.nonzero or 0) > d:
            raise ValueError(f"kinds must have at most d={d} weights that are not 0, got {kind}")
    if len(kinds) < 2 or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must be two or more different ones, got {shown(kinds)}")
    return kinds


def draw_weights(
    kind: Kind, normal: Float[Tensor, "prompt d"], order: Float[Tensor, "prompt d"]
) -> Float[Tensor, "prompt d"]:
    """Weights made of normal numbers; where few are not 0, those that come first in a random order."""
    count = (kind.nonzero if isinstance(kind, LinearPrompts) else None) or normal.shape[1]
    return normal * (order.argsort(-1) < count) / count**0.5


def draw_answers(
    kind: Kind, z: Float[Tensor, "prompt asked"], normal: Float[Tensor, "prompt asked"]
) -> Float[Tensor, "prompt asked"]:
    """Each y, of z = w x and a normal number."""
    if isinstance(kind, LinearPrompts):
        return z + kind.noise * normal
    return torch.where(torch.special.ndtr(normal) < (kind.slope * z).sigmoid(), 1.0, -1.0).to(z)


def expected(kind: Kind, z: Float[Tensor, "prompt asked"]) -> Float[Tensor, "prompt asked"]:
    """The mean of each y, given z = w x."""
    return z if isinstance(kind, LinearPrompts) else (kind.slope / 2 * z).tanh()


def spread(kind: Kind) -> float:
    """The standard deviation of y around its mean; of labels, the most that it can be."""
    return kind.noise if isinstance(kind, LinearPrompts) else 1.0


def supports(kind: Kind, d: int) -> int:
    """How many sets of weights that are not 0 there are."""
    return math.comb(d, kind.nonzero) if isinstance(kind, LinearPrompts) and kind.nonzero else 1


def posteriors(
    kinds: Sequence[Kind], x: Float[Tensor, "prompt asked d"], y: Float[Tensor, "prompt seen"]
) -> list[Posterior]:
    """Of each kind: the mean of each y, and the likelihood of those before.

    Numbers have densities, which give -1 and 1 exactly no probability beside labels. Labels are y's signs.
    """
    found = [_linear(one, x, y) if isinstance(one, LinearPrompts) else _logistic(one, x, y) for one in kinds]
    if len(set(map(type, kinds))) > 1:
        labels = (y.abs() == 1).long().cumprod(1).bool()
        for kind, (_, log_p) in zip(kinds, found, strict=True):
            log_p[:, 1:].masked_fill_(labels != isinstance(kind, LogisticPrompts), -math.inf)
    return found


def _linear(kind: LinearPrompts, x: Float[Tensor, "prompt asked d"], y: Float[Tensor, "prompt seen"]) -> Posterior:
    d = x.shape[-1]
    sets = itertools.combinations(range(d), kind.nonzero or d)
    given = [_ridge(x[..., list(one)], y, kind.noise) for one in sets]
    predicted, log_p = map(torch.stack, zip(*given, strict=True))
    return (predicted * log_p.softmax(0)).sum(0), log_p.logsumexp(0) - math.log(len(given))


def _ridge(x: Float[Tensor, "prompt asked nonzero"], y: Float[Tensor, "prompt seen"], noise: float) -> Posterior:
    """The same where it is known which weights are not 0."""
    gram, moment = seen_before(x, y)
    penalty = x.shape[-1] * noise**2
    predicted = ridge(gram, moment, x, penalty)
    variance = noise**2 * (1 + quadratic(gram, x, penalty))[:, :-1]  # of each y, given those before
    off = (y - predicted[:, :-1]).square() / variance + variance.log()
    return predicted, F.pad(-0.5 * off.cumsum(1), (1, 0))


def _logistic(kind: LogisticPrompts, x: Float[Tensor, "prompt asked d"], y: Float[Tensor, "prompt seen"]) -> Posterior:
    z = x * kind.slope / x.shape[-1] ** 0.5  # so that the prior is N(0, I)
    reach, label = z.norm(dim=-1).amax(1), y.sign()
    order = reach.argsort()  # prompts of short x, most of them, take a coarse grid
    predicted, start = torch.empty_like(x[..., 0]), 0
    while start < len(order):
        rows = order[start : start + 64]
        grid = _grid(x.shape[-1], float(reach[rows[-1]]))
        rows = rows[: max(1, _AT_ONCE // len(grid))]
        predicted[rows] = _on_grid(grid, z[rows], label[rows])
        start += len(rows)
    log_p = ((1 + label * predicted[:, :-1]) / 2).log()  # of each label, given those before
    return predicted, F.pad(log_p.cumsum(1), (1, 0))


def _grid(d: int, reach: float) -> Float[Tensor, "point d"]:
    """Points over N(0, I), close enough for sigmoids of v z where no z is longer than `reach`.

    The trapezoidal rule errs by exp(-2 pi a / step) times the integrand at a distance a from the real numbers, which
    must be nearer than its poles: sigmoid(v z) has them at pi / |z|. The density grows by exp(a^2 / 2) on the way.
    """
    away = min(math.pi / max(reach, 1e-9), (2 * _DECAY) ** 0.5)  # farther, the density would gain more than is won
    step = 2 * math.pi * away / (_DECAY + away**2 / 2)
    half = math.ceil(_REACH / step)
    if (2 * half + 1) ** d > _MOST_POINTS:
        raise ValueError(f"batch must hold shorter x: their length, times slope / sqrt(d), is up to {reach:.3g}")
    line = step * torch.arange(-half, half + 1, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * d).reshape(-1, d)


def _on_grid(
    grid: Float[Tensor, "point d"], z: Float[Tensor, "prompt asked d"], label: Float[Tensor, "prompt seen"]
) -> Float[Tensor, "prompt asked"]:
    """The mean of each label, given those before."""
    p = (-0.5 * grid.square().sum(-1)).softmax(-1).expand(len(z), -1)
    predicted = list[Tensor]()
    for index in range(z.shape[1]):
        mean = (z[:, index] / 2 @ grid.T).tanh_()
        predicted.append((p * mean).sum(-1))
        if index < label.shape[1]:
            p = p * mean.mul_(label[:, index, None]).add_(1)
            p /= p.sum(-1, keepdim=True)
    return torch.stack(predicted, 1)


def fitted(
    kind: Kind, x: Float[np.ndarray, "prompt asked d"], y: Float[np.ndarray, "prompt seen"]
) -> list[list[float]]:
    """What scikit-learn's own estimator says at the last x of each prompt, fitted to its pairs alone.

    That is Ridge, at the prior's penalty; of few weights, Lasso, at several penalties, of which the best is to be
    chosen; of labels, the mean that LogisticRegression gives, at the prior's penalty: it takes the mode of the same
    posterior. Where there is but one label, to which it cannot be fitted, that label is said.
    """
    try:
        from sklearn.linear_model import Lasso, LogisticRegression, Ridge
    except ImportError as error:
        raise ImportError("its estimators need scikit-learn: pip install 'hijack-lens[tasks]'") from error
    d, seen = x.shape[-1], y.shape[-1]
    estimators: list[Any]
    if isinstance(kind, LogisticPrompts):
        estimators = [LogisticRegression(C=kind.slope**2 / d, fit_intercept=False)]
    elif kind.nonzero is None:
        estimators = [Ridge(alpha=d * kind.noise**2, fit_intercept=False)]
    else:
        penalty = kind.noise * math.sqrt(2 * math.log(max(d, 2)) / seen)
        estimators = [Lasso(alpha=factor * penalty, fit_intercept=False) for factor in _LASSO]

    def said(estimator: Any, x: Any, y: Any) -> float:
        if isinstance(kind, LinearPrompts):
            return float(estimator.fit(x[:-1], y).predict(x[-1:])[0])
        return float(y[0] if len(set(y)) == 1 else 2 * estimator.fit(x[:-1], y).predict_proba(x[-1:])[0, 1] - 1)

    return [[said(one, *pairs) for pairs in zip(x, y, strict=True)] for one in estimators]
