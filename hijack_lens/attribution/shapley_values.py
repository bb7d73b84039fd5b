"""How a metric is divided among components: Shapley values, interactions, and views of them."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.shapley_coalitions import (
    MIN_SAMPLES,
    CoalitionRuns,
    How,
    Overwritten,
    TakenOut,
    all_coalitions,
    check_sources,
    estimate,
    outputs_when_absent,
    shapley_interactions,
    shapley_values,
    sites_of,
)
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_count,
    check_fields,
    check_shapes,
    shown,
)
from hijack_lens.core.circuit import Circuit
from hijack_lens.core.files import Saved
from hijack_lens.core.hook_points import is_hooked
from hijack_lens.core.inputs import Components, Player, circuit_of, model_tokens, players_of
from hijack_lens.core.memory import memory_budget
from hijack_lens.core.statistics import student_quantile
from hijack_lens.core.tables import Drawn
from hijack_lens.hooks.intervention import check_reference, record
from hijack_lens.hooks.patched_runs import BoundMetric, MetricLike, check_metric

_EXACT = ("values", "interactions", "worth")
_SAMPLED = ("values", "interactions", "stderr", "interactions_stderr", "pair_samples")


@dataclass(frozen=True, repr=False)
class ShapleyValues(Saved, Drawn):
    """What each component is worth, in the metric's unit; in float64, on the CPU.

    Attributes:
        values: each player's Shapley value; they sum to `full - empty`.
        interactions: each pair's Shapley interaction index: positive if two need each other, negative if either
            can replace the other. NaN on the diagonal, and where a pair was not scored.
        players: the players along the axes.
        metric: the metric's name.
        how: what absent components write.
        at: the hook point from which on they are missing; `None` where they are missing throughout.
        full: the metric with all players present, that is, of the run itself.
        empty: the metric with none present.
        n_runs: how many coalitions were run.
        worth: the metric of every coalition, with an axis (absent, present) for each player: `worth[1, 0, 1]` is that
            with the second of three absent. `None` if values were sampled.
        stderr: standard errors of the values; this and all fields below are `None` if the values are exact.
        interactions_stderr: standard errors of the interactions.
        n_samples: the number of samples behind each value; a sample is an order of the players and its reverse.
        pair_samples: the number of samples behind each interaction.

    Examples:
        >>> values = hl.shapley(model, prompt, hl.metrics.margin(prompt))
        >>> values.exact, values.efficiency_error < 1e-4
        (True, True)
        >>> for label, alone, main, last in zip(values.labels, values.alone, values.main, values.last, strict=True):
        ...     print(f"{label}: {alone:.2f} on its own, {main:.2f} without interactions, {last:.2f} last to come")
        previous-token head: 0.00 on its own, 0.00 without interactions, 7.35 last to come
        induction head: 2.50 on its own, 2.50 without interactions, 9.85 last to come
        bigram memory: -6.58 on its own, -6.58 without interactions, -6.58 last to come
        >>> sampled = hl.shapley(model, prompt, hl.metrics.margin(prompt), "all", max_exact=1, seed=0)
        >>> sampled.ci.shape, sampled.interactions_ci.shape
        (torch.Size([4, 2]), torch.Size([4, 4, 2]))
    """

    values: Float[Tensor, "player"]
    interactions: Float[Tensor, "player player"]
    players: tuple[Player, ...]
    metric: str
    how: How
    full: float
    empty: float
    n_runs: int
    at: str | None = None
    worth: Float[Tensor, "*present"] | None = None
    stderr: Float[Tensor, "player"] | None = None
    interactions_stderr: Float[Tensor, "player player"] | None = None
    n_samples: int | None = None
    pair_samples: Int[Tensor, "player player"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        n = len(self.players)
        shapes = {"values": (n,), "interactions": (n, n), "worth": (2,) * n, "stderr": (n,)}
        shapes |= dict.fromkeys(("interactions_stderr", "pair_samples"), (n, n))
        check_shapes(self, shapes)
        for name in _EXACT if self.exact else _SAMPLED:
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be there, got None")

    @property
    def exact(self) -> bool:
        """Whether every coalition was run."""
        return self.n_samples is None

    @property
    def labels(self) -> tuple[str, ...]:
        """The players' labels."""
        return tuple(player.label for player in self.players)

    @property
    def efficiency_error(self) -> float:
        """|sum of the values - (full - empty)|; only rounding error, even if sampled."""
        return abs(float(self.values.sum()) - (self.full - self.empty))

    @property
    def alone(self) -> Float[Tensor, "player"]:
        """What each player adds when no other is present; NaN if values were sampled."""
        return self._single(present=1) - self.empty

    @property
    def last(self) -> Float[Tensor, "player"]:
        """What each player adds when all others are present, that is, its ablation effect; NaN if sampled."""
        return self.full - self._single(present=0)

    @property
    def main(self) -> Float[Tensor, "player"]:
        """Each value without the player's half of its interactions (Lundberg, Erion & Lee 2018, arXiv 1802.03888).

        With the interactions of all pairs, they sum to `full - empty`. NaN if any of a player's were not scored.
        """
        return self.values - self.interactions.clone().fill_diagonal_(0.0).sum(1) / 2

    @property
    def ci(self) -> Float[Tensor, "player 2"]:
        """Lower and upper ends of 95% confidence intervals (Student's t) of the values; the values if exact."""
        width = 0.0 if self.stderr is None or self.n_samples is None else student_quantile(self.n_samples - 1)
        half = width * (torch.zeros_like(self.values) if self.stderr is None else self.stderr)
        return torch.stack([self.values - half, self.values + half], -1)

    @property
    def interactions_ci(self) -> Float[Tensor, "player player 2"]:
        """Lower and upper ends of 95% confidence intervals of the interactions."""
        half = torch.zeros_like(self.interactions)
        if self.interactions_stderr is not None and self.pair_samples is not None:
            widths = [[student_quantile(max(1, count - 1)) for count in row] for row in self.pair_samples.tolist()]
            half = torch.tensor(widths).to(half) * self.interactions_stderr
        return torch.stack([self.interactions - half, self.interactions + half], -1)

    def __getitem__(self, label: str) -> float:
        """One player's value.

        Raises:
            KeyError: for a label that no player has.
        """
        if not isinstance(label, str) or label not in self.labels:
            raise KeyError(f"{shown(label)} is no player; there are {', '.join(self.labels)}")
        return float(self.values[self.labels.index(label)])

    def to_pandas(self) -> pd.DataFrame:
        """One row per player: label and parts, value, standard error and confidence interval, `alone` and `last`."""
        frame = pd.DataFrame({"player": self.labels, "parts": [", ".join(map(str, p.parts)) for p in self.players]})
        frame["value"] = self.values.numpy()
        frame["stderr"] = 0.0 if self.stderr is None else self.stderr.numpy()
        frame["low"], frame["high"] = (end.numpy() for end in self.ci.unbind(-1))
        return frame.assign(alone=self.alone.numpy(), last=self.last.numpy())

    def interactions_to_pandas(self) -> pd.DataFrame:
        """One row per pair: `first`, `second`, the `interaction`, its standard error and confidence interval."""
        errors = torch.zeros_like(self.interactions) if self.interactions_stderr is None else self.interactions_stderr
        ends = self.interactions_ci
        rows = [
            (self.labels[i], self.labels[j], *(float(x) for x in (self.interactions[i, j], errors[i, j], *ends[i, j])))
            for i, j in combinations(range(len(self.players)), 2)
        ]
        return pd.DataFrame(rows, columns=["first", "second", "interaction", "stderr", "low", "high"])

    def _single(self, present: int) -> Float[Tensor, "player"]:
        """The metric with only each player present, or with only each player absent."""
        if self.worth is None:
            return torch.full_like(self.values, torch.nan)
        n = len(self.players)
        at = (torch.eye(n, dtype=torch.long) if present else 1 - torch.eye(n, dtype=torch.long)).unbind(1)
        return self.worth[at]


