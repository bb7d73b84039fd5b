"""Path patching against the network in plain torch, where each message between components is explicit."""

import contextlib

import plain_network
import pytest
import torch
from models_for_tests import HEADS, MLPS, close, hooked, native, perturbed, prompts

import hijack_lens as hl
from hijack_lens import hooks

# A model to patch, and one with the same weights for the truth.
MODELS = {
    "perturbed": lambda: (perturbed(),) * 2,
    "absolute": lambda: (perturbed(positions="absolute"),) * 2,
    "no norm": lambda: (hooked(None, "relu"),) * 2,
    "LayerNorm": lambda: (hooked("LN"),) * 2,
    "RMSNorm": lambda: (hooked("RMS", "silu"),) * 2,
    "LNPre": lambda: (hooked("LNPre", "relu"),) * 2,
    "native bridge": lambda: native(),
}


@pytest.fixture(params=MODELS)
def models(request, unchecked):  # some 60 edges each: the type checker would take most of the time
    return MODELS[request.param]()


def order(component):
    return (component.layer, component.kind == "mlp")


def edges(model):
    """Every message that one component can send another."""
    heads = [head for head in HEADS if head.head < model.cfg.n_heads]
    embeddings = ["embed", *(["pos_embed"] if "hook_pos_embed" in model.hook_dict else [])]
    receivers = [(head, via) for head in heads for via in "qkv"] + [(mlp, "mlp_in") for mlp in MLPS]
    for sender in (*embeddings, *heads, *MLPS):
        for receiver, via in receivers:
            if isinstance(sender, str) or order(sender) < order(receiver):
                yield sender, receiver, via
        yield sender, "unembed", "unembed"


def truth(model, tokens, changes, positions=None):
    """Logits where the messages `changes`, {(sender, receiver, via): message}, arrive in place of the run's own."""
    where = torch.zeros(tokens.shape[1], 1, dtype=torch.bool)
    where[list(range(len(where))) if positions is None else positions] = True

    def edge(sender, receiver, via, message):
        return torch.where(where, changes.get((sender, receiver, via), message), message)

    return plain_network.run(model, tokens, edge).logits


def test_the_plain_network_is_the_model(models):
    model, twin = models
    close(plain_network.run(twin, prompts()).logits, model(prompts()).detach(), atol=1e-12)


@pytest.mark.parametrize(
    ("cut", "positions"), [(False, None), (True, [1, -1])], ids=["patched", "cut at two positions"]
)
def test_every_edge_changes_what_one_input_receives_and_nothing_else(models, cut, positions):
    (model, twin), tokens, source = models, prompts(), prompts(seed=1)
    sent = plain_network.run(twin, source).sent
    untouched, (_, cache), effects = model(tokens), model.run_with_cache(source), []
    for sender, receiver, via in edges(model):
        message = torch.zeros_like(sent[sender]) if cut else sent[sender]
        expected = truth(twin, tokens, {(sender, receiver, via): message}, positions)
        with hooks.patch_path(model, sender, receiver, via, None if cut else cache, positions):
            actual = model(tokens).detach()
        torch.testing.assert_close(
            actual,
            expected,
            rtol=0,
            atol=1e-10,
            msg=lambda text, edge=(sender, receiver, via): f"{edge}: {text}",
        )
        if not (sender == "pos_embed" and not cut):  # which does not depend on the prompt
            effects.append(float((actual - untouched.detach()).abs().max()))
    # Edges that changed nothing would be no test.
    assert min(effects) > 1e-6
    assert max(effects) > 0.1


def test_patching_an_edge_from_the_same_prompt_is_the_identity_to_the_bit(models):
    model, tokens = models[0], prompts(3)
    logits, cache = model.run_with_cache(tokens)
    for sender, receiver, via in edges(model):
        with hooks.patch_path(model, sender, receiver, via, cache):
            assert torch.equal(model(tokens), logits), (sender, receiver, via)


def test_cutting_all_edges_of_a_sender_ablates_it(models):
    model, tokens, every = models[0], prompts(3), list(edges(models[0]))
    for sender in dict.fromkeys(sender for sender, _, _ in every):
        with contextlib.ExitStack() as stack:
            for _, receiver, via in (edge for edge in every if edge[0] == sender):
                stack.enter_context(hooks.patch_path(model, sender, receiver, via))
            cut = model(tokens)
        with hooks.ablate(model, f"hook_{sender}" if isinstance(sender, str) else sender):
            close(cut, model(tokens))


def test_edges_from_two_senders_into_one_input_are_patched_together(models):
    (model, twin), tokens, source = models, prompts(), prompts(seed=1)
    sent = plain_network.run(twin, source).sent
    last = hl.Component(1, "head", 0)
    for receiver, via in ((last, "q"), (last, "k"), (last, "v"), (MLPS[1], "mlp_in"), ("unembed", "unembed")):
        changes = {(sender, receiver, via): sent[sender] for sender in (HEADS[0], MLPS[0])}
        with (
            hooks.patch_path(model, HEADS[0], receiver, via, source),
            hooks.patch_path(model, MLPS[0], receiver, via, source),
        ):
            close(model(tokens).detach(), truth(twin, tokens, changes))


