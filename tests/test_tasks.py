"""In-context learners: their exact answers by brute force, their training, and how their models are opened."""

import itertools
import math
import os
import signal
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401 (its import draws from the global state)
import torch
from models_for_tests import close
from refusals import refused

import hijack_lens as hl
from hijack_lens import hooks, tasks
from hijack_lens.tasks import (
    AffineRecurrence,
    AlgorithmSelection,
    BigramMemories,
    CompressedDigits,
    LatentConcepts,
    LinearPrompts,
    LogisticPrompts,
    RealTransformer,
    RelevantPatterns,
    Representations,
    Schedule,
    affine_recurrence,
    algorithm_selection,
    bigram_memories,
    compressed_digits,
    latent_concepts,
    relevant_patterns,
    representations,
)
from hijack_lens.training.data import mixed_seed

SHORT = Schedule(6, batch_size=4, evaluate_every=2, checkpoint_every=2, warmup=2)
CONCEPTS = LatentConcepts(5, 3, 0.5, 7, d_model=16, n_heads=2, schedule=SHORT)
REGRESSION = AlgorithmSelection(2, 4, d_model=16, n_layers=2, n_heads=2, schedule=SHORT)
KINDS = (LinearPrompts(0.3), LinearPrompts(0.3, 1), LogisticPrompts(3.0))
MIXED = replace(REGRESSION, kinds=KINDS)
AFFINE = AffineRecurrence(5, d_model=16, n_heads=2, schedule=SHORT)
REPRESENTED = Representations(3, 4, d_model=16, n_heads=2, schedule=SHORT)
PATTERNS = RelevantPatterns(9, 5, 6, 0.6, d_mlp=12, schedule=SHORT)
BIGRAMS = BigramMemories(5, 0.5, 0.4, 12, d_model=16, schedule=SHORT)
DIGITS = CompressedDigits(2, 3, d_model=8, n_heads=2, schedule=SHORT)
TASKS = [CONCEPTS, REGRESSION, MIXED, PATTERNS, AFFINE, REPRESENTED, BIGRAMS, DIGITS]


@pytest.fixture
def few(monkeypatch):
    """Looks and measures on few prompts."""
    modules = latent_concepts, algorithm_selection, relevant_patterns, affine_recurrence, representations
    for module in (*modules, bigram_memories):
        for name in ("_WATCHED", "_MEASURED", "_PROBED"):
            monkeypatch.setattr(module, name, 64)
    monkeypatch.setattr(relevant_patterns, "_CLASSIFIED", 16)
    monkeypatch.setattr(representations, "_PASTED", SHORT)


# The protocol


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_depend_on_their_seed_alone_and_the_last_position_is_asked(task, global_rng_untouched):
    assert isinstance(task, tasks.Task)
    one, same, other = task.sample(6, 1), task.sample(6, 1), task.sample(6, 2)
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    assert bool(one.mask[:, -1].all())
    assert len(one[2:5]) == 3
    for name, values in one.latent.items():
        assert torch.equal(one[2:5].latent[name], values[2:5])
    model = task.model(0)
    references = task.references(one)
    shape = task.predictions(model(one.inputs)).shape
    assert {said.shape for said in references.values()} == {shape}
    assert ("bayes" in references) == (task is not DIGITS)
    shares = tasks.context_share(task, model, [1], n=5)
    assert bool(shares.bayes.isnan().all()) == (task is DIGITS)


def test_a_task_in_another_world_has_other_tables_and_the_same_settings():
    other = CONCEPTS.in_world(1)
    assert not torch.equal(other.tables, CONCEPTS.tables)
    assert replace(other, world=0) == CONCEPTS
    close(other.tables.sum(-1), torch.ones(3, 5, dtype=torch.float64), atol=1e-12)


# Exact answers


def test_bayes_on_latent_concepts_is_the_sum_over_all_tables_by_hand():
    batch = CONCEPTS.sample(4, 3)
    found, tables = CONCEPTS.references(batch), CONCEPTS.tables.tolist()
    for row, prompt in enumerate(batch.inputs.tolist()):
        for t, token in enumerate(prompt):
            likelihood = [math.prod(table[a][b] for a, b in itertools.pairwise(prompt[: t + 1])) for table in tables]
            for following in range(5):
                joint = sum(p * table[token][following] for p, table in zip(likelihood, tables, strict=True))
                average = sum(table[token][following] for table in tables) / 3
                own = tables[int(batch.latent["table"][row])][token][following]
                for name, expected in (("bayes", joint / sum(likelihood)), ("average", average), ("oracle", own)):
                    assert abs(float(found[name][row, t, following]) - expected) < 1e-12, name


def test_ablation_adds_what_the_mean_in_a_components_place_does(few):
    model = CONCEPTS.model(1)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] = 0
    table = CONCEPTS.measure(model, 0).set_index(["measure", "where"])["value"]["error added without"]
    assert table.index.tolist() == ["L0H0", "L0H1", "L0MLP", "L1H0", "L1H1", "L1MLP"]
    assert table["L0H1"] == pytest.approx(0, abs=1e-6)
    batch = CONCEPTS.sample(latent_concepts._MEASURED, mixed_seed(0, "measured", 0))[: latent_concepts._PROBED]
    whole = CONCEPTS.loss(model(batch.inputs), batch)
    model.blocks[1].hook_mlp_out.register_forward_hook(lambda _, __, out: out.mean(0).expand_as(out))
    assert table["L1MLP"] == pytest.approx(
        float((CONCEPTS.loss(model(batch.inputs), batch) - whole).detach()), abs=1e-5
    )
    assert abs(table["L1MLP"]) > 1e-3


def test_prompts_follow_their_table_and_a_conflict_ends_with_steps_of_another():
    task = LatentConcepts(6, 3, 0.1, 40)
    transitions = torch.zeros(3, 6, 6, dtype=torch.float64)
    batch = task.sample(3000, 0)
    table = batch.latent["table"][:, None].expand(-1, 40)
    transitions.index_put_((table, batch.inputs, batch.targets), torch.ones(()).double(), accumulate=True)
    often = transitions.sum(-1) > 2000
    assert bool(often.any())
    close((transitions / transitions.sum(-1, keepdim=True))[often], task.tables[often], atol=0.05)

    denied = task.conflict(5.0, 500, 0)
    a, b = denied.latent["table"], denied.latent["denying"]
    assert bool((a != b).all())
    log_p = task.tables.log()[:, denied.inputs, denied.targets]
    for own, steps in ((a, slice(0, 34)), (b, slice(34, 40))):  # five steps between positions, and the one asked
        assert bool((log_p[own, torch.arange(500)][:, steps] > -20).all())
    assert float(log_p[a, torch.arange(500)][:, 34:].mean()) < float(log_p[b, torch.arange(500)][:, 34:].mean()) - 2
    said, last = task.references(denied), denied.inputs[:, -1]
    close(said["context"][:, -1], task.tables[b, last], atol=0)
    close(said["weights"][:, -1], task.tables[a, last], atol=0)


def test_ridges_are_scikit_learns_and_bayes_weighs_them_by_numerical_integration():
    from sklearn.linear_model import Ridge

    for d in (1, 2):
        task = AlgorithmSelection(d, 4)
        batch = task.sample(5, 7)
        found = {name: one[..., 0] for name, one in task.references(batch).items()}
        for row in range(5):
            x = batch.inputs[row, ::2, :d].double().numpy()
            y = batch.inputs[row, 1::2, d].double().numpy()
            for n in range(1, 5):
                for kind in task.kinds:
                    ridge = Ridge(alpha=d * kind.noise**2, fit_intercept=False).fit(x[:n], y[:n])
                    assert abs(float(found[kind.name][row, 2 * n]) - float(ridge.predict(x[n : n + 1])[0])) < 1e-8
                single = Ridge(alpha=task.single_penalty, fit_intercept=False).fit(x[:n], y[:n])
                assert abs(float(found["single ridge"][row, 2 * n]) - float(single.predict(x[n : n + 1])[0])) < 1e-8
                if d == 1:
                    assert abs(float(found["bayes"][row, 2 * n]) - integrated(x, y, n, (0.1, 1.0))) < 1e-8
            assert float(found["bayes"][row, 0]) == 0


