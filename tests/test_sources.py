"""Logits by source token, against frozen networks: a plain one, and gradients of the models' own frozen runs."""

import contextlib
from unittest import mock

import pytest
import torch
from bridges_for_tests import BOOTED, booted, modern, scattered
from hypothesis import given
from models_for_tests import close, handwritten, hooked, native, prompts
from plain_network import run
from refusals import refused
from test_attribution_deep import deep_models, many
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

import hijack_lens as hl
from hijack_lens import Component, SourceAttribution, attribute_sources, hooks

MODERN = ("Qwen3", "Gemma2", "Gemma3", "Olmo2", "Mistral")


def by_source(result):
    """What embeddings wrote, and what biases did: [source, answer] each."""
    found = {"embed": 0.0, "biases": torch.zeros_like(result.values[0])}
    for path, value in zip(result.paths, result.values, strict=True):
        found[path.source] = found[path.source] + value
    return found["embed"], found["biases"]


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_each_source_is_what_a_frozen_network_writes_of_it_alone(norm, n_layers, act):
    model, tokens, query = hooked(norm, act, n_layers), prompts(2, 6), 4
    result = attribute_sources(model, tokens, [3, 0], position=query)
    frozen = run(model, tokens)
    close(result.logits, frozen.logits[:, query, [3, 0]])

    def alone(position, embeddings, biases):
        here = torch.zeros(2, 6, 1, dtype=torch.float64)
        here[:, position] = 1.0
        kept = here if embeddings else torch.zeros_like(here)

        def edge(sender, receiver, via, message):
            return message * kept if sender in ("embed", "pos_embed") else message

        return run(model, tokens, edge, frozen, here if biases else 0.0).logits[:, query, [3, 0]]

    for row in range(2):
        embed, biases = by_source(result[row])
        for position in range(6):
            close(embed[position], alone(position, True, False)[row], atol=1e-9)
            close(biases[position], alone(position, False, True)[row], atol=1e-9)


def gradients(model, tokens, answers, allowed=None):
    """Embeddings times gradients of the answers' logits, in a HookedTransformer's own run, with all else detached.

    `allowed`: the head whose values alone may bring anything to the last position from before it.
    """
    last, start, z_of = tokens.shape[1] - 1, [], {}

    def hold(activation, hook):
        return activation.detach()

    def keep_gate(activation, hook):
        mlp = model.blocks[hook.layer()].mlp
        if model.cfg.gated_mlp:
            pre, linear = (
                seen[f"blocks.{hook.layer()}.mlp.hook_pre"],
                seen[f"blocks.{hook.layer()}.mlp.hook_pre_linear"],
            )
            return mlp.act_fn(pre).detach() * linear + mlp.b_in
        pre = seen[f"blocks.{hook.layer()}.mlp.hook_pre"]
        return pre * (activation / pre).detach()

    seen = {}

    def keep(activation, hook):
        seen[hook.name] = activation

    def cut(activation, hook):
        layer = hook.layer()
        v = seen[f"blocks.{layer}.attn.hook_v"]
        v = v.repeat_interleave(model.cfg.n_heads // v.shape[2], 2)
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"].detach()
        own = (pattern[:, :, last, last, None] * v[:, last]).clone()
        crossed = torch.einsum("bhs,bshe->bhe", pattern[:, :, last, :last], v[:, :last])
        for head in range(model.cfg.n_heads):
            if Component(layer, "head", head) != allowed:
                crossed = torch.cat(
                    [crossed[:, :head], crossed[:, head : head + 1].detach(), crossed[:, head + 1 :]], 1
                )
        changed = activation.clone()
        changed[:, last] = own + crossed
        return changed

    def begin(activation, hook):
        start.append(activation.detach().requires_grad_())
        return start[0]

    def reached(activation, hook):
        activation.retain_grad()
        z_of[hook.layer()] = activation

    points = [name for name in model.hook_dict if name.endswith(("hook_scale", "attn.hook_pattern"))]
    fwd_hooks = [(name, hold) for name in points] + [("blocks.0.hook_resid_pre", begin)]
    fwd_hooks += [(name, keep) for name in model.hook_dict if name.endswith(("hook_pre", "hook_pre_linear", "hook_v"))]
    fwd_hooks += [(name, keep) for name in model.hook_dict if name.endswith("attn.hook_pattern")]
    fwd_hooks += [(name, keep_gate) for name in model.hook_dict if name.endswith("mlp.hook_post")]
    ends = [(name, reached) for name in model.hook_dict if name.endswith("hook_z")]
    if allowed is not None:
        ends = [(name, cut) for name, _ in ends]
    found, links = [], []
    with torch.enable_grad():
        for answer in answers:
            start.clear()
            logits = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks + ends)
            logits[:, -1, answer].sum().backward()
            found.append((start[0] * start[0].grad).sum(-1).detach())
            if allowed is None:
                links.append(
                    torch.stack(
                        [
                            torch.einsum(
                                "bhs,bshe,bhe->bhs",
                                seen[f"blocks.{layer}.attn.hook_pattern"][:, :, last],
                                seen[f"blocks.{layer}.attn.hook_v"].repeat_interleave(
                                    model.cfg.n_heads // seen[f"blocks.{layer}.attn.hook_v"].shape[2], 2
                                ),
                                z_of[layer].grad[:, last],
                            )
                            for layer in range(model.cfg.n_layers)
                        ],
                        1,
                    ).detach()
                )
            model.zero_grad()
    return torch.stack(found, -1), torch.stack(links, -1) if links else None


