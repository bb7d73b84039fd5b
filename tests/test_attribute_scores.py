"""Attention scores by path against the model's own scores, and cell by cell against knock-outs in plain torch."""

import functools
import math
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from bridges_for_tests import BOOTED, hooked_twin, modern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, perturbed, prompts, with_sink
from plain_families import plain_of_hooked
from refusals import refused
from strategies import seeds
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens import ScoreAttribution, attribute_scores
from hijack_lens.models.architecture import RelativeAttention

many = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PREVIOUS, INDUCTION = CIRCUIT.previous_token[0], CIRCUIT.induction[0]


def relative(model, layer, n_offsets=3):
    """The model with random keys per offset in one layer."""
    old, attn = model.blocks[layer].attn, RelativeAttention(model.cfg, n_offsets, layer)
    attn.load_state_dict(old.state_dict(), strict=False)
    with torch.no_grad():
        attn.W_R.copy_(torch.randn(attn.W_R.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    model.blocks[layer].attn = attn
    model.setup()
    return model


@st.composite
def cases(draw):
    """A random model of any of many architectures, one of its heads, and a prompt."""
    norm = draw(st.sampled_from([None, "LN", "LNPre", "RMS", "RMSPre"]))
    n_layers, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10**6))
    positions = draw(st.sampled_from(["standard", "relative", "rotary", "half rotary"]))
    config = {"use_attn_scale": draw(st.booleans())}
    if positions != "relative":
        config["use_qk_norm"] = draw(st.booleans())
    if "rotary" in positions:
        config |= {"positional_embedding_type": "rotary", "rotary_dim": 4 if positions == "rotary" else 2}
    if positions != "relative":
        config["n_key_value_heads"] = draw(st.sampled_from([None, 1]))
    kind = draw(st.sampled_from(["plain", "gated", "parallel", "attention only"]))
    config |= {"gated": {"gated_mlp": True}, "parallel": {"parallel_attn_mlp": True}}.get(kind, {})
    if kind == "attention only":
        config["attn_only"] = True
    model = hooked(norm, "silu", n_layers, seed, **config)
    head = hl.Component(draw(st.integers(0, n_layers - 1)), "head", draw(st.integers(0, 1)))
    if draw(st.booleans()):
        with torch.no_grad():
            model.unembed.W_U.copy_(model.W_E.T)  # tied embeddings
    if positions == "relative":
        relative(model, head.layer)
    return model, head, prompts(1, draw(st.integers(1, 9)), seed)


def weights_of(model):
    return {name.replace("._", "."): value.detach() for name, value in model.named_parameters()}


def stream_parts(model, tokens, layer):
    """What the stream before a layer is made of, from plain weights and the activations that TransformerLens stores."""
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    w, length = weights_of(model), tokens.shape[1]
    parts = {"embed": w["embed.W_E"][tokens[0]]}
    if "pos_embed.W_pos" in w:
        parts["pos_embed"] = w["pos_embed.W_pos"][:length]
    for before in range(layer):
        for head in range(model.cfg.n_heads):
            z = cache[f"blocks.{before}.attn.hook_z"][0, :, head]
            parts[hl.Component(before, "head", head)] = z @ w[f"blocks.{before}.attn.W_O"][head]
        if not model.cfg.attn_only:
            parts[hl.Component(before, "mlp")] = cache[f"blocks.{before}.hook_mlp_out"][0]
    biases = [w[f"blocks.{before}.attn.b_O"].expand_as(parts["embed"]) for before in range(layer)]
    return parts | {"biases": sum(biases, torch.zeros_like(parts["embed"]))}


