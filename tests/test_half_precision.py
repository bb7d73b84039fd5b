"""Models in half precision: metrics and sweeps are computed in float32, and every result shows itself."""

import dataclasses
import tempfile
import warnings

import pytest
import torch
from bridges_for_tests import D_VOCAB, scattered, word_tokenizer
from models_for_tests import CIRCUIT, close, handwritten, hooked, prompts
from torch.distributions import Categorical, kl_divergence
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

import hijack_lens as hl
from hijack_lens import hooks, metrics

ONE, OTHER, CLEAN, CORRUPTED = prompts(1)[0], prompts(1, seed=1)[0], prompts(3), prompts(3, seed=1)


def bridge(dtype):
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    config = GPT2Config(vocab_size=D_VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=4, n_inner=20, **ids)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scattered(GPT2LMHeadModel(config)).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=dtype).eval()
    model.circuit = CIRCUIT
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_metric_of_half_precision_logits_is_that_of_the_same_logits_in_double(dtype):
    generator = torch.Generator().manual_seed(0)
    run, reference = (torch.randn(3, 2, 50_257, generator=generator).to(dtype) for _ in range(2))
    reference = (run + 0.05 * reference).to(dtype)
    p, q = (Categorical(logits=logits[:, -1].double()) for logits in (reference, run))
    truth = kl_divergence(p, q)
    assert float(truth.min()) > 1e-4
    for metric in (metrics.kl(reference), metrics.kl().on(None, clean=reference)):
        found = metric.per_prompt(run)
        assert found.dtype == torch.float32
        close(found.double(), truth, atol=1e-5)
    rows = run[:, -1].double()
    for metric, exact in (
        (metrics.prob(5), rows.softmax(-1)[:, 5]),
        (metrics.log_prob(5), rows.log_softmax(-1)[:, 5]),
        (hl.logit_diff(5, 6), rows[:, 5] - rows[:, 6]),
        (hl.Metric("entropy", lambda logits: Categorical(logits=logits).entropy()), q.entropy()),
    ):
        assert metric.per_prompt(run).dtype == torch.float32
        close(metric.per_prompt(run).double(), exact, atol=2e-5)
        scaled = metric.normalised(reference, run)
        close(scaled(reference), torch.tensor(1.0), atol=1e-3)
        close(scaled(run), torch.tensor(0.0), atol=1e-3)


def difference(logits):
    return (logits[:, -1, 1] - logits[:, -1, 2]).mean()


RESULTS = {
    "attribute": lambda m: hl.attribute(m, ONE),
    "attribute to two answers": lambda m: hl.attribute(m, CLEAN, answers=[1, 2]),
    "explain": lambda m: hl.explain(m, ONE, 1, 2),
    "attribute_scores": lambda m: hl.attribute_scores(m, ONE),
    "log_odds": lambda m: hl.attribute_scores(m, ONE).log_odds(),
    "shapley": lambda m: hl.shapley(m, CLEAN, metrics.kl()),
    "shapley, sampled": lambda m: hl.shapley(m, CLEAN, difference, max_exact=2),
    "find_circuit": lambda m: hl.find_circuit(m, n_prompts=8).evidence,
    "context_memory": lambda m: hl.context_memory(m, ONE),
    "memory_conflict": lambda m: hl.memory_conflict(m, ONE),
    "memory_matrix": lambda m: hl.memory_matrix(m),
    "memory_neurons": lambda m: hl.memory_neurons(m),
    "dose_response": lambda m: hl.dose_response(m, hl.Bigram(1, 2, 3), 3),
    "patch_sweep": lambda m: hooks.patch_sweep(m, CLEAN, CORRUPTED, metrics.kl(), "attn_out"),
    "patch_sweep of a function": lambda m: hooks.patch_sweep(m, ONE, OTHER, difference, "z"),
    "ablate_sweep": lambda m: hooks.ablate_sweep(m, CLEAN, metrics.prob(1), how="mean", reference=CORRUPTED),
    "attribution_patch": lambda m: hooks.attribution_patch(m, CLEAN, CORRUPTED, hl.logit_diff(1, 2), "attn_out"),
    "path_sweep": lambda m: hooks.path_sweep(m, CLEAN, CORRUPTED, hl.logit_diff(1, 2)),
    "edge_attribution": lambda m: hooks.edge_attribution(m, CLEAN, CORRUPTED, difference),
}
MODELS = {
    "BigramTransformer": lambda: handwritten(dtype=torch.float16),
    "TransformerBridge": lambda: bridge(torch.bfloat16),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_result_of_a_half_precision_model_shows_itself_and_holds_float32(name, tmp_path):
    model = MODELS[name]()
    for what, take in RESULTS.items():
        result = take(model)
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            assert not isinstance(value, torch.Tensor) or value.dtype not in (torch.bfloat16, torch.float16), what
        assert repr(result)
        for view in ("to_pandas", "interactions_to_pandas", "by_fact", "_repr_html_"):
            if hasattr(result, view) and (view != "_repr_html_" or name == "BigramTransformer"):  # slow: pictures
                getattr(result, view)()
        if hasattr(result, "load"):
            result.save(tmp_path / "result")
            type(result).load(tmp_path / "result")
        if isinstance(result, hl.Explanation) and name == "BigramTransformer":
            hl.write_report(result, tmp_path / "report.html")
    for estimate, exact in (("attribution_patch", hooks.patch_sweep), ("edge_attribution", hooks.path_sweep)):
        options = ("attn_out",) if estimate == "attribution_patch" else ()
        comparison = RESULTS[estimate](model).compare(
            exact(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2) if options else difference, *options)
        )
        assert len(comparison.to_pandas())
        assert repr(comparison)


def test_a_sweep_of_a_half_precision_model_is_the_metric_of_the_patched_runs_logits():
    model = hooked("LN", dtype=torch.bfloat16)
    sweep = hooks.patch_sweep(model, CLEAN, CORRUPTED, metrics.kl("corrupted"), layers=1, method="forward")
    other = hooks.patch_sweep(
        model, CLEAN, CORRUPTED, lambda logits: logits[:, -1].logsumexp(-1).mean(), layers=1, method="forward"
    )
    assert sweep.values.dtype == other.values.dtype == torch.float32
    with torch.no_grad():
        base = model(CORRUPTED)
        for position in range(CLEAN.shape[1]):
            with hooks.patch(model, "blocks.1.hook_resid_pre", CLEAN, position):
                logits = model(CORRUPTED).double()
            truth = metrics.kl(base.double())(logits)
            close(sweep["resid_pre"].values[0, 0, position].double(), truth, atol=1e-5 + 1e-5 * float(truth))
            close(other["resid_pre"].values[0, 0, position].double(), logits[:, -1].logsumexp(-1).mean(), atol=1e-5)
