"""Prompts that set the memories against each other."""

from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from strategies import languages, seeds

import hijack_lens as hl

LANGUAGE = hl.BigramLanguage.dirichlet(6, 1.0, seed=0)


@st.composite
def requests(draw):
    """Arguments of `hijack_prompt` that fit together."""
    language = draw(languages(max_vocab=12))
    order = draw(st.permutations(range(language.d_vocab)))
    repeats = draw(st.integers(0, 6))
    length = 2 * repeats + 2 + draw(st.integers(0, 20))
    return {
        "language": language,
        "trigger": order[0],
        "in_context": order[1],
        "global_candidate": order[2],
        "alternative": draw(st.none() | st.just(order[3])),
        "repeats": repeats,
        "length": length,
        "distance": draw(st.none() | st.integers(2, length - 2 * repeats)) if repeats else None,
        "filler": draw(st.sampled_from(["sample", "avoid"])),
        "n_prompts": draw(st.none() | st.integers(1, 4)),
        "seed": draw(seeds),
    }


@given(requests())
def test_a_prompt_is_what_was_asked_for(request):
    prompt = hl.hijack_prompt(**request)
    q, c, g, repeats = (request[name] for name in ("trigger", "in_context", "global_candidate", "repeats"))
    other = g if request["alternative"] is None else request["alternative"]
    batch = () if request["n_prompts"] is None else (request["n_prompts"],)
    assert prompt.tokens.shape == prompt.corrupted.shape == (*batch, request["length"])
    assert (prompt.trigger, prompt.in_context, prompt.global_candidate, prompt.alternative) == (q, c, g, other)
    assert prompt.clean is prompt.tokens
    assert len(prompt) == request["length"]

    rows = prompt.tokens.reshape(-1, len(prompt)).tolist()
    for row, corrupted in zip(rows, prompt.corrupted.reshape(-1, len(prompt)).tolist(), strict=True):
        assert row[0] != q
        assert row[-1] == q
        assert row.count(q) == repeats + 1
        assert list(pairwise(row)).count((q, c)) == repeats
        starts = [i for i, token in enumerate(row[:-1]) if token == q]
        if request["distance"] is not None:
            assert len(row) - 1 - starts[-1] == request["distance"]
        if request["filler"] == "avoid":
            assert row.count(c) == repeats
            assert row.count(g) == row.count(other) == 0
        expected = row.copy()
        for i in starts:
            expected[i + 1] = other
        assert corrupted == expected


@given(requests())
def test_prompts_depend_on_the_seed_alone(request):
    expected = hl.hijack_prompt(**request)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = hl.hijack_prompt(**request | {"seed": torch.Generator().manual_seed(request["seed"])})
    assert again.tokens.equal(expected.tokens)
    assert again.corrupted.equal(expected.corrupted)


def test_prompts_differ_within_a_batch_and_by_seed(global_rng_untouched):
    batch = hl.hijack_prompt(LANGUAGE, 0, 1, 3, 40, global_candidate=2, n_prompts=5, seed=0).tokens
    other = hl.hijack_prompt(LANGUAGE, 0, 1, 3, 40, global_candidate=2, n_prompts=5, seed=1).tokens
    assert len({tuple(row) for row in [*batch.tolist(), *other.tolist()]}) == 10


def test_repeats_stand_anywhere_with_equal_probability():
    # 8 tokens: pairs start at 1..5 (counting from 0), two of them at least 2 apart. Each choice: 1/6.
    possible = [pair for pair in combinations(range(1, 6), 2) if pair[1] - pair[0] >= 2]
    prompts = hl.hijack_prompt(LANGUAGE, 0, 1, 2, 8, global_candidate=2, n_prompts=6_000, seed=0).tokens
    seen = Counter(tuple(i for i in range(7) if row[i] == 0) for row in prompts.tolist())
    assert sorted(seen) == possible
    assert all(abs(count - 1_000) < 5 * (6_000 * 1 / 6 * 5 / 6) ** 0.5 for count in seen.values())


@pytest.mark.parametrize(("filler", "kept_out"), [("sample", [0]), ("avoid", [0, 1, 2, 3])])
def test_filler_follows_the_language_without_the_tokens_kept_out(filler, kept_out):
    tokens = hl.hijack_prompt(
        LANGUAGE, 0, 1, 0, 60, filler=filler, global_candidate=2, alternative=3, n_prompts=500, seed=0
    ).tokens[:, :-1]
    rows = LANGUAGE.pi_b.clone()
    rows[:, kept_out] = 0
    rows /= rows.sum(-1, keepdim=True)
    seen = torch.bincount((tokens[:, :-1] * 6 + tokens[:, 1:]).flatten(), minlength=36).reshape(6, 6)
    n = seen.sum(-1, keepdim=True)
    assert bool(((seen - n * rows).abs() <= 5 * (n * rows * (1 - rows)).sqrt() + 1e-9).all())
    first = LANGUAGE.pi_u.clone()
    first[kept_out] = 0
    first /= first.sum()
    off = (torch.bincount(tokens[:, 0], minlength=6) - 500 * first).abs()
    assert bool((off <= 5 * (500 * first * (1 - first)).sqrt() + 1e-9).all())


