"""Shapley values against their definition: all orders of arrival, each coalition run by `hooks.ablate`."""

import functools
import itertools
import signal
from contextlib import ExitStack
from math import factorial

import pytest
import torch
from bridges_for_tests import BOOTED, gpt2_like
from bridges_for_tests import D_VOCAB as WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, perturbed, prompts
from refusals import refused
from strategies import seeds

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.attribution.shapley_coalitions import (
    MIN_SAMPLES,
    all_coalitions,
    estimate,
    shapley_interactions,
    shapley_values,
)
from hijack_lens.core.inputs import Player
from hijack_lens.core.statistics import student_quantile

METRIC = hl.logit_diff(1, 2)
PLAYERS = [HEADS[0], HEADS[2], *MLPS]
MODELS = {
    "perturbed": perturbed,
    "LayerNorm": lambda: hooked("LN"),
    "native bridge": lambda: native("LN")[0],
    **BOOTED,
}


@torch.no_grad()
def value_of(model, tokens, metric=METRIC):
    return float(metric(model(tokens)))


def by_definition(worth, n):
    """Values and interactions: gains averaged over all orders of the players; of a pair, with the pair as one."""
    values, pairs = torch.zeros(n, dtype=torch.float64), torch.full((n, n), torch.nan, dtype=torch.float64)
    for order in itertools.permutations(range(n)):
        for k, player in enumerate(order):
            before = frozenset(order[:k])
            values[player] += (worth(before | {player}) - worth(before)) / factorial(n)
    for i, j in itertools.combinations(range(n), 2):
        index = 0.0
        for order in itertools.permutations([*(set(range(n)) - {i, j}), "pair"]):
            before = frozenset(order[: order.index("pair")])
            both, first, second = (worth(before | arrived) for arrived in ({i, j}, {i}, {j}))
            index += (both - first - second + worth(before)) / factorial(n - 1)
        pairs[i, j] = pairs[j, i] = index
    return values, pairs


def worth_by_ablation(model, tokens, metric, players, how="zero", reference=None, seed=0):
    """The metric by coalition; each found by one run, with everyone else ablated in a context of its own."""
    # Before any is entered, since each runs the reference.
    absent = [
        hooks.patch(model, player, reference)
        if how == "patch"
        else hooks.ablate(model, player, how, reference, seed=seed)
        for player in players
    ]
    found = {}

    def worth(present):
        if present not in found:
            with ExitStack() as contexts:
                for player in set(range(len(players))) - present:
                    contexts.enter_context(absent[player])
                found[present] = value_of(model, tokens, metric)
        return found[present]

    return worth


def check_against_definition(result, worth):
    values, pairs = by_definition(worth, len(result.players))
    close(result.values, values)
    torch.testing.assert_close(result.interactions, pairs, rtol=0, atol=1e-10, equal_nan=True)
    for present in itertools.product((0, 1), repeat=len(result.players)):
        assert abs(float(result.worth[present]) - worth(frozenset(i for i, here in enumerate(present) if here))) < 1e-10
    assert result.exact
    assert result.efficiency_error < 1e-12
    assert values.abs().max() > 0.05, "too small to tell anything"
    assert pairs.nan_to_num().abs().max() > 0.01


