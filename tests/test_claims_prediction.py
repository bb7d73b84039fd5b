"""Facts, winners and causal agreement: claims that hold for the hand-written model, and verdicts that turn."""

import functools
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from trainable_for_tests import shaken

import hijack_lens as hl
from hijack_lens import theory
from hijack_lens.language.facts import CAPITALS
from hijack_lens.reproduction import causal_agreement as causal
from hijack_lens.reproduction import denied_facts as fact_claim
from hijack_lens.reproduction import winner_prediction as winners
from hijack_lens.reproduction.experiment import Recipe
from hijack_lens.theory.tables import TERMS
from hijack_lens.training import TrainingRun
from hijack_lens.training.fit import conflict_prompts
from hijack_lens.training.run import COLUMNS

SMALL = Recipe(0, which="random", triggers=3, d_vocab=8, concentration=1.0, d_model=16, length=16)
STRENGTHS = hl.Strengths(8.0, 4.0, 6.0, 1.0)


def run_of(model, recipe):
    return TrainingRun(model, recipe.config, 0, pd.DataFrame(columns=COLUMNS))


@functools.cache
def handwritten(recipe):
    """As if training had found the construction itself."""
    model = hl.associative_transformer(
        recipe.language, strengths=STRENGTHS, n_ctx=64, dtype=torch.float64, device="cpu"
    )
    return run_of(model, recipe)


@functools.cache
def random(recipe):
    """No training at all: weights that are noise."""
    return run_of(shaken(recipe.untrained().double(), 0.3, recipe.seed), recipe)


def verdicts(result):
    return [finding.holds for finding in result.findings]


def test_a_capital_and_its_country_are_two_words_that_occur_once():
    words = [word for fact in CAPITALS for word in fact]
    assert len(CAPITALS) == 40
    assert len(set(words)) == 80
    assert all(word.isalpha() and word.istitle() for word in words)
    assert not set(words) & set(fact_claim.WORDS)


def test_the_language_of_facts_is_as_certain_as_it_should_be():
    language = fact_claim.fact_language(CAPITALS[:3], (0.5, 0.9))
    for number, certainty in enumerate((0.5, 0.75, 0.9)):  # odds 1, 3, 9
        country, capital = CAPITALS[number]
        row = language.pi_b[language.index(country)]
        assert float(row[language.index(capital)]) == pytest.approx(
            certainty + (1 - certainty) / language.d_vocab, abs=1e-12
        )
        assert language.tokens[language.global_candidate(country)] == capital


# Facts

FACTS = fact_claim.Settings(
    n_facts=6, recipe=fact_claim.FactsRecipe(0, n_facts=4, d_model=16), seeds=(0, 1, 2), repeats=4, lead=6
)


def facts_by_hand(strengths=FACTS.strengths):
    """The least number of repeats that wins, by counting."""
    language = fact_claim.fact_language(CAPITALS[: FACTS.n_facts], FACTS.certainty)
    log_pi_b = language.log_pi_b
    flips = []
    for i in range(FACTS.n_facts):
        ahead = float(log_pi_b[i, FACTS.n_facts + i] - log_pi_b[i, FACTS.n_facts + (i + 1) % FACTS.n_facts])
        match = math.exp(strengths.match)
        wins = [strengths.copy * match * n / (match * n + FACTS.lead + n + 1) > ahead for n in range(FACTS.repeats + 1)]
        flips.append(wins.index(True) if any(wins) else math.inf)
    return flips


def test_facts_flip_where_counts_say_so():
    result = fact_claim.facts(FACTS, train=handwritten)
    assert verdicts(result)[:3] == [True] * 3
    table = result.table[result.table["seed"].isna()]
    measured = []
    for _, rows in table.groupby("fact", sort=False):
        won = rows[rows["total"] > 0]["repeats"]
        measured.append(won.min() if len(won) else math.inf)
    assert measured == facts_by_hand()
    assert len(set(measured)) > 1
    assert result.table["seed"].nunique() == 3
    assert result.figure.png().startswith(b"\x89PNG")


def test_trained_findings_hold_for_models_with_the_two_memories():
    strong = hl.Strengths(20.0, 6.0, 10.0, 1.0)

    def train(recipe):
        return run_of(hl.associative_transformer(recipe.language, strengths=strong, dtype=torch.float64), recipe)

    assert fact_claim.facts(FACTS, train=train).verdict == "reproduced"


