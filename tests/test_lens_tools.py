"""TransformerLens's own tools on the two-layer model: each gives the number that hijack-lens gives."""

import pytest
import torch
from models_for_tests import close, handwritten, perturbed, prompts
from transformer_lens import evals, head_detector, patching
from transformer_lens.utilities import get_act_name

import hijack_lens as hl
from hijack_lens import hooks, theory

METRIC = hl.logit_diff(1, 2)
ONE_HEAD = [hl.Component(layer, "head", 0) for layer in (0, 1)]
PATCHES = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
}
WHOLE = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}


@pytest.fixture(scope="module", params=["relative", "absolute"])
def model(request):
    return perturbed(positions=request.param)


def difference(logits):
    return (logits[:, -1, 1] - logits[:, -1, 2]).mean()


@pytest.mark.parametrize("name", [*PATCHES, *(f"{name}, all positions" for name in WHOLE)])
def test_activation_patching_finds_what_our_sweep_finds(model, name):
    clean, corrupted = prompts(2, 8), prompts(2, 8, seed=1)
    _, cache = model.run_with_cache(clean)
    name, *whole = name.split(", ")
    theirs = (WHOLE if whole else PATCHES)[name](model, corrupted, cache, difference)
    for layer in (0, 1):
        point = get_act_name(name, layer)
        for position in [None] if whole else range(8):
            with hooks.patch(model, point, clean, positions=position):
                ours = METRIC(model(corrupted))
            found = theirs[layer] if whole else theirs[layer, position]
            assert float(found.squeeze()) == pytest.approx(float(ours), abs=1e-5)  # they store float32


@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_the_head_detector_measures_the_attention_that_theory_gives(kind):
    model = handwritten(7, strengths=hl.Strengths(2.0, 3.0, 3.0, 1.0))
    tokens = prompts(1, 14)
    text = " ".join(model.language.tokens[i] for i in tokens[0])
    assert model.to_tokens(text).equal(tokens)
    scores = head_detector.detect_head(model, text, kind)
    for layer, pattern in enumerate(theory.attention(tokens, model.language, theory.Setting.of(model))):
        looked = 0.0
        for query in range(14):
            for key in range(query + 1):
                counts = {
                    "previous_token_head": key == query - 1,
                    "duplicate_token_head": key < query and tokens[0, key] == tokens[0, query],
                    "induction_head": key > 0 and key - 1 < query and tokens[0, key - 1] == tokens[0, query],
                }
                looked += float(pattern[0, query, key]) * bool(counts[kind])
        assert float(scores[layer, 0]) == pytest.approx(looked / 14, abs=1e-9)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_the_cache_splits_the_stream_into_what_attribution_splits_it_into(positions):
    model, tokens = perturbed(positions=positions), prompts(1, 8)
    logits, cache = model.run_with_cache(tokens)
    parts, labels = cache.decompose_resid(layer=-1, return_labels=True)
    assert labels[0] == "embed"
    directions = model.tokens_to_residual_directions(torch.tensor([1, 2]))
    close(directions, model.W_U.T[[1, 2]])
    biases = sum(block.attn.b_O for block in model.blocks)
    close(parts.sum(0) @ model.W_U + model.b_U, logits)
    close(model.accumulated_bias(2, include_mlp_biases=False).to(biases), biases, atol=1e-6)  # theirs is float32

    # What a bias adds by way of a head, they count as the head's, and attribution among the biases.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1].startswith("b_"):
                parameter.zero_()
    _, cache = model.run_with_cache(tokens)
    attribution = hl.attribute(model, tokens[0])
    heads, names = cache.stack_head_results(layer=-1, return_labels=True)
    heads, names = heads[:2], names[:2]  # beside the heads, they list what else there is
    assert names == ["L0H0", "L1H0"]
    written = cache.logit_attrs(heads[:, :, -1:], tokens=1, incorrect_tokens=2, pos_slice=-1, has_batch_dim=True)
    for head, found in zip(ONE_HEAD, written.flatten(), strict=True):
        last = [i for i, path in enumerate(attribution.paths) if path.through and path.through[-1] == head]
        cells = attribution.values[last].sum((0, 1))
        assert float(found) == pytest.approx(float(cells[1] - cells[2]), abs=1e-9)


def test_factored_matrices_are_the_memories_that_were_written():
    strengths = hl.Strengths(6.0, 5.0, 3.0, 1.0)
    model = handwritten(7, strengths=strengths).requires_grad_(False)
    size = model.language.d_vocab
    copying = model.W_E @ model.OV[1, 0] @ model.W_U
    close(copying.AB, strengths.copy * torch.eye(size, dtype=torch.float64))
    previous = model.W_E @ model.OV[0, 0]
    matching = model.W_E @ model.QK[1, 0] @ previous.AB.T
    close(matching.AB, strengths.match * torch.eye(size, dtype=torch.float64))
    scores = model.all_composition_scores("K")
    product = model.OV[0, 0].AB @ model.QK[1, 0].AB.T
    norms = model.OV[0, 0].AB.norm() * model.QK[1, 0].AB.norm()
    assert float(scores[0, 0, 1, 0]) == pytest.approx(float(product.norm() / norms), abs=1e-9)
    assert int(scores.count_nonzero()) == 1
    assert model.all_head_labels() == ["L0H0", "L1H0"]


def test_evals_measure_the_loss_that_theory_gives(model):
    batches = [{"tokens": prompts(3, 9, seed=seed)} for seed in (0, 1)]
    found = evals.evaluate_on_dataset(model, batches, device="cpu")
    with torch.no_grad():
        losses = [
            -model(batch["tokens"])[:, :-1].log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None]).mean()
            for batch in batches
        ]
    assert found == pytest.approx(float(sum(losses)) / 2, abs=1e-9)