@given(built=deep_models())
@many
def test_any_architecture_against_gradients_of_its_own_frozen_run(built, unchecked):
    model, tokens = built[0], prompts(2, 5)
    heads = (Component(model.cfg.n_layers - 1, "head", 0), Component(0, "head", 1))
    result = attribute_sources(model, tokens, [1, 4], carriers=heads)
    embed, links = gradients(model, tokens, [1, 4])
    for row in range(2):
        close(by_source(result[row])[0], embed[row], atol=1e-8)
    close(result.links, links, atol=1e-8)
    for carrier in heads:
        expected = gradients(model, tokens, [1, 4], carrier)[0][:, :-1]
        chosen = [index for index, path in enumerate(result.paths) if path.through == (carrier,)]
        close(result.values[:, chosen].sum(1)[:, :-1], expected, atol=1e-8)


@contextlib.contextmanager
def frozen(model):
    """A Hugging Face model, with the patterns, scales, gates and caps of every run held."""
    softmax, tanh = torch.nn.functional.softmax, torch.tanh

    def hold_scale(module, arguments, out):
        (x,) = arguments
        if isinstance(module, torch.nn.LayerNorm):
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt().detach()
            return centred / scale * module.weight + module.bias
        return x * (out / x).detach()

    def hold_gate(module, arguments, out):
        return out.detach()

    def hold_slope(module, arguments, out):
        return arguments[0] * (out / arguments[0]).detach()

    handles = []
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            handles.append(module.register_forward_hook(hold_scale))
        elif name.endswith(("act_fn", "mlp.act")):
            gated = hasattr(model.get_submodule(name.rsplit(".", 1)[0]), "gate_proj")
            handles.append(module.register_forward_hook(hold_gate if gated else hold_slope))
    with (
        mock.patch("torch.nn.functional.softmax", lambda *args, **kwargs: softmax(*args, **kwargs).detach()),
        mock.patch("torch.tanh", lambda x: x * (tanh(x) / x).detach()),
    ):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def embedding_gradients(model, tokens, answers):
    """Embeddings times gradients in a frozen run of a Hugging Face model, all positions' shares included."""
    found = []
    for answer in answers:
        start = []

        def begin(module, arguments, start=start):
            start.append(arguments[0].detach().requires_grad_())
            return (start[0], *arguments[1:])

        first = next(module for name, module in model.named_modules() if name.endswith(("layers.0", "h.0")))
        handle = first.register_forward_pre_hook(begin)
        with frozen(model), torch.enable_grad():
            logits = model(tokens, use_cache=False).logits
            logits[:, -1, answer].sum().backward()
        handle.remove()
        found.append((start[0] * start[0].grad).sum(-1).detach())
    return torch.stack(found, -1), logits[:, -1, list(answers)].detach()


BRIDGES = {**BOOTED, **{name: (lambda name=name: modern(name)) for name in MODERN}}


@pytest.mark.parametrize("family", BRIDGES)
def test_bridges_against_gradients_of_hugging_faces_own_frozen_run(family):
    bridge, tokens = BRIDGES[family](), prompts(2, 6, d_vocab=13)
    bridge.hugging_face[0].eval().config._attn_implementation = "eager"
    result = attribute_sources(bridge, tokens, [2, 9])
    embed, logits = embedding_gradients(bridge.hugging_face[0], tokens, (2, 9))
    size = float(embed.abs().max())
    close(result.logits, logits, atol=1e-5 * float(logits.abs().max()))  # Gemma's and Llama's norms are in float32
    for row in range(2):
        close(by_source(result[row])[0], embed[row], atol=1e-5 * size)
    assert result.completeness_error <= 1e-6 * size


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_a_native_bridge_is_its_twin(norm):
    bridge, twin = native(norm)
    tokens = prompts(2, 6)
    found, expected = (attribute_sources(model, tokens, [1, 2], carriers=2) for model in (bridge, twin))
    close(found.values, expected.values, atol=1e-5 if norm == "RMS" else 1e-9)  # this bridge's norm is in float32
    close(found.links, expected.links, atol=1e-5 if norm == "RMS" else 1e-9)


