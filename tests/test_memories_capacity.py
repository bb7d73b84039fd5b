"""Capacity: the closed form against brute force, and against what memories were measured to recall."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import close
from refusals import refused
from strategies import seeds

import hijack_lens as hl
from hijack_lens.memories import MemoryCapacity, memory_capacity
from hijack_lens.memories.capacity import Moments, crosstalk_moments, expected_recall, overlap, thresholded

D_VOCAB = 40
LANGUAGE = hl.BigramLanguage.dirichlet(D_VOCAB, seed=0)


@pytest.fixture(scope="module")
def measured():
    return memory_capacity(LANGUAGE, d_models=(10, 20, 40, 80, 112, 120), seeds=range(6))


def centred(table):
    return table - table.mean(1, keepdim=True)


def unit(count, d_model, generator):
    x = torch.randn(count, d_model, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def test_theory_is_within_three_standard_errors_of_what_is_measured(measured):
    off = (measured.recall.mean(-1) - measured.expected_recall).abs()
    assert (off <= 3 * measured.recall_stderr + 1e-12).all()
    assert measured.recall_stderr[:, :-1].max() < 0.04, "too rough to tell anything"
    assert measured.expected_recall[:, 0].max() < 0.15
    assert measured.expected_recall[:, -2].min() > 0.4
    rms = measured.crosstalk.square().mean(-1).sqrt()
    stderr = measured.crosstalk.std(-1) / len(measured.seeds) ** 0.5
    allowed = 3 * stderr + 0.03 * measured.expected_crosstalk + 1e-12
    assert ((rms - measured.expected_crosstalk).abs() <= allowed).all()
    assert (stderr[:, :-1] < 0.1 * measured.expected_crosstalk[:, :-1]).all()


def test_orthonormal_directions_recall_everything(measured):
    assert (measured.recall[:, -1] == 1).all()
    assert (measured.expected_recall[:, -1] == 1).all()
    assert measured.crosstalk[:, -1].max() < 1e-12
    assert (measured.expected_crosstalk[:, -1] == 0).all()


def test_thresholds_keep_cross_talk_out_and_theory_says_by_how_much(measured):
    linear, handwritten = measured.crosstalk.mean(-1)[:, :-1]
    assert (handwritten < 0.8 * linear).all()
    assert (measured.expected_recall[1, :-1] > measured.expected_recall[0, :-1]).all()


def test_both_memories_are_what_they_are_said_to_be(measured):
    """Outer products summed one by one; and the model's own logits, attention off, less what its embedding writes."""
    d_model, seed = 20, 3
    model = hl.associative_transformer(LANGUAGE, d_model=d_model, seed=seed, n_ctx=2, dtype=torch.float64, device="cpu")
    embed, unembed = model.W_E.detach(), model.W_U.detach().T
    log_pi_b = centred(LANGUAGE.log_pi_b)
    W = torch.zeros(d_model, d_model, dtype=torch.float64)
    for v in range(D_VOCAB):
        for u in range(D_VOCAB):
            W += log_pi_b[v, u] * torch.outer(unembed[u], embed[v])
    linear = torch.stack([unembed @ (W @ embed[q]) for q in range(D_VOCAB)])
    heads = [head for role in (model.circuit.previous_token, model.circuit.induction) for head in role]
    with hl.hooks.ablate(model, heads):
        logits = model(torch.arange(D_VOCAB)[:, None])[:, 0].detach()
    handwritten = logits - embed @ unembed.T
    at = measured.d_models.index(d_model), measured.seeds.index(seed)
    right = log_pi_b.argmax(1)
    for memory, scores in enumerate((linear, handwritten)):
        recall, crosstalk = measured.recall[memory][at], measured.crosstalk[memory][at]
        assert float(recall) == pytest.approx(float((scores.argmax(1) == right).double().mean()))
        assert float(crosstalk) == pytest.approx(float((centred(scores) - log_pi_b).square().mean().sqrt()))