def vectors(model, parts, head, via, alive, normed=True):
    """The head's queries or keys, made from some parts of the stream with the norm's scale of the whole of it."""
    w, at, cfg = weights_of(model), f"blocks.{head.layer}", model.cfg
    x = sum((part for name, part in parts.items() if name in alive), torch.zeros_like(parts["embed"]))
    whole, norm_bias = sum(parts.values()), torch.zeros_like(x)
    if cfg.normalization_type is not None:
        if cfg.normalization_type.startswith("LN"):
            x, whole = x - x.mean(-1, keepdim=True), whole - whole.mean(-1, keepdim=True)
        x = x / (whole.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * w.get(f"{at}.ln1.w", 1.0)
        norm_bias = norm_bias + w.get(f"{at}.ln1.b", 0.0)
    weight, bias = w[f"{at}.attn.W_{via.upper()}"], w[f"{at}.attn.b_{via.upper()}"]
    index = head.head * len(weight) // cfg.n_heads
    out = x @ weight[index]
    constant = norm_bias @ weight[index] + bias[index]
    if "biases" in alive:
        out = out + constant
    if getattr(cfg, "use_qk_norm", False):  # with the scale of the run's whole query or key
        made = vectors(model, parts, head, via, set(parts) | {"biases"}, normed=False) if normed else None
        if made is not None:
            out = out / (made.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * w[f"{at}.attn.{via}_norm.w"]
    if not normed:
        return out
    return plain_of_hooked(model).rotate(out[None, :, None])[0, :, 0]


def knocked_out(model, parts, head, query, key, a, b):
    """What the score loses with a term of the query and a term of the key, beyond what it loses with either alone."""
    offset_keys = weights_of(model).get(f"blocks.{head.layer}.attn.W_R")

    def score(query_alive, key_alive):
        q = vectors(model, parts, head, "q", query_alive)[query]
        k = vectors(model, parts, head, "k", key_alive)[key]
        if offset_keys is not None and "offset" in key_alive and query - key < offset_keys.shape[1]:
            k = k + offset_keys[head.head, query - key]
        return q @ k / (math.sqrt(model.cfg.d_head) if model.cfg.use_attn_scale else 1.0)

    terms = {*parts, "offset"}
    both = score(terms, terms) - score(terms - {a}, terms) - score(terms, terms - {b}) + score(terms - {a}, terms - {b})
    # Without norms the stream of a deep model may grow to any size; what these scores differ by is rounded with them.
    size = max(1.0, float(score(terms, terms).abs()))
    close(score({a}, {b}) / size, both / size)
    return score({a}, {b})


@given(case=cases(), data=st.data())
@many
def test_cells_add_up_to_the_scores_that_transformer_lens_records(case, data):
    model, head, tokens = case
    query = data.draw(st.integers(0, tokens.shape[1] - 1))
    result = attribute_scores(model, tokens[0], head, query)
    recorded = model.run_with_cache(tokens)[1][f"blocks.{head.layer}.attn.hook_attn_scores"].detach()
    # Without norms the stream of a deep model may grow to any size, and rounding with it.
    size = max(1.0, float(result.values.abs().sum((1, 2)).max()))
    close(result.values.sum((1, 2)) / size, recorded[0, head.head, query, : query + 1] / size)
    close(result.scores.softmax(0), result.attention)
    assert result.completeness_error <= 1e-10 * size
    assert result.values.dtype == torch.float64
    assert not result.values.requires_grad


@given(case=cases(), data=st.data())
@settings(many, max_examples=20)
def test_each_cell_is_what_its_two_terms_do_together(case, data):
    model, head, tokens = case
    query = data.draw(st.integers(0, tokens.shape[1] - 1))
    key = data.draw(st.integers(0, query))
    result = attribute_scores(model, tokens, head, query, key)
    parts = stream_parts(model, tokens, head.layer)
    names = set(parts)
    has_offsets = isinstance(model.blocks[head.layer].attn, RelativeAttention)
    assert set(result.query_terms) == names
    assert set(result.key_terms) == names | ({"offset"} if has_offsets else set())
    pairs = [(a, b) for a in result.query_terms for b in result.key_terms]
    for a, b in data.draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=8, unique=True)):
        expected = knocked_out(model, parts, head, query, key, a, b)
        size = max(1.0, float(expected.abs()))
        close(result.cell(a, b)[0] / size, expected / size)


