"""MLPs as key-value memories, against the same networks in plain torch, one token at a time."""

from dataclasses import replace

import pytest
import torch
from bridges_for_tests import BOOTED, gpt2_like, llama_like
from hypothesis import given, settings
from models_for_tests import MLPS, SHAPE, close, handwritten, hooked, native, perturbed, with_factor
from plain_families import plain_of_hooked
from refusals import refused
from strategies import seeds
from trainable_for_tests import build, shaken

import hijack_lens as hl
from hijack_lens.memories import MemoryNeurons, memory_matrix, memory_neurons, neurons, token_tables

LLAMA_ROUNDS = 1e-5  # its norms go through float32


def with_plain(model, twin=None):
    return model, getattr(model, "plain", None) or plain_of_hooked(twin or model)


MODELS = {
    "hand-written with noise": lambda: with_plain(perturbed()),
    "absolute positions": lambda: with_plain(perturbed(positions="absolute")),
    "trainable, RMSNorm": lambda: with_plain(shaken(build(norm="RMS"))),
    "LayerNorm": lambda: with_plain(hooked("LN")),
    "RMSNorm, three layers": lambda: with_plain(hooked("RMS", "silu", n_layers=3)),
    "parallel": lambda: with_plain(hooked("LN", parallel_attn_mlp=True)),
    "native bridge": lambda: with_plain(*native("LN")),
    **{name: lambda make=make: with_plain(make()) for name, make in BOOTED.items()},
}


def alone(plain, d_vocab):
    """Logits after each token with attention and positions zeroed, and every activation on the way; token by token."""
    logits, runs = [], []
    for token in range(d_vocab):
        seen = {}

        def at(name, value, seen=seen):
            seen[name] = torch.zeros_like(value) if name.endswith(("attn_out", "pos_embed")) else value
            return seen[name]

        logits.append(plain.run(torch.tensor([[token]]), at)[0, 0])
        runs.append(seen)
    return torch.stack(logits), {name: torch.cat([run[name][:, 0] for run in runs]) for name in runs[0]}


def written_by(plain, layer):
    """Each neuron's row of W_out through the final norm's weights and W_U, relative to its mean."""
    rows = plain.layers[layer]["mlp.W_out"]
    if plain.norm_type == "LN":
        rows = rows - rows.mean(1, keepdim=True)
    if plain.norm_type is not None:
        rows = rows * plain.ends["ln_final.w"]
    logits = rows @ plain.ends["unembed.W_U"]
    return logits - logits.mean(1, keepdim=True)


def by_token(ids, values):
    """Ranked values, all tokens being there, back in the order of tokens."""
    return torch.zeros_like(values).scatter(1, ids, values)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_those_of_single_tokens_and_weights(name):
    model, plain = MODELS[name]()
    d_vocab, atol = model.cfg.d_vocab, LLAMA_ROUNDS if plain.rounds else 1e-10
    _, seen = alone(plain, d_vocab)
    for layer in range(model.cfg.n_layers):
        result = memory_neurons(model, hl.Component(layer, "mlp"), k=d_vocab)
        pre, post = (seen[f"blocks.{layer}.mlp.hook_{leaf}"] for leaf in ("pre", "post"))
        close(by_token(result.key_tokens, result.pre).T, pre, atol)
        close(by_token(result.key_tokens, result.post).T, post, atol)
        close(result.on, (pre > 0).double().mean(0), atol=1e-12)
        writes = written_by(plain, layer)
        close(by_token(result.promoted, result.promoted_logits), writes)
        close(by_token(result.suppressed, result.suppressed_logits), writes)
        close(result.spread, writes.std(1, correction=0))
        assert result.post.abs().diff(dim=1).max() < 1e-12, "keys come strongest first"
        assert result.promoted_logits.diff(dim=1).max() <= 0
        assert result.suppressed_logits.diff(dim=1).min() >= 0
    assert post.abs().max() > 0.1
    assert writes.abs().max() > 0.1


