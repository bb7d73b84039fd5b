"""Interventions on models of several families, HookedTransformers and bridges alike, against plain torch.

What is accepted must do exactly what it says; what the model would not honour must be refused, and nothing else.
"""

import functools
import warnings
from itertools import pairwise

import pytest
import torch
from bridges_for_tests import BOOTED, N_HEADS, WORDS, hooked_twin
from models_for_tests import close, native, prompts
from plain_families import plain_of_hooked

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks import Intervention, ablate, patch, patch_path


@functools.cache
def family(name):
    """A model, the same network in plain torch, and how far apart they may be."""
    if name == "native bridge":
        bridge, twin = native("LN")
        return bridge, plain_of_hooked(twin), 1e-10
    bridge = BOOTED[name.split()[0]]()
    if "bridge" in name:
        return bridge, bridge.plain, 1e-10 if name != "Llama bridge" else 1e-5  # it rounds to float32 halfway
    twin = hooked_twin(bridge)
    return twin, plain_of_hooked(twin), 1e-10


HOOKED = [f"{name} hooked" for name in BOOTED]
BRIDGES = [f"{name} bridge" for name in BOOTED]
FAMILIES = [*HOOKED, *BRIDGES, "native bridge"]
TOKENS, SOURCE = prompts(3, 6), prompts(3, 6, seed=1)


def components(model):
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    return [hl.Component(layer, "head", head) for layer in layers for head in heads] + [
        hl.Component(layer, "mlp") for layer in layers
    ]


def activations(plain, tokens):
    """Every activation of a run of the plain network."""
    seen = {}

    def keep(name, value):
        seen[name] = value
        return value

    plain.run(tokens, keep)
    return seen


def truth(plain, name, change, head=None, positions=None, axis=1):
    """Logits where `change(slice)` takes the place of one activation, or of a head's slice of it."""

    def at(here, value):
        if here != name:
            return value
        edited = value.clone()
        part = edited if head is None else edited.select(2 if name.endswith("hook_z") else 1, head)
        new = change(part.clone()).expand_as(part)
        where = range(part.shape[axis]) if positions is None else positions
        for p in where:
            part.select(axis, p).copy_(new.select(axis, p))
        return edited

    return plain.run(TOKENS, at)


def point_of(component):
    return f"blocks.{component.layer}." + ("attn.hook_z" if component.kind == "head" else "hook_mlp_out")


