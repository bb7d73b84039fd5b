"""Learning with representations: regression in context on features that the weights must compute."""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_count,
    check_fraction,
    check_number,
    check_tensor,
    check_type,
    fixed_seed,
)
from hijack_lens.hooks.ablate_and_patch import patch
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import added_without, decoded, residual_points, watched_loss
from hijack_lens.tasks.outputs import OneNumber
from hijack_lens.tasks.pairs import at_each_x, prompts_of, ridge, seen_before
from hijack_lens.tasks.probes import decodability
from hijack_lens.tasks.task import (
    Bar,
    Batch,
    Predictions,
    Schedule,
    check_batch,
    check_fits,
    prompt_count,
)
from hijack_lens.tasks.training import train
from hijack_lens.training.data import mixed_seed

_WATCHED = 1024
"""Prompts that are looked at while training."""

_MEASURED = 8192
"""Prompts that errors are measured on."""

_PROBED = 2048
"""Of these, the prompts that probes, patches and ablations take."""

_PASTED = Schedule(600, warmup=50, final_lr=0.02, evaluate_every=600)
"""Of the embedding that trained blocks are frozen on."""

_LEAK = 0.1
"""Slope of the representation's leaky ReLU below 0."""

Layers = Float[Tensor, "layer d d"]


_FOLLOWS, _PASTE = "follows the query", "pasted error over bayes"


