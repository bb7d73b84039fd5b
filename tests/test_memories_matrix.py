"""The weights' memory as a table, against log pi_b where it was written by hand, and plain torch where it was not."""

import math

import pytest
import torch
from bridges_for_tests import BOOTED, gpt2_like
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import MLPS, close, handwritten, hooked, native, perturbed, with_factor
from plain_families import plain_of_hooked
from refusals import refused
from strategies import languages, seeds
from trainable_for_tests import build, shaken

import hijack_lens as hl
from hijack_lens.memories import MemoryMatrix, memory_matrix, token_tables
from hijack_lens.training.recall import context_free_logits

MODELS = {
    "hand-written with noise": lambda: (perturbed(),) * 2,
    "trainable, LayerNorm": lambda: (shaken(build(norm="LN")),) * 2,
    "LayerNorm": lambda: (hooked("LN"),) * 2,
    "RMSNorm, three layers": lambda: (hooked("RMS", "silu", n_layers=3),) * 2,
    "native bridge": lambda: native("LN"),
    **{name: lambda make=make: (make(),) * 2 for name, make in BOOTED.items()},
}
LANGUAGE = hl.BigramLanguage.dirichlet(7, seed=5)


def centred(table):
    return table - table.mean(1, keepdim=True)


def alone(plain, d_vocab):
    """Logits after each token with attention and positions off, and what the MLPs wrote into them; token by token."""
    logits, wrote = [], []
    for token in range(d_vocab):
        seen = {}

        def at(name, value, seen=seen):
            seen[name] = torch.zeros_like(value) if name.endswith(("attn_out", "pos_embed")) else value
            return seen[name]

        logits.append(plain.run(torch.tensor([[token]]), at)[0, 0])
        last = seen[f"blocks.{len(plain.layers) - 1}.hook_resid_post"][0, 0]
        by_mlp = torch.stack([seen[f"blocks.{layer}.hook_mlp_out"][0, 0] for layer in range(len(plain.layers))])
        if plain.norm_type == "LN":
            last, by_mlp = last - last.mean(), by_mlp - by_mlp.mean(1, keepdim=True)
        if plain.norm_type is not None:
            by_mlp = by_mlp / (last.square().mean() + plain.eps).sqrt() * plain.ends["ln_final.w"]
        wrote.append(by_mlp @ plain.ends["unembed.W_U"])
    return torch.stack(logits), torch.stack(wrote, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_single_tokens_make_of_the_weights(name):
    model, twin = MODELS[name]()
    plain = getattr(model, "plain", None) or plain_of_hooked(twin)
    atol = 1e-5 if plain.rounds else 1e-10  # Llama's norms go through float32
    logits, wrote = alone(plain, model.cfg.d_vocab)
    for layer, table in enumerate(wrote):
        close(memory_matrix(model, hl.Component(layer, "mlp")).values, centred(table), atol)
    both = memory_matrix(model, MLPS)
    close(both.values, centred(wrote[0] + wrote[1]), atol)
    assert both.components == tuple(MLPS)
    close(memory_matrix(model, part="weights").values, centred(logits), atol)
    keys, values = [4, 0, 2], [5, 1]
    some = memory_matrix(model, MLPS[1], key_tokens=keys, value_tokens=values)
    close(some.values, centred(wrote[1][keys][:, values]), atol)
    assert wrote.abs().max() > 0.1


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@settings(max_examples=15)
@given(language=languages(max_vocab=20), g=st.floats(0.1, 3))
def test_the_handwritten_memory_is_g_log_pi_b(positions, language, g):
    strengths = hl.Strengths(bigram=g)
    model = hl.associative_transformer(
        language, positions=positions, strengths=strengths, n_ctx=4, dtype=torch.float64, device="cpu"
    )
    result = memory_matrix(model)
    expected = centred(language.log_pi_b)
    close(result.values, g * expected)
    close(result.log_pi_b, expected)
    assert result.recall() == 1
    assert result.slope == pytest.approx(g, abs=1e-12)
    assert result.r2 == pytest.approx(1, abs=1e-12)
    assert result.crosstalk_rms < 1e-10
    assert result.rank == int(torch.linalg.matrix_rank(expected))
    close(result.singular_values, g * torch.linalg.svdvals(expected))


def test_all_that_the_weights_say_is_what_the_training_probes_read():
    for norm in (None, "LN", "RMS"):
        model = shaken(build(norm=norm))
        close(memory_matrix(model, part="weights").values, centred(context_free_logits(model)).detach())


@settings(max_examples=30)
@given(seed=seeds, n_keys=st.integers(1, 9), n_values=st.integers(2, 9))
def test_the_comparison_is_a_least_squares_fit(seed, n_keys, n_values):
    generator = torch.Generator().manual_seed(seed)
    values, log_pi_b = (centred(torch.randn(n_keys, n_values, generator=generator).double()) for _ in range(2))
    result = matrix(values, log_pi_b)
    slope = torch.linalg.lstsq(log_pi_b.reshape(-1, 1), values.reshape(-1, 1)).solution
    assert result.slope == pytest.approx(float(slope), rel=1e-9)
    close(result.crosstalk, values - float(slope) * log_pi_b)
    correlation = torch.nn.functional.cosine_similarity(values.flatten(), log_pi_b.flatten(), dim=0)
    assert result.r2 == pytest.approx(float(correlation) ** 2, abs=1e-9)


def matrix(values, log_pi_b=None):
    n_keys, n_values = values.shape
    return MemoryMatrix(None, values, log_pi_b, tuple(range(n_keys)), tuple(range(n_values)), "memory", (MLPS[1],))


def test_recall_asks_for_the_likeliest_value_or_one_that_is_as_likely():
    said = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    true = torch.tensor([[9.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [4.0, 4.0, 4.0]])
    result = matrix(said.double(), true.double())
    assert [result.recall(k) for k in (1, 2, 3, 9)] == [0.5, 0.75, 1.0, 1.0]


def test_ranks():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    even = matrix(basis[:, :4] @ basis[:4])
    assert even.rank == 4
    assert even.effective_rank == pytest.approx(4)
    uneven = matrix(basis @ torch.diag(torch.tensor([2.0, 1, 1, 0, 0, 0]).double()) @ basis.T)
    assert uneven.rank == 3
    assert uneven.effective_rank == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


def test_a_memory_of_other_bigrams_is_told():
    model = handwritten()
    other = memory_matrix(model, language=LANGUAGE)
    assert other.recall() < 0.6
    assert other.r2 < 0.3
    assert other.crosstalk_rms > 0.5


def test_without_a_language_nothing_is_compared():
    result = memory_matrix(gpt2_like(), MLPS[1])
    assert result.log_pi_b is None
    scores = (result.recall(), result.recall(3), result.slope, result.r2, result.crosstalk_rms)
    assert all(map(math.isnan, scores))
    assert result.crosstalk.isnan().all()
    assert result.to_pandas()["log_pi_b"].isna().all()
    assert "recall" not in str(result)
    assert len(result.picture().figure.axes) == 3
    assert memory_matrix(handwritten(), language=None).log_pi_b is None


def test_tokens_may_be_taken_in_parts(monkeypatch):
    model = hooked("LN")
    whole = memory_matrix(model).values
    monkeypatch.setattr(token_tables, "_ACTIVATIONS", 2 * model.cfg.d_mlp)
    close(memory_matrix(model).values, whole, atol=1e-13)


def test_tables_pictures_and_files(tmp_path):
    language = hl.BigramLanguage.from_text("the cat sat on the <b>mat</b> & $9\n" * 3)
    model = hl.associative_transformer(language, d_model=40, dtype=torch.float64, device="cpu")
    result = memory_matrix(model)
    size = language.d_vocab
    frame = result.to_pandas()
    assert list(frame.columns) == ["key", "value", "logit", "log_pi_b", "crosstalk"]
    assert list(frame["logit"]) == result.values.flatten().tolist()
    assert frame["key"][size] == language.display(1)
    assert frame["value"][1] == language.display(1)
    text = str(result)
    assert f"MemoryMatrix(key={size}, value={size}) of L1MLP" in text
    assert f"recall {result.recall():.1%}" in text
    html = result._repr_html_()
    assert "<svg" in html
    assert "&#x27;&lt;&#x27;" in html
    axes = result.picture().figure.axes
    assert axes[0].get_ylabel() == "key: current token"
    assert [ax.get_xlabel() for ax in axes[:3]] == ["value: next token"] * 2 + ["rank"]
    assert torch.equal(torch.as_tensor(axes[0].images[0].get_array().data), result.values)
    assert axes[1].images[0].get_clim() == axes[0].images[0].get_clim()
    result.save(tmp_path / "matrix")
    again = MemoryMatrix.load(tmp_path / "matrix")
    assert str(again) == text
    assert torch.equal(again.values, result.values)
    alone_file = tmp_path / "alone"
    memory_matrix(model, language=None).save(alone_file)
    assert MemoryMatrix.load(alone_file).log_pi_b is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a hijack_lens\.MemoryMatrix"):
        MemoryMatrix.load(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_model_is_left_as_it_was():
    model = hooked("LN").train()
    memory_matrix(model)
    assert model.training
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


MODEL = hooked()
test_values_refused = refused(
    ValueError,
    {
        "part must be one of 'memory', 'weights', got 'all'": lambda: memory_matrix(MODEL, part="all"),
        "components must not be given with part='weights'": lambda: memory_matrix(MODEL, MLPS, part="weights"),
        "components must name at least one, got none": lambda: memory_matrix(MODEL, ()),
        "components must be given, since the model has no circuit that names any": lambda: memory_matrix(gpt2_like()),
        "key_tokens holds token id 9": lambda: memory_matrix(MODEL, key_tokens=[9]),
        "value_tokens holds token id 8": lambda: memory_matrix(MODEL, value_tokens=[8]),
        "language must be one of 'model', got 'English'": lambda: memory_matrix(MODEL, language="English"),
        "language must have the model's 7 tokens, got 8": lambda: memory_matrix(
            MODEL, language=hl.BigramLanguage.dirichlet(8)
        ),
        "language.pi_b holds zeros": lambda: memory_matrix(MODEL, language=hl.BigramLanguage(torch.eye(7))),
        "model caps its logits": lambda: memory_matrix(hooked(output_logits_soft_cap=5.0)),
        "logits are not its last residual stream .* a factor follows": lambda: memory_matrix(with_factor()),
        "values must have shape": lambda: MemoryMatrix(None, torch.zeros(2, 2), None, (1,), (1, 2), "memory", ()),
        "k must be at least 1": lambda: memory_matrix(MODEL).recall(0),
    },
)
test_types_refused = refused(
    TypeError,
    {
        "language must be a BigramLanguage, got 3": lambda: memory_matrix(MODEL, language=3),
        "components must be a Component": lambda: memory_matrix(MODEL, 3),
    },
)


def test_tables_beyond_memory_are_refused(monkeypatch):
    from hijack_lens.memories import matrix as module

    monkeypatch.setattr(module, "_MOST_CELLS", 20)
    with pytest.raises(ValueError, match="key_tokens and value_tokens must be fewer: 7 by 7 cells are over 20"):
        memory_matrix(MODEL)
    assert memory_matrix(MODEL, key_tokens=[1, 2]).values.shape == (2, 7)