def test_each_neuron_of_the_handwritten_memory_holds_one_row_of_log_pi_b():
    model = handwritten(d_vocab=9, strengths=hl.Strengths(bigram=2.0))
    result = memory_neurons(model, k=3)
    assert result.component == model.circuit.bigram[0]
    assert result.key_tokens[:, 0].tolist() == list(range(9))
    close(result.post, torch.eye(3, dtype=torch.float64)[:1].expand(9, -1))
    close(result.on, torch.full((9,), 1 / 9, dtype=torch.float64))
    expected = 2 * model.language.log_pi_b
    expected = expected - expected.mean(1, keepdim=True)
    top = expected.topk(3)
    assert torch.equal(result.promoted, top.indices)
    assert torch.equal(result.value_tokens, top.indices)
    close(result.value_logits, top.values)
    close(result.strength, expected.square().mean(1).sqrt())
    assert result.strongest(2) == result.strength.topk(2).indices.tolist()


@settings(max_examples=20)
@given(seed=seeds)
def test_what_the_neurons_write_sums_to_the_memory(seed):
    model = hooked(None, "relu", seed=seed)
    d_vocab = model.cfg.d_vocab
    result = memory_neurons(model, k=d_vocab)
    post = by_token(result.key_tokens, result.post).T
    bias = model.blocks[1].mlp.b_out @ model.W_U
    whole = post @ by_token(result.promoted, result.promoted_logits) + (bias - bias.mean()).detach()
    close(memory_matrix(model).values, whole)


def test_where_a_strongest_key_is_negative_the_values_are_those_that_it_raises():
    result = memory_neurons(llama_like(), MLPS[1], k=4)  # gated, so that neurons write either way
    turned = replace(result, post=-result.post)
    assert (result.post[:, 0] < 0).any()
    assert (result.post[:, 0] > 0).any()
    for one in (result, turned):
        assert (one.value_logits[:, 0] > 0).all()
        close(one.value_logits[:, 0], (one.post[:, :1] * written_by(llama_like().plain, 1)).max(1).values)
    assert torch.equal(turned.strength, result.strength)


def test_neurons_that_no_token_turns_on_name_those_that_come_closest():
    model = handwritten()
    with torch.no_grad():
        model.blocks[1].mlp.b_in.fill_(-2.0)  # keys give 1
        model.blocks[1].mlp.W_in[:, 0] *= 4
    result = memory_neurons(model, k=2)
    assert (result.post[1:] == 0).all()
    assert result.key_tokens[:, 0].tolist() == list(range(7))
    close(result.pre[:, 0], torch.tensor([2.0] + [-1.0] * 6, dtype=torch.float64))
    assert "none" in str(result)