@dataclass(frozen=True)
class Representations(OneNumber):
    """Noisy linear regression on a fixed nonlinear representation: after Guo et al. (arXiv 2310.10616).

    A prompt is x_1, y_1, ..., x_n, y_n, x: with w ~ N(0, I/d) of its own, x_i ~ N(0, I) and y_i = w Phi(x_i) + noise.
    Phi, the same in all prompts, is a network of orthogonal matrices with leaky ReLUs between. A position of an x
    predicts its y. Ridge regression on Phi(x) with the penalty d noise^2 is exact Bayes: so the weights must hold Phi,
    and what is learned in context is w. The paper trains deeper models on longer prompts; these settings are ours.

    Attributes:
        d: dimensions of x and of Phi(x).
        n_pairs: pairs before the last x.
        depth: layers of Phi.
        noise: standard deviation of the noise.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        world: seed of Phi.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.Representations(n_pairs=6)
        >>> f"{task.name} through {task.layers.shape[0]} layers"
        'learning with representations through 2 layers'
        >>> batch = task.sample(2000, seed=0)
        >>> for name, said in task.references(batch).items():
        ...     print(f"{name}: {(said[..., 0] - batch.targets)[:, -1].square().mean():.2f}")
        bayes: 0.19
        oracle: 0.09
        ridge on x: 0.35
        context: 0.19
        weights: 0.19
    """

    d: int = 4
    n_pairs: int = 12
    depth: int = 2
    noise: float = 0.3
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    world: int = 0
    schedule: Schedule = Schedule(7000, warmup=200, final_lr=0.02, evaluate_every=500, checkpoint_every=1000)  # noqa: RUF009 (frozen)

    name: ClassVar[str] = "learning with representations"
    source: ClassVar[str] = "after Guo et al., arXiv 2310.10616, sections 4 and 5: smaller, with settings of ours"
    dose: ClassVar[str] = "share of another representation in the labels"
    doses: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar("the error is within 10% of exact Bayes", "error over", "bayes", "at most", 1.1),
        Bar("it is after any number of pairs", "error over bayes", "at worst", "at most", 1.1),
        Bar("it is below that of ridge on x", "error over", "ridge on x", "at most", 0.8),
        Bar("a head of the first layer copies x to its y", "copies", "most of layer 0", "at least", 0.8),
        Bar("Phi(x) is decoded at the y of x after the first MLP", "decodability at y", "after MLP 0", "at least", 0.9),
        Bar("the prediction follows what the first MLP writes of another x", _FOLLOWS, "MLP 0", "at least", 0.8),
        Bar("it does not follow another x without", _FOLLOWS, "all but MLP 0", "at most", 0.2),
        Bar("the later blocks solve the task on Phi(x)", _PASTE, "trained blocks on Phi(x)", "at most", 1.3),
        Bar("they do not on x", _PASTE, "trained blocks on x", "at least", 1.4),
        Bar("untrained blocks do not on Phi(x)", _PASTE, "untrained blocks on Phi(x)", "at least", 1.4),
        Bar("labels through another representation are read through that of the weights", "share", "1", "at most", 0.3),
    )

    def __post_init__(self) -> None:
        for name in ("d", "n_pairs", "depth", "d_model", "n_layers", "n_heads"):
            check_count(name, getattr(self, name), minimum=1)
        if self.n_layers < 2:
            raise ValueError(
                f"n_layers must be at least 2, one for Phi and one for the regression, got {self.n_layers}"
            )
        check_number("noise", self.noise, positive=True)
        check_count("world", self.world)
        check_type("schedule", self.schedule, Schedule)

    def in_world(self, seed: int) -> "Representations":
        """The task with another representation."""
        return replace(self, world=check_count("seed", seed))

    @functools.cached_property
    def layers(self) -> Layers:
        """The representation's weights: orthogonal matrices."""
        return self._drawn("representation")

    @functools.cached_property
    def _other_layers(self) -> Layers:
        return self._drawn("another representation")

    def _drawn(self, what: str) -> Layers:
        generator = as_generator(mixed_seed(self.world, what, 0))
        return torch.linalg.qr(torch.randn(self.depth, self.d, self.d, generator=generator, dtype=torch.float64)).Q

    def features(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Phi(x).

        Raises:
            TypeError, ValueError: for x that are not vectors of `d` numbers.
        """
        check_tensor("x", x, "vectors")
        if x.ndim == 0 or x.shape[-1] != self.d:
            raise ValueError(f"x must be vectors of {self.d} numbers, got shape {tuple(x.shape)}")
        return _features(x.double(), self.layers)

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latents are the true "weights" and the "features" Phi(x) of each x."""
        return self._labelled(0.0, n, seed)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts labelled through (1 - strength) Phi + strength Phi', with another Phi'; these are the "features"."""
        return self._labelled(strength, n, seed)

    def _labelled(self, strength: float, n: int, seed: Seed) -> Batch:
        share, generator = check_fraction("strength", strength), as_generator(seed)
        n = prompt_count(n, 8 * (2 * self.n_pairs + 1) * (self.d + 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        w, x = normal(n, self.d) / self.d**0.5, normal(n, self.n_pairs + 1, self.d)
        said_by = (1 - share) * _features(x, self.layers) + share * _features(x, self._other_layers)
        y = (said_by @ w[..., None])[..., 0] + self.noise * normal(n, self.n_pairs + 1)
        return prompts_of(x, y, {"weights": w, "features": said_by})

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained transformer that reads the x and y, with learned positions."""
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return RealTransformer(self.d + 1, 1, 2 * self.n_pairs + 1, **sizes, seed=seed, device="cpu")

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes", the "oracle" that is told w, and "ridge on x", with a constant and the penalty d.

        Also, as the "context"'s answer, ridge on the features that the labels were made of, and as the "weights"',
        ridge on Phi(x), which is "bayes". All are 0 where a y stands.
        """
        check_batch(batch, ["weights", "features"], self.d + 1)
        x, y = batch.inputs[:, ::2, : self.d].double(), batch.inputs[:, 1::2, self.d].double()
        penalty = self.d * self.noise**2
        said_by, ones = batch.latent["features"], torch.ones_like(x[..., :1])
        bayes = _ridge(self.features(x), y, penalty)
        found = {
            "bayes": bayes,
            "oracle": (said_by @ batch.latent["weights"][..., None])[..., 0],
            "ridge on x": _ridge(torch.cat([x, ones], -1), y, float(self.d)),
            "context": _ridge(said_by, y, penalty),
            "weights": bayes,
        }
        return at_each_x(found, batch)

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss."""
        return {"loss": watched_loss(self, model, _WATCHED, seed)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Errors by pairs seen, where the representation is, what moving it does, and whether what reads it is ridge.

        Errors are mean squared differences from the noisy y. Decodability is a linear probe's R2 of Phi(x) at the last
        position; "at y" it is that of the x before, at the y before. "follows" is the slope of the shift of the last
        prediction on what it would be with other x, where parts of the run are patched with those of the prompt with
        other x (and the same y): everywhere ("all x"), or for the last x ("the query"). "copies" is the mean attention
        of a head from a y to its x. For "pasted error over bayes", the blocks from the second on are frozen, and
        a new linear embedding is trained of Phi(x), or x, at each x and again beside its y; beside it, the same of
        blocks that were not trained.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch, self)
        with torch.no_grad():
            said = {"model": self.predictions(logits_of(model, batch.inputs)), **self.references(batch)}
        errors = {name: _errors(said[name], batch) for name in ("model", "bayes", "oracle", "ridge on x")}
        rows = [("error", name, float(by.mean())) for name, by in errors.items()]
        for name, by in errors.items():
            rows += [(f"error after {seen}", name, error) for seen, error in enumerate(by.tolist())]
        for name in ("bayes", "ridge on x"):
            rows.append(("error over", name, float(errors["model"].mean() / errors[name].mean())))
        over = errors["model"] / errors["bayes"]
        rows += [("error over bayes", f"after {seen}", value) for seen, value in enumerate(over.tolist())]
        rows.append(("error over bayes", "at worst", float(over.max())))

        batch = batch[:_PROBED]
        rows += self._decoded(model, batch, seed)
        rows += self._followed(model, batch, seed)
        rows += added_without(model, batch, lambda outputs: float(_errors(self.predictions(outputs), batch).mean()))
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.n_layers)]
        patterns = record(model, batch.inputs, names)[1]
        for layer, name in enumerate(names):
            copies = patterns[name][:, :, 1::2, ::2].diagonal(0, 2, 3).double().mean((0, 2))
            rows += [("copies", f"L{layer}H{head}", value) for head, value in enumerate(copies.tolist())]
            rows.append(("copies", f"most of layer {layer}", float(copies.max())))
        rows += self._pasted(model, seed)
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _decoded(self, model: RealTransformer, batch: Batch, seed: int) -> list[tuple[str, str, float]]:
        """How well Phi(x) is read at an x, and at the y that follows, by place; beside the untrained model."""
        untrained, features = self.model(mixed_seed(seed, "weights", 0)), batch.latent["features"]
        points = residual_points(self.n_layers)
        rows = list[tuple[str, str, float]]()
        for measure, index, position in (("decodability", -1, -1), ("decodability at y", -2, -2)):
            one = replace(batch, latent={"features": features[:, index]})
            scores = decodability(model, untrained, one, "features", points.values(), position)
            rows += decoded(scores, points, measure)
        return rows

    def _followed(self, model: RealTransformer, batch: Batch, seed: int) -> list[tuple[str, str, float]]:
        """How far the last prediction follows other x where only parts of the run have them."""
        n, other = len(batch), self.sample(len(batch), mixed_seed(seed, "other", 0)).inputs
        swapped = {"all x": range(0, batch.mask.shape[1], 2), "the query": [batch.mask.shape[1] - 1]}
        runs = [batch.inputs]
        for positions in swapped.values():
            runs.append(batch.inputs.clone())
            runs[-1][:, list(positions)] = other[:, list(positions)]
        reader, ids = model.reading(torch.cat(runs))
        own, *others = ids.split(n)
        parts = {f"MLP {layer}": [f"L{layer}MLP"] for layer in range(self.n_layers)}
        if self.n_layers > 2:
            parts["MLPs but the last"] = [f"L{layer}MLP" for layer in range(self.n_layers - 1)]
        rows = list[tuple[str, str, float]]()
        with torch.no_grad():
            before = reader(own)[:, -1, 0].double()
            for (where, positions), ids in zip(swapped.items(), others, strict=True):
                whole = reader(ids)[:, -1, 0].double() - before
                for name, components in parts.items():
                    for clean, source, words in ((own, ids, name), (ids, own, f"all but {name}")):
                        with patch(reader, components, source=source, positions=positions):
                            moved = reader(clean)[:, -1, 0].double() - before
                        rows.append((f"follows {where}", words, float((moved * whole).sum() / whole.square().sum())))
        return rows

    def _pasted(self, model: RealTransformer, seed: int) -> list[tuple[str, str, float]]:
        """What the blocks after the first make of a new embedding of Phi(x)."""
        untrained = self.model(mixed_seed(seed, "weights", 0))
        settings = {field.name: getattr(self, field.name) for field in fields(Representations)}
        batch = self.sample(_MEASURED, mixed_seed(seed, "measured", 0))
        bayes = float(_errors(self.references(batch)["bayes"], batch).mean())
        rows = list[tuple[str, str, float]]()
        for blocks, upper, reads in (
            ("trained", model, "Phi(x)"),
            ("untrained", untrained, "Phi(x)"),
            ("trained", model, "x"),
        ):
            task = _Pasted(**{**settings, "schedule": _PASTED}, upper=upper, reads=reads)
            found = train(task, seed).model
            with torch.no_grad():
                error = _errors(self.predictions(found(task.embedded(batch).inputs)), batch).mean()
            rows.append((_PASTE, f"{blocks} blocks on {reads}", float(error) / bayes))
        return rows


