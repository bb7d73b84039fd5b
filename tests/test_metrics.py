"""Metrics of logits against sums written out token by token, torch.distributions, and what must hold of any logits."""

import math

import numpy as np
import pytest
import torch
from bridges_for_tests import D_VOCAB, WORDS, gpt2_like
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import close, handwritten, hooked, perturbed, prompts
from refusals import refused
from torch.distributions import Categorical, kl_divergence
from transformer_lens import patching

import hijack_lens as hl
from hijack_lens import hooks, metrics


def random_logits(n_prompts=3, length=5, d_vocab=D_VOCAB, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n_prompts, length, d_vocab, generator=generator, dtype=torch.float64)


LOGITS = random_logits()


def softmax_by_hand(row):
    """One position's probabilities, in Python's own floats."""
    numbers = [math.exp(value - max(row.tolist())) for value in row.tolist()]
    return [number / math.fsum(numbers) for number in numbers]


BY_HAND = {
    "logit_diff": lambda answer, foil: (
        lambda position: hl.logit_diff(answer, foil, position),
        lambda row, n: float(row[_of(answer, n)]) - float(row[_of(foil, n)]),
    ),
    "prob": lambda answer, foil: (
        lambda position: metrics.prob(answer, position),
        lambda row, n: softmax_by_hand(row)[_of(answer, n)],
    ),
    "log_prob": lambda answer, foil: (
        lambda position: metrics.log_prob(answer, position),
        lambda row, n: math.log(softmax_by_hand(row)[_of(answer, n)]),
    ),
}