def random_worth(n, seed):
    return torch.randn(2**n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_only(n):
    """What players add alone, and what pairs add to that."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator).double(), torch.randn(n, n, generator=generator).double().triu(1)


def of_pairs(coalitions, alone, pairs):
    present = coalitions.double()
    return present @ alone + (present @ pairs * present).sum(1)


def looked_up(worth):
    """A table of worths as a function of coalitions, first player slowest."""
    n = len(worth).bit_length() - 1
    return lambda coalitions: worth[(coalitions * 2 ** torch.arange(n - 1, -1, -1)).sum(1)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "patch"])
def test_values_and_interactions_are_those_of_the_definition(name, how):
    model = MODELS[name]()
    d_vocab = model.cfg.d_vocab
    tokens, reference = prompts(2, d_vocab=d_vocab), prompts(2 if how == "patch" else 5, seed=1, d_vocab=d_vocab)
    given = {} if how == "zero" else {"reference": reference, "seed": 3}
    result = hl.shapley(model, tokens, METRIC, PLAYERS, how, **given)
    check_against_definition(result, worth_by_ablation(model, tokens, METRIC, PLAYERS, how, **given))
    assert result.n_runs == 16
    assert value_of(model, tokens) == pytest.approx(result.full, abs=1e-10)


SOURCES = {"embeddings": ["hook_embed", "hook_pos_embed"], "before": [HEADS[0], MLPS[0]], "induction": HEADS[2]}


def worth_by_paths(model, tokens, players, reference=None):
    """The metric by coalition, with absent players cut off from what the last MLP reads and from the unembedding."""
    last = model.cfg.n_layers - 1

    @functools.cache
    def worth(present):
        with ExitStack() as contexts:
            for index, parts in enumerate(players.values()):
                for part in parts if isinstance(parts, list) else [parts]:
                    sender = part.removeprefix("hook_") if isinstance(part, str) else part
                    for receiver, via in ((f"L{last}MLP", "mlp_in"), ("unembed", "unembed")):
                        if index not in present:
                            contexts.enter_context(hooks.patch_path(model, sender, receiver, via, reference))
            return value_of(model, tokens)

    return worth


@pytest.mark.parametrize("how", ["zero", "patch"])
@pytest.mark.parametrize(
    "name",
    [name for name in MODELS if name != "GPT-NeoX"],  # its MLPs read what its heads do, from before the block
)
def test_sources_are_taken_out_of_what_is_read_there_and_after(name, how):
    model = MODELS[name]()
    d_vocab, last = model.cfg.d_vocab, model.cfg.n_layers - 1
    absolute = model.cfg.positional_embedding_type == "standard" and name != "perturbed"
    sources = SOURCES if absolute else {**SOURCES, "embeddings": "hook_embed"}
    tokens, reference = prompts(2, d_vocab=d_vocab), prompts(2, seed=1, d_vocab=d_vocab) if how == "patch" else None
    at = f"blocks.{last}.hook_resid_mid"
    result = hl.shapley(model, tokens, METRIC, sources, how, reference, at=at)
    check_against_definition(result, worth_by_paths(model, tokens, sources, reference))
    assert value_of(model, tokens) == pytest.approx(result.full, abs=1e-10)
    assert result.at == at
    assert at in str(result)


def test_sources_of_a_linear_model_are_worth_what_attribution_credits_them_with():
    """Without MLP and norm, the logits are a sum over what is in the stream, so that each is worth its own term."""
    model, tokens = hooked(attn_only=True), prompts(1)
    with torch.no_grad():  # attribution keeps biases apart
        for block in model.blocks:
            block.attn.b_V.zero_()
            block.attn.b_O.zero_()
    sources = {"embeddings": ["hook_embed", "hook_pos_embed"], "layer 0": HEADS[:2], "layer 1": HEADS[2:]}
    result = hl.shapley(model, tokens, METRIC, sources, at="blocks.1.hook_resid_post")
    found = hl.attribute(model, tokens[0], answers=[1, 2])
    expected = torch.zeros(3, dtype=torch.float64)
    for path, (first, second) in zip(found.paths, found.by_path(), strict=True):
        if path.source != "biases":
            expected[1 + path.through[-1].layer if path.through else 0] += first - second
    close(result.values, expected)
    close(result.interactions.nan_to_num(), torch.zeros(3, 3).double())


def test_a_name_of_several_components_is_one_player_and_hook_points_may_be_players():
    model, tokens = hooked("LN"), prompts(3)
    groups = {"front": [HEADS[0], HEADS[1]], "behind": (HEADS[2], MLPS[1]), "in between": "blocks.1.hook_resid_pre"}
    result = hl.shapley(model, tokens, METRIC, groups)
    check_against_definition(result, worth_by_ablation(model, tokens, METRIC, list(groups.values())))
    assert result.labels == ("front", "behind", "in between")
    assert result["behind"] == float(result.values[1])
    by_names = hl.shapley(model, tokens, METRIC, ["blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"])
    assert by_names.labels == ("blocks.0.hook_attn_out", "blocks.1.hook_mlp_out")
    close(by_names.values[1:], by_names.last[1:] / 2 + by_names.alone[1:] / 2)


def test_the_circuit_is_the_default_and_its_roles_are_the_names():
    model, tokens = hooked(), prompts()
    result = hl.shapley(model, tokens, METRIC)
    assert result.labels == ("previous-token head", "induction head", "bigram memory")
    assert [player.parts for player in result.players] == [(part,) for _, part in CIRCUIT]
    close(result.values, hl.shapley(model, tokens, METRIC, CIRCUIT).values, atol=0)
    twice = hl.Circuit(previous_token=(HEADS[0], HEADS[1]), induction=(HEADS[0],))
    assert hl.shapley(model, tokens, METRIC, twice).labels == ("L0H0", "L0H1")


@settings(max_examples=15)
@given(seed=seeds, n_prompts=st.integers(1, 3), norm=st.sampled_from([None, "LN"]))
def test_axioms(seed, n_prompts, norm):
    """Efficiency, dummy, symmetry and linearity, which together leave one way to share out (Shapley 1953)."""
    model, tokens = hooked(norm, seed=seed), prompts(n_prompts, seed=seed)
    with torch.no_grad():
        first, second = HEADS[:2]
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            weight = getattr(model.blocks[0].attn, name)
            weight[1] = weight[0]
        model.blocks[1].attn.W_O[1] = 0
    players = [first, HEADS[3], second, *MLPS]
    one, other = hl.logit_diff(1, 2), hl.metrics.log_prob(3)
    results = [hl.shapley(model, tokens, metric, players) for metric in (one, other)]
    mixed = hl.shapley(model, tokens, lambda logits: 2 * one(logits) - 3 * other(logits), players)
    close(mixed.values, 2 * results[0].values - 3 * results[1].values)
    for metric, result in zip((one, other), results, strict=True):
        assert float(result.values.sum()) == pytest.approx(result.full - result.empty, abs=1e-10)
        assert value_of(model, tokens, metric) == pytest.approx(result.full, abs=1e-10)
        assert abs(float(result.values[1])) < 1e-12
        assert float(result.interactions[1].nan_to_num().abs().max()) < 1e-12
        assert float(result.values[0]) == pytest.approx(float(result.values[2]), abs=1e-10)
        close(result.interactions[0, 3:], result.interactions[2, 3:])
        pairs = result.interactions.triu(1).nan_to_num().sum()
        assert float(result.main.sum() + pairs) == pytest.approx(result.full - result.empty, abs=1e-10)


@settings(max_examples=40)
@given(n=st.integers(1, 5), seed=seeds)
def test_any_game_is_shared_out_by_the_definition(n, seed):
    table = random_worth(n, seed)
    lookup = looked_up(table)
    close(lookup(all_coalitions(n)), table, atol=0)

    def worth(present):
        return float(lookup(torch.tensor([[i in present for i in range(n)]]))[0])

    values, pairs = by_definition(worth, n)
    close(shapley_values(table), values)
    torch.testing.assert_close(shapley_interactions(table), pairs, rtol=0, atol=1e-10, equal_nan=True)


@settings(max_examples=25)
@given(n=st.integers(2, 7), seed=seeds)
def test_an_interaction_is_what_a_pair_is_worth_beyond_what_each_is_worth_without_the_other(n, seed):
    """The recursive axiom of Grabisch & Roubens 1999: from values alone."""
    table = random_worth(n, seed)
    game = table.reshape((2,) * n)
    interactions = shapley_interactions(table)
    for i, j in itertools.combinations(range(n), 2):
        # Merged: both or neither, on the first axis.
        merged = torch.stack([game.select(j, k).select(i, k) for k in (0, 1)])
        pair = shapley_values(merged.flatten())[0]
        without_j, without_i = (shapley_values(game.select(absent, 0).flatten()) for absent in (j, i))
        assert float(interactions[i, j]) == pytest.approx(float(pair - without_j[i] - without_i[j - 1]), abs=1e-10)


def test_where_only_pairs_interact_what_is_left_of_a_value_is_what_the_player_does_alone():
    alone, pairs = pairs_only(5)
    table = of_pairs(all_coalitions(5), alone, pairs)
    result = hl.ShapleyValues(
        values=shapley_values(table),
        interactions=shapley_interactions(table),
        players=tuple(Player(str(i), ("hook_embed",)) for i in range(5)),
        metric="any",
        how="zero",
        full=float(table[-1]),
        empty=float(table[0]),
        n_runs=32,
        worth=table.reshape((2,) * 5),
    )
    close(result.main, alone)
    close(result.alone, alone)
    close(result.last, alone + pairs.sum(0) + pairs.sum(1))
    close(result.interactions.nan_to_num(), pairs + pairs.T)


def test_the_memories_of_the_handwritten_model_are_worth_what_theory_says():
    """The context and the weights add up; the heads of the induction circuit do little without each other."""
    model = handwritten(d_vocab=12, n_ctx=40)
    language, circuit = model.language, model.circuit
    trigger = 3
    g = language.global_candidate(trigger)
    c = next(token for token in range(12) if token not in (trigger, g))
    prompt = hl.hijack_prompt(language, trigger, c, repeats=3, length=32, seed=0)
    margin = hl.theory.margin(prompt, language)
    memories = {"context": (*circuit.previous_token, *circuit.induction), "weights": circuit.bigram}
    grouped = hl.shapley(model, prompt, hl.metrics.margin(prompt), memories)
    assert grouped["context"] == pytest.approx(float(margin.context), abs=1e-9)
    assert grouped["weights"] == pytest.approx(float(margin.weights), abs=1e-9)
    assert abs(float(grouped.interactions[0, 1])) < 1e-9
    assert abs(grouped.empty) < 1e-12

    each = hl.shapley(model, prompt, hl.metrics.margin(prompt))
    # Blind to content, the induction head counts how often each candidate occurs.
    frequencies = [int((prompt.tokens == token).sum()) / len(prompt) for token in (c, g)]
    blind = model.strengths.copy * (frequencies[0] - frequencies[1])
    together = float(margin.context)
    assert each["bigram memory"] == pytest.approx(float(margin.weights), abs=1e-9)
    assert each["induction head"] == pytest.approx((blind + together) / 2, abs=1e-9)
    assert each["previous-token head"] == pytest.approx((together - blind) / 2, abs=1e-9)
    assert float(each.interactions[0, 1]) == pytest.approx(together - blind, abs=1e-9)


def test_many_coalitions_share_a_pass_within_the_memory_given():
    model, tokens = hooked("LN"), prompts(2)
    rows, forward = [], model.forward

    def counting(ids, *args, **kwargs):
        rows.append(len(ids))
        return forward(ids, *args, **kwargs)

    model.forward = counting
    together = hl.shapley(model, tokens, METRIC, PLAYERS)
    assert rows == [2, 32]
    rows.clear()
    apart = hl.shapley(model, tokens, METRIC, PLAYERS, memory_gb=1e-9)
    assert rows == [2] * 17
    close(apart.values, together.values)
    rows.clear()
    close(hl.shapley(model, tokens, METRIC, PLAYERS, memory_gb=1e-4).values, together.values)
    assert 2 < max(rows) < 32
    assert sum(rows) == 34


@pytest.mark.parametrize("name", ["LayerNorm", "native bridge", "GPT-2"])
def test_hooks_of_the_users_take_part_and_see_no_batch_but_theirs(name):
    model = MODELS[name]()
    tokens, reference, seen = prompts(3), prompts(4, seed=1), []

    def scale(z, hook):
        seen.append(len(z))
        return z * torch.tensor([[0.5], [1.0], [2.0]])[: len(z), :, None, None] if len(z) == 3 else z

    plain = hl.shapley(model, tokens, METRIC, PLAYERS, "mean", reference)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", scale)]):
        result = hl.shapley(model, tokens, METRIC, PLAYERS, "mean", reference)
        assert set(seen) == {3, 4}
        worth = worth_by_ablation(model, tokens, METRIC, PLAYERS, "mean", reference)
        check_against_definition(result, worth)
    assert (result.values - plain.values).abs().max() > 0.01


def hooks_left(model):
    """How many hooks there are, and which modules are in training mode."""
    return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}, [
        m.training for m in model.modules()
    ]


@pytest.mark.parametrize("name", ["LayerNorm", "native bridge"])
@pytest.mark.parametrize("at", [None, "blocks.1.hook_resid_mid"])
@pytest.mark.parametrize("fails", ["exception", "Ctrl-C", "Ctrl-C in the model"])
def test_nothing_is_left_on_the_model(name, fails, at):
    players = PLAYERS if at is None else SOURCES
    model, tokens = MODELS[name](), prompts()
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda x, hook: x + 0.25)
    before, calls = hooks_left(model), itertools.count()

    def metric(logits):
        if next(calls) == 5:
            if fails == "exception":
                raise ZeroDivisionError
            signal.raise_signal(signal.SIGINT)
        return METRIC(logits)

    def interrupt(z, hook):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGINT)

    used = METRIC if fails == "Ctrl-C in the model" else metric
    if used is METRIC:
        model.hook_dict["blocks.1.attn.hook_z"].add_hook(interrupt)
        before = hooks_left(model)
    with pytest.raises(ZeroDivisionError if fails == "exception" else KeyboardInterrupt):
        hl.shapley(model, tokens, used, players, at=at)
    assert hooks_left(model) == before
    result = hl.shapley(model, tokens, METRIC, players, at=at)
    assert hooks_left(model) == before
    assert value_of(model, tokens) == pytest.approx(result.full, abs=1e-10)


def test_a_model_in_training_is_run_without_dropout_and_left_in_training():
    model, tokens = gpt2_like(), prompts(d_vocab=WORDS)
    expected = hl.shapley(model, tokens, METRIC, PLAYERS)
    model.train()
    try:
        before = hooks_left(model)
        assert not torch.equal(model(tokens), model(tokens)), "this model has no dropout"
        close(hl.shapley(model, tokens, METRIC, PLAYERS).values, expected.values)
        assert hooks_left(model) == before
    finally:
        model.eval()


def test_the_same_seed_gives_the_same_numbers_and_no_global_state_moves(global_rng_untouched):
    model, tokens, reference = hooked(), prompts(), prompts(5, seed=1)

    def run(seed):
        return hl.shapley(model, tokens, METRIC, PLAYERS, "resample", reference, max_exact=0, n_samples=10, seed=seed)

    assert torch.equal(run(0).values, run(0).values)
    assert torch.equal(run(0).values, run(torch.Generator().manual_seed(0)).values)
    assert not torch.equal(run(0).values, run(1).values)


def test_numbers_are_float64_on_the_cpu_whatever_the_models_dtype():
    model = hooked("LN", dtype=torch.float32)
    result = hl.shapley(model, prompts(), METRIC, PLAYERS)
    assert {result.values.dtype, result.worth.dtype} == {torch.float64}
    assert result.efficiency_error < 1e-12
    close(result.values, hl.shapley(hooked("LN"), prompts(), METRIC, PLAYERS).values, atol=1e-4)


# Sampled values


def test_sampled_values_of_a_model_agree_with_the_exact_ones():
    model, tokens = hooked("LN"), prompts()
    exact = hl.shapley(model, tokens, METRIC, HEADS + MLPS)
    sampled = hl.shapley(model, tokens, METRIC, HEADS + MLPS, max_exact=5, n_samples=80)
    assert not sampled.exact
    assert sampled.n_runs <= 64
    assert (sampled.full, sampled.empty) == pytest.approx((exact.full, exact.empty), abs=1e-10)
    assert sampled.efficiency_error < 1e-12
    assert sampled.worth is None
    off = (sampled.values - exact.values).abs() / sampled.stderr
    assert float(off.max()) < 3.5
    off = ((sampled.interactions - exact.interactions).abs() / sampled.interactions_stderr).nan_to_num()
    assert float(off.max()) < 4
    assert int(sampled.pair_samples.triu().sum()) == 80 * 5
    without = hl.shapley(model, tokens, METRIC, HEADS + MLPS, max_exact=5, n_samples=80, interactions=False)
    close(without.values, sampled.values)
    assert bool(without.interactions.isnan().all())
    assert without.n_runs <= sampled.n_runs


def test_every_coalition_is_run_once():
    asked = []
    table = random_worth(6, 0)

    def worth(coalitions):
        asked.append(coalitions)
        return looked_up(table)(coalitions)

    found = estimate(worth, 6, 50, True, torch.Generator().manual_seed(0))
    (coalitions,) = asked
    assert len(coalitions.unique(dim=0)) == len(coalitions) == found.n_runs


@pytest.mark.parametrize("interactions", [True, False])
def test_confidence_intervals_hold_the_exact_values_in_95_of_100_cases(interactions):
    n, n_games = 6, 150
    inside, pairs_inside = [], []
    for seed in range(n_games):
        table = random_worth(n, seed)
        exact, pairs = shapley_values(table), shapley_interactions(table)
        found = estimate(looked_up(table), n, 50, interactions, torch.Generator().manual_seed(seed))
        assert float(found.values.sum()) == pytest.approx(found.full - found.empty, abs=1e-12)
        inside.append((found.values - exact).abs() <= student_quantile(49) * found.stderr)
        for i, j in itertools.combinations(range(n), 2):
            count = int(found.pair_samples[i, j])
            assert bool(found.interactions[i, j].isnan()) == (count < MIN_SAMPLES)
            if count >= MIN_SAMPLES:
                half = student_quantile(count - 1) * found.interactions_stderr[i, j]
                pairs_inside.append(abs(found.interactions[i, j] - pairs[i, j]) <= half)
    share = float(torch.stack(inside).double().mean())  # of 900 intervals, six at a time not independent
    assert 0.93 <= share <= 0.97
    assert bool(pairs_inside) == interactions
    if interactions:
        assert 0.92 <= float(torch.stack(pairs_inside).double().mean()) <= 0.98


def test_estimates_are_unbiased_and_errors_are_what_they_are_said_to_be():
    table = random_worth(5, 0)
    found = [estimate(looked_up(table), 5, 40, True, torch.Generator().manual_seed(seed)) for seed in range(300)]
    values = torch.stack([each.values for each in found])
    error = values.std(0) / 300**0.5
    assert float(((values.mean(0) - shapley_values(table)) / error).abs().max()) < 3.5
    said = torch.stack([each.stderr for each in found]).square().mean(0).sqrt()
    close(said / values.std(0), torch.ones(5).double(), atol=0.12)
    pairs = torch.stack([each.interactions for each in found])
    pairs = torch.where(torch.eye(5).bool(), 0.0, pairs)
    off = (pairs.nanmean(0) - shapley_interactions(table).nan_to_num()).abs()
    assert float(off.max()) < 0.12


def test_where_only_pairs_interact_any_order_with_its_reverse_tells_all():
    """In one of the two a pair's gain goes to the first, in the other to the second; swapped, it is all there is."""
    alone, pairs = pairs_only(4)
    found = estimate(lambda present: of_pairs(present, alone, pairs), 4, 60, True, torch.Generator().manual_seed(0))
    close(found.values, alone + (pairs.sum(0) + pairs.sum(1)) / 2)
    close(found.stderr, torch.zeros(4).double())
    close(found.interactions.nan_to_num(), pairs + pairs.T)
    close(found.interactions_stderr.nan_to_num(), torch.zeros(4, 4).double())
    assert int(found.pair_samples.masked_fill(torch.eye(4).bool(), 99).min()) >= MIN_SAMPLES


def test_a_single_player_gets_everything_sampled_or_not():
    model, tokens = hooked(), prompts()
    for max_exact in (10, 0):
        result = hl.shapley(model, tokens, METRIC, MLPS[1], max_exact=max_exact)
        assert float(result.values) == pytest.approx(result.full - result.empty, abs=1e-12)
        assert bool(result.interactions.isnan().all())
        assert repr(result)
        assert result._repr_html_()


def test_students_quantiles_are_those_of_printed_tables():
    printed = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984, 100_000: 1.960}
    assert {dof: round(student_quantile(dof), 3) for dof in printed} == printed


