"""Relevant patterns: a prompt's labels depend on two patterns of many, and a model of attention and MLP alone."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_count,
    check_list,
    check_number,
    check_type,
    fixed_seed,
    shown,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.hooks.intervention import Intervention, logits_of, record
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import added_without, decoded, followed, residual_points, watched_loss
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

_MEASURED = 4096
"""Prompts that each error is measured on."""

_PROBED = 1024
"""Of these, the prompts that probes take."""

_CLASSIFIED = 512
"""Prompts that scikit-learn's classifiers are measured on, each fitted to one prompt alone."""

_REACH = 0.5
"""The most that an input has of an irrelevant direction."""

_LENGTHS = (2, 5, 10, 20)
_SHARES = (0.1, 0.2, 0.4, 0.8)
_SUMS = _NORMS = (0.3, 0.5, 0.7, 1.0, 1.5)
_PRUNED = (0.5, 0.9)
_FEW = 5
"""Examples per prompt for these classifiers."""

_PATTERN, _NEURONS = "blocks.0.attn.hook_pattern", "blocks.0.mlp.hook_post"
_NONE = torch.tensor([], dtype=torch.long)

Pairs = Sequence[tuple[int, int]]
"""Tasks: the pattern labelled 1, and that labelled -1."""


@dataclass(frozen=True)
class RelevantPatterns:
    """Classification by patterns, after Li et al. (arXiv 2402.15607), whose model is all attention and MLP.

    An input is one of a few relevant directions plus a random part of one of many irrelevant ones, all orthonormal. A
    task is an ordered pair of relevant patterns, the first labelled 1 and the second -1. A prompt is labelled examples,
    and a last input, of either pattern, to be labelled. An example has either pattern with half the probability
    `share`; otherwise it has one of the other relevant patterns, and a label by the toss of a coin.

    Tasks are trained whose second pattern comes soon after the first, counted round; each pattern is as often labelled
    1 as -1, and the reverse of a trained pair is an unseen one. Exact Bayes takes all pairs for equally likely.

    The model is the paper's, in a residual stream of three parts: the embedding writes the first, attention reads it
    and writes the second, and the MLP reads the second and writes the third, which alone is read out. So the
    output is the MLP's, of what attention brought, with no bias; hooks and attributions find an ordinary model.

    Attributes:
        d: directions, and dimensions of an input.
        n_relevant: of these, the relevant ones.
        length: examples per prompt.
        share: of the examples, those of the task's patterns.
        n_shifts: how soon after is soon: at most so many steps.
        delta: W_Q and W_K start as this times the identity; where `None`, as random numbers, as W_V and W_in do.
        d_mlp: neurons.
        world: seed of the directions.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.RelevantPatterns(n_relevant=4, n_shifts=1)
        >>> task.trained
        ((0, 1), (1, 2), (2, 3), (3, 0))
        >>> len(task.unseen), task.directions.shape
        (8, torch.Size([30, 30]))
        >>> f"{task.name}: {task.claims[0].statement}; {task.dose}: {task.doses[:3]}"
        'relevant patterns: unseen tasks are labelled right; examples that reverse a trained task: (1.0, 2.0, 3.0)'
        >>> batch = task.sample(1000, seed=0)
        >>> said = task.references(batch)["bayes"][:, -1, 0]
        >>> float((said.sign() == batch.latent["label"]).double().mean())
        1.0
    """

    d: int = 30
    n_relevant: int = 6
    length: int = 20
    share: float = 0.8
    n_shifts: int = 2
    delta: float | None = 2.0
    d_mlp: int = 64
    world: int = 0
    schedule: Schedule = Schedule(400, warmup=20, evaluate_every=25, checkpoint_every=200)  # noqa: RUF009 (frozen)

    source: ClassVar[str] = "after Li et al., arXiv 2402.15607, sections 2 and 3: no residual paths"
    dose: ClassVar[str] = "examples that reverse a trained task"

    def __post_init__(self) -> None:
        for name, minimum in (("d", 4), ("n_relevant", 3), ("length", 1), ("n_shifts", 1), ("d_mlp", 1)):
            check_count(name, getattr(self, name), minimum=minimum)
        if self.n_relevant >= self.d:
            raise ValueError(f"n_relevant must be less than d={self.d}, got {shown(self.n_relevant)}")
        if 2 * self.n_shifts >= self.n_relevant:
            raise ValueError(f"n_shifts must be less than half of n_relevant={self.n_relevant}, got {self.n_shifts}")
        if check_number("share", self.share, positive=True) > 1:
            raise ValueError(f"share must be at most 1, got {shown(self.share)}")
        if self.delta is not None:
            check_number("delta", self.delta)
        check_count("world", self.world)
        check_type("schedule", self.schedule, Schedule)

    @property
    def name(self) -> str:
        """Which start of the training."""
        return "relevant patterns" + ("" if self.delta is not None else " from random attention")

    @property
    def doses(self) -> tuple[float, ...]:
        """Strengths of the conflict to try."""
        return tuple(dose for dose in (1.0, 2.0, 3.0, 5.0, 10.0, 20.0) if dose <= self.length)

    @property
    def claims(self) -> tuple[Bar, ...]:
        """The acceptance numbers, by how training starts."""
        if self.delta is None:
            return (
                Bar("the trained pairs are learned", "error", "trained", "at most", 0.03),
                Bar("pairs neither of whose orders was trained are not", "error", "strange", "at least", 0.1),
                Bar("attention to the examples of the input's pattern falls", "attention", "gained", "at most", 0.0),
            )
        return (
            Bar("unseen tasks are labelled right", "error", "unseen", "at most", 0.01),
            Bar("so are mixed patterns of norm 1", "error by norm", "1", "at most", 0.06),
            Bar("those of norm 0.5 are not", "error by norm", "0.5", "at least", 0.15),
            Bar("at norm 1, coefficients may well sum to 0.5", "error by sum", "0.5", "at most", 0.06),
            Bar("attention concentrates on the input's pattern", "attention", "gained", "at least", 0.15),
            Bar("the 90% least neurons add no error", "error added, least pruned", "0.9", "at most", 0.01),
            Bar("the 90% largest do", "error added, largest pruned", "0.9", "at least", 0.05),
            Bar("all examples reversed, the context decides", "share", f"{self.doses[-1]:g}", "at least", 0.9),
        )

    def in_world(self, seed: int) -> "RelevantPatterns":
        """The task with other directions."""
        return replace(self, world=check_count("seed", seed))

    @functools.cached_property
    def directions(self) -> Float[Tensor, "direction d"]:
        """Orthonormal directions, the relevant ones first."""
        check_memory(3 * 8 * self.d**2, d=self.d)
        drawn = torch.randn(self.d, self.d, generator=as_generator(self.world), dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.T.contiguous()

    @property
    def trained(self) -> tuple[tuple[int, int], ...]:
        """The pairs that are trained."""
        m = self.n_relevant
        return tuple((a, (a + shift) % m) for a in range(m) for shift in range(1, self.n_shifts + 1))

    @property
    def unseen(self) -> tuple[tuple[int, int], ...]:
        """All other pairs."""
        return tuple(pair for pair in itertools.permutations(range(self.n_relevant), 2) if pair not in self.trained)

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts of trained tasks; the latents are the pair as "task", and the "label" of the last input."""
        return self.prompts(self.trained, n, seed)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts of as many examples as the strength says, of trained tasks with all labels reversed."""
        count = check_number("strength", strength)
        if count != int(count) or count > self.length:
            raise ValueError(f"strength must be a number of examples up to {self.length}, got {shown(strength)}")
        return self.prompts([(b, a) for a, b in self.trained], n, seed, int(count))

    def prompts(
        self,
        pairs: Pairs,
        n: int,
        seed: Seed,
        length: int | None = None,
        mixed: float | None = None,
        size: float = 1.0,
    ) -> Batch:
        """Prompts of chosen tasks, equally likely.

        Args:
            pairs: the tasks: the pattern labelled 1, and that labelled -1.
            n: prompts.
            seed: of the draws.
            length: examples per prompt; by default the task's, which is also the most.
            mixed: where given, each prompt has patterns of its own, again orthonormal, mixed from the relevant ones at
                random; the coefficients of each of the task's two have this sum. It is at most sqrt(n_relevant / 2).
            size: the norm of the patterns.

        Raises:
            TypeError, ValueError: for an invalid argument.

        Examples:
            >>> task = hl.tasks.RelevantPatterns()
            >>> batch = task.prompts(task.unseen, n=4, seed=0, length=5)
            >>> batch.inputs.shape, batch.latent["task"].tolist()
            (torch.Size([4, 6, 31]), [[0, 3], [2, 0], [5, 4], [1, 4]])
        """
        m = self.n_relevant
        chosen = check_list("pairs", pairs, "pairs of patterns")
        if not chosen or not all(
            isinstance(one, tuple) and len(one) == 2 and one[0] != one[1] and all(a in range(m) for a in one)
            for one in chosen
        ):
            raise ValueError(f"pairs must be pairs of different patterns below {m}, got {shown(pairs)}")
        length = self.length if length is None else check_count("length", length)
        if length > self.length:
            raise ValueError(f"length must be at most {self.length}, got {shown(length)}")
        n = prompt_count(n, 4 * (length + 1) * (self.d + 1) + (3 * m * (m + self.d) if mixed is not None else 0))
        generator = as_generator(seed)

        def integers(most: int, *shape: int) -> Int[Tensor, "..."]:
            return torch.randint(most, shape, generator=generator)

        def uniform(*shape: int) -> Float[Tensor, "..."]:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        pair = torch.tensor(chosen)[integers(len(chosen), n)]
        asked = uniform(n, length + 1) < self.share
        asked[:, -1] = True
        side = integers(2, n, length + 1)  # which of the two patterns; for the others, which label
        other = integers(m - 2, n, length + 1)
        for one in pair.sort(1).values.unbind(1):  # the others' ranks become patterns, past either of the two
            other += other >= one[:, None]
        pattern = torch.where(asked, pair.gather(1, side), other)
        relevant = check_number("size", size) * self.directions[:m].expand(n, -1, -1)
        if mixed is not None:
            relevant = self._mixed(check_number("mixed", mixed), pair, generator) @ relevant
        x = relevant.gather(1, pattern[..., None].expand(-1, -1, self.d))
        part = _REACH * (2 * uniform(n, length + 1, 1) - 1)
        x = x + part * self.directions[m + integers(self.d - m, n, length + 1)]
        label = 1.0 - 2 * side
        shown_labels = label.clone()
        shown_labels[:, -1] = 0
        mask = torch.zeros(n, length + 1, dtype=torch.bool)
        mask[:, -1] = True
        inputs = torch.cat([x, shown_labels[..., None]], -1).float()
        return Batch(inputs, label * mask, mask, {"task": pair, "label": label[:, -1].long()})

    def _mixed(
        self, total: float, pair: Int[Tensor, "prompt two"], generator: torch.Generator
    ) -> Float[Tensor, "prompt relevant relevant"]:
        """Orthogonal matrices whose two rows of the pair sum to the total."""
        m = self.n_relevant
        along = total / math.sqrt(m)  # the part of either row on the direction of equal coefficients
        if 2 * along**2 > 1:
            raise ValueError(f"mixed must be at most sqrt({m} / 2), got {shown(total)}")
        drawn = torch.randn(len(pair), m, m, generator=generator, dtype=torch.float64)
        drawn[:, :, 0] = 1
        basis = torch.linalg.qr(drawn).Q.mT
        equal, u, v = basis[:, 0] * basis[:, 0].sum(-1, keepdim=True).sign(), basis[:, 1], basis[:, 2]
        common = math.sqrt(0.5 - along**2)
        mean, third = along * equal + common * u, math.sqrt(2) * (common * equal - along * u)
        rows = torch.stack([mean + v / math.sqrt(2), mean - v / math.sqrt(2), third, *basis[:, 3:].unbind(1)], 1)
        first = torch.zeros(len(pair), m).scatter(1, pair, torch.tensor([[2.0, 1.0]]).expand(len(pair), -1))
        return rows.gather(1, first.argsort(1, descending=True).argsort(1)[..., None].expand(-1, -1, m))

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained model: of one layer and head, no positions, and a residual stream of three parts."""
        n, delta = self.d + 1, self.delta
        sizes: dict[str, Any] = {"d_model": 2 * n + 1, "n_layers": 1, "n_heads": 1, "d_mlp": self.d_mlp}
        model = RealTransformer(n, 1, self.length + 1, **sizes, norm=None, positions="none", seed=seed, device="cpu")
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        read, brought, said = slice(n), slice(n, 2 * n), slice(2 * n, None)

        def only(weight: Tensor, rows: slice, columns: slice, value: Tensor | None = None) -> None:
            kept = weight[rows, columns].clone() if value is None else value
            weight.zero_()
            weight[rows, columns] = kept

        with torch.no_grad():
            only(model.W_E, slice(None), read, torch.eye(n))
            for weight in (attn.W_Q[0], attn.W_K[0]):
                only(weight, read, read, None if delta is None else delta * torch.eye(n))
            only(attn.W_V[0], read, read)
            only(attn.W_O[0], read, brought, torch.eye(n))
            only(mlp.W_in, brought, slice(None))
            # As in the paper, where half of the neurons speak for either label.
            sides = 1.0 - 2 * (torch.arange(self.d_mlp)[:, None] % 2)
            only(mlp.W_out, slice(None), said, sides / math.sqrt(self.d_mlp))
            only(model.W_U, said, slice(None), torch.ones(1, 1))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[-1] in ("W_Q", "W_K", "W_V", "W_in"))
        reads = torch.zeros(2 * n + 1, 1)
        reads[brought] = 1
        mlp.W_in.register_hook(lambda grad: grad * reads.to(grad))  # elsewhere all gradients are 0 as it is
        return model

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """The hinge loss."""
        check_outputs(outputs, 1, batch)
        return (1 - batch.targets * outputs[..., 0])[batch.mask].relu().mean()

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """The label as a number from -1 to 1, beyond which the hinge loss asks for nothing."""
        check_outputs(outputs, 1)
        return outputs.double().clamp(-1, 1)

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The label that exact "bayes" expects, the examples' as "context", and that of the trained pair as "weights".

        Where neither order of a prompt's pair was trained, the weights say 0. All say 0 before the last position.
        """
        pattern, label = self._seen(batch)
        task = batch.latent["task"]
        trained = torch.zeros(self.n_relevant, self.n_relevant, dtype=torch.float64)
        trained[tuple(torch.tensor(self.trained).T)] = 1
        context = batch.latent["label"].double()
        found = {
            "bayes": self._expected(pattern, label),
            "context": context,
            "weights": context * (trained - trained.T)[task[:, 0], task[:, 1]],
        }
        return {name: _last(values, batch) for name, values in found.items()}

    def _seen(self, batch: Batch) -> tuple[Int[Tensor, "prompt pos"], Float[Tensor, "prompt example"]]:
        """Which pattern each input has, and the examples' labels."""
        check_batch(batch, ["task", "label"], self.d + 1)
        found = batch.inputs[..., : self.d].double() @ self.directions[: self.n_relevant].T
        pattern = found.argmax(-1)
        off = found - torch.nn.functional.one_hot(pattern, self.n_relevant)
        if float(off.abs().max()) > 1e-4 or batch.inputs.shape[1] > self.length + 1:
            raise ValueError(f"batch must be of this task's prompts, of its own patterns, got {shown(batch.inputs)}")
        return pattern, batch.inputs[:, :-1, self.d].double()

    def _expected(
        self, pattern: Int[Tensor, "prompt pos"], label: Float[Tensor, "prompt example"]
    ) -> Float[Tensor, "prompt"]:
        """The mean label of the last input, over the second pattern of the task and over which is labelled 1."""
        m, own = self.n_relevant, pattern[:, -1:]
        of_pattern = torch.nn.functional.one_hot(pattern[:, :-1], m).double()
        counts = of_pattern.sum(1)
        said = torch.stack([(of_pattern * (label == side)[..., None]).sum(1) for side in (1, -1)], -1)
        fits = counts.gather(1, own) + counts  # by the second pattern, the examples of either
        either, other = torch.tensor([self.share / 2, (1 - self.share) / (2 * (m - 2))], dtype=torch.float64)
        log_p = torch.xlogy(fits, either) + torch.xlogy(label.shape[1] - fits, other)
        # If the own pattern is labelled 1, no example of it says -1, nor one of the second pattern 1.
        wrong = said.gather(1, own[..., None].expand(-1, -1, 2)).flip(-1) + said
        log_p = log_p[..., None].masked_fill(wrong > 0, -math.inf)
        log_p = log_p.masked_fill(torch.nn.functional.one_hot(own[:, 0], m)[..., None] == 1, -math.inf)
        one, minus = log_p.flatten(1).softmax(1).unflatten(1, (m, 2)).sum(1).unbind(-1)
        return one - minus

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss on trained tasks, and the error on unseen ones."""
        seed = fixed_seed(seed)
        loss = watched_loss(self, model, _WATCHED, seed)
        unseen = self.prompts(self.unseen, _WATCHED, mixed_seed(seed, "watched", 1))
        return {"loss": loss, "unseen error": _error(model, unseen)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Errors on unseen prompts of many kinds, attention to the input's pattern, pruning, and decodability.

        An error is the share of prompts labelled wrong. Unseen pairs are "reversed" trained ones, or "strange": trained
        in neither order. By norm, mixed patterns whose coefficients sum to 1 are scaled; by sum, their norm is 1.
        Neurons are pruned by the norm of their weights W_in. Attention is that of the last position, added up over the
        examples of its own pattern; decodability, that of the label there by a linear probe.
        """
        seed = fixed_seed(seed)
        drawn = itertools.count()

        def prompts(pairs: Pairs = self.unseen, of: RelevantPatterns = self, **options: Any) -> Batch:
            return of.prompts(pairs, _MEASURED, mixed_seed(seed, "measured", next(drawn)), **options)

        unseen = prompts()
        check_fits(model, unseen, self)
        untrained = self.model(mixed_seed(seed, "weights", 0))
        strange = [(a, b) for a, b in self.unseen if (b, a) not in self.trained]
        kinds = {"trained": self.trained, "reversed": [(b, a) for a, b in self.trained], "strange": strange}
        batches = {"unseen": unseen, **{name: prompts(pairs) for name, pairs in kinds.items() if pairs}}
        rows = [("error", name, _error(model, batch)) for name, batch in batches.items()]
        rows.append(("error", "bayes", _wrong(self.references(unseen)["bayes"], unseen)))
        sums = [one for one in _SUMS if 2 * one**2 <= self.n_relevant]
        changed: dict[str, dict[float, Batch]] = {
            "norm": {norm: prompts(mixed=1.0, size=norm) for norm in _NORMS},
            "sum": {total: prompts(mixed=total) for total in sums},
            "examples": {count: prompts(length=count) for count in _LENGTHS if count <= self.length},
            "share": {share: prompts(of=replace(self, share=share)) for share in _SHARES},
        }
        for what, by_value in changed.items():
            rows += [(f"error by {what}", f"{value:g}", _error(model, batch)) for value, batch in by_value.items()]
        few = prompts(length=min(_FEW, self.length))[:_CLASSIFIED]
        said = {"bayes": self.references(few)["bayes"], **_classified(few)}
        rows.append(("error of few examples", "model", _error(model, few)))
        rows += [("error of few examples", name, _wrong(one, few)) for name, one in said.items()]

        attention = [self._attention(one, unseen) for one in (model, untrained)]
        rows += [("attention", "trained", attention[0]), ("attention", "untrained", attention[1])]
        rows.append(("attention", "gained", attention[0] - attention[1]))
        order = model.blocks[0].mlp.W_in.detach().norm(dim=0).argsort()
        for fraction in _PRUNED:
            for which, chosen in (("least", order), ("largest", order.flip(0))):
                pruned = _error(model, unseen, chosen[: int(fraction * len(order))])
                rows.append((f"error added, {which} pruned", f"{fraction:g}", pruned - rows[0][2]))
        points, unseen = residual_points(1), unseen[:_PROBED]
        scores = decodability(model, untrained, unseen, "label", points.values())
        rows += decoded(scores, points)
        sides = replace(unseen, latent={"side": (unseen.latent["label"] + 1) // 2})
        for name, point in points.items():
            moved = move_latent(model, sides, "side", point, seed=mixed_seed(seed, "moved", 0))
            to = moved.to.double() * 2 - 1
            # The answer's sign is the label, whatever its size: all the way is to the mirrored answer.
            asked = 2 * to * moved.unmoved[:, -1, 0].double().abs().mean()
            rows += zip(("shift", "random shift"), (name, name), followed(moved, asked), strict=True)
        rows += added_without(model, unseen, lambda outputs: _wrong(outputs, unseen))
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    def _attention(self, model: RealTransformer, batch: Batch) -> float:
        """How much the last position attends to the examples of its pattern."""
        pattern, _ = self._seen(batch)
        paid = record(model, batch.inputs, [_PATTERN])[1][_PATTERN][:, 0, -1, :-1]
        return float((paid * (pattern[:, :-1] == pattern[:, -1:])).sum(-1).mean())


def _error(model: RealTransformer, batch: Batch, pruned: Int[Tensor, "neuron"] = _NONE) -> float:
    """The share of prompts labelled wrong, with some neurons left out."""

    def hook_fn(activation: Tensor, hook: Any) -> Tensor:
        return activation.index_fill(-1, pruned, 0.0)

    with torch.no_grad(), Intervention(model, edit=[(_NEURONS, hook_fn)]):
        return _wrong(logits_of(model, batch.inputs), batch)


def _wrong(said: Tensor, batch: Batch) -> float:
    """The share of prompts whose label is not said; 0 is a wrong answer to half of them."""
    right = said[:, -1, 0].double().sign() * batch.latent["label"]
    return float((1 - right).mean() / 2)


def _last(values: Float[Tensor, "prompt"], batch: Batch) -> Predictions:
    """The values at the last position, and 0 at all others."""
    return torch.nn.functional.pad(values[:, None], (batch.mask.shape[1] - 1, 0))[..., None]


def _classified(batch: Batch) -> dict[str, Predictions]:
    """What scikit-learn's classifiers say, each fitted to a prompt's examples alone."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("its classifiers need scikit-learn: pip install 'hijack-lens[tasks]'") from error
    inputs = batch.inputs.double().numpy()
    count = inputs.shape[1] - 1
    classifiers = {
        "logistic regression": LogisticRegression(),
        "SVM": SVC(kernel="linear"),
        "nearest neighbour": KNeighborsClassifier(1),
    }

    def label(classifier: Any, x: Any, y: Any) -> float:
        one_label = len(set(y)) == 1  # with which scikit-learn's linear classifiers cannot be fitted
        return float(y[0] if one_label else classifier.fit(x[:count], y).predict(x[count:])[0])

    said = {
        name: [label(classifier, prompt[:, :-1], prompt[:count, -1]) for prompt in inputs]
        for name, classifier in classifiers.items()
    }
    return {name: _last(torch.tensor(labels).double(), batch) for name, labels in said.items()}
