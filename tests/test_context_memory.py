"""The context's memory against the definition (replace the last token, read what the head wrote) and closed form."""

import dataclasses
import functools
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from bridges_for_tests import BOOTED, hooked_twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CIRCUIT,
    D_VOCAB,
    HEADS,
    MLPS,
    close,
    handwritten,
    hooked,
    native,
    perturbed,
    prompts,
    with_factor,
)
from refusals import refused
from strategies import worlds

import hijack_lens as hl
from hijack_lens.core.hook_points import is_hooked
from hijack_lens.memories import conflict as conflict_module
from hijack_lens.memories import context as context_module
from hijack_lens.memories.conflict import MemoryConflict, memory_conflict
from hijack_lens.memories.context import ContextMemory, context_memory

many = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
INDUCTION = CIRCUIT.induction[0]


@st.composite
def cases(draw):
    """A random model of any of many architectures, one of its heads, a prompt and a position in it."""
    seed = draw(st.integers(0, 10**6))
    if draw(st.integers(0, 4)) == 0:  # with relative positions
        model, head = perturbed(seed), hl.Component(draw(st.integers(0, 1)), "head", 0)
    else:
        norm = draw(st.sampled_from([None, "LN", "LNPre", "RMS", "RMSPre"]))
        config = {"use_attn_scale": draw(st.booleans()), "n_key_value_heads": draw(st.sampled_from([None, 1]))}
        config |= draw(
            st.sampled_from([{}, {"positional_embedding_type": "rotary", "rotary_dim": draw(st.sampled_from([2, 4]))}])
        )
        config |= draw(st.sampled_from([{}, {"gated_mlp": True}, {"parallel_attn_mlp": True}, {"attn_only": True}]))
        n_layers = draw(st.integers(1, 4))
        model = hooked(norm, "silu", n_layers, seed, **config)
        head = hl.Component(draw(st.integers(0, n_layers - 1)), "head", draw(st.integers(0, 1)))
    tokens = prompts(1, draw(st.integers(1, 9)), seed)[0]
    return model, head, tokens, draw(st.integers(0, len(tokens) - 1))


def replacements(tokens, position, d_vocab):
    """The prompt with each token in turn at a position; nothing after it is cut off."""
    prompts = []
    for q in range(d_vocab):
        prompts.append(tokens.clone())
        prompts[-1][position] = q
    return torch.stack(prompts)


@torch.no_grad()
def brute_force(model, head, tokens, position):
    """By query token: logits that the head wrote, its attention, its scores."""
    cache = model.run_with_cache(replacements(tokens, position, model.cfg.d_vocab))[1]
    at, key = f"blocks.{head.layer}.attn", slice(position + 1)
    written = cache[f"{at}.hook_z"][:, position, head.head] @ model.blocks[head.layer].attn.W_O[head.head]
    stream = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][:, position]
    attention, scores = (
        cache[f"{at}.{name}"][:, head.head, position, key] for name in ("hook_pattern", "hook_attn_scores")
    )
    return after_final_norm(model, stream, written) @ model.W_U, attention, scores