@pytest.mark.parametrize("build", [lambda: perturbed(), lambda: hooked("LN", n_layers=3)], ids=["relative", "deep"])
def test_every_cell_is_what_its_two_terms_do_together(build):
    model, tokens = build(), prompts(1, 6, seed=4)
    head = hl.Component(model.cfg.n_layers - 1, "head", 0)
    result, parts, sizes = attribute_scores(model, tokens, head, 4), stream_parts(model, tokens, head.layer), []
    for key in (0, 3, 4):
        for a in result.query_terms:
            for b in result.key_terms:
                expected = knocked_out(model, parts, head, 4, key, a, b)
                close(result.cell(a, b)[key], expected)
                sizes.append(abs(float(expected)))
    # Cells that are nothing would be no test.
    assert min(sizes) > 1e-6
    assert max(sizes) > 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},  # GPT-J's
        {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True},
        {"norm": "LN", "act": "solu_ln", "post_embedding_ln": True},
        {"output_logits_soft_cap": 30.0},
        {"norm": "RMS", "use_qk_norm": True, "use_normalization_before_and_after": True, "n_key_value_heads": 1},
        {
            "norm": "RMS",
            "original_architecture": "Olmo2ForCausalLM",
            "positional_embedding_type": "rotary",
            "rotary_dim": 4,
        },
    ],
    ids=str,
)
def test_cells_add_up_to_the_scores_of_rarer_models(config):
    model, tokens = hooked(**config), prompts(1, 8)
    recorded = model.run_with_cache(tokens)[1]["blocks.1.attn.hook_attn_scores"].detach()
    for head in HEADS[2:]:
        close(attribute_scores(model, tokens, head).values.sum((1, 2)), recorded[0, head.head, -1])


def test_float32_models_stay_in_float32():
    for model in (perturbed(dtype=torch.float32), hooked("LN", n_layers=4, dtype=torch.float32)):
        result = attribute_scores(model, prompts(1, 8))
        assert result.values.dtype == result.scores.dtype == torch.float32
        assert result.completeness_error <= 1e-5 * float(result.values.abs().sum((1, 2)).max())


@functools.cache
def bridge(name):
    """A bridge, and a HookedTransformer with its weights."""
    return native("LN" if "LN" in name else None) if "native" in name else (BOOTED[name](), hooked_twin(BOOTED[name]()))


@pytest.mark.parametrize(
    ("name", "atol", "twins_atol"),
    # Hugging Face computes rotary angles, and Llama's norms and patterns, in float32 whatever the model's dtype.
    [
        ("native", 1e-10, 1e-10),
        ("native LN", 1e-10, 1e-10),
        ("GPT-2", 1e-10, 1e-10),
        ("GPT-NeoX", 1e-10, 1e-6),
        ("Llama", 1e-5, 1e-5),
    ],
)
def test_bridges_scores_explain_their_patterns_as_their_twins_do(name, atol, twins_atol):
    model, twin = bridge(name)
    assert isinstance(model, TransformerBridge)
    tokens = prompts(1, 7, seed=2)
    for layer in (0, 1):
        pattern = model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_pattern"].detach()
        for index in range(model.cfg.n_heads):
            head = hl.Component(layer, "head", index)
            result, theirs = (attribute_scores(one, tokens, head, query=5) for one in (model, twin))
            assert result.query_terms == theirs.query_terms
            close(result.values, theirs.values, atol=twins_atol)
            log = pattern[0, index, 5, :6].log()
            summed = result.values.sum((1, 2))
            likely = log > math.log(1e-4)  # elsewhere the pattern's own rounding shows
            close((summed - summed[result.top_key])[likely], (log - log[result.top_key])[likely], atol=atol)
            close(result.attention, pattern[0, index, 5, :6], atol=0)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma3", "Olmo2", "Mistral"])
def test_scores_of_modern_bridges_explain_their_patterns_within_their_windows(name):
    model, tokens = modern(name), prompts(1, 9, seed=2, d_vocab=13)
    cache = model.run_with_cache(tokens)[1]
    for layer, index in ((0, 0), (0, 3), (1, 1), (1, 2)):
        result = attribute_scores(model, tokens, hl.Component(layer, "head", index))
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, index, -1].detach()
        windowed = name == "Mistral" or (name == "Gemma3" and layer == 0)
        assert result.keys == (tuple(range(5, 9)) if windowed else tuple(range(9)))
        close(result.attention, pattern[list(result.keys)], atol=0)
        # Hugging Face computes norms, rotary angles and the softmax in float32, whatever the model's dtype.
        summed = result.values.sum((1, 2))
        size = float(result.values.abs().sum((1, 2)).max())
        close(summed.softmax(0), result.attention, atol=2e-6 * max(1.0, size))
        assert result.completeness_error <= 2e-6 * max(1.0, size)
        assert float(pattern.max()) < 1 - 1e-6  # so that scores show in it
        if windowed:
            with pytest.raises(ValueError, match=r"key must hold no positions that head .* got \[4\]"):
                attribute_scores(model, tokens, hl.Component(layer, "head", index), key=[4, 6])


