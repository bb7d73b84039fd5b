"""Latent concepts on tokens: each prompt follows one of a few bigram tables, and does not say which."""

import functools
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
    check_tokens,
    check_type,
    fixed_seed,
    shown,
)
from hijack_lens.core.memory import check_memory
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.language import BigramLanguage
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.measures import added_without, decoded, nats, residual_points
from hijack_lens.tasks.outputs import NextToken
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

_MEASURED = 4096
"""Prompts that losses are measured on."""

_PROBED = 2048
"""Of these, the prompts that probes and moves take."""

_DRAWN = 8
"""Numbers that drawing a token takes."""

_FLOOR = 1e-9
"""Of the tables' probabilities: sharp draws can come out as 0, and no token shall rule a table out for good."""

_WRITES = "after attention 1"
"""Where the second layer's attention has written which table it is."""


@dataclass(frozen=True)
class LatentConcepts(NextToken):
    """Bigram tables as concepts: a tokens' analogue of Han et al. (arXiv 2412.12276), whose concepts are linear maps.

    A prompt's first token is uniform; each next one is drawn from a table's row, the same table all along. So the exact
    Bayes prediction is the tables' rows, weighted by the posterior over tables.

    Attributes:
        d_vocab: tokens.
        n_tables: concepts.
        concentration: of the Dirichlet distribution of the tables' rows; less is sharper.
        length: tokens per prompt.
        d_model: the model's width.
        n_layers: its blocks.
        n_heads: its heads per block.
        world: seed of the tables.
        schedule: of the training.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8)
        >>> task.tables.shape
        torch.Size([2, 6, 6])
        >>> batch = task.sample(4, seed=0)
        >>> batch.latent["table"], task.posterior(batch.inputs)[:, -1].argmax(-1)
        (tensor([0, 1, 1, 0]), tensor([0, 1, 1, 0]))
    """

    d_vocab: int = 16
    n_tables: int = 4
    concentration: float = 0.3
    length: int = 32
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    world: int = 0
    schedule: Schedule = Schedule(1600, lr=8e-3, warmup=100, final_lr=0.02, weight_decay=0.1)  # noqa: RUF009 (frozen)

    name: ClassVar[str] = "latent concepts"
    source: ClassVar[str] = "after Han et al., arXiv 2412.12276, sections 3 and 4: an analogue on tokens"
    dose: ClassVar[str] = "last steps that follow another table"
    doses: ClassVar[tuple[float, ...]] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar("the loss is within 0.03 nats of exact Bayes", "loss", "above bayes", "at most", 0.03),
        Bar("the table is decoded after the second attention", "decodability", _WRITES, "at least", 0.85),
        Bar("as the loss falls, decodability rises", "rank correlation", "decodability", "at least", 0.7),
        Bar("another table's mean there turns the prediction to that table", "moved KL", _WRITES, "at most", 0.2),
        Bar("as long a step in a random direction does not", "random KL", _WRITES, "at least", 0.5),
        Bar("nor does the mean after the first layer", "moved KL", "after MLP 0", "at least", 0.5),
        Bar("nor after the last MLP", "moved KL", "after MLP 1", "at least", 0.5),
    )

    def __post_init__(self) -> None:
        for name, minimum in (("d_vocab", 2), ("n_tables", 2), ("length", 2), ("d_model", 1), ("n_heads", 1)):
            check_count(name, getattr(self, name), minimum=minimum)
        check_count("n_layers", self.n_layers, minimum=1)
        check_number("concentration", self.concentration, positive=True)
        check_count("world", self.world)
        check_type("schedule", self.schedule, Schedule)

    def in_world(self, seed: int) -> "LatentConcepts":
        """The task with other tables."""
        return replace(self, world=check_count("seed", seed))

    @functools.cached_property
    def tables(self) -> Float[Tensor, "table token next"]:
        """The concepts: in each row, the probabilities of the next token."""
        seeds = [mixed_seed(self.world, "table", index) for index in range(self.n_tables)]
        return torch.stack(
            [
                BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=seed).floored(_FLOOR).pi_b
                for seed in seeds
            ]
        )

    def sample(self, n: int, seed: Seed) -> Batch:
        """Prompts; the latent is the "table" of each."""
        n, generator = prompt_count(n, _DRAWN * self.length), as_generator(seed)
        table = torch.randint(self.n_tables, (n,), generator=generator)
        return self._prompts(table[:, None].expand(-1, self.length), {"table": table}, generator)

    def conflict(self, strength: float, n: int, seed: Seed) -> Batch:
        """Prompts whose last steps, as many as the strength says, follow another table.

        The latents are the "table" of the steps before, and the "denying" one. The last token's own row in the denying
        table is what the recent context says; that in the other one, what the tables of the weights make of the rest.
        """
        last, n = check_number("strength", strength), prompt_count(n, _DRAWN * self.length)
        generator = as_generator(seed)
        if last != int(last) or last >= self.length:
            raise ValueError(f"strength must be a number of steps below {self.length}, got {shown(strength)}")
        table = torch.randint(self.n_tables, (n,), generator=generator)
        denying = (table + 1 + torch.randint(self.n_tables - 1, (n,), generator=generator)) % self.n_tables
        steps = torch.arange(self.length) >= self.length - 1 - int(last)
        return self._prompts(
            torch.where(steps, denying[:, None], table[:, None]), {"table": table, "denying": denying}, generator
        )

    def _prompts(
        self, table: Int[Tensor, "prompt pos"], latent: dict[str, Tensor], generator: torch.Generator
    ) -> Batch:
        """Prompts whose step from each position follows the table given there."""
        n, length = table.shape
        tokens = torch.empty(n, length + 1, dtype=torch.long)
        tokens[:, 0] = torch.randint(self.d_vocab, (n,), generator=generator)
        cumulated, drawn = self.tables.cumsum(-1), torch.rand(length, n, 1, generator=generator, dtype=torch.float64)
        for step in range(length):
            rows = cumulated[table[:, step], tokens[:, step]]
            tokens[:, step + 1] = torch.searchsorted(rows, drawn[step])[:, 0].clamp_max(self.d_vocab - 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(n, length, dtype=torch.bool), latent)

    def posterior(self, inputs: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos table"]:
        """The probability of each table, given the tokens up to each position; all tables are equally likely before."""
        inputs = check_tokens("inputs", inputs, self.d_vocab)
        inputs = inputs if inputs.ndim == 2 else inputs[None]
        steps = self.tables.log()[:, inputs[:, :-1], inputs[:, 1:]].movedim(0, -1)
        return F.pad(steps.cumsum(1), (0, 0, 1, 0)).softmax(-1)

    def references(self, batch: Batch) -> dict[str, Predictions]:
        """The exact "bayes", the prompt's own table as "oracle", and the "average" table.

        Of a conflict's prompts, the denying table's row as "context" and the other's as "weights", and no oracle.
        """
        check_batch(batch, ["table"], None, self.d_vocab)
        check_memory(2 * 8 * batch.inputs.numel() * self.d_vocab * self.n_tables, batch=len(batch))
        rows = self.tables[:, batch.inputs].movedim(0, -1)  # prompt, pos, next, table
        found = {
            "bayes": (rows * self.posterior(batch.inputs)[:, :, None]).sum(-1),
            "average": rows.mean(-1),
        }
        of = {
            name: rows.gather(-1, table[:, None, None, None].expand(*rows.shape[:-1], 1))[..., 0]
            for name, table in batch.latent.items()
        }
        if "denying" in of:
            return {**found, "context": of["denying"], "weights": of["table"]}
        return {**found, "oracle": of["table"]}

    def watch(self, model: RealTransformer, seed: int) -> dict[str, float]:
        """The loss, and how well the table is decoded after the second attention, at the last position."""
        batch = self.sample(_WATCHED, mixed_seed(fixed_seed(seed), "watched", 0))
        check_fits(model, batch, self)
        with torch.no_grad():
            loss = float(self.loss(model(batch.inputs), batch))
        score = decodability(model, model, batch, "table", self._points[self._writes])["score"]
        return {"loss": loss, "decodability": float(score.iloc[0])}

    def measure(self, model: RealTransformer, seed: int) -> pd.DataFrame:
        """Losses, decodability of the table by place and position, what moving it does, and what components are worth.

        Decodability is a linear probe's accuracy at the last position, beside the untrained model's and what the exact
        posterior allows. KL is that of the model's last prediction from the row of the table moved to, as a fraction of
        what it is where nothing is moved, in nats under "unmoved KL". "error added without" is what mean ablation
        of a component adds to the loss.
        """
        batch = self.sample(_MEASURED, mixed_seed(fixed_seed(seed), "measured", 0))
        check_fits(model, batch, self)
        untrained = self.model(mixed_seed(seed, "weights", 0))
        with torch.no_grad():
            said = {"model": self.predictions(logits_of(model, batch.inputs)), **self.references(batch)}
        losses = {name: nats(one, batch.targets) for name, one in said.items()}
        rows = [("loss", name, value) for name, value in losses.items()]
        rows.append(("loss", "above bayes", losses["model"] - losses["bayes"]))
        batch = batch[:_PROBED]

        points, last = self._points, self.length - 1
        scores = decodability(model, untrained, batch, "table", points.values())
        rows += decoded(scores, points)
        positions = sorted({last * part // 4 for part in range(5)})
        by_position = decodability(model, untrained, batch, "table", points[self._writes], positions)
        best = (self.posterior(batch.inputs).argmax(-1) == batch.latent["table"][:, None]).double().mean(0)
        for one in by_position.itertuples():
            rows += [
                ("decodability by position", str(one.position), one.score),
                ("decodability by position untrained", str(one.position), one.untrained),
                ("decodability by position bayes", str(one.position), float(best[one.position])),
            ]
        for name, point in points.items():
            moved = move_latent(model, batch, "table", point, seed=mixed_seed(seed, "moved", 0))
            wanted = self.tables[moved.to, moved.batch.inputs[:, -1]]
            kl = {
                kind: float(_kl(wanted, self.predictions(outputs)[:, -1]).mean())
                for kind, outputs in (("moved", moved.outputs), ("random", moved.at_random), ("un", moved.unmoved))
            }
            rows += [
                ("moved KL", name, kl["moved"] / kl["un"]),
                ("random KL", name, kl["random"] / kl["un"]),
                ("unmoved KL", name, kl["un"]),
            ]
        rows += added_without(model, batch, lambda outputs: float(self.loss(outputs, batch)))
        return pd.DataFrame(rows, columns=["measure", "where", "value"])

    @property
    def _points(self) -> dict[str, str]:
        """The residual stream's hook points, by what has written last."""
        return residual_points(self.n_layers)

    @property
    def _writes(self) -> str:
        return f"after attention {self.n_layers - 1}"


def _kl(p: Float[Tensor, "prompt next"], q: Float[Tensor, "prompt next"]) -> Float[Tensor, "prompt"]:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)