# What a result shows


@pytest.fixture(scope="module")
def results():
    model, tokens = hooked("LN"), prompts()
    return {
        "exact": hl.shapley(model, tokens, METRIC, HEADS + MLPS, "mean", prompts(4, seed=1)),
        "sampled": hl.shapley(model, tokens, METRIC, HEADS + MLPS, max_exact=0, n_samples=80),
        "groups": hl.shapley(model, tokens, METRIC, {"<heads>": HEADS, "MLPs": MLPS}),
    }


@pytest.mark.parametrize("kind", ["exact", "sampled", "groups"])
def test_a_result_is_saved_and_loaded_to_the_bit(results, kind, tmp_path):
    result = results[kind]
    result.save(tmp_path / "values.safetensors")
    loaded = hl.ShapleyValues.load(tmp_path / "values.safetensors")
    assert repr(loaded) == repr(result)
    for name in vars(result):
        ours, theirs = getattr(result, name), getattr(loaded, name)
        same = torch.equal(ours.nan_to_num(), theirs.nan_to_num()) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, name


def test_other_files_are_refused(results, tmp_path):
    path = tmp_path / "values"
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        hl.ShapleyValues.load(path)
    hl.attribute(perturbed(), prompts()[0]).save(path)
    with pytest.raises(ValueError, match=r"is not a hijack_lens.ShapleyValues.1 file"):
        hl.ShapleyValues.load(path)
    damaged = results["exact"]
    object.__setattr__(damaged, "players", damaged.players[1:])
    damaged.save(path)
    object.__setattr__(damaged, "players", hl.shapley(hooked(), prompts(), METRIC, HEADS + MLPS).players)
    with pytest.raises(ValueError, match=r"is not a saved ShapleyValues.*values must have shape"):
        hl.ShapleyValues.load(path)