@settings(max_examples=10)
@given(seed=seeds, c2=st.floats(0.001, 0.2), biased=st.floats(-0.5, 0.9))
def test_expected_recall_is_the_probability_by_simulation(seed, c2, biased):
    generator = torch.Generator().manual_seed(seed)
    table = centred(2 * torch.randn(6, 8, generator=generator).double())
    neuron = Moments(biased * math.sqrt(c2), c2)
    mean, variance = crosstalk_moments(table, c2, neuron)
    draws = torch.randn(20_000, 6, 8, generator=generator, dtype=torch.float64)
    won = (table + mean + variance.sqrt() * draws).argmax(-1) == table.argmax(-1)
    # Means over keys are independent between draws.
    by_draw = won.double().mean(1)
    assert abs(float(by_draw.mean()) - expected_recall(table, c2, neuron)) < 5 * float(by_draw.std()) / 141 + 1e-4


def test_crosstalk_moments_are_those_of_random_vectors():
    """The double sum written out, for independent vectors; linear, and with thresholds."""
    generator = torch.Generator().manual_seed(0)
    d_model, table = 12, torch.randn(5, 4, generator=generator).double()
    for neuron, act in (
        (Moments(0.0, 1 / d_model), lambda x: x),
        (thresholded(1 / d_model), lambda x: (2 * x - 1).relu()),
    ):
        scores = []
        for _ in range(6000):
            keys, values = unit(5, d_model, generator), unit(4, d_model, generator)
            scores.append(act(keys @ keys.T) @ table @ (values @ values.T))
        noise = torch.stack(scores) - table
        mean, variance = crosstalk_moments(table, 1 / d_model, neuron)
        error = (variance / len(noise)).sqrt()
        assert ((noise.mean(0) - mean).abs() < 5 * error).all()
        torch.testing.assert_close(noise.var(0), variance, rtol=0.15, atol=0)
        assert variance.max() / variance.min() > 1.3


@settings(max_examples=20)
@given(k=st.integers(3, 50), d=st.integers(2, 500))
def test_of_one_hot_pairs_the_noise_has_a_variance_of_two_over_d_and_k_over_d_squared(k, d):
    _, variance = crosstalk_moments(torch.eye(k, dtype=torch.float64), 1 / d, Moments(0.0, 1 / d))
    off = ~torch.eye(k, dtype=torch.bool)
    close(variance[off], torch.full((k * k - k,), 2 / d + (k - 2) / d**2, dtype=torch.float64))
    close(variance.diagonal(), torch.full((k,), (k - 1) / d**2, dtype=torch.float64))


def test_what_the_other_pairs_write_together_has_a_length_of_order_sqrt_k_over_d():
    generator = torch.Generator().manual_seed(1)
    for k, d in ((200, 50), (400, 100), (100, 400)):
        keys, values = unit(k, d, generator), unit(k, d, generator)
        others = (keys @ keys.T).fill_diagonal_(0.0) @ values
        assert float(others.norm(dim=1).square().mean().sqrt()) == pytest.approx(math.sqrt(k / d), rel=0.06)


def test_overlap_is_that_of_the_models_directions():
    for d_model in (20, 60, 100):
        squares = []
        for seed in range(5):
            model = hl.associative_transformer(LANGUAGE, d_model=d_model, seed=seed, n_ctx=1, device="cpu")
            squares.append((model.W_E @ model.W_U).detach().square().mean())
        assert float(torch.stack(squares).mean()) == pytest.approx(overlap(3 * D_VOCAB, d_model), rel=0.06)
    assert overlap(120, 120) == overlap(120, 500) == 0


