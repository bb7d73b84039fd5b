"""Models in the states in which people have them: compiled, training, with adapters, broken, intervened upon."""

import tempfile
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from bridges_for_tests import D_MODEL, D_VOCAB, N_CTX, N_HEADS, booted, gpt2_like, llama_like, scattered, word_tokenizer
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, prompts
from peft import LoraConfig, get_peft_model
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hijack_lens as hl
from hijack_lens import core, hooks
from hijack_lens.show.views import attention_patterns

CLEAN, CORRUPTED = prompts(1), prompts(1, seed=1)
METRIC = hl.logit_diff(1, 2)
TWO = hl.Circuit(induction=(HEADS[2],), bigram=(MLPS[1],))

MODELS = {
    "HookedTransformer": lambda: hooked("LN"),
    "native bridge": lambda: native("LN")[0].eval(),
    "GPT-2 bridge": lambda: gpt2_like.__wrapped__(),
}
ANALYSES = {
    "attribute": lambda model: hl.attribute(model, CLEAN[0], circuit=TWO, answers=[1, 2]).values,
    "attribute_scores": lambda model: hl.attribute_scores(model, CLEAN[0], HEADS[2]).values,
    "attribute_sources": lambda model: hl.attribute_sources(model, CLEAN[0], [1, 2], carriers=1).values,
    "shapley": lambda model: hl.shapley(model, CLEAN, METRIC, TWO).values,
    "explain": lambda model: torch.tensor(hl.explain(model, CLEAN[0], 1, 2, circuit=TWO).total),
    "find_circuit": lambda model: hl.find_circuit(model, n_prompts=8).evidence.induction.score,
    "patch_sweep": lambda model: hooks.patch_sweep(model, CLEAN, CORRUPTED, METRIC).values,
    "forward sweep": lambda model: hooks.patch_sweep(model, CLEAN, CORRUPTED, METRIC, method="forward").values,
    "ablate_sweep": lambda model: hooks.ablate_sweep(model, CLEAN, METRIC).values,
    "attribution_patch": lambda model: hooks.attribution_patch(model, CLEAN, CORRUPTED, METRIC).values,
    "path_sweep": lambda model: hooks.path_sweep(model, CLEAN, CORRUPTED, METRIC, TWO).values,
    "edge_attribution": lambda model: hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, TWO).values,
    "context_memory": lambda model: hl.context_memory(model, CLEAN[0], HEADS[2]).values,
    "memory_conflict": lambda model: hl.memory_conflict(model, CLEAN[0], circuit=TWO).context,
    "memory_matrix": lambda model: hl.memory_matrix(model, MLPS[1], language=None).values,
    "memory_neurons": lambda model: hl.memory_neurons(model, MLPS[1]).spread,
    "dose_response": lambda model: hl.dose_response(model, hl.Bigram(3, 1, 2), 3, circuit=TWO).margin.context,
    "attention_patterns": lambda model: next(iter(attention_patterns(model, CLEAN[0], HEADS[2]).values())),
}


def with_dropout():
    config = GPT2Config(
        vocab_size=D_VOCAB, n_positions=N_CTX, n_embd=D_MODEL, n_layer=2, n_head=N_HEADS, n_inner=20,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return booted(scattered(GPT2LMHeadModel(config)))


def flags(model):
    return [module.training for module in (*model.modules(), *getattr(model, "original_model", model).modules())]


# Compiled


COMPILED = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model.compile": lambda model: model.compile(backend="eager") or model,
    "its blocks": lambda model: [block.compile(backend="eager") for block in model.blocks] and model,
}


@pytest.fixture(scope="module", params=[("HookedTransformer", how) for how in COMPILED] + [("GPT-2 bridge", "torch.compile")], ids=str)  # fmt: skip # noqa: E501
def compiled(request):
    """A model compiled, and called before anything else; and its twin that was not."""
    kind, how = request.param
    model = COMPILED[how](MODELS[kind]())
    try:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the type checker cannot be compiled
            model(CLEAN)
            model(CORRUPTED)
    except torch._dynamo.exc.InternalTorchDynamoError:  # seen with bridges on PyTorch 2.6 to 2.10, gone in 2.13
        if kind == "HookedTransformer" or torch.torch_version.TorchVersion(torch.__version__) >= "2.13":
            raise
        pytest.skip("this PyTorch cannot compile a bridge")
    return model, MODELS[kind]()


