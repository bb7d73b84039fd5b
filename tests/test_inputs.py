"""One vocabulary: whatever a function calls components, a circuit, answers or a seed, it takes the same things."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from bridges_for_tests import gpt2_like
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, perturbed, prompts
from refusals import refused

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.core.checks import as_generator, fixed_seed
from hijack_lens.core.hook_points import all_components
from hijack_lens.core.inputs import components_of, indices, token_ids
from hijack_lens.show.views import attention_patterns

CLEAN, CORRUPTED = prompts(2, 6), prompts(2, 6, seed=1)
METRIC = hl.logit_diff(1, 2)
PREVIOUS, INDUCTION, BIGRAM = HEADS[1], HEADS[2], MLPS[1]

EVERY = all_components(hooked())

# Every way to name the same components, by what they are.
SPELLINGS = {
    "one head": [
        INDUCTION,
        "L1H0",
        "induction",
        (INDUCTION,),
        ["L1H0"],
        ["induction"],
        {"i": "L1H0"},
    ],
    "one MLP": [BIGRAM, "L1MLP", "bigram", [BIGRAM], ("bigram",), {"b": ["L1MLP"]}, {"b": ("bigram",)}],
    "a circuit": [
        CIRCUIT,
        [PREVIOUS, INDUCTION, BIGRAM],
        ("L0H1", "L1H0", "L1MLP"),
        ["previous_token", "induction", "bigram"],
        ["previous_token", INDUCTION, "L1MLP"],
        {"context": ["previous_token", "L1H0"], "weights": "bigram"},
        {"all of it": CIRCUIT},
        [CIRCUIT, "induction"],
    ],
    "all": [
        "all",
        EVERY,
        list(map(str, EVERY)),
        set(EVERY),
        {"each": EVERY},
        {"all": "all"},
        [CIRCUIT, "all"],
    ],
}


TAKES = {  # what a function makes of components
    "ablate": lambda model, parts: run(model, hooks.ablate(model, parts)),
    "ablate to the mean": lambda model, parts: run(model, hooks.ablate(model, parts, "mean", CORRUPTED)),
    "patch": lambda model, parts: run(model, hooks.patch(model, parts, CORRUPTED)),
    "path_sweep": lambda model, parts: hooks.path_sweep(model, CLEAN, CORRUPTED, METRIC, parts).values,
    "edge_attribution": lambda model, parts: hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, parts).values,
}


@torch.no_grad()
def run(model, intervention):
    with intervention:
        return model(CLEAN)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (name, what)
        for name in TAKES
        for what in SPELLINGS
        if what != "all" or not name.endswith(("sweep", "attribution"))
    ],
)
def test_however_components_are_spelled_they_are_the_same(name, what):
    model, take = hooked("LN"), TAKES[name]
    first, *others = SPELLINGS[what]
    expected = take(model, first)
    for other in others:
        if name in ("path_sweep", "edge_attribution"):
            close(take(model, other).sort().values, expected.sort().values, atol=1e-12)
        else:
            assert torch.equal(take(model, other), expected), other


@pytest.mark.parametrize("what", SPELLINGS)
def test_paths_and_their_names_are_those_of_the_components(what):
    first, *others = SPELLINGS[what]
    expected = hooks.path_sweep(hooked(), CLEAN, CORRUPTED, METRIC, first)
    for other in others:
        sweep = hooks.path_sweep(hooked(), CLEAN, CORRUPTED, METRIC, other)
        assert sweep.edges == expected.edges
        assert sweep.circuit == CIRCUIT
    assert "induction head" in {str(edge.label(expected.circuit)).split(" → ")[0] for edge in expected.edges} or (
        what == "one MLP"
    )


@pytest.mark.parametrize("what", ["one head", "one MLP"])
def test_one_component_is_one_player_however_it_is_spelled(what, unchecked):
    first, *others = SPELLINGS[what]
    expected = hl.shapley(hooked(), CLEAN, METRIC, first)
    for other in others:
        values = hl.shapley(hooked(), CLEAN, METRIC, other)
        assert torch.equal(values.values, expected.values)
        assert values.players[0].parts == expected.players[0].parts
        assert values.labels == expected.labels or isinstance(other, dict)


def test_players_are_components_roles_and_labels(unchecked):
    model = hooked()
    each = hl.shapley(model, CLEAN, METRIC, CIRCUIT)
    assert each.labels == ("previous-token head", "induction head", "bigram memory")
    for other in (None, *SPELLINGS["a circuit"][1:5], model.circuit):
        values = hl.shapley(model, CLEAN, METRIC, other)
        assert (values.labels, values.values.tolist()) == (each.labels, each.values.tolist())
    memories = hl.shapley(model, CLEAN, METRIC, {"context": ["previous_token", "L1H0"], "weights": "bigram"})
    assert memories.labels == ("context", "weights")
    assert memories.players[0].parts == (PREVIOUS, INDUCTION)
    assert hl.shapley(model, CLEAN, METRIC, "all").labels == tuple(map(CIRCUIT.label, all_components(model)))
    mixed = hl.shapley(model, CLEAN, METRIC, ["L0H0", "blocks.1.hook_mlp_out", "induction"])
    assert mixed.labels == ("L0H0", "blocks.1.hook_mlp_out", "induction head")


def test_a_role_of_several_components_is_one_player_and_elsewhere_all_of_them(unchecked):
    model = hooked()
    model.circuit = hl.Circuit(induction=(HEADS[2], HEADS[3]), bigram=(BIGRAM,))
    values = hl.shapley(model, CLEAN, METRIC, ["induction", "bigram"])
    assert values.labels == ("induction head (L1H0, L1H1)", "bigram memory")
    assert values.players[0].parts == (HEADS[2], HEADS[3])
    assert torch.equal(values.values, hl.shapley(model, CLEAN, METRIC, {"i": HEADS[2:], "b": BIGRAM}).values)
    assert len(hl.shapley(model, CLEAN, METRIC, model.circuit).players) == 3
    both = run(model, hooks.ablate(model, HEADS[2:]))
    assert torch.equal(run(model, hooks.ablate(model, "induction")), both)
    assert torch.equal(run(model, hooks.ablate(model, ["induction", "L1H0"])), both)  # each once
    assert list(hl.explain(model, CLEAN[0], 1, 2).ablated) == list(values.labels)


def test_hook_points_go_where_they_make_sense():
    model = hooked()
    assert torch.equal(
        run(model, hooks.ablate(model, ["L0H1", "blocks.1.hook_mlp_out"])),
        run(model, hooks.ablate(model, [PREVIOUS, "bigram"])),
    )


MEMORIES = {
    "matrix": lambda model, parts: hl.memory_matrix(model, parts, language=None),
    "neurons": lambda model, parts: hl.memory_neurons(model, parts),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_is_an_mlp_however_it_is_spelled(name, unchecked):
    model, take = hooked("LN"), MEMORIES[name]
    expected = take(model, None)
    for other in (*SPELLINGS["one MLP"], CIRCUIT, {"the circuit's": CIRCUIT}):
        result = take(model, other)
        for field in dataclasses.fields(expected):
            ours, theirs = getattr(result, field.name), getattr(expected, field.name)
            assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_all_memories_are_all_mlps(unchecked):
    both = hl.memory_matrix(hooked(), "all")
    assert both.components == tuple(MLPS)
    assert torch.equal(both.values, hl.memory_matrix(hooked(), MLPS).values)


def test_heads_are_shown_however_they_are_spelled(unchecked):
    model, prompt = hooked(), prompts(1)
    expected = attention_patterns(model, prompt, [PREVIOUS, INDUCTION])
    for other in (None, CIRCUIT, ("L0H1", "L1H0"), ["previous_token", "induction"], {"context": [PREVIOUS, "L1H0"]}):
        found = attention_patterns(model, prompt, other)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(attention_patterns(model, prompt, "all")) == 4
    assert list(attention_patterns(model, prompt, "L1H1", hl.Circuit(induction=(HEADS[3],)))) == [
        "induction head (L1H1)"
    ]


@pytest.mark.parametrize("spelling", [INDUCTION, "L1H0", "induction", (INDUCTION,), ["L1H0"], None], ids=str)
def test_one_head_is_asked_for_however_it_is_spelled(spelling, unchecked):
    model, prompt = hooked(), prompts(1)[0]
    for take, read in ((hl.attribute_scores, lambda r: r.values), (hl.context_memory, lambda r: r.values)):
        result = take(model, prompt, spelling)
        assert result.head == INDUCTION
        assert torch.equal(read(result), read(take(model, prompt, INDUCTION)))


def test_the_ends_of_a_path_are_named_alike(unchecked):
    model = hooked()
    expected = run(model, hooks.patch_path(model, PREVIOUS, INDUCTION, "k", CORRUPTED))
    ends = [PREVIOUS, "L0H1", "previous_token", (PREVIOUS,)], [INDUCTION, "L1H0", "induction", ["induction"]]
    for sender, receiver in itertools.product(*ends):
        assert torch.equal(run(model, hooks.patch_path(model, sender, receiver, "k", CORRUPTED)), expected)


def test_bridges_are_named_alike():
    bridge = native()[0]
    assert torch.equal(run(bridge, hooks.ablate(bridge, "L1H0")), run(bridge, hooks.ablate(bridge, INDUCTION)))
    assert len(components_of(bridge, "all")) == 6
    with pytest.raises(ValueError, match="components names 'induction', a role that no component of the circuit plays"):
        hooks.ablate(bridge, "induction")


def several(model):
    model.circuit = hl.Circuit(induction=(HEADS[2], HEADS[3]))
    return model


test_what_names_no_component_is_refused = refused(
    ValueError,
    {
        "'L1h0' is not a hook point": lambda: hooks.ablate(hooked(), "L1h0"),
        "components: L1H7 is head 7; the model has 2": lambda: hooks.ablate(hooked(), "L1H7"),
        "components: L4MLP is in layer 4; the model has 2": lambda: hooks.patch(hooked(), ["L4MLP"], CORRUPTED),
        "components must be a Component, .* got 'attention'": lambda: hooks.path_sweep(
            hooked(), CLEAN, CORRUPTED, METRIC, "attention"
        ),
        "components names 'induction', a role that no component": lambda: hl.shapley(
            hooked(), CLEAN, METRIC, ["induction"], circuit=hl.Circuit(bigram=(BIGRAM,))
        ),
        "components must name at least one, got none": lambda: hooks.ablate(hooked(), hl.Circuit()),
        "components must be MLPs, got L1H0": lambda: hl.memory_matrix(hooked(), ["bigram", "induction"]),
        "components must be one MLP, got L0MLP, L1MLP": lambda: hl.memory_neurons(hooked(), "all"),
        "heads must be attention heads, got L1MLP": lambda: hl.show.attention(hooked(), prompts(1), ["L1H0", "bigram"]),
        "heads must name at least one, got none": lambda: hl.show.attention(
            hooked(), prompts(1), hl.Circuit(bigram=(BIGRAM,))
        ),
        "sender must be one component, got 2: L1H0, L1H1": lambda: hooks.patch_path(
            several(hooked()), "induction", "unembed", "unembed"
        ),
        "receiver must be 'unembed', a Component, .* got 'logits'": lambda: hooks.patch_path(
            hooked(), "embed", "logits", "unembed"
        ),
        "head must be one head, got 2: L1H0, L1H1": lambda: hl.attribute_scores(
            several(hooked()), prompts(1), "induction"
        ),
    },
)
test_what_is_no_component_is_refused = refused(
    TypeError,
    {
        "components must be a Component, .*, or names of hook points; got 1": lambda: hooks.ablate(hooked(), [1]),
        r"components must be a Component, .* got \[Component": lambda: hooks.ablate(hooked(), [[INDUCTION]]),
        "components must have names as keys, got 0": lambda: hooks.ablate(hooked(), {0: INDUCTION}),
        r"components\['a'\] must be a Component, .* got None": lambda: hl.memory_matrix(hooked(), {"a": None}),
    },
)


# Circuits


def without(circuit=None):
    model = hooked("LN")
    del model.circuit
    if circuit is not None:
        model.circuit = circuit
    return model


NAMED_BY_CIRCUIT = {
    "attribute": lambda model, **given: hl.attribute(model, CLEAN, **given),
    "attribute_scores": lambda model, **given: hl.attribute_scores(model, CLEAN[0], INDUCTION, **given),
    "context_memory": lambda model, **given: hl.context_memory(model, CLEAN[0], INDUCTION, **given),
    "shapley": lambda model, **given: hl.shapley(model, CLEAN, METRIC, ["L0H1", "L1H0"], **given),
    "path_sweep": lambda model, **given: hooks.path_sweep(model, CLEAN, CORRUPTED, METRIC, HEADS, **given),
    "edge_attribution": lambda model, **given: hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, HEADS, **given),
    "attention": lambda model, **given: hl.show.attention(model, CLEAN[0], ["L1H0"], **given),
}


def words(result):
    """What components are called."""
    if isinstance(result, hl.LogitAttribution):
        return [(path.label, path.memory) for path in result.paths]
    if isinstance(result, hl.ShapleyValues):
        return result.labels
    if isinstance(result, hl.show.View):
        return [panel.title for panel in result.panels]
    return result.circuit


@pytest.mark.parametrize("name", NAMED_BY_CIRCUIT)
def test_without_a_circuit_the_analysis_runs_and_components_bear_their_places(name, unchecked):
    take = NAMED_BY_CIRCUIT[name]
    bare, empty, own, given = (
        take(without()),
        take(without(CIRCUIT), circuit=hl.Circuit()),
        take(without(CIRCUIT)),
        None,
    )
    given = take(without(), circuit=CIRCUIT)
    assert words(bare) == words(empty) != words(own) == words(given)
    if hasattr(bare, "values"):
        assert torch.equal(bare.values, own.values)
    if name in ("attribute", "shapley", "attention"):
        assert "induction" not in str(words(bare))
        assert "L1H0" in str(words(bare))


def test_a_circuit_that_is_not_a_circuit_is_refused_by_name(unchecked):
    prompt, fact = CLEAN[0], hl.Bigram(1, 2, 3)
    calls = [
        *NAMED_BY_CIRCUIT.values(),
        lambda model, **given: hl.memory_conflict(model, prompt, **given),
        lambda model, **given: hl.dose_response(model, fact, 3, **given),
        lambda model, **given: hl.explain(model, prompt, 1, 2, **given),
    ]
    for call, wrong in itertools.product(calls, ("induction", (), [INDUCTION], 0)):
        with pytest.raises(TypeError, match="circuit must be a Circuit, got "):
            call(hooked("LN"), circuit=wrong)
        with pytest.raises(ValueError, match="circuit: L5H0 is in layer 5; the model has 2"):
            call(hooked("LN"), circuit=hl.Circuit(induction=(hl.Component(5, "head", 0),)))


HEAD, OTHER_HEAD, MEMORY = hl.Component(0, "head", 1), hl.Component(12, "head", 30), hl.Component(1, "mlp")


def test_a_role_is_a_component_its_place_or_several(unchecked):
    expected = hl.Circuit((HEAD,), (OTHER_HEAD,), (MEMORY,))
    for head, other, mlp in itertools.product(
        (HEAD, "L0H1", ["L0H1"], ("L0H1", HEAD)), (OTHER_HEAD, "L12H30", [OTHER_HEAD]), (MEMORY, "L1MLP", ("L1MLP",))
    ):
        circuit = hl.Circuit(head, induction=other, bigram=mlp)
        assert circuit == expected
        assert (circuit.previous_token, circuit.label(OTHER_HEAD)) == ((HEAD,), "induction head")
    assert hl.Circuit("L0H1") == hl.Circuit(previous_token=(HEAD,))
    assert hl.Circuit(induction=["L1H0", HEAD]).induction == (INDUCTION, HEAD)  # in the order given
    assert hl.Circuit(hl.Component(np.int64(0), "head", torch.tensor(1))).previous_token == (HEAD,)
    model = without()
    for bridge in (False, True):
        one = native()[0] if bridge else model
        named = hl.attribute(one, CLEAN, circuit=hl.Circuit("L0H1", "L1H0", "L1MLP")).margin(1, 2)
        by_hand = hl.attribute(one, CLEAN, circuit=CIRCUIT).margin(1, 2)
        assert torch.equal(named.context, by_hand.context)
        assert float(named.context.abs().min()) > 1e-3


HEADS_WANTED = r'must be attention heads, each a Component or its place \("L0H1"\), got '
test_what_plays_no_role_is_refused = refused(
    ValueError,
    {
        f"previous_token {HEADS_WANTED}'L0MLP'": lambda: hl.Circuit("L0MLP"),
        f"previous_token {HEADS_WANTED}'induction'": lambda: hl.Circuit("induction"),
        f"previous_token {HEADS_WANTED}''": lambda: hl.Circuit(""),
        f"induction {HEADS_WANTED}.'L1H0', 'L1h1'.": lambda: hl.Circuit(induction=["L1H0", "L1h1"]),
        f"induction {HEADS_WANTED}Component": lambda: hl.Circuit(induction=MEMORY),
        r'bigram must be MLPs, each a Component or its place \("L2MLP"\), got \(Component': lambda: hl.Circuit(
            bigram=(HEAD,)
        ),
        "bigram must be MLPs, .* got 'L1H0'": lambda: hl.Circuit(bigram="L1H0"),
    },
)
test_what_is_no_role_at_all_is_refused = refused(
    TypeError,
    {
        f"previous_token {HEADS_WANTED}None": lambda: hl.Circuit(None),
        f"previous_token {HEADS_WANTED}0": lambda: hl.Circuit(0),
        f"previous_token {HEADS_WANTED}Circuit": lambda: hl.Circuit(CIRCUIT),
        f"induction {HEADS_WANTED}.*nested": lambda: hl.Circuit(induction=[["nested"]]),
        f"induction {HEADS_WANTED}.'L0H0': 1": lambda: hl.Circuit(induction={"L0H0": 1}),
        "bigram must be MLPs, .* got tensor": lambda: hl.Circuit(bigram=torch.tensor([1])),
    },
)


def test_a_circuit_among_the_components_names_them(unchecked):
    other = hl.Circuit(induction=(HEADS[3],), bigram=(BIGRAM,))
    for sweep in (hooks.path_sweep, hooks.edge_attribution):
        assert sweep(hooked(), CLEAN, CORRUPTED, METRIC, other).circuit == other
        assert sweep(hooked(), CLEAN, CORRUPTED, METRIC, other, circuit=CIRCUIT).circuit == CIRCUIT
        assert sweep(without(), CLEAN, CORRUPTED, METRIC, circuit=other).edges == (
            sweep(without(), CLEAN, CORRUPTED, METRIC, other).edges
        )
    assert hl.shapley(hooked(), CLEAN, METRIC, other).labels == ("induction head", "bigram memory")
    assert hl.shapley(hooked(), CLEAN, METRIC, other, circuit=CIRCUIT).labels == ("L1H1", "bigram memory")


def test_another_attribute_of_that_name_is_no_circuit():
    model = hooked("LN")
    model.circuit = "the user's own"
    assert words(hl.attribute(model, CLEAN)) == words(hl.attribute(without(), CLEAN))
    assert torch.equal(run(model, hooks.ablate(model, INDUCTION)), run(model, hooks.ablate(model, "L1H0")))


# Tokens


def test_answers_come_in_the_order_given(unchecked):
    model, deep, prompt = hooked(), hooked(n_layers=3), CLEAN[0]
    for one, order in itertools.product(
        (model, deep), ([5, 1, 3], (3, 5, 1), torch.tensor([1, 5, 3]), np.array([5, 3, 1]))
    ):
        result = hl.attribute(one, prompt, answers=order)
        assert list(result.answers) == list(order)
        close(result.logits, one(prompt[None])[0, -1, torch.as_tensor(order)].detach(), atol=1e-10)
        assert result.pair() == (0, 1)
        first, second = result.answers[:2]
        assert float(result.margin().total) == float(result.margin(first, second).total)
        batch = hl.attribute(one, CLEAN, answers=order)  # which has no two largest
        assert batch.margin().total.shape == (2,)
        assert hl.context_memory(one, prompt, INDUCTION, answers=order).answers == tuple(map(int, order))
        assert hl.memory_conflict(one, prompt, query_tokens=order, answers=order).answers == tuple(map(int, order))


def test_the_order_of_the_answers_goes_before_a_prompts_candidates(unchecked):
    model = handwritten()
    prompt = hl.hijack_prompt(model.language, 0, 4, 2, 12, seed=0)
    c, g = hl.attribute(model, prompt).candidates
    assert hl.attribute(model, prompt).pair() == (c, g)
    for answers in ([g, c, 0], [c, g], [0, c, g]):
        result, logits = hl.attribute(model, prompt, answers=answers), model(prompt.tokens[None])[0, -1].detach()
        assert result.pair() == (0, 1)
        close(result.margin().total, logits[answers[0]] - logits[answers[1]])


def test_one_token_stands_for_a_list_of_one_wherever_one_will_do(unchecked):
    model = perturbed()
    prompt, texts = prompts(1)[0], model.language.tokens
    for one in (3, texts[3]):
        assert hl.context_memory(model, prompt, query_tokens=one, answers=one).values.shape == (1, 1)
        assert hl.memory_matrix(model, key_tokens=one, value_tokens=one).values.shape == (1, 1)
        assert hl.memory_neurons(model, key_tokens=one).n_keys == 1
        assert hl.memory_conflict(model, prompt, query_tokens=one).query_tokens == (3,)
        assert hl.context_memory(model, prompt).picture(query_tokens=one, answers=[1, one]).png()


def test_every_look_up_reads_a_text_alike(unchecked):
    bridge = gpt2_like()
    assert token_ids(bridge, "answers", ["two", "one"]).tolist() == [
        int(bridge.to_tokens(word, prepend_bos=False)[0, 0]) for word in ("two", "one")
    ]
    assert torch.equal(
        hl.logit_diff("two", "one").on(bridge)(torch.ones(1, 1, 13).cumsum(-1)),
        hl.logit_diff(*token_ids(bridge, "answers", ["two", "one"]).tolist())(torch.ones(1, 1, 13).cumsum(-1)),
    )
    unknown = "holds 'no-such-word', which is not a single token"
    for call in (
        lambda: hl.logit_diff("no-such-word", "one").on(bridge),
        lambda: hl.attribute(bridge, [1, 2], answers=["no-such-word", "one"]),
        lambda: hl.find_circuit(bridge, vocabulary=["no-such-word", "one"]),
    ):
        with pytest.raises(ValueError, match=unknown):
            call()


def test_indices_are_one_or_several_ints_and_count_from_either_end():
    assert indices("layers", None, 3) == [0, 1, 2]
    assert indices("layers", -1, 3) == indices("layers", torch.tensor([2]), 3) == [2]
    assert indices("layers", (0, np.int64(-2)), 3) == [0, 1]
    assert indices("positions", [-1, 4]) == [-1, 4]  # of runs whose length is not known yet


# Seeds


LANGUAGE = hl.BigramLanguage.dirichlet(6, seed=0)
DRAWS = {
    "dirichlet": lambda seed: hl.BigramLanguage.dirichlet(5, seed=seed).pi_b,
    "sample": lambda seed: LANGUAGE.sample(3, 20, seed=seed).tokens,
    "hijack_prompt": lambda seed: hl.hijack_prompt(LANGUAGE, 0, 4, 2, 30, seed=seed).tokens,
    "associative_transformer": lambda seed: hl.associative_transformer(LANGUAGE, d_model=9, seed=seed).W_E,
    "trainable_transformer": lambda seed: hl.trainable_transformer(LANGUAGE, d_model=8, seed=seed, device="cpu").W_E,
    "gradient_steps": lambda seed: hl.training.gradient_steps(LANGUAGE, 12, 6, 4, 1, batch_size=4, seed=seed)[0].W_E,
    "conflict_prompts": lambda seed: torch.stack(
        [one.tokens for one in hl.training.fit.conflict_prompts(LANGUAGE, [0, 1], 3, 20, seed)]
    ),
    "find_circuit": lambda seed: hl.find_circuit(hooked(), n_prompts=8, seed=seed).evidence.induction.score,
    "ablate": lambda seed: resampled(seed),
    "ablate_sweep": lambda seed: (
        hooks.ablate_sweep(
            hooked(), prompts(9, 6), METRIC, how="resample", reference=prompts(40, 6, seed=2), seed=seed
        ).values
    ),
    "shapley": lambda seed: (
        hl.shapley(hooked(), prompts(9, 6), METRIC, how="resample", reference=prompts(40, 6, seed=2), seed=seed).values
    ),
}


def resampled(seed):
    model = hooked()
    with torch.no_grad(), hooks.ablate(model, "all", "resample", prompts(40, 6, seed=2), seed=seed):
        return model(prompts(9, 6))


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_is_an_int_a_generator_or_none(name, global_rng_untouched):
    draw = DRAWS[name]
    same = draw(3)
    for seed in (3, np.int64(3), torch.tensor(3)):
        assert torch.equal(draw(seed), same)
    generator = torch.Generator().manual_seed(3)
    first, second = draw(generator), draw(generator)  # the generator goes on
    again = torch.Generator().manual_seed(3)
    assert torch.equal(draw(again), first)
    assert torch.equal(draw(again), second)
    assert not torch.equal(first, second)
    assert not torch.equal(draw(None), draw(None))
    draw(2**64 - 1)
    for seed, message in (
        (2**64, r"seed must be below 2\^64, got 18446744073709551616"),
        (-1, "seed must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(seed)
    for seed in ("3", 1.5, True):
        with pytest.raises(TypeError, match=r"seed must be an int, a torch\.Generator or None, got "):
            draw(seed)


def test_an_ablation_draws_once_for_all_runs_and_components():
    model = hooked()
    for seed in (4, torch.Generator().manual_seed(4), None):
        ablation = hooks.ablate(model, "all", "resample", prompts(40, 6, seed=2), seed=seed)
        assert torch.equal(run(model, ablation), run(model, ablation))


def test_a_run_without_a_seed_draws_one_and_keeps_it(global_rng_untouched):
    first, second = (hl.TrainConfig(triggers=[0], length=4, seed=None) for _ in range(2))
    assert isinstance(first.seed, int)
    assert first.seed != second.seed
    assert dataclasses.replace(first, steps=5).seed == first.seed  # as where a run goes on
    assert isinstance(hl.TrainConfig(triggers=[0], length=4, seed=torch.Generator().manual_seed(0)).seed, int)
    with pytest.raises(ValueError, match=r"seed must be below 2\^64"):
        hl.TrainConfig(triggers=[0], length=4, seed=2**64)


def test_a_seed_as_an_int_and_as_a_generator():
    assert fixed_seed(7) == 7
    assert 0 <= fixed_seed(None) < 2**63
    generator = torch.Generator()
    assert as_generator(generator) is generator
    assert torch.equal(torch.rand(3, generator=as_generator(7)), torch.rand(3, generator=generator.manual_seed(7)))


# Files of the version before, in the old words


def test_files_in_the_old_words_are_read_in_the_new_ones():
    saved = Path(__file__).parent / "saved"
    sweep = hooks.Sweep.load(saved / "Sweep.safetensors")
    assert sweep.axes[0] == "activation" == sweep.to_pandas().columns[0]
    assert all(
        torch.equal(sweep[name].values[0], values) for name, values in zip(sweep.activations, sweep.values, strict=True)
    )
    for kind in (hl.ContextMemory, hl.MemoryConflict):
        tables = kind.load(saved / f"{kind.__name__}.safetensors")
        assert [tables.row(token) for token in tables.query_tokens] == list(range(len(tables.query_tokens)))
    neurons = hl.MemoryNeurons.load(saved / "MemoryNeurons.safetensors")
    assert neurons.key_tokens.shape == neurons.pre.shape


# Small integers, and inference mode

ONE_HEAD = hl.Circuit(induction=(INDUCTION,))
ANALYSES = {
    "attribute": lambda model, a, b: hl.attribute(model, a, answers=[1, 2]).values,
    "attribute_scores": lambda model, a, b: hl.attribute_scores(model, a[0], "L1H0").values,
    "attribute_sources": lambda model, a, b: hl.attribute_sources(model, a, [1, 2], carriers=1).values,
    "context_memory": lambda model, a, b: hl.context_memory(model, a[0], "L1H0").attention,
    "shapley": lambda model, a, b: hl.shapley(model, a, METRIC, ["L0H0", "L1H0"]).values,
    "patch_sweep": lambda model, a, b: hooks.patch_sweep(model, a, b, METRIC).values,
    "ablate_sweep": lambda model, a, b: hooks.ablate_sweep(model, a, METRIC, how="mean", reference=b).values,
    "attribution_patch": lambda model, a, b: hooks.attribution_patch(model, a, b, METRIC, steps=2).values,
    "path_sweep": lambda model, a, b: hooks.path_sweep(model, a, b, METRIC, ["L0H0", "L1H0"]).values,
    "edge_attribution": lambda model, a, b: hooks.edge_attribution(model, a, b, METRIC, ["L0H0", "L1H0"]).values,
    "explain": lambda model, a, b: hl.explain(model, a[0], 1, 2, circuit=ONE_HEAD).attribution.values,
    "ablate": lambda model, a, b: ablated(model, a, b),
}
ANALYSED = {"two layers": perturbed, "bridge": gpt2_like}


@torch.no_grad()
def ablated(model, tokens, reference):
    with hooks.ablate(model, "L1H0", "mean", reference):
        return model(torch.as_tensor(np.asarray(tokens)).long())


@pytest.mark.parametrize("name", ANALYSED)
def test_tokens_of_small_integers_and_inference_mode_change_nothing(name, unchecked):
    model = ANALYSED[name]()
    spelled = [[x.numpy().astype(np.uint16) for x in (CLEAN, CORRUPTED)]]
    spelled += [[x.to(dtype) for x in (CLEAN, CORRUPTED)] for dtype in (torch.uint16, torch.int8)]
    with torch.inference_mode():
        made_inside = [x.clone() for x in (CLEAN, CORRUPTED)]
    for analysis in ANALYSES.values():
        expected = analysis(model, CLEAN, CORRUPTED)
        for pair in spelled:
            close(analysis(model, *pair), expected, atol=0)
        close(analysis(model, *made_inside), expected, atol=0)
        with torch.inference_mode():
            close(analysis(model, *made_inside).clone(), expected, atol=0)
            close(analysis(model, CLEAN, CORRUPTED).clone(), expected, atol=0)
    circuit = hl.find_circuit(model, n_prompts=8)
    with torch.inference_mode():
        again = hl.find_circuit(model, n_prompts=8)
    assert again.evidence.to_pandas().equals(circuit.evidence.to_pandas())


def test_nothing_is_differentiated_through_a_model_made_under_inference_mode(unchecked):
    with torch.inference_mode():
        model = hooked("LN")
    for name in ("attribution_patch", "edge_attribution"):
        with pytest.raises(ValueError, match=r"model was made under torch.inference_mode\(\)"):
            ANALYSES[name](model, CLEAN, CORRUPTED)
    close(ANALYSES["patch_sweep"](model, CLEAN, CORRUPTED), ANALYSES["patch_sweep"](hooked("LN"), CLEAN, CORRUPTED))


def test_models_are_made_and_trained_under_inference_mode(unchecked):
    language = hl.BigramLanguage.dirichlet(6, seed=0)

    def trained():
        model = hl.trainable_transformer(language, d_model=8, n_heads=2, n_ctx=12, seed=0)
        hl.train(model, language, hl.TrainConfig([1], length=12, seed=0, steps=3, batch_size=4, evaluate_every=3))
        return model

    outside = trained()
    with torch.inference_mode():
        inside = trained()
    for name, parameter in inside.named_parameters():
        assert torch.equal(parameter, dict(outside.named_parameters())[name])
        assert not parameter.is_inference()


@pytest.mark.parametrize("spelled", ["cpu", torch.device("cpu"), "cpu:0"])
def test_a_device_is_a_string_or_an_object(spelled, tmp_path, unchecked):
    language = hl.BigramLanguage.dirichlet(5, seed=0)
    written = hl.associative_transformer(language, n_ctx=12, device=spelled)
    trained = hl.trainable_transformer(language, d_model=8, n_heads=2, n_ctx=12, seed=0, device=spelled)
    written.save_pretrained(tmp_path)
    read = hl.BigramTransformer.from_pretrained(tmp_path, device=spelled)
    another = hooked("LN")
    another.cfg.device = spelled
    for model in (written, trained, read, another):
        for analysis in ("attribute", "patch_sweep", "attribution_patch", "explain"):
            assert bool(ANALYSES[analysis](model, CLEAN % 5, CORRUPTED % 5).isfinite().all())
        hl.find_circuit(model, n_prompts=8)