def test_tables_say_who_is_worth_what_and_that_nothing_was_lost(results):
    exact, sampled, groups = results["exact"], results["sampled"], results["groups"]
    frame = exact.to_pandas()
    assert list(frame) == ["player", "parts", "value", "stderr", "low", "high", "alone", "last"]
    assert list(frame["player"]) == ["L0H0", "previous-token head", "induction head", "L1H1", "L0MLP", "bigram memory"]
    assert (frame["low"] == frame["value"]).all()
    assert frame["value"].sum() == pytest.approx(exact.full - exact.empty, abs=1e-10)
    assert frame["last"][4] == float(exact.worth[1, 1, 1, 1, 1, 1] - exact.worth[1, 1, 1, 1, 0, 1])
    assert frame["alone"][4] == float(exact.worth[0, 0, 0, 0, 1, 0] - exact.worth[0, 0, 0, 0, 0, 0])
    frame = sampled.to_pandas()
    assert frame["alone"].isna().all()
    assert ((frame["high"] - frame["value"]) / frame["stderr"]).to_numpy() == pytest.approx(student_quantile(79))
    pairs = sampled.interactions_to_pandas()
    assert len(pairs) == 15
    row = pairs[(pairs["first"] == "L0H0") & (pairs["second"] == "L1H1")].iloc[0]
    assert row["interaction"] == float(sampled.interactions[0, 3])
    width = student_quantile(int(sampled.pair_samples[0, 3]) - 1)
    assert (row["high"] - row["interaction"]) / row["stderr"] == pytest.approx(width)

    assert "exact, from all 64 coalitions" in str(exact)
    assert f"{exact.full - exact.empty:+.4g}, within" in str(exact)
    assert "80 random orders and their reverses" in str(sampled)
    assert "95% interval" in str(sampled)
    assert "L0H0 × L1H1" in str(exact)
    for result in (exact, sampled):
        assert "<svg" in result._repr_html_()
    assert "&lt;heads&gt;" in groups._repr_html_()
    assert "<heads>" not in groups._repr_html_()
    with pytest.raises(KeyError, match="'heads' is no player; there are <heads>, MLPs"):
        groups["heads"]