@given(
    seed=seeds,
    strengths=st.builds(hl.Strengths, *[st.floats(0.1, top) for top in (20.0, 8.0, 12.0, 3.0)]),
    absolute=st.booleans(),
    triggers=st.none() | st.just([1, 2, 3]),
)
@many
def test_the_hand_written_induction_head_composes_with_the_previous_token_head_alone(
    seed, strengths, absolute, triggers
):
    options = {"positions": "absolute"} if absolute else {}
    model = handwritten(seed=seed % 1000, strengths=strengths, triggers=triggers, **options)
    tokens, query = prompts(1, 9, seed), 8
    result = attribute_scores(model, tokens, query=query)
    setting = hl.theory.Setting(strengths, triggers, **options)
    first, second = hl.theory.attention(tokens[0], model.language, setting)
    q = tokens[0, query]
    # b2 [q in Q] m_s(q), with m_s(q) = sum_{s' <= s} A1[s, s'] [z_s' == q]: design, section 2
    remembered = first @ (tokens[0] == q).double()
    expected = strengths.match * remembered * (triggers is None or int(q) in triggers)
    close(result.cell("embed", model.circuit.previous_token), expected)
    close(result.values.sum((1, 2)), expected)
    close(result.values.abs().sum((1, 2)), expected)  # so every other cell is nothing
    close(result.attention, second[query])


def test_the_hand_written_previous_token_head_looks_back_by_offset_or_by_position():
    strengths = hl.Strengths(previous_token=4.0)
    back = torch.tensor([0.0, 0, 0, 4, 0], dtype=torch.float64)
    by_offset = attribute_scores(handwritten(strengths=strengths), prompts(1), HEADS[0])
    close(by_offset.cell("embed", "offset"), back)
    close(by_offset.values.abs().sum(), torch.tensor(4.0, dtype=torch.float64))
    model = handwritten(strengths=strengths, positions="absolute")
    by_position = attribute_scores(model, prompts(1), model.circuit.previous_token)
    close(by_position.cell("pos_embed", "pos_embed"), back)
    assert by_position.key_terms == ("embed", "pos_embed", "biases")


@given(seed=st.integers(0, 10**6), length=st.integers(2, 9), data=st.data())
@settings(many, max_examples=15)
def test_log_odds_are_those_of_the_pattern_and_split_but_for_the_competitors_entropy(seed, length, data):
    model, tokens = perturbed(seed % 50), prompts(1, length, seed)
    result, query = attribute_scores(model, tokens), length - 1
    pattern = model.run_with_cache(tokens)[1]["blocks.1.attn.hook_pattern"].detach()[0, 0, query]
    key = data.draw(st.integers(0, query))
    others = data.draw(st.lists(st.sampled_from([p for p in range(length) if p != key]), min_size=1, unique=True))
    for given_, chosen in ((others, others), (None, [p for p in range(length) if p != key]), (others[0], others[:1])):
        odds = result.log_odds(key, given_)
        shares = [float(pattern[other] / pattern[chosen].sum()) for other in chosen]
        entropy = -sum(share * math.log(share) for share in shares)
        assert odds.against == tuple(chosen)
        assert odds.total == pytest.approx(math.log(pattern[key] / pattern[chosen].sum()), abs=1e-10)
        assert odds.entropy == pytest.approx(entropy, abs=1e-10)
        close(odds.shares, torch.tensor(shares, dtype=torch.float64))
        assert float(odds.values.sum()) - entropy == pytest.approx(odds.total, abs=1e-10)
        assert odds.completeness_error <= 1e-10
    assert entropy == 0  # of one competitor
    close(odds.values, result.values[key] - result.values[others[0]])


def test_the_parts_of_log_odds_are_their_derivatives():
    result = attribute_scores(perturbed(), prompts(1, 6))
    strength = torch.ones_like(result.values[0]).requires_grad_()
    scores = (strength * result.values).sum((1, 2))
    (scores[2] - scores[[0, 1, 3, 4, 5]].logsumexp(0)).backward()
    close(strength.grad, result.log_odds(2).values)


def test_what_all_keys_share_is_no_part_of_log_odds():
    result = attribute_scores(hooked(), prompts(1, 6))  # without a norm, biases are the same everywhere
    biases = result.key_terms.index("biases")
    assert float(result.values[:, :, biases].abs().min()) > 1e-4
    close(result.log_odds(3).values[:, biases], torch.zeros(len(result.query_terms), dtype=torch.float64))