def _of(answer, n):
    return int(answer) if isinstance(answer, (int, np.integer)) or getattr(answer, "ndim", 1) == 0 else int(answer[n])


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(
    ("answer", "foil"),
    [(3, 7), ([0, 12, 5], 7), (2, (1, 1, 9)), (torch.tensor([4, 4, 0]), [5, 6, 7]), (np.int64(11), torch.tensor(0))],
    ids=str,
)
@pytest.mark.parametrize("position", [-1, 0, 2, -5, 4])
def test_each_prompts_number_is_the_formula_and_the_metric_their_mean(name, answer, foil, position, unchecked):
    build, by_hand = BY_HAND[name](answer, foil)
    expected = [by_hand(LOGITS[n, position], n) for n in range(3)]
    metric = build(position)
    close(metric.per_prompt(LOGITS), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    close(metric(LOGITS), torch.tensor(math.fsum(expected) / 3, dtype=torch.float64), atol=1e-12)
    assert metric.on(gpt2_like())(LOGITS) == metric(LOGITS)  # ids need no model, and bear one


@pytest.mark.parametrize("position", [-1, 0, -3])
def test_kl_is_that_of_the_distributions_at_the_position(position):
    reference, run = random_logits(seed=1), LOGITS
    expected = kl_divergence(Categorical(logits=reference[:, position]), Categorical(logits=run[:, position]))
    close(metrics.kl(reference, position).per_prompt(run), expected, atol=1e-12)
    by_hand = [
        math.fsum(p * math.log(p / q) for p, q in zip(softmax_by_hand(ref), softmax_by_hand(row), strict=True))
        for ref, row in zip(reference[:, position], run[:, position], strict=True)
    ]
    close(metrics.kl(reference, position)(run), torch.tensor(sum(by_hand) / 3, dtype=torch.float64), atol=1e-12)
    # Which run is the reference is the caller's choice, and KL is not symmetric.
    model, clean, corrupted = object(), reference, random_logits(seed=2)
    resolved = metrics.kl("clean", position).on(model, clean, corrupted)
    assert torch.equal(resolved.per_prompt(run), metrics.kl(reference, position).per_prompt(run))
    other = metrics.kl("corrupted", position).on(model, clean, corrupted)
    assert torch.equal(other.per_prompt(run), metrics.kl(corrupted, position).per_prompt(run))
    assert not torch.allclose(other(run), resolved(run))
    assert not torch.allclose(metrics.kl(run, position)(reference), metrics.kl(reference, position)(run))


def test_one_reference_prompt_serves_a_batch():
    expected = metrics.kl(LOGITS[:1].expand(3, -1, -1)).per_prompt(random_logits(seed=1))
    close(metrics.kl(LOGITS[:1]).per_prompt(random_logits(seed=1)), expected, atol=0)


def test_kl_bears_tokens_that_either_run_excludes():
    """Where p is 0, p log p is 0; where only q is 0, the divergence is infinite."""
    excluded = LOGITS.clone()
    excluded[:, :, 4] = -math.inf
    kept = [v for v in range(D_VOCAB) if v != 4]
    run = random_logits(seed=1)
    p, q = (Categorical(logits=values[:, -1]) for values in (excluded, run))
    expected = (p.probs[:, kept] * (p.logits[:, kept] - q.logits[:, kept])).sum(-1)
    close(metrics.kl(excluded).per_prompt(run), expected, atol=1e-12)
    close(metrics.kl(excluded).per_prompt(excluded), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert metrics.kl(run).per_prompt(excluded).tolist() == [math.inf] * 3


def test_probabilities_and_differences_bear_excluded_tokens():
    excluded = LOGITS.clone()
    excluded[:, :, 4] = -math.inf
    assert metrics.prob(4).per_prompt(excluded).tolist() == [0.0] * 3
    assert metrics.log_prob(4).per_prompt(excluded).tolist() == [-math.inf] * 3
    kept = [v for v in range(D_VOCAB) if v != 4]
    close(metrics.prob(3)(excluded), LOGITS[:, -1, kept].softmax(-1)[:, 3].mean(), atol=1e-12)


@pytest.mark.parametrize("scale", [1e4, 1e-9])
def test_extreme_logits_neither_overflow_nor_lose_precision(scale):
    logits = scale * random_logits(scale=1.0)
    exact = scale * random_logits(scale=1.0)
    close(metrics.log_prob(2).per_prompt(logits), exact[:, -1].log_softmax(-1)[:, 2], atol=1e-8)
    for metric in (metrics.prob(2), metrics.log_prob(2), metrics.kl(random_logits(seed=1))):
        assert metric.per_prompt(logits).isfinite().all()


def test_margin_is_context_over_memory_and_names_both_tokens():
    model = handwritten()
    prompt = hl.hijack_prompt(model.language, 0, 3, 1, 8, global_candidate=5, seed=0, n_prompts=3)
    logits = model(prompt.tokens).detach()
    metric = metrics.margin(prompt)
    expected = torch.stack([row[-1, 3] - row[-1, 5] for row in logits])
    close(metric.per_prompt(logits), expected, atol=0)
    assert all(model.language.display(token) in metric.name for token in (3, 5))
    close(metrics.margin(prompt, -2).per_prompt(logits), torch.stack([row[-2, 3] - row[-2, 5] for row in logits]))


def test_text_answers_are_looked_up_in_the_models_tokenizer(unchecked):
    bridge = gpt2_like()
    for answer in ("nine", ["one", "two", "a"], ("b", 3, "zero")):
        ids = [WORDS.index(one) if isinstance(one, str) else one for one in _listed(answer)]
        ids = ids[0] if isinstance(answer, str) else ids
        for text, numbers in (
            (hl.logit_diff(answer, "six"), hl.logit_diff(ids, WORDS.index("six"))),
            (metrics.prob(answer, 1), metrics.prob(ids, 1)),
            (metrics.log_prob(answer), metrics.log_prob(ids)),
        ):
            assert torch.equal(text.on(bridge).per_prompt(LOGITS), numbers.per_prompt(LOGITS))
    # A model of this library's, with another vocabulary: the same metric, looked up anew.
    model = perturbed()
    texts = [model.language.display(token) for token in (4, 2)]
    metric = hl.logit_diff(*texts)
    logits = model(prompts(3)).detach()
    close(metric.on(model).per_prompt(logits), logits[:, -1, 4] - logits[:, -1, 2], atol=0)
    with pytest.raises(ValueError, match=r"give it to \.on\(model\) first"):
        metric(logits)  # `on` has left it as it was


def _listed(answer):
    return [answer] if isinstance(answer, str) else list(answer)


def test_normalised_is_0_on_the_corrupted_run_and_1_on_the_clean_one():
    clean, corrupted = random_logits(seed=1), random_logits(seed=2)
    for metric in (
        hl.logit_diff(3, 7),
        metrics.prob([1, 2, 3], 0),
        metrics.log_prob(0),
        metrics.kl(clean, -2),
        hl.Metric("entropy", lambda logits: Categorical(logits=logits).entropy()),
    ):
        scaled = metric.normalised(clean, corrupted)
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        close(scaled(corrupted), zero, atol=1e-12)
        close(scaled(clean), one, atol=1e-12)
        assert scaled.position == metric.position
        assert scaled.name != metric.name
        low, high = metric(corrupted), metric(clean)
        close(scaled.per_prompt(LOGITS), (metric.per_prompt(LOGITS) - low) / (high - low), atol=1e-12)
    twice = hl.logit_diff(3, 7).normalised(clean, corrupted).normalised(clean, corrupted)
    close(twice(LOGITS), hl.logit_diff(3, 7).normalised(clean, corrupted)(LOGITS), atol=1e-12)


def test_a_metric_of_the_users_own_is_given_one_positions_logits_of_all_prompts():
    seen = []

    def entropy(logits):
        seen.append(logits)
        return Categorical(logits=logits).entropy()

    metric = hl.Metric("entropy", entropy, position=1)
    close(metric.per_prompt(LOGITS), Categorical(logits=LOGITS[:, 1]).entropy(), atol=0)
    assert torch.equal(seen[0], LOGITS[:, 1])
    assert metric.on(gpt2_like()) is metric


def test_any_leading_axes_go_row_by_row():
    """What a sweep hands over at once: many patched runs of the batch."""
    runs = torch.stack([random_logits(seed=seed)[:, -1] for seed in range(4)])
    for metric in (
        hl.logit_diff([0, 1, 2], 7),
        metrics.prob(3),
        metrics.log_prob([4, 5, 6]),
        metrics.kl(LOGITS),
        hl.logit_diff(3, 7).normalised(LOGITS, random_logits(seed=9)),
    ):
        together = metric.of_logits(runs)
        assert together.shape == (4, 3)
        for run, row in zip(runs, together, strict=True):
            close(metric.per_prompt(run[:, None]), row, atol=1e-13)


def test_gradients_flow_through_the_metric_and_not_into_its_reference():
    reference = random_logits(seed=1).requires_grad_()
    corrupted = random_logits(seed=2).requires_grad_()
    for metric in (
        metrics.kl(reference),
        hl.logit_diff(3, 7),
        metrics.prob(2),
        metrics.log_prob(2),
        hl.logit_diff(3, 7).normalised(reference, corrupted),
    ):
        logits = LOGITS.clone().requires_grad_()
        metric(logits).backward()
        assert reference.grad is None
        assert corrupted.grad is None
        assert (logits.grad[:, :-1] == 0).all()
        assert (logits.grad[:, -1] != 0).any(-1).all()
    logits = LOGITS.clone().requires_grad_()
    metrics.kl(reference)(logits).backward()
    expected = (LOGITS[:, -1].softmax(-1) - reference[:, -1].softmax(-1)).detach() / 3
    close(logits.grad[:, -1], expected, atol=1e-12)


def test_it_fits_transformer_lens_patching():
    model, clean, corrupted = hooked("LN"), prompts(2, 4), prompts(2, 4, seed=1)
    clean_logits, cache = model.run_with_cache(clean)
    metric = hl.logit_diff([1, 2], 3).normalised(clean_logits, model(corrupted))
    results = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
    for layer in range(2):
        for position in range(4):

            def patch_by_hand(stream, hook, position=position):
                stream[:, position] = cache[hook.name][:, position]
                return stream

            logits = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch_by_hand)])
            raw = [(row[-1, answer] - row[-1, 3]).item() for row, answer in zip(logits, (1, 2), strict=True)]
            ends = [
                sum((row[-1, answer] - row[-1, 3]).item() for row, answer in zip(run, (1, 2), strict=True)) / 2
                for run in (model(corrupted), clean_logits)
            ]
            expected = (sum(raw) / 2 - ends[0]) / (ends[1] - ends[0])
            assert float(results[layer, position]) == pytest.approx(expected, abs=1e-5)  # theirs are in float32
    assert float((results - results[0, 0]).abs().max()) > 0.1