def hooks_on(model):
    return {name: list(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks}


@pytest.fixture(params=FAMILIES)
def models(request, unchecked):
    """A family; and afterwards its model is as it was, to the bit."""
    model, plain, atol = family(request.param)
    logits = model(TOKENS)
    yield model, plain, atol
    assert not hooks_on(model)
    assert torch.equal(model(TOKENS), logits)


def test_the_plain_network_is_the_model(models):
    model, plain, atol = models
    close(model(TOKENS).detach(), plain.run(TOKENS), atol=min(atol, 1e-6))
    cache, seen = model.run_with_cache(TOKENS)[1].cache_dict, activations(plain, TOKENS)
    for name in set(seen) & set(cache):
        if not name.endswith("hook_attn_scores"):  # masked by other numbers
            close(cache[name].detach(), seen[name].expand_as(cache[name]), atol=1e-6)
    assert len(set(seen) & set(cache)) > 15


@pytest.mark.parametrize("positions", [None, 2, [0, -2]], ids=str)
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_every_component_is_ablated_exactly(models, how, positions):
    model, plain, atol = models
    where = [positions] if isinstance(positions, int) else positions
    seen, given, effects = activations(plain, SOURCE), {} if how == "zero" else {"reference": SOURCE}, []
    untouched = plain.run(TOKENS)
    for component in components(model):
        point, head = point_of(component), component.head
        mean = (seen[point] if head is None else seen[point][:, :, head]).mean(0, keepdim=True)
        expected = truth(plain, point, lambda x, mean=mean: 0 * x if how == "zero" else mean, head, where)
        with ablate(model, component, how, positions=positions, **given):
            close(model(TOKENS).detach(), expected, atol=atol)
        effects.append(float((expected - untouched).abs().max()))
    assert min(effects) > 1e-3


@pytest.mark.parametrize("positions", [None, [1, -1]], ids=str)
def test_every_component_is_patched_exactly(models, positions):
    model, plain, atol = models
    seen, cache = activations(plain, SOURCE), model.run_with_cache(SOURCE)[1]
    for component in components(model):
        point, head = point_of(component), component.head
        new = seen[point] if head is None else seen[point][:, :, head]
        expected = truth(plain, point, lambda x, new=new: new, head, positions)
        for source in (SOURCE, cache):
            with patch(model, component, source, positions=positions):
                close(model(TOKENS).detach(), expected, atol=atol)


def test_resampling_gives_each_prompt_what_one_reference_has(models):
    model, plain, atol = models
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    seen, candidates = activations(plain, SOURCE), []
    for drawn in range(3):

        def at(name, value, drawn=drawn):
            if name == names[0]:
                value = value.clone()
                value[:, :, 1] = seen[name][drawn, :, 1]
            return seen[name][drawn].expand_as(value) if name == names[1] else value

        candidates.append(plain.run(TOKENS, at))
    drawn = []
    for seed in range(4):
        with ablate(model, [hl.Component(0, "head", 1), names[1]], "resample", SOURCE, seed=seed):
            logits = model(TOKENS)
        for n, row in enumerate(logits):
            (match,) = [i for i, one in enumerate(candidates) if torch.allclose(row, one[n], rtol=0, atol=10 * atol)]
            drawn.append(match)
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("positions", [None, [1, -1]], ids=str)
def test_any_hook_point_is_patched_exactly_or_refused_with_the_reason(name, positions, unchecked):
    model, plain, atol = family(name)
    seen, accepted = activations(plain, SOURCE), []
    for point in seen:
        axis = 2 if point.endswith(("hook_pattern", "hook_attn_scores")) else 1
        if point not in model.hook_dict:
            with pytest.raises(ValueError, match=f"'{point}' is not a hook point of this {type(model).__name__}"):
                patch(model, point, SOURCE)
            continue
        try:
            intervention = patch(model, point, SOURCE, positions=positions)
        except (ValueError, RuntimeError) as error:
            assert point in str(error)  # noqa: PT017
            assert any(reason in str(error) for reason in ("does not honour", "never fire"))  # noqa: PT017
            continue
        with intervention:
            actual = model(TOKENS).detach()
        expected = truth(plain, point, lambda x, new=seen[point]: new, None, positions, axis)
        if point.endswith("hook_attn_scores"):
            atol = max(atol, 1e-9)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text, at=point: f"{at}: {text}")
        accepted.append(point)
    # What the paper's questions are about must work wherever it can.
    leaves = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"]
    leaves += ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    assert set(accepted) >= {f"blocks.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves}


def honoured(model, plain, point, atol):
    """Whether the model does with an edit, added by TransformerLens alone, what the plain network does."""
    noise = torch.randn(activations(plain, TOKENS)[point].shape, generator=torch.Generator().manual_seed(0)).double()
    actual = model.run_with_hooks(TOKENS, fwd_hooks=[(point, lambda x, hook: x + noise)]).detach()
    expected = plain.run(TOKENS, lambda name, value: value + noise if name == point else value)
    return torch.allclose(actual, expected, rtol=0, atol=max(atol, 1e-9))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_refused_that_the_model_honours(name, unchecked):
    """Booted bridges rebuild attention around `hook_pattern` and `hook_attn_scores`, and honour edits there."""
    model, plain, atol = family(name)
    needless = []
    for point in activations(plain, TOKENS):
        if point not in model.hook_dict:
            continue
        try:
            Intervention(model, edit=[(point, lambda x, hook: x)])
        except ValueError:
            if honoured(model, plain, point, atol):
                needless.append(point)
    assert not needless


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("positions", [None, [0, -2]], ids=str)
def test_a_heads_pattern_is_edited_exactly_or_refused_with_the_reason(name, positions, unchecked):
    model, plain, atol = family(name)
    for layer in (0, 1):
        point, head = f"blocks.{layer}.attn.hook_pattern", hl.Component(layer, "head", 1)
        new = activations(plain, SOURCE)[point]
        cases = {
            lambda x: 0 * x: lambda: ablate(model, head, part="pattern", positions=positions),  # noqa: B023
            lambda x: new[:, 1]: lambda: patch(model, head, SOURCE, positions, part="pattern"),  # noqa: B023
            lambda x: new[:, 1].mean(0, keepdim=True): lambda: ablate(  # noqa: B023
                model,
                head,  # noqa: B023
                "mean",
                SOURCE,
                positions,
                part="pattern",
            ),
        }
        for change, make in cases.items():
            try:
                intervention = make()
            except ValueError as error:
                assert f"does not honour edits at '{point}'" in str(error)  # noqa: PT017
                assert name == "native bridge"
                continue
            with intervention:
                close(model(TOKENS).detach(), truth(plain, point, change, 1, positions), atol=atol)


def shifted(activation, hook):
    """An edit that any model that honours it must feel."""
    if not activation.is_floating_point():
        return (activation + 1) % 7
    noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(0), dtype=activation.dtype)
    return activation + noise