def test_factors_of_the_residual_stream_and_the_logits_are_followed_or_refused():
    config = GraniteConfig(
        vocab_size=13,
        max_position_embeddings=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        residual_multiplier=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    bridge, tokens = booted(scattered(GraniteForCausalLM(config))), prompts(1, 5, d_vocab=13)
    result = attribute_sources(bridge, tokens[0], [2, 9])
    close(result.values.sum((0, 1)), result.logits, atol=1e-5 * float(result.values.abs().max()))
    config.logits_scaling = 3.0
    with pytest.raises(ValueError, match="misses the logits"):
        attribute_sources(booted(scattered(GraniteForCausalLM(config))), tokens[0], [2, 9])


def test_a_logit_cap_that_is_reached_is_no_loss():
    model, tokens = hooked("LN", output_logits_soft_cap=2.0, dtype=torch.float32), prompts(1, 5)[0]
    with torch.no_grad():
        model.unembed.W_U *= 20
    result = attribute_sources(model, tokens, [1, 2])
    assert float(result.logits.abs().max()) == 2.0
    assert result.completeness_error < 1e-5


def test_a_position_within_the_prompt_is_the_prompt_up_to_there():
    model, tokens = hooked("LN", n_layers=3), prompts(2, 7)
    within = attribute_sources(model, tokens, [1, 2], position=3, context=[0, 2], carriers=2)
    upto = attribute_sources(model, tokens[:, :4], [1, 2], context=[0, 2], carriers=2)
    close(within.values[:, :, :4], upto.values)
    close(within.links[..., :4, :], upto.links)
    assert within.values.shape[2] == 7
    assert not within.values[:, :, 4:].any()


def test_each_prompt_of_a_batch_is_as_it_is_alone():
    model, tokens = hooked("RMS", n_layers=3), prompts(3, 6)
    heads = (Component(2, "head", 1), Component(1, "head", 0))
    together = attribute_sources(model, tokens, [1, 2], context=[1, 2], carriers=heads)
    for row in range(3):
        alone = attribute_sources(model, tokens[row], [1, 2], context=[1, 2], carriers=heads)
        close(together[row].values, alone.values)
        close(together[row].links, alone.links)
        assert together[row].paths == alone.paths


def test_heads_that_are_off_bring_nothing():
    model, tokens = hooked("LN", n_layers=3), prompts(1, 6)[0]
    off = Component(1, "head", 0)
    with hooks.ablate(model, off), pytest.raises(ValueError, match="misses the logits"):
        attribute_sources(model, tokens, [1, 2])


def test_memories_share_the_logits_by_where_they_entered():
    model, tokens = hooked("LN", n_layers=3), prompts(1, 6)[0]
    result = attribute_sources(model, tokens, [1, 2], context=[2, 3])
    embed, biases = by_source(result)
    parts = result.by_memory()
    close(parts["context"], embed[[2, 3]].sum(0))
    close(parts["weights"], embed[[0, 1, 4, 5]].sum(0) + biases.sum(0))
    assert not parts["rest"].any()
    margin = result.margin(1, 2)
    close(margin.total, result.logits[0] - result.logits[1])
    labels = {path.label: result.values[index] for index, path in enumerate(result.paths)}
    assert list(labels) == ["context", "first token", "query", "biases"]
    close(labels["first token"][0], embed[0])
    assert not labels["first token"][1:].any()
    close(result.by_token(), embed)


def test_without_text_the_context_is_all_but_the_first_token_and_the_query():
    model, tokens = hooked("LN", n_layers=3), prompts(1, 6)[0]
    default, given_ = (attribute_sources(model, tokens, [1, 2], context=c) for c in (None, range(1, 5)))
    close(default.values, given_.values)


def test_in_the_two_layer_model_the_context_is_what_the_induction_head_copies():
    model = handwritten(20, strengths=hl.Strengths(match=8.0, copy=4.0))
    prompt = hl.hijack_prompt(model.language, 3, 5, repeats=2, length=20, seed=0)
    found = attribute_sources(model, prompt).margin()
    own = hl.attribute(model, prompt).by_source()["context"][-1]  # what the induction head reads at the query itself
    expected = hl.attribute(model, prompt).margin()
    close(found.total, expected.total)
    c, g = prompt.in_context, prompt.global_candidate
    close(found.context, expected.context - (own[c] - own[g]), atol=1e-9)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ("one two", ["one", "two"]),
        (["one", "three four"], ["one", "three", "four"]),
        ("zero one", ["zero", "one"]),
        ([2, -2], ["one", "a"]),
        (3, ["two"]),
        (torch.tensor([3, 4]), ["two", "six"]),
    ],
)
def test_a_context_is_text_or_positions(context, words):
    text = "zero one two six three four eight a b"
    ids = torch.tensor([0, *BOOTED["Llama"]().tokenizer.convert_tokens_to_ids(text.split())])  # "<end>" comes first
    result = attribute_sources(BOOTED["Llama"](), ids, ["a", "b"], context=context)
    shares = result.by_source()["context"].abs().sum(-1)
    assert [result.source_texts()[i] for i in shares.nonzero().flatten()] == words