def test_it_measures_what_an_intervention_does():
    model = handwritten(strengths=hl.Strengths(20.0, 6.0, 10.0, 1.0))
    prompt = hl.hijack_prompt(model.language, 0, 3, 1, 12, distance=4, filler="avoid", global_candidate=5, seed=0)
    metric = metrics.margin(prompt)
    assert metric(model(prompt.clean)) > 1
    with hooks.ablate(model, model.circuit.induction):
        memory = metric(model(prompt.clean))
    close(memory.detach(), model.language.log_pi_b[0, 3] - model.language.log_pi_b[0, 5])


finite = st.floats(-30, 30)
tokens = st.integers(0, 4)
rows = st.lists(st.lists(finite, min_size=5, max_size=5), min_size=1, max_size=3)


def as_logits(listed):
    return torch.tensor(listed, dtype=torch.float64)[:, None]


@settings(max_examples=50)
@given(rows, st.lists(tokens, min_size=2, max_size=2, unique=True), finite)
def test_laws_of_probabilities(listed, pair, shift):
    logits, (answer, foil) = as_logits(listed), pair
    total = sum(metrics.prob(token).per_prompt(logits) for token in range(5))
    close(total, torch.ones(len(listed), dtype=torch.float64), atol=1e-12)
    prob, log_prob = metrics.prob(answer).per_prompt(logits), metrics.log_prob(answer).per_prompt(logits)
    close(prob, log_prob.exp(), atol=1e-12)
    forward, backward = (hl.logit_diff(*pair).per_prompt(logits) for pair in ((answer, foil), (foil, answer)))
    assert torch.equal(forward, -backward)
    # A difference of logits is that of log probabilities; and what is added to all logits changes nothing.
    close(forward, log_prob - metrics.log_prob(foil).per_prompt(logits), atol=1e-12)
    close(metrics.prob(answer).per_prompt(logits + shift), prob, atol=1e-12)