def test_pictures_show_values_intervals_and_interactions(results):
    bars, heat = results["exact"].picture().figure.axes[:2]
    drawn = [patch.get_width() for patch in bars.patches]
    assert drawn == pytest.approx(results["exact"].values.tolist())
    assert [label.get_text() for label in bars.get_yticklabels()] == list(results["exact"].labels)
    close(torch.tensor(heat.images[0].get_array().filled(0.0)), results["exact"].interactions.nan_to_num())
    bars = results["sampled"].picture().figure.axes[0]
    (lines,) = bars.collections
    ends = torch.tensor([segment[:, 0].tolist() for segment in lines.get_segments()]).double()
    close(ends, results["sampled"].ci, atol=1e-6)  # drawn in float32
    assert results["sampled"].picture().png()[:4] == b"\x89PNG"
    alone = hl.shapley(hooked(), prompts(), METRIC, MLPS[0]).picture()
    assert len(alone.figure.axes) == 1


# Refusals


def refuse(metric=METRIC, components=PLAYERS, *rest, model=None, prompt=None, **options):
    model = hooked() if model is None else model
    return lambda: hl.shapley(model, prompts() if prompt is None else prompt, metric, components, *rest, **options)


def no_circuit():
    model = hooked()
    del model.circuit
    return model


