"""The dual model of a head: an identity with the exact kernel, and a kernel that random features approach."""

import pytest
import torch
from models_for_tests import hooked, prompts

import hijack_lens as hl
from hijack_lens.memories import dual as dual_module
from hijack_lens.memories import dual_model

ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4, "n_key_value_heads": 1}


@pytest.mark.parametrize("config", [{}, ROTARY, {"use_attn_scale": False}], ids=["plain", "grouped rotary", "unscaled"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_every_head_is_a_linear_model_and_more_features_come_closer(config, seed):
    model = hooked("LN", "silu", 2, seed, **config)
    for layer in range(2):
        for head in range(2):
            dual = dual_model(model, prompts(1, 9, seed)[0], hl.Component(layer, "head", head), features=[64, 4096])
            assert dual.exact_error < 1e-5
            few, many = dual.error.median(0).values
            assert many < few / 2


def test_updates_are_the_partial_sums_of_what_the_head_mixes():
    model, tokens = hooked("LN", "silu", 2, 0), prompts(1, 9, 0)[0]
    dual = dual_model(model, tokens, "L1H1", query_tokens=[int(tokens[-1])], features=[16])
    _, cache = model.run_with_cache(tokens[None])
    pattern, v = cache["pattern", 1][0, 1, -1], cache["v", 1][0, :, 1]
    partial = (pattern[:, None] * v).cumsum(0)
    z = cache["z", 1][0, -1, 1]
    expected = (partial - z).norm(dim=1) / z.norm()
    torch.testing.assert_close(dual.exact_updates, expected.double(), atol=1e-6, rtol=1e-5)
    assert dual.updates[-1] == pytest.approx(float(dual.error[0, -1]))


def test_moving_and_scaling_leaves_attention_as_it_is():
    generator = torch.Generator().manual_seed(0)
    q, k, own = (torch.randn(n, 6, generator=generator, dtype=torch.float64) * 2 + 1 for n in (5, 7, 5))
    expected = torch.cat([q @ k.T, (q * own).sum(1, keepdim=True)], 1).softmax(1)
    moved_q, moved_k, moved_own, bias, own_bias = dual_module._recentred(q, k, own)
    scores = torch.cat([moved_q @ moved_k.T + bias, (moved_q * moved_own).sum(1, keepdim=True) + own_bias[:, None]], 1)
    torch.testing.assert_close(scores.softmax(1), expected, atol=1e-12, rtol=0)
    before = sum(float(x.square().sum()) for x in (q, k, own))
    assert sum(float(x.square().sum()) for x in (moved_q, moved_k, moved_own)) < before


def test_features_are_orthogonal_by_blocks_and_normal_one_by_one():
    omega = dual_module._orthogonal(4000, 5, torch.Generator().manual_seed(0))
    blocks = torch.nn.functional.normalize(omega, dim=1).reshape(-1, 5, 5)
    identity = torch.eye(5, dtype=torch.float64).expand_as(blocks)
    torch.testing.assert_close(blocks @ blocks.mT, identity, atol=1e-12, rtol=0)
    assert omega.mean().abs() < 0.03
    assert (omega.T @ omega / 4000 - torch.eye(5)).abs().max() < 0.1


def test_the_seed_draws_the_features_and_position_is_where_the_prompt_ends():
    model, tokens = hooked("LN", "silu", 2, 0), prompts(1, 9, 0)[0]
    one = dual_model(model, tokens, "L1H0", 5, features=[16, 64], seed=1)
    same = dual_model(model, tokens[:6], "L1H0", features=[16, 64], seed=1)
    other = dual_model(model, tokens, "L1H0", 5, features=[16, 64], seed=2)
    assert torch.equal(one.error, same.error)
    assert not torch.equal(one.error, other.error)
    assert len(one.updates) == 6


def test_a_report_and_a_picture(tmp_path):
    model = hooked("LN", "silu", 2, 0)
    dual = dual_model(model, prompts(1, 9, 0)[0], "L1H0", features=[16, 64], draws=3)
    assert len(dual.to_pandas()) == 6
    assert "median error" in str(dual)
    dual.picture().save(tmp_path / "dual.png")
    dual.save(tmp_path / "dual.safetensors")
    assert torch.equal(hl.memories.DualModel.load(tmp_path / "dual.safetensors").error, dual.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": []}, "features must be different numbers in rising order"),
        ({"features": [64, 16]}, "features must be different numbers in rising order"),
        ({"features": [0]}, "features must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_what_is_no_size_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dual_model(hooked("LN", "silu", 2, 0), prompts(1, 9, 0)[0], "L1H0", **arguments)


def test_capped_scores_are_refused():
    model = hooked("LN", "silu", 2, 0, attn_scores_soft_cap=0.5)
    with pytest.raises(ValueError, match="softmax of products"):
        dual_model(model, prompts(1, 9, 0)[0], "L1H0")
