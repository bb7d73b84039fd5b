"""Digits from a few measurements: what is known beforehand sits in the weights, and an image is seen but coarsely."""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hijack_lens.core.checks import Seed, as_generator, check_count, check_fraction, check_type, fixed_seed
from hijack_lens.hooks.intervention import Intervention, logits_of
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.conflicts import share_of
from hijack_lens.tasks.measures import Row, added_without, decoded, moved_to_class, residual_points
from hijack_lens.tasks.probes import decodability
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
from hijack_lens.tasks.training import train
from hijack_lens.training.data import mixed_seed

_TRAINED = 1197
"""Images to train on; the other 600 are held out."""

_SIDE, _DIGITS = 8, 10

_HIDDEN = 128
"""Neurons of the teacher's sensing, and of its decoding."""

_ORDERS = 20
"""In how many orders measurements are taken away one by one."""

_LEAST = 100
"""Labels: with fewer, a digit may well have none."""

_MEASURED, _GAINED = "front.hook_measured", "accuracy gained"

Images = Float[Tensor, "image row column"]


@dataclass(frozen=True)
class CompressedDigits:
    """Digits classified from a few measurements, by a student with a teacher: after Tran et al. (arXiv 2002.07203).

    An image of scikit-learn's digits is sensed by two mode products: measurements = S X C^T, with S [rows, 8] and
    C [columns, 8]. Two more decode them to an image, and a transformer of one layer reads its rows as eight tokens and
    names the digit at the last. All of it is learned together; the four matrices start at the higher-order singular
    value decomposition of the training images.

    The prior is a teacher's: a model whose sensing and decoding to and from as many numbers are networks, which
    separates the digits far better. A student with the prior starts from the teacher's transformer, and learns the
    teacher's answers to all training images, labelled or not; one without learns the labels. The paper has teachers,
    and students, of convolutions, and also transfers measurements and decoded images; these settings are ours.

    This is no in-context learner: the measurements are all that a prompt says, and the weights hold the rest. Two
    members of the protocol mean less here: exact Bayes is not known, and is not among the references; and a conflict's
    context does not deny the weights, it falls silent.

    Attributes:
        rows: measurements along the images' rows.
        columns: along their columns; an image is seen through rows x columns numbers.
        labels: of the 1197 training images, those with a label that is known.
        prior: whether the student has the teacher's prior.
        d_model: the transformers' width.
        n_heads: their heads.
        world: seed of which images are held out and labelled, and of the teacher.
        schedule: of the training, of teacher and student alike.

    Examples:
        >>> task = hl.tasks.CompressedDigits(rows=3, columns=3, prior=False, schedule=hl.tasks.Schedule(50))
        >>> task.name, task.source[:39]
        ('digits from 3 x 3 measurements, 150 labels, without prior', 'after Tran et al., arXiv 2002.07203: sm')
        >>> task.claims[0].statement, task.teacher.cfg.n_layers
        ('digits held out are named right', 1)
        >>> batch = task.held_out
        >>> batch.inputs.shape, batch.latent["digit"][:4]
        (torch.Size([600, 8, 8]), tensor([5, 1, 2, 1]))
        >>> said = task.references(batch)["pixels"][:, -1].argmax(-1)
        >>> print(f"right by all pixels: {(said == batch.latent['digit']).double().mean():.2f}")
        right by all pixels: 0.90
    """

    rows: int = 2
    columns: int = 2
    labels: int = 150
    prior: bool = True
    d_model: int = 32
    n_heads: int = 4
    world: int = 0
    schedule: Schedule = Schedule(800, weight_decay=0.1)  # noqa: RUF009 (frozen)

    source: ClassVar[str] = "after Tran et al., arXiv 2002.07203: small images, with settings of ours"
    dose: ClassVar[str] = "share of the measurements taken away"
    doses: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "d_model", "n_heads"):
            check_count(name, getattr(self, name), minimum=1)
        for name, value, most in (("rows", self.rows, _SIDE), ("columns", self.columns, _SIDE)):
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if not _LEAST <= check_count("labels", self.labels) <= _TRAINED:
            raise ValueError(f"labels must be from {_LEAST} to {_TRAINED}, got {self.labels}")
        check_type("prior", self.prior, bool)
        check_count("world", self.world)
        check_type("schedule", self.schedule, Schedule)

    @property
    def name(self) -> str:
        """The setting."""
        measured, prior = f"{self.rows} x {self.columns} measurements", "with" if self.prior else "without"
        return f"digits from {measured}, {self.labels} labels, {prior} prior"

    @property
    def claims(self) -> tuple[Bar, ...]:
        """The acceptance numbers, by how much is measured and labelled."""
        many = self.labels == _TRAINED
        level = 0.92 if self.rows * self.columns >= 9 else 0.7 if many else 0.66
        gain = (
            Bar("with labels for all images the prior costs little", _GAINED, "by the prior", "at least", -0.03)
            if many
            else Bar("where labels are few, the prior helps", _GAINED, "by the prior", "at least", 0.02)
        )
        gone, last = "accuracy by measurements gone", str(self.rows * self.columns)
        return (
            Bar("digits held out are named right", "accuracy", "student", "at least", level),
            *([gain] if self.prior else []),
            Bar("nothing is left without measurements", gone, last, "at most", 0.2),
            Bar("another digit's mean after the MLP turns the answer to it", "moved KL", "after MLP 0", "at most", 0.3),
            Bar("as long a step in a random direction does not", "random KL", "after MLP 0", "at least", 0.5),
        )

    def in_world(self, seed: int) -> "CompressedDigits":
        """The task with other images held out and labelled, and another teacher."""
        return replace(self, world=check_count("seed", seed))

    @functools.cached_property
    def teacher(self) -> RealTransformer:
        """The teacher, trained on the labelled images when it is first asked for."""
        return train(_Teacher(**{field.name: getattr(self, field.name) for field in fields(CompressedDigits)})).model

    @functools.cached_property
    def _order(self) -> Int[Tensor, "image"]:
        """All images, the labelled ones first, those held out last."""
        return torch.randperm(len(_digits()[1]), generator=as_generator(self.world))

    @functools.cached_property
    def held_out(self) -> Batch:
        """The images that no training sees."""
        images, digits = (one[self._order[_TRAINED:]] for one in _digits())
        return _batch(images, digits, F.one_hot(digits, _DIGITS).double())

    @functools.cached_property
    def _learned(self) -> tuple[Images, Int[Tensor, "image"], Float[Tensor, "image digit"]]:
        """The images that a student learns from, their digits, and what it learns that they are."""
        chosen = self._order[: _TRAINED if self.prior else self.labels]
        images, digits = (one[chosen] for one in _digits())
        if not self.prior:
            return images, digits, F.one_hot(digits, _DIGITS).double()
        with torch.no_grad():
            return images, digits, self.predictions(self.teacher(images))[:, -1]

    def sample(self, n: int, seed: Seed) -> Batch:
        """Training images, with repetition; the latents are the "digit", and the "answers" to be learned."""
        n = prompt_count(n, _SIDE * _SIDE + 3 * _DIGITS)
        images, digits, answers = self._learned
        chosen = torch.randint(len(images), (n,), generator=as_generator(seed))
        return _batch(images[chosen], digits[chosen], answers[chosen])

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Held-out images, with repetition, moved by this share of the way to the mean training image.

        Sensing is linear: each measurement is moved as far to its mean, and at 1 says nothing any more.
        """
        share, n = check_fraction("strength", strength), prompt_count(n, _SIDE * _SIDE + 3 * _DIGITS)
        batch = self.held_out[torch.randint(len(self.held_out), (n,), generator=as_generator(seed))]
        mean = _digits()[0][self._order[:_TRAINED]].mean(0)
        return replace(batch, inputs=torch.lerp(batch.inputs, mean.expand_as(batch.inputs), share))

    def model(self, seed: Seed) -> RealTransformer:
        """A student before training: of one layer, behind mode products."""
        model = self._transformer(seed)
        model.front = _ModeProducts(_digits()[0][self._order[:_TRAINED]], self.rows, self.columns)
        model.setup()
        if self.prior:
            theirs = dict(self.teacher.named_parameters())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if not name.startswith("front."):
                        parameter.copy_(theirs[name])
        return model

    def _transformer(self, seed: Seed) -> RealTransformer:
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": 1, "n_heads": self.n_heads}
        return RealTransformer(_SIDE, _DIGITS, _SIDE, **sizes, seed=seed, device="cpu")

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """The cross-entropy of the answers to be learned, in nats."""
        check_outputs(outputs, _DIGITS, batch)
        check_batch(batch, ["answers"], _SIDE)
        return F.cross_entropy(outputs[:, -1], batch.latent["answers"].to(outputs))

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """The digits' probabilities."""
        check_outputs(outputs, _DIGITS)
        return outputs.double().softmax(-1)

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """What scikit-learn's logistic regression on all "pixels" makes of the labelled images; no exact Bayes.

        Also the digit itself as the "context"'s answer, and how often each is among the labelled, as the "weights"'.
        All but the last position say the latter.
        """
        check_batch(batch, ["digit"], _SIDE)
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("its references need scikit-learn: pip install 'hijack-lens[tasks]'") from error
        images, digits = (one[self._order[: self.labels]] for one in _digits())
        frequencies = digits.bincount(minlength=_DIGITS).double() / len(digits)
        pixels = torch.zeros(len(batch), _DIGITS, dtype=torch.float64)
        fitted = LogisticRegression(max_iter=1000).fit(images.flatten(1).double().numpy(), digits.numpy())
        said = fitted.predict_proba(batch.inputs.flatten(1).double().numpy())
        pixels[:, fitted.classes_] = torch.from_numpy(said)
        found = {}
        for name, last in (
            ("pixels", pixels),
            ("context", F.one_hot(batch.latent["digit"], _DIGITS).double()),
            ("weights", frequencies.expand_as(pixels)),
        ):
            found[name] = frequencies.expand(*batch.mask.shape, -1).clone()
            found[name][:, -1] = last
        return found

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss and the accuracy on the images held out."""
        fixed_seed(seed)
        check_fits(model, self.held_out, self)
        with torch.no_grad():
            outputs = model(self.held_out.inputs)
            return {"loss": float(self.loss(outputs, self.held_out)), "accuracy": 1 - _wrong(outputs, self.held_out)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Accuracies on the images held out, of a student without the prior, too; and what either does without
        measurements.

        Decodability of the digit, moves of it, and what ablations add to the share of images that are named wrong are
        at the last position. "moved KL" is the divergence from the digit moved to, over what it is unmoved. "without"
        measurements, these are at their means over the images held out: one of them, or, in several orders, one after
        another; then the "share by measurements gone" is the context's, and "accuracy by measurements gone" that of the
        answers. Where the student has the prior, the same is said of one without, trained with the same seed.
        """
        batch, seed = self.held_out, fixed_seed(seed)
        check_fits(model, batch, self)
        without = replace(self, prior=False)
        students = {"": model}
        if self.prior:
            students[", no prior"] = train(without, seed).model
        said = {name: self.predictions(one(batch.inputs).detach()) for name, one in students.items()}
        with torch.no_grad():
            teacher = self.predictions(self.teacher(batch.inputs))
        answers = self.references(batch)
        named = {"student": said[""], "teacher": teacher, "pixels": answers["pixels"]}
        if self.prior:
            named["student, no prior"] = said[", no prior"]
        accuracy = {name: 1 - _wrong(one, batch) for name, one in named.items()}
        rows = [("accuracy", name, value) for name, value in accuracy.items()]
        if self.prior:
            rows.append((_GAINED, "by the prior", accuracy["student"] - accuracy["student, no prior"]))

        untrained = without.model(mixed_seed(seed, "weights", 0))
        points = residual_points(1)
        rows += decoded(decodability(model, untrained, batch, "digit", points.values()), points)
        rows += moved_to_class(model, batch, "digit", points, seed)
        rows += added_without(model, batch, lambda outputs: _wrong(outputs, batch))
        for name, student in students.items():
            rows += self._by_measurements(student, name, answers, mixed_seed(seed, "orders", 0))
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _by_measurements(
        self, model: RealTransformer, of: str, answers: dict[str, Predictions], seed: int
    ) -> list[Row]:
        """What the student does with some measurements at their means."""
        batch, count = self.held_out, self.rows * self.columns

        def run(gone: Int[Tensor, "gone"]) -> tuple[float, float]:
            """The share of images named wrong, and the context's share."""

            def hook_fn(activation: Tensor, hook: Any) -> Tensor:
                edited = activation.flatten(1).clone()
                edited[:, gone] = edited[:, gone].mean(0)
                return edited.view_as(activation)

            with torch.no_grad(), Intervention(model, edit=[(_MEASURED, hook_fn)]):
                outputs = logits_of(model, batch.inputs)
            share = share_of(self.predictions(outputs), answers["context"], answers["weights"])
            return _wrong(outputs, batch), share

        whole, _ = run(torch.arange(0))
        rows = list[Row]()
        for one in range(count):
            place = f"row {one // self.columns}, column {one % self.columns}"
            rows.append((f"error added without a measurement{of}", place, run(torch.tensor([one]))[0] - whole))
        generator = as_generator(seed)
        orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(_ORDERS)])
        for gone in range(count + 1):
            found = torch.tensor([run(order[:gone]) for order in orders], dtype=torch.float64).mean(0)
            rows.append((f"accuracy by measurements gone{of}", str(gone), 1 - float(found[0])))
            rows.append((f"share by measurements gone{of}", str(gone), float(found[1])))
        return rows