def test_interventions_act_on_compiled_models_and_their_graphs_come_back(compiled, unchecked):
    model, plain = compiled
    for make in (
        lambda model: hooks.ablate(model, HEADS[0]),
        lambda model: hooks.patch(model, MLPS[0], CORRUPTED),
        lambda model: hooks.patch_path(model, HEADS[0], HEADS[2], "q", CORRUPTED),
    ):
        with torch.no_grad():
            with make(model) as intervention:
                found = model(CLEAN)
            with make(plain):
                expected = plain(CLEAN)
            close(found, expected)
            assert float((expected - plain(CLEAN)).abs().max()) > 1e-3
            if any(core.analysis.is_compiled(block) for block in model.blocks):
                with pytest.raises(ValueError, match="compiled parts, which ignore fwd_hooks"):
                    intervention.fwd_hooks
            else:
                close(model.run_with_hooks(CLEAN, fwd_hooks=intervention.fwd_hooks), expected)
            close(model(CLEAN), plain(CLEAN))
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("name", ANALYSES)
def test_a_compiled_model_is_analysed_as_it_was_written(compiled, name, unchecked):
    model, plain = compiled
    torch.testing.assert_close(ANALYSES[name](model), ANALYSES[name](plain), rtol=0, atol=1e-12, equal_nan=True)
    assert torch._dynamo.eval_frame._stance.stance == "default"


# Threads


@pytest.mark.parametrize("kind", MODELS)
def test_threads_with_one_model_do_not_see_one_another(kind, unchecked):
    model, names = MODELS[kind](), ["patch_sweep", "forward sweep", "attribute_sources"]
    expected, plain = {name: ANALYSES[name](model) for name in names}, model(CLEAN)

    def run(name):
        return [ANALYSES[name](model) if name in ANALYSES else model(CLEAN) for _ in range(6)]

    with ThreadPoolExecutor(8) as pool:
        asked = 2 * [*names, "a plain run"]
        found = list(pool.map(run, asked))
    for name, several in zip(asked, found, strict=True):
        for one in several:
            torch.testing.assert_close(one, expected.get(name, plain), rtol=0, atol=1e-12, equal_nan=True)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


# Training


@pytest.fixture(scope="module")
def dropping():
    return with_dropout()


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_run_without_dropout_and_leave_every_flag(dropping, name, unchecked):
    expected = ANALYSES[name](dropping.eval())
    dropping.train()
    dropping.blocks[1].mlp.eval()
    before = flags(dropping)
    assert True in before and False in before  # noqa: PT018
    assert not torch.equal(dropping(CLEAN), dropping(CLEAN))
    found = ANALYSES[name](dropping)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert flags(dropping) == before


@pytest.fixture(scope="module")
def single():
    """A model in single precision, which autocast would take products of in half."""
    return MODELS["GPT-2 bridge"]().to(torch.float32)


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_run_without_autocast_and_leave_it_on(single, name, unchecked):
    expected = ANALYSES[name](single)
    with torch.autocast("cpu", torch.bfloat16):
        found = ANALYSES[name](single)
        assert single(CLEAN).dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_an_intervention_leaves_the_mode_to_the_user(dropping, unchecked):
    dropping.train()
    with hooks.ablate(dropping, HEADS[0]):
        assert not torch.equal(dropping(CLEAN), dropping(CLEAN))


# Weights that are not what the module computes


def adapted(*targets):
    """A Llama whose linear layers have adapters that change much; and the same with the adapters merged."""
    config = LlamaConfig(
        vocab_size=D_VOCAB, max_position_embeddings=N_CTX, hidden_size=D_MODEL, num_hidden_layers=2,
        num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, intermediate_size=20, tie_word_embeddings=False,
    )  # fmt: skip
    found = []
    for merge in (False, True):
        model = scattered(LlamaForCausalLM(config))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=list(targets), init_lora_weights=False, r=2))
        model = model.merge_and_unload() if merge else model.base_model.model
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            found.append(TransformerBridge.boot_transformers(folder, hf_model=model, dtype=torch.float64).eval())
    return found