FLAGS = [None, "use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", BOOTED)
def test_every_edit_that_is_accepted_changes_the_logits(name, flag, unchecked):
    model = BOOTED[name].__wrapped__()  # one of its own, for the flag
    if flag is not None:
        getattr(model, f"set_{flag}")(True)
    logits, ignored, accepted = model(TOKENS), [], 0
    for point in model.hook_dict:
        if point.startswith("blocks.0"):  # as layer 1 is
            continue
        try:
            with warnings.catch_warnings(), Intervention(model, edit=[(point, shifted)]):
                warnings.filterwarnings("ignore", "A forward hook edited hook_scale/hook_normalized")
                changed = model(TOKENS)
        except ValueError:
            continue
        except RuntimeError as error:  # told apart at run time
            assert f"never fired: {point}" in str(error)  # noqa: PT017
            continue
        accepted += 1
        if torch.allclose(changed, logits, atol=1e-6):
            ignored.append(point)
    assert accepted > 30
    assert not ignored


# Which residual stream an input by head belongs to; the shape says how many heads it is for.
BY_HEAD = {"hook_q_input": "q", "hook_k_input": "k", "hook_v_input": "v", "hook_attn_in": "qkv"}


@pytest.mark.parametrize("leaf", BY_HEAD)
@pytest.mark.parametrize("name", BOOTED)
def test_an_input_by_head_reaches_its_head_or_is_refused(name, leaf, unchecked):
    """A grouped-query bridge lets only the first copies of `hook_attn_in` reach the keys and values."""
    model, plain = BOOTED[name].__wrapped__(), BOOTED[name]().plain
    getattr(model, "set_use_attn_in" if leaf == "hook_attn_in" else "set_use_split_qkv_input")(True)
    point = f"blocks.1.{leaf}"
    shape = (*TOKENS.shape, N_HEADS if leaf in ("hook_q_input", "hook_attn_in") else len(plain.layers[0]["attn.W_K"]))
    noise = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def receives(receiver, via, stream):
        if receiver is None or receiver[0] != 1 or via not in BY_HEAD[leaf]:
            return stream
        return stream + noise[:, :, receiver[1] * shape[2] // N_HEADS]

    try:
        intervention = Intervention(model, edit=[(point, lambda x, hook: x + noise)])
    except ValueError as error:
        assert f"does not honour edits at '{point}'" in str(error)  # noqa: PT017
        assert (name, leaf) == ("Llama", "hook_attn_in")
        return
    with intervention:
        close(model(TOKENS).detach(), plain.run(TOKENS, receives=receives), atol=1e-5 if name == "Llama" else 1e-10)


def test_rotary_positions_are_no_embedding_to_ablate_or_patch():
    for name in (*BRIDGES, *HOOKED):
        model, _, _ = family(name)
        if name.startswith("GPT-2"):
            continue
        for make in (
            lambda model=model: ablate(model, "hook_pos_embed"),
            lambda model=model: patch(model, "hook_pos_embed", SOURCE),
            lambda model=model: patch_path(model, "pos_embed", "unembed", "unembed"),
        ):
            with pytest.raises(ValueError, match="pos_embed"):
                make()


def edges(model, plain):
    """Every message that one component can send another."""
    heads, mlps = components(model)[: -model.cfg.n_layers], components(model)[-model.cfg.n_layers :]
    for sender in ["embed", *(["pos_embed"] if "pos_embed.W_pos" in plain.ends else []), heads[0], heads[-2], *mlps]:
        for receiver, via in [(head, via) for head in (heads[1], heads[-1]) for via in "qkv"] + [
            (mlp, "mlp_in") for mlp in mlps
        ]:
            # Embeddings come before everything, and a layer's heads before its MLP unless they are side by side.
            sent, read = (
                getattr(end, "layer", -1) + 0.5 * (getattr(end, "kind", "") == "mlp") for end in (sender, receiver)
            )
            if sent < (int(read) if plain.parallel else read):
                yield sender, receiver, via
        yield sender, "unembed", "unembed"


def message(plain, seen, sender):
    if isinstance(sender, str):
        return seen[f"hook_{sender}"]
    value = seen[point_of(sender)]
    return (
        value if sender.head is None else value[:, :, sender.head] @ plain.layers[sender.layer]["attn.W_O"][sender.head]
    )


@pytest.mark.parametrize(("cut", "positions"), [(False, None), (True, [1, -1])], ids=["patched", "cut in two places"])
def test_every_edge_is_patched_exactly_or_refused_with_the_reason(models, cut, positions):
    model, plain, atol = models
    sent, cache = activations(plain, SOURCE), model.run_with_cache(SOURCE)[1]
    where = torch.zeros(TOKENS.shape[1], 1, dtype=torch.bool)
    where[slice(None) if positions is None else positions] = True
    grouped, exact, effects = len(plain.layers[0]["attn.W_K"]) < plain.n_heads, 0, []
    untouched = plain.run(TOKENS)
    for sender, receiver, via in edges(model, plain):
        try:
            path = patch_path(model, sender, receiver, via, None if cut else cache, positions)
        except (ValueError, TypeError) as error:
            reason = str(error)
            assert grouped, (sender, receiver, via, reason)  # the others have every input to themselves
            assert any(why in reason for why in ("grouped-query", "gated", "LlamaRMSNorm")), reason
            continue
        now = {}

        def at(name, value, now=now):
            now[name] = value
            return value

        def receives(who, into, stream, now=now, edge=(sender, receiver, via)):
            reader = None if isinstance(edge[1], str) else (edge[1].layer, edge[1].head)
            if (who, into) != (reader, edge[2]):
                return stream
            current = message(plain, now, edge[0])
            wanted = torch.zeros_like(current) if cut else message(plain, sent, edge[0])
            return stream + where * (wanted - current)

        expected = plain.run(TOKENS, at, receives)
        with path:
            actual = model(TOKENS).detach()
        told = (sender, receiver, via)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text, told=told: f"{told}: {text}")
        exact += 1
        if sender != "pos_embed":
            effects.append(float((expected - untouched).abs().max()))
    assert exact >= (5 if grouped else 15)
    assert min(effects) > 1e-5