@pytest.mark.usefixtures("unchecked")
def test_a_sink_is_set_apart_unless_it_is_asked_for():
    result = attribute_scores(with_sink(), prompts(1, 6)[0], hl.Component(2, "head", 1))
    assert result.sink == 0
    assert float(result.attention[0]) > 0.5
    inner = [1, 2, 3, 4, 5]
    assert result.top_key == inner[int(result.scores[1:].argmax())]
    odds = result.log_odds()
    assert odds.against == tuple(key for key in inner if key != result.top_key)
    close(odds.values, result.log_odds(result.top_key, odds.against).values)
    assert result.log_odds(0).against == tuple(inner)
    assert "against all other keys but 0" in " ".join(str(result).split())
    alone = attribute_scores(with_sink(), prompts(1, 6)[0], hl.Component(2, "head", 1), key=0)
    assert alone.top_key == 0
    assert attribute_scores(with_sink(2), prompts(1, 6)[0], hl.Component(1, "head", 1)).sink is None


def test_the_induction_head_and_the_last_position_are_the_defaults():
    model, tokens = perturbed(), prompts(1, 6)
    result = attribute_scores(model, tokens)
    assert (result.head, result.query, result.keys) == (model.circuit.induction[0], 5, tuple(range(6)))
    assert result.axes == ("key", "query_term", "key_term")
    some = attribute_scores(model, tokens[0], model.circuit.induction, -1, [4, -6, 2])
    assert some.keys == (4, 0, 2)
    for name in ("values", "scores", "attention"):
        close(getattr(some, name), getattr(result, name)[[4, 0, 2]], atol=1e-12)
    close(some.log_odds(-6, [2, 4]).values, result.log_odds(0, [2, 4]).values, atol=1e-12)
    one = attribute_scores(model, tokens, key=3)
    assert one.keys == (3,)
    close(one.values, result.values[3:4], atol=1e-12)
    prompt = hl.hijack_prompt(model.language, 0, 1, 1, 6, global_candidate=2, seed=0)
    again = attribute_scores(model, prompt, circuit=hl.Circuit(induction=(hl.Component(0, "head", 0),)))
    assert again.head.layer == 0
    assert torch.equal(again.values, attribute_scores(model, prompt.tokens, HEADS[0]).values)


def test_terms_are_named_by_the_roles_of_their_components():
    result = attribute_scores(perturbed(), prompts(1))
    assert result.query_labels == ("embed", "positional embed", "previous-token head", "L0MLP", "biases")
    with_offsets = attribute_scores(relative(hooked(), 1), prompts(1), INDUCTION, circuit=hl.Circuit())
    assert with_offsets.key_labels == ("embed", "positional embed", "L0H0", "L0H1", "L0MLP", "biases", "offset key")
    assert with_offsets.query_labels == with_offsets.key_labels[:-1]
    model = hooked()
    model.circuit = None
    assert attribute_scores(model, prompts(1), INDUCTION).key_labels[3] == "L0H1"


def test_the_tidy_table_adds_up_to_the_scores():
    model = perturbed()
    result = attribute_scores(model, prompts(1))
    table = result.to_pandas()
    assert list(table.columns) == ["key", "token", "query_path", "key_path", "score"]
    assert len(table) == result.values.numel()
    np.testing.assert_allclose(table.groupby("key")["score"].sum(), result.scores, atol=1e-10)
    cell = table[(table["query_path"] == "embed") & (table["key_path"] == "previous-token head")]
    np.testing.assert_array_equal(cell["score"], result.cell("embed", model.circuit.previous_token))
    assert cell["token"].tolist() == [str(token) for token in prompts(1)[0].tolist()]
    odds = result.log_odds(2)
    by_path = odds.to_pandas()
    assert list(by_path.columns) == ["query_path", "key_path", "log_odds"]
    assert by_path["log_odds"].sum() == pytest.approx(odds.total + odds.entropy, abs=1e-10)