def test_the_vocabulary_and_the_neurons_may_be_taken_in_parts(monkeypatch):
    model = hooked("LN", "silu")
    whole = memory_neurons(model, k=3)
    monkeypatch.setattr(token_tables, "_ACTIVATIONS", 2 * SHAPE["d_mlp"])
    monkeypatch.setattr(neurons, "_CELLS", 1)
    parts = memory_neurons(model, k=3)
    for name in ("key_tokens", "promoted", "suppressed"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    for name in ("pre", "post", "on", "promoted_logits", "suppressed_logits", "spread"):
        close(getattr(parts, name), getattr(whole, name), atol=1e-13)
    some = memory_neurons(model, neurons=[4, 1], key_tokens=[5, 2, 3], k=8)
    assert some.key_tokens.shape == (2, 3)
    assert some.n_keys == 3
    everything = memory_neurons(model, k=7)
    rows, columns = by_token(everything.key_tokens, everything.post)[[4, 1]], [2, 3, 5]
    assert torch.equal(some.post.abs(), rows[:, columns].abs().sort(descending=True).values)


def test_tables_pictures_and_files(tmp_path):
    language = hl.BigramLanguage.from_text("the cat sat on the <b>mat</b> & $9\n" * 3)
    result = memory_neurons(hl.associative_transformer(language, dtype=torch.float64, device="cpu"), k=4)
    frame = result.to_pandas()
    assert len(frame) == 4 * language.d_vocab
    first = frame[frame["rank"] == 0]
    assert list(first["key"]) == [language.display(token) for token in range(language.d_vocab)]
    assert list(first["post"]) == pytest.approx([1.0] * language.d_vocab)
    assert list(frame["promoted_logits"][:4]) == result.promoted_logits[0].tolist()
    text = str(result)
    assert f"MemoryNeurons(neuron={language.d_vocab}) of L1MLP" in text
    assert "'h'" in text
    html = result._repr_html_()
    assert "<svg" in html
    assert "&#x27;&lt;&#x27;" in html
    picture = result.picture(most=5)
    axes = picture.figure.axes
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == [str(i) for i in result.strongest(5)]
    assert axes[0].get_xlabel()
    assert axes[0].get_ylabel() == "neuron of L1MLP"
    assert picture.png()
    result.save(tmp_path / "neurons")
    again = MemoryNeurons.load(tmp_path / "neurons")
    assert str(again) == text
    assert torch.equal(again.pre, result.pre)
    memory_matrix(handwritten()).save(tmp_path / "matrix")
    with pytest.raises(ValueError, match=r"not a hijack_lens\.MemoryNeurons"):
        MemoryNeurons.load(tmp_path / "matrix")


def test_without_a_tokenizer_tokens_are_numbers():
    result = memory_neurons(hooked(), k=2)
    assert result.vocab is None
    assert result.token_text(3) == "3"
    assert result.picture()


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_model_is_left_as_it_was():
    model = hooked("LN").train()
    before = model(torch.arange(7)[None])
    memory_neurons(model)
    assert model.training
    assert torch.equal(model(torch.arange(7)[None]), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_neurons_that_do_not_add_up_to_the_output_are_refused():
    model = hooked()
    double = ("blocks.1.hook_mlp_out", lambda activation, hook: 2 * activation)
    with model.hooks(fwd_hooks=[double]), pytest.raises(ValueError, match="L1MLP writes is not the sum of its neurons"):
        memory_neurons(model)
    assert memory_neurons(model).n_keys == 7


MODEL = hooked()
test_values_refused = refused(
    ValueError,
    {
        "components must be MLPs, got L0H1": lambda: memory_neurons(MODEL, hl.Component(0, "head", 1)),
        "components: L5MLP is in layer 5; the model has 2": lambda: memory_neurons(MODEL, hl.Component(5, "mlp")),
        "components must be given, since the model has no circuit": lambda: memory_neurons(gpt2_like()),
        "components must be one MLP, got L0MLP, L1MLP": lambda: memory_neurons(MODEL, MLPS),
        "blocks have no MLPs": lambda: memory_neurons(hooked(attn_only=True), MLPS[0]),
        "neurons must be .* below d_mlp=10, got \\[10\\]": lambda: memory_neurons(MODEL, neurons=[10]),
        "neurons must be one or several": lambda: memory_neurons(MODEL, neurons=[]),
        "key_tokens holds token id 7": lambda: memory_neurons(MODEL, key_tokens=[7]),
        "k must be at least 1, got 0": lambda: memory_neurons(MODEL, k=0),
        "model caps its logits": lambda: memory_neurons(hooked(output_logits_soft_cap=5.0)),
        "logits are not its last residual stream .* a factor follows": lambda: memory_neurons(with_factor()),
        "key_tokens must have shape|pre must have shape": lambda: replace(memory_neurons(MODEL), pre=torch.zeros(2, 2)),
    },
)
test_types_refused = refused(
    TypeError,
    {
        "neurons must be several ints, got 3": lambda: memory_neurons(MODEL, neurons=3),
        "model must be a HookedTransformer": lambda: memory_neurons("gpt2", MLPS[0]),
    },
)