def test_by_default_the_context_of_a_text_is_all_before_its_last_sentence():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", *"abcdefghij", ".", "?"])}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = hooked("LN", n_layers=3, d_vocab=13)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<end>", bos_token="<end>")
    cases = {"a b . c d": "b.", "a b c d": "", "a b ? c . d": "b?c.", "a . b . c .": ".b."}
    for text, expected in cases.items():
        ids = torch.tensor(tokenizer.encode(text).ids)
        result = attribute_sources(model, ids, [1, 2])
        shares = result.by_source()["context"].abs().sum(-1)
        assert "".join(result.source_texts()[i] for i in shares.nonzero().flatten()) == expected, text


def test_it_shows_saves_and_ranks_itself(tmp_path):
    model, tokens = hooked("LN", n_layers=3), prompts(1, 6)[0]
    result = attribute_sources(model, tokens, [1, 2], carriers=2)
    result.save(tmp_path / "sources")
    again = SourceAttribution.load(tmp_path / "sources")
    close(again.links, result.links)
    assert again.paths == result.paths
    brought = result.links[..., 0] - result.links[..., 1]
    table = result.by_head(4)
    assert table["margin"].abs().is_monotonic_decreasing
    for row in table.itertuples():
        component = Component.of(row.head)
        mine = brought[component.layer, component.head]
        assert row.margin == pytest.approx(float(mine[1:-1].sum()))
        assert row.from_token == pytest.approx(float(mine[row.position]))
        assert abs(row.from_token) == pytest.approx(float(mine[1:-1].abs().max()))
        assert row.sink == pytest.approx(float(mine[0]))
    carriers = {path.through[0] for path in result.paths if path.through}
    assert {str(head) for head in carriers} == set(table["head"][:2])
    shown, html = str(result), result._repr_html_()
    for text in ("SourceAttribution", "context → ", "first token", "brought by heads"):
        assert text in shown
    assert "by all routes" in html
    assert table["head"][0] in html


test_bad_input_is_refused = refused(
    ValueError,
    {
        "context must be a part of the prompt, got 'nine'": lambda: attribute_sources(
            BOOTED["Llama"](), "zero one", ["a", "b"], context="nine"
        ),
        "context must lie before the position 3": lambda: attribute_sources(
            hooked(), prompts(1, 4)[0], [1, 2], context=[3]
        ),
        "context is the text 'a', but the model has no tokenizer": lambda: attribute_sources(
            hooked(), prompts(1, 4)[0], [1, 2], context="a"
        ),
        "context holds 9; the prompt has 4 tokens": lambda: attribute_sources(
            hooked(), prompts(1, 4)[0], [1, 2], context=9
        ),
        "position must be from 0 to 3": lambda: attribute_sources(hooked(), prompts(1, 4)[0], [1, 2], position=4),
        "answers must be given for a batch": lambda: attribute_sources(hooked(), prompts(2, 4)),
        "carriers must be at least 0": lambda: attribute_sources(hooked(), prompts(1, 4)[0], [1, 2], carriers=-1),
        "carriers must be attention heads": lambda: attribute_sources(
            hooked(), prompts(1, 4)[0], [1, 2], carriers="L0MLP"
        ),
        "context must hold at least one text or position, got none": lambda: attribute_sources(
            hooked(), prompts(1, 4)[0], [1, 2], context=[]
        ),
        "context must lie before the position 2 that is asked for, and after its first token, got 'b'": lambda: (
            attribute_sources(BOOTED["Llama"](), torch.tensor([0, 2, 12]), ["a", "b"], context="b")
        ),
        "model attends to later positions": lambda: attribute_sources(
            hooked("LN", attention_dir="bidirectional"), prompts(1, 4)[0], [1, 2]
        ),
        "a norm inside the MLP": lambda: attribute_sources(
            hooked("LN", "gelu", 3, act_fn="solu_ln"), prompts(1, 4)[0], [1, 2]
        ),
    },
)
