"""Interventions under what can go wrong around them: Ctrl-C anywhere, abandoned generators, threads, errors."""

import gc
import random
import sys
import threading
import time

import pytest
import torch
from bridges_for_tests import gpt2_like
from faults_for_tests import Fault
from models_for_tests import CIRCUIT, HEADS, MLPS, close, hooked, native, perturbed, prompts
from plain_families import plain_of_hooked
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import LensHandle

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks import Intervention, ablate, patch, patch_path

TOKENS, SOURCE = prompts(), prompts(seed=1)
MODELS = {
    "HookedTransformer": lambda: hooked("LN"),
    "native bridge": lambda: native("LN")[0],
    "GPT-2 bridge": lambda: gpt2_like.__wrapped__(),
}
INTERVENTIONS = {
    "ablate": lambda model: ablate(model, [hl.Component(0, "head", 0), *MLPS]),
    "ablate to the mean": lambda model: ablate(model, HEADS[1], "mean", SOURCE),
    "patch": lambda model: patch(model, [HEADS[0], "blocks.1.hook_resid_pre"], SOURCE),
    "patch_path": lambda model: patch_path(model, HEADS[0], hl.Component(1, "head", 1), "q", SOURCE),
}


class Sentinel(Exception):
    pass


def hooks_on(model):
    """Everything on every hook point, TransformerLens's and PyTorch's lists alike."""
    return {
        name: ([id(handle) for handle in point.fwd_hooks], [id(hook) for hook in point._forward_hooks.values()])
        for name, point in model.hook_dict.items()
        if point.fwd_hooks or point._forward_hooks
    }


@pytest.fixture(params=MODELS)
def model(request, unchecked):
    """A model with a hook of the user's on it; afterwards with that hook alone, and the same logits to the bit."""
    model = MODELS[request.param]()
    model.hook_dict["blocks.0.attn.hook_z"].add_hook(lambda z, hook: z * 1.5)
    logits, before = model(TOKENS), hooks_on(model)
    yield model
    assert hooks_on(model) == before
    assert torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize("intervene", INTERVENTIONS)