def after_final_norm(model, stream, written):
    """What the final norm, with the scale that it has for the stream, makes of a part of it."""
    norm = getattr(model, "ln_final", None)
    norm = getattr(norm, "original_component", norm)
    if norm is None or isinstance(norm, torch.nn.Identity):
        return written
    if "RMS" not in type(norm).__name__:
        written, stream = written - written.mean(-1, keepdim=True), stream - stream.mean(-1, keepdim=True)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    weight = getattr(norm, "w", getattr(norm, "weight", 1.0))
    return written / (stream.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@given(case=cases())
@many
def test_rows_are_what_the_head_writes_when_the_last_token_is_replaced(case):
    model, head, tokens, position = case
    memory = context_memory(model, tokens, head, position)
    logits, pattern, _ = brute_force(model, head, tokens, position)
    size = max(1.0, float(logits.abs().max()))  # without norms, deep models' streams grow to any size
    close(memory.values / size, logits / size)
    close(memory.attention, pattern)
    assert memory.values.dtype == torch.float64
    assert not memory.values.requires_grad
    assert not is_hooked(model)


@given(case=cases(), data=st.data())
@settings(many, max_examples=10)
def test_a_row_is_the_sum_of_what_each_position_wrote(case, data):
    model, head, tokens, position = case
    memory = context_memory(model, tokens, head, position)
    query = data.draw(st.integers(0, D_VOCAB - 1))
    by_source = memory.by_source(query)
    size = max(1.0, float(by_source.abs().max()))
    close(by_source.sum(0) / size, memory.values[query] / size)
    # Without all the attention of the others, a position writes the same: values are the context's, not the query's.
    for source in range(position):
        alone = memory.attention[query, source] * memory.value_logits[source] / memory.scale[query]
        close(by_source[source], alone)
        other = (query + 1) % D_VOCAB
        again = memory.by_source(other)[source] * memory.scale[other] / memory.attention[other, source]
        expected = by_source[source] * memory.scale[query] / memory.attention[query, source]
        if min(memory.attention[query, source], memory.attention[other, source]) > 1e-3:
            close(again / size, expected / size, atol=1e-9)


@given(case=cases())
@many
def test_fast_weights_are_the_head_with_scores_in_place_of_their_softmax(case):
    model, head, tokens, position = case
    memory = context_memory(model, tokens, head, position)
    _, _, scores = brute_force(model, head, tokens, position)
    with torch.no_grad():
        v = model.run_with_cache(tokens[None])[1][f"blocks.{head.layer}.attn.hook_v"][0, :position]
        v = v[:, head.head * v.shape[1] // model.cfg.n_heads]
        linear = scores[:, :position] @ (v @ model.blocks[head.layer].attn.W_O[head.head])
    size = max(1.0, float(linear.abs().max()))
    close(memory.query_vectors @ memory.fast_weights.T / size, linear / size)


@pytest.mark.parametrize("options", [{"attn_scores_soft_cap": 2.0}, {"positional_embedding_type": "alibi"}])
def test_scores_that_are_no_products_leave_the_table_but_no_fast_weights(options):
    model, tokens = hooked("LN", n_layers=2, **options), prompts(1, 6)[0]
    memory = context_memory(model, tokens, INDUCTION)
    close(memory.values, brute_force(model, INDUCTION, tokens, 5)[0])
    assert memory.fast_weights is None
    assert memory.query_vectors is None


@pytest.mark.parametrize("family", ["native", *BOOTED])
def test_bridges_hold_the_same_memory(family):
    model, twin = native("LN") if family == "native" else (BOOTED[family](), None)
    tokens, head = prompts(1, 6, d_vocab=model.cfg.d_vocab)[0], hl.Component(1, "head", 1)
    memory = context_memory(model, tokens, head)
    logits, attention, _ = brute_force(model, head, tokens, 5)
    close(memory.values, logits)
    close(memory.attention, attention)
    twin = hooked_twin(model) if twin is None else twin
    theirs = context_memory(twin, tokens, head)
    # Llama's bridge computes norms, and bridges rotary angles and some softmaxes, in float32.
    close(memory.values, theirs.values, atol=1e-5)
    close(memory.query_vectors @ memory.fast_weights.T, theirs.query_vectors @ theirs.fast_weights.T, atol=1e-4)


@given(world=worlds(max_vocab=12, max_length=20, max_batch=1))
@settings(many, max_examples=8)
def test_memories_of_a_model_written_by_hand_are_the_closed_form(world):
    language, strengths = world.language, world.strengths
    tokens, size = world.tokens[0], world.language.d_vocab
    model = hl.associative_transformer(language, **vars(world.setting), n_ctx=40, dtype=torch.float64, device="cpu")
    memory, conflict = context_memory(model, tokens), memory_conflict(model, tokens)
    every = replacements(tokens, len(tokens) - 1, size)
    _, attention = hl.theory.attention(every, language, world.setting)
    mass = (attention[:, -1:] @ torch.nn.functional.one_hot(every, size).double())[:, 0]
    close(memory.values, strengths.copy * mass)
    close(conflict.context, strengths.copy * mass)
    close(conflict.weights, strengths.bigram * language.log_pi_b)
    close(conflict.logits, hl.theory.logits(every, language, world.setting)[:, -1])
    close(conflict.rest, torch.zeros_like(conflict.rest))


CONFLICTS = {
    "written by hand": lambda: (handwritten(), None),
    "perturbed": lambda: (perturbed(), None),
    "two layers": lambda: (hooked("LN"), CIRCUIT),
    "three layers, grouped, rotary": lambda: (
        hooked("RMS", n_layers=3, n_key_value_heads=1, positional_embedding_type="rotary", rotary_dim=4),
        dataclasses.replace(CIRCUIT, bigram=(MLPS[1], hl.Component(2, "mlp"))),
    ),
    "more answers than the stream has dimensions": lambda: (hooked("LN", n_layers=4, d_vocab=19), CIRCUIT),
    **{family: functools.partial(lambda boot: (boot(), CIRCUIT), boot) for family, boot in BOOTED.items()},
}


@pytest.mark.parametrize("kind", CONFLICTS)
def test_memories_sum_to_the_logits_and_winners_are_the_models(kind, monkeypatch):
    model, circuit = CONFLICTS[kind]()
    tokens = prompts(1, 8, d_vocab=model.cfg.d_vocab)[0]
    conflict = memory_conflict(model, tokens, 6, query_tokens=[6, 0, 2], circuit=circuit)
    every = replacements(tokens, 6, model.cfg.d_vocab)
    atol = 1e-10 if kind != "Llama" else 1e-5  # its norms are computed in float32
    predicted, margin = [], conflict.margin
    for q, replaced in enumerate(every[list(conflict.query_tokens)]):
        with torch.no_grad():
            logits = model(replaced[None])[0, 6]
        close(conflict.logits[q], logits, atol)
        close(conflict.context[q] + conflict.weights[q] + conflict.rest[q], logits, atol)
        top, c, g = int(logits.argmax()), int(conflict.context[q].argmax()), int(conflict.weights[q].argmax())
        predicted.append(top)
        alone = hl.attribute(model, replaced[:7], circuit=circuit, answers=range(model.cfg.d_vocab))
        for memory, part in alone.by_memory().items():
            close(getattr(conflict, memory)[q], part, atol)
            close(getattr(margin, memory)[q], part[c] - part[g], atol)
        close(margin.total[q], logits[c] - logits[g], 3 * atol)
        assert bool(conflict.conflicts[q]) == (c != g)
        assert (
            conflict.winners[q]
            == {
                (True, True): "both",
                (True, False): "context",
                (False, True): "weights",
                (False, False): "neither",
            }[top == c, top == g]
        )
    assert conflict.completeness_error <= atol
    table = conflict.to_pandas()
    assert table["predicted"].tolist() == [conflict.answer_texts[i] for i in predicted]
    assert table["winner"].tolist() == list(conflict.winners)
    assert table["occurs"].tolist() == [q in tokens[:6].tolist() for q in conflict.query_tokens]
    np.testing.assert_allclose(table["margin"], table[["context", "weights", "rest"]].sum(axis=1), atol=1e-12)

    monkeypatch.setattr(conflict_module, "_CELLS", 1)
    in_parts = memory_conflict(model, tokens, 6, query_tokens=conflict.query_tokens, circuit=circuit)
    for name in ("context", "weights", "rest", "logits"):
        close(getattr(in_parts, name), getattr(conflict, name), 1e-12 if kind != "Llama" else 1e-5)


def test_the_hijack_is_found_where_it_was_put():
    language = hl.BigramLanguage.from_text(hl.default_text())
    model = hl.associative_transformer(language, dtype=torch.float64, device="cpu")
    prompt = hl.hijack_prompt(language, trigger="q", in_context="e", repeats=3, length=64, seed=0)
    conflict = memory_conflict(model, prompt, query_tokens=["q", "e"])
    row = conflict.row("q")
    candidates = (conflict.in_context[row], conflict.global_candidate[row])
    assert [conflict.answer_texts[i] for i in candidates] == ["e", "u"]
    assert bool(conflict.conflicts[row])
    assert conflict.winners[row] == "context"
    expected = hl.theory.margin(prompt, language)
    for memory in ("context", "weights", "rest"):
        close(getattr(conflict.margin, memory)[row], getattr(expected, memory))


def test_chosen_tokens_in_parts_give_the_same_numbers(monkeypatch):
    model, tokens = hooked("LN", n_layers=3), prompts(1, 9)[0]
    whole = context_memory(model, tokens, INDUCTION, 5)
    monkeypatch.setattr(context_module, "rows_at_once", lambda model, length: 2)
    some = context_memory(model, tokens[:6], INDUCTION, query_tokens=[4, 0, 6], answers=torch.tensor([5, 2]))
    close(some.values, whole.values[[4, 0, 6]][:, [5, 2]], 1e-12)
    close(some.attention, whole.attention[[4, 0, 6]], 1e-12)
    close(some.fast_weights, whole.fast_weights, 1e-12)
    close(some.by_source(6), whole.by_source(6)[:, [5, 2]], 1e-12)
    assert (some.position, some.query_tokens, some.answers) == (5, (4, 0, 6), (5, 2))
    conflict = memory_conflict(model, tokens, 5)
    few = memory_conflict(model, tokens[:6], query_tokens=[3, 1], answers=[1, 0])
    for name in ("context", "weights", "rest", "logits"):
        close(getattr(few, name), getattr(conflict, name)[[3, 1]][:, [1, 0]], 1e-12)


def test_text_picks_tokens():
    language = hl.BigramLanguage.from_text("to be or not to be, that is the question")
    model = hl.associative_transformer(language, n_ctx=24, device="cpu")
    memory = context_memory(model, "or not to b", query_tokens=["t", " "], answers=["o", "e"])
    assert memory.query_texts == ("t", "␣")
    assert memory.answer_texts == ("o", "e")
    assert memory.row(" ") == memory.row("␣") == memory.row(language.index(" ")) == 1
    close(memory.by_source("t"), memory.by_source(language.index("t")), 0)
    assert memory.occurs.tolist() == [True, True]
    assert memory.tokens.tolist() == language.encode("or not to b").tolist()


def test_hooks_of_the_users_take_part():
    model, tokens = perturbed(), prompts(1, 7)[0]
    whole = context_memory(model, tokens).values
    with hl.hooks.ablate(model, model.circuit.previous_token):
        without = context_memory(model, tokens)
        expected = brute_force(model, model.circuit.induction[0], tokens, 6)[0]
    close(without.values, expected)
    assert (without.values - whole).abs().max() > 0.1
    assert not is_hooked(model)
    with hl.hooks.ablate(model, model.circuit.induction), pytest.raises(ValueError, match="does not write its values"):
        context_memory(model, tokens)
    assert not is_hooked(model)


@pytest.mark.usefixtures("global_rng_untouched")
def test_nothing_random_is_touched_and_the_mode_stays():
    model = perturbed().eval()
    a, b = (memory_conflict(model, prompts(1, 7)[0]) for _ in range(2))
    assert torch.equal(a.logits, b.logits)
    assert not model.training


def test_a_saved_result_is_the_same_again(tmp_path):
    model, tokens = perturbed(), prompts(1, 7)[0]
    capped = context_memory(hooked(attn_scores_soft_cap=2.0), tokens, INDUCTION)
    for index, result in enumerate([context_memory(model, tokens), capped, memory_conflict(model, tokens)]):
        path = tmp_path / f"{index}.safetensors"
        result.save(path)
        loaded = type(result).load(path)
        for field in dataclasses.fields(result):
            before, after = getattr(result, field.name), getattr(loaded, field.name)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
        assert loaded.to_pandas().equals(result.to_pandas())
    with pytest.raises(ValueError, match=r"is not a hijack_lens\.ContextMemory"):
        ContextMemory.load(path)
    with pytest.raises(ValueError, match=r"is not a hijack_lens\.MemoryConflict"):
        MemoryConflict.load(tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        MemoryConflict.load(tmp_path / "nothing")


def test_tables_say_what_the_tensors_hold():
    model, tokens = perturbed(), prompts(1, 7)[0]
    memory = context_memory(model, tokens, query_tokens=[1, 3], answers=[2, 0, 6])
    table = memory.to_pandas()
    assert list(table.columns) == ["query", "occurs", "answer", "logit"]
    np.testing.assert_array_equal(table["logit"], memory.values.flatten().numpy())
    texts = model.language.tokens
    assert table["query"].tolist() == [texts[i] for i in (1, 1, 1, 3, 3, 3)]
    assert table["answer"].tolist() == [texts[i] for i in (2, 0, 6)] * 2
    assert table["occurs"].tolist() == [q in tokens[:-1].tolist() for q in (1, 1, 1, 3, 3, 3)]
    seen = next(q for q in range(D_VOCAB) if q in tokens[:-1].tolist())
    text = str(context_memory(model, tokens))
    relative = context_memory(model, tokens).values
    relative = relative - relative.mean(1, keepdim=True)
    assert f"{float(relative[seen].max()):+.3f}" in text
    conflict = memory_conflict(model, tokens)
    in_conflict = next(i for i in range(D_VOCAB) if conflict.conflicts[i] and conflict.occurs[i])
    assert f"{float(conflict.margin.total[in_conflict]):+.3f}" in str(conflict)
    assert "None of the query tokens occurs" in str(context_memory(model, tokens[:1]))


def test_html_is_well_formed_and_escaped():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text = [], ""

        def handle_starttag(self, tag, attrs):
            if tag not in ("path", "use", "rect", "br", "meta", "image"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag in self.open:
                assert self.open.pop() == tag

        def handle_data(self, data):
            self.text += data

    language = hl.BigramLanguage.from_text("a<b<a&b<b&a<")
    model = hl.associative_transformer(language, n_ctx=24, device="cpu")
    for result in (context_memory(model, "a<b&a<b"), memory_conflict(model, "a<b&a<b")):
        page = Tags()
        page.feed(result._repr_html_())
        assert not page.open
        assert "<" in page.text


def test_pictures_show_the_numbers():
    model, tokens = perturbed(), prompts(1, 9)[0]
    conflict = memory_conflict(model, tokens)
    figure = conflict.picture(query_tokens=[0, 1, 2, 3], answers=[0, 2, 5]).figure
    context, weights, margins = figure.axes[0], figure.axes[1], figure.axes[-2]
    for ax, name in ((context, "context"), (weights, "weights")):
        shown = getattr(conflict, name)[:4][:, [0, 2, 5]]
        expected = (shown - shown.mean(1, keepdim=True)).numpy()
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-12)
        assert name in ax.get_title()
        assert ax.get_xlabel() == "answer (bold: in conflict)"
    assert context.images[0].get_clim() == weights.images[0].get_clim()
    margins = next(ax for ax in figure.axes if "margin" in ax.get_title())
    total = next(line for line in margins.lines if line.get_label() == "total")
    rows = [q for q in range(4) if conflict.conflicts[q]]
    np.testing.assert_array_equal(total.get_ydata(), rows)
    np.testing.assert_allclose(total.get_xdata(), conflict.margin.total[rows].numpy())
    memory = context_memory(model, tokens)
    default = memory.picture().figure.axes[0]
    seen = sorted(set(tokens[:-1].tolist()))
    assert [label.get_text() for label in default.get_yticklabels()] == [memory.token_text(q) for q in seen]
    # By default every candidate has a column.
    columns = [label.get_text() for label in conflict.picture().figure.axes[0].get_xticklabels()]
    candidates = (*conflict.in_context[seen], *conflict.global_candidate[seen])
    assert {conflict.answer_texts[i] for i in candidates} <= {*columns}


def of(tokens=None, model=None, **options):
    return lambda: context_memory(model or perturbed(), prompts(1, 5)[0] if tokens is None else tokens, **options)


def against(tokens=None, model=None, **options):
    return lambda: memory_conflict(model or perturbed(), prompts(1, 5)[0] if tokens is None else tokens, **options)


def normed_after():
    model = hooked()
    model.blocks[1].ln1_post = torch.nn.Identity()  # what a bridge calls a norm after attention
    return model


def wrong(result, **changed):
    return lambda: dataclasses.replace(result(), **changed)


test_values_are_refused = refused(
    ValueError,
    {
        "head must be given, since the circuit names 0 induction heads": of(circuit=hl.Circuit()),
        "head must be an attention head, got L1MLP": of(head=MLPS[1]),
        "L0H7 is head 7; the model has 1": of(head=hl.Component(0, "head", 7)),
        "position must be from 0 to 4, the prompt's last position, or count from the end; got 5": of(position=5),
        "position must be from 0 to 4, .* got -6": against(position=-6),
        "prompt must be a single prompt, got a batch of 2": of(prompts(2)),
        "prompt holds token id 7": against(torch.tensor([0, 7])),
        r"query_tokens must be one or several different tokens, got \[\]": of(query_tokens=[]),
        r"query_tokens must be one or several different tokens, got \[1, 1\]": against(query_tokens=[1, 1]),
        "query_tokens holds token id 7": of(query_tokens=[7]),
        "answers holds token id -1": of(answers=[-1]),
        "answers holds the text 'x', but the model has no tokenizer": of(model=hooked(), head=INDUCTION, answers=["x"]),
        "answers must be one or several different tokens": against(answers=[1, 1]),
        "circuit must name an induction head, through which the context speaks; got": against(circuit=hl.Circuit()),
        "circuit must name an induction head, .* got previous-token head: none": against(model=native()[0]),
        "logits are not its last residual stream .* a factor follows": of(model=with_factor(), head=INDUCTION),
        "head L1H0: this model norms or scales what its heads write": lambda: of(
            model=normed_after(), head=INDUCTION
        )(),
        "cfg.output_logits_soft_cap": lambda: of(model=hooked(output_logits_soft_cap=3.0), head=INDUCTION)(),
        "query_token must be among this table's tokens, got 5": lambda: of(query_tokens=[1, 2])().by_source(5),
        "query_tokens must be among this table's tokens, got 'x'": lambda: of()().picture(["x"]),
        "answers must be among this table's tokens, got 3": lambda: against(answers=[1, 2])().picture(answers=[3]),
        "query_tokens must be at least one token, got none": lambda: of()().picture([]),
        "attention must have shape .7, 5., got": wrong(of(), attention=torch.zeros(7, 4)),
        "scale must have shape .7,., got": wrong(of(), scale=torch.zeros(3)),
        "rest must have shape .7, 7., got": wrong(against(), rest=torch.zeros(7, 3)),
    },
)

test_types_are_refused = refused(
    TypeError,
    {
        "model must be a HookedTransformer or TransformerBridge": lambda: context_memory(3, prompts(1)),
        "head must be a Component, .* got 0.5": of(head=0.5),
        "circuit must be a Circuit, got 'induction'": of(circuit="induction"),
        "position must be a position .an int., got 1.5": of(position=1.5),
        r"tokens must be a Tensor \[source\], got tensor\(1\)": wrong(of(), tokens=torch.tensor(1)),
        "query_tokens must be a list of tokens, each a text or an id, got 0.5": of(query_tokens=0.5),
        "query_tokens must be tokens, each a text or an id, got None": against(query_tokens=[None]),
        "answers must be a list of tokens, each a text or an id, got <object": of(answers=object()),
    },
)


@pytest.mark.usefixtures("unchecked")
def test_of_a_large_vocabulary_the_prompts_own_tokens_are_asked_for_unless_all_are():
    model = hooked(d_vocab=20_000)
    own = context_memory(model, torch.tensor([3, 1, 2, 3]), INDUCTION, position=-2)
    assert own.query_tokens == (1, 2, 3)
    assert own.values.shape == (3, 20_000)
    with pytest.raises(ValueError, match="query_tokens and answers must be fewer: 20000 by 20000 tokens take"):
        context_memory(model, torch.tensor([1, 2, 3]), INDUCTION, query_tokens=range(20_000))
    few = context_memory(model, torch.tensor([1, 2, 3]), INDUCTION, query_tokens=[19_999], answers=[5, 7])
    assert few.values.shape == (1, 2)
    assert HEADS[2] == few.head