@dataclass(frozen=True)
class _Pasted(Representations):
    """The task for a model whose later blocks are frozen, with a new linear embedding in the first one's place."""

    upper: Any = None
    reads: str = "Phi(x)"

    def sample(self, n: int, seed: Seed) -> Batch:
        return self.embedded(Representations.sample(self, n, seed))

    def embedded(self, batch: Batch) -> Batch:
        """The prompts with what the embedding reads: at each x and, in dimensions of its own, beside its y."""
        x = batch.inputs[:, ::2, : self.d] if self.reads == "x" else batch.latent["features"].float()
        inputs = torch.zeros(*batch.mask.shape, 2 * self.d + 1)
        inputs[:, ::2, : self.d], inputs[:, 1::2, self.d : -1], inputs[..., -1] = x, x[:, :-1], batch.inputs[..., -1]
        return replace(batch, inputs=inputs)

    def model(self, seed: Seed) -> RealTransformer:
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers - 1, "n_heads": self.n_heads}
        model = RealTransformer(2 * self.d + 1, 1, 2 * self.n_pairs + 1, **sizes, seed=seed, device="cpu")
        upper = [*self.upper.blocks[1:], self.upper.ln_final, self.upper.unembed]
        for ours, theirs in zip([*model.blocks, model.ln_final, model.unembed], upper, strict=True):
            ours.load_state_dict(theirs.state_dict())
            ours.requires_grad_(False)
        return model


def _errors(predictions: Predictions, batch: Batch) -> Float[Tensor, "asked"]:
    return (predictions[:, ::2, 0] - batch.targets[:, ::2].double()).square().mean(0)


def _features(x: Float[Tensor, "*batch d"], layers: Layers) -> Float[Tensor, "*batch d"]:
    """Layers of leaky ReLUs, scaled so that numbers stay of order 1."""
    for weights in layers:
        x = F.leaky_relu(x @ weights, _LEAK) * (2 / (1 + _LEAK**2)) ** 0.5
    return x


def _ridge(
    features: Float[Tensor, "prompt asked feature"], y: Float[Tensor, "prompt seen"], penalty: float
) -> Float[Tensor, "prompt asked"]:
    """What ridge regression on the pairs before predicts at each x."""
    return ridge(*seen_before(features, y), features, penalty)