@dataclass(frozen=True)
class _Teacher(CompressedDigits):
    """The task for the teacher, whose sensing and decoding are networks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", False)

    def model(self, seed: Seed) -> RealTransformer:
        generator = as_generator(seed)
        model = self._transformer(generator)
        model.front = _Networks(self.rows * self.columns, generator)
        model.setup()
        return model


class _ModeProducts(nn.Module):
    """Sensing by products with both modes of an image, and decoding by two more.

    Two `einsum`s, and gradients flow: tensorly's `multi_mode_dot`, which loops over modes of any number, adds nothing.
    """

    def __init__(self, images: Images, rows: int, columns: int):
        super().__init__()
        self.sense_rows = nn.Parameter(_leading(einsum(images, images, "n i j, n k j -> i k"), rows))
        self.sense_columns = nn.Parameter(_leading(einsum(images, images, "n i j, n i k -> j k"), columns))
        self.decode_rows = nn.Parameter(self.sense_rows.detach().clone())
        self.decode_columns = nn.Parameter(self.sense_columns.detach().clone())
        self.hook_measured = HookPoint()

    def forward(self, images: Images) -> Images:
        sensed = einsum(images, self.sense_rows, self.sense_columns, "n i j, row i, column j -> n row column")
        measured = self.hook_measured(sensed)
        return einsum(measured, self.decode_rows, self.decode_columns, "n row column, row i, column j -> n i j")


def _leading(squares: Float[Tensor, "side side"], count: int) -> Float[Tensor, "measured side"]:
    """The directions of the largest squares."""
    return torch.linalg.eigh(squares.double()).eigenvectors.flip(1)[:, :count].T.float().contiguous()


class _Networks(nn.Module):
    """Sensing by a network, and decoding by another."""

    def __init__(self, measurements: int, generator: torch.Generator):
        super().__init__()
        pixels = _SIDE * _SIDE

        def layer(d_in: int, d_out: int) -> nn.Module:
            linear = nn.utils.skip_init(nn.Linear, d_in, d_out)  # which would draw from the global generator
            with torch.no_grad():
                linear.weight.copy_(torch.randn(d_out, d_in, generator=generator) / d_in**0.5)
                linear.bias.zero_()
            return linear

        self.sense = nn.Sequential(layer(pixels, _HIDDEN), nn.ReLU(), layer(_HIDDEN, measurements))
        self.decode = nn.Sequential(layer(measurements, _HIDDEN), nn.ReLU(), layer(_HIDDEN, pixels))

    def forward(self, images: Images) -> Images:
        return self.decode(self.sense(images.flatten(1))).view_as(images)


@functools.cache
def _digits() -> tuple[Images, Int[Tensor, "image"]]:
    """scikit-learn's digits, from 0 to 1, and which each is."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's: pip install 'hijack-lens[tasks]'") from error
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)


def _batch(images: Images, digits: Int[Tensor, "image"], answers: Float[Tensor, "image digit"]) -> Batch:
    """Images whose rows are tokens; the last asks for the digit."""
    asked = torch.zeros(len(images), _SIDE, dtype=torch.bool)
    asked[:, -1] = True
    return Batch(images, digits[:, None] * asked, asked, {"digit": digits, "answers": answers})


def _wrong(said: Float[Tensor, "prompt pos digit"], batch: Batch) -> float:
    """The share of images named wrong."""
    return float((said[:, -1].argmax(-1) != batch.latent["digit"]).double().mean())
