"""What a component is worth, all interactions counted: Shapley values of a model's components."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack_lens._checks import as_generator, check_choice, check_count, check_number
from hijack_lens._inputs import model_tokens
from hijack_lens._runs import evaluating
from hijack_lens.attribution.coalitions import CoalitionRuns, How, outputs_when_absent
from hijack_lens.attribution.players import players_of, sites_of
from hijack_lens.attribution.shapley_exact import all_coalitions, shapley_interactions, shapley_values
from hijack_lens.attribution.shapley_result import ShapleyValues
from hijack_lens.attribution.shapley_sampled import MIN_SAMPLES, estimate
from hijack_lens.circuit import Circuit, Component
from hijack_lens.hooks.intervention import check_model, is_hooked, record
from hijack_lens.hooks.sweep.api import check_metric
from hijack_lens.hooks.sweep.reader import Reader
from hijack_lens.metrics import Metric

_MOST_EXACT = 20


def shapley(
    model: Any,
    prompt: object,
    metric: Metric | Callable[[Tensor], Any],
    components: Circuit | Component | str | Iterable[Component | str] | Mapping[str, Any] | None = None,
    how: How = "zero",
    reference: object = None,
    *,
    max_exact: int = 10,
    n_samples: int = 100,
    interactions: bool = True,
    seed: int | torch.Generator = 0,
    memory_gb: float = 0.25,
) -> ShapleyValues:
    """Shares out what components do for a metric: each one's Shapley value, and each pair's interaction.

    The components play a game. A coalition is worth the metric of a run in which all others are absent, that is,
    ablated as `hooks.ablate` does it; what runs through no player is always there. A player's value is what its arrival
    adds to the metric, averaged over all orders in which they could arrive. So the values sum to the metric of the run
    itself, less that of the run without any player; two players that do the same get the same, and one that never does
    anything gets nothing (Shapley 1953).

    Up to `max_exact` players every coalition is run, and the values are exact; many runs share a forward pass. Beyond,
    they are estimated from random orders, without bias and with 95% confidence intervals.

    Args:
        model: a HookedTransformer or TransformerBridge, run without dropout. Hooks on it take part in all runs.
        prompt: one, or a batch, over which the metric is averaged: text, tokens, or a `HijackPrompt`.
        metric: one of `hijack_lens.metrics`, whose "clean" run is the run itself; or a function from the logits
            [batch, pos, d_vocab] of one run to a number.
        components: the players: heads, MLPs and names of hook points, or a `Circuit`; by default the model's own. With
            a mapping from names to these, each name is one player: a role, or a memory, as a whole.
        how: what an absent component writes: "zero"; "mean", over the reference prompts, position by position;
            "resample", what a reference prompt has there, drawn for each prompt once; "patch", what the reference has
            there, prompt by prompt: a corrupted prompt's, say. A head's output is its `z`, an MLP's its whole
            `mlp_out`.
        reference: prompts or a cache, as long as `prompt`; for all but "zero".
        max_exact: up to how many players to run all 2^n coalitions.
        n_samples: how many random orders to estimate from otherwise, each with its reverse; n_samples · 2 (n - 1) runs
            at most.
        interactions: whether to estimate these as well, which doubles the runs; where values are exact, they are free.
            A pair is scored on about n_samples · 2 / n samples, and not at all (NaN) on fewer than 10.
        seed: of draws and orders.
        memory_gb: how much memory runs may take at a time, roughly.

    Raises:
        TypeError, ValueError: for what the model lacks or would ignore, players that overlap, a `reference` that is
            missing, unused or of another length, and a metric that gives no finite number.
    """
    check_choice("how", how, ("zero", "mean", "resample", "patch"))
    if (reference is None) != (how == "zero"):
        need = "takes no reference" if how == "zero" else "needs reference="
        raise ValueError(f"how={how!r} {need}, got reference={reference!r:.60}")
    if check_count("max_exact", max_exact) > _MOST_EXACT:
        raise ValueError(f"max_exact must be at most {_MOST_EXACT}, a million runs, got {max_exact}")
    check_count("n_samples", n_samples, minimum=MIN_SAMPLES)
    if not isinstance(interactions, bool):
        raise TypeError(f"interactions must be True or False, got {interactions!r}")
    generator = as_generator(seed)
    memory = check_number("memory_gb", memory_gb, positive=True) * 2**30
    check_model(model)
    tokens = model_tokens(model, prompt, "prompt")
    players = players_of(model, components)
    sites = sites_of(model, players)
    check_metric(metric, tokens.shape[1])

    with evaluating(model):
        every_site = [site for at in sites.values() for site in at]
        logits, run = record(model, tokens, list(dict.fromkeys(site.name for site in every_site)))
        reader = Reader.of(metric.on(model, clean=logits) if isinstance(metric, Metric) else metric, tokens.shape[1])
        present = {site: site.read(run[site.name]) for site in every_site}
        outputs = outputs_when_absent(model, present, how, reference, generator)
        runs = CoalitionRuns(model, tokens, sites, outputs, reader, None if is_hooked(model) else memory)
        if len(players) <= max_exact:
            worth = runs.worth(all_coalitions(len(players)))
            return ShapleyValues(
                values=shapley_values(worth),
                interactions=shapley_interactions(worth),
                players=players,
                metric=reader.name,
                how=how,
                full=float(worth[-1]),
                empty=float(worth[0]),
                n_runs=len(worth),
                worth=worth.reshape((2,) * len(players)),
            )
        found = estimate(runs.worth, len(players), n_samples, interactions, generator)
        return ShapleyValues(
            values=found.values,
            interactions=found.interactions,
            players=players,
            metric=reader.name,
            how=how,
            full=found.full,
            empty=found.empty,
            n_runs=found.n_runs,
            stderr=found.stderr,
            interactions_stderr=found.interactions_stderr,
            n_samples=n_samples,
            pair_samples=found.pair_samples,
        )