def integrated(x, y, n, noises):
    """The posterior mean of the next y, by the trapezoidal rule over w, which errs by nothing here."""
    w = np.linspace(-9, 9, 60_001)[:, None]
    weight, mean = 0.0, 0.0
    for level in noises:
        log_p = -(w[:, 0] ** 2) / 2 - (((y[:n] - w * x[:n, 0]) / level) ** 2).sum(1) / 2 - n * math.log(level)
        p = np.exp(log_p)
        weight += p.sum()
        mean += (p * w[:, 0] * x[n, 0]).sum()
    return float(mean / weight)


def of_kind(batch, index):
    """The prompts of one kind."""
    return batch[(batch.latent["kind"] == index).nonzero()[:, 0]]


def test_bayes_on_sparse_weights_is_the_sum_over_all_sets_of_them_by_hand():
    """Each set, and each noise, is a Gaussian process, whose density scipy knows."""
    from scipy.stats import multivariate_normal

    kinds = (LinearPrompts(0.2), LinearPrompts(0.5, 1), LinearPrompts(0.3, 2))
    task = AlgorithmSelection(4, 5, kinds)
    batch = task.sample(6, 3)
    found = {name: one[..., 0] for name, one in task.references(batch).items()}
    for row in range(6):
        x, y = batch.inputs[row, ::2, :4].double().numpy(), batch.inputs[row, 1::2, 4].double().numpy()
        for seen in range(1, 6):
            weight, mean = np.zeros(3), np.zeros(3)
            for index, kind in enumerate(kinds):
                sets = list(itertools.combinations(range(4), kind.nonzero or 4))
                for one in sets:
                    read = x[:, list(one)] / len(one) ** 0.5
                    covariance = read[:seen] @ read[:seen].T + kind.noise**2 * np.eye(seen)
                    p = multivariate_normal(np.zeros(seen), covariance).pdf(y[:seen]) / len(sets)
                    weight[index] += p
                    mean[index] += p * (read[seen] @ read[:seen].T @ np.linalg.solve(covariance, y[:seen]))
            assert abs(float(found["bayes"][row, 2 * seen]) - mean.sum() / weight.sum()) < 1e-8
            for kind, expected in zip(kinds, mean / weight, strict=True):
                assert abs(float(found[kind.name][row, 2 * seen]) - expected) < 1e-8
            own = (mean / weight)[int(batch.latent["kind"][row])]
            assert abs(float(found["oracle"][row, 2 * seen]) - own) < 1e-8


@pytest.mark.parametrize(("d", "slope"), [(1, 1.0), (1, 8.0), (2, 3.0), (2, 8.0)])
def test_bayes_on_labels_is_the_integral_over_weights_by_another_rule(d, slope):
    """Gauss and Legendre's rule in many short pieces along each axis, turned to that of the longest x."""
    from scipy.special import expit

    task = AlgorithmSelection(d, 5, (LogisticPrompts(slope), LinearPrompts(0.5)))
    batch = of_kind(task.sample(12, 2), 0)
    found = {name: one[..., 0] for name, one in task.references(batch).items()}
    node, part = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(-8.5, 8.5, 61) / d**0.5
    at = ((edges[1:] + edges[:-1])[:, None] + np.diff(edges)[:, None] * node).ravel() / 2
    each = np.outer(np.diff(edges) / 2, part).ravel()
    axes, parts = np.meshgrid(*[at] * d), np.meshgrid(*[each] * d)
    w = np.stack([one.ravel() for one in axes], -1)
    prior = np.prod([one.ravel() for one in parts], 0) * np.exp(-d * (w**2).sum(1) / 2)
    assert len(batch) >= 4
    for row in range(4):
        x, y = batch.inputs[row, ::2, :d].double().numpy(), batch.inputs[row, 1::2, d].double().numpy()
        assert set(y) <= {-1, 1}
        longest = x[np.linalg.norm(x, axis=1).argmax()]
        turned = w @ np.linalg.qr(np.stack([longest, np.roll(longest, 1) * [1, -1][:d]], 1))[0][:, :d].T
        for seen in range(6):
            p = prior * expit(slope * turned @ x[:seen].T * y[:seen]).prod(1)
            expected = float((p * (2 * expit(slope * turned @ x[seen]) - 1)).sum() / p.sum())
            assert abs(float(found[f"logistic, slope {slope:g}"][row, 2 * seen]) - expected) < 1e-8
            if seen:  # by then it is plain that these are labels
                assert abs(float(found["bayes"][row, 2 * seen]) - expected) < 1e-8
        assert abs(float(found["bayes"][row, 0])) < 1e-12


def test_numbers_and_labels_are_told_apart_and_each_kind_is_weighed_by_what_it_gives_its_own():
    batch = MIXED.sample(300, 1)
    found = {name: one[:, 2::2, 0] for name, one in MIXED.references(batch).items()}
    labels = batch.latent["kind"] == 2
    close(found["bayes"][labels], found["oracle"][labels], atol=0)
    without = replace(MIXED, kinds=KINDS[:2])
    numbers = without.references(batch[(~labels).nonzero()[:, 0]])  # of the other kinds
    close(found["bayes"][~labels], numbers["bayes"][:, 2::2, 0], atol=1e-12)

    labelled = of_kind(MIXED.sample(400, 5), 2)
    slopes = replace(MIXED, kinds=(LogisticPrompts(1.0), LogisticPrompts(6.0)))
    x, y = labelled.inputs[:, ::2, :2].double(), labelled.inputs[:, 1::2, 2].double()
    said, log_p = map(torch.stack, zip(*algorithm_selection.posteriors(slopes.kinds, x, y), strict=True))
    bayes = algorithm_selection.posteriors((LogisticPrompts(1.0),), x, y)[0]
    close(said[0], bayes[0], atol=0)
    whole = ((1 + y[:, 0] * 0) / 2).log()  # before any, both labels are as likely
    close(log_p[:, :, 1], whole.expand(2, -1), atol=1e-12)


def test_sparse_weights_are_any_few_of_them_and_labels_are_as_often_as_they_should():
    task = AlgorithmSelection(4, 3, (LinearPrompts(0.2, 1), LinearPrompts(0.2, 2)))
    batch = task.sample(8000, 0)
    for index, (count, sets) in enumerate([(1, 4), (2, 6)]):
        weights = batch.latent["weights"][batch.latent["kind"] == index]
        there, often = (weights != 0).unique(dim=0, return_counts=True)
        assert bool((there.sum(1) == count).all())
        assert len(often) == sets
        assert float((often / len(weights) - 1 / sets).abs().max()) < 0.03
        assert abs(float(weights.square().sum(1).mean()) - 1) < 0.06
    task = AlgorithmSelection(2, 9, (LogisticPrompts(2.0), LinearPrompts()))
    batch = of_kind(task.sample(6000, 0), 0)
    z = (batch.inputs[:, ::2, :2].double() @ batch.latent["weights"][..., None])[..., 0]
    close(task.references(batch)["context"][:, ::2, 0], (2 / (1 + (-2 * z).exp()) - 1), atol=1e-12)
    y = batch.targets[:, ::2]
    assert bool((y.abs() == 1).all())
    for low, high in ((-2, -1), (-0.5, 0), (0.5, 0.6), (1, 3)):
        there = (z > low) & (z < high)
        assert abs(float(y[there].mean()) - float((z[there]).tanh().mean())) < 0.04