def test_nothing_is_left_after_ctrl_c_at_random_moments_of_a_run(model, intervene):
    """Anywhere in TransformerLens, PyTorch and the hooks, while the model runs."""
    intervention = INTERVENTIONS[intervene](model)
    with intervention:
        expected = model(TOKENS)
        with Fault() as counter:
            model(TOKENS)
    generator = random.Random(0)
    for _ in range(12):
        with (
            pytest.raises(KeyboardInterrupt),
            intervention,
            Fault(count=generator.randint(1, counter.lines * 9 // 10)),
        ):
            model(TOKENS)
    with intervention:
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize(
    "only",
    [
        "hooks/intervention.py",
        "transformer_lens/hook_points.py",
        "torch/nn/modules/module.py",
        "torch/utils/hooks.py",
    ],
)
def test_no_ctrl_c_while_hooks_come_and_go_leaves_one_that_acts(only, unchecked):
    """Ctrl-C between PyTorch's taking a hook and TransformerLens's listing it is served on return from the former."""
    model = hooked()
    logits, intervention, leaks = model(TOKENS), ablate(model, HEADS), []
    with Fault((only,)) as counter, intervention:
        pass
    assert counter.lines > 3
    for count in range(1, counter.lines + 1):
        with pytest.raises(KeyboardInterrupt), Fault((only,), count) as fault, intervention:
            pass
        if not torch.equal(model(TOKENS), logits):
            leaks.append(fault.where)
        for point in model.hook_dict.values():
            point.fwd_hooks.clear()
            point._forward_hooks.clear()
    assert not leaks


def test_a_generator_that_is_abandoned_takes_its_hooks_along(model):
    def runs():
        with ablate(model, HEADS[0]):
            while True:
                yield model(TOKENS)

    alone, generator = model(TOKENS), runs()
    assert not torch.equal(next(generator), alone)
    assert not torch.equal(model(TOKENS), alone)  # while it is suspended, its hooks are there
    del generator
    gc.collect()
    assert torch.equal(model(TOKENS), alone)

    generator = runs()
    next(generator)
    generator.close()
    assert torch.equal(model(TOKENS), alone)

    generator = runs()
    next(generator)
    with pytest.raises(Sentinel):
        generator.throw(Sentinel)


def test_generators_abandoned_in_any_order_with_one_intervention_between_them(model):
    shared = patch(model, MLPS[0], SOURCE)

    def runs(intervention):
        with intervention:
            yield model(TOKENS)
            yield model(TOKENS)

    with shared:
        expected = model(TOKENS)
    generators = [runs(shared), runs(shared), runs(ablate(model, HEADS[0])), runs(shared)]
    for generator in generators:
        next(generator)
    for index in (1, 2, 0):  # not the reverse of the order in which they were entered
        generators[index].close()
    close(next(generators[3]), expected, atol=0)
    generators.clear()
    gc.collect()


def test_an_intervention_that_is_dropped_while_active_is_removed_by_its_context_alone(model):
    ablation = ablate(model, HEADS[0])
    with ablation:
        inside = model(TOKENS)
        del ablation
        gc.collect()
        assert torch.equal(model(TOKENS), inside)


@pytest.mark.parametrize("intervene", INTERVENTIONS)
def test_errors_in_a_metric_or_a_hook_of_the_users_leave_nothing(model, intervene):
    def fails(*args, **kwargs):
        raise Sentinel

    def measure(metric):
        with INTERVENTIONS[intervene](model):
            return metric(model(TOKENS))

    for metric in (hl.Metric("fails", fails), hl.logit_diff([1, 2, 3], 0), hl.logit_diff("a", 0)):
        with pytest.raises((Sentinel, ValueError)):
            measure(metric)
    for point in ("hook_embed", "blocks.1.attn.hook_q", "blocks.1.hook_resid_post"):
        with pytest.raises(Sentinel), Intervention(model, edit=[(point, fails)]), INTERVENTIONS[intervene](model):
            model(TOKENS)
        with pytest.raises(Sentinel), INTERVENTIONS[intervene](model), Intervention(model, look=[(point, fails)]):
            model(TOKENS)


@pytest.mark.parametrize("method", ["auto", "forward"])
def test_errors_in_a_sweep_leave_nothing(model, method):
    calls = []

    def fails_late(logits):
        calls.append(0)
        if len(calls) == 3:
            raise Sentinel
        return logits[..., -1, 1].mean()

    for sweep in (
        lambda metric: hooks.patch_sweep(model, SOURCE, TOKENS, metric, method=method),
        lambda metric: hooks.ablate_sweep(model, TOKENS, metric, method=method),
    ):
        calls.clear()
        with pytest.raises(Sentinel):
            sweep(fails_late)
        with pytest.raises(ValueError, match="one per prompt"):
            sweep(hl.logit_diff([1, 2, 3], 0))


def test_an_error_while_the_source_runs_leaves_nothing(model):
    def fails(activation, hook):
        raise Sentinel

    for make in (
        lambda: patch(model, HEADS[0], SOURCE),
        lambda: ablate(model, MLPS, "mean", SOURCE),
        lambda: ablate(model, MLPS, "resample", SOURCE),
        lambda: patch_path(model, HEADS[0], "unembed", "unembed", SOURCE),
    ):
        with pytest.raises(Sentinel), Intervention(model, look=[("blocks.1.hook_resid_post", fails)]):
            make()


def in_threads(*jobs):
    """Runs the jobs side by side, switching as often as Python can; errors come out."""
    errors, start, interval = [], threading.Barrier(len(jobs)), sys.getswitchinterval()

    def work(job):
        try:
            start.wait()
            job()
        except BaseException as error:
            errors.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "the threads wait for one another"
    if errors:
        raise errors[0]


def test_threads_with_models_of_their_own_do_not_meet(unchecked):
    models = [hooked("LN"), perturbed(), native("LN")[0]]
    makes = [
        lambda model: ablate(model, hl.Component(0, "head", 0), "mean", SOURCE),
        lambda model: patch(model, MLPS[0], SOURCE),
        lambda model: patch_path(model, hl.Component(0, "head", 0), hl.Component(1, "head", 0), "v"),
    ]
    expected = []
    for model, make in zip(models, makes, strict=True):
        with make(model):
            expected.append(model(TOKENS))
    found = [[] for _ in models]

    def job(n):
        for _ in range(6):
            with makes[n](models[n]):
                found[n].append(models[n](TOKENS))

    in_threads(*(lambda n=n: job(n) for n in range(3)))
    for results, truth in zip(found, expected, strict=True):
        assert len(results) == 6
        assert all(torch.equal(result, truth) for result in results)
    assert not any(hooks_on(model) for model in models)


@pytest.mark.parametrize("same", [False, True], ids=["interventions of their own", "one intervention"])
def test_threads_that_come_and_go_on_one_model_neither_fail_nor_leave_anything(same, monkeypatch, unchecked):
    """What runs meanwhile is the threads' own business: hooks are a model's, not a thread's."""
    model, remove = hooked(), RemovableHandle.remove
    shared = ablate(model, HEADS[0])

    def slowly(*_):  # the other threads get their turn while a list of hooks is searched, and between its changes
        time.sleep(1e-4)
        return False  # handles are never equal, though one may be the one that is looked for

    def remove_slowly(self):
        slowly()
        remove(self)

    monkeypatch.setattr(LensHandle, "__eq__", slowly)
    monkeypatch.setattr(RemovableHandle, "remove", remove_slowly)

    def job():
        for _ in range(20):
            with shared if same else ablate(model, MLPS[0]):
                pass

    in_threads(job, job, job)
    assert not hooks_on(model)


def test_threads_that_take_turns_on_one_model_each_see_their_own_hooks_alone(model):
    makes = [lambda: ablate(model, HEADS[0]), lambda: patch(model, MLPS[0], SOURCE)]
    expected, lock, results = [], threading.Lock(), [[], []]
    for make in makes:
        with make():
            expected.append(model(TOKENS))

    def job(n):
        for _ in range(5):
            with lock, makes[n]():
                results[n].append(model(TOKENS))

    in_threads(lambda: job(0), lambda: job(1))
    for found, truth in zip(results, expected, strict=True):
        assert all(torch.equal(logits, truth) for logits in found)


@pytest.mark.parametrize("intervene", INTERVENTIONS)
def test_overlapping_entries_of_many_leave_in_any_order(model, intervene):
    generator, alone = random.Random(1), model(TOKENS)
    for _ in range(5):
        makes = [INTERVENTIONS[intervene], INTERVENTIONS["ablate"], INTERVENTIONS["patch"]]
        entered = [make(model) for make in makes]
        entered += [generator.choice(entered) for _ in range(3)]  # the same once more
        for intervention in entered:
            intervention.__enter__()
        assert not torch.equal(model(TOKENS), alone)
        generator.shuffle(entered)
        for intervention in entered:
            intervention.__exit__(None, None, None)
        assert torch.equal(model(TOKENS), alone)


def test_gradients_of_a_changed_run_are_those_of_the_changed_network(unchecked):
    """The truth is the plain network with the same change, and its own gradients."""
    model = hooked("LN")
    plain = plain_of_hooked(model)
    embed = plain.ends["embed.W_E"].requires_grad_()
    seen = {}

    def keep(name, value):
        seen[name] = value.detach()
        return value

    plain.run(SOURCE, keep)
    point, mlp = "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"

    def zeroed(name, value):
        return value * torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None] if name == point else value

    def patched(name, value):
        return seen[mlp] if name == mlp else value

    def averaged(name, value):
        return seen[mlp].mean(0).expand_as(value) if name == mlp else value

    def sent(receiver, via, stream):
        if (receiver, via) != ((1, 1), "v"):
            return stream
        return stream - now[point][:, :, 0] @ plain.layers[0]["attn.W_O"][0]

    now = {}

    def follow(name, value):
        now[name] = value
        return value

    cases = {
        "ablate": (lambda: ablate(model, hl.Component(0, "head", 0)), lambda: plain.run(TOKENS, zeroed)),
        "patch": (lambda: patch(model, MLPS[1], SOURCE), lambda: plain.run(TOKENS, patched)),
        "mean": (lambda: ablate(model, MLPS[1], "mean", SOURCE), lambda: plain.run(TOKENS, averaged)),
        "path": (
            lambda: patch_path(model, hl.Component(0, "head", 0), hl.Component(1, "head", 1), "v"),
            lambda: plain.run(TOKENS, follow, sent),
        ),
    }
    metric, found = hl.logit_diff(3, 5), []
    for make, truth in cases.values():
        (expected,) = torch.autograd.grad(metric(truth()), embed)
        with make():
            (actual,) = torch.autograd.grad(metric(model(TOKENS)), model.embed.W_E)
        close(actual, expected)
        found.append(actual)
    (untouched,) = torch.autograd.grad(metric(model(TOKENS)), model.embed.W_E)
    assert all(float((actual - untouched).abs().max()) > 1e-3 for actual in found)


@pytest.mark.parametrize("intervene", INTERVENTIONS)
def test_gradients_are_there_when_asked_for_and_only_then(model, intervene):
    with torch.no_grad(), INTERVENTIONS[intervene](model):
        logits = model(TOKENS)
        assert not logits.requires_grad
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():  # where it is made does not matter
            intervention = INTERVENTIONS[intervene](model)
        assert torch.is_grad_enabled()
        with intervention:
            found = model(TOKENS)
            assert found.requires_grad
            assert torch.equal(found, logits)
            found.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        model.zero_grad()


def test_no_graph_is_kept_of_a_source_run():
    model = hooked("LN")
    for make in (
        lambda: patch(model, HEADS[0], SOURCE),
        lambda: ablate(model, MLPS[1], "mean", SOURCE),
        lambda: patch_path(model, HEADS[0], "unembed", "unembed", SOURCE),
    ):
        with make():
            logits = model(TOKENS)
        logits.sum().backward()
        with make():
            model(TOKENS).sum().backward()  # a second backward through a graph that was kept would raise
    with ablate(model, [*CIRCUIT.bigram]):
        assert torch.is_grad_enabled()