@pytest.fixture(scope="module")
def lora():
    return adapted("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


READERS = {
    "path_sweep": r"blocks.\d.attn.[qo], a Linear, does not compute what its W_[QO] says: merge adapters",
    "edge_attribution": r"blocks.\d.attn.[qo], a Linear, does not compute",
    "context_memory": r"blocks.1.attn.o, a Linear, does not compute",
    "attribute": "does not compute|misses the logits|reads cannot be split",
    "memory_neurons": "is not the sum of its neurons",
    "attribute_sources": r"blocks.0.attn.v, a Linear, does not compute",
}


@pytest.mark.parametrize("name", READERS)
def test_adapters_are_refused_where_weights_are_read_until_they_are_merged(lora, name, unchecked):
    model, merged = lora
    close(model(CLEAN), merged(CLEAN))
    with pytest.raises(ValueError, match=READERS[name]):
        ANALYSES[name](model)
    assert ANALYSES[name](merged).isfinite().all()


@pytest.mark.parametrize("name", ["patch_sweep", "shapley", "ablate_sweep", "attribution_patch", "memory_matrix"])
def test_what_only_runs_a_model_takes_its_adapters_along(lora, name, unchecked):
    model, merged = lora
    close(ANALYSES[name](model), ANALYSES[name](merged))


def test_neurons_of_an_adapted_mlp_are_patched_by_whole_runs(lora, unchecked):
    model, merged = lora
    found, expected = (hooks.patch_sweep(one, CLEAN, CORRUPTED, METRIC, "post") for one in (model, merged))
    close(found.values, expected.values)
    assert (found.method, expected.method) == ("forward", "incremental")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrised_weights_are_read_as_what_they_have_become(unchecked):
    for build, module, name in (
        (lambda: hooked("LN"), lambda model: model.blocks[0].attn, "W_O"),
        (lambda: llama_like.__wrapped__(), lambda model: model.blocks[0].attn.o.original_component, "weight"),
    ):
        model, plain = build(), build()
        parametrize.register_parametrization(module(model), name, Doubled())
        with torch.no_grad():
            getattr(module(plain), name).mul_(2)
        close(model(CLEAN), plain(CLEAN))
        sweep = lambda model: hooks.path_sweep(model, CLEAN, CORRUPTED, METRIC, HEADS[:1], via="unembed").values  # noqa: E731
        close(sweep(model), sweep(plain))
        close(ANALYSES["attribute"](model), ANALYSES["attribute"](plain))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_forward_that_was_replaced_is_noticed(kind, part, unchecked):
    model = MODELS[kind]()
    module = getattr(model.blocks[1], part)
    if kind != "HookedTransformer":  # a bridge's own forward cannot be set: that of what it calls can
        module = (module.o if part == "attn" else module.out).original_component
    original = module.forward

    def wrapped(*args, **kwargs):
        output = original(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    module.forward = wrapped
    # What an MLP writes is read off the run; its own weights only where `attribute` splits it.
    for name in ("attribute",) if part == "mlp" else ("path_sweep", "edge_attribution", "attribute", "context_memory"):
        with pytest.raises(ValueError, match=r"forward of its own|misses the logits|does not compute|cannot be split"):
            ANALYSES[name](model)
    brute = hooks.patch_sweep(model, CLEAN, CORRUPTED, METRIC, method="forward").values
    close(ANALYSES["patch_sweep"](model), brute)


# Numbers that are none


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ANALYSES)
def test_weights_that_are_not_finite_are_refused_by_every_analysis(kind, name, unchecked):
    model = MODELS[kind]()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "1" in n and "mlp" in n and p.ndim == 2)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights must be finite, got nan in .*1\.mlp"):
        ANALYSES[name](model)


def test_logits_that_overflow_are_refused_with_the_layer_where_they_do(unchecked):
    for build in MODELS.values():
        model = build()
        with hooks.Intervention(model, edit=[("blocks.0.hook_mlp_out", lambda x, hook: x * 1e200 * 1e200)]):
            for name in ("attribute", "patch_sweep", "shapley", "explain", "find_circuit", "path_sweep"):
                with pytest.raises(ValueError, match=r"logits must be finite.* first at blocks\.1\.hook_resid_pre"):
                    ANALYSES[name](model)