ROTARY = BOOTED["Llama"]

test_values = refused(
    ValueError,
    {
        "how must be one of 'zero', 'mean', 'resample', 'patch', got 'median'": refuse(METRIC, PLAYERS, "median"),
        "how='mean' needs reference=, got reference=None": refuse(METRIC, PLAYERS, "mean"),
        "how='patch' needs reference=": refuse(METRIC, PLAYERS, "patch"),
        "how='zero' takes no reference, got reference=tensor": refuse(reference=prompts()),
        "must be as long as the prompt: at 'blocks.0.attn.hook_z'": refuse(METRIC, PLAYERS, "mean", prompts(2, 6)),
        "reference must hold one prompt, or one for each of the 2, got 3": refuse(METRIC, PLAYERS, "patch", prompts(3)),
        "reference holds token id 99": refuse(METRIC, PLAYERS, "mean", [99, 0, 0, 0, 0]),
        "prompt holds token id 99": refuse(prompt=[99]),
        "max_exact must be at most 20, a million runs, got 21": refuse(max_exact=21),
        "max_exact must be at least 0, got -1": refuse(max_exact=-1),
        "n_samples must be at least 10, got 9": refuse(n_samples=9),
        "memory_gb must be a finite number > 0, got 0": refuse(memory_gb=0),
        "components: L2MLP is in layer 2; the model has 2": refuse(METRIC, [hl.Component(2, "mlp")]),
        "'blocks.0.hook_mlp_uot' is not a hook point .*blocks.0.hook_mlp_out": refuse(METRIC, "blocks.0.hook_mlp_uot"),
        "'blocks.0.attn.hook_result' never fires": refuse(METRIC, "blocks.0.attn.hook_result"),
        "does not honour edits at 'blocks.0.attn.hook_attn_scores'": refuse(
            METRIC, ["blocks.0.attn.hook_attn_scores"], model=native()[0]
        ),
        "components must name at least one, got none": refuse(METRIC, []),
        "components must name at least one, got none$": refuse(METRIC, {}),
        r"components\['empty'\] must name at least one": refuse(METRIC, {"full": PLAYERS, "empty": ()}),
        "components must name at least one": refuse(METRIC, hl.Circuit()),
        "components must not overlap, got L0H0 and L0H0": refuse(METRIC, [HEADS[0], HEADS[0]]),
        "must not overlap, got L0H0 and blocks.0.attn.hook_z": refuse(METRIC, [HEADS[0], "blocks.0.attn.hook_z"]),
        "components must not overlap, got L1MLP and L1MLP": refuse(METRIC, {"a": PLAYERS, "b": MLPS[1]}),
        "components must not overlap, got L0MLP and blocks.0.mlp.hook_out": refuse(
            METRIC, [MLPS[0], "blocks.0.mlp.hook_out"], model=native()[0]
        ),
        "at must be a point of the residual stream, 'blocks.0.hook_resid_pre' to 'blocks.1.hook_resid_post', got 'x'": (
            refuse(at="x")
        ),
        "components must write before at='blocks.1.hook_resid_mid', got L1MLP": refuse(at="blocks.1.hook_resid_mid"),
        "components must write before at='blocks.0.hook_resid_pre', got L0H0": refuse(at="blocks.0.hook_resid_pre"),
        "components must be heads, MLPs, 'hook_embed' or .* where `at` is given, got 'blocks.0.hook_attn_out'": refuse(
            METRIC, ["blocks.0.hook_attn_out"], at="blocks.1.hook_resid_pre"
        ),
        "components must be given, since the model has no circuit": refuse(METRIC, None, model=no_circuit()),
        "components must have an output for each prompt; 'rotary_emb.hook_cos' has 1 for 8": refuse(
            METRIC, ["rotary_emb.hook_cos", HEADS[0]], model=ROTARY()
        ),
        "reads position 7; the prompts have 5": refuse(hl.logit_diff(1, 2, 7)),
        "metric must be finite whichever components are absent, got nan without L0H0": refuse(
            lambda logits: float("nan"), [HEADS[0]]
        ),
        "needs that run's logits": refuse(hl.metrics.kl("corrupted")),
    },
)