def test_its_fwd_hooks_do_the_same_as_the_context(models):
    model, tokens = models[0], prompts(3)
    path = hooks.patch_path(model, HEADS[0], hl.Component(1, "head", 0), "k", prompts(3, seed=1))
    with path:
        inside = model(tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=path.fwd_hooks), inside)
    assert not torch.equal(model(tokens), inside)


def test_entered_twice_it_patches_as_it_does_once(models):
    model, tokens = models[0], prompts(3)
    for receiver, via in ((hl.Component(1, "head", 0), "v"), ("unembed", "unembed")):
        path = hooks.patch_path(model, HEADS[0], receiver, via, prompts(3, seed=1))
        with path:
            once = model(tokens)
            with path:
                close(model(tokens), once, atol=1e-12)
            assert torch.equal(model(tokens), once)


def test_a_role_of_one_component_is_that_component(models):
    model, tokens = models[0], prompts(3)
    with hooks.patch_path(model, HEADS[0], MLPS[1], "mlp_in"):
        expected = model(tokens)
    with hooks.patch_path(model, (HEADS[0],), (MLPS[1],), "mlp_in"):
        assert torch.equal(model(tokens), expected)
    for pair in ((), (HEADS[0], HEADS[1])):
        with pytest.raises(ValueError, match=f"sender must be one component, got {len(pair)}"):
            hooks.patch_path(model, pair, MLPS[1], "mlp_in")


def test_one_prompt_is_a_source_for_a_batch(models):
    model, tokens, source = models[0], prompts(3), prompts(1, seed=1)
    with hooks.patch_path(model, MLPS[0], "unembed", "unembed", source.expand(3, -1)):
        expected = model(tokens)
    with hooks.patch_path(model, MLPS[0], "unembed", "unembed", source):
        close(model(tokens), expected, atol=1e-12)


def test_k_composition_with_the_previous_token_head_is_what_lets_induction_find_its_target():
    """Cut, and only it, the hand-written model's induction head attends uniformly."""
    model, tokens = perturbed(scale=0.0), prompts(3, 9)
    untouched = model(tokens)
    previous, induction = model.circuit.previous_token[0], model.circuit.induction[0]
    with hooks.ablate(model, previous):
        _, blind = model.run_with_cache(tokens)
    with hooks.patch_path(model, previous, induction, "k"):
        _, cache = model.run_with_cache(tokens)
    close(cache["pattern", 1], blind["pattern", 1])
    uniform = torch.ones(9, 9).double().tril()
    close(cache["pattern", 1][:, 0].detach(), (uniform / uniform.sum(-1, keepdim=True)).expand(3, -1, -1))
    for via in "qv":
        with hooks.patch_path(model, previous, induction, via):
            close(model(tokens), untouched)


@pytest.mark.parametrize(
    ("sender", "receiver", "via", "error", "message"),
    [
        (HEADS[2], HEADS[0], "q", ValueError, "sender L1H0 must come before receiver L0H0"),
        (HEADS[0], HEADS[1], "v", ValueError, "sender L0H0 must come before receiver L0H1"),
        (MLPS[0], HEADS[0], "k", ValueError, "sender L0MLP must come before receiver L0H0"),
        (MLPS[0], MLPS[0], "mlp_in", ValueError, "sender L0MLP must come before"),
        (HEADS[0], MLPS[0], "q", ValueError, "via must be one of .*mlp_in.* for receiver L0MLP, got 'q'"),
        (HEADS[0], HEADS[2], "mlp_in", ValueError, "via must be one of .*'q', 'k', 'v'.* for receiver L1H0"),
        (HEADS[0], "unembed", "v", ValueError, "via must be one of .*unembed.* got 'v'"),
        (HEADS[0], HEADS[2], "unembed", ValueError, "via must be one of"),
        ("embed", hl.Component(2, "head", 0), "q", ValueError, "layer 2; the model has 2"),
        ("embed", hl.Component(1, "head", 5), "q", ValueError, "head 5; the model has 2"),
        (hl.Component(3, "mlp"), "unembed", "unembed", ValueError, "layer 3; the model has 2"),
        (hl.Component(0, "head", 2), "unembed", "unembed", ValueError, "head 2; the model has 2"),
    ],
    ids=str,
)
def test_an_edge_that_the_model_does_not_have_is_refused(sender, receiver, via, error, message):
    with pytest.raises(error, match=message):
        hooks.patch_path(hooked(), sender, receiver, via)


def test_a_model_without_positional_embeddings_sends_none():
    rotary = hooked(positional_embedding_type="rotary", rotary_dim=4)
    with pytest.raises(ValueError, match="hook_pos_embed"):
        hooks.patch_path(rotary, "pos_embed", "unembed", "unembed")


def test_inputs_that_no_edge_reaches_alone_are_refused():
    shared = hooked(n_key_value_heads=1)
    assert isinstance(hooks.patch_path(shared, "embed", HEADS[2], "q"), hooks.Intervention)
    with pytest.raises(ValueError, match="grouped-query"):
        hooks.patch_path(shared, "embed", HEADS[2], "k")
    with pytest.raises(ValueError, match="gated"):
        hooks.patch_path(hooked(gated_mlp=True), "embed", MLPS[0], "mlp_in")
    with pytest.raises(ValueError, match="must come before"):
        hooks.patch_path(hooked(parallel_attn_mlp=True), HEADS[0], MLPS[0], "mlp_in")