@settings(max_examples=50)
@given(rows, st.data())
def test_laws_of_kl(listed, data):
    other = data.draw(st.lists(st.lists(finite, min_size=5, max_size=5), min_size=len(listed), max_size=len(listed)))
    p, q = as_logits(listed), as_logits(other)
    divergence = metrics.kl(p).per_prompt(q)
    assert (divergence >= -1e-12).all()
    close(metrics.kl(p).per_prompt(p + 3.5), torch.zeros(len(listed), dtype=torch.float64), atol=1e-12)
    # Pinsker: half the square of the summed differences of probabilities.
    distance = sum((metrics.prob(v).per_prompt(p) - metrics.prob(v).per_prompt(q)).abs() for v in range(5))
    assert (divergence >= distance.square() / 2 - 1e-9).all()


@settings(max_examples=50)
@given(rows, tokens, tokens, st.floats(0.1, 10), finite)
def test_normalising_undoes_any_shift_and_scale(listed, answer, foil, scale, shift):
    logits, clean, corrupted = as_logits(listed), random_logits(1, 1, 5, seed=1), random_logits(1, 1, 5, seed=2)
    plain = metrics.prob(answer)
    changed = hl.Metric("changed", lambda values: scale * plain.of_logits(values) + shift)
    flipped = hl.Metric("flipped", lambda values: -plain.of_logits(values))
    expected = plain.normalised(clean, corrupted).per_prompt(logits)
    close(changed.normalised(clean, corrupted).per_prompt(logits), expected, atol=1e-7)
    close(flipped.normalised(clean, corrupted).per_prompt(logits), expected, atol=1e-9)
    close(plain.normalised(corrupted, clean).per_prompt(logits), 1 - expected, atol=1e-9)