def test_filler_where_the_language_allows_nothing_but_the_trigger():
    # After x only q can come; a filler token after x must then be drawn as first tokens are.
    language = hl.BigramLanguage(
        [[0, 0, 0.5, 0.5], [0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]], tokens=["q", "c", "g", "x"]
    )
    tokens = hl.hijack_prompt(language, "q", "c", 2, 40, global_candidate="g", n_prompts=50, seed=0).tokens
    assert not bool((tokens[:, 1:-1][tokens[:, :-2] == 3] == 0).all())
    assert tokens.eq(0).sum(-1).tolist() == [3] * 50


def test_defaults_are_the_likeliest_successor_and_text_is_readable():
    language = hl.BigramLanguage.from_text("the quick queen quit the quiz " * 3)
    prompt = hl.hijack_prompt(language, "q", "x" if "x" in language.tokens else "z", 2, 12, seed=0)
    assert language.tokens[prompt.global_candidate] == "u"
    assert prompt.alternative == prompt.global_candidate
    assert prompt.text == "".join(language.tokens[i] for i in prompt.tokens)
    assert prompt.text.count("qz") == 2
    assert "trigger='q', in_context='z', global_candidate='u'" in repr(prompt)
    batch = hl.hijack_prompt(language, "q", "z", 2, 12, n_prompts=3, seed=0)
    assert batch.text == [language.decode(row) for row in batch.tokens]


def ask(trigger="q", in_context="c", repeats=2, length=10, **kwargs):
    language = hl.BigramLanguage([[0.05, 0.2, 0.6, 0.15]] * 4, tokens=["q", "c", "g", "x"])
    return hl.hijack_prompt(language, trigger, in_context, repeats, length, **({"seed": 0} | kwargs))


VALUE_ERRORS = {
    "trigger 'z' is not one of": lambda: ask("z"),
    "in_context 'z' is not one of": lambda: ask(in_context="z"),
    "in_context 4 is not a token id; ids run from 0 to 3": lambda: ask(in_context=4),
    "global_candidate 'z' is not one of": lambda: ask(global_candidate="z"),
    "alternative 'z' is not one of": lambda: ask(alternative="z"),
    "in_context 'g' is also what the weights say after 'q'": lambda: ask(in_context="g"),
    "in_context must not be the trigger itself, 'q'": lambda: ask(in_context="q"),
    "global_candidate must not be the trigger itself, 'q'": lambda: ask(global_candidate="q"),
    "alternative must differ from in_context, got 'c'": lambda: ask(alternative="c"),
    "repeats must be at least 0, got -1": lambda: ask(repeats=-1),
    r"repeats=5 do not fit: length must be at least 2 \* repeats \+ 2 = 12, got 10": lambda: ask(repeats=5),
    "length must be at least 1, got 0": lambda: ask(length=0),
    "distance needs repeats of at least 1, got 0": lambda: ask(repeats=0, distance=2),
    "distance must lie between 2 and 6 for 2 repeats in 10 tokens, got 7": lambda: ask(distance=7),
    "distance must lie between 2 and 6 for 2 repeats in 10 tokens, got 1": lambda: ask(distance=1),
    "filler must be one of 'sample', 'avoid', got 'none'": lambda: ask(filler="none"),
    "n_prompts must be at least 1, got 0": lambda: ask(n_prompts=0),
    "language has 4 tokens, none of them left to fill": lambda: ask(filler="avoid", alternative="x"),
}
TYPE_ERRORS = {
    "trigger must be a token's text or its id, got None": lambda: ask(None),
    r"repeats must be an int, got 2\.0": lambda: ask(repeats=2.0),
    "length must be an int, got True": lambda: ask(length=True),
    "distance must be an int, got '3'": lambda: ask(distance="3"),
    "seed must be an int, a torch.Generator or None, got 0.5": lambda: ask(seed=0.5),
}


test_a_bad_value_is_refused_by_name_and_value = refused(ValueError, VALUE_ERRORS)
test_a_bad_type_is_refused_by_name_and_value = refused(TypeError, TYPE_ERRORS)