@pytest.mark.parametrize("d_model", [2, 5, 30])
def test_thresholded_moments_are_those_of_random_unit_vectors(d_model):
    n_draws = 400_000
    x = unit(n_draws, d_model, torch.Generator().manual_seed(d_model))[:, 0]
    fires = (2 * x - 1).relu()
    found = thresholded(1 / d_model)
    for moment, draws in ((found.mean, fires), (found.square, fires**2)):
        assert abs(moment - float(draws.mean())) < 5 * float(draws.std()) / n_draws**0.5
    assert thresholded(0.0) == (0.0, 0.0)


def test_one_fact_per_token_needs_fewer_dimensions_and_theory_errs_on_the_low_side():
    facts = memory_capacity(D_VOCAB, d_models=(6, 16, 28), seeds=range(8))
    above = facts.recall.mean(-1) - facts.expected_recall
    assert (above[0] > -3 * facts.recall_stderr[0]).all()
    assert (above[0] < 0.1 + 3 * facts.recall_stderr[0]).all()
    dense = memory_capacity(LANGUAGE, d_models=(28,), seeds=(0, 1))
    assert facts.recall[0, -1].mean() > 0.9 > 0.2 > dense.recall[0, 0].mean()


def test_tables_pictures_and_files(measured, tmp_path):
    frame = measured.to_pandas()
    assert list(frame["d_model"]) == list(measured.d_models) * 2
    assert list(frame["memory"])[::6] == ["linear memory", "hand-written model"]
    assert list(frame["recall"][:6]) == pytest.approx(measured.recall[0].mean(-1).tolist())
    text = repr(measured)
    assert "MemoryCapacity(d_model=6, seed=6), 40 tokens" in text
    assert "<svg" in measured._repr_html_()
    axes = measured.picture().figure.axes
    assert [ax.get_xlabel() for ax in axes] == ["d_model"] * 2
    assert axes[0].get_ylabel() == "recall: fraction of keys"
    assert list(axes[0].lines[0].get_ydata()) == measured.expected_recall[0].tolist()
    measured.save(tmp_path / "capacity")
    again = MemoryCapacity.load(tmp_path / "capacity")
    assert repr(again) == text
    with pytest.raises(ValueError, match="does not exist"):
        MemoryCapacity.load(tmp_path / "nothing")


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_same_seeds_give_the_same_numbers():
    once, twice = (memory_capacity(6, d_models=[8], seeds=(0, 1)) for _ in range(2))
    assert torch.equal(once.recall, twice.recall)
    assert torch.equal(once.crosstalk, twice.crosstalk)
    default = memory_capacity(5, seeds=(0, 1))
    assert default.d_models[-1] == 15


def test_standard_errors_are_never_below_those_of_independent_draws(measured):
    draws = D_VOCAB * len(measured.seeds)
    p = measured.expected_recall
    assert (measured.recall_stderr + 1e-12 >= (p * (1 - p) / draws).clamp_min(0).sqrt()).all()


test_values_refused = refused(
    ValueError,
    {
        "language must be at least 3, got 2": lambda: memory_capacity(2),
        "language.pi_b holds zeros": lambda: memory_capacity(hl.BigramLanguage(torch.eye(7))),
        "d_models must be at least 2, got 1": lambda: memory_capacity(5, d_models=[1]),
        "d_models must hold at least one": lambda: memory_capacity(5, d_models=[]),
        "seeds two different ones": lambda: memory_capacity(5, d_models=[4], seeds=[1, 1]),
        "seeds must be at least 0": lambda: memory_capacity(5, d_models=[4], seeds=[-1, 1]),
        "recall must have shape": lambda: MemoryCapacity(
            (4,), (0, 1), 5, torch.zeros(2, 1, 1), torch.zeros(2, 1, 2), torch.zeros(2, 1), torch.zeros(2, 1)
        ),
    },
)
test_types_refused = refused(
    TypeError,
    {
        "language must be an int": lambda: memory_capacity("English"),
        "d_models must be several ints, got 8": lambda: memory_capacity(5, d_models=8),
        "seeds must be several ints": lambda: memory_capacity(5, seeds=3),
    },
)
