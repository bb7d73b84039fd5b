"""What is learned when: claims that hold for honest runs, and do not for runs that violate them."""

import functools
from dataclasses import replace

import pandas as pd
import pytest
import torch

import hijack_lens as hl
from hijack_lens.reproduction import data_matters, learning_order, memory_order
from hijack_lens.reproduction import feed_forward_memory as feed_forward
from hijack_lens.training.one_step import STEPS

STEPS_TAKEN = list(range(0, 101, 10))


def rising(start, full, low=0.1, high=1.0):
    """A curve that is `low` up to one step, and `high` from another on."""
    slope = (high - low) / (full - start)
    return [min(high, max(low, low + slope * (step - start))) for step in STEPS_TAKEN]


def made_up(recipe, accuracy, bigrams=(0, 30), other_continuations=None, model=None):
    """A run with these curves for its table: in-context accuracy, and the fraction of the bigram loss learned."""
    other = "bigram" if recipe.continuations == "uniform" else "uniform"
    curves = {
        ("in_context_accuracy", recipe.continuations): accuracy,
        ("in_context_accuracy", other): other_continuations or accuracy,
        ("in_context_loss", recipe.continuations): [3.0 * (1 - value) for value in accuracy],
        ("bigram_excess", recipe.continuations): [1 - value for value in rising(*bigrams, low=0.0)],
        ("induction_attention", recipe.continuations): accuracy,
    }
    rows = [
        (step, 0.0, probe, continuations, recipe.length, value)
        for (probe, continuations), values in curves.items()
        for step, value in zip(STEPS_TAKEN, values, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["step", "seconds", "probe", "continuations", "length", "value"])
    return hl.TrainingRun(model or recipe.untrained(), recipe.config, int(table["step"].max()), table)


# Bigrams first, the circuit later, one layer never.


def as_claimed(recipe):
    late = rising(40, 80 + recipe.seed) if recipe.n_layers == 2 else rising(0, 40, high=0.6)
    return made_up(recipe, late)


def test_learning_order_holds_where_bigrams_come_first_and_one_layer_fails():
    result = learning_order.learning_order(learning_order.QUICK, as_claimed)
    assert result.verdict == "reproduced"
    two = result.table[result.table["layers"] == 2]
    # 0.9 of the bigram loss is gone at 27 steps; of the in-context loss (1 at 0.1) from 75 on.
    assert two["steps_to_bigrams"].tolist() == [30] * 3
    assert two["steps_to_in_context"].tolist() == [80] * 3


@pytest.mark.parametrize(
    ("violation", "holds"),
    [
        # The circuit before the bigrams.
        (lambda r: made_up(r, rising(0, 20), (40, 90)) if r.n_layers == 2 else as_claimed(r), [False, False, True]),
        # Never the circuit.
        (lambda r: made_up(r, rising(0, 40, high=0.6)), [False, False, True]),
        # One layer does it too.
        (lambda r: made_up(r, rising(40, 80)), [True, True, False]),
        # At one seed alone, one layer does it, and two layers have both at once.
        (lambda r: made_up(r, rising(0, 30), (0, 30)) if r.seed == 1 else as_claimed(r), [False, False, False]),
        # One layer fails at everything.
        (
            lambda r: as_claimed(r) if r.n_layers == 2 else made_up(r, rising(0, 40, high=0.6), (50, 300)),
            [True, True, False],
        ),
    ],
)
def test_learning_order_turns(violation, holds):
    result = learning_order.learning_order(learning_order.QUICK, violation)
    assert [finding.holds for finding in result.findings] == holds
    assert result.verdict == ("in part" if any(holds) else "not reproduced")


def test_learning_order_is_not_reproduced_by_models_that_learn_nothing():
    untrained = learning_order.learning_order(
        learning_order.QUICK, lambda recipe: made_up(recipe, rising(0, 100, high=0.101), (200, 300))
    )
    assert untrained.verdict == "not reproduced"


def test_learning_order_of_a_model_that_was_trained():
    result = learning_order.learning_order(replace(learning_order.QUICK, seeds=(0,)))
    assert result.verdict == "reproduced"
    assert sorted(set(result.table["layers"])) == [1, 2]
    assert [ax.get_title() for ax in result.figure.figure.axes] == ["two layers", "one layer"]


# The order of the memories.

SMALL = memory_order.Settings((0, 1, 2), d_model=16, frozen_steps=50, steps=100)
NEEDS = {"copy": 5, "match": 15, "previous_token": 15}
TOP_DOWN = {"copy": set(), "match": {"copy"}, "previous_token": {"copy", "match"}}


def learns(needs=NEEDS, builds_on=TOP_DOWN):
    """A `train` where a memory takes so many steps in which it is not frozen and what it builds on is recalled."""
    progress = {}

    def train(model, language, config):
        done = progress.setdefault(model, dict.fromkeys(STEPS, 0))
        rows = []
        for step in range(config.steps + 1):
            recalled = {memory for memory in STEPS if done[memory] >= needs[memory]}
            if step % config.evaluate_every == 0:
                rows += [(step, 0.0, f"{memory}_recall", None, None, float(memory in recalled)) for memory in STEPS]
            for memory, name in STEPS.items():
                done[memory] += model.get_parameter(name).requires_grad and builds_on[memory] <= recalled
        table = pd.DataFrame(rows, columns=["step", "seconds", "probe", "continuations", "length", "value"])
        return hl.TrainingRun(model, config, config.steps, table)

    return train


def steps_recall(before=0.0, after=1.0, without_match=0.0):
    """A `gradient_steps` of these recalls."""

    def gradient_steps(language, *, step_norms, seed, **sizes):
        recalls = {"start": dict.fromkeys((f"{memory}_recall" for memory in STEPS), before)}
        for memory in STEPS:
            recalls[memory] = {**list(recalls.values())[-1], f"{memory}_recall": after}
        if step_norms[1] == 0:
            recalls["previous_token"]["previous_token_recall"] = without_match
        return None, recalls

    return gradient_steps


def test_memory_order_holds_where_memories_build_on_one_another_from_the_top_down():
    result = memory_order.memory_order(SMALL, learns(), steps_recall())
    assert result.verdict == "reproduced"
    recalled = (
        result.table[result.table["measured"] == "step from which recalled"].groupby("frozen")[list(STEPS)].mean()
    )
    assert recalled.loc["nothing"].tolist() == [5, 20, 35]
    assert recalled.loc["copy"].tolist() == [55, 70, 85]  # each later by the 50 frozen steps
    assert recalled.loc["match"].tolist() == [5, 65, 80]
    assert recalled.loc["previous_token"].tolist() == [5, 20, 65]


@pytest.mark.parametrize(
    ("train", "holds"),
    [
        # Independent of one another.
        (learns(builds_on={memory: set() for memory in STEPS}), [False, False, False, True, False]),
        # From the bottom up.
        (
            learns(builds_on={"copy": {"match"}, "match": {"previous_token"}, "previous_token": set()}),
            [False, False, False, False, False],
        ),
        # Not at all.
        (learns(needs=dict.fromkeys(STEPS, 1000)), [False, False, False, False, False]),
        # Previous token needs copy alone, and comes before match.
        (
            learns({**NEEDS, "match": 30}, {**TOP_DOWN, "previous_token": {"copy"}}),
            [False, True, False, True, False],
        ),
    ],
)
def test_memory_order_turns_with_what_builds_on_what(train, holds):
    result = memory_order.memory_order(SMALL, train, steps_recall(0.0, 0.0))
    assert [finding.holds for finding in result.findings] == [*holds, False, False]
    assert result.verdict == ("in part" if any(holds) else "not reproduced")


@pytest.mark.parametrize(
    ("recalls", "holds"),
    [
        (steps_recall(before=0.6), [False, True]),  # recalled before any step
        (steps_recall(after=0.4), [False, True]),  # too little after it
        (steps_recall(without_match=1.0), [True, False]),  # the order does not matter
    ],
)
def test_memory_order_turns_with_the_single_steps(recalls, holds):
    findings = memory_order.memory_order(SMALL, learns(), recalls).findings
    assert [finding.holds for finding in findings] == [True] * 5 + holds


def test_what_is_frozen_is_trained_in_the_end():
    """The real loop, for a few steps: what moves, and when."""
    moved = []

    def spied(model, language, config):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        run = hl.train(model, language, config)
        moved.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
        return run

    result = memory_order.memory_order(replace(SMALL, seeds=(0, 1), frozen_steps=5, steps=10), spied, steps_recall())
    everything = set(STEPS.values())
    assert len(moved) == 16  # nothing, copy, match, previous token frozen: at two seeds, before and after
    assert moved[0] == moved[2] == everything
    # Without copy no gradient reaches match; the previous-token head writes to the logits by itself.
    assert moved[4] == moved[6] == {STEPS["previous_token"]}
    assert moved[8] == moved[10] == everything - {STEPS["match"]}
    assert moved[12] == moved[14] == everything - {STEPS["previous_token"]}
    assert all(after == everything for after in moved[1::2])
    assert result.findings[1].setting.startswith("copy frozen for 5 steps")


def test_gradient_steps_without_the_match_step():
    """The real steps: the norm of 0 leaves a memory out, and the one after it has less to build on."""
    settings = replace(SMALL, step_d_vocab=8, step_d_model=128, step_length=10, step_sequences=1024)
    result = memory_order.memory_order(settings, learns(), hl.training.gradient_steps)
    table = result.table[result.table["measured"] == "recall"].set_index(["steps", "after"])
    assert (table.loc[("match step left out", "previous_token"), "match"] == 0).all()
    assert table.loc[("all steps", "match"), "match"].mean() > 0.5
    assert (table.loc[("all steps", "match"), "previous_token"] == 0).all()


# The feed-forward memory.

FED = feed_forward.Settings((0, 1, 2), d_model=32, steps=2, step_d_model=256, step_sequences=1024)


def holding(in_W_F, in_values):
    """A `train` that writes tables into W_F, where there is one, and into the values; each given the kind of model."""

    def train(model, language, config):
        log_pi_b, W_E, W_U = language.pi_b.clamp_min(1e-9).log().float(), model.W_E, model.W_U
        tables = {
            "bigrams": log_pi_b,
            "copies": 30 * torch.eye(len(W_E)) - log_pi_b,
            "both": log_pi_b + 30 * torch.eye(len(W_E)),
        }
        has_W_F = bool(model.circuit.bigram)
        with torch.no_grad():
            model.blocks[1].attn.W_V[0] = (
                torch.linalg.pinv(W_E) @ tables[in_values(has_W_F, config)] @ torch.linalg.pinv(W_U)
            )
            if has_W_F:
                table = tables[in_W_F]
                model.blocks[1].mlp.W_out.copy_(torch.linalg.pinv(W_E) @ table @ torch.linalg.pinv(W_U))
        table = pd.DataFrame(
            [(config.steps, 0.0, "in_context_accuracy", "uniform", config.length, 0.5)],
            columns=["step", "seconds", "probe", "continuations", "length", "value"],
        )
        return hl.TrainingRun(model, config, config.steps, table)

    return train


def taking_turns(has_W_F, config):
    return "copies" if has_W_F or config.loss == "predictable" else "bigrams"


def test_the_feed_forward_memory_holds_what_the_values_else_take_up():
    result = feed_forward.feed_forward_memory(FED, holding("bigrams", taking_turns))
    assert result.verdict == "reproduced", result
    trained = result.table[result.table["measured"] == "training"].set_index(["memory", "loss"])
    assert trained["bigrams_in_W_F"].loc["with W_F"].tolist() == pytest.approx([1.0] * 6, abs=1e-4)
    assert trained["copied"].loc[("without", "all")].max() < 0.5
    assert result.figure.png()[1:4] == b"PNG"


@pytest.fixture(scope="module", autouse=True)
def steps_once():
    """The single step depends on settings and seed alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_forward, "_one_step", functools.cache(feed_forward._one_step))
        yield


@pytest.mark.parametrize(
    ("train", "fails"),
    [
        (holding("copies", taking_turns), {1}),
        (holding("bigrams", lambda has_W_F, config: "copies"), {2}),
        (holding("bigrams", lambda has_W_F, config: "bigrams"), {1, 2, 3}),
        (holding("bigrams", lambda has_W_F, config: "both" if config.loss == "predictable" else "copies"), {2, 3}),
    ],
)
def test_the_feed_forward_memory_turns_with_what_holds_the_bigrams(train, fails):
    result = feed_forward.feed_forward_memory(FED, train)
    assert {index for index, finding in enumerate(result.findings) if not finding.holds} == fails


def test_one_gradient_step_is_the_gradient_s_own_by_hand():
    """At logits of 0, a step writes pi(i) (pi_b(j|i) - 1 / V) for orthogonal directions; counted in the very tokens."""
    settings = replace(FED, d_vocab=6, step_d_model=512, step_sequences=1024)
    found = feed_forward._one_step(settings, 0)
    assert found["correlation"] > 0.98 > 0.6 > abs(found["by_frequency"])
    assert found["likeliest_known"] >= 5 / 6  # two continuations may be nearly as likely


# What the data does.

DATA = data_matters.Settings(d_vocab=12, d_model=16, length=24, steps=100, seeds=(0, 1, 2), n_sequences=32)


@functools.cache
def inducing(seed, fixed):
    """A hand-written model, by the keys of its match memory."""
    language = replace(data_matters.QUICK.recipes["fixed triggers, uniform"], seed=seed).language
    strengths = hl.theory.Strengths(20.0, 10.0, 40.0, 1.0)
    return hl.associative_transformer(language, triggers=range(4) if fixed else None, strengths=strengths)


def kind_of(recipe):
    if recipe.continuations == "bigram":
        return "bigram"
    return recipe.which if recipe.which != "frequent" else "few" if recipe.triggers == DATA.few else "base"


def data_runs(on_uniform=0.4, keys=True, **full):
    """A `train` whose models reach full accuracy at these steps, of bigram-drawn data less on uniform continuations."""
    full = {"base": 40, "few": 80, "rare": 70, "random": 90, "bigram": 45, **full}

    def train(recipe):
        kind = kind_of(recipe)
        accuracy = rising(0, full[kind])
        other = [value * on_uniform for value in accuracy] if kind == "bigram" else accuracy
        return made_up(
            recipe, accuracy, other_continuations=other, model=inducing(recipe.seed, recipe.which != "random" and keys)
        )

    return train


def test_data_matters_as_claimed():
    result = data_matters.data_matters(DATA, data_runs())
    assert result.verdict == "reproduced"
    others = result.table.groupby("data")["other_triggers"].mean()
    assert others["random triggers"] > 0.9 > 0.6 > others["fixed triggers, uniform"]
    assert result.table.groupby("data")["steps"].mean().to_dict() == {
        "fixed triggers, uniform": 40,
        "fewer triggers": 80,
        "rare triggers": 70,
        "random triggers": 80,
        "bigram-drawn": 40,
    }


@pytest.mark.parametrize(
    ("options", "fails"),
    [
        ({"few": 40}, {0}),
        ({"rare": 40}, {1}),
        ({"random": 40}, {2}),
        ({"on_uniform": 1.0}, {3}),
        ({"base": 130, "few": 200, "rare": 200, "random": 200, "bigram": 100}, {0, 1, 2, 4, 5}),
        ({"base": 80, "few": 100, "rare": 100, "random": 100, "bigram": 30}, {5}),
        ({"keys": False}, {6}),
        # In-context learning of bigram-drawn continuations is not there at all: what they share with the bigrams is.
        ({"bigram": 200, "on_uniform": 0.2}, {3}),
    ],
)
def test_data_matters_turns(options, fails):
    result = data_matters.data_matters(DATA, data_runs(**options))
    assert {index for index, finding in enumerate(result.findings) if not finding.holds} == fails
    assert result.verdict == "in part"


def test_data_matters_is_not_reproduced_by_untrained_models():
    def untrained(recipe):
        return made_up(recipe, rising(200, 300))

    result = data_matters.data_matters(DATA, untrained)
    assert [finding.holds for finding in result.findings][:6] == [False] * 6


def test_other_triggers_need_a_vocabulary_of_their_own():
    with pytest.raises(ValueError, match="d_vocab must be at least twice the number of triggers, 4, got 7"):
        data_matters.data_matters(replace(DATA, d_vocab=7))


def test_data_matters_of_models_that_were_trained():
    """Real runs, too short to learn much: every measurement is there."""
    result = data_matters.data_matters(replace(DATA, steps=20, seeds=(0, 1)))
    assert not result.table.isna().any().any()
    assert result.verdict != "reproduced"
    assert (result.table["steps"] == 21).all()