def rows_of(text):
    """The terminal's table as {(query path, key path): numbers}."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) in (3, 4) and cells[-1]:
            rows[tuple(cells[:2])] = [float(cell) if cell else None for cell in cells[2:]]
    return rows


@pytest.mark.parametrize("n_layers", [2, 4])
def test_the_terminals_table_adds_up(n_layers):
    model = hooked("LN", n_layers=n_layers)
    result = attribute_scores(model, prompts(1, 8), hl.Component(n_layers - 1, "head", 1))
    text, odds = str(result), result.log_odds()
    rows = rows_of(text)
    np.testing.assert_allclose(rows["sum", ""], [float(result.scores.max()), odds.total], atol=5.01e-4)
    for column in range(2):
        parts = [row[column] for names, row in rows.items() if names[0] != "sum" and row[column] is not None]
        assert sum(parts) == pytest.approx(rows["sum", ""][column], abs=5e-4 * (len(parts) + 1))
    largest = int(odds.values.abs().argmax())
    names = result.query_labels[largest // len(result.key_terms)], result.key_labels[largest % len(result.key_terms)]
    assert rows[names][1] == pytest.approx(float(odds.values.flatten()[largest]), abs=5.01e-4)
    assert f"completeness error {result.completeness_error:.1e}" in text
    assert f"{float(result.attention.max()):.1%}" in text
    some = rows_of(str(attribute_scores(model, prompts(1, 8), result.head, key=[1, 2])))
    assert all(len(numbers) == 1 for numbers in some.values())  # nothing to say about the other keys


class Words(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_the_notebooks_view_escapes_tokens():
    odd = ["<", "</script>", "&amp;", '"', "'><b>", "<!--", "plain"]
    language = hl.BigramLanguage(hl.BigramLanguage.dirichlet(7, seed=0).pi_b, tokens=odd)
    model = hl.associative_transformer(language, n_ctx=12, dtype=torch.float64, device="cpu")
    for token in range(6):
        page = Words(attribute_scores(model, torch.tensor([token, 6, 2, token]))._repr_html_())
        assert repr(odd[token]) in page.text
        assert "previous-token head" in page.text
        assert {"svg", "table"} <= page.tags
        assert "script" not in page.tags


def maps(picture):
    return [ax for ax in picture.figure.axes if ax.images]


def test_pictures_have_a_labelled_map_per_key_and_add_up():
    model = hooked("LN", n_layers=5)  # more terms than are shown
    result = attribute_scores(model, prompts(1, 8), hl.Component(4, "head", 0))
    keys = [1, 7, -3, 2]
    axes = maps(result.picture(keys))
    assert len(axes) == 4
    for ax, key in zip(axes, (1, 7, 5, 2), strict=True):
        image = ax.images[0]
        assert float(image.get_array().sum()) == pytest.approx(float(result.scores[key]), abs=1e-10)
        assert image.get_clim() == axes[0].images[0].get_clim()
        assert image.get_clim()[0] == -image.get_clim()[1]
        assert f"key {key} " in ax.get_title()
        assert len(ax.texts) == image.get_array().size
    for ax in (axes[0], axes[3]):
        assert "query path" in ax.get_ylabel()
        assert "others" in ax.get_yticklabels()[-1].get_text()
    for ax in axes[1:]:
        assert "key path" in ax.get_xlabel()
    (ax,) = maps(result.picture())
    assert f"key {result.top_key} " in ax.get_title()
    assert [
        label.get_text() for label in maps(attribute_scores(perturbed(), prompts(1)).picture())[0].get_xticklabels()
    ][2] == "previous-token head"


def test_log_odds_have_a_picture_and_a_line_of_text():
    result = attribute_scores(perturbed(), prompts(1))
    several, single = result.log_odds(2), result.log_odds(2, 3)
    for odds in (several, single):
        (ax,) = maps(odds.picture())
        assert float(ax.images[0].get_array().sum()) == pytest.approx(odds.total + odds.entropy, abs=1e-10)
        assert f"log-odds {odds.total:+.3g}" in ax.get_title()
        assert odds._repr_html_().count('role="img"') == 1
    assert "4 others" in str(several)
    assert f"entropy {several.entropy:.4g}" in str(several)
    assert "against key 3" in str(single)
    assert "entropy" not in str(single)


def assert_same(loaded, result):
    for name in ("values", "scores", "attention"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
        assert getattr(loaded, name).dtype == getattr(result, name).dtype
    for name in ("head", "query", "keys", "query_terms", "key_terms", "texts", "circuit"):
        assert getattr(loaded, name) == getattr(result, name)


def saved_examples():
    yield attribute_scores(perturbed(), prompts(1))
    yield attribute_scores(relative(hooked(dtype=torch.float32), 1), prompts(1), key=[2, 0])


def test_saving_and_loading_gives_back_every_bit(tmp_path):
    for index, result in enumerate(saved_examples()):
        path = tmp_path / f"result {index}.safetensors"
        result.save(path)
        assert_same(ScoreAttribution.load(path), result)
        assert str(ScoreAttribution.load(str(path))) == str(result)
    assert len(list(tmp_path.iterdir())) == index + 1


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    first, second = saved_examples()
    first.save(tmp_path / "result")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        second.save(tmp_path / "result")
    assert_same(ScoreAttribution.load(tmp_path / "result"), first)


def test_other_files_are_not_loaded(tmp_path):
    from safetensors.torch import save_file

    path, result = tmp_path / "result", next(saved_examples())
    result.save(path)
    whole = path.read_bytes()
    for foreign in (b"", b"not safetensors", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="truncated or not a"):
            ScoreAttribution.load(path)
    hl.attribute(perturbed(), prompts(1)).save(path)
    with pytest.raises(ValueError, match=r"not a hijack_lens\.ScoreAttribution\.1 file"):
        ScoreAttribution.load(path)
    save_file({"values": torch.zeros(2)}, path, {"hijack_lens": '{"format": "hijack_lens.ScoreAttribution.1"}'})
    with pytest.raises(ValueError, match="is not a saved ScoreAttribution"):
        ScoreAttribution.load(path)


def test_the_users_hooks_act_and_stay():
    model, tokens = hooked("LN"), prompts(1)
    plain = attribute_scores(model, tokens)
    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    with hl.hooks.ablate(model, PREVIOUS), hl.hooks.ablate(model, MLPS[0]):
        result = attribute_scores(model, tokens)
        recorded = model.run_with_cache(tokens)[1]["blocks.1.attn.hook_attn_scores"].detach()
    close(result.values.sum((1, 2)), recorded[0, 0, -1])
    for part in (PREVIOUS, MLPS[0]):
        assert float(result.cell("embed", part).abs().max()) == 0
        assert float(plain.cell("embed", part).abs().max()) > 0.01
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("blocks.1.attn.hook_q", "its scores are not the sum over terms"),
        ("blocks.1.attn.hook_attn_scores", "its scores are not the sum over terms"),
        ("blocks.1.ln1.hook_scale", "its scores are not the sum over terms"),
        ("blocks.0.hook_resid_post", "the residual stream before layer 1 is not the sum .* or a hook on it"),
    ],
)
def test_hooks_that_make_the_scores_something_else_are_refused(point, message):
    model = hooked("LN")
    model.hook_dict[point].add_hook(lambda x, hook: x * 1.1)
    with pytest.raises(ValueError, match=message):
        attribute_scores(model, prompts(1))


def test_a_bridge_whose_pattern_is_not_the_softmax_of_its_scores_is_refused():
    model, _ = bridge("GPT-2")
    turned_round = [("blocks.1.attn.hook_pattern", lambda x, hook: x.flip(-1))]
    with model.hooks(fwd_hooks=turned_round), pytest.raises(ValueError, match="its attention is not the softmax"):
        attribute_scores(model, prompts(1), INDUCTION)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_scores_soft_cap": 30.0}, "caps its attention scores"),
        ({"positional_embedding_type": "alibi"}, "ALiBi"),
        ({"positional_embedding_type": "shortformer"}, "its scores are not the sum over terms"),
    ],
    ids=str,
)
def test_a_model_whose_scores_are_no_such_sum_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        attribute_scores(hooked(**config), prompts(1))


def test_windowed_attention_is_taken_apart_within_its_window():
    model = hooked(use_local_attn=True, window_size=2, attn_types=["global", "local"])
    recorded = model.run_with_cache(prompts(1))[1]["blocks.1.attn.hook_attn_scores"].detach()
    result = attribute_scores(model, prompts(1))
    assert result.keys == (3, 4)
    close(result.values.sum((1, 2)), recorded[0, 0, -1, 3:])
    with pytest.raises(ValueError, match=r"key must hold no positions that head L1H0 is kept from .* got \[1, 2\]"):
        attribute_scores(model, prompts(1), key=[1, 2, 3])


@pytest.mark.usefixtures("unchecked")
def test_a_key_may_be_a_tensor_of_no_axes():
    assert attribute_scores(hooked(), prompts(1), key=torch.tensor(1)).keys == (1,)


def test_mixtures_of_experts_write_terms_too():
    model = hooked(num_experts=2, experts_per_token=1, dtype=torch.float32)  # in which alone they run
    scores = attribute_scores(model, prompts(1))
    assert scores.completeness_error <= 1e-5 * float(scores.scores.abs().max())


def test_neither_the_global_rng_nor_the_model_is_touched(global_rng_untouched):
    model = hooked("LN")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attribute_scores(model, prompts(1)).picture().png()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def of(*arguments, model=hooked, **options):
    return lambda: attribute_scores(model(), prompts(1), *arguments, **options)


def without_induction():
    model = hooked()
    model.circuit = hl.Circuit(induction=(HEADS[2], HEADS[3]))
    return attribute_scores(model, prompts(1))


def too_many():
    model = hooked(n_layers=60, n_heads=4, d_head=2, n_ctx=2048)
    return attribute_scores(model, prompts(1, 2048), hl.Component(59, "head", 0))


test_values_are_refused = refused(
    ValueError,
    {
        "head must be one head, got 2: L0H0, L0H1": of((HEADS[0], HEADS[1])),
        "head must be given, since the circuit names 2 induction heads": without_induction,
        "head must be an attention head, got L0MLP": of(MLPS[0]),
        "head must be an attention head, got L1MLP": of("bigram"),
        "head must be a Component, .* got 'copy'": of("copy"),
        "L5H0 is in layer 5; the model has 2": of(hl.Component(5, "head", 0)),
        "L0H7 is head 7; the model has 2": of(hl.Component(0, "head", 7)),
        "query must be from 0 to 4, the prompt's last position, or count from the end; got 5": of(query=5),
        "query must be from 0 to 4, .* got -6": of(query=-6),
        "key must be from 0 to 2, the query, or count from the end; got 3": of(query=2, key=3),
        "key must be from 0 to 2, the query, or count from the end; got -1": of(query=2, key=-1),
        r"key must be one position or several different ones, got \[\]": of(key=[]),
        r"key must be one position or several different ones, got \[1, -4\]": of(key=[1, -4]),
        "key must be fewer positions: 2048 of them take": too_many,
        "prompt must be a single prompt, got a batch of 2": lambda: attribute_scores(hooked(), prompts(2)),
        "prompt holds token id 7": lambda: attribute_scores(hooked(), torch.tensor([0, 7])),
        "prompt is text, but the model has no tokenizer": lambda: attribute_scores(hooked(), "text"),
    },
)

test_types_are_refused = refused(
    TypeError,
    {
        "model must be a HookedTransformer or TransformerBridge": lambda: attribute_scores(3, prompts(1)),
        "head must be a Component, .* got 0.5": of(0.5),
        "circuit must be a Circuit, got 'induction'": of(circuit="induction"),
        "query must be a position .an int., got 1.5": of(query=1.5),
        "query must be a position .an int., got True": of(query=True),
        "key must be a position .an int., got 'all'": of(key="all"),
        "key must be a position .an int., got None": of(key=[0, None]),
        "prompt must be": lambda: attribute_scores(hooked(), 3),
    },
)


def result(**options):
    return attribute_scores(perturbed(), prompts(1), **options)


test_questions_that_a_result_cannot_answer_are_refused = refused(
    ValueError,
    {
        r"against must be given, since this attribution lacks the keys \[1, 3, 4\]": (
            lambda: result(key=[0, 2]).log_odds(2)
        ),
        "against must be one or several different keys other than 2, got 2": lambda: result().log_odds(2, 2),
        r"other than 2, got \[1, -4\]": lambda: result().log_odds(2, [1, -4]),
        r"other than 2, got \[\]": lambda: result().log_odds(2, []),
        "other than 0, got None": lambda: result(query=0).log_odds(),
        "key must be among this attribution's keys, got 1": lambda: result(key=[0, 2]).log_odds(1, 0),
        "against must be among this attribution's keys, got 1": lambda: result(key=[0, 2]).log_odds(0, 1),
        "key must be among this attribution's keys, got 9": lambda: result().picture(9),
        "key must be one position or several, got none": lambda: result().picture([]),
        "key_term must be one of embed, .*; got L1H1": lambda: result().cell("embed", HEADS[3]),
        "query_term must be one of embed, .*; got offset": lambda: result().cell("offset", "embed"),
        "values must have shape .5, 5, 4., got": lambda: wrong(key_terms=result().key_terms[1:]),
        "attention must have shape .5,., got .4,.": lambda: wrong(attention=result().attention[1:]),
        "texts must be of all positions, got 3": lambda: wrong(texts=("a", "b", "c")),
    },
)


def wrong(**changed):
    import dataclasses

    return dataclasses.replace(result(), **changed)
