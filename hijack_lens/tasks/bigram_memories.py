"""Bigrams that the weights hold and the context overrides: the question of this library as one task among others."""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_count,
    check_number,
    check_type,
    fixed_seed,
    shown,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.language import BigramLanguage
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import added_without, decoded, moved_to_class, nats, residual_points, watched_loss
from hijack_lens.tasks.outputs import NextToken
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
from hijack_lens.training.data import mixed_seed

_WATCHED = 1024
"""Prompts that are looked at while training."""

_MEASURED = 4096
"""Prompts that losses are measured on."""

_PROBED = 1024
"""Of these, or of a conflict's, the prompts that probes, moves and ablations take."""

_REPEATS = 3.0
"""Of the conflict whose prompts are opened."""

_FLOOR = 1e-9
"""Of the language's probabilities."""

_DRAWN = 8
"""Numbers that drawing a token takes."""

_WRITES, _ATTENDS, _ADDED = "after attention 1", "attention to the continuation", "added to the context"


@dataclass(frozen=True)
class BigramMemories(NextToken):
    """A bigram language in which the context may overrule the weights: after Bietti et al. (arXiv 2306.00802).

    Sequences follow a bigram language, but each token is, with a probability and for one sequence, a trigger: always
    followed by the same token, which was drawn uniformly. So the weights must hold the bigrams, and the context says
    which tokens are triggers, and of what. Exact Bayes weighs, for each token, what followed it so far under either.
    The model is that of this library, trained: two layers of one head each, with MLPs and learned positions.

    Attributes:
        d_vocab: tokens.
        concentration: of the Dirichlet distribution of the bigrams' rows; less is sharper.
        triggered: the probability that a token is a trigger.
        length: tokens per prompt.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        world: seed of the language.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.BigramMemories(d_vocab=5, length=20)
        >>> task.bigrams.shape, task.doses[-1]
        (torch.Size([5, 5]), 8.0)
        >>> denied = task.conflict(2, n=3, seed=0)
        >>> denied.inputs[0], int(denied.latent["continuation"][0])
        (tensor([3, 3, 4, 0, 4, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]), 0)
        >>> for name, said in task.references(denied).items():
        ...     print(name, [round(p, 2) for p in said[0, -1].tolist()])
        bayes [0.96, 0.01, 0.03, 0.0, 0.0]
        context [1.0, 0.0, 0.0, 0.0, 0.0]
        weights [0.1, 0.23, 0.59, 0.03, 0.05]
    """

    d_vocab: int = 16
    concentration: float = 0.3
    triggered: float = 0.5
    length: int = 48
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 1
    world: int = 0
    schedule: Schedule = Schedule(1000, lr=5e-3, warmup=100, final_lr=0.02, weight_decay=0.1)  # noqa: RUF009 (frozen)

    name: ClassVar[str] = "bigram memories"
    source: ClassVar[str] = "after Bietti et al., arXiv 2306.00802, section 3: triggers drawn per sequence"
    dose: ClassVar[str] = "times the context says otherwise"
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar("the loss is within 0.05 nats of exact Bayes", "loss", "above bayes", "at most", 0.05),
        Bar("the second layer's head attends to the continuation", _ATTENDS, "most of layer 1", "at least", 0.6),
        Bar("without it the context's answer is lost", _ADDED, "most of heads in layer 1", "at least", 1.0),
        Bar("so it is without the first layer's", _ADDED, "most of heads in layer 0", "at least", 1.0),
        Bar("the continuation is decoded after the second attention", "decodability", _WRITES, "at least", 0.95),
        Bar("another's mean there turns the prediction to it", "moved KL", _WRITES, "at most", 0.1),
        Bar("as long a step in a random direction does not", "random KL", _WRITES, "at least", 0.5),
        Bar("nor does the mean after the first layer", "moved KL", "after MLP 0", "at least", 0.8),
        Bar("said once, the context does not yet decide alone", "share", "1", "at most", 0.9),
        Bar("said eight times, it decides", "share", "8", "at least", 0.9),
    )

    def __post_init__(self) -> None:
        for name, minimum in (("d_vocab", 3), ("length", 2), ("d_model", 1), ("n_layers", 1), ("n_heads", 1)):
            check_count(name, getattr(self, name), minimum=minimum)
        check_number("concentration", self.concentration, positive=True)
        if not 0 < check_number("triggered", self.triggered) < 1:
            raise ValueError(f"triggered must be between 0 and 1, got {shown(self.triggered)}")
        check_count("world", self.world)
        check_type("schedule", self.schedule, Schedule)

    @property
    def doses(self) -> tuple[float, ...]:
        """Strengths of the conflict to try."""
        return tuple(dose for dose in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0) if 2 * dose < self.length)

    def in_world(self, seed: int) -> "BigramMemories":
        """The task with another language."""
        return replace(self, world=check_count("seed", seed))

    @functools.cached_property
    def bigrams(self) -> Float[Tensor, "token next"]:
        """What the weights must hold: in each row, the probabilities of the next token."""
        language = BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=self.world)
        rows = language.floored(_FLOOR).pi_b
        return rows / rows.sum(-1, keepdim=True)

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latent is, per token, its "continuation" in this sequence, or -1."""
        n, generator = prompt_count(n, _DRAWN * self.length + 2 * self.d_vocab), as_generator(seed)
        drawn = torch.randint(self.d_vocab, (n, self.d_vocab), generator=generator)
        is_trigger = torch.rand(n, self.d_vocab, generator=generator) < self.triggered
        forced = torch.where(is_trigger, drawn, -1)
        return self._prompts(forced, torch.full((n, self.length), -1), self.bigrams, generator, forced)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts that end with a token which another has followed before, so many times and nothing else.

        That other one, the "continuation", is not the token that the weights say first. No other token is a trigger.
        """
        repeats, n = check_number("strength", strength), prompt_count(n, _DRAWN * self.length + self.d_vocab**2)
        if repeats != int(repeats) or 2 * repeats >= self.length:
            raise ValueError(f"strength must be a number of repeats below {self.length / 2:g}, got {shown(strength)}")
        generator = as_generator(seed)
        asked = torch.randint(self.d_vocab, (n,), generator=generator)
        first = self.bigrams.argmax(-1)[asked]
        allowed = torch.ones(n, self.d_vocab).scatter_(1, torch.stack([asked, first], 1), 0)
        continuation = torch.multinomial(allowed, 1, generator=generator)
        forced = torch.full((n, self.d_vocab), -1).scatter_(1, asked[:, None], continuation)
        pairs = torch.rand(n, (self.length - 1) // 2, generator=generator).argsort(1)[:, : int(repeats)]
        written = torch.full((n, self.length), -1)
        written.scatter_(1, 2 * pairs, asked[:, None].expand(-1, int(repeats)))
        written[:, -1] = asked
        others = self.bigrams.expand(n, -1, -1).clone()
        others.scatter_(2, asked[:, None, None].expand(-1, self.d_vocab, 1), 0)
        return self._prompts(forced, written, others, generator, continuation[:, 0])

    def _prompts(
        self,
        forced: Int[Tensor, "prompt token"],
        written: Int[Tensor, "prompt pos"],
        pi_b: Tensor,
        generator: torch.Generator,
        continuation: Tensor,
    ) -> Batch:
        """Prompts of tokens that are written there, else forced by the one before, else drawn from its row."""
        n, length = written.shape
        cumulated = (pi_b / pi_b.sum(-1, keepdim=True)).cumsum(-1).expand(n, -1, -1)
        uniform, rows = torch.rand(length + 1, n, 1, generator=generator, dtype=torch.float64), torch.arange(n)
        tokens = torch.empty(n, length + 1, dtype=torch.long)
        current = torch.randint(self.d_vocab, (n,), generator=generator)  # before the first
        for position in range(length + 1):
            drawn = torch.searchsorted(cumulated[rows, current], uniform[position])[:, 0]
            must = forced[rows, current]
            current = torch.where(must >= 0, must, drawn.clamp_max(self.d_vocab - 1))
            if position < length:
                current = torch.where(written[:, position] >= 0, written[:, position], current)
            tokens[:, position] = current
        mask = torch.ones(n, length, dtype=torch.bool)
        return Batch(tokens[:, :-1], tokens[:, 1:], mask, {"continuation": continuation})

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes"; the bigrams as the "weights"' answer; what followed each token so far as the "context"'s.

        Of a token that is new, the context says all tokens alike.
        """
        check_batch(batch, ["continuation"], None, self.d_vocab)
        n, length = batch.inputs.shape
        check_memory(8 * 8 * n * length * self.d_vocab, batch=n)
        pi_b, inputs = self.bigrams, batch.inputs
        # Before each position: how often each token followed this position's token.
        steps = F.one_hot(inputs[:, 1:], self.d_vocab).double()
        earlier = torch.ones(length, length - 1, dtype=torch.double).tril(-1)
        same = (inputs[:, :, None] == inputs[:, None, :-1]) * earlier
        followed = same @ steps
        seen = followed.sum(-1)
        free = math.log(1 - self.triggered) + torch.xlogy(followed, pi_b[inputs]).sum(-1)
        trigger = math.log(self.triggered) - math.log(self.d_vocab) * (seen > 0).double()
        trigger = trigger.masked_fill((followed > 0).sum(-1) > 1, -math.inf)
        share = torch.sigmoid(trigger - free)[..., None]
        context = torch.where(seen[..., None] > 0, followed / seen[..., None].clamp_min(1), 1 / self.d_vocab)
        weights = pi_b[inputs]
        return {"bayes": share * context + (1 - share) * weights, "context": context, "weights": weights}

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss."""
        return {"loss": watched_loss(self, model, _WATCHED, seed)}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Losses; and, in a conflict, where the context's answer is, what moving it does, and what each part is worth.

        The conflict's prompts say it three times. Decodability of the continuation is a linear probe's accuracy at the
        last position, where it is moved, too; "moved KL" is the divergence from the token moved to, over what it is
        unmoved. "error added without" is what mean ablation of a component adds to the loss, and "added to the context"
        to that of the conflict's continuation. "attention" is the mean of a head's, in the conflict's prompts: to the
        token before, and of the last position, to the continuation.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch, self)
        with torch.no_grad():
            said = {"model": self.predictions(logits_of(model, batch.inputs)), **self.references(batch)}
        losses = {name: nats(said[name], batch.targets) for name in ("model", "bayes", "weights")}
        rows = [("loss", name, value) for name, value in losses.items()]
        rows.append(("loss", "above bayes", losses["model"] - losses["bayes"]))

        denied = self.conflict(min(_REPEATS, self.doses[-1]), _PROBED, mixed_seed(seed, "denied", 0))
        untrained = self.model(mixed_seed(seed, "weights", 0))
        points = residual_points(self.n_layers)
        rows += decoded(decodability(model, untrained, denied, "continuation", points.values()), points)
        rows += moved_to_class(model, denied, "continuation", points, seed)
        batch = batch[:_PROBED]
        rows += added_without(model, batch, lambda outputs: float(self.loss(outputs, batch)))
        asked = denied.latent["continuation"]
        costs = added_without(model, denied, lambda outputs: float(F.cross_entropy(outputs[:, -1].double(), asked)))
        added = {where: value for _, where, value in costs}
        rows += [(_ADDED, *cost) for cost in added.items()]
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.n_layers)]
        patterns = record(model, denied.inputs, names)[1]
        copied = F.pad(denied.inputs[:, :-1] == denied.inputs[:, -1:], (1, 0))[:, None]
        for layer, name in enumerate(names):
            heads = [f"L{layer}H{head}" for head in range(self.n_heads)]
            before = patterns[name].diagonal(-1, 2, 3).double().mean((0, 2)).tolist()
            found = (patterns[name][:, :, -1] * copied).sum(-1).double().mean(0).tolist()
            rows += [("attention to the token before", *one) for one in zip(heads, before, strict=True)]
            rows += [(_ATTENDS, *one) for one in zip(heads, found, strict=True)]
            rows.append((_ATTENDS, f"most of layer {layer}", max(found)))
            rows.append((_ADDED, f"most of heads in layer {layer}", max(added[head] for head in heads)))
        return pd.DataFrame(rows, columns=["measure", "where", "value"])