def test_strengths_beyond_the_dtype_are_refused_when_the_model_is_built():
    for strength in ("previous_token", "match", "copy", "bigram"):
        with pytest.raises(ValueError, match=r"strengths must be numbers that torch\.float32 can hold"):
            handwritten(strengths=hl.Strengths(**{strength: 1e300}), dtype=torch.float32)
    language, setting = hl.BigramLanguage.dirichlet(5, seed=0), hl.theory.Setting(hl.Strengths(bigram=1e308))
    with pytest.raises(ValueError, match=r"strengths must be numbers whose logits float64 can hold"):
        hl.theory.logits(torch.tensor([0, 1, 2]), language, setting)


# Inside an intervention


def test_analyses_inside_an_intervention_speak_of_it_or_refuse(unchecked):
    model = handwritten()
    prompt = hl.hijack_prompt(model.language, trigger=0, in_context=1, repeats=3, length=20, seed=0)
    margin = hl.metrics.margin(prompt)
    with hooks.ablate(model, "induction"):
        total = float(margin(model(prompt.tokens[None]).detach()))
        for refused in (
            lambda: hl.attribute(model, prompt),
            lambda: hl.memory_conflict(model, prompt),
            lambda: hl.context_memory(model, prompt),
            lambda: hl.fit_strengths(model),
            lambda: hl.training.memory_recall(model, 10),
        ):
            with pytest.raises(ValueError, match=r"misses the logits|a hook on the model|must have no hooks"):
                refused()
        said = hl.explain(model, prompt)
        assert said.total == pytest.approx(total)
        assert said.attribution is None
        assert "misses the logits" in said.not_split
        worth = hl.shapley(model, prompt, margin)
        assert worth.full == pytest.approx(total)
        assert worth["induction head"] == pytest.approx(0)
        assert not hl.find_circuit(model).induction
        sweep = hooks.ablate_sweep(model, prompt, margin, "z", "all")
        assert sweep.base == pytest.approx(total)
        assert float(sweep.values[0, 1, 0, 0] - sweep.base) == pytest.approx(0)


def test_a_deep_attribution_inside_an_intervention_speaks_of_it_or_refuses(unchecked):
    model = hooked("LN", n_layers=3)
    for off in (MLPS[1], *HEADS):
        with hooks.ablate(model, off), pytest.raises(ValueError, match=r"cannot be split|misses the logits"):
            hl.attribute(model, CLEAN[0], circuit=TWO, answers=[1, 2])
    # What is taken from the run as it was, and not split, may have been changed.
    with hooks.ablate(model, MLPS[0]):
        found = hl.attribute(model, CLEAN[0], circuit=TWO, answers=[1, 2])
        close(found.margin().total, METRIC(model(CLEAN)).detach())
    assert not found.values[[path.through == (MLPS[0],) for path in found.paths]].any()


@pytest.mark.parametrize("kind", MODELS)
def test_two_interventions_on_one_component_act_in_turn(kind, unchecked):
    model = MODELS[kind]()
    with torch.no_grad():
        with hooks.ablate(model, HEADS[0]):
            ablated = model(CLEAN)
        with hooks.ablate(model, HEADS[0]), hooks.ablate(model, HEADS[0]):
            close(model(CLEAN), ablated)
        patch = hooks.patch(model, HEADS[0], CORRUPTED)  # made here, so that its source is the plain model's
        with patch:
            patched = model(CLEAN)
        with hooks.ablate(model, HEADS[0]), patch:
            close(model(CLEAN), patched)
        with patch, hooks.ablate(model, HEADS[0]):
            close(model(CLEAN), ablated)
        with hooks.ablate(model, HEADS[0], positions=[0, 1]), hooks.ablate(model, HEADS[0], positions=[2, 3, 4]):
            close(model(CLEAN), ablated)


def test_a_model_that_changes_its_dtype_inside_keeps_its_intervention(unchecked):
    model, other = hooked("LN"), CIRCUIT.induction[0]
    for make in (
        lambda: hooks.ablate(model, HEADS[0], "mean", CORRUPTED),
        lambda: hooks.patch(model, MLPS[0], CORRUPTED),
        lambda: hooks.patch_path(model, HEADS[0], other, "q", CORRUPTED),
    ):
        with torch.no_grad(), make():
            exact = model(CLEAN)
            model.to(torch.float32)
            close(model(CLEAN).double(), exact, atol=1e-4)
            model.to(torch.float64)