def test_facts_that_no_model_has_learned_turn_the_verdict():
    untrained = fact_claim.facts(FACTS, train=random)
    assert verdicts(untrained)[:3] == [True] * 3
    assert not any(verdicts(untrained)[3:])
    assert untrained.verdict == "in part"


def test_facts_of_a_model_other_than_its_strengths_say_turn_the_verdict():
    def make(language, **options):
        return shaken(hl.associative_transformer(language, **options), 0.2)

    result = fact_claim.facts(FACTS, make=make, train=random)
    assert not any(verdicts(result))


@pytest.mark.parametrize("copy", [0.5, 0.0])
def test_facts_of_a_model_with_less_copy_than_it_was_written_with_turn_the_verdict(copy):
    def make(language, *, strengths, **options):
        return hl.associative_transformer(language, strengths=replace(strengths, copy=copy * strengths.copy), **options)

    assert not any(verdicts(fact_claim.facts(FACTS, make=make, train=random))[:2])


def test_an_overruling_that_is_not_the_contexts_turns_the_verdict():
    """A model that has memorised nothing in context: its weights alone, whatever the context says."""

    def train(recipe):
        no_copy = hl.Strengths(20.0, 6.0, 0.0, 1.0)
        return run_of(hl.associative_transformer(recipe.language, strengths=no_copy, dtype=torch.float64), recipe)

    assert verdicts(fact_claim.facts(FACTS, train=train))[3:6] == [True, False, False]


# Prediction of the winner

WINNERS = winners.Settings((SMALL,), (0, 1, 2), (16, 24), 100)


def test_theory_names_every_winner_of_a_handwritten_model():
    def train(recipe):  # with weights as strong as the context, so that either may win
        model = hl.associative_transformer(recipe.language, strengths=replace(STRENGTHS, bigram=3.0), n_ctx=64)
        return run_of(model.double(), recipe)

    result = winners.winner_prediction(replace(WINNERS, seeds=(0, 1, 2, 3, 4)), train)
    assert list(result.table["length"]) == [16, 24] * 5
    assert (result.table["theory_accuracy"] == 1).all()
    assert (result.table[[f"without_{term}_accuracy" for term in TERMS]] == 1).all(None)
    assert (result.table["strengths_accuracy"] == 1).all()
    assert result.verdict == "reproduced", result
    assert result.figure.png().startswith(b"\x89PNG")


def test_winners_of_a_model_without_memories_turn_the_verdict():
    """What the previous-token head writes past the circuit then decides as much as the circuit does."""
    result = winners.winner_prediction(WINNERS, random)
    assert not any(verdicts(result)[::4])
    assert result.verdict != "reproduced"


def test_winners_that_neither_memory_decides_turn_the_verdict():
    def train(recipe):
        model = hl.associative_transformer(recipe.language, strengths=STRENGTHS, n_ctx=64, dtype=torch.float64)
        with torch.no_grad():  # the previous-token head has a say of its own, about what came before the trigger
            remembered = model.W_E @ model.W_V[0, 0]
            says = torch.randn(8, 8, generator=torch.Generator().manual_seed(recipe.seed)).double()
            model.blocks[0].attn.W_O += 20 * torch.linalg.pinv(remembered) @ says @ torch.linalg.pinv(model.W_U)
        return run_of(model, recipe)

    result = winners.winner_prediction(WINNERS, train)
    named, correlated = verdicts(result)[::4], verdicts(result)[2::4]
    assert not any([*named, *correlated])
    assert "without one of them: remembered" in result.note  # nothing else is worth as much


def test_skill_is_what_a_constant_probability_lacks():
    won = pd.Series([True, False, True, True])
    assert winners._skill(pd.Series([0.75] * 4), won) == pytest.approx(0)
    assert winners._skill(won.astype(float), won) == 1
    # Squared errors of 0.01, 0.09, 0.04 and 0.36 against a spread of 3/16.
    assert winners._skill(pd.Series([0.9, 0.3, 0.8, 0.4]), won) == pytest.approx(1 - 0.125 / (3 / 16))
    assert math.isnan(winners._skill(pd.Series([0.9]), pd.Series([True])))


def test_the_calibration_error_by_hand():
    probability = torch.tensor([0.05, 0.05, 0.31, 0.39, 0.95, 1.0], dtype=torch.float64)
    won = torch.tensor([False, True, True, False, True, True])
    expected = (2 * abs(0.05 - 0.5) + 2 * abs(0.35 - 0.5) + 2 * abs(0.975 - 1.0)) / 6
    assert winners.calibration_error(probability, won) == pytest.approx(expected, abs=1e-12)