def test_scikit_learns_estimators_are_beside_the_model_at_the_last_x(few):
    from sklearn.linear_model import Lasso, LogisticRegression, Ridge

    model = MIXED.model(1)
    table = MIXED.measure(model, 3).set_index(["measure", "where"])["value"]
    batch = MIXED.sample(64, mixed_seed(3, "measured", 0))
    penalty = 0.3 * math.sqrt(2 * math.log(2) / 4)
    tried = [
        [Ridge(alpha=2 * 0.09, fit_intercept=False)],
        [Lasso(alpha=c * penalty, fit_intercept=False) for c in (0.1, 0.2, 0.5, 1, 2)],
        [LogisticRegression(C=9 / 2, fit_intercept=False)],
    ]
    answers = MIXED.references(batch)["context"][:, -1, 0].tolist()
    for index, (kind, estimators) in enumerate(zip(KINDS, tried, strict=True)):
        rows = (batch.latent["kind"] == index).nonzero()[:, 0].tolist()
        errors = np.zeros((len(estimators), len(rows)))
        for i, estimator in enumerate(estimators):
            for j, row in enumerate(rows):
                x, y = batch.inputs[row, ::2, :2].double().numpy(), batch.inputs[row, 1::2, 2].double().numpy()
                if index < 2:
                    said = estimator.fit(x[:-1], y).predict(x[-1:])[0]
                elif len(set(y)) == 1:
                    said = y[0]
                else:
                    said = estimator.fit(x[:-1], y).predict_proba(x[-1:])[0] @ [-1, 1]
                errors[i, j] = (said - answers[row]) ** 2
        half = len(rows) // 2
        expected = errors[errors[:, :half].mean(1).argmin(), half:].mean()
        assert table[f"error of {kind.name} at the last x", "scikit-learn"] == pytest.approx(expected)
        ours = (model(batch.inputs)[rows[half:], -1, 0].detach().double() - torch.tensor(answers)[rows[half:]]).square()
        assert table["error over scikit-learn's", kind.name] == pytest.approx(float(ours.mean()) / expected)


def prompts_of(x, a, b):
    """A batch in float64 of recurrences that begin with x."""
    values = [x]
    for _ in range(6):
        values.append(a * values[-1] + b)
    x = torch.stack(values, 1)
    return tasks.Batch(
        x[:, :-1, None], x[:, 1:], torch.ones(x.shape[0], 6, dtype=torch.bool), {"slope": a, "offset": b}
    )


def test_bayes_on_affine_recurrences_is_the_integral_over_lines_and_then_the_line():
    generator = torch.Generator().manual_seed(3)
    a, b = 2 * torch.rand(2, 12, generator=generator, dtype=torch.float64) - 1
    x = torch.randn(12, generator=generator, dtype=torch.float64)
    batch = prompts_of(x, a, b)
    found = {name: one[..., 0] for name, one in AFFINE.references(batch).items()}
    close(found["bayes"][:, 2:], batch.targets[:, 2:], atol=1e-12)
    close(found["context"], batch.targets, atol=1e-12)
    assert float(found["bayes"][:, 0].abs().max()) == 0
    for row, (first, second) in enumerate(batch.inputs[:, :2, 0].tolist()):
        assert abs(float(found["bayes"][row, 1]) - integrated_lines(first, second)) < 1e-8


def integrated_lines(first, second, noise=1e-5):
    """The posterior mean after one transition with a little noise, whose effect is of the order of its square."""
    from scipy.special import ndtr

    a = np.linspace(-1, 1, 4_000_001)
    rest = second - a * first
    p = ndtr((1 - rest) / noise) - ndtr((-1 - rest) / noise)  # b integrated out
    p[[0, -1]] /= 2
    return float((p * (a * second + rest)).sum() / p.sum())


def test_beyond_the_prior_bayes_takes_its_best_line_and_least_squares_is_numpys():
    from scipy.optimize import lsq_linear

    generator = torch.Generator().manual_seed(4)
    a, b = 4 * torch.rand(2, 30, generator=generator, dtype=torch.float64) - 2
    batch = prompts_of(torch.randn(30, generator=generator, dtype=torch.float64), a, b)
    found, beyond = AFFINE.references(batch), 0
    for row, x in enumerate(batch.inputs[..., 0].numpy()):
        for seen in range(1, 6):
            read = np.stack([x[:seen], np.ones(seen)], 1)
            line = np.linalg.lstsq(read, x[1 : seen + 1])[0]
            assert abs(line @ [x[seen], 1] - float(found["least squares"][row, seen, 0])) < 1e-8
            if seen > 1 or abs(x[1]) > 1 + abs(x[0]):  # else many lines of the prior fit
                line = lsq_linear(read, x[1 : seen + 1], (-1, 1), "bvls", tol=1e-15).x
                assert abs(line @ [x[seen], 1] - float(found["bayes"][row, seen, 0])) < 1e-8
                beyond += bool(np.abs(line).max() >= 1)
    assert beyond > 50
    still = prompts_of(*torch.tensor([[0.5, 3.0], [0.0, 0.0], [0.5, 3.0]], dtype=torch.float64))  # it never moves
    close(AFFINE.references(still)["bayes"][0, 1:, 0], torch.full((5,), 0.5, dtype=torch.float64), atol=1e-12)
    assert bool(torch.stack([*AFFINE.references(still).values()]).isfinite().all())


def test_recurrences_follow_their_lines_and_a_conflict_keeps_numbers_in_range():
    for batch in (AffineRecurrence(7).sample(3000, 0), AffineRecurrence(7).conflict(1.5, 3000, 0)):
        a, b, x = batch.latent["slope"], batch.latent["offset"], batch.inputs[..., 0].double()
        close(a[:, None] * x + b[:, None], batch.targets.double(), atol=1e-5)
        close(batch.targets[:, :-1], batch.inputs[:, 1:, 0], atol=0)
        assert abs(float(b.abs().mean()) - 0.5) < 0.02
    close(a.abs(), torch.full_like(a, 1.5), atol=0)
    assert abs(float((a > 0).double().mean()) - 0.5) < 0.05
    assert abs(float(batch.targets[:, -1].std()) - 1) < 0.05
    assert float(x.abs().max()) < 8
    close(AFFINE.conflict(0.5, 9, 0).latent["slope"].abs(), torch.full((9,), 0.5).double(), atol=0)