DIFF = hl.logit_diff(1, 2)
test_values = refused(
    ValueError,
    {
        "answer holds token id -1": lambda: hl.logit_diff(-1, 0),
        "foil holds token id -2": lambda: hl.logit_diff(0, [1, -2]),
        "foil must be another token than answer, 3, got 3": lambda: hl.logit_diff(3, 3),
        r"foil must be another token than answer, \[1, 2\], got 2": lambda: hl.logit_diff([1, 2], 2),
        "foil must be another token than answer, 'one', got ' one'": lambda: hl.logit_diff("one", " one").on(
            gpt2_like()
        ),
        "foil must be as many tokens as answer, 2, got 3": lambda: hl.logit_diff([1, 2], [3, 4, 5]),
        r"answer holds token id 100; the vocabulary has ids 0 to 12": lambda: metrics.prob(100).on(gpt2_like()),
        r"answer must be a non-empty": lambda: metrics.log_prob([]),
        "2 tokens, one per prompt, for 3 prompts": lambda: metrics.prob([1, 2])(LOGITS),
        "1 tokens, one per prompt, for 3 prompts": lambda: (
            DIFF.normalised(LOGITS, -LOGITS) and hl.logit_diff(1, [2])(LOGITS)
        ),
        "'logit 1 − logit 2' reads position 7; the prompts have 5": lambda: hl.logit_diff(1, 2, 7)(LOGITS),
        "reads position 2; the prompts have 1": lambda: hl.logit_diff(1, 2, 2).index(np.uint8(1)),
        "reads position -6; the prompts have 5": lambda: metrics.kl("clean", -6).on(None, clean=LOGITS),
        r"logits must be a tensor \[batch, pos, d_vocab\], got \(5, 13\)": lambda: DIFF(LOGITS[0]),
        r"logits must be a tensor \[batch, pos, d_vocab\], got list": lambda: DIFF(LOGITS.tolist()),
        r"'KL from the clean run' needs that run's logits: \.on\(model, clean=logits\)": lambda: metrics.kl().on(None),
        r"needs that run's logits: \.on\(model, corrupted=": lambda: metrics.kl("corrupted").on(None, clean=LOGITS),
        r"'KL from the clean run' needs a model or its unpatched runs": lambda: metrics.kl()(LOGITS),
        r"\"P\('one'\)\" needs a model": lambda: metrics.prob("one")(LOGITS),
        "needs a model or its": lambda: metrics.prob("one").normalised(LOGITS, -LOGITS),
        "reference must be one of 'clean', 'corrupted', got 'patched'": lambda: metrics.kl("patched"),
        "'logit 1 − logit 2' is .* on the clean and on the corrupted run alike": lambda: DIFF.normalised(
            LOGITS, LOGITS + 1
        ),
    },
)
test_types = refused(
    TypeError,
    {
        r"answer must be tokens, each a text or an id, got 1\.5": lambda: hl.logit_diff(1.5, 0),
        "foil must be .* got True": lambda: hl.logit_diff(0, True),
        "answer must be .* got None": lambda: metrics.prob(None),
        r"answer must be .* got 0\.5": lambda: metrics.log_prob([0, 0.5]),
        r"answer must be .* got tensor\(1\.": lambda: metrics.log_prob(torch.tensor([1.0, 2.0])),
        "position must be an int, got 'last'": lambda: metrics.prob(0, "last"),
        "position must be an int, got True": lambda: metrics.kl("clean", True),
        r"position must be an int, got 1\.0": lambda: hl.Metric("x", lambda logits: logits.sum(-1), 1.0),
        "name must be a string, got 3": lambda: hl.Metric(3, lambda logits: logits.sum(-1)),
        "of_logits must be a function of logits, got None": lambda: hl.Metric("x"),
        "of_logits must be a function of logits, got 'x'": lambda: hl.Metric("x", "x"),
        r"reference must be 'clean', 'corrupted' or logits .* got tensor": lambda: metrics.kl(LOGITS[0]),
        "reference must be .* got None": lambda: metrics.kl(None),
        "prompt must be a HijackPrompt, got Tensor; logit_diff takes": lambda: metrics.margin(prompts()),
    },
)

test_values_of_the_wrong_size = refused(
    ValueError,
    {
        "answer holds token id 100": lambda: metrics.prob(100)(LOGITS),
        "foil holds token id 13": lambda: hl.logit_diff(0, [1, 2, 13])(LOGITS),
        "answer .*'one two'.* token": lambda: metrics.prob("one two").on(gpt2_like()),
        "answer .*tokenizer": lambda: metrics.prob("one").on(hooked()),
        "reference .*3.*1": lambda: metrics.kl(LOGITS).per_prompt(LOGITS[:1]),
        "reference .*2.*3": lambda: metrics.kl(LOGITS[:2]).per_prompt(LOGITS),
        r"logits must be .* got shape \(13,\)": lambda: hl.logit_diff(0, 1).of_rows(LOGITS[0, 0]),
        "reference .*5.*13": lambda: metrics.kl(LOGITS[..., :5]).per_prompt(LOGITS),
    },
)