def test_the_baseline_learns_what_counts_can_tell():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    truth = (x @ torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)).sigmoid()
    won = torch.rand(400, generator=generator, dtype=torch.float64) < truth
    found = (x @ winners._logistic(x, won)).sigmoid()
    assert float((found - truth).abs().max()) < 0.15
    # At the optimum, errors are orthogonal to every input, up to the ridge.
    weights = torch.linalg.lstsq(x, found.logit()[:, None]).solution[:, 0]
    gradient = x.T @ (found - won.double()) / len(x) + 2 * winners._RIDGE * weights
    assert float(gradient.abs().max()) < 1e-5


def test_conflict_prompts_are_those_that_agreement_is_measured_on():
    model = handwritten(SMALL).model
    fit = hl.fit_strengths(model)
    prompts = conflict_prompts(model.language, fit.setting.triggers, 20, 16, 3)
    table = hl.training.theory_agreement(model, fit, n_prompts=20, length=16, seed=3).table
    for prompt, (_, row) in zip(prompts, table.iterrows(), strict=True):
        assert model.language.tokens[prompt.trigger] == row["trigger"]
        margin = theory.margin(prompt, model.language, theory.Setting(STRENGTHS)).total
        assert float(margin) == pytest.approx(row["theory_margin"], abs=1e-6)
        after = [int(b) for a, b in zip(prompt.tokens[:-1], prompt.tokens[1:], strict=True) if a == prompt.trigger]
        assert after == [prompt.in_context] * row["repeats"]


# Causal agreement

CAUSAL = causal.Settings(SMALL, (0, 1, 2), 16, 10)


def test_memories_of_a_handwritten_model_are_worth_what_attribution_says():
    result = causal.causal_agreement(CAUSAL, handwritten)
    assert verdicts(result) == [True, True, False]  # where the splits coincide, neither is better
    for memory in ("context", "weights"):
        for game in ("source", "ablated"):
            off = (result.table[memory] - result.table[f"{memory}_{game}"]).abs().max()
            assert off < 1e-9, (memory, game)
    assert result.figure.png().startswith(b"\x89PNG")


def test_shapley_values_in_the_table_are_those_of_ablated_runs():
    model = random(SMALL).model
    table = causal._ask(model, replace(CAUSAL, n_prompts=3), seed=0)
    heads = [*model.circuit.previous_token, *model.circuit.induction]
    prompts = conflict_prompts(model.language, range(8), 3, 16, 0)
    for prompt, (_, row) in zip(prompts, table.iterrows(), strict=True):

        def margin(*absent, prompt=prompt):
            with hl.hooks.ablate(model, list(absent)) if absent else torch.no_grad():
                logits = model(prompt.tokens[None])[0, -1]
            return (logits[prompt.in_context] - logits[prompt.global_candidate]).item()

        mlps = list(model.circuit.bigram)
        full, no_mlp, no_heads, neither = margin(), margin(*mlps), margin(*heads), margin(*heads, *mlps)
        weights = ((full - no_mlp) + (no_heads - neither)) / 2 + neither
        assert row["weights_ablated"] == pytest.approx(weights, abs=1e-9)
        assert row["context_ablated"] == pytest.approx(full - weights, abs=1e-9)
        assert row["context"] + row["weights"] + row["rest"] == pytest.approx(full, abs=1e-9)


def test_what_they_differ_by_is_exact_without_biases_in_the_heads():
    model = random(SMALL).model
    bare = shaken(SMALL.untrained().double(), 0.3)
    with torch.no_grad():
        for block in bare.blocks:
            block.attn.b_V.zero_()
            block.attn.b_O.zero_()
    off = [
        (table["difference"] - table["predicted_difference"]).abs().max()
        for table in (causal._ask(bare, CAUSAL, 0), causal._ask(model, CAUSAL, 0))
    ]
    assert off[0] < 1e-9
    assert off[1] > 1e-3


def test_a_norm_between_the_memories_turns_the_verdict():
    def train(recipe):
        model = hl.trainable_transformer(recipe.language, d_model=16, norm="LN", n_ctx=32, seed=recipe.seed)
        return run_of(shaken(model.double(), 0.3, recipe.seed), recipe)

    result = causal.causal_agreement(CAUSAL, train)
    assert not any(verdicts(result))
