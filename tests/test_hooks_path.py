"""Path patching against the network in plain torch, where each message between components is explicit."""

import contextlib
import tempfile

import plain_network
import pytest
import torch
import transformers
from bridges_for_tests import D_MODEL, D_VOCAB, N_HEADS, gpt2_like, llama_like, neox_like, scattered, word_tokenizer
from models_for_tests import HEADS, MLPS, OURS, close, hooked, native, perturbed, prompts
from plain_families import plain_of_hooked
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.models.linear_maps import linear_norm

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


def edges(model):
    """Every message that one component can send another."""
    cfg, parallel = model.cfg, getattr(model.cfg, "parallel_attn_mlp", False)
    heads = [hl.Component(layer, "head", head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    mlps = [hl.Component(layer, "mlp") for layer in range(cfg.n_layers)]
    learned = "hook_pos_embed" in model.hook_dict and cfg.positional_embedding_type != "rotary"
    receivers = [(head, via) for head in heads for via in "qkv"] + [(mlp, "mlp_in") for mlp in mlps]

    def order(component):
        return (component.layer, component.kind == "mlp" and not parallel)

    for sender in ("embed", *(["pos_embed"] if learned else []), *heads, *mlps):
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


def with_plain(model):
    """A HookedTransformer, and the plain network of its family."""
    with torch.no_grad():
        if model.cfg.gated_mlp:  # TransformerLens adds it after the product; other libraries have none
            for block in model.blocks:
                block.mlp.b_in.zero_()
    plain = plain_of_hooked(model)
    for layer in plain.layers:  # every head's own keys and values, however few are stored
        for name in ("W_K", "W_V", "b_K", "b_V"):
            kept = layer[f"attn.{name}"]
            layer[f"attn.{name}"] = kept.repeat_interleave(plain.n_heads // len(kept), 0)
    return model, plain


FAMILIES = {
    "GPT-2 bridge": lambda: (gpt2_like(), gpt2_like().plain),
    "GPT-NeoX bridge": lambda: (neox_like(), neox_like().plain),
    "Llama bridge": lambda: (llama_like(), llama_like().plain),
    "gated": lambda: with_plain(hooked("RMS", "silu", gated_mlp=True)),
    "parallel": lambda: with_plain(hooked("LN", parallel_attn_mlp=True)),
    "parallel and gated": lambda: with_plain(hooked("LN", parallel_attn_mlp=True, gated_mlp=True)),
    "ungrouped": lambda: with_plain(
        hooked(
            "RMS",
            n_key_value_heads=1,
            ungroup_grouped_query_attention=True,
            positional_embedding_type="rotary",
            rotary_dim=4,
        )
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, unchecked):
    return FAMILIES[request.param]()


def message(plain, run, sender):
    if isinstance(sender, str):
        return run[f"hook_{sender}"]
    block = f"blocks.{sender.layer}"
    if sender.kind == "mlp":
        return run[f"{block}.hook_mlp_out"]
    return run[f"{block}.attn.hook_z"][:, :, sender.head] @ plain.layers[sender.layer]["attn.W_O"][sender.head]


def family_truth(plain, tokens, edge, source):
    """Logits where one edge's message is what `source`, a run's activations, would send."""
    sender, receiver, via = edge
    target = None if receiver == "unembed" else (receiver.layer, receiver.head)
    run = {}

    def keep(name, value):
        return run.setdefault(name, value)

    def receives(reader, reads, stream):
        if (reader, reads) != (target, via):
            return stream
        return stream + message(plain, source, sender) - message(plain, run, sender)

    return plain.run(tokens, keep, receives)


def test_every_edge_of_other_architectures_is_patched_alone(family):
    model, plain = family
    tokens, other, source = prompts(d_vocab=7), prompts(seed=1, d_vocab=7), {}
    plain.run(other, source.setdefault)
    untouched, (_, cache), effects = model(tokens), model.run_with_cache(other), []
    for sender, receiver, via in edges(model):
        if model.cfg.n_key_value_heads and isinstance(model, TransformerBridge) and via in ("k", "v"):
            continue
        expected = family_truth(plain, tokens, (sender, receiver, via), source)
        with hooks.patch_path(model, sender, receiver, via, cache):
            actual = model(tokens).detach()
        close(actual, expected)
        if sender != "pos_embed":  # which does not depend on the prompt
            effects.append(float((actual - untouched.detach()).abs().max()))
    assert min(effects) > 1e-6
    assert max(effects) > 0.1


def booted(model):
    with tempfile.TemporaryDirectory() as folder:
        scattered(model).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float64).eval()


def tiny(family, **options):
    """A bridge around one of Hugging Face's models, two layers deep."""
    sizes = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    if family == "GPTJ":
        sizes |= {"n_embd": D_MODEL, "n_layer": 2, "n_head": N_HEADS, "n_positions": 24, "rotary_dim": 4}
    else:
        sizes |= {"hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": N_HEADS}
        sizes |= {"intermediate_size": 20, "max_position_embeddings": 24}
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    return booted(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.mark.parametrize("name", ["GPTJ", "Qwen2"])
def test_cutting_all_edges_of_a_sender_of_a_bridge_ablates_it(name, unchecked):
    """GPT-J's attention and MLP read one norm side by side; Qwen 2 has biases where Llama has none."""
    model = tiny(name, **({} if name == "GPTJ" else {"num_key_value_heads": N_HEADS}))
    tokens, every = prompts(3), list(edges(model))
    untouched = model(tokens).detach()
    for sender in dict.fromkeys(sender for sender, _, _ in every):
        with contextlib.ExitStack() as stack:
            for _, receiver, via in (edge for edge in every if edge[0] == sender):
                stack.enter_context(hooks.patch_path(model, sender, receiver, via))
            cut = model(tokens).detach()
        with hooks.ablate(model, f"hook_{sender}" if isinstance(sender, str) else sender):
            close(cut, model(tokens).detach())
        assert (cut - untouched).abs().max() > 0.1


def test_a_native_bridges_rms_norm_is_followed_as_far_as_it_rounds(unchecked):
    bridge, twin = native("RMS")  # the bridge's computes in float32
    tokens, source = prompts(), prompts(seed=1)
    logits, same = bridge.run_with_cache(tokens)
    (_, theirs), (_, cache) = twin.run_with_cache(source), bridge.run_with_cache(source)
    for sender, receiver, via in edges(twin):
        with hooks.patch_path(bridge, sender, receiver, via, same):
            assert torch.equal(bridge(tokens), logits)
        with hooks.patch_path(bridge, sender, receiver, via, cache):
            found = bridge(tokens)
        with hooks.patch_path(twin, sender, receiver, via, theirs):
            close(found, twin(tokens), atol=1e-5)


class Norm(torch.nn.Module):
    """As Hugging Face's: Llama's, Gemma's (offset 1), or none at all."""

    def __init__(self, offset=0.0, power=0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-0.5, 2.0, 8).double())
        self.variance_epsilon = 0.1
        self.offset, self.power = offset, power

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 0.1) ** self.power * (self.offset + self.weight)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_of_an_unknown_class_is_known_by_what_it_computes(offset, unchecked):
    norm, x = Norm(offset), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    linear = linear_norm(norm, x)
    close(linear(x), norm(x))
    close(linear.linear(2 * x), 2 * norm(x))
    assert not linear.centred


def test_a_norm_that_does_not_say_what_it_adds_to_the_variance_is_tried_out(unchecked):
    norm = OlmoLayerNorm(8)
    x = 0.01 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    close(linear_norm(norm, x)(x), norm(x), atol=1e-5)  # which it computes in float32


def test_what_is_no_norm_of_a_known_formula_is_refused(unchecked):
    with pytest.raises(TypeError, match="norm of type Norm, which computes neither an RMSNorm nor a LayerNorm"):
        linear_norm(Norm(power=0.6), torch.linspace(-1, 2, 8).double()[None])


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
    for model in (rotary, neox_like()):  # the bridge has a hook_pos_embed, of rotary angles
        with pytest.raises(ValueError, match="'pos_embed': this model has no hook_pos_embed that adds to its residual"):
            hooks.patch_path(model, "pos_embed", "unembed", "unembed")


def test_keys_and_values_that_heads_share_are_refused_with_a_remedy():
    shared = hooked(n_key_value_heads=1)
    assert isinstance(hooks.patch_path(shared, "embed", HEADS[2], "q"), hooks.Intervention)
    for via in "kv":
        with pytest.raises(ValueError, match=r"grouped-query.*set_ungroup_grouped_query_attention\(True\) gives every"):
            hooks.patch_path(shared, "embed", HEADS[2], via)
        with pytest.raises(ValueError, match=r"grouped-query.*TransformerBridge.*patch other inputs, or use a Hooked"):
            hooks.patch_path(llama_like(), "embed", HEADS[2], via)
    shared.set_ungroup_grouped_query_attention(True)
    assert isinstance(hooks.patch_path(shared, "embed", HEADS[2], "k"), hooks.Intervention)


def test_messages_that_something_else_changes_on_the_way_are_refused():
    sandwiched = hooked("RMS", use_normalization_before_and_after=True)
    assert isinstance(hooks.patch_path(sandwiched, MLPS[0], HEADS[2], "q"), hooks.Intervention)
    with pytest.raises(ValueError, match="sender L0H0: this model norms or scales what its heads write"):
        hooks.patch_path(sandwiched, HEADS[0], HEADS[2], "q")
    after = hooked("RMS", original_architecture="Olmo2ForCausalLM")
    with pytest.raises(ValueError, match="receiver L1H0: this model's blocks norm what they write, not what they read"):
        hooks.patch_path(after, MLPS[0], HEADS[2], "q")
    with pytest.raises(ValueError, match="sender L0H0: this model norms or scales what its heads write"):
        hooks.patch_path(after, HEADS[0], "unembed", "unembed")


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Olmo2"])
def test_the_same_holds_on_bridges(family):
    scaled = {"Granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}, "Gemma2": {"head_dim": 4}}
    model = tiny(family, **scaled.get(family, {}))
    with pytest.raises(ValueError, match="sender L0H0: this model norms or scales what its heads write"):
        hooks.patch_path(model, HEADS[0], "unembed", "unembed")
    if family == "Granite" and OURS:  # from TransformerLens 4 on, hook_embed shows embeddings as they are added
        tokens = prompts(1)
        _, cache = model.run_with_cache(tokens)
        without = [("ln_final.hook_in", lambda x, hook: x - cache["hook_embed"])]
        with hooks.patch_path(model, "embed", "unembed", "unembed"):
            found = model(tokens)
        close(found, model.run_with_hooks(tokens, fwd_hooks=without), atol=1e-6)
    elif family == "Granite":
        with pytest.raises(ValueError, match="sender 'embed': this model norms or scales its embeddings"):
            hooks.patch_path(model, "embed", "unembed", "unembed")
    if family == "Olmo2":
        with pytest.raises(ValueError, match="receiver L1MLP: this model's blocks norm what they write"):
            hooks.patch_path(model, MLPS[0], MLPS[1], "mlp_in")


def test_inputs_without_a_hook_point_are_refused():
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.hook_pre' is not a hook point"):
        hooks.patch_path(hooked(attn_only=True), "embed", MLPS[0], "mlp_in")
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.hook_pre' is not a hook point"):
        hooks.patch_path(hooked(num_experts=2, experts_per_token=1), "embed", MLPS[0], "mlp_in")
    with pytest.raises(ValueError, match="must come before"):
        hooks.patch_path(hooked(parallel_attn_mlp=True), HEADS[0], MLPS[0], "mlp_in")
