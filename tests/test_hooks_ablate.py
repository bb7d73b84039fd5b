"""Switching components off leaves exactly what theory says is left, and what a hand-written hook leaves."""

import pytest
import torch
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, perturbed, prompts

import hijack_lens as hl
from hijack_lens import hooks

SETTINGS = [
    {"positions": "relative"},
    {"positions": "relative", "triggers": [1, 4]},
    {"positions": "relative", "triggers": []},
    {"positions": "absolute", "n_ctx": 14},
    {"positions": "absolute", "n_ctx": 14, "n_ctx_train": 6, "triggers": [2]},
]
MODELS = {
    "perturbed": perturbed,
    "LayerNorm": lambda: hooked("LN"),
    "RMSNorm": lambda: hooked("RMS", "silu"),
    "native bridge": lambda: native("LN")[0],
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def context_by_hand(tokens, model):
    """The context term of design section 2, one position at a time."""
    b1, b2, b3 = model.strengths.previous_token, model.strengths.match, model.strengths.copy
    triggers = range(model.cfg.d_vocab) if model.triggers is None else model.triggers
    last = len(tokens) if model.n_ctx_train is None else model.n_ctx_train
    out = torch.zeros(len(tokens), model.cfg.d_vocab, dtype=torch.float64)
    for t in range(len(tokens)):
        scores = torch.zeros(t + 1, dtype=torch.float64)
        for s in range(t + 1):
            looks_back = torch.tensor([b1 * (r == s - 1 and s < last) for r in range(s + 1)], dtype=torch.float64)
            memory = sum(w for r, w in enumerate(looks_back.softmax(0)) if tokens[r] == tokens[t])
            scores[s] = b2 * memory if int(tokens[t]) in triggers else 0.0
        for s, weight in enumerate(scores.softmax(0)):
            out[t, tokens[s]] += b3 * weight
    return out


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_without_the_induction_head_exactly_the_bigram_memory_is_left(setting):
    model, tokens = handwritten(**setting), prompts(3, 14)
    with hooks.ablate(model, model.circuit.induction):
        logits = model(tokens)
    close(logits.detach(), model.strengths.bigram * model.language.log_pi_b[tokens], atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_without_the_bigram_memory_exactly_the_context_term_is_left(setting):
    model, tokens = handwritten(strengths=hl.Strengths(3.0, 4.0, 5.0, 2.0), **setting), prompts(2, 14)
    with hooks.ablate(model, model.circuit.bigram):
        logits = model(tokens)
    close(logits.detach(), torch.stack([context_by_hand(row, model) for row in tokens]))
    options = {**setting}
    options.pop("n_ctx", None)
    theory = hl.theory.logits(tokens, model.language, hl.theory.Setting(model.strengths, **options))
    close(logits.detach(), theory - 2.0 * model.language.log_pi_b[tokens])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_without_the_previous_token_head_attention_is_blind_to_content(setting):
    model, tokens = handwritten(**setting), prompts(3, 14)
    with hooks.ablate(model, model.circuit.previous_token):
        logits, cache = model.run_with_cache(tokens)
    seen = torch.arange(1, 15, dtype=torch.float64)[:, None]
    close(cache["pattern", 1][:, 0].detach(), (torch.ones(14, 14).double().tril() / seen).expand(3, -1, -1))
    frequencies = torch.nn.functional.one_hot(tokens, 7).double().cumsum(1) / seen
    expected = model.strengths.copy * frequencies + model.strengths.bigram * model.language.log_pi_b[tokens]
    close(logits.detach(), expected)


@pytest.mark.parametrize("positions", [None, 2, -1, [0, -2], (4, 1)], ids=str)
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_heads_and_mlps_are_ablated_as_by_a_hook_written_by_hand(model, how, positions):
    tokens, reference = prompts(3), prompts(4, seed=1)
    where = list(range(5)) if positions is None else [positions] if isinstance(positions, int) else list(positions)
    given = {} if how == "zero" else {"reference": reference}
    _, cache = model.run_with_cache(reference)
    for head in range(model.cfg.n_heads):

        def ablate_head(z, hook, head=head):
            for p in where:
                z[:, p, head] = 0 if how == "zero" else cache["blocks.1.attn.hook_z"][:, p, head].mean(0)
            return z

        expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", ablate_head)])
        with hooks.ablate(model, hl.Component(1, "head", head), how, positions=positions, **given):
            close(model(tokens), expected, atol=1e-12)

    def ablate_mlp(out, hook):
        for p in where:
            out[:, p] = 0 if how == "zero" else cache["blocks.0.hook_mlp_out"][:, p].mean(0)
        return out

    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", ablate_mlp)])
    assert not torch.allclose(expected, model(tokens), atol=0.01)
    with hooks.ablate(model, MLPS[0], how, positions=positions, **given):
        close(model(tokens), expected, atol=1e-12)


@pytest.mark.parametrize("build", [perturbed, lambda: hooked("LNPre")], ids=["perturbed", "LNPre"])
@pytest.mark.parametrize("positions", [None, [0, -2]], ids=str)
def test_a_pattern_of_zeros_reads_nothing_and_a_mean_pattern_is_the_mean(build, positions):
    model, tokens, reference = build(), prompts(3), prompts(4, seed=1)
    head = HEADS[0]
    with hooks.ablate(model, head, part="pattern", positions=positions):
        blind = model(tokens)
    with hooks.ablate(model, head, positions=positions):
        close(blind, model(tokens), atol=1e-12)

    _, cache = model.run_with_cache(reference)
    rows = range(5) if positions is None else [p % 5 for p in positions]

    def mean_rows(pattern, hook):
        for row in rows:
            pattern[:, 0, row] = cache["pattern", 0][:, 0, row].mean(0)
        return pattern

    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", mean_rows)])
    with hooks.ablate(model, head, "mean", reference, positions, part="pattern"):
        close(model(tokens), expected, atol=1e-12)


def test_resampling_gives_each_prompt_what_one_reference_has_and_the_same_one_for_all_components(model):
    tokens, references = prompts(6), prompts(3, seed=1)
    components = [hl.Component(0, "head", 0), hl.Component(1, "mlp")]
    candidates = []
    for reference in references:
        with hooks.patch(model, components, reference):
            candidates.append(model(tokens))
    untouched = torch.get_rng_state()
    resampling = hooks.ablate(model, components, "resample", references, seed=3)
    with resampling:
        logits, again = model(tokens), model(tokens)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert torch.equal(logits, again)
    draws = [
        [i for i, candidate in enumerate(candidates) if torch.allclose(row, candidate[n], rtol=0, atol=1e-12)]
        for n, row in enumerate(logits)
    ]
    assert all(len(draw) == 1 for draw in draws)
    assert len({draw[0] for draw in draws}) > 1
    with hooks.ablate(model, components, "resample", references, seed=4):
        assert not torch.allclose(model(tokens), logits)


def test_several_components_are_ablated_together_as_they_are_in_nested_contexts(model):
    tokens, roles = (
        prompts(),
        [hl.Component(0, "head", 0), hl.Component(1, "head", 0), "blocks.0.hook_mlp_out"],
    )
    with hooks.ablate(model, roles):
        together = model(tokens)
    with hooks.ablate(model, roles[0]), hooks.ablate(model, roles[1]), hooks.ablate(model, roles[2]):
        assert torch.equal(model(tokens), together)
    zeros = [
        ("blocks.0.attn.hook_z", lambda z, hook: z * torch.arange(z.shape[2])[:, None].bool()),
        ("blocks.1.attn.hook_z", lambda z, hook: z * torch.arange(z.shape[2])[:, None].bool()),
        ("blocks.0.hook_mlp_out", lambda out, hook: out * 0),
    ]
    close(together, model.run_with_hooks(tokens, fwd_hooks=zeros), atol=1e-12)


def test_its_fwd_hooks_do_the_same_as_the_context(model):
    tokens = prompts()
    ablation = hooks.ablate(model, [HEADS[0], MLPS[1]], "mean", prompts(3, seed=1), positions=-1)
    with ablation:
        inside = model(tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=ablation.fwd_hooks), inside)
    assert not torch.equal(model(tokens), inside)


def test_a_reference_may_be_tokens_a_prompt_text_or_a_cache():
    model = perturbed()
    prompt = hl.hijack_prompt(model.language, 0, 1, 1, 5, global_candidate=2, seed=0, n_prompts=3)
    tokens, component = prompts(), model.circuit.induction
    _, cache = model.run_with_cache(prompt.tokens)
    _, raw = model.run_with_cache(prompt.tokens, return_cache_object=False)
    with hooks.ablate(model, component, "mean", prompt.tokens):
        expected = model(tokens)
    for reference in (prompt, prompt.text, prompt.tokens.tolist(), cache, raw):
        with hooks.ablate(model, component, "mean", reference):
            assert torch.equal(model(tokens), expected)


def test_a_reference_cache_of_one_prompt_needs_no_batch_axis(model):
    tokens, reference = prompts(), prompts(1, seed=1)
    _, cache = model.run_with_cache(reference)
    _, squeezed = model.run_with_cache(reference, remove_batch_dim=True)
    for component, part in ((HEADS[0], "output"), (MLPS[1], "output")):
        with hooks.ablate(model, component, "mean", cache, part=part):
            expected = model(tokens)
        with hooks.ablate(model, component, "mean", squeezed, part=part):
            close(model(tokens), expected, atol=1e-12)


def test_an_ablated_head_keeps_the_bias_of_its_layer_and_an_ablated_mlp_keeps_none():
    model, tokens = hooked(), prompts()
    with hooks.ablate(model, [head for head in HEADS if head.layer == 0]):
        _, cache = model.run_with_cache(tokens)
    close(cache["attn_out", 0], model.blocks[0].attn.b_O.expand(2, 5, -1), atol=0)
    with hooks.ablate(model, CIRCUIT.bigram):
        _, cache = model.run_with_cache(tokens)
    close(cache["mlp_out", 1], torch.zeros(2, 5, 8, dtype=torch.float64), atol=0)


def test_a_hand_written_model_generates_from_its_bigrams_alone_while_induction_is_off():
    language = hl.BigramLanguage(torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))
    model = hl.associative_transformer(language, n_ctx=16, dtype=torch.float64, device="cpu")
    with hooks.ablate(model, model.circuit.induction):
        generated = model.generate(torch.tensor([[0, 0, 0, 0]]), 6, do_sample=False, verbose=False, stop_at_eos=False)
    assert generated.tolist() == [[0, 0, 0, 0, 1, 2, 0, 1, 2, 0]]
