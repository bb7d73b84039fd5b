"""How many repeats it takes: against prompts that are built and evaluated, one by one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models_for_tests import close
from refusals import refused

import hijack_lens as hl
from hijack_lens import theory

Q, C, G, X = range(4)
GROWS_TO = 25  # repeats up to which growing prompts are built


def conflict(log_ratio):
    """A language of five tokens in which log(pi_b(g|q) / pi_b(c|q)) is `log_ratio`."""
    rows = torch.ones(5, 5, dtype=torch.float64)
    rows[Q, G] = math.exp(log_ratio)
    return hl.BigramLanguage(rows / rows.sum(-1, keepdim=True), [0.2] * 5, list("qcgxy"))


def build(lead, global_count, repeats):
    """Neutral tokens, some of them the global candidate; the pairs; the final trigger."""
    return [G] * global_count + [X] * (lead - global_count) + [Q, C] * repeats + [Q]


def margins_by_brute_force(language, setting, length, lead, global_count):
    """The margin with 0, 1, 2, ... repeats: of every number that fits, or of the first GROWS_TO."""
    if lead is None:
        most = (length - 1 - global_count) // 2
        prompts = [build(length - 1 - 2 * n, global_count, n) for n in range(most + 1)]
        return theory.margin(torch.tensor(prompts), language, setting, in_context=C, global_candidate=G).total
    # Attention is causal: a shorter prompt is the longest one's beginning.
    logits = theory.logits(torch.tensor(build(lead, global_count, GROWS_TO)), language, setting)[lead::2]
    return logits[:, C] - logits[:, G]


def first_win(margins):
    assume(float(margins.abs().min()) > 1e-9)  # ties are decided by rounding
    return next((n for n, margin in enumerate(margins.tolist()) if margin > 0), None)


MODERATE, LARGE = st.floats(0, 8), st.sampled_from([50.0, 1e3, 1e4])


@st.composite
def layouts(draw):
    global_count = draw(st.integers(0, 3))
    if draw(st.booleans()):
        return {"length": draw(st.integers(1 + global_count, 50)), "lead": None, "global_count": global_count}
    return {"length": None, "lead": draw(st.integers(global_count, 20)), "global_count": global_count}


@st.composite
def settings(draw, match=MODERATE):
    strengths = hl.Strengths(
        draw(st.floats(0, 12) | st.just(math.inf)), draw(match), draw(st.floats(0, 20)), draw(st.floats(0, 3))
    )
    positions = draw(st.sampled_from(["relative", "absolute"]))
    n_ctx_train = draw(st.none() | st.integers(1, 60)) if positions == "absolute" else None
    triggers = draw(st.sampled_from([None, None, [Q], [C, G], []]))
    return theory.Setting(strengths, triggers, positions, n_ctx_train)


def check_min_repeats(setting, layout, log_ratio):
    language = conflict(log_ratio)
    flip = theory.min_repeats(language, "q", "c", "g", setting, **layout, max_repeats=GROWS_TO)
    first = first_win(margins_by_brute_force(language, setting, **layout))
    perfect = setting.strengths.previous_token == math.inf and setting.positions == "relative"
    unbounded = perfect and layout["lead"] is not None
    if unbounded and flip.repeats is not None and flip.repeats > GROWS_TO:
        assert first is None
    else:
        assert flip.repeats == first
    assert ("no number" in flip.reason or "only tends to" in flip.reason) == (flip.repeats is None)


@given(settings(), layouts(), st.floats(-3, 8))
def test_min_repeats_equals_brute_force_over_all_prompts(setting, layout, log_ratio):
    check_min_repeats(setting, layout, log_ratio)


@given(settings(match=LARGE), layouts(), st.floats(-3, 8))
def test_min_repeats_equals_brute_force_at_large_strengths(setting, layout, log_ratio):
    check_min_repeats(setting, layout, log_ratio)


# The closed forms for perfect focus and a neutral first token

strong = {"b2": st.floats(0, 8), "b3": st.floats(0.1, 20), "ahead": st.floats(0.01, 20)}


@given(**strong, half=st.integers(2, 40), m=st.integers(0, 3))
def test_the_floor_formula_for_a_fixed_length(b2, b3, ahead, half, m):
    # The context wins iff n (e^b2 (b3 - D) + D) > D T + b3 m; an even T leaves a neutral token in front.
    length = 2 * half
    gain = math.exp(b2) * (b3 - ahead) + ahead
    assume(abs(gain) > 1e-6)
    tie = (ahead * length + b3 * m) / gain
    assume(abs(tie - round(tie)) > 1e-9)
    n = math.floor(tie) + 1
    expected = n if gain > 0 and n <= (length - 1 - m) // 2 else None
    setting = theory.Setting(hl.Strengths(math.inf, b2, b3, 1.0))
    flip = theory.min_repeats(conflict(ahead), "q", "c", setting=setting, length=length, global_count=m)
    assert flip.repeats == expected


@given(**strong, lead=st.integers(1, 50))
def test_the_floor_formula_for_a_growing_prompt(b2, b3, ahead, lead):
    # n* = floor(D (N + 1) / (b3 e^b2 - D (e^b2 + 1))) + 1, and none if b3 <= D (1 + e^-b2).
    gain = b3 * math.exp(b2) - ahead * (math.exp(b2) + 1)
    assume(abs(gain) > 1e-6)
    tie = ahead * (lead + 1) / gain
    assume(abs(tie - round(tie)) > 1e-9)
    setting = theory.Setting(hl.Strengths(math.inf, b2, b3, 1.0))
    flip = theory.min_repeats(conflict(ahead), "q", "c", setting=setting, lead=lead)
    assert flip.repeats == (math.floor(tie) + 1 if gain > 0 else None)


@given(**strong)
def test_the_floor_formula_for_a_prompt_that_begins_with_the_trigger(b2, b3, ahead):
    # Position 1 remembers itself: a_c = n e^b2 / ((n + 1) e^b2 + n), which exceeds D / b3
    # iff n (b3 - D (1 + e^-b2)) > D.
    gain = b3 - ahead * (1 + math.exp(-b2))
    assume(abs(gain) > 1e-6)
    assume(abs(ahead / gain - round(ahead / gain)) > 1e-9)
    setting = theory.Setting(hl.Strengths(math.inf, b2, b3, 1.0))
    flip = theory.min_repeats(conflict(ahead), "q", "c", setting=setting, lead=0)
    assert flip.repeats == (math.floor(ahead / gain) + 1 if gain > 0 else None)


@pytest.mark.parametrize("b2", [0.0, 6.0, 50.0, 1e3])
@pytest.mark.parametrize("lead", [0, 1, 5])
def test_a_candidate_that_the_weights_prefer_needs_no_repeats(b2, lead):
    setting = {"setting": theory.Setting(hl.Strengths(math.inf, b2, 5.0, 1.0)), "lead": lead}
    assert theory.min_repeats(conflict(-1.0), "q", "c", "g", **setting).repeats == 0
    # With one global candidate among N neutral tokens, 0 repeats leave the margin at 1 - 5 / (N + 1).
    if lead:
        crowded = theory.min_repeats(conflict(-1.0), "q", "c", "g", **setting, global_count=1)
        assert (crowded.repeats == 0) == (1 - 5 / (lead + 1) > 0)


def test_the_answer_at_the_edge_of_the_possible_is_finite_or_none():
    # b3 within rounding of D (1 + e^-b2), where the number of repeats diverges.
    language = conflict(3.0)
    ahead = float(language.log_pi_b[Q, G] - language.log_pi_b[Q, C])
    for b2 in torch.linspace(0.1, 4, 200).tolist():
        copy = ahead * (1 + math.exp(-b2))
        for b3 in (
            math.nextafter(copy, 0),
            copy,
            math.nextafter(copy, 9),
            math.nextafter(copy * (1 + 2**-52), 9),
        ):
            flip = theory.min_repeats(
                language, "q", "c", setting=theory.Setting(hl.Strengths(math.inf, b2, b3, 1.0)), lead=5
            )
            assert flip.repeats is None or flip.repeats > 10**12


# The window that finite focus leaves open: b2 = 6, b3 = 5, D = 3, N = 10

WINDOWS = [(1.0, range(0)), (2.0, range(3, 81)), (3.0, range(1, 410))]


@pytest.mark.parametrize(("focus", "window"), WINDOWS)
def test_a_blurred_previous_token_wins_within_a_window_of_repeats(focus, window):
    setting = theory.Setting(hl.Strengths(focus, 6.0, 5.0, 1.0))
    boundary = theory.phase_boundary(torch.arange(600), setting, lead=10)
    assert (boundary > 3).nonzero().flatten().tolist() == list(window)
    flip = theory.min_repeats(conflict(3.0), "q", "c", setting=setting, lead=10, max_repeats=600)
    assert flip.repeats == (window[0] if window else None)
    assert ("no number of repeats up to 600 wins" in flip.reason) == (not window)
    logits = theory.logits(torch.tensor(build(10, 0, 600)), conflict(3.0), setting)[10::2]
    assert (logits[:, C] > logits[:, G]).nonzero().flatten().tolist() == list(window)


# The boundary


def check_boundary(setting, layout, data):
    """Just below the boundary the context wins, just above it the weights do."""
    assume(setting.strengths.bigram > 0.05)
    length, lead, global_count = layout.values()
    most = GROWS_TO if lead is not None else (length - 1 - global_count) // 2
    repeats = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=3))
    boundary = theory.phase_boundary(torch.tensor(repeats), setting, **layout)
    assert boundary.shape == (len(repeats),)
    matched = replace(setting, triggers=None)
    for n, ratio in zip(repeats, boundary.tolist(), strict=True):
        prompt = torch.tensor(build(length - 1 - 2 * n if lead is None else lead, global_count, n))
        for side in (-1, 1):
            language = conflict(ratio + side * 1e-6 * (1 + abs(ratio)))
            margin = theory.margin(prompt, language, matched, in_context=C, global_candidate=G)
            assert float(margin.total) * side < 0


@given(settings(), layouts(), st.data())
def test_the_winner_changes_at_the_phase_boundary(setting, layout, data):
    check_boundary(setting, layout, data)


@given(settings(match=LARGE), layouts(), st.data())
def test_the_winner_changes_at_the_phase_boundary_at_large_strengths(setting, layout, data):
    check_boundary(setting, layout, data)


# The model


@pytest.mark.parametrize(("positions", "n_ctx_train"), [("relative", None), ("absolute", None), ("absolute", 30)])
@pytest.mark.parametrize("strengths", [hl.Strengths(3.0, 6.0, 5.0, 1.0), hl.Strengths(20.0, 2.0, 5.0, 1.0)])
def test_the_model_flips_where_the_theory_says(positions, n_ctx_train, strengths):
    language = conflict(3.0)
    model = hl.associative_transformer(
        language, None, positions, strengths, n_ctx=61, n_ctx_train=n_ctx_train, dtype=torch.float64
    )
    fixed = torch.tensor([build(60 - 2 * n, 1, n) for n in range(30)])
    setting = theory.Setting(strengths, None, positions, n_ctx_train or model.n_ctx_train)
    flip = theory.min_repeats(language, "q", "c", setting=setting, length=61, global_count=1)
    logits = model(fixed)[:, -1].detach()
    assert flip.repeats == first_win(logits[:, C] - logits[:, G])
    flip = theory.min_repeats(language, "q", "c", setting=setting, lead=0, max_repeats=30)
    logits = model(torch.tensor([build(0, 0, 30)]))[0, ::2].detach()
    assert flip.repeats == first_win(logits[:, C] - logits[:, G])


def test_the_reason_tells_both_pulls():
    language, setting = conflict(3.0), theory.Setting(hl.Strengths(math.inf, 6.0, 5.0, 1.0))
    possible = theory.min_repeats(language, "q", "c", setting=setting, length=100)
    # n (e^6 * 2 + 3) > 300: one repeat; its pull is 5 e^6 / (e^6 + 99) = 4.01.
    assert possible.repeats == 1
    assert "4.01" in possible.reason
    assert "weights by 3" in possible.reason
    hopeless = theory.min_repeats(conflict(6.0), "q", "c", setting=setting, length=100)
    assert hopeless.repeats is None
    assert "fits into 100 tokens (at most 49)" in hopeless.reason


def test_the_global_candidate_is_by_default_the_likeliest_successor():
    language, setting = conflict(2.0), theory.Setting(hl.Strengths(2.0, 4.0, 5.0, 1.0))
    named = theory.min_repeats(language, "q", "c", "g", setting, length=60)
    assert theory.min_repeats(language, Q, C, setting=setting, length=60) == named
    assert named.repeats is not None


# Bad input

LANGUAGE = conflict(1.0)
ZEROS = hl.BigramLanguage([[0.0, 0.3, 0.7]] * 3, tokens=list("qcg"))


def minimal(*args, language=LANGUAGE, **kwargs):
    return theory.min_repeats(language, *(args or ("q", "c")), **(kwargs or {"length": 9}))


def boundary(repeats=(0, 1), **kwargs):
    return theory.phase_boundary(torch.tensor(repeats), **kwargs)


VALUE_ERRORS = {
    "trigger 'z' is not one of": lambda: minimal("z", "c"),
    "in_context 'z' is not one of": lambda: minimal("q", "z"),
    "global_candidate 'z' is not one of": lambda: minimal("q", "c", "z"),
    "trigger 'q', in_context 'g' and global_candidate 'g' must be three different": lambda: minimal("q", "g"),
    "'q' after 'q'.*floored": lambda: minimal(language=ZEROS),
    "give either length= or lead=, got length=None, lead=None": lambda: minimal(max_repeats=5),
    "give either length= or lead=, got length=5, lead=5": lambda: minimal(length=5, lead=5),
    "lead must be at least 3, got 2": lambda: minimal(lead=2, global_count=3),
    "length must be at least 4, got 3": lambda: minimal(length=3, global_count=3),
    "global_count must be at least 0, got -1": lambda: minimal(length=5, global_count=-1),
    "max_repeats must be at least 1, got 0": lambda: minimal(lead=5, max_repeats=0),
    "positions must be one of .* 'rotary'": lambda: minimal(lead=5, setting=theory.Setting(positions="rotary")),
    "n_ctx_train is for absolute": lambda: minimal(lead=5, setting=theory.Setting(n_ctx_train=9)),
    "n_ctx_train is for absolute positions; .* got 9": lambda: minimal(
        lead=5, setting=theory.Setting(hl.Strengths(math.inf), n_ctx_train=9)
    ),
    r"repeats must be a vector of integers >= 0, got \[-1\]": lambda: boundary([-1], lead=5),
    r"repeats must be a vector of integers >= 0, got \[0.5\]": lambda: boundary([0.5], lead=5),
    r"repeats must be a vector .* got \[\[1\]\]": lambda: boundary([[1]], lead=5),
    r"length must be at least .* = 9, got 8": lambda: boundary([1, 3], length=8, global_count=2),
    "give either length= or lead=, got": lambda: boundary(),
    "strengths.bigram must be > 0": lambda: boundary(lead=5, setting=theory.Setting(hl.Strengths(bigram=0))),
}
TYPE_ERRORS = {
    r"length must be an int, got 9\.0": lambda: minimal(length=9.0),
    "lead must be an int, got True": lambda: minimal(lead=True),
    "global_count must be an int, got '1'": lambda: minimal(lead=5, global_count="1"),
    "trigger must be a token's text or its id, got None": lambda: minimal(None, "c"),
}


test_a_bad_value_is_refused_by_name_and_value = refused(ValueError, VALUE_ERRORS)
test_a_bad_type_is_refused_by_name_and_value = refused(TypeError, TYPE_ERRORS)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, torch.int8, torch.uint8, torch.int16])
def test_small_integers_count_like_any_others(kind, unchecked):
    def small(n):
        return torch.tensor(n, dtype=kind) if isinstance(kind, torch.dtype) else kind(n)

    setting, repeats = theory.Setting(hl.Strengths(previous_token=3.0)), [0, 1, 5, 60, 100]
    of_kind = torch.tensor(repeats).to(kind) if isinstance(kind, torch.dtype) else np.array(repeats, kind)
    for layout in ({"lead": 127}, {"lead": 100, "global_count": 90}):
        given = {name: small(n) for name, n in layout.items()}
        expected = theory.phase_boundary(torch.tensor(repeats), setting, **layout)
        close(theory.phase_boundary(of_kind, setting, **given), expected, atol=0)
    language = hl.BigramLanguage.dirichlet(6, seed=0)
    close(
        theory.phase_boundary(of_kind[:3], setting, length=small(120)),
        theory.phase_boundary(torch.tensor(repeats[:3]), setting, length=120),
        atol=0,
    )
    for layout in ({"lead": 127}, {"length": 127}):
        for one in (setting, theory.Setting()):
            given = {name: small(n) for name, n in layout.items()}
            assert theory.min_repeats(language, small(0), small(1), small(2), one, **given) == theory.min_repeats(
                language, 0, 1, 2, one, **layout
            )
            at_infinity = theory.Setting(hl.Strengths(previous_token=math.inf))
            assert theory.min_repeats(language, 0, 1, 2, at_infinity, **given) == theory.min_repeats(
                language, 0, 1, 2, at_infinity, **layout
            )