@dataclass(frozen=True)
class Copying(AffineRecurrence):
    """Recurrences whose model says the last number; its first head scores by the product of two numbers."""

    def model(self, seed):
        model = RealTransformer(1, 1, self.n_transitions, d_model=4, n_layers=3, n_heads=2, d_mlp=0, norm=None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("blocks") or name == "pos_embed.W_pos":
                    parameter.zero_()
            model.W_E[:], model.unembed.W_U[:] = 0.0, 0.0
            model.W_E[0, 0] = model.unembed.W_U[0, 0] = 1.0
            model.blocks[0].attn.W_Q[0, 0, 0] = model.blocks[0].attn.W_K[0, 0, 0] = 1.0
        return model


def test_a_model_that_copies_is_measured_as_one(few):
    task = Copying(5)
    found = task.measure(task.model(0), 3).set_index(["measure", "where"])["value"]
    for seen in range(5):
        assert found[f"error after {seen}", "model"] == pytest.approx(found[f"error after {seen}", "copy"])
    for measure, direct in (("copied", 1), ("corrected", 0)):
        whole = ["the direct path", "up to layer 0"]
        assert found[measure][whole].tolist() == pytest.approx([direct, direct], abs=1e-9)
        assert found[measure].drop(whole).abs().max() < 1e-9
    assert found["R2 up to"].nunique() == 1
    close(torch.tensor(found["error over copying"].to_numpy()), torch.ones(12, dtype=torch.float64), atol=1e-9)
    assert found["error added without"].abs().max() == 0

    batch = task.sample(64, hl.training.data.mixed_seed(3, "measured", 0))
    x = batch.inputs[..., 0].double().numpy()
    pairs = []
    for query in range(1, 5):
        keys = slice(0, query + 1)
        values = [x[:, query, None] * x[:, keys], -np.abs(x[:, query, None] - x[:, keys])]
        centred = [v - v.mean(1, keepdims=True) for v in values]
        pairs.append(np.stack([(v - v.mean(0)).ravel() for v in centred]))
    expected = np.corrcoef(np.concatenate(pairs, 1))[0, 1]
    assert found["score by closeness", "L0H0"] == pytest.approx(expected, abs=1e-6)
    assert found["score by closeness", "lowest of layer 0"] == pytest.approx(min(expected, 0), abs=1e-6)


def test_the_parts_of_a_prediction_follow_it_in_sum(few):
    model = AFFINE.model(1)
    found = AFFINE.measure(model, 2).set_index(["measure", "where"])["value"]
    batch = AFFINE.sample(64, hl.training.data.mixed_seed(2, "measured", 0))
    said, last, following = (
        one.double().numpy()
        for one in (model(batch.inputs)[:, 2, 0].detach(), batch.inputs[:, 2, 0], batch.targets[:, 2])
    )
    assert found["R2 up to", "layer 2"] == pytest.approx(
        1 - ((said - following) ** 2).mean() / following.var(), abs=1e-5
    )
    read = np.stack([np.ones(64), last, following - last], 1)
    expected = np.linalg.lstsq(read, said)[0][1:]
    rest = ["the direct path", "positions and biases"]
    for measure, value in zip(("copied", "corrected"), expected, strict=True):
        parts = [*rest, "layer 0", "layer 1", "layer 2"]
        assert found[measure][parts].sum() == pytest.approx(value, abs=1e-5)
        heads = [f"L{layer}H{head}" for layer in range(3) for head in range(2)]
        assert found[measure][[*rest, *heads]].sum() == pytest.approx(value, abs=1e-5)


def test_a_representation_by_hand_and_ridge_on_it_is_the_posterior_mean():
    batch = REPRESENTED.sample(4, 5)
    found = {name: one[..., 0] for name, one in REPRESENTED.references(batch).items()}
    eye = torch.eye(3, dtype=torch.float64)
    for matrix in REPRESENTED.layers:
        close(matrix @ matrix.T, eye, atol=1e-12)
    for row in range(4):
        phi = []
        for x in batch.inputs[row, ::2, :3].double().tolist():
            for matrix in REPRESENTED.layers.tolist():
                sums = [sum(x[i] * matrix[i][j] for i in range(3)) for j in range(3)]
                x = [(s if s > 0 else 0.1 * s) * math.sqrt(2 / 1.01) for s in sums]
            phi.append(x)
        phi, y = np.array(phi), batch.inputs[row, 1::2, 3].double().numpy()
        close(batch.latent["features"][row], torch.from_numpy(phi), atol=1e-5)  # x is rounded to float32
        for seen in range(5):
            # A Gaussian process: its covariance is that of w, seen through Phi.
            covariance = phi[:seen] @ phi[:seen].T / 3 + 0.09 * np.eye(seen)
            expected = phi[seen] @ phi[:seen].T / 3 @ np.linalg.solve(covariance, y[:seen])
            assert abs(float(found["bayes"][row, 2 * seen]) - expected) < 1e-8
            assert abs(float(found["context"][row, 2 * seen]) - expected) < 1e-4
    close(found["weights"], found["bayes"], atol=0)
    assert not torch.equal(replace(REPRESENTED, world=1).layers, REPRESENTED.layers)


def test_a_conflict_is_labelled_through_another_representation():
    batch = Representations(3, 30).conflict(1.0, 4000, 0)
    found = Representations(3, 30).references(batch)
    error = {name: float((one[..., 0] - batch.targets)[:, -1].square().mean()) for name, one in found.items()}
    assert error["oracle"] == pytest.approx(0.09, abs=0.006)
    assert error["oracle"] < error["context"] < 1.2 * error["oracle"]
    assert error["weights"] > 2 * error["context"]
    own, half = REPRESENTED.sample(50, 1), REPRESENTED.conflict(0.5, 50, 1)
    close(half.inputs[:, ::2], own.inputs[:, ::2], atol=0)
    whole = REPRESENTED.conflict(1.0, 50, 1)
    close(half.latent["features"], (own.latent["features"] + whole.latent["features"]) / 2, atol=1e-12)


def test_representations_are_followed_copied_and_pasted_by_hand(few):
    task, seed = REPRESENTED, 4
    model = task.model(hl.training.data.mixed_seed(seed, "weights", 0))  # the untrained model itself
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = task.measure(model, seed).set_index(["measure", "where"])["value"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    pasted = found["pasted error over bayes"]
    assert pasted["trained blocks on Phi(x)"] == pasted["untrained blocks on Phi(x)"] != pasted["trained blocks on x"]
    for measure in ("decodability", "decodability at y"):
        assert found[measure].tolist() == found[f"{measure} untrained"].tolist()

    batch = task.sample(64, hl.training.data.mixed_seed(seed, "measured", 0))
    other = task.sample(64, hl.training.data.mixed_seed(seed, "other", 0)).inputs
    for where, positions in (("all x", [0, 2, 4, 6, 8]), ("the query", [8])):
        inputs = batch.inputs.clone()
        inputs[:, positions] = other[:, positions]
        _, cache = model.run_with_cache(inputs)

        def swap(activation, hook, cache=cache, positions=positions):
            activation[:, positions] = cache[hook.name][:, positions]
            return activation

        with torch.no_grad():
            own, whole = model(batch.inputs)[:, -1, 0], model(inputs)[:, -1, 0]
            part = model.run_with_hooks(batch.inputs, fwd_hooks=[("blocks.1.hook_mlp_out", swap)])[:, -1, 0]
        slope = float(((part - own) * (whole - own)).sum() / (whole - own).square().sum())
        assert found[f"follows {where}", "MLP 1"] == pytest.approx(slope, abs=1e-5)
    pattern = model.run_with_cache(batch.inputs)[1]["blocks.2.attn.hook_pattern"][:, 1]
    expected = sum(float(pattern[:, 2 * i + 1, 2 * i].mean()) for i in range(4)) / 4
    assert found["copies", "L2H1"] == pytest.approx(expected, abs=1e-6)


def test_bayes_on_relevant_patterns_is_the_sum_over_all_tasks_by_hand():
    batch = PATTERNS.prompts(PATTERNS.unseen, 40, 3, length=4)
    found = PATTERNS.references(batch)
    pattern = (batch.inputs[:, :, :9].double() @ PATTERNS.directions[:5].T).argmax(-1)
    undecided = 0
    for row in range(40):
        *examples, asked = pattern[row].tolist()
        labels = batch.inputs[row, :-1, 9].tolist()
        total = mean = 0.0
        for pair in itertools.permutations(range(5), 2):
            if asked not in pair:
                continue
            p = 1.0
            for one, label in zip(examples, labels, strict=True):
                p *= 0.3 * (label == 1 - 2 * pair.index(one)) if one in pair else 0.4 / 3 / 2
            total += p
            mean += p * (1 - 2 * pair.index(asked))
        undecided += abs(mean / total) < 1 - 1e-9
        assert abs(float(found["bayes"][row, -1, 0]) - mean / total) < 1e-12
    assert 5 < undecided < 35
    assert float(found["bayes"][:, :-1].abs().max()) == 0


def test_examples_have_the_tasks_patterns_and_labels_and_a_conflict_reverses_them():
    task = RelevantPatterns()
    assert len(task.trained) == 12
    assert len(task.unseen) == 18
    assert not {(b, a) for a, b in task.trained} & set(task.trained)
    said = {"sample": task.sample(3000, 0), "conflict": task.conflict(7.0, 3000, 0)}
    close(task.directions @ task.directions.T, torch.eye(30, dtype=torch.float64), atol=1e-12)
    for name, batch in said.items():
        parts = batch.inputs[:, :, :30].double() @ task.directions.T
        pattern, rest = parts[..., :6].argmax(-1), parts[..., 6:].abs()
        close(parts[..., :6], torch.nn.functional.one_hot(pattern, 6).double(), atol=1e-6)
        assert bool(((rest > 1e-6).sum(-1) <= 1).all())
        assert 0.49 < float(rest.max()) <= 0.5
        pair, label = batch.latent["task"], torch.cat([batch.inputs[:, :-1, 30], batch.latent["label"][:, None]], 1)
        for column, sign in ((0, 1), (1, -1)):
            own = pattern == pair[:, column, None]
            assert bool((label[own] == sign).all())
            assert abs(float(own[:, :-1].double().mean()) - 0.4) < 0.02
        others = (pattern != pair[:, :1]) & (pattern != pair[:, 1:])
        assert not bool(others[:, -1].any())
        assert abs(float(label[others].mean())) < 0.05
        close(batch.targets[:, -1], batch.latent["label"].float(), atol=0)
        trained = set(map(tuple, (pair if name == "sample" else pair.flip(1)).tolist()))
        assert trained == set(task.trained)
        answers = task.references(batch)
        own = batch.latent["label"].double()
        close(answers["context"][:, -1, 0], own, atol=0)
        close(answers["weights"][:, -1, 0], own if name == "sample" else -own, atol=0)
    assert said["conflict"].inputs.shape == (3000, 8, 31)
    strange = task.prompts([(0, 3)], 5, 0)
    assert float(task.references(strange)["weights"].abs().max()) == 0


@pytest.mark.parametrize("total", [0.3, 1.0, 1.7])
def test_mixed_patterns_are_orthogonal_of_one_norm_and_sum_as_said(total):
    task = RelevantPatterns()
    batch = task.prompts([(4, 1), (2, 5)], 500, 0, mixed=total, size=0.7)
    parts = batch.inputs[:, :, :30].double() @ task.directions[:6].T
    close(parts.norm(dim=-1), torch.full((500, 21), 0.7, dtype=torch.float64), atol=1e-6)
    label = torch.cat([batch.inputs[:, :-1, 30], batch.latent["label"][:, None]], 1)
    close(parts[:, -1].sum(-1), torch.full((500,), 0.7 * total, dtype=torch.float64), atol=1e-6)
    alike = parts @ parts[:, -1:].mT / 0.49
    of_pattern = alike[..., 0] > 0.5
    close(alike[..., 0], of_pattern.double(), atol=1e-5)
    assert bool((label == label[:, -1:])[of_pattern].all())
    assert abs(float(of_pattern[:, :-1].double().mean()) - 0.4) < 0.02


def test_scikit_learn_labels_prompts_as_it_does_when_asked_directly(few):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    table = PATTERNS.measure(PATTERNS.model(0), 0).set_index(["measure", "where"])["value"]
    before = [one for one, where in table.index if one.startswith("error by ") or (one == "error" and where != "bayes")]
    seed = hl.training.data.mixed_seed(0, "measured", len(before))
    batch = PATTERNS.prompts(PATTERNS.unseen, 64, seed, length=5)[:16]
    for name, kind in {
        "logistic regression": LogisticRegression,
        "SVM": lambda: SVC(kernel="linear"),
        "nearest neighbour": lambda: KNeighborsClassifier(1),
    }.items():
        wrong = 0.0
        for prompt, label in zip(batch.inputs.double().numpy(), batch.latent["label"].tolist(), strict=True):
            x, y = prompt[:-1, :-1], prompt[:-1, -1]
            said = y[0] if len(set(y)) == 1 else kind().fit(x, y).predict(prompt[-1:, :-1])[0]
            wrong += said != label
        assert table["error of few examples", name] == pytest.approx(wrong / 16)
    assert table["error of few examples", "SVM"] < 0.5


def test_bayes_on_bigram_memories_is_the_sum_over_what_may_follow_a_token_by_hand():
    """For each token by itself, either the bigrams or one of all continuations, as often as they came so far."""
    batch = BIGRAMS.sample(6, 3)
    denied = BIGRAMS.conflict(2.0, 6, 3)
    pi_b = BIGRAMS.bigrams.tolist()
    for one in (batch, denied):
        found = BIGRAMS.references(one)
        for row, prompt in enumerate(one.inputs.tolist()):
            for t, token in enumerate(prompt):
                after = [b for a, b in itertools.pairwise(prompt[: t + 1]) if a == token]
                joint = [0.6 * math.prod(pi_b[token][b] for b in after) * p for p in pi_b[token]]
                for forced in range(5):
                    joint[forced] += 0.4 / 5 * all(b == forced for b in after)
                context = [after.count(b) / len(after) if after else 0.2 for b in range(5)]
                for name, expected in (
                    ("bayes", [p / sum(joint) for p in joint]),
                    ("context", context),
                    ("weights", pi_b[token]),
                ):
                    close(found[name][row, t], torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_triggers_are_followed_by_their_continuation_and_other_tokens_by_the_bigrams():
    task = BigramMemories(5, 0.5, 0.4, 60)
    batch = task.sample(2000, 0)
    forced = batch.latent["continuation"].gather(1, batch.inputs)
    assert bool((batch.targets == forced)[forced >= 0].all())
    assert abs(float((batch.latent["continuation"] >= 0).double().mean()) - 0.4) < 0.02
    counts = torch.zeros(5, 5, dtype=torch.float64)
    free = forced < 0
    counts.index_put_((batch.inputs[free], batch.targets[free]), torch.ones(()).double(), accumulate=True)
    close(counts / counts.sum(-1, keepdim=True), task.bigrams, atol=0.03)


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_context_that_denies_a_bigram_says_so_as_often_as_asked(repeats):
    task = BigramMemories(6, 0.3, 0.5, 20)
    batch = task.conflict(float(repeats), 500, 0)
    asked, said = batch.inputs[:, -1], batch.latent["continuation"]
    at = batch.inputs == asked[:, None]
    assert at.sum(1).tolist() == [repeats + 1] * 500
    assert bool((batch.targets == said[:, None])[at].all())
    assert not bool((said == task.bigrams.argmax(-1)[asked]).any())
    assert not bool((said == asked).any())
    others = task.bigrams.clone()[batch.inputs[:, :-1], batch.inputs[:, 1:]]
    chained = ~at[:, :-1] & ~at[:, 1:]
    assert float(others[chained].min()) > 1e-8  # of the chain, but for what is written in
    close(task.references(batch)["context"][:, -1], torch.nn.functional.one_hot(said, 6).double(), atol=0)


def test_digits_are_sensed_by_products_with_both_modes_and_students_start_at_the_decomposition():
    from sklearn.datasets import load_digits

    task = replace(DIGITS, prior=False)
    model, batch = task.model(3), task.held_out
    images, digits = (one[task._order.numpy()] for one in (load_digits().images / 16, load_digits().target))
    close(batch.inputs, torch.tensor(images[1197:]).float(), atol=0)
    assert batch.targets[:, -1].tolist() == digits[1197:].tolist() == batch.latent["digit"].tolist()
    trained = images[:1197]
    for axis, rank, matrix in ((1, 2, model.front.sense_rows), (2, 3, model.front.sense_columns)):
        unfolded = np.moveaxis(trained, axis, 0).reshape(8, -1)
        left = np.linalg.svd(unfolded)[0][:, :rank] if axis else None
        ours = matrix.detach().double().numpy()
        close(torch.tensor(ours.T @ ours), torch.tensor(left @ left.T), atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.front.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    front = {name: one.detach().double().numpy() for name, one in model.front.named_parameters()}
    x = batch.inputs[:3].double().numpy()
    measured = front["sense_rows"] @ x @ front["sense_columns"].T
    decoded = front["decode_rows"].T @ measured @ front["decode_columns"]
    _, cache = model.run_with_cache(batch.inputs[:3])
    close(cache["front.hook_measured"].double(), torch.tensor(measured), atol=1e-4)
    close(model.front(batch.inputs[:3]).double(), torch.tensor(decoded), atol=1e-4)
    close(cache["hook_embed"], model.front(batch.inputs[:3]) @ model.W_E, atol=0)


def test_a_model_with_a_front_is_read_and_trained_through_it():
    model, x = DIGITS.model(1), DIGITS.held_out.inputs[:4]
    reader, ids = model.reading(x)
    assert torch.equal(reader(ids), model(x))
    close(hl.training.forward.PlainForward(model)(x), model(x), atol=1e-5)
    run = tasks.train(DIGITS, 1)
    for name, before in DIGITS.model(mixed_seed(1, "weights", 0)).front.named_parameters():
        assert not torch.equal(before, dict(run.model.front.named_parameters())[name])


def test_a_prior_is_the_teachers_transformer_and_its_answers_to_all_training_images():
    teacher, without = DIGITS.teacher, replace(DIGITS, prior=False)
    assert not hasattr(teacher.front, "sense_rows")
    theirs = dict(teacher.named_parameters())
    for name, parameter in DIGITS.model(5).named_parameters():
        assert name.startswith("front.") or torch.equal(parameter, theirs[name])
    assert not torch.equal(without.model(5).W_E, teacher.W_E)
    order, images = DIGITS._order, compressed_digits._digits()[0]
    for task, count in ((DIGITS, 1197), (without, 150)):
        batch = task.sample(3000, 0)
        known = {image.numpy().tobytes() for image in images[order[:count]]}
        assert {image.numpy().tobytes() for image in batch.inputs} <= known
        assert len({image.numpy().tobytes() for image in batch.inputs}) > 0.8 * min(count, 1300)
        answers = batch.latent["answers"]
        if task is DIGITS:
            close(answers, teacher(batch.inputs)[:, -1].double().softmax(-1).detach(), atol=1e-6)
        else:
            close(answers, torch.nn.functional.one_hot(batch.latent["digit"], 10).double(), atol=0)
        outputs = torch.randn(3000, 8, 10, generator=torch.Generator().manual_seed(1))
        expected = -(answers * outputs[:, -1].double().log_softmax(-1)).sum(-1).mean()
        assert float(task.loss(outputs, batch)) == pytest.approx(float(expected), abs=1e-5)


def test_measurements_are_taken_away_one_by_one_and_all_at_once():
    task = replace(DIGITS, prior=False)
    model, batch = task.model(0), task.held_out
    table = task.measure(model, 0).set_index(["measure", "where"])["value"]
    x, front = batch.inputs, model.front

    def wrong(kept):
        measured = torch.einsum("ai,nij,bj->nab", front.sense_rows, x, front.sense_columns)
        measured = torch.where(kept, measured, measured.mean(0))
        decoded = torch.einsum("nab,ai,bj->nij", measured, front.decode_rows, front.decode_columns)
        model.front = torch.nn.Identity()
        try:
            said = model(decoded)[:, -1]
        finally:
            model.front = front
        return float((said.argmax(-1) != batch.latent["digit"]).double().mean()), said.double().softmax(-1)

    every = torch.ones(2, 3, dtype=torch.bool)
    kept = every.clone()
    kept[1, 2] = False
    assert table["error added without a measurement", "row 1, column 2"] == pytest.approx(
        wrong(kept)[0] - wrong(every)[0], abs=0.004
    )
    assert table["accuracy by measurements gone", "0"] == pytest.approx(1 - wrong(every)[0], abs=0.004)
    gone, said = wrong(~every)
    assert table["accuracy by measurements gone", "6"] == pytest.approx(1 - gone, abs=0.004)
    assert table["accuracy by measurements gone", "6"] < 0.2
    w = torch.bincount(task.sample(20000, 0).latent["digit"], minlength=10).double() / 20000
    away = torch.nn.functional.one_hot(batch.latent["digit"], 10).double() - w
    share = float(((said.detach() - w) * away).sum() / away.square().sum())
    assert table["share by measurements gone", "6"] == pytest.approx(share, abs=0.01)
    assert "student, no prior" not in table["accuracy"].index

    denied = task.conflict(1.0, 5, 0)
    close(denied.inputs, compressed_digits._digits()[0][task._order[:1197]].mean(0).expand(5, 8, 8), atol=1e-6)
    close(
        model.front(task.conflict(0.25, 5, 0).inputs),
        torch.lerp(model.front(task.conflict(0.0, 5, 0).inputs), model.front(denied.inputs), 0.25),
        atol=1e-5,
    )


# Training


def test_a_small_model_learns_its_task_and_bayes_is_better():
    task = LatentConcepts(5, 2, 0.3, 12, d_model=32, n_heads=2, schedule=Schedule(250, 32, 8e-3, evaluate_every=125))
    run = tasks.train(task, 3)
    assert run.finished
    batch = task.sample(500, 5)
    losses = {
        name: float(-said.gather(-1, batch.targets[..., None]).log().mean())
        for name, said in {
            "model": task.predictions(run.model(batch.inputs)).detach(),
            **task.references(batch),
        }.items()
    }
    assert losses["bayes"] < losses["model"] < losses["bayes"] + 0.1 < losses["average"]
    close(run.model(batch.inputs), tasks.train(task, 3).model(batch.inputs), atol=0)
    assert run.over_time().index.tolist() == [0, 125, 250]


_at: list[object] = []


@dataclass(frozen=True)
class Stopped(LatentConcepts):
    """Latent concepts that stop training when they are looked at, as `_at` says."""

    def watch(self, model, seed):
        if _at:
            what = _at.pop(0)
            if what is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            elif what is not None:
                raise what
        return {"loss": float(model.W_E.detach().double().sum())}


@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError("killed")])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights_to_the_bit(what, tmp_path):
    task = Stopped(5, 3, 0.5, 7, d_model=16, n_heads=2, schedule=SHORT)
    whole = tasks.train(task, 1)
    _at[:] = [None, None, what]  # at step 4
    if what is KeyboardInterrupt:
        run = tasks.train(task, 1, tmp_path)
        assert (run.step, run.finished) == (4, False)
    else:
        with pytest.raises(OSError, match="killed"):
            tasks.train(task, 1, tmp_path)
    assert not _at
    for _ in range(2):  # the second time it is finished
        run = tasks.train(task, 1, tmp_path)
        assert run.step == 6
        for ours, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        columns = ["step", "measure", "value"]
        assert run.table[columns].to_numpy().tolist() == whole.table[columns].to_numpy().tolist()
    for name, changed in {"seed": (task, 2), "task": (replace(task, length=6), 1)}.items():
        with pytest.raises(ValueError, match=f"out=.* holds a run of another {name}"):
            tasks.train(*changed, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path, few):
    task = replace(REGRESSION, schedule=replace(SHORT, steps=120, evaluate_every=60, checkpoint_every=3))
    kills = 0
    for patience in (0.0, 0.003, 0.01):
        before = set(tmp_path.glob("checkpoint-*"))
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the parent's threads are not there
            try:
                tasks.train(task, 1, tmp_path)
            finally:
                os._exit(1)
        while set(tmp_path.glob("checkpoint-*")) == before:
            time.sleep(0.0005)
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kills == 3
    run, whole = tasks.train(task, 1, tmp_path), tasks.train(task, 1)
    assert run.finished
    for ours, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_file_in_a_checkpoints_place_is_refused(tmp_path, few):
    tasks.train(REGRESSION, 0, tmp_path)
    (file,) = tmp_path.glob("checkpoint-*/training.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(ValueError, match="is damaged"):
        tasks.train(REGRESSION, 0, tmp_path)


# Models opened


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_attributions_of_every_tasks_model_are_complete(task, dtype, tolerance):
    model = task.model(1).to(dtype)
    reader, ids = model.reading(task.sample(2, 0).inputs)
    head = hl.Component(model.cfg.n_layers - 1, "head", 0)
    outputs = range(reader.cfg.d_vocab_out)
    found = hl.attribute(reader, ids, circuit=hl.Circuit(induction=(head,)), answers=[*outputs])
    assert found.completeness_error <= tolerance
    assert hl.attribute_sources(reader, ids[0], answers=[0]).completeness_error <= tolerance
    assert hl.attribute_scores(reader, ids[0], head=head).completeness_error <= tolerance
    close(found.values.sum((1, 2)), reader(ids)[:, -1].detach(), atol=tolerance)


def test_the_output_is_the_mlps_of_what_attention_brought_and_stays_so_in_training():
    for model in (PATTERNS.model(1), tasks.train(replace(PATTERNS, delta=None), 1).model):
        batch, n = PATTERNS.sample(5, 0), 10
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        p, read = batch.inputs, slice(n)
        scores = (p[:, -1:] @ attn.W_Q[0, read, read]) @ (p @ attn.W_K[0, read, read]).mT / 21**0.5
        brought = scores.softmax(-1) @ p @ attn.W_V[0, read, read]
        expected = (brought @ mlp.W_in[n : 2 * n]).relu() @ mlp.W_out[:, -1:]
        close(model(p)[:, -1:], expected, atol=1e-6)
        close(mlp.W_out[:, -1].abs(), torch.full((12,), 12**-0.5), atol=1e-7)
        for weight, alive in (
            (mlp.W_in, (slice(n, 2 * n), slice(None))),
            (attn.W_Q[0], (read, read)),
            (attn.W_K[0], (read, read)),
            (attn.W_V[0], (read, read)),
        ):
            rest = weight.detach().clone()
            assert float(rest[alive].abs().min()) >= 0
            assert float(rest[alive].abs().max()) > 0
            rest[alive] = 0
            assert float(rest.abs().max()) == 0
        with hooks.ablate(model, "L0MLP"):
            assert float(model(p).detach().abs().max()) == 0


def test_only_queries_and_keys_start_differently_where_attention_starts_at_random():
    chosen, drawn = (dict(replace(PATTERNS, delta=delta).model(3).named_parameters()) for delta in (2.0, None))
    for name, one in chosen.items():
        assert torch.equal(one, drawn[name]) != name.endswith(("W_Q", "W_K")), name
    close(chosen["blocks.0.attn.W_Q"][0, :10, :10], 2 * torch.eye(10), atol=0)


def test_pruning_leaves_out_neurons_by_the_norm_of_their_weights(few):
    run = tasks.train(replace(PATTERNS, schedule=replace(SHORT, steps=60, batch_size=64, lr=1e-2)), 0)
    table = PATTERNS.measure(run.model, 0).set_index(["measure", "where"])["value"]
    batch = PATTERNS.prompts(PATTERNS.unseen, 64, hl.training.data.mixed_seed(0, "measured", 0))

    def error():
        said = run.model(batch.inputs)[:, -1, 0].detach().sign()
        return float((1 - said * batch.latent["label"]).double().mean()) / 2  # saying nothing is half wrong

    whole, W_in = error(), run.model.blocks[0].mlp.W_in
    assert table["error", "unseen"] == pytest.approx(whole)
    weights, order = W_in.detach().clone(), W_in.detach().norm(dim=0).argsort().tolist()
    for which, dead in (("least", order[:10]), ("largest", order[2:])):
        with torch.no_grad():
            W_in.copy_(weights)
            W_in[:, dead] = 0
        assert table[f"error added, {which} pruned", "0.9"] == pytest.approx(error() - whole)


def planted(n=200, seed=0):
    """Prompts whose last vector says a class and a number, and a model that passes vectors on."""
    generator = torch.Generator().manual_seed(seed)
    kind, number = torch.randint(3, (n,), generator=generator), torch.randn(n, generator=generator)
    inputs = torch.randn(n, 4, 5, generator=generator)
    inputs[:, -1, :3], inputs[:, -1, 3] = 3 * torch.nn.functional.one_hot(kind, 3), number
    latent = {"kind": kind, "number": number, "nothing": torch.randint(3, (n,), generator=generator)}
    shape = torch.ones(n, 4, dtype=torch.bool)
    return tasks.Batch(inputs, torch.zeros(n, 4), shape, latent)


def passing(**options):
    return RealTransformer(5, 2, 4, d_model=8, n_heads=2, norm=None, device="cpu", seed=4, **options)


def test_a_latent_that_is_there_is_read_and_one_that_is_not_is_not():
    batch, model = planted(), passing()
    untrained = passing()
    with torch.no_grad():
        untrained.W_E.zero_()

    def score(latent, position=-1, **options):
        found = tasks.decodability(model, untrained, batch, latent, "hook_embed", position, **options)
        assert found["point"].tolist() == ["hook_embed"]
        return found["score"].item(), found["untrained"].item()

    assert score("kind")[0] == score("kind", how="neighbours")[0] == 1.0
    assert score("kind")[1] < 0.5  # nothing there to read
    assert score("nothing")[0] < 0.5
    assert score("kind", 0)[0] < 0.5
    assert score("number")[0] > 0.999
    assert score("number")[1] < 0.1


def test_neighbours_by_hand():
    batch, model = planted(40), passing()
    seen = (batch.inputs[:, 1] @ model.W_E).detach().double()
    x = (seen - seen[:20].mean(0)) / seen[:20].std(0, unbiased=False)
    nearest = torch.cdist(x[20:], x[:20]).argmin(-1)
    expected = (batch.latent["nothing"][:20][nearest] == batch.latent["nothing"][20:]).double().mean()
    found = tasks.decodability(model, model, batch, "nothing", "hook_embed", 1, how="neighbours", neighbours=1)
    assert found["score"].item() == pytest.approx(float(expected), abs=1e-12)
    assert found["untrained"].item() == found["score"].item()


def test_moving_a_latent_adds_the_difference_of_class_means_of_the_other_half():
    batch, model = planted(), passing()
    point = "blocks.1.hook_resid_post"
    moved = tasks.move_latent(model, batch, "kind", point, [1, -1], seed=3)
    assert bool((moved.to != batch.latent["kind"][100:]).all())
    _, cache = model.run_with_cache(batch.inputs)
    means = torch.stack([cache[point][:100][batch.latent["kind"][:100] == k].mean(0) for k in range(3)])
    step = (means[moved.to] - means[batch.latent["kind"][100:]]) @ model.W_U  # no norm in between
    expected = torch.zeros_like(moved.outputs)
    expected[:, [1, 3]] = step[:, [1, 3]].detach()
    close(moved.unmoved, model(batch.inputs[100:]).detach(), atol=1e-6)
    close(moved.outputs - moved.unmoved, expected, atol=1e-4)
    at_random = (moved.at_random - moved.unmoved)[:, -1]
    assert float((at_random - expected[:, -1]).abs().max()) > 0.1
    with torch.no_grad():  # so that outputs tell how long the steps were
        model.unembed.W_U.zero_()
        model.unembed.W_U[:2, :2] = torch.eye(2)
    again = tasks.move_latent(model, batch, "kind", point, -1, seed=3)
    assert again.outputs.shape == moved.outputs.shape


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_claim_is_about_something_that_is_measured(task, few):
    found = task.measure(task.model(0), 0).set_index(["measure", "where"])["value"]
    assert found.index.is_unique
    assert bool(np.isfinite(found).all())
    for bar in task.claims:
        if bar.measure not in ("rank correlation", "share"):  # over training, and over doses
            assert (bar.measure, bar.where) in found.index
    assert found.index[0][0] in ("loss", "error", "accuracy")
    assert found.iloc[0] > 0


def test_a_bar_is_met_on_its_side_and_by_no_nan():
    bar = tasks.Bar("", "loss", "model", "at most", 1.0)
    assert [bar.met(x) for x in (0.9, 1.0, 1.1, math.nan)] == [True, True, False, False]
    assert replace(bar, side="at least").met(1.1)


def test_a_model_that_is_not_finite_has_no_share_and_no_measures():
    model = REGRESSION.model(0)
    with torch.no_grad():
        model.blocks[1].mlp.W_in[0, 0] = math.nan
    for run in (
        lambda: tasks.context_share(REGRESSION, model, [1.0], n=5),
        lambda: REGRESSION.measure(model, 0),
    ):
        with pytest.raises(ValueError, match=r"logits must be finite, got a NaN.* first at blocks\.1\.hook_resid_post"):
            run()


def test_autocast_changes_no_training_and_no_share():
    def found():
        run = tasks.train(tasks.shortened(REGRESSION, steps=3), seed=1)
        return [*run.model.parameters(), tasks.context_share(REGRESSION, run.model, [1.0], n=50).share]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(found(), expected, strict=True):
            assert torch.equal(one, other)
        assert torch.is_autocast_enabled("cpu")


# Conflicts


def test_the_share_is_the_slope_on_the_contexts_answer():
    model = REGRESSION.model(0)
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.b_U.fill_(0.7)
    found = tasks.context_share(REGRESSION, model, (0.5, 3.0), n=50, seed=9)
    for strength, share, bayes in found.to_pandas()[["strength", "share", "bayes"]].itertuples(index=False):
        index = found.strengths.index(strength)
        batch = REGRESSION.conflict(strength, 50, hl.training.data.mixed_seed(9, "conflict", index))
        answer = (batch.inputs[:, -1, :2].double() * batch.latent["weights"]).sum(-1)
        assert share == pytest.approx(float(0.7 * answer.sum() / answer.square().sum()), abs=1e-6)
        ideal = REGRESSION.references(batch)["bayes"][:, -1, 0]
        assert bayes == pytest.approx(float((ideal * answer).sum() / answer.square().sum()), abs=1e-9)


def test_shares_are_drawn_kept_and_written(tmp_path):
    shares = [tasks.context_share(task, task.model(0), task.doses[:2], n=20) for task in TASKS]
    assert "exact Bayes" in repr(shares[0])
    picture = hl.show.context_shares([*shares, shares[0]])
    assert [ax.get_title() for ax in picture.figure.axes] == [task.name for task in TASKS]
    assert [ax.get_xlabel() for ax in picture.figure.axes] == [task.dose for task in TASKS]
    assert len(picture.figure.axes[0].lines) == 2 + 2 * 2
    shares[0].save(tmp_path / "share.safetensors")
    again = tasks.ContextShare.load(tmp_path / "share.safetensors")
    assert again.strengths == shares[0].strengths
    assert torch.equal(again.share, shares[0].share)
    assert "svg" in shares[1]._repr_html_()


# Refusals


def probed(latent="kind", point="hook_embed", *args, **options):
    return tasks.decodability(passing(), passing(), planted(), latent, point, *args, **options)


def moved(latent="kind", point="hook_embed", **latents):
    batch = planted()
    return tasks.move_latent(passing(), replace(batch, latent={**batch.latent, **latents}), latent, point)


test_a_bad_value_is_refused_by_name = refused(
    ValueError,
    {
        "d_vocab must be at least 2, got 1": lambda: LatentConcepts(1),
        "concentration must be a finite number > 0": lambda: LatentConcepts(concentration=0.0),
        "kinds must be two or more different ones": lambda: AlgorithmSelection(
            kinds=(LinearPrompts(), LinearPrompts())
        ),
        "kinds must be linear where d is more than 2, got .*d=3": lambda: replace(MIXED, d=3),
        "kinds must have at most d=1 weights that are not 0": lambda: AlgorithmSelection(
            1, kinds=(LinearPrompts(), LinearPrompts(nonzero=2))
        ),
        "noise must be a finite number > 0, got 0": lambda: LinearPrompts(0),
        "nonzero must be at least 1, got 0": lambda: LinearPrompts(nonzero=0),
        "slope must be at most 8, got 9": lambda: LogisticPrompts(9.0),
        "batch must be of this task's 2 kinds, got": lambda: REGRESSION.references(MIXED.sample(20, 0)),
        "batch must hold shorter x": lambda: MIXED.references(
            replace(MIXED.sample(2, 0), inputs=1e4 * MIXED.sample(2, 0).inputs)
        ),
        "n_relevant must be less than d=4, got 4": lambda: RelevantPatterns(4, 4),
        "n_shifts must be less than half of n_relevant=6, got 3": lambda: RelevantPatterns(n_shifts=3),
        "share must be at most 1, got 1.5": lambda: RelevantPatterns(share=1.5),
        "strength must be a number of examples up to 6, got 7.0": lambda: PATTERNS.conflict(7.0, 4, 0),
        "pairs must be pairs of different patterns below 5, got .*": lambda: PATTERNS.prompts([(1, 1)], 4, 0),
        "length must be at most 6, got 7": lambda: PATTERNS.prompts([(1, 2)], 4, 0, length=7),
        "mixed must be at most sqrt.5 / 2., got 1.6": lambda: PATTERNS.prompts([(1, 2)], 4, 0, mixed=1.6),
        "batch must be of this task's prompts, of its own": lambda: PATTERNS.references(
            PATTERNS.in_world(1).sample(4, 0)
        ),
        "steps must be at least 1, got 0": lambda: Schedule(0),
        "n_transitions must be at least 3, got 2": lambda: AffineRecurrence(2),
        "strength must be a finite number > 0, got 0": lambda: AFFINE.conflict(0, 4, 0),
        "n_layers must be at least 2": lambda: Representations(n_layers=1),
        "strength must lie between 0 and 1, got 1.5": lambda: REPRESENTED.conflict(1.5, 4, 0),
        "x must be vectors of 3 numbers": lambda: REPRESENTED.features(torch.zeros(2)),
        "level must be a number that a float can hold": lambda: tasks.Bar("a", "b", "c", "at least", 10**400),
        "n must be at least 1, got 0": lambda: CONCEPTS.sample(0, 0),
        "rows must be a slice or ids of prompts .row., got tensor": lambda: CONCEPTS.sample(4, 0)[[[0, 1], [2, 3]]],
        "n=2147483648 would take .* GiB of memory": lambda: CONCEPTS.sample(2**31, 0),
        "n=1073741824 would take .* GiB of memory": lambda: tasks.context_share(
            REGRESSION, REGRESSION.model(0), [1.0], 2**30
        ),
        "strength must be a number of steps below 7, got 2.5": lambda: CONCEPTS.conflict(2.5, 4, 0),
        "strength must be a number of steps below 7, got 7.0": lambda: CONCEPTS.conflict(7.0, 4, 0),
        "latent must be one of kind": lambda: probed("sort", "hook_embed"),
        "is not a hook point": lambda: probed("kind", "hook_embbed"),
        "positions holds 4": lambda: probed("kind", "hook_embed", 4),
        "neighbours must be at most half": lambda: probed(how="neighbours", neighbours=101),
        "how must be one of": lambda: probed("kind", "hook_embed", how="deep"),
        "latent must be one of classes": lambda: moved("number", "hook_embed"),
        "batch must hold each of 2 classes": lambda: moved(kind=torch.zeros(200, dtype=torch.long)),
        "point must be .batch, pos, d.": lambda: moved("kind", "blocks.0.attn.hook_z"),
        "strengths must hold at least one number, got none": lambda: tasks.context_share(
            CONCEPTS, CONCEPTS.model(0), []
        ),
        "strengths must be a finite number": lambda: tasks.context_share(CONCEPTS, CONCEPTS.model(0), [-1]),
        "model must be one that writes the task's outputs: outputs must be .*, got shape": lambda: tasks.context_share(
            CONCEPTS, replace(CONCEPTS, d_vocab=CONCEPTS.d_vocab + 3).model(0)
        ),
        "model must be one that writes the task's outputs": lambda: BIGRAMS.measure(
            replace(BIGRAMS, d_vocab=BIGRAMS.d_vocab + 3).model(0), 0
        ),
        "results must hold at least one": lambda: hl.show.context_shares([]),
        "latent must be one of classes 0, 1, ..., got 'label', which holds -1": lambda: tasks.move_latent(
            PATTERNS.model(0), PATTERNS.sample(8, 0), "label", "hook_embed"
        ),
    },
)
test_a_value_of_a_bad_type_is_refused_by_name = refused(
    TypeError,
    {
        "schedule must be a Schedule, got 5": lambda: LatentConcepts(schedule=5),
        "kinds must be LinearPrompts and LogisticPrompts, got 0.1": lambda: AlgorithmSelection(kinds=(0.1, 1.0)),
        "task must be a task of hijack_lens.tasks": lambda: tasks.train("concepts"),
        "model must be a RealTransformer, got None": lambda: tasks.context_share(CONCEPTS, None),
        "seed must be an int, got 'earth'": lambda: CONCEPTS.in_world("earth"),
        "world must be an int, got 'earth'": lambda: LatentConcepts(world="earth"),
        "strengths must be numbers, got 3": lambda: tasks.context_share(CONCEPTS, CONCEPTS.model(0), 3),
    },
)
