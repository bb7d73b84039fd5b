"""Models to be trained: their architecture, their initialisation, and the rest of the library on them."""

import math

import pytest
import torch
from models_for_tests import close, prompts
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights, shaken, weights

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooked import HookedTransformer
from hijack_lens.models import RelativeAttention
from hijack_lens.training.forward import PlainForward

POSITIONS = ["relative", "absolute", "rotary", "none"]
MLPS = ["relu", "linear", None]
NORMS = [None, "LN", "RMS"]
TOKENS = prompts(2, 9, d_vocab=LANGUAGE.d_vocab)

# Architecture


def gradients(model, logits):
    """Of the next-token loss, by parameter; 0 where nothing arrives."""
    loss = -logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).mean()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_plain_forward_pass_is_the_hooked_one_gradients_included(positions, mlp, norm):
    for n_layers, n_heads in ((1, 2), (2, 1), (3, 2)):
        model = shaken(build(positions, mlp=mlp, norm=norm, n_heads=n_heads, n_layers=n_layers))
        assert isinstance(model, HookedTransformer)
        assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head) == (n_layers, n_heads, 16 // n_heads)
        hooked, plain = model(TOKENS), PlainForward(model)(TOKENS)
        close(plain, hooked, atol=1e-12)
        for ours, theirs in zip(gradients(model, plain), gradients(model, hooked), strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-12


def test_the_plain_forward_pass_counts_earlier_mlps_where_a_user_has_filled_them():
    model = build()
    with torch.no_grad():
        for parameter in model.blocks[0].mlp.parameters():
            parameter.fill_(0.1)
    close(PlainForward(model)(TOKENS), model(TOKENS), atol=1e-12)


def test_the_plain_forward_pass_takes_what_the_parameters_have_become():
    model = build()
    plain = PlainForward(model)
    before = plain(TOKENS)
    shaken(model)
    close(plain(TOKENS), model(TOKENS), atol=1e-12)
    assert float((plain(TOKENS) - before).abs().max()) > 0.1


def test_the_plain_forward_pass_of_a_handwritten_model():
    for positions in ("relative", "absolute"):
        model = hl.associative_transformer(LANGUAGE, positions=positions, dtype=torch.float64, device="cpu", n_ctx=16)
        close(PlainForward(model)(TOKENS), model(TOKENS), atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_plain_forward_pass_of_attention_scores_of_either_scale(scaled):
    architecture = hl.models.Architecture(d_model=6, d_head=4, d_mlp=5, n_ctx=16, scale_attention=scaled)
    model = zeros(architecture)
    model.W_pos.requires_grad_(False)
    shaken(model, 0.6)
    close(PlainForward(model)(TOKENS), model(TOKENS), atol=1e-12)


def zeros(architecture):
    model = hl.BigramTransformer(architecture, LANGUAGE, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_the_plain_forward_pass_counts_position_embeddings_that_a_relative_model_has_been_given():
    model = build()
    with torch.no_grad():
        model.W_pos.normal_(generator=torch.Generator().manual_seed(0))
    close(PlainForward(model)(TOKENS), model(TOKENS), atol=1e-12)


def test_the_mlp_is_the_last_blocks_alone_and_linear_where_asked():
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n_layers in (1, 2, 3):
        relu, linear = (shaken(build(mlp=mlp, n_layers=n_layers)) for mlp in ("relu", "linear"))
        for block in relu.blocks[:-1]:
            assert not any(bool(p.any()) or p.requires_grad for p in block.mlp.parameters())
        for model, act in ((relu, torch.relu), (linear, lambda v: v)):
            mlp = model.blocks[-1].mlp
            expected = act(x @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
            close(mlp(x), expected, atol=1e-12)
    assert not any("mlp" in name for name, _ in build(mlp=None).named_parameters())


def test_roles_follow_the_depth():
    for n_layers in (1, 2, 3):
        circuit = build(n_layers=n_layers, n_heads=2).circuit
        heads = [tuple(hl.Component(layer, "head", head) for head in (0, 1)) for layer in range(n_layers)]
        assert circuit.induction == heads[-1]
        assert circuit.previous_token == (heads[0] if n_layers > 1 else ())
        assert circuit.bigram == (hl.Component(n_layers - 1, "mlp"),)
    assert build(mlp=None).circuit.bigram == ()


def test_without_positions_one_layer_sees_a_bag_of_tokens():
    shuffled = TOKENS[:, [3, 0, 5, 1, 2, 7, 6, 4, 8]]  # the last token stays
    bag = shaken(build("none", n_layers=1))
    close(bag(shuffled)[:, -1], bag(TOKENS)[:, -1], atol=1e-12)
    for positions in POSITIONS[:3]:
        model = shaken(build(positions, n_layers=1))
        assert float((model(shuffled) - model(TOKENS))[:, -1].abs().max()) > 1e-3


@pytest.mark.parametrize(("n_offsets", "n_query", "n_key"), [(1, 5, 5), (3, 5, 5), (8, 5, 5), (3, 2, 6), (8, 1, 6)])
def test_relative_scores_are_one_product_per_offset(n_offsets, n_query, n_key):
    attn = build(n_offsets=n_offsets, n_heads=2).blocks[0].attn
    assert isinstance(attn, RelativeAttention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        attn.W_R.copy_(torch.randn(attn.W_R.shape, generator=generator, dtype=torch.float64))
    q = torch.randn(2, n_query, 2, 8, generator=generator, dtype=torch.float64)
    found = attn.relative_scores(q, n_key)
    assert found.shape == (2, 2, n_query, n_key)
    for batch in range(2):
        for head in range(2):
            for i in range(n_query):
                t = n_key - n_query + i  # the queries are the last of the positions
                for s in range(t + 1):
                    by_hand = 0.0
                    if t - s < n_offsets:
                        by_hand = sum(float(q[batch, i, head, d] * attn.W_R[head, t - s, d]) for d in range(8))
                    assert float(found[batch, head, i, s]) == pytest.approx(by_hand / math.sqrt(8), abs=1e-12)


# Initialisation


def test_a_seed_gives_the_same_weights_and_touches_no_global_state(global_rng_untouched):
    assert same_weights(build(seed=3), build(seed=3))
    assert same_weights(build(seed=3), build(seed=torch.Generator().manual_seed(3)))
    assert not same_weights(build(seed=3), build(seed=4))


def test_a_seed_gives_the_same_weights_in_every_dtype():
    double, single = build(seed=1), build(seed=1, dtype=torch.float32)
    assert same_weights({name: value.float() for name, value in weights(double).items()}, weights(single))


def test_weights_are_drawn_at_the_documented_scale():
    language = hl.BigramLanguage.dirichlet(60, seed=0)
    model = build(language=language, d_model=64, n_heads=2, d_head=24, d_mlp=96, n_ctx=50, positions="absolute")
    fan_in = {"W_E": 64, "W_pos": 64, "W_Q": 64, "W_K": 64, "W_V": 64, "W_O": 48, "W_in": 64, "W_out": 96, "W_U": 64}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("b") or name.startswith("blocks.0.mlp"):
            assert not bool(parameter.any()), name
        else:
            assert float(parameter.std()) * math.sqrt(fan_in[leaf]) == pytest.approx(1, abs=0.06), name
            assert float(parameter.mean()) * math.sqrt(fan_in[leaf]) == pytest.approx(0, abs=0.1), name


def test_relative_positions_start_with_a_query_bias_and_offset_keys_of_0():
    model = build(d_model=128, n_heads=2)
    attn = model.blocks[0].attn
    assert not bool(attn.W_R.any())
    assert float(attn.b_Q.std()) == pytest.approx(1, abs=0.2)
    assert not bool(model.blocks[1].attn.b_Q.any())
    assert not bool(model.W_pos.any())
    assert not model.W_pos.requires_grad
    assert not bool(build(init={"b_Q": "zeros"}).blocks[0].attn.b_Q.any())


def test_norms_start_as_nothing_but_norms():
    model = build(norm="LN")
    norms = {name: p for name, p in model.named_parameters() if name.endswith((".w", ".b"))}
    assert len(norms) == 10
    assert all(bool((p == (1.0 if name.endswith(".w") else 0.0)).all()) for name, p in norms.items())


def test_init_and_freeze_take_short_and_full_names():
    model = build(
        init={"W_Q": "identity", "blocks.1.attn.W_Q": "zeros", "W_U": "zeros", "W_R": "normal", "b_U": "normal"},
        freeze=("W_E", "blocks.1.attn.W_K"),
    )
    assert torch.equal(model.blocks[0].attn.W_Q[0], torch.eye(16, dtype=torch.float64))
    assert not bool(model.blocks[1].attn.W_Q.any())
    assert not bool(model.W_U.any())
    assert bool(model.blocks[0].attn.W_R.all())
    assert bool(model.b_U.all())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    unused = {f"blocks.0.mlp.{leaf}" for leaf in ("W_in", "b_in", "W_out", "b_out")}
    assert frozen == {"embed.W_E", "blocks.1.attn.W_K", "pos_embed.W_pos"} | unused


def test_identity_of_a_narrow_head_is_ones_on_the_diagonal():
    W_Q = build(init={"W_Q": "identity"}, n_heads=2).blocks[0].attn.W_Q
    assert torch.equal(W_Q, torch.eye(16, 8, dtype=torch.float64).expand(2, -1, -1))


def test_the_simplifications_of_bietti_et_al():
    model = build(
        "absolute",
        mlp="linear",
        init={"W_Q": "identity", "W_O": "identity"},
        freeze=("W_E", "W_U", "W_pos", "W_Q", "W_O"),
    )
    close(model(TOKENS), PlainForward(model)(TOKENS), atol=1e-12)
    eye = torch.eye(16, dtype=torch.float64)
    for block in model.blocks:
        assert torch.equal(block.attn.W_Q[0], eye)
        assert torch.equal(block.attn.OV.AB[0], block.attn.W_V[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "W_" in name}
    attn = {f"blocks.{layer}.attn.{leaf}" for layer in (0, 1) for leaf in ("W_K", "W_V")}
    assert trained == attn | {"blocks.1.mlp.W_in", "blocks.1.mlp.W_out"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ("W_X",)}, "freeze names 'W_X', which is not a parameter; known are .*W_E"),
        ({"freeze": "W_E"}, "freeze"),
        ({"freeze": ("blocks.7.attn.W_Q",)}, "blocks.7.attn.W_Q"),
        ({"init": {"W_R2": "zeros"}}, "init names 'W_R2'"),
        ({"init": {"W_Q": "ones"}}, "init must be one of 'normal', 'identity', 'zeros', got 'ones'"),
        ({"positions": "alibi"}, "positions must be one of .*'alibi'"),
        ({"mlp": "gelu"}, "mlp must be one of .*'gelu'"),
        ({"norm": "batch"}, "norm must be one of .*'batch'"),
        ({"n_heads": 3}, "n_heads must divide d_model=16, got 3"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"n_offsets": 0}, "n_offsets must be at least 1"),
        ({"positions": "rotary", "d_head": 3}, "d_head must be even"),
        ({"positions": "rotary", "freeze": ("W_pos",)}, "freeze names 'W_pos'"),
        ({"mlp": None, "freeze": ("W_in",)}, "freeze names 'W_in'"),
        ({"norm": "LN", "init": {"w": "identity"}}, "init"),
        ({"init": {"b_U": "identity"}}, "init"),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("options", [{"language": "abc"}, {"dtype": torch.int64}, {"seed": 1.5}, {"d_mlp": 2.5}])
def test_a_bad_type_is_refused_by_name(options, unchecked):
    with pytest.raises(TypeError, match=next(iter(options))):
        build(**options)


# The rest of the library


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_attribution_is_complete(positions, mlp, norm):
    for n_layers, n_heads in ((1, 2), (2, 2)):
        model = shaken(build(positions, mlp=mlp, norm=norm, n_layers=n_layers, n_heads=n_heads))
        result = hl.attribute(model, TOKENS, "all")
        assert result.completeness_error <= 1e-10
        close(result.values.sum(-3), model(TOKENS).detach(), atol=1e-10)


@pytest.fixture(scope="module")
def trained():
    model = build(norm="RMS", d_model=24, seed=1)
    config = hl.TrainConfig(
        triggers=TRIGGERS, length=24, seed=0, steps=40, batch_size=32, evaluate_every=40, eval_sequences=4
    )
    hl.train(model, LANGUAGE, config)
    return model


def conflict(repeats=3, length=20, seed=0):
    q = TRIGGERS[0]
    c = next(token for token in range(8) if token not in (q, int(LANGUAGE.pi_b[q].argmax())))
    return hl.hijack_prompt(LANGUAGE, q, c, repeats, length, seed=seed)


def test_a_trained_model_is_explained_and_reported(trained, tmp_path):
    prompt = conflict()
    explanation = hl.explain(trained, prompt)
    logits = trained(prompt.tokens)[0, -1].detach()
    by_hand = float(logits[prompt.in_context] - logits[prompt.global_candidate])
    assert float(explanation.margin.total) == pytest.approx(by_hand, abs=1e-10)
    assert explanation.theory is None
    assert set(explanation.ablated) == {"previous-token head", "induction head", "bigram memory"}
    page = hl.write_report(explanation, tmp_path / "report.html").read_text()
    assert "previous-token head" in page
    assert "What the theory says" not in page


def test_ablating_a_trained_models_bigram_memory_takes_its_output_away(trained):
    tokens = conflict().tokens
    before = trained(tokens)
    with hooks.ablate(trained, trained.circuit.bigram):
        ablated = trained(tokens)
    expected = trained.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda out, hook: out * 0)])
    close(ablated, expected, atol=1e-12)
    close(trained(tokens), before, atol=0)
    assert float((ablated - before).abs().max()) > 0.1


def test_patching_a_trained_models_induction_head_brings_its_output_from_the_source(trained):
    prompt = conflict()
    head = trained.circuit.induction
    _, cache = trained.run_with_cache(prompt.corrupted)
    z = cache["blocks.1.attn.hook_z"]
    with hooks.patch(trained, head, prompt.corrupted):
        patched = trained(prompt.tokens)
    by_hand = trained.run_with_hooks(prompt.tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda out, hook: z)])
    close(patched, by_hand, atol=1e-12)
    assert float((patched - trained(prompt.tokens)).abs().max()) > 1e-3