def test_patches_add_up_to_the_source_run(models):
    """Senders' messages into the unembedding, patched one after the other, end at the source's logits."""
    model, plain, atol = models
    cache = model.run_with_cache(SOURCE)[1]
    senders = [*(["pos_embed"] if "pos_embed.W_pos" in plain.ends else []), "embed", *components(model)]
    steps = []
    for count in (0, 2, 4, len(senders)):
        paths = [patch_path(model, sender, "unembed", "unembed", cache) for sender in senders[:count]]
        for path in paths:
            path.__enter__()
        steps.append(model(TOKENS).detach())
        for path in reversed(paths):
            path.__exit__(None, None, None)
    close(steps[-1], model(SOURCE).detach(), atol=10 * atol)
    assert all(not torch.allclose(*pair, atol=1e-4) for pair in pairwise(steps))


@pytest.mark.parametrize("name", [*BRIDGES, "native bridge"])
def test_a_bridges_own_names_and_transformer_lens_names_are_one_point(name, unchecked):
    model, _, _ = family(name)
    aliases = {
        "blocks.1.hook_resid_pre": "blocks.1.hook_in",
        "blocks.0.hook_resid_post": "blocks.0.hook_out",
        "blocks.0.attn.hook_z": "blocks.0.attn.o.hook_in",
        "blocks.1.attn.hook_q": "blocks.1.attn.q.hook_out",
        "blocks.0.hook_attn_out": "blocks.0.attn.hook_out",
        "blocks.1.hook_mlp_out": "blocks.1.mlp.hook_out",
        "hook_embed": "embed.hook_out",
    }
    for ours, theirs in aliases.items():
        with patch(model, ours, SOURCE, positions=[0, 3]):
            expected = model(TOKENS)
        with patch(model, theirs, SOURCE, positions=[0, 3]):
            assert torch.equal(model(TOKENS), expected)
        assert not torch.equal(model(TOKENS), expected)
        # Both at once: entered last, acts last.
        with ablate(model, ours), patch(model, theirs, SOURCE, positions=[0, 3]):
            after = model(TOKENS)
        with ablate(model, theirs), patch(model, ours, SOURCE, positions=[0, 3]):
            assert torch.equal(model(TOKENS), after)


