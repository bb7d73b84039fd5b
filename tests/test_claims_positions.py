"""The claims on positions: their formulas against loops, and verdicts that turn with the model."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hijack_lens as hl
from hijack_lens.models import BigramTransformer
from hijack_lens.reproduction import no_positions as without
from hijack_lens.reproduction import positions_and_length as by_length
from hijack_lens.reproduction.experiment import Recipe
from hijack_lens.training.run import COLUMNS

torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for one another

LANGUAGE = without.with_beginning(hl.BigramLanguage.dirichlet(5, 0.5, seed=0), 1e-3)
BEGIN, TRIGGERS = 5, [1, 3]


def unpositioned(reach=12, n_ctx=24, **strengths):
    return without.unpositioned_transformer(LANGUAGE, TRIGGERS, hl.Strengths(**strengths), reach=reach, n_ctx=n_ctx)


def begun(n_prompts, length, seed=0):
    tokens = torch.randint(BEGIN, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BEGIN
    return tokens


def as_run(model):
    """A model that nobody trained, where an experiment expects one that was."""
    config = hl.TrainConfig(triggers=(0,), length=8, seed=0)
    return hl.TrainingRun(model, config, 0, pd.DataFrame(columns=COLUMNS))


def untrained(recipe):
    return as_run(recipe.untrained())


# By construction, without positions


def test_the_theory_of_positions_is_not_set_beside_a_model_without(unchecked):
    model = unpositioned(previous_token=3.0)
    prompt = hl.hijack_prompt(LANGUAGE, 1, 0, 2, 12, global_candidate=2, seed=0)
    assert hl.explain(model, prompt).theory_beside_model() == {}
    with pytest.raises(ValueError, match="positions must be one of 'relative', 'absolute', got 'none'"):
        hl.theory.Setting.of(model)


def by_loops(tokens, strengths, reach):
    """Logits of one prompt, position by position, from the formulas of docs/no_positions.md."""
    b1, b2, b3, g = vars(strengths).values()
    scale = b1 * reach * (reach + 1) ** 2 * (reach + 2)
    memory, rows = {}, []
    for t in range(1, len(tokens) + 1):
        scores = [-scale * (t - 1 - s) ** 2 / ((s + 1) * (s + 2) * t * (t + 1)) for s in range(1, t + 1)]
        weights = [math.exp(score - max(scores)) for score in scores]
        memory[t] = {
            v: sum(w for w, z in zip(weights, tokens, strict=False) if z == v) / sum(weights) for v in range(6)
        }
        q = tokens[t - 1]
        matches = [math.exp(b2 * (q in TRIGGERS) * memory[s][q]) for s in range(1, t + 1)]
        row = [g * math.log(LANGUAGE.pi_b[q, v]) for v in range(6)]
        for match, z in zip(matches, tokens, strict=False):
            row[z] += b3 * match / sum(matches)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_the_model_and_the_formula_are_what_loops_over_positions_give():
    strengths = hl.Strengths(5.0, 4.0, 7.0, 0.5)
    tokens = begun(3, 24)  # the second half beyond the reach
    expected = torch.stack([by_loops(row, strengths, 12) for row in tokens.tolist()])
    formula = without.unpositioned_logits(tokens, LANGUAGE, TRIGGERS, strengths, 12)
    with torch.no_grad():
        measured = unpositioned(previous_token=5.0, match=4.0, copy=7.0, bigram=0.5)(tokens)
    torch.testing.assert_close(formula, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-9)


def test_up_to_its_reach_it_reads_as_a_relative_key_does():
    relative = hl.associative_transformer(LANGUAGE, TRIGGERS, strengths=hl.Strengths(40.0), dtype=torch.float64)
    tokens = begun(8, 24)
    with torch.no_grad():
        difference = (unpositioned(previous_token=40.0)(tokens) - relative(tokens)).abs().amax((0, 2))
    assert difference[:12].max() < 1e-9
    assert difference[12:].max() > 1e-6  # and blurs beyond it


@given(reach=st.integers(2, 60), strength=st.floats(0.5, 30))
@settings(max_examples=50)
def test_the_position_before_leads_by_the_strength_up_to_the_reach(reach, strength):
    scores = without.previous_token_scores(reach, without.previous_token_scale(strength, reach))
    for t in range(2, reach + 1):
        own = scores[t - 1, :t]
        others = torch.cat([own[: t - 2], own[t - 1 :]])
        assert own[t - 2] == 0
        assert others.max() <= -strength * (1 - 1e-12)
    # Nor is the reach any longer.
    assert float(scores[-1, -1]) == pytest.approx(-strength)


def test_without_a_beginning_no_model_can_tell_the_positions_of_a_run_apart():
    model = hl.trainable_transformer(LANGUAGE, "none", d_model=16, n_layers=3, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        logits = model(torch.tensor([[2, 2, 2, 2, 0, 2]]))[0]
    torch.testing.assert_close(logits[:4], logits[:1].expand(4, -1))
    assert (logits[5] - logits[0]).abs().max() > 1e-3


def test_one_layer_without_positions_knows_no_order_and_two_do():
    model = hl.trainable_transformer(LANGUAGE, "none", d_model=16, n_layers=3, dtype=torch.float64, device="cpu")
    _, said = model.run_with_cache(torch.tensor([[0, 1, 2, 3, 4]]))
    _, shuffled = model.run_with_cache(torch.tensor([[2, 0, 3, 1, 4]]))
    after = [(said["resid_post", n][0, -1] - shuffled["resid_post", n][0, -1]).abs().max() for n in range(2)]
    assert after[0] < 1e-12
    assert after[1] > 1e-3


# Verdicts, without positions

SMALL = replace(without.QUICK, seeds=(0, 1), multiples=(1.0, 2.0), n_prompts=2)


def with_positions(recipe):
    """Models that do run the mechanism, by a relative key; of three layers, the middle one is idle."""
    language = recipe.language.floored(1e-3)
    two = hl.associative_transformer(language, range(recipe.triggers), n_ctx=128, device="cpu")
    if recipe.n_layers == 2:
        return as_run(two)
    three = BigramTransformer(replace(two.architecture, n_layers=3), language, triggers=two.triggers, device="cpu")
    weights = {name.replace("blocks.1.", "blocks.2."): value for name, value in two.named_parameters()}
    with torch.no_grad():
        for name, parameter in three.named_parameters():
            parameter.copy_(weights.get(name, torch.zeros(())))
    return as_run(three)


def holds(result):
    return [finding.holds for finding in result.findings]


def as_claimed(recipe):
    """Three layers that run the mechanism; and two that do what two can, written by hand as docs/no_positions.md says.

    The first attends to all positions alike, and so tells how often a trigger has occurred so far; the second attends
    to where that is most, the trigger's own positions aside.
    """
    run = with_positions(recipe)
    if recipe.n_layers == 2:
        first, second = (block.attn for block in run.model.blocks)
        triggers = list(run.model.triggers)
        with torch.no_grad():
            first.W_R.zero_()
            second.W_K.mul_(100)
            second.W_K[0][:, triggers] -= 100 * run.model.W_E[triggers].T
    return run


def test_three_layers_that_run_the_mechanism_where_two_cannot_are_found_to():
    result = without.no_positions(SMALL, train=as_claimed)
    assert result.verdict == "reproduced", result
    assert len(result.table) == len(SMALL.multiples) + 4


def test_what_two_layers_do_as_well_is_not_the_third_one_s():
    assert holds(without.no_positions(SMALL, train=with_positions)) == [True, True, True, False]


def test_models_without_the_mechanism_turn_the_verdict():
    def forgetful(*arguments, **options):
        model = without.unpositioned_transformer(*arguments, **options)
        with torch.no_grad():
            model.blocks[0].attn.W_V.zero_()  # no codes, no positions
        return model

    result = without.no_positions(SMALL, make=forgetful, train=untrained)
    assert holds(result) == [False] * 4
    assert result.verdict == "not reproduced"


# Verdicts, by length

LATE = replace(
    by_length.QUICK, recipe=Recipe(0, d_vocab=8, triggers=2, length=16), multiples=(1, 2, 4), candidates=3, n_prompts=3
)


def ideal(recipe):
    """Hand-written models in place of trained ones."""
    learned = recipe.length if recipe.positions == "absolute" else None
    language = recipe.language.floored(1e-3)
    return as_run(
        hl.associative_transformer(
            language, range(recipe.triggers), recipe.positions, n_ctx=64, n_ctx_train=learned, device="cpu"
        )
    )


def test_late_prompts_keep_their_evidence_and_move_it_beyond_the_training_length():
    language = LATE.recipe.language
    short, long = (by_length.late_conflicts(language, LATE, multiple) for multiple in (1, 4))
    assert short.tokens.shape == (18, 16)
    assert long.tokens.shape == (18, 64)
    assert torch.equal(long.tokens[:, 48:], short.tokens)
    for tokens, c, g in zip(long.tokens, long.in_context, long.global_candidate, strict=True):
        q = tokens[-1]
        assert int(g) == language.global_candidate(int(q))
        assert not torch.isin(torch.stack([q, c, g]), tokens[:48]).any()
        follow = tokens[1:][tokens[:-1] == q]
        assert follow.tolist() == [int(c)] * LATE.repeats


@pytest.mark.parametrize("multiples", [(2, 4), (1,)])
def test_lengths_must_lie_within_and_beyond_training(multiples):
    with pytest.raises(ValueError, match=r"multiples must hold 1, and at least one that is greater, got \("):
        by_length.positions_and_length(replace(LATE, multiples=multiples), train=ideal)


def test_models_that_are_as_claimed_are_found_to_be():
    result = by_length.positions_and_length(LATE, train=ideal)
    assert result.verdict == "reproduced", result
    assert len(result.table) == 3 * (2 + 2 * 3)


def test_an_absolute_model_that_reads_on_turns_the_verdict():
    def always_relative(language, triggers, positions, strengths, *, n_ctx_train, **options):
        return hl.associative_transformer(language, triggers, "relative", strengths, **options)

    result = by_length.positions_and_length(
        LATE, make=always_relative, train=lambda recipe: ideal(replace(recipe, positions="relative"))
    )
    assert holds(result) == [True, False, True, True, False, False]


def test_a_relative_model_that_stops_reading_turns_the_verdict():
    def always_absolute(language, triggers, positions, strengths, *, n_ctx_train, **options):
        return hl.associative_transformer(
            language, triggers, "absolute", strengths, n_ctx_train=LATE.recipe.length, **options
        )

    result = by_length.positions_and_length(
        LATE, make=always_absolute, train=lambda recipe: ideal(replace(recipe, positions="absolute"))
    )
    assert holds(result) == [False, True, True, False, True, False]


def test_untrained_models_show_nothing_of_it():
    result = by_length.positions_and_length(LATE, train=untrained)
    assert holds(result)[2:] == [False] * 4