_MOST_EXACT = 20


@analysis
def shapley(
    model: Any,
    prompt: object,
    metric: MetricLike,
    components: Components | None = None,
    how: How = "zero",
    reference: object = None,
    *,
    circuit: Circuit | None = None,
    at: str | None = None,
    max_exact: int = 10,
    n_samples: int = 100,
    interactions: bool = True,
    seed: Seed = 0,
    memory_gb: float = 0.25,
    prepend_bos: bool | None = None,
) -> ShapleyValues:
    """Divides a metric among components: each one's Shapley value, and each pair's interaction.

    The components play a game. A coalition is worth the metric of a run in which all others are absent, that is,
    ablated as by `hooks.ablate`; paths through no player are always present. A player's value is what its arrival
    adds to the metric, averaged over all orders in which they could arrive. So the values sum to the metric of the run
    itself, less that of the run without any player; two players that do the same get the same, and one that never does
    anything gets nothing (Shapley 1953).

    With up to `max_exact` players, every coalition is run and the values are exact; many runs share a forward pass.
    With more, they are estimated from random orders, without bias and with 95% confidence intervals.

    Args:
        model: a HookedTransformer or TransformerBridge, run without dropout. Hooks on it take part in all runs.
        prompt: one, or a batch, over which the metric is averaged: text, tokens, or a `HijackPrompt`.
        metric: one of `hijack_lens.metrics`, whose "clean" run is the run itself; or a function from the logits
            [batch, pos, d_vocab] of one run to a number.
        components: the players: a `Component`, its place ("L0H1", "L2MLP") or the name of a hook point; a role of the
            circuit ("induction"), which is one player; several of these; a `Circuit`, each of whose components is one,
            or "all" heads and MLPs; a mapping from labels to any of these, each label one player. By default the
            circuit.
        how: what an absent component writes: "zero"; "mean", over the reference prompts, position by position;
            "resample", what a reference prompt has there, drawn for each prompt once; "patch", what the reference has
            there, prompt by prompt: a corrupted prompt's, say. A head's output is its `z`, an MLP's its whole
            `mlp_out`.
        reference: prompts or a cache, as long as `prompt`; for all but "zero".
        circuit: the roles that name the components; by default those of a `Circuit` given as `components`, else
            `model.circuit`, if there is one.
        at: a hook point of the residual stream, such as "blocks.1.hook_resid_mid", which makes players *sources* of
            what is read there: an absent one is missing from the stream from there on, and all before it runs as it
            did. Then players are heads, MLPs and the embeddings ("hook_embed", "hook_pos_embed"), all written before.
            By default an absent player is missing from all that reads it.
        max_exact: the largest number of players for which all 2^n coalitions are run.
        n_samples: how many random orders to estimate from otherwise, each with its reverse; n_samples · 2 (n - 1) runs
            at most.
        interactions: whether to estimate these as well, which doubles the runs; where values are exact, they are free.
            A pair is scored on about n_samples · 2 / n samples, and not at all (NaN) on fewer than 10.
        seed: the seed for draws and orders.
        memory_gb: roughly how much memory the runs of one pass may take.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for what the model lacks or would ignore, players that overlap, a `reference` that is
            missing, unused or of another length, and a metric that gives no finite number.

    Examples:
        >>> values = hl.shapley(model, prompt, hl.metrics.margin(prompt))
        >>> [f"{label}: {value:.2f}" for label, value in zip(values.labels, values.values, strict=True)]
        ['previous-token head: 3.68', 'induction head: 6.18', 'bigram memory: -6.58']
    """
    check_reference(how, reference, ("zero", "mean", "resample", "patch"))
    if check_count("max_exact", max_exact) > _MOST_EXACT:
        raise ValueError(f"max_exact must be at most {_MOST_EXACT}, a million runs, got {max_exact}")
    n_samples = check_count("n_samples", n_samples, minimum=MIN_SAMPLES)
    if not isinstance(interactions, bool):
        raise TypeError(f"interactions must be True or False, got {shown(interactions)}")
    generator = as_generator(seed)
    memory = memory_budget(memory_gb)
    tokens = model_tokens(model, prompt)
    names = circuit_of(model, components if circuit is None and isinstance(components, Circuit) else circuit)
    players = players_of(model, components, names, points=True)
    sites = sites_of(model, players)
    if at is not None:
        check_sources(model, at, players)
    check_metric(metric, tokens.shape[1])

    every_site = [site for written in sites for site in written]
    logits, run = record(model, tokens, list(dict.fromkeys(site.name for site in every_site)))
    reader = BoundMetric.of(model, metric, logits)
    present = {site: site.read(run[site.name]) for site in every_site}
    outputs = outputs_when_absent(model, present, how, reference, generator)
    absence = (
        Overwritten(sites, outputs, len(tokens)) if at is None else TakenOut.of(model, at, players, present, outputs)
    )
    runs = CoalitionRuns(model, tokens, players, absence, reader, None if is_hooked(model) else memory)
    if len(players) <= max_exact:
        worth = runs.worth(all_coalitions(len(players)))
        found: dict[str, Any] = {
            "values": shapley_values(worth),
            "interactions": shapley_interactions(worth),
            "full": float(worth[-1]),
            "empty": float(worth[0]),
            "n_runs": len(worth),
            "worth": worth.reshape((2,) * len(players)),
        }
    else:
        drawn = estimate(runs.worth, len(players), n_samples, interactions, generator)
        found = {**vars(drawn), "n_samples": n_samples}
    return ShapleyValues(players=players, metric=reader.name, how=how, at=at, **found)
