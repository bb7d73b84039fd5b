"""The bigram language: counts by hand, and what sampling promises."""

import math
import sys
from collections import Counter
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from strategies import languages, seeds

import hijack_lens as hl

TWO_STATES = [[0.9, 0.1], [0.5, 0.5]]  # stationary: 5/6, 1/6
SPARSE = [[0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, double(expected), rtol=0, atol=atol)


def assert_frequencies(counts, probabilities):
    """Counts lie within 5 standard deviations of what the probabilities let expect."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    n = counts.sum(-1, keepdims=True)
    spread = np.sqrt(n * probabilities * (1 - probabilities))
    assert (np.abs(counts - n * probabilities) <= 5 * spread + 1e-9).all()


# From a matrix


def test_a_matrix_becomes_float64_rows_and_their_logarithms():
    language = hl.BigramLanguage(torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float32), tokens=["a", "b"])
    assert language.pi_b.dtype == language.log_pi_b.dtype == torch.float64
    assert_close(language.pi_b, [[0.0, 1.0], [0.25, 0.75]])
    assert_close(language.log_pi_b, [[-math.inf, 0.0], [math.log(0.25), math.log(0.75)]])
    assert (language.d_vocab, language.tokens, language.level) == (2, ("a", "b"), "char")


def test_rows_off_by_float32_rounding_are_rescaled():
    rows = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    language = hl.BigramLanguage(rows / rows.sum(-1, keepdim=True))
    assert_close(language.pi_b.sum(-1), [1.0] * 7, atol=1e-15)


def test_the_users_matrix_is_neither_changed_nor_shared():
    matrix = double(TWO_STATES)
    language = hl.BigramLanguage(matrix)
    matrix[0] = 0
    assert_close(language.pi_b, TWO_STATES)


@pytest.mark.parametrize(
    ("pi_b", "expected"),
    [
        (TWO_STATES, [5 / 6, 1 / 6]),
        ([[0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]], [0.5, 0.25, 0.25]),  # of period 2
        ([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [1 / 3] * 3),  # of period 3
        ([[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]], [0, 0.5, 0.5]),  # ends in 1 or in 2
    ],
)
def test_first_tokens_are_as_frequent_as_in_the_long_run(pi_b, expected):
    assert_close(hl.BigramLanguage(pi_b).pi_u, expected)


def test_the_long_run_of_a_chain_that_rarely_moves():
    # It leaves state 0 three times as often as state 1, so it is in state 1 three quarters of the time.
    language = hl.BigramLanguage([[1 - 3e-6, 3e-6], [1e-6, 1 - 1e-6]])
    assert_close(language.pi_u, [0.25, 0.75], atol=1e-8)


@pytest.mark.parametrize("mixing", [1.0, 1e-6])
def test_the_long_run_of_a_large_vocabulary(mixing):
    """Two halves: a tenth (times mixing) of the first flows to the second, three tenths back: three to one."""
    rows = torch.rand(1002, 1002, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = mixing * torch.tensor([[-0.1, 0.1], [0.3, -0.3]], dtype=torch.float64) + torch.eye(2, dtype=torch.float64)
    blocks = rows.unflatten(0, (2, 501)).unflatten(2, (2, 501))
    blocks = blocks / blocks.sum(3, keepdim=True) * flow[:, None, :, None]
    language = hl.BigramLanguage(blocks.reshape(1002, 1002))
    assert_close(language.pi_u.reshape(2, 501).sum(1), [0.75, 0.25], atol=1e-8)
    torch.testing.assert_close(language.pi_u @ language.pi_b, language.pi_u, rtol=0, atol=1e-14)


@given(languages(max_vocab=20))
def test_the_long_run_is_stationary(language):
    torch.testing.assert_close(language.pi_u @ language.pi_b, language.pi_u, rtol=0, atol=1e-12)


def test_entropy_rate_by_hand():
    # 5/6 of the time in state 0, whose successor costs -0.9 ln 0.9 - 0.1 ln 0.1; else one fair coin.
    expected = 5 / 6 * (-0.9 * math.log(0.9) - 0.1 * math.log(0.1)) + 1 / 6 * math.log(2)
    assert hl.BigramLanguage(TWO_STATES).entropy_rate == pytest.approx(expected, abs=1e-12)
    assert hl.BigramLanguage(TWO_STATES, pi_u=[0.0, 1.0]).entropy_rate == pytest.approx(expected, abs=1e-12)
    assert hl.BigramLanguage([[0, 1], [1, 0]]).entropy_rate == 0


def test_global_candidates_and_index(unchecked):
    language = hl.BigramLanguage(TWO_STATES, tokens=["a", "b"])
    # The likeliest successor other than the token itself, of which there is just one here.
    assert [language.global_candidate("a"), language.global_candidate(1)] == [1, 0]
    assert [language.index("b"), language.index(1), language.index(np.int64(1))] == [1, 1, 1]
    assert language.trigger_ids(None).tolist() == [0, 1]
    assert language.trigger_ids("b").tolist() == language.trigger_ids(["b"]).tolist() == [1]
    assert language.trigger_ids(()).tolist() == []


def test_display_shows_white_space():
    language = hl.BigramLanguage.from_text("a b\na b\t")
    assert [language.display(token) for token in (" ", "\n", "\t", "a")] == ["␣", "⏎", "⇥", "a"]


# From text


def test_character_counts_by_hand():
    # "aaab": aa twice, ab once; b has no successor.
    bare = hl.BigramLanguage.from_text("aaab", smoothing=0.0)
    assert bare.tokens == ("a", "b")
    assert_close(bare.pi_b, [[2 / 3, 1 / 3], [3 / 4, 1 / 4]])  # after b: anything, as often as it occurs
    assert_close(bare.pi_u, [3 / 4, 1 / 4])
    smooth = hl.BigramLanguage.from_text("aaab", smoothing=0.5)
    assert_close(smooth.pi_b, [[2.5 / 4, 1.5 / 4], [1 / 2, 1 / 2]])
    assert_close(smooth.pi_u, [3.5 / 5, 1.5 / 5])


def test_word_counts_by_hand():
    language = hl.BigramLanguage.from_text("Don't stop; don't\n stop!", level="word", smoothing=0.0)
    assert language.tokens == ("!", ";", "Don't", "don't", "stop")
    assert_close(language.pi_u, [1 / 6, 1 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert_close(language.pi_b[language.index("stop")], [0.5, 0.5, 0, 0, 0])
    assert_close(language.pi_b[language.index("Don't")], [0, 0, 0, 0, 1])


def test_rare_tokens_become_one_unknown():
    # "aaabbc" with two tokens: a a a ? ? ?
    language = hl.BigramLanguage.from_text("aaabbc", max_vocab=2, smoothing=0.0)
    assert language.tokens == ("<unk>", "a")
    assert_close(language.pi_b, [[1, 0], [1 / 3, 2 / 3]])
    assert language.encode("caz").tolist() == [0, 1, 0]
    assert hl.BigramLanguage.from_text("aaabbc", max_vocab=3).tokens == ("a", "b", "c")


@given(st.text("ab \n", min_size=2, max_size=40), st.floats(0, 3))
def test_character_counts_equal_a_loop_over_the_text(text, smoothing):
    language = hl.BigramLanguage.from_text(text, smoothing=smoothing)
    tokens = sorted(set(text))
    assert language.tokens == tuple(tokens)
    pairs = Counter(pairwise(text))
    for i, v in enumerate(tokens):
        counts = [pairs[v, u] + smoothing for u in tokens]
        if sum(counts) == 0:
            counts = [text.count(u) for u in tokens]
        assert_close(language.pi_b[i], [count / sum(counts) for count in counts])


@given(st.text(min_size=2, max_size=30), st.text(max_size=20))
def test_characters_survive_encoding_and_decoding(corpus, text):
    language = hl.BigramLanguage.from_text(corpus)
    assert language.decode(language.encode(corpus)) == corpus
    text = "".join(character for character in text if character in corpus)
    if text:
        assert language.decode(language.encode(text)) == text


@given(st.lists(st.text("aB1'’,;ß \n\t", max_size=6), min_size=2, max_size=12), seeds)
def test_words_survive_encoding_and_decoding(words, seed):
    text = "x " + " ".join(words) + " x"
    language = hl.BigramLanguage.from_text(text, level="word")
    pieces = [language.tokens[i] for i in language.encode(text)]
    assert "".join(pieces) == "".join(text.split())  # all of the text but its white space
    ids = torch.randint(language.d_vocab, (9,), generator=torch.Generator().manual_seed(seed))
    assert language.encode(language.decode(ids)).tolist() == ids.tolist()


def test_the_default_text_is_english(monkeypatch):
    text = hl.default_text()
    assert len(text) > 200_000
    assert text.count(" the ") > 2_000
    likeliest = hl.BigramLanguage.from_text(text)
    assert likeliest.tokens[likeliest.global_candidate("q")] == "u"
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # an interpreter without it
    assert hl.default_text().count(" the ") > 200


# Drawn, and floored


def test_dirichlet_rows_are_distributions_fixed_by_the_seed():
    first, again, other = (hl.BigramLanguage.dirichlet(6, 0.5, seed=seed) for seed in (3, 3, 4))
    assert_close(first.pi_b.sum(-1), [1.0] * 6)
    assert first.pi_b.equal(again.pi_b)
    assert not first.pi_b.equal(other.pi_b)
    assert first.tokens == ("0", "1", "2", "3", "4", "5")


def test_dirichlet_concentration_sets_the_spread():
    # A symmetric Dirichlet's entries have mean 1/d and variance (1/d)(1 - 1/d) / (d * concentration + 1).
    for concentration in (0.1, 1.0, 10.0):
        pi_b = hl.BigramLanguage.dirichlet(200, concentration, seed=1).pi_b
        expected = (1 / 200) * (1 - 1 / 200) / (200 * concentration + 1)
        assert float(pi_b.var()) == pytest.approx(expected, rel=0.1)


def test_floored_mixes_in_a_uniform_language():
    # 0.6 of the row, and 0.4 shared by four tokens. Row 0 is 0, 0.5, 0, 0.5; row 1 is 0, 0, 1, 0.
    floored = hl.BigramLanguage(SPARSE, tokens=list("abcd")).floored(0.1)
    assert_close(floored.pi_b[0], [0.1, 0.4, 0.1, 0.4])
    assert_close(floored.pi_b[1], [0.1, 0.1, 0.7, 0.1])
    assert floored.tokens == tuple("abcd")
    assert bool(floored.finite_log_pi_b().isfinite().all())


# Sampling


def literal_predictable(row, triggers):
    return [token in triggers and token in row[:i] for i, token in enumerate(row)]


@given(languages(max_vocab=8), st.data(), st.integers(1, 4), st.integers(1, 30), seeds)
def test_triggers_are_always_followed_by_their_continuation(language, data, n_sequences, length, seed):
    size = language.d_vocab
    fixed = data.draw(st.none() | st.lists(st.integers(0, size - 1), unique=True))
    n_triggers = data.draw(st.none() | st.integers(0, size))
    how = data.draw(st.sampled_from(["uniform", "bigram"]) | st.just([1 / size] * size))
    drawn = {"triggers": fixed} if n_triggers is None else {"n_triggers": n_triggers}
    sampled = language.sample(n_sequences, length, continuations=how, seed=seed, **drawn)

    expected = n_triggers if n_triggers is not None else size if fixed is None else len(fixed)
    assert sampled.tokens.shape == sampled.predictable.shape == (n_sequences, length)
    assert sampled.triggers.shape == sampled.continuations.shape == (n_sequences, expected)
    for i in range(n_sequences):
        row, triggers = sampled.tokens[i].tolist(), sampled.triggers[i].tolist()
        if n_triggers is None:
            assert triggers == (list(range(size)) if fixed is None else fixed)
        assert len(set(triggers)) == len(triggers)
        says = dict(zip(triggers, sampled.continuations[i].tolist(), strict=True))
        assert all(says.get(v, u) == u for v, u in pairwise(row))
        assert sampled.predictable[i].tolist() == literal_predictable(row, triggers)


def test_sampled_bigrams_follow_pi_b_and_first_tokens_pi_u():
    language = hl.BigramLanguage(SPARSE, pi_u=[0.2, 0.0, 0.5, 0.3])
    tokens = language.sample(20_000, 5, seed=0).tokens
    assert_frequencies(torch.bincount(tokens[:, 0], minlength=4), language.pi_u)
    bigrams = torch.bincount((tokens[:, :-1] * 4 + tokens[:, 1:]).flatten(), minlength=16).reshape(4, 4)
    assert_frequencies(bigrams, language.pi_b)
    assert int(bigrams[language.pi_b == 0].sum()) == 0


def test_bigrams_of_probability_zero_never_occur():
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(40, 40, generator=generator) * (torch.rand(40, 40, generator=generator) < 0.1)
    rows[:, 17] += 0.01  # no row is empty
    language = hl.BigramLanguage(rows.double() / rows.double().sum(-1, keepdim=True))
    tokens = language.sample(500, 200, seed=1).tokens
    assert bool((language.pi_b[tokens[:, :-1], tokens[:, 1:]] > 0).all())


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_stay_in_the_support(draw):
    language = hl.BigramLanguage(SPARSE)
    after = language.step(torch.arange(4), torch.full((4,), draw, dtype=torch.float64))
    assert after.tolist() == ([1, 2, 0, 0] if draw == 0 else [3, 2, 0, 2])


def test_continuations_are_drawn_as_asked():
    language = hl.BigramLanguage(SPARSE)

    def counts(trigger, how):
        after = language.sample(8_000, 1, trigger, continuations=how, seed=2).continuations
        return torch.bincount(after.flatten(), minlength=4)

    assert_frequencies(counts(3, "uniform"), [0.25] * 4)
    assert_frequencies(counts(3, "bigram"), SPARSE[3])
    assert_frequencies(counts(3, [0.0, 0.7, 0.3, 0.0]), [0.0, 0.7, 0.3, 0.0])


def test_triggers_drawn_per_sequence_are_as_frequent_as_first_tokens():
    language = hl.BigramLanguage(SPARSE, pi_u=[0.2, 0.0, 0.5, 0.3])
    one = language.sample(8_000, 1, n_triggers=1, seed=3).triggers
    assert_frequencies(torch.bincount(one.flatten(), minlength=4), language.pi_u)
    # Two without replacement: 2 is left out with probability P(0, 3) + P(3, 0) = 0.2 * 3/8 + 0.3 * 2/7.
    two = language.sample(8_000, 1, n_triggers=2, seed=4).triggers
    without = int((two != 2).all(-1).sum())
    assert_frequencies([without, 8_000 - without], [p := 0.2 * 3 / 8 + 0.3 * 2 / 7, 1 - p])


def test_samples_depend_on_the_seed_alone(global_rng_untouched):
    language = hl.BigramLanguage.dirichlet(9, seed=0)

    def sample(seed):
        return language.sample(3, 40, n_triggers=2, continuations="bigram", seed=seed).tokens

    expected = sample(7)
    assert sample(torch.Generator().manual_seed(7)).equal(expected)
    assert not sample(8).equal(expected)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert sample(7).equal(expected)
        assert hl.BigramLanguage.dirichlet(9, seed=0).pi_b.equal(language.pi_b)


@settings(max_examples=20)
@given(seeds)
def test_a_generator_moves_on(seed):
    language, generator = hl.BigramLanguage.dirichlet(9, seed=0), torch.Generator().manual_seed(seed)
    first, second = (language.sample(3, 40, seed=generator).tokens for _ in range(2))
    assert not first.equal(second)


# Triggers by frequency


def test_triggers_are_the_most_or_least_frequent_tokens(unchecked):
    # In the long run state 0 holds 1/2, and 1 and 2 hold 1/4 each; state 3 is left for good. Sequences begin in 3.
    language = hl.BigramLanguage([[0, 0.6, 0.4, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], [0, 0, 0, 1.0])
    assert language.sample(2, 4, "frequent", n_triggers=2, seed=0).triggers.tolist() == [[0, 1]] * 2
    assert language.sample(2, 4, "rare", n_triggers=1, seed=0).triggers.tolist() == [[2]] * 2  # 3 never comes back
    with pytest.raises(ValueError, match="n_triggers is 4; only 3 tokens ever occur"):
        language.sample(2, 4, "rare", n_triggers=4, seed=0)


def test_random_triggers_by_name_are_those_without_a_name():
    language = hl.BigramLanguage.dirichlet(9, seed=0)
    named, plain = (language.sample(5, 30, of, n_triggers=3, seed=1) for of in ("random", ()))
    assert all(getattr(named, f.name).equal(getattr(plain, f.name)) for f in fields(named))
    assert len({tuple(row) for row in named.triggers.tolist()}) > 1


def test_a_token_of_a_rules_name_is_a_token():
    language = hl.BigramLanguage(TWO_STATES, tokens=["rare", "frequent"])
    assert language.sample(1, 3, "rare", seed=0).triggers.tolist() == [[0]]
    assert language.sample(1, 3, "rare", n_triggers=1, seed=0).triggers.tolist() == [[1]]


# Jumps


def without_jumps(language, n_sequences, length, draws, triggers, continuations):
    """The sampler as a loop over sequences, each step by the first cell of the row's sum that lies above the draw."""
    rows = []
    for i in range(n_sequences):
        says = dict(zip(triggers[i], continuations[i], strict=True))
        row = [int((language.pi_u.cumsum(0) <= draws[0][i]).sum())]
        while len(row) < length:
            cdf = language.pi_b[row[-1]].cumsum(0)
            row.append(says.get(row[-1], int((cdf <= draws[len(row)][i]).sum())))
        rows.append(row)
    return rows


@pytest.mark.parametrize("jump", [{}, {"jump": 0.0}])
def test_without_jumps_a_seed_gives_the_sequences_that_it_always_gave(jump):
    language = hl.BigramLanguage.dirichlet(7, 0.5, seed=0)
    sampled = language.sample(6, 50, [1, 4], seed=3, **jump)
    generator = torch.Generator().manual_seed(3)  # what it draws, in this order
    continuations = torch.randint(7, (6, 2), generator=generator)
    draws = torch.rand(50, 6, generator=generator, dtype=torch.float64)
    assert sampled.continuations.equal(continuations)
    rows = without_jumps(language, 6, 50, draws.tolist(), [[1, 4]] * 6, continuations.tolist())
    assert sampled.tokens.tolist() == rows
    assert not bool(sampled.jumped.any())


@pytest.mark.parametrize("triggers", [{"triggers": [0, 2]}, {"n_triggers": 2}])
def test_jumps_go_to_the_sequences_triggers_where_the_chain_decides(triggers):
    language = hl.BigramLanguage.dirichlet(6, 0.5, seed=1)
    sampled = language.sample(400, 60, jump=0.3, seed=2, **triggers)
    jumps = total = 0
    for i in range(400):
        row, chosen = sampled.tokens[i].tolist(), sampled.triggers[i].tolist()
        says = dict(zip(chosen, sampled.continuations[i].tolist(), strict=True))
        assert sampled.predictable[i].tolist() == literal_predictable(row, chosen)
        assert not bool(sampled.jumped[i, -1])
        for (v, u), jumped in zip(pairwise(row), sampled.jumped[i].tolist(), strict=False):
            assert says.get(v, u) == u
            assert not jumped or (v not in chosen and u in chosen)
            total += v not in chosen
            jumps += jumped
    assert_frequencies([jumps, total - jumps], [0.3, 0.7])


def test_with_jumps_successors_follow_the_mixture_and_without_the_jumped_ones_the_chain():
    language = hl.BigramLanguage(SPARSE, pi_u=[0.25] * 4)
    sampled = language.sample(4_000, 20, [0, 3], jump=0.4, seed=5)
    before, after = sampled.tokens[:, :-1], sampled.tokens[:, 1:]
    jumped = sampled.jumped[:, :-1]
    for v in (1, 2):
        all_of_them = torch.bincount(after[before == v], minlength=4)
        assert_frequencies(all_of_them, 0.6 * language.pi_b[v] + 0.4 * double([0.5, 0, 0, 0.5]))
        assert_frequencies(torch.bincount(after[(before == v) & ~jumped], minlength=4), language.pi_b[v])
        assert_frequencies(torch.bincount(after[(before == v) & jumped], minlength=4), [0.5, 0, 0, 0.5])
    always = language.sample(50, 20, [0, 3], jump=1.0, seed=5)
    assert bool((always.jumped[:, :-1] == ((always.tokens[:, :-1] != 0) & (always.tokens[:, :-1] != 3))).all())


def test_sequences_of_ones_own_have_no_jumps():
    sampled = hl.BigramLanguage(SPARSE).sample(2, 5, [1], jump=0.5, seed=0)
    own = hl.SampledSequences(sampled.tokens, sampled.predictable, sampled.triggers, sampled.continuations)
    assert not bool(own.jumped.any())


# Bad input

Language = hl.BigramLanguage


def abcd():
    return Language(SPARSE, tokens=list("abcd"))


def sample(*args, **kwargs):
    return abcd().sample(*args, **({"seed": 0} | kwargs))


VALUE_ERRORS = {
    r"pi_b must sum to 1 .* row 0 sums to 0\.9": lambda: Language([[0.5, 0.4], [0.5, 0.5]]),
    r"pi_b must not be negative, got -0\.5": lambda: Language([[1.5, -0.5], [0.5, 0.5]]),
    "pi_b must be finite": lambda: Language([[math.nan, 1], [0.5, 0.5]]),
    r"pi_b must have shape \[1, 1\], got \[1, 2\]": lambda: Language([[0.5, 0.5]]),
    r"pi_b must be a .* got \[\]": lambda: Language([]),
    "pi_b must be a .* got 3": lambda: Language(3),
    r"pi_u must sum to 1 .* sums to 1\.1": lambda: Language(TWO_STATES, pi_u=[0.5, 0.6]),
    r"pi_u must have shape \[2\], got \[1\]": lambda: Language(TWO_STATES, pi_u=[1.0]),
    "tokens must name all 2 rows of pi_b, got 1": lambda: Language(TWO_STATES, tokens=["a"]),
    "tokens must be distinct, got 'a' twice": lambda: Language(TWO_STATES, tokens=["a", "a"]),
    "tokens .* single .* got 'bc'": lambda: Language(TWO_STATES, tokens=["a", "bc"], level="char"),
    "tokens .* no white space, got 'b c'": lambda: Language(TWO_STATES, tokens=["a", "b c"]),
    "level must be one of 'char', 'word', got 'line'": lambda: Language(TWO_STATES, level="line"),
    "text must hold at least two tokens, got ''": lambda: Language.from_text(""),
    "text must hold at least two .* got 'one'": lambda: Language.from_text("one", level="word"),
    "level must be one of 'char', 'word', got 'page'": lambda: Language.from_text("abc", level="page"),
    "smoothing must be .* >= 0, got -1": lambda: Language.from_text("abc", smoothing=-1),
    "smoothing must be .* got nan": lambda: Language.from_text("abc", smoothing=math.nan),
    "max_vocab must be at least 2, got 1": lambda: Language.from_text("abc", max_vocab=1),
    "d_vocab must be at least 2, got 1": lambda: Language.dirichlet(1),
    "concentration must be a number that float64 can draw with, got 1e": lambda: Language.dirichlet(5, 1e308),
    r"smoothing must be at most 1e\+100, got 1e\+308": lambda: Language.from_text("a b", "word", smoothing=1e308),
    "concentration must be .* > 0, got 0": lambda: Language.dirichlet(5, 0),
    r"floor must .* 1/d_vocab = 0\.25, got 0\.25": lambda: abcd().floored(0.25),
    r"floor must be a finite number > 0, got 0$": lambda: abcd().floored(0),
    r"'a' after 'a'.*floored\(1e-6\), or smoothing > 0": lambda: abcd().finite_log_pi_b(),
    "token 'z' is not one of the language's 4 tokens": lambda: abcd().index("z"),
    "trigger 4 is not a token id; ids run from 0 to 3": lambda: abcd().index(4, "trigger"),
    "token -1 is not a token id": lambda: abcd().index(-1),
    "text holds 'z', which is not one of": lambda: abcd().encode("abz"),
    "tokens holds token id 4; the vocabulary has ids 0 to 3": lambda: abcd().decode([0, 4]),
    "n_sequences must be at least 1, got 0": lambda: sample(0, 5),
    "length must be at least 1, got 0": lambda: sample(2, 0),
    "trigger 'z' is not one of": lambda: sample(2, 5, "z"),
    "trigger 7 is not a token id": lambda: sample(2, 5, [7]),
    r"triggers must be distinct, got \['a', 0\]": lambda: sample(2, 5, ["a", 0]),
    "n_triggers is 5; only 4 tokens": lambda: sample(2, 5, n_triggers=5),
    "n_triggers must be at least 0, got -1": lambda: sample(2, 5, n_triggers=-1),
    r"n_triggers must be at least 0, got -1 *$": lambda: sample(2, 5, "rare", n_triggers=-1),
    "give either triggers or n_triggers, got 'a' and 2; .* 'frequent', 'rare'": lambda: sample(2, 5, "a", n_triggers=2),
    r"jump must lie between 0 and 1, got 1\.5": lambda: sample(2, 5, "a", jump=1.5),
    r"jump must be 0 where there are no triggers to jump to, got 0\.5": lambda: sample(2, 5, jump=0.5),
    "continuations must be one of .* 'any'": lambda: sample(2, 5, "a", continuations="any"),
    r"continuations .* \[4\], got \[1\]": lambda: sample(2, 5, "a", continuations=[1.0]),
    "continuations .* sums to 2": lambda: sample(2, 5, "a", continuations=[0.5] * 4),
}
TYPE_ERRORS = {
    "jump must be a number, got 'often'": lambda: sample(2, 5, "a", jump="often"),
    "pi_b must be .* probabilities, got list": lambda: Language([["x", "y"], ["z", "w"]]),
    "tokens must be non-empty strings": lambda: Language(TWO_STATES, tokens=["a", 1]),
    "text must be a string, got bytes": lambda: Language.from_text(b"abc"),
    "text must be a string, got int": lambda: abcd().encode(3),
    "smoothing must be .* got 'much'": lambda: Language.from_text("abc", smoothing="much"),
    r"max_vocab must be an int, got 2\.5": lambda: Language.from_text("abc", max_vocab=2.5),
    r"d_vocab must be an int, got 5\.0": lambda: Language.dirichlet(5.0),
    "concentration must be .* got 'high'": lambda: Language.dirichlet(5, "high"),
    r"seed must be an int, a torch\.Generator or None, got 0\.5": lambda: Language.dirichlet(5, seed=0.5),
    "floor must .* got 'low'": lambda: abcd().floored("low"),
    "token must be a token's text or its id, got True": lambda: abcd().index(True),
    r"tokens must hold integer token ids, got dtype torch\.float": lambda: abcd().decode([0.5]),
    "tokens must be a tensor of token ids, got str": lambda: abcd().decode("ab"),
    r"n_sequences must be an int, got 2\.0": lambda: sample(2.0, 5),
    r"trigger.* got 1\.5": lambda: sample(2, 5, 1.5),
    "seed must be an int, a torch.Generator or None, got True": lambda: sample(2, 5, seed=True),
}


test_a_bad_value_is_refused_by_name_and_value = refused(ValueError, VALUE_ERRORS)
test_a_bad_type_is_refused_by_name_and_value = refused(TypeError, TYPE_ERRORS)