test_types = refused(
    TypeError,
    {
        "model must be a HookedTransformer or TransformerBridge, got 3": refuse(model=3),
        "metric must be a hijack_lens Metric or a function of logits, got 'margin'": refuse("margin"),
        "metric must give one number per run, got a tensor of shape": refuse(lambda logits: logits),
        "components must be a Component, .* a Circuit, .* or names of hook points; got 3": refuse(METRIC, 3),
        r"components must be a Component, .* or names of hook points; got \(0, 1\)": refuse(METRIC, [(0, 1)]),
        r"components\['a'\] must be a Component, .* got 3": refuse(METRIC, {"a": 3}),
        "components must have names as keys, got 0": refuse(METRIC, {0: PLAYERS}),
        "at must be a str, got 3": refuse(at=3),
        "max_exact must be an int, got 2.5": refuse(max_exact=2.5),
        "n_samples must be an int, got 'many'": refuse(n_samples="many"),
        "interactions must be True or False, got 1": refuse(interactions=1),
        "seed must be an int, a torch.Generator or None, got 'x'": refuse(seed="x"),
        "memory_gb must be a number, got '1'": refuse(memory_gb="1"),
        "prompt must be a tensor of token ids, got NoneType": lambda: hl.shapley(hooked(), None, METRIC),
    },
)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_before_the_model_is_run():
    model = hooked()

    def run(*args, **kwargs):
        raise AssertionError("the model was run")

    model.forward = run
    for case in (
        {"how": "median"},
        {"n_samples": 1},
        {"memory_gb": -1},
        {"seed": "x"},
        {"components": [HEADS[0], "blocks.0.attn.hook_z"]},
        {"components": "no.such.point"},
        {"metric": None},
        {"how": "mean"},
        {"max_exact": 21},
    ):
        with pytest.raises((TypeError, ValueError)):
            hl.shapley(model, prompts(), **{"metric": METRIC, "components": PLAYERS, **case})
