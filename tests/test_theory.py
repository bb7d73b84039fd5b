"""The closed form, against the formulas written out as loops."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from strategies import World, languages, seeds, worlds

import hijack_lens as hl
from hijack_lens import theory

# A slow, literal transcription of the formulas, with positions t, s from 1.


def softmax(scores):
    exps = [math.exp(score - max(scores)) for score in scores]
    return [x / sum(exps) for x in exps]


def literal_attention(tokens, strengths, triggers, n_learned):
    """Both patterns, as lists of rows of growing length; z[t] is the token at t."""
    z, length = [None, *tokens], len(tokens)
    b1, b2 = strengths.previous_token, strengths.match
    first, second = [None], []
    for t in range(1, length + 1):
        first.append([None, *softmax([b1 * (s == t - 1 and t <= n_learned) for s in range(1, t + 1)])])
    for t in range(1, length + 1):
        scores = []
        for s in range(1, t + 1):
            remembers = sum(first[s][r] for r in range(1, s + 1) if z[r] == z[t])
            scores.append(b2 * (z[t] in triggers) * remembers)
        second.append(softmax(scores))
    return [row[1:] for row in first[1:]], second


def literal_logits(world):
    """[batch][position][token], as nested lists."""
    language, strengths, triggers, n_ctx_train = world.language, world.strengths, world.triggers, world.n_ctx_train
    triggers = range(language.d_vocab) if triggers is None else triggers
    n_learned = math.inf if n_ctx_train is None else n_ctx_train
    weights = language.pi_b.log().tolist()
    batch = []
    for row in world.tokens.tolist():
        _, pattern = literal_attention(row, strengths, triggers, n_learned)
        logits = [[strengths.bigram * x for x in weights[token]] for token in row]
        for t, attended in enumerate(pattern):
            for s, attention in enumerate(attended):
                logits[t][row[s]] += strengths.copy * attention
        batch.append(logits)
    return batch


def matrix(rows):
    """Rows of growing length as a lower triangle."""
    return torch.tensor([[*row, *[0.0] * (len(rows) - len(row))] for row in rows], dtype=torch.float64)


SMALL = {"max_vocab": 8, "max_length": 20, "max_batch": 2}


@given(worlds(**SMALL))
def test_attention_equals_the_formulas(world):
    language, strengths, triggers, n_ctx_train = world.language, world.strengths, world.triggers, world.n_ctx_train
    first, second = theory.attention(world.tokens, world.language, world.setting)
    triggers = range(language.d_vocab) if triggers is None else triggers
    for i, row in enumerate(world.tokens.tolist()):
        expected = literal_attention(row, strengths, triggers, math.inf if n_ctx_train is None else n_ctx_train)
        torch.testing.assert_close(first[i], matrix(expected[0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(second[i], matrix(expected[1]), rtol=0, atol=1e-12)


@given(worlds(**SMALL))
def test_logits_equal_the_formulas(world):
    expected = torch.tensor(literal_logits(world), dtype=torch.float64)
    torch.testing.assert_close(theory.logits(world.tokens, world.language, world.setting), expected, rtol=0, atol=1e-10)


@given(worlds(**SMALL), st.data())
def test_the_margin_is_a_logit_difference_split_by_memory(world, data):
    language, strengths = world.language, world.strengths
    a, b = data.draw(st.permutations(range(language.d_vocab)))[:2]
    margin = theory.margin(world.tokens, world.language, world.setting, in_context=a, global_candidate=b)
    expected = torch.tensor([rows[-1][a] - rows[-1][b] for rows in literal_logits(world)], dtype=torch.float64)
    torch.testing.assert_close(margin.total, expected, rtol=0, atol=1e-10)
    ratios = (language.pi_b[:, a] / language.pi_b[:, b]).log()[world.tokens[:, -1]]
    torch.testing.assert_close(margin.weights, strengths.bigram * ratios, rtol=0, atol=1e-10)
    assert not bool(margin.rest.any())


@given(worlds(), st.data())
def test_batches_and_prefixes_have_the_logits_they_have_alone(world, data):
    cut = data.draw(st.integers(1, world.tokens.shape[-1]))
    whole = theory.logits(world.tokens, world.language, world.setting)
    for row, expected in zip(world.tokens, whole, strict=True):
        alone = theory.logits(row[:cut], world.language, world.setting)
        torch.testing.assert_close(alone, expected[:cut], rtol=0, atol=1e-12)


@given(worlds(focus=st.just(math.inf), max_length=40))
def test_with_perfect_focus_attention_to_a_token_depends_on_counts_alone(world):
    world = World(world.tokens, world.language, world.strengths, None, "relative", None)
    b2 = world.strengths.match
    _, pattern = theory.attention(world.tokens, world.language, world.setting)
    for row, attended in zip(world.tokens.tolist(), pattern[:, -1], strict=True):
        q = row[-1]
        followers = [v for before, v in pairwise(row) if before == q]
        followers += [q] if row[0] == q else []  # position 1 remembers itself
        for v in set(row):
            n_qv, n_v, n_q = followers.count(v), row.count(v), len(followers)
            e = math.exp(b2)
            expected = (e * n_qv + n_v - n_qv) / (e * n_q + len(row) - n_q)
            got = sum(float(x) for x, token in zip(attended, row, strict=True) if token == v)
            assert got == pytest.approx(expected, abs=1e-12)


def test_a_prompt_worked_by_hand():
    # q c q, both heads perfect but finite: at position 3 the memories of "q came before" are 1 (position 1
    # attends to itself), 1 (position 2) and 0, so A2 = (e, e, 1) / (2e + 1) with b2 = 1.
    language = hl.BigramLanguage([[0.2, 0.3, 0.5]] * 3, tokens=["q", "c", "g"])
    setting = theory.Setting(hl.Strengths(math.inf, 1.0, 10.0, 2.0), "q")
    margin = theory.margin(torch.tensor([0, 1, 0]), language, setting, in_context="c", global_candidate="g")
    assert margin.context.item() == pytest.approx(10 * math.e / (2 * math.e + 1), abs=1e-12)
    assert margin.weights.item() == pytest.approx(2 * math.log(0.3 / 0.5), abs=1e-12)
    assert margin.total.item() == pytest.approx(margin.context.item() + margin.weights.item(), abs=1e-12)
    assert repr(margin).startswith("Margin(context=+4.2232, weights=-1.0217, rest=+0.0000, total=+3.2015)")


# Limits


@given(worlds(max_length=40))
def test_a_token_that_is_no_trigger_attends_evenly(world):
    world.triggers = []
    _, pattern = theory.attention(world.tokens, world.language, world.setting)
    length = world.tokens.shape[-1]
    expected = matrix([[1 / t] * t for t in range(1, length + 1)]).expand_as(pattern)
    torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-15)


@given(worlds(match=st.sampled_from([1e3, 1e4, 1e8]), focus=st.sampled_from([0.0, 2.0, 1e3, math.inf])))
def test_large_strengths_attend_to_the_best_match_alone(world):
    first, second = theory.attention(world.tokens, world.language, world.setting)
    assert bool(theory.logits(world.tokens, world.language, world.setting).isfinite().all())
    for pattern in (first, second):
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), rtol=0, atol=1e-12)
    if world.strengths.previous_token < 1e3 or world.triggers is not None or world.n_ctx_train is not None:
        return
    for row, pattern in zip(world.tokens.tolist(), second, strict=True):
        q = row[-1]
        matches = [(s == 0 and row[0] == q) or (s > 0 and row[s - 1] == q) for s in range(len(row))]
        expected = [m / sum(matches) if any(matches) else 1 / len(row) for m in matches]
        torch.testing.assert_close(pattern[-1], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@given(worlds())
def test_a_focus_of_1000_is_infinite(world):
    _, *strengths = vars(world.strengths).values()
    limits = []
    for focus in (1e3, math.inf):
        world.strengths = hl.Strengths(focus, *strengths)
        limits.append(theory.logits(world.tokens, world.language, world.setting))
    torch.testing.assert_close(*limits, rtol=0, atol=1e-12)


@given(worlds(max_length=30), st.integers(0, 5))
def test_absolute_positions_without_end_are_relative(world, more):
    absolute = (world.tokens.shape[-1] + more) if more else None
    expected, actual = (
        theory.logits(world.tokens, world.language, theory.Setting(world.strengths, world.triggers, *positions))
        for positions in ((), ("absolute", absolute))
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@settings(max_examples=20)
@given(languages(max_vocab=8), seeds)
def test_a_prompt_brings_its_own_candidates(language, seed):
    prompt = hl.hijack_prompt(language, 0, 1, 2, 12, global_candidate=2, n_prompts=3, seed=seed)
    expected = theory.margin(prompt.tokens, language, in_context=1, global_candidate=2)
    assert theory.margin(prompt, language).total.equal(expected.total)
    swapped = theory.margin(prompt, language, in_context=3, global_candidate=1)
    assert swapped.total.equal(theory.margin(prompt.tokens, language, in_context=3, global_candidate=1).total)


def test_tokens_of_any_integer_type_and_of_a_single_position():
    language = hl.BigramLanguage.dirichlet(5, seed=0)
    tokens = torch.tensor([[1, 2, 1, 1]])
    for dtype in (torch.int32, torch.int16):
        assert theory.logits(tokens.to(dtype), language).equal(theory.logits(tokens, language))
    alone = theory.logits(torch.tensor([3]), language, theory.Setting(hl.Strengths(copy=4.0, bigram=0.5)))
    expected = 0.5 * language.pi_b[3].log()
    expected[3] += 4.0
    torch.testing.assert_close(alone, expected[None], rtol=0, atol=1e-12)


# The setting


@given(worlds(max_vocab=12, max_length=30))
def test_the_setting_of_a_model_written_by_hand_gives_its_logits(world):
    model = hl.associative_transformer(
        world.language, **vars(world.setting), n_ctx=40, dtype=torch.float64, device="cpu"
    )
    predicted = theory.logits(world.tokens, model.language, theory.Setting.of(model))
    torch.testing.assert_close(predicted, model(world.tokens).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_the_setting_of_a_model_says_what_it_was_written_with(positions, tmp_path):
    learned = 9 if positions == "absolute" else None
    expected = theory.Setting(hl.Strengths(7.0, 5.0, 3.0, 2.0), [0, 2], positions, learned)
    model = hl.associative_transformer(hl.BigramLanguage.dirichlet(4, seed=0), **vars(expected), n_ctx=20)
    assert theory.Setting.of(model) == expected
    model.save_pretrained(tmp_path)
    assert theory.Setting.of(hl.BigramTransformer.from_pretrained(tmp_path)) == expected


def test_a_setting_is_a_value(unchecked):
    setting = theory.Setting(triggers=[1, 2])
    same = (theory.Setting(triggers=triggers) for triggers in (torch.tensor([1, 2]), (1, 2), iter([1, 2])))
    assert {setting, *same} == {setting}
    assert theory.Setting(triggers="q") == theory.Setting(triggers=["q"]) != theory.Setting()
    assert theory.Setting() == theory.Setting(hl.Strengths(), None, "relative", None)


# Bad input

LANGUAGE = hl.BigramLanguage.dirichlet(4, seed=0)
ZEROS = hl.BigramLanguage([[0.0, 1.0], [0.5, 0.5]], tokens=["a", "b"])
TOKENS = torch.tensor([0, 1, 0])

VALUE_ERRORS = {
    "prompt holds token id 4; the vocabulary has ids 0 to 3": lambda: theory.logits(TOKENS + 3, LANGUAGE),
    "prompt holds token id -1; the vocabulary": lambda: theory.attention(TOKENS - 1, LANGUAGE),
    r"prompt must be .* got shape \(1, 1, 3\)": lambda: theory.logits(TOKENS[None, None], LANGUAGE),
    r"prompt must be a non-empty .* got shape \(0,\)": lambda: theory.logits(TOKENS[:0], LANGUAGE),
    "positions must be one of .* got 'rotary'": lambda: theory.Setting(positions="rotary"),
    "n_ctx_train is for absolute positions": lambda: theory.Setting(n_ctx_train=5),
    "model.strengths is None.*fit_strengths": lambda: theory.Setting.of(hl.trainable_transformer(LANGUAGE, d_model=8)),
    "n_ctx_train must be at least 1, got 0": lambda: theory.Setting(positions="absolute", n_ctx_train=0),
    "trigger 'z' is not one of": lambda: theory.logits(TOKENS, LANGUAGE, theory.Setting(triggers="z")),
    "'a' after 'a'.*floored": lambda: theory.logits(TOKENS, ZEROS),
    "in_context 9 is not a token id": lambda: theory.margin(TOKENS, LANGUAGE, in_context=9, global_candidate=1),
    "global_candidate 9 is not a token id": lambda: theory.margin(TOKENS, LANGUAGE, in_context=1, global_candidate=9),
    "match must be a finite number >= 0, got inf": lambda: hl.Strengths(match=math.inf),
    "copy must be a finite number >= 0, got nan": lambda: hl.Strengths(copy=math.nan),
    "previous_token must be .* got -1": lambda: hl.Strengths(previous_token=-1),
    "bigram must be .* got -0.5": lambda: hl.Strengths(bigram=-0.5),
}


class Broken:
    """An object whose attributes cannot be asked for."""

    def __getattr__(self, name):
        raise RuntimeError(name)


TYPE_ERRORS = {
    "prompt must hold integer token ids, got dtype torch.float32": lambda: theory.logits(TOKENS.float(), LANGUAGE),
    "prompt must be a tensor of token ids, got str": lambda: theory.logits("aba", LANGUAGE),
    "n_ctx_train must be an int, got 2.5": lambda: theory.Setting(positions="absolute", n_ctx_train=2.5),
    "prompt must be a tensor of token ids, got Broken": lambda: theory.logits(Broken(), LANGUAGE),
    "margin needs in_context= and global_candidate=": lambda: theory.margin(TOKENS, LANGUAGE, in_context=1),
    "strengths must be a Strengths, got 3": lambda: theory.Setting(3),
    "triggers must be a token or several, got 2.5": lambda: theory.Setting(triggers=2.5),
    "model must be a BigramTransformer, got Linear": lambda: theory.Setting.of(torch.nn.Linear(2, 2)),
    "match must be a number, got '6'": lambda: hl.Strengths(match="6"),
    "copy must be a number, got True": lambda: hl.Strengths(copy=True),
}


test_a_bad_value_is_refused_by_name_and_value = refused(ValueError, VALUE_ERRORS)
test_a_bad_type_is_refused_by_name_and_value = refused(TypeError, TYPE_ERRORS)


@pytest.mark.parametrize(
    "ask",
    [
        lambda setting: theory.attention(TOKENS, LANGUAGE, setting),
        lambda setting: theory.logits(TOKENS, LANGUAGE, setting),
        lambda setting: theory.margin(TOKENS, LANGUAGE, setting, in_context=1, global_candidate=2),
        lambda setting: theory.min_repeats(LANGUAGE, 0, 1, 2, setting, lead=1),
        lambda setting: theory.phase_boundary(TOKENS, setting, lead=1),
    ],
)
def test_what_is_no_setting_is_refused(ask, unchecked):
    ask(theory.Setting())
    with pytest.raises(TypeError, match=r"setting must be a Setting or Tables, got Strengths\("):
        ask(hl.Strengths())