@pytest.mark.parametrize("name", BRIDGES)
def test_text_is_a_source_by_the_models_own_tokenizer(name, unchecked):
    model, plain, atol = family(name)
    text = "one two three a nine"
    ids = [WORDS.index(word) for word in text.split()]
    tokens = model.to_tokens([text])
    assert tokens[0].tolist() in (ids, [0, *ids])
    run = tokens.roll(1, 1).expand(2, -1)
    new = activations(plain, tokens)["blocks.0.hook_mlp_out"]
    at = "blocks.0.hook_mlp_out"
    expected = plain.run(run, lambda name, value: new.expand_as(value) if name == at else value)
    for source in (text, [text], tokens, tokens[0].tolist()):
        with patch(model, hl.Component(0, "mlp"), source):
            close(model(run).detach(), expected, atol=atol)


def test_components_that_a_family_lacks_are_refused_by_name(models):
    model, _, _ = models
    for component, message_ in (
        (hl.Component(2, "mlp"), "L2MLP is in layer 2; the model has 2"),
        (hl.Component(0, "head", model.cfg.n_heads), f"head {model.cfg.n_heads}; the model has {model.cfg.n_heads}"),
    ):
        for make in (
            lambda part: ablate(model, part),
            lambda part: patch(model, part, SOURCE),
            lambda part: patch_path(model, part, "unembed", "unembed"),
        ):
            with pytest.raises(ValueError, match=message_):
                make(component)


def test_hooks_of_one_model_leave_its_twin_alone():
    for name in BOOTED:
        bridge, twin = family(f"{name} bridge")[0], family(f"{name} hooked")[0]
        alone = twin(TOKENS)
        with hooks.ablate(bridge, hl.Component(0, "mlp")):
            assert torch.equal(twin(TOKENS), alone)
