"""No hook of ours outlives its context, none of the user's is touched, and nothing is silently ignored."""

import contextlib
import itertools
import signal
import sys

import pytest
import torch
from models_for_tests import CIRCUIT, HEADS, MLPS, OURS, close, handwritten, hooked, native, perturbed, prompts
from transformer_lens.hook_points import HookPoint

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks import Intervention, ablate, patch, patch_path

MODELS = {
    "hand-written": handwritten,
    "LayerNorm": lambda: hooked("LN"),
    "native bridge": lambda: native("LN")[0],
}
FIRST, LAST = hl.Component(0, "head", 0), hl.Component(1, "head", 0)
INTERVENTIONS = {
    "ablate": lambda model: ablate(model, [FIRST, LAST, *MLPS]),
    "ablate to the mean": lambda model: ablate(model, FIRST, "mean", prompts(3, seed=1)),
    "patch": lambda model: patch(model, [FIRST, "blocks.1.hook_resid_pre"], prompts(seed=1)),
    "patch_path": lambda model: patch_path(model, LAST, "unembed", "unembed"),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A model on which a user has hooks already: a permanent one, a temporary one, and a backward one."""
    model = MODELS[request.param]()
    model.hook_dict["blocks.0.attn.hook_z"].add_perma_hook(lambda z, hook: z * 1.5)
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda x, hook: x + 0.25)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda grad, hook: None, dir="bwd")
    return model


@pytest.fixture(params=INTERVENTIONS)
def intervene(request):
    return INTERVENTIONS[request.param]


def hooks_on(model):
    """Everything on every hook point and module, in order, by identity."""
    of_torch = {  # a bridge adds pre-hooks of its own in its first run, and replaces them in every other
        name: (
            list(module._forward_hooks.items()),
            len(module._forward_pre_hooks),
            list(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }
    of_lens = {name: (list(point.fwd_hooks), list(point.bwd_hooks)) for name, point in model.hook_dict.items()}
    return of_torch, of_lens


@contextlib.contextmanager
def left_as_it_was(model):
    logits, before = model(prompts()), hooks_on(model)
    yield
    assert hooks_on(model) == before
    assert torch.equal(model(prompts()), logits)


class Sentinel(Exception):
    pass


def test_nothing_is_left_after_a_run(model, intervene):
    with left_as_it_was(model):
        untouched = model(prompts())
        with intervene(model):
            assert not torch.equal(model(prompts()), untouched)
        with intervene(model):
            pass


def test_nothing_is_left_after_an_exception_in_the_body(model, intervene):
    def fail():
        with intervene(model):
            model(prompts())
            raise Sentinel

    with left_as_it_was(model), pytest.raises(Sentinel):
        fail()


def test_nothing_is_left_after_an_exception_in_a_hook_of_the_users(model, intervene):
    def fails(activation, hook):
        raise Sentinel

    with left_as_it_was(model), pytest.raises(Sentinel), intervene(model):
        model.run_with_hooks(prompts(), fwd_hooks=[("blocks.1.attn.hook_z", fails)])


def test_nothing_is_left_after_ctrl_c_in_the_body_and_within_the_run(model, intervene):
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), intervene(model):
        signal.raise_signal(signal.SIGINT)

    def interrupted(activation, hook):
        signal.raise_signal(signal.SIGINT)

    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), intervene(model):
        model.run_with_hooks(prompts(), fwd_hooks=[("blocks.1.hook_resid_post", interrupted)])


def test_nothing_is_left_after_ctrl_c_at_any_line_while_hooks_come_and_go():
    """Save the first line of `__exit__`, which no `try` can guard."""
    model, tracer_before = hooked(), sys.gettrace()

    def interrupt_at(count):
        """Enters and leaves with a Ctrl-C at the count-th line; where that was, `None` beyond the last."""
        lines, hit, unguarded = itertools.count(1), [], iter([True])

        def trace(frame, event, _):
            code = frame.f_code
            if not code.co_filename.endswith("hooks/intervention.py"):
                return None
            if event != "line" or (code.co_name == "__exit__" and next(unguarded, False)):
                return trace
            if next(lines) == count:
                hit.append(f"{code.co_name}, line {frame.f_lineno}")
                raise KeyboardInterrupt
            return trace

        intervention = ablate(model, HEADS)
        sys.settrace(trace)
        try:
            with intervention:
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer_before)
        return hit[0] if hit else None

    leaks = []
    for count in itertools.count(1):
        where = interrupt_at(count)
        if where is None:
            break
        if any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values()):
            leaks.append(where)
        for point in model.hook_dict.values():
            point.remove_hooks("both", including_permanent=True)
    assert count > 20
    assert not leaks


def test_nothing_is_left_when_hooks_cannot_all_be_added(model, monkeypatch):
    add, calls = HookPoint.add_hook, itertools.count()

    def fails_late(self, *args, **kwargs):
        if next(calls) == 2:
            raise Sentinel
        add(self, *args, **kwargs)

    with left_as_it_was(model):
        ablation = ablate(model, MLPS)
        monkeypatch.setattr(HookPoint, "add_hook", fails_late)
        with pytest.raises(Sentinel), ablation:
            pytest.fail("entered")
        monkeypatch.undo()


def test_nothing_is_left_of_interventions_that_nest_overlap_or_are_entered_twice(model):
    tokens = prompts()
    with left_as_it_was(model):
        first, second = ablate(model, FIRST), ablate(model, MLPS[1])
        alone, beside = model(tokens), hooks_on(model)
        with first:
            one, with_first = model(tokens), hooks_on(model)
            with second:
                both = model(tokens)
                with first:  # zeroed twice is zeroed
                    assert torch.equal(model(tokens), both)
                assert torch.equal(model(tokens), both)
            assert hooks_on(model) == with_first
            assert torch.equal(model(tokens), one)
        assert hooks_on(model) == beside
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        other = model(tokens)
        second.__exit__(None, None, None)
        with second:
            assert torch.equal(model(tokens), other)
        for result in (one, both, other):
            assert not torch.equal(result, alone)


def test_the_users_own_run_with_hooks_works_inside_and_removes_only_its_own(model, intervene):
    tokens, seen = prompts(), []
    with left_as_it_was(model), intervene(model):
        inside, ours = model(tokens), hooks_on(model)
        doubled = model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_out", lambda x, hook: x * 2)])
        close(doubled, inside * 2, atol=0)
        assert hooks_on(model) == ours
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape))]):
            assert torch.equal(model(tokens), inside)
        assert seen == [(2, 5, model.cfg.d_model)]
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, inside)
        assert "blocks.0.attn.hook_z" in cache
        assert hooks_on(model) == ours
        assert torch.equal(model(tokens), inside)


def test_hooks_that_the_user_adds_inside_stay(model):
    ablation, point = ablate(model, FIRST), model.hook_dict["blocks.1.hook_resid_post"]
    with ablation:
        point.add_hook(lambda x, hook: None)
        point.add_perma_hook(lambda x, hook: None)
        ours = model.hook_dict["blocks.0.attn.hook_z"]
        ours.add_hook(lambda z, hook: None)
    assert len(point.fwd_hooks) == 2
    # The fixture's, and the last.
    assert [handle.is_permanent for handle in ours.fwd_hooks] == [True, False]


def test_the_users_reset_hooks_inside_ends_the_intervention_and_is_reported(model):
    def left():
        return {id(handle): handle for point in model.hook_dict.values() for handle in point.fwd_hooks}

    permanent = {key: handle for key, handle in left().items() if handle.is_permanent}
    with pytest.raises(RuntimeError, match="removed inside the context"), ablate(model, [FIRST, *MLPS]):
        model.reset_hooks()
    assert left() == permanent


def test_a_hook_point_that_the_run_passes_by_is_reported():
    model, name = hooked(), "blocks.1.attn.hook_result"
    model.set_use_attn_result(True)
    ablation = ablate(model, name)
    model.set_use_attn_result(False)
    with left_as_it_was(model), pytest.raises(RuntimeError, match=f"never fired: {name}"), ablation:
        model(prompts())

    # A module replaced without the `setup()` that makes its hook points known.
    model = hooked()
    ablation = ablate(model, FIRST)
    model.blocks[0].attn = hooked(seed=1).blocks[0].attn
    with pytest.raises(RuntimeError, match=r"never fired: blocks\.0\.attn\.hook_z"), ablation:
        model(prompts())


def test_silence_is_no_error_where_the_model_did_not_run_or_failed():
    model = hooked()
    with ablate(model, LAST):
        model(prompts(), stop_at_layer=1)
    ablation = ablate(model, "blocks.1.attn.hook_z")
    ablation.__enter__()
    model.blocks[1].attn = hooked(seed=1).blocks[1].attn
    model(prompts())
    ablation.__exit__(Sentinel, Sentinel(), None)


GATED = {
    "blocks.0.attn.hook_result": "use_attn_result",
    "blocks.1.hook_attn_in": "use_attn_in",
    "blocks.0.hook_q_input": "use_split_qkv_input",
    "blocks.1.hook_k_input": "use_split_qkv_input",
    "blocks.0.hook_v_input": "use_split_qkv_input",
    "blocks.1.hook_mlp_in": "use_hook_mlp_in",
}


@pytest.mark.parametrize("name", GATED)
def test_a_hook_point_behind_a_flag_is_refused_until_the_flag_is_set(name):
    model, flag = hooked(), GATED[name]
    for make in (lambda: ablate(model, name), lambda: patch(model, name, prompts())):
        with pytest.raises(ValueError, match=rf"{name}.*cfg\.{flag}.*set_{flag}\(True\)"):
            make()
    getattr(model, f"set_{flag}")(True)
    logits = model(prompts())
    with ablate(model, name):
        assert not torch.equal(model(prompts()), logits)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("blocks.0.attn.hook_zz", "blocks.0.attn.hook_z"), ("blocks.0.hook_mlpout", "blocks.0.hook_mlp_out")],
)
def test_a_misspelt_hook_point_is_refused_with_those_close_to_it(model, typo, meant):
    for make in (
        lambda: ablate(model, typo),
        lambda: patch(model, typo, prompts()),
        lambda: Intervention(model, [(typo, print)]),
    ):
        with pytest.raises(ValueError, match=f"{typo}.*{type(model).__name__}.*{meant}"):
            make()


@pytest.mark.parametrize(
    "part", ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "blocks.0.hook_resid_mid"]
)
def test_what_a_bridge_would_ignore_is_refused_as_an_edit_but_can_be_looked_at(part):
    bridge, twin = native("LN")
    if OURS and part.endswith("pattern"):
        pytest.skip("honoured from TransformerLens 4 on")
    for make in (lambda: ablate(bridge, part), lambda: patch(bridge, part, prompts())):
        with pytest.raises(ValueError, match=f"TransformerBridge does not honour edits at '{part}'"):
            make()
    seen = []
    with Intervention(bridge, look=[(part, lambda x, hook: seen.append(x))]):
        bridge(prompts())
    if "scores" not in part:  # where TransformerLens 3.9's native bridge shows the pattern
        close(seen[0], twin.run_with_cache(prompts())[1][part])
    ablate(twin, part)


@pytest.mark.skipif(OURS, reason="honoured from TransformerLens 4 on")
def test_the_pattern_of_a_bridges_head_is_refused():
    with pytest.raises(ValueError, match=r"does not honour edits at 'blocks\.1\.attn\.hook_pattern'"):
        ablate(native()[0], HEADS[2], part="pattern")


def shifted(activation, hook):
    """An edit that any model that honours it must feel."""
    if not activation.is_floating_point():
        return (activation + 1) % 7
    noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(0), dtype=activation.dtype)
    return activation + noise


@pytest.mark.parametrize("flag", [None, "use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"])
@pytest.mark.parametrize(
    "build",
    [perturbed, lambda: hooked("LN"), lambda: native()[0], lambda: native("LN")[0]],
    ids=["perturbed", "LayerNorm", "native bridge", "native bridge with LayerNorm"],
)
def test_every_edit_that_is_accepted_changes_the_logits(build, flag, unchecked):
    model, tokens, accepted = build(), prompts(), 0
    if flag is not None:
        try:
            getattr(model, f"set_{flag}")(True)
        except NotImplementedError:
            pytest.skip(f"this bridge has no {flag}")
    logits = model(tokens)
    for name in model.hook_dict:
        try:
            intervention = Intervention(model, edit=[(name, shifted)])
        except ValueError:
            continue
        try:
            with intervention:
                changed = model(tokens)
        except RuntimeError as error:  # told apart at run time
            assert f"never fired: {name}" in str(error)  # noqa: PT017
            continue
        accepted += 1
        assert not torch.allclose(changed, logits, atol=1e-6), name
    assert accepted > 25


@pytest.mark.parametrize("norm", [None, "LN"])
def test_an_edit_does_to_a_bridge_what_it_does_to_a_hooked_transformer(norm, unchecked):
    (bridge, twin), tokens, compared = native(norm), prompts(), 0
    for name in sorted(bridge.hook_dict.keys() & twin.hook_dict.keys()):
        try:
            on_bridge, on_twin = (Intervention(model, edit=[(name, shifted)]) for model in (bridge, twin))
        except ValueError:
            continue
        with on_bridge, on_twin:
            close(bridge(tokens), twin(tokens), atol=1e-9)
        compared += 1
    assert compared > 20


def test_an_edit_of_another_shape_or_kind_is_an_error_and_one_of_another_dtype_is_cast():
    model, name, logits = hooked(), "blocks.0.hook_resid_pre", hooked()(prompts())
    for edited, error, message in (
        (
            lambda x, hook: x[:, :1],
            ValueError,
            r"blocks.0.hook_resid_pre.*shape \(2, 5, 8\), got \(2, 1, 8\)",
        ),
        (lambda x, hook: x[0], ValueError, r"shape \(2, 5, 8\), got \(5, 8\)"),
        (lambda x, hook: x.numpy(force=True), TypeError, "must return a tensor or None, got ndarray"),
    ):
        with (
            left_as_it_was(model),
            pytest.raises(error, match=message),
            Intervention(model, [(name, edited)]),
        ):
            model(prompts())
    with Intervention(model, [(name, lambda x, hook: x.float())]):
        rounded = model(prompts())
    assert rounded.dtype == torch.float64
    close(rounded, logits, atol=1e-4)
    with Intervention(model, [(name, lambda x, hook: None)]):
        assert torch.equal(model(prompts()), logits)


BAD = {
    "layer": (lambda m: ablate(m, hl.Component(2, "mlp")), ValueError, "components: L2MLP is in layer 2; the model"),
    "head": (lambda m: ablate(m, hl.Component(1, "head", 2)), ValueError, "components: L1H2 is head 2; the model"),
    "one of several": (lambda m: ablate(m, [FIRST, hl.Component(9, "mlp")]), ValueError, "components: L9MLP"),
    "none": (lambda m: ablate(m, ()), ValueError, "components must name at least one"),
    "component type": (lambda m: ablate(m, 3), TypeError, "components must be .*3"),
    "component None": (lambda m: patch(m, None, prompts()), TypeError, "components must be .*None"),
    "component tuple": (lambda m: ablate(m, [(0, 1)]), TypeError, r"components must be a Component, .*\(0, 1\)"),
    "how": (lambda m: ablate(m, FIRST, "median"), ValueError, "how must be one of .*, got 'median'"),
    "part": (lambda m: ablate(m, FIRST, part="values"), ValueError, "part must be one of .*got 'values'"),
    "pattern of an MLP": (lambda m: ablate(m, MLPS[0], part="pattern"), ValueError, "part='pattern'.*L0MLP"),
    "pattern of a name": (lambda m: ablate(m, "hook_embed", part="pattern"), ValueError, "part='pattern'.*hook_embed"),
    "via": (lambda m: patch_path(m, FIRST, LAST, "o"), ValueError, "via must be one of .*got 'o'"),
    "sender": (lambda m: patch_path(m, "unembed", LAST, "q"), ValueError, "sender must be .*'pos_embed'.*got 'unem"),
    "sender type": (lambda m: patch_path(m, 0, LAST, "q"), TypeError, "sender must be .* a Component.*got 0"),
    "receiver": (lambda m: patch_path(m, FIRST, "embed", "q"), ValueError, "receiver must be 'unembed'.*got 'emb"),
    "receiver type": (lambda m: patch_path(m, FIRST, None, "q"), TypeError, "receiver must be .*Component.*None"),
    "no reference": (lambda m: ablate(m, FIRST, "mean"), ValueError, "how='mean' needs reference="),
    "no reference to draw": (lambda m: ablate(m, FIRST, "resample"), ValueError, "how='resample' needs reference="),
    "useless reference": (lambda m: ablate(m, FIRST, reference=prompts()), ValueError, "'zero' takes no reference"),
    "seed": (lambda m: ablate(m, FIRST, "resample", prompts(), seed=-1), ValueError, "seed must be at least 0, got -1"),
    "seed type": (lambda m: ablate(m, FIRST, "resample", prompts(), seed="x"), TypeError, "seed must be an int"),
    "positions type": (lambda m: ablate(m, FIRST, positions="last"), TypeError, "an int or several, got 'last'"),
    "positions number": (lambda m: ablate(m, FIRST, positions=1.0), TypeError, "positions must be .*1.0"),
    "positions bool": (lambda m: ablate(m, FIRST, positions=[True]), TypeError, "positions must be ints, got True"),
    "no positions": (lambda m: ablate(m, FIRST, positions=[]), ValueError, "positions must .*at least one"),
    "source text": (lambda m: patch(m, FIRST, "abc"), ValueError, "source is text, but the model has no tokenizer"),
    "source dtype": (lambda m: patch(m, FIRST, torch.rand(2, 5)), TypeError, "source must hold integer token ids"),
    "source vocabulary": (lambda m: patch(m, FIRST, [1, 7]), ValueError, "source holds token id 7"),
    "source length": (lambda m: patch(m, FIRST, [0] * 13), ValueError, "source is 13 tokens long.*n_ctx=12"),
    "source type": (lambda m: patch(m, FIRST, None), TypeError, "source must be a tensor of token ids, got NoneType"),
    "cache": (lambda m: patch(m, FIRST, {}), ValueError, "source is a cache without blocks.0.attn.hook_z"),
    "reference cache": (
        lambda m: ablate(m, [FIRST, MLPS[0]], "mean", {"blocks.0.attn.hook_z": torch.zeros(1, 5, 2, 4)}),
        ValueError,
        "reference is a cache without blocks.0.hook_mlp_out",
    ),
    "component index": (lambda m: hl.Component(-1, "mlp"), ValueError, "layer must be at least 0, got -1"),
    "component kind": (lambda m: hl.Component(0, "neuron"), ValueError, "kind must be one of .* got 'neuron'"),
    "head without index": (lambda m: hl.Component(0, "head"), TypeError, "head must be an int, got None"),
    "MLP with head": (lambda m: hl.Component(0, "mlp", 0), ValueError, "head must be None for an MLP, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_it_was_and_what_it_should_be(case, unchecked):
    make, error, message = BAD[case]
    model = hooked()
    with left_as_it_was(model), pytest.raises(error, match=message):
        make(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: patch(m, FIRST, prompts(2, 4)), r"hook_z.*\(2, 4, 4\).*\(2, 5, 4\).*equally long"),
        (lambda m: patch(m, FIRST, prompts(3, 5)), r"hook_z.*\(3, 5, 4\).*\(2, 5, 4\).*one batch size"),
        (lambda m: ablate(m, FIRST, "mean", prompts(3, 6)), "equally long"),
        (lambda m: ablate(m, FIRST, "resample", prompts(3, 6)), "equally long"),
        (lambda m: patch_path(m, FIRST, LAST, "q", prompts(2, 4)), "equally long"),
        (lambda m: patch(m, MLPS[0], prompts(2, 4)), "equally long"),
        (lambda m: ablate(m, FIRST, positions=[0, 5]), "positions holds 5; the run has 5 tokens"),
        (lambda m: ablate(m, FIRST, positions=-6), "positions holds -6; the run has 5 tokens"),
        (lambda m: ablate(m, FIRST, positions=10**5000), "positions holds <int>; the run has 5 tokens"),
        (lambda m: patch_path(m, FIRST, LAST, "q", positions=7), "positions holds 7"),
    ],
)
def test_what_does_not_fit_the_run_is_an_error_of_the_run(make, message, unchecked):
    model = hooked("LN")
    with left_as_it_was(model), pytest.raises(ValueError, match=message), make(model):
        model(prompts())


def test_a_bridges_layer_norm_is_followed_as_its_twins_is(unchecked):
    bridge, twin = native("LN")
    tokens = prompts()
    for receiver, via in ((LAST, "q"), (LAST, "v"), (MLPS[1], "mlp_in"), ("unembed", "unembed")):
        with patch_path(bridge, FIRST, receiver, via):
            found = bridge(tokens)
        with patch_path(twin, FIRST, receiver, via):
            torch.testing.assert_close(found, twin(tokens), atol=1e-10, rtol=0)
        assert (found - bridge(tokens)).abs().max() > 1e-3
    attribution = hl.attribute(bridge, tokens, circuit=CIRCUIT)
    assert attribution.completeness_error < 1e-10
    torch.testing.assert_close(
        attribution.values, hl.attribute(twin, tokens, circuit=CIRCUIT).values, atol=1e-10, rtol=0
    )


def test_circuits_of_several_components_per_role_are_ablated_by_role():
    model, tokens = hooked(), prompts()
    circuit = hl.Circuit(previous_token=(HEADS[0], HEADS[1]), induction=CIRCUIT.induction)
    with hooks.ablate(model, circuit.previous_token):
        role = model(tokens)
    with hooks.ablate(model, HEADS[0]), hooks.ablate(model, HEADS[1]):
        assert torch.equal(model(tokens), role)
