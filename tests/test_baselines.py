"""What accuracy can be at best: against sums over all sets of triggers, and by hand."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from refusals import refused
from test_language import abcd

import hijack_lens as hl
from hijack_lens.language import best_accuracy, shortcut_accuracy, trigger_posterior


def prior(pi_u, chosen):
    """Of a set of triggers drawn one after the other: the sum over their orders."""
    total = 0.0
    for order in itertools.permutations(chosen):
        left, probability = 1.0, 1.0
        for token in order:
            probability *= pi_u[token] / left
            left -= pi_u[token]
        total += probability
    return total


def next_token(language, prefix, n_triggers, continuations):
    """How likely the last token is a trigger, and each next token, by a sum over sets of triggers."""
    size, pi_b, pi_u = language.d_vocab, language.pi_b.tolist(), language.pi_u.tolist()
    total, inside, following = 0.0, 0.0, [0.0] * size
    for chosen in itertools.combinations(range(size), n_triggers):
        probability, says = prior(pi_u, chosen), {}
        for v, u in pairwise(prefix):
            if v not in chosen:
                probability *= pi_b[v][u]
            elif v not in says:
                says[v] = u
                probability *= pi_b[v][u] if continuations == "bigram" else 1 / size
            elif says[v] != u:
                probability = 0.0
        total += probability
        last = prefix[-1]
        inside += probability * (last in chosen)
        for u in range(size):
            following[u] += probability * ((says[last] == u) if last in chosen else pi_b[last][u])
    return inside / total, [one / total for one in following]


LANGUAGES = {
    "random": hl.BigramLanguage.dirichlet(5, 0.6, seed=2),
    "skewed": hl.BigramLanguage(hl.BigramLanguage.dirichlet(5, 0.6, seed=3).pi_b, [0.9, 0.06, 0.03, 0.009, 0.001]),
    "sparse": hl.BigramLanguage(
        [[0, 0.5, 0.5, 0], [0.3, 0, 0.7, 0], [0.5, 0, 0, 0.5], [1, 0, 0, 0]], [0.4, 0.4, 0.2, 0]
    ),
}


@pytest.mark.parametrize("continuations", ["uniform", "bigram"])
@pytest.mark.parametrize("n_triggers", [1, 2, 3])
@pytest.mark.parametrize("name", LANGUAGES)
def test_random_triggers_are_guessed_from_what_followed_them(name, n_triggers, continuations):
    language = LANGUAGES[name]
    sequences = language.sample(30, 12, n_triggers=n_triggers, continuations=continuations, seed=4)
    posterior = trigger_posterior(language, sequences, continuations)
    right, expected = [], []
    for row, t in sequences.predictable[:, :-1].nonzero().tolist():
        tokens = sequences.tokens[row].tolist()
        inside, following = next_token(language, tokens[: t + 1], n_triggers, continuations)
        expected.append(inside)
        right.append(max(range(language.d_vocab), key=following.__getitem__) == tokens[t + 1])
    torch.testing.assert_close(posterior, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    best = best_accuracy(language, sequences, random_triggers=True, continuations=continuations)
    assert best == pytest.approx(sum(right) / len(right))


def test_nobody_who_knows_the_triggers_is_ever_wrong():
    language = LANGUAGES["random"]
    assert best_accuracy(language, language.sample(9, 20, [0, 1], seed=0)) == 1.0
    nothing = language.sample(9, 20, seed=0)
    for random_triggers in (False, True):
        assert math.isnan(best_accuracy(language, nothing, random_triggers=random_triggers))
    assert math.isnan(shortcut_accuracy(language, nothing))


@pytest.mark.parametrize("triggers", [{"triggers": [0, 2]}, {"n_triggers": 2}])
def test_the_shortcut_guesses_what_came_up_most_beyond_its_frequency(triggers):
    language = LANGUAGES["random"]
    sequences = language.sample(20, 25, seed=6, **triggers)
    frequency, right = language.long_run.tolist(), []
    for row, t in sequences.predictable[:, :-1].nonzero().tolist():
        tokens = sequences.tokens[row].tolist()
        beyond = [(tokens[: t + 1].count(u) + 1) / ((t + 1) * frequency[u] + 1) for u in range(5)]
        right.append(beyond.index(max(beyond)) == tokens[t + 1])
    assert shortcut_accuracy(language, sequences) == pytest.approx(sum(right) / len(right))


def test_no_predictor_beats_the_best_one():
    language = hl.BigramLanguage.dirichlet(60, 0.3, seed=1)
    sequences = language.sample(64, 64, n_triggers=5, seed=0)
    best = best_accuracy(language, sequences, random_triggers=True)
    assert shortcut_accuracy(language, sequences) < best <= 1.0


def sampled():
    return abcd().sample(20, 9, n_triggers=2, seed=0)


three = hl.BigramLanguage.dirichlet(3)
test_bad_values = refused(
    ValueError,
    {
        "sequences must hold tokens of the language, ids 0 to 2, got 3": lambda: shortcut_accuracy(three, sampled()),
        "continuations must be one of 'uniform', 'bigram', got 'any'": lambda: best_accuracy(
            abcd(), sampled(), random_triggers=True, continuations="any"
        ),
    },
)
test_bad_types = refused(
    TypeError,
    {
        "language must be a BigramLanguage, got 3": lambda: shortcut_accuracy(3, sampled()),
        r"sequences must be a SampledSequences, got \[1\]": lambda: best_accuracy(abcd(), [1]),
        "random_triggers must be a bool, got 2": lambda: best_accuracy(abcd(), sampled(), random_triggers=2),
    },
)
