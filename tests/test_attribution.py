"""Attribution against the logits themselves, and path by path against a network with its edges knocked out."""

import os
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import plain_network
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, native, perturbed, prompts
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import hijack_lens as hl
from hijack_lens import LogitAttribution, Path, attribute

BUILD = {
    "hand-written": lambda seed=0, **k: handwritten(seed=seed, **k),
    "hand-written absolute": lambda seed=0, **k: handwritten(seed=seed, positions="absolute", n_ctx_train=4, **k),
    "perturbed": lambda seed=0, **k: perturbed(seed=seed, **k),
    "perturbed absolute": lambda seed=0, **k: perturbed(seed=seed, positions="absolute", **k),
    "ReLU": lambda seed=0, **k: hooked(None, "relu", seed=seed, **k),
    "LayerNorm, GELU": lambda seed=0, **k: hooked("LN", "gelu", seed=seed, **k),
    "RMSNorm, SiLU": lambda seed=0, **k: hooked("RMS", "silu", seed=seed, **k),
    "LNPre, ReLU": lambda seed=0, **k: hooked("LNPre", "relu", seed=seed, **k),
    "RMSPre, SiLU": lambda seed=0, **k: hooked("RMSPre", "silu", seed=seed, **k),
    "one layer": lambda seed=0, **k: hooked("LN", "gelu", n_layers=1, seed=seed, **k),
    "attention only": lambda seed=0, **k: hooked("LN", None, attn_only=True, seed=seed, **k),
}
builds = pytest.mark.parametrize("build", BUILD)
# Its own shape checks would take most of the time where one test attributes many times.
many = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def all_paths(model):
    """Every way up through the model: from an embedding through at most one head and then the MLP of each block."""
    ways = [()]
    for layer in range(model.cfg.n_layers):
        heads = [hl.Component(layer, "head", head) for head in range(model.cfg.n_heads)]
        ways += [(*way, head) for way in ways for head in heads]
        if not model.cfg.attn_only:
            ways += [(*way, hl.Component(layer, "mlp")) for way in ways]
    return {(source, way) for source in ("embed", "pos_embed") for way in ways}


def knocked_out(model, tokens, source, through):
    """Logits [source, pos, d_vocab] of the frozen network in which nothing else is alive than one path and one source.

    For "biases", everything but the embeddings is alive, and the biases of one position.
    """
    length = len(tokens)
    frozen = plain_network.run(model, tokens[None])
    one_source = torch.eye(length, dtype=model.cfg.dtype)[:, :, None]
    chain = [source, *through, "unembed"]
    alive = set(pairwise(chain))

    def edge(sender, receiver, via, message):
        if source == "biases":
            return message * 0 if sender in ("embed", "pos_embed") else message
        if (sender, receiver) not in alive:
            return message * 0
        return message * one_source if sender == source else message

    bias_weight = one_source if source == "biases" else 0.0
    return plain_network.run(model, tokens.expand(length, -1), edge, frozen, bias_weight).logits


@builds
@given(seed=st.integers(0, 10**6), length=st.integers(1, 12), data=st.data())
@many
def test_paths_add_up_to_the_logits(build, seed, length, data, unchecked):
    model, tokens = BUILD[build](seed), prompts(2, length, seed)
    position = data.draw(st.one_of(st.just("all"), st.integers(-length, length - 1)))
    result, logits = attribute(model, tokens, position), model(tokens).detach()
    logits = logits if position == "all" else logits[:, position]
    close(result.values.sum(1 if position == "all" else (1, 2)), logits)
    close(result.logits, logits, atol=1e-12)
    assert result.completeness_error <= 1e-10


@builds
@given(seed=st.integers(0, 10**6), length=st.integers(1, 12))
@settings(many, max_examples=5)
def test_paths_add_up_to_the_logits_in_float32(build, seed, length, unchecked):
    model, tokens = BUILD[build](seed, dtype=torch.float32), prompts(2, length, seed)
    for position in (-1, "all"):
        result = attribute(model, tokens, position)
        assert result.values.dtype == torch.float32
        assert result.completeness_error <= 1e-4 * float(result.logits.abs().max())


@pytest.mark.parametrize("act", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "solu"])
def test_paths_add_up_to_the_logits_for_other_activations(act):
    assert attribute(hooked("LN", act), prompts()).completeness_error <= 1e-10


@builds
def test_every_path_and_source_is_what_is_left_when_all_else_is_knocked_out(build, unchecked):
    model, tokens = BUILD[build](seed=3), prompts(1, 6, seed=5)[0]
    close(plain_network.run(model, tokens[None]).logits, model(tokens).detach())
    result_all, results = (
        attribute(model, tokens, "all"),
        [attribute(model, tokens, query) for query in range(6)],
    )
    seen = set()
    for index, path in enumerate(results[-1].paths):
        expected = knocked_out(model, tokens, path.source, path.through)
        for query, result in enumerate(results):
            assert result.paths[index] == path
            close(result.values[index], expected[:, query])
        at_all = [(p.source, p.through) for p in result_all.paths].index((path.source, path.through))
        close(result_all.values[at_all], expected.sum(0))
        seen.add((path.source, path.through))
    assert len(results[-1].paths) == len(seen)
    left_out = (all_paths(model) | {("biases", ())}) - seen
    assert seen <= all_paths(model) | {("biases", ())}
    assert bool(left_out) == build.startswith("hand-written")
    for source, through in left_out:  # for no other reason than that they are nothing
        assert not knocked_out(model, tokens, source, through).any()


@builds
def test_all_positions_are_the_single_positions_stacked(build):
    model, tokens = BUILD[build](), prompts(2, 5)
    together = attribute(model, tokens, "all")
    assert together.axes == ("batch", "path", "position", "d_vocab")
    assert together.by_path() is together.values
    for position in (*range(5), -1):
        alone = attribute(model, tokens, position)
        assert alone.paths == together.paths
        assert alone.position == position % 5
        close(alone.by_path(), together.by_path()[..., position, :])
        close(alone.margin(2, 3).context, together.margin(2, 3).context[:, position])


@builds
@pytest.mark.parametrize("position", [-2, "all"])
def test_each_prompt_of_a_batch_is_attributed_as_it_is_alone(build, position):
    model, tokens = BUILD[build](), prompts(3, 5)
    together = attribute(model, tokens, position)
    assert together.axes[0] == "batch"
    for index, row in enumerate(tokens):
        alone = attribute(model, row, position)
        assert alone.axes == together.axes[1:]
        close(together[index].values, alone.values, atol=1e-12)
        close(together[index].logits, alone.logits, atol=1e-12)
        assert torch.equal(together[index].tokens, row)
    with pytest.raises(TypeError, match="single prompt"):
        alone[0]


@given(
    seed=st.integers(0, 10**6),
    strengths=st.builds(hl.Strengths, *[st.floats(0.0, top) for top in (25.0, 8.0, 12.0, 3.0)]),
    absolute=st.booleans(),
)
@many
def test_margins_are_logit_differences_and_those_of_theory(seed, strengths, absolute, unchecked):
    options = {"positions": "absolute", "n_ctx_train": 5} if absolute else {}
    model, tokens = handwritten(seed=seed, strengths=strengths, **options), prompts(2, 9, seed)
    margin = attribute(model, tokens).margin(2, 5)
    logits = model(tokens)[:, -1].detach()
    close(margin.total, logits[:, 2] - logits[:, 5])
    setting = hl.theory.Setting(strengths, **options)
    theory = hl.theory.margin(tokens, model.language, setting, in_context=2, global_candidate=5)
    for part in ("context", "weights", "rest", "total"):
        close(getattr(margin, part), getattr(theory, part))


@builds
def test_paths_are_grouped_by_the_memory_they_go_through(build):
    model, tokens = BUILD[build](), prompts()
    result = attribute(model, tokens)
    expected = {"context": 0, "weights": 0, "rest": 0}
    for path, values in zip(result.paths, result.values.unbind(1), strict=True):
        if set(path.through) & set(model.circuit.induction):
            memory = "context"
        elif path.source in ("embed", "biases") and all(component.kind == "mlp" for component in path.through):
            memory = "weights"
        else:
            memory = "rest"
        assert path.memory == memory
        expected[memory] = expected[memory] + values
    assert list(result.by_memory()) == list(result.by_source()) == list(expected)
    for memory, values in expected.items():
        values = values + torch.zeros_like(result.values[:, 0])
        close(result.by_memory()[memory], values.sum(1), atol=1e-12)
        close(result.by_source()[memory], values, atol=1e-12)


def test_paths_are_named_by_the_roles_of_their_components():
    labels = {path.through: str(path) for path in attribute(perturbed(), prompts()).paths if path.source == "embed"}
    previous, induction, bigram = (role[0] for role in (CIRCUIT.previous_token, CIRCUIT.induction, CIRCUIT.bigram))
    assert labels[()] == "embed → unembed"
    previous = HEADS[0]
    assert labels[previous, induction] == "embed → previous-token head → induction head → unembed"
    assert labels[MLPS[0], bigram] == "embed → L0MLP → bigram memory → unembed"
    two = hl.Circuit(induction=(HEADS[2], HEADS[3]))
    labels = {path.through: str(path) for path in attribute(hooked(), prompts(), circuit=two).paths}
    assert labels[HEADS[3],] == "positional embed → L1H1 → unembed"
    paths = attribute(hooked(), prompts()).paths
    assert len({str(path) for path in paths}) == len(paths)


def test_a_circuit_given_by_hand_decides_the_groups_and_not_the_values():
    model, tokens = hooked(), prompts()
    other = hl.Circuit(induction=(HEADS[0],))
    ours, theirs = attribute(model, tokens), attribute(model, tokens, circuit=other)
    assert torch.equal(ours.values, theirs.values)
    assert {p.through for p in theirs.paths if p.memory == "context"} == {
        p.through for p in ours.paths if HEADS[0] in p.through
    }
    model.circuit = None
    without, empty = attribute(model, tokens), attribute(model, tokens, circuit=hl.Circuit())
    assert without.paths == empty.paths
    assert torch.equal(without.values, empty.values)
    assert not any(path.memory == "context" for path in without.paths)
    assert {str(path) for path in without.paths} >= {"embed → L0H0 → unembed", "embed → L1MLP → unembed"}


def test_the_largest_logits_are_listed_with_their_parts():
    model, tokens = perturbed(), prompts()[0]
    result = attribute(model, tokens)
    table, order = result.top(3), result.logits.argsort(descending=True)
    assert list(table.columns) == ["token", "logit", "context", "weights", "rest"]
    assert table["token"].tolist() == [model.language.tokens[i] for i in order[:3]]
    np.testing.assert_allclose(table["logit"], table[["context", "weights", "rest"]].sum(axis=1), atol=1e-10)
    np.testing.assert_allclose(table["context"], result.by_memory()["context"][order[:3]])
    assert len(result.top(100)) == 7
    for wrong in (attribute(model, prompts()), attribute(model, tokens, "all")):
        with pytest.raises(ValueError, match="one prompt and one position"):
            wrong.top()


@pytest.mark.parametrize("position", [2, "all"])
@pytest.mark.parametrize("batched", [False, True])
def test_the_tidy_table_adds_up_to_the_logits(position, batched):
    model, tokens = perturbed(), prompts() if batched else prompts()[0]
    result = attribute(model, tokens, position)
    table = result.to_pandas()
    axis = "position" if position == "all" else "source"
    prefix = ["batch"] if batched else []
    assert list(table.columns) == [*prefix, "path", "memory", axis, "token", "logit"]
    assert len(table) == result.values.numel()
    assert set(table["path"]) == {str(path) for path in result.paths}
    keys = [*prefix, *([axis] if position == "all" else []), "token"]
    sums = table.groupby(keys)["logit"].sum().to_numpy()  # ids are single digits, so in order
    np.testing.assert_allclose(sums, result.logits.flatten(), atol=1e-10)
    memories = table.groupby([*keys, "memory"])["logit"].sum().unstack()["context"]
    np.testing.assert_allclose(memories, result.by_memory()["context"].flatten(), atol=1e-10)
    row = table.iloc[-1]
    assert row["logit"] == float(result.values.flatten()[-1])
    assert (row["path"], row[axis]) == (str(result.paths[-1]), 4)


def assert_same(loaded, result):
    for name in ("values", "logits", "tokens"):
        theirs, ours = getattr(loaded, name), getattr(result, name)
        assert torch.equal(theirs, ours)
        assert theirs.dtype == ours.dtype
    for name in ("paths", "position", "vocab", "candidates"):
        assert getattr(loaded, name) == getattr(result, name)


def saved_examples():
    model = perturbed()
    prompt = hl.hijack_prompt(model.language, 0, 1, 1, 6, global_candidate=2, n_prompts=2, seed=0)
    yield attribute(model, prompt)
    yield attribute(model, prompt, "all")
    yield attribute(model, prompts()[0], 2)
    yield attribute(hooked("LN", dtype=torch.float32), prompts())


def test_saving_and_loading_gives_back_every_bit(tmp_path):
    for index, result in enumerate(saved_examples()):
        path = tmp_path / f"result {index}.safetensors"
        result.save(path)
        assert_same(LogitAttribution.load(path), result)
        assert_same(LogitAttribution.load(str(path)), result)
        assert str(LogitAttribution.load(path)) == str(result)
    assert len(list(tmp_path.iterdir())) == index + 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, error):
    first, second, *_ = saved_examples()

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(error):
            first.save(tmp_path / "result")
    assert list(tmp_path.iterdir()) == []
    first.save(tmp_path / "result")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(error):
        second.save(tmp_path / "result")
    assert_same(LogitAttribution.load(tmp_path / "result"), first)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_other_files_are_not_loaded(tmp_path):
    from safetensors.torch import save_file

    path, result = tmp_path / "result", next(saved_examples())
    result.save(path)
    whole = path.read_bytes()
    for foreign in (b"", b"not safetensors", whole[: len(whole) // 2], whole[:-1], b'{"values": [1.0]}'):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"result is (not a|truncated or not a)"):
            LogitAttribution.load(path)
    for metadata in (None, {"hijack_lens": "{}"}, {"hijack_lens": '{"format": "hijack_lens.Other.1"}'}):
        save_file({"values": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError, match=r"not a hijack_lens\.LogitAttribution\.1 file"):
            LogitAttribution.load(path)
    save_file({"values": torch.zeros(2)}, path, {"hijack_lens": '{"format": "hijack_lens.LogitAttribution.1"}'})
    with pytest.raises(ValueError, match="result"):
        LogitAttribution.load(path)
    with pytest.raises(ValueError, match="missing does not exist"):
        LogitAttribution.load(tmp_path / "missing")


def rows_of(text):
    """The table's rows as {label: numbers}."""
    rows, label = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 5 and cells[2]:
            label = cells[0]
            rows[label] = [float(number) for number in cells[2:]]
        elif len(cells) == 5:  # a long label's second line
            rows[f"{label} {cells[0]}"] = rows.pop(label)
    return rows


@pytest.mark.parametrize("build", ["hand-written", "perturbed", "LayerNorm, GELU"])
def test_the_terminals_table_shows_each_path_and_the_sum(build):
    model, tokens = BUILD[build](), prompts()[0]
    result = attribute(model, tokens)
    a, b = result.logits.topk(2).indices.tolist()
    rows = rows_of(str(result))
    np.testing.assert_allclose(
        rows.pop("sum"),
        [result.logits[a], result.logits[b], result.logits[a] - result.logits[b]],
        atol=5.01e-4,
    )
    by_path = {str(path): value for path, value in zip(result.paths, result.by_path(), strict=True)}
    for label, numbers in rows.items():
        value = by_path.pop(label)
        np.testing.assert_allclose(numbers, [value[a], value[b], value[a] - value[b]], atol=5.01e-4)
    # What is not shown is nothing, and is counted.
    assert all(float(value[[a, b]].abs().max()) < 5e-4 for value in by_path.values())
    assert (f"{len(by_path)} more path" in str(result)) == bool(by_path)
    assert f"completeness error {result.completeness_error:.1e}" in str(result)


def test_the_table_is_about_the_prompts_candidates():
    model = perturbed()
    prompt = hl.hijack_prompt(model.language, 0, 1, 1, 6, global_candidate=2, seed=0)
    result = attribute(model, prompt)
    assert result.candidates == (1, 2) == result.pair()
    assert "logit '1'" in str(result)
    assert "'1' - '2'" in str(result)
    rows = rows_of(str(result))
    np.testing.assert_allclose(rows["sum"][2], float(result.margin().total), atol=5.01e-4)
    close(result.margin("1", "2").total, result.margin().total, atol=0)
    close(result.margin(2, 1).context, -result.margin().context, atol=0)


def test_batches_and_all_positions_are_described_by_the_margin_of_each():
    model = perturbed()
    assert str(attribute(model, prompts(3))).startswith("LogitAttribution(batch=3, path=")
    text = str(attribute(model, prompts(3)[0], "all"))
    assert "position=5, d_vocab=7), completeness error" in text
    result = attribute(model, prompts(3)[0], "all")
    largest = result.logits.topk(2).values
    assert [row[-1] for row in rows_of(text).values()] == pytest.approx(
        (largest[:, 0] - largest[:, 1]).tolist(), abs=1e-3
    )
    assert "the largest logit − the second" in text
    said = str(attribute(model, prompts(3), answers=[2, 1]))
    assert "logit '2' − logit '1'" in said
    totals = attribute(model, prompts(3), answers=[2, 1]).margin().total.tolist()
    assert [row[-1] for row in rows_of(said).values()] == pytest.approx(totals, abs=1e-3)


class Strict(HTMLParser):
    """Checks that tags nest, and keeps the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert all(value is not None for _, value in attrs), attrs
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_notebooks_view_is_well_formed_and_escapes_tokens():
    odd = ["<", "</script>", "&amp;", '"', "'><b>", "<!--", "plain"]
    language = hl.BigramLanguage(hl.BigramLanguage.dirichlet(7, seed=0).pi_b, tokens=odd)
    model = hl.associative_transformer(language, n_ctx=12, dtype=torch.float64, device="cpu")
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1])
    for a in range(6):
        prompt = hl.HijackPrompt(tokens, tokens, 1, a, a + 1, a + 1, language)
        result = attribute(model, prompt)
        html = result._repr_html_()
        drawn = html[html.index("<svg") : html.index("</svg>") + 6]
        page = Strict(html.replace(drawn, ""))
        layout = {"div", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "br"}
        assert page.tags <= layout | {"style", "pre", "details", "summary"}
        assert " ".join([*odd, odd[1]]) in page.text
        assert f"logit {odd[a]!r}" in page.text
        assert f"{float(result.logits[a]):+.3f}" in page.text
        total = float(result.margin().total)
        winner, loser = (odd[a], odd[a + 1]) if total > 0 else (odd[a + 1], odd[a])
        assert f"{winner!r} beats {loser!r} by {abs(total):.2f} logits" in page.text
        assert "sum" in page.text


def test_white_space_is_visible_in_tables():
    language = hl.BigramLanguage.from_text("a b\na b a\n", level="char")
    model = hl.associative_transformer(language, dtype=torch.float64, device="cpu")
    result = attribute(model, "a b\na ")
    assert result.source_texts() == ["a", "␣", "b", "⏎", "a", "␣"]
    assert {"␣", "⏎"} <= set(result.to_pandas()["token"])
    with pytest.raises(ValueError, match="one prompt"):
        attribute(model, ["a b", "b a"]).source_texts()


def test_prompts_may_be_text_tokens_or_hijack_prompts_and_keep_their_batch_axis(unchecked):
    language = hl.BigramLanguage(hl.BigramLanguage.dirichlet(4, seed=0).pi_b, tokens=list("abcd"))
    model = hl.associative_transformer(language, n_ctx=12, dtype=torch.float64, device="cpu")
    ids = [0, 1, 2, 3, 0, 1]
    expected = attribute(model, torch.tensor(ids))
    assert expected.tokens.ndim == 1
    assert expected.vocab == tuple("abcd")
    single = hl.HijackPrompt(torch.tensor(ids), torch.tensor(ids), 1, 2, 3, 3, language)
    several = hl.HijackPrompt(torch.tensor([ids]), torch.tensor([ids]), 1, 2, 3, 3, language)
    for prompt in ("abcdab", single, ids, tuple(ids), np.array(ids), torch.tensor(ids, dtype=torch.int32)):
        result = attribute(model, prompt)
        assert result.axes == ("path", "source", "d_vocab"), prompt
        assert torch.equal(result.values, expected.values)
    for batch in (["abcdab"], several, [ids], (tuple(ids),), np.array([ids]), torch.tensor([ids])):
        result = attribute(model, batch)
        assert result.axes == ("batch", "path", "source", "d_vocab"), batch
        assert torch.equal(result.values[0], expected.values)
    assert attribute(model, np.array([ids, ids[::-1]])).values.shape[0] == 2


def test_the_users_hooks_act_and_stay():
    model, tokens = hooked(), prompts()
    point = model.hook_dict["blocks.1.attn.hook_pattern"]
    uniform = torch.ones(5, 5, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    point.add_perma_hook(lambda pattern, hook: uniform.expand_as(pattern))
    model.hook_dict["hook_embed"].add_hook(lambda x, hook: x * 0.5)
    before = {name: list(p.fwd_hooks) for name, p in model.hook_dict.items()}
    result = attribute(model, tokens)
    assert {name: list(p.fwd_hooks) for name, p in model.hook_dict.items()} == before
    close(result.logits, model(tokens)[:, -1].detach(), atol=0)
    assert result.completeness_error <= 1e-10
    direct = [path.through for path in result.paths].index(())
    close(result.values[:, direct, -1], (0.5 * model.W_E[tokens[:, -1]] @ model.W_U).detach())


@pytest.mark.parametrize("position", [-1, "all"])
def test_a_run_whose_logits_the_paths_miss_is_refused(position):
    model, tokens = hooked(), prompts()
    with hl.hooks.ablate(model, MLPS[1]), pytest.raises(ValueError, match="misses the logits by up to"):
        attribute(model, tokens, position)
    # An intervention that the run's own patterns hold is attributed as it is.
    with hl.hooks.patch(model, HEADS[2], tokens.flip(1), part="pattern"):
        changed = attribute(model, tokens, position)
        logits = model(tokens).detach()
        close(changed.logits, logits if position == "all" else logits[:, position])


@builds
@pytest.mark.parametrize("position", [-1, "all"])
def test_no_gradient_graph_is_kept(build, position):
    model, tokens = BUILD[build](), prompts()
    result = attribute(model, tokens, position)
    assert not result.values.requires_grad
    assert not result.logits.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(tokens).requires_grad


def test_a_native_bridge_is_attributed_like_the_hooked_transformer_with_its_weights():
    bridge, twin = native()
    tokens = prompts()
    for position in (-1, 1, "all"):
        ours, theirs = attribute(bridge, tokens, position, circuit=CIRCUIT), attribute(twin, tokens, position)
        assert ours.paths == theirs.paths
        close(ours.values, theirs.values)
        assert ours.completeness_error <= 1e-10


def test_a_bridges_norm_is_attributed_or_refused_in_clear_words(unchecked):
    bridge, twin = native("LN")
    try:
        result = attribute(bridge, prompts(), circuit=CIRCUIT)
    except (TypeError, ValueError) as error:
        assert "norm of type" in str(error)  # noqa: PT017
    else:
        close(result.values, attribute(twin, prompts()).values)


@pytest.mark.parametrize("positions", ["shortformer", "alibi"])
@pytest.mark.parametrize("position", [-1, "all"])
def test_positions_that_are_no_term_of_the_stream_are_no_path(positions, position, unchecked):
    result = attribute(hooked("LN", positional_embedding_type=positions), prompts(), position)
    assert result.completeness_error <= 1e-10
    assert {path.source for path in result.paths} == {"embed", "biases"}


def test_mixtures_of_experts_stay_whole(unchecked):
    model = hooked(num_experts=2, experts_per_token=1, dtype=torch.float32)  # in which alone they run
    result = attribute(model, prompts(), answers=[1, 2])
    close(result.values.sum((1, 2)), model(prompts())[:, -1, [1, 2]].detach(), atol=1e-3)


def test_ids_and_positions_may_be_numpys(unchecked):
    result = attribute(hooked(), prompts(1)[0], np.int64(3))
    assert result.position == 3
    assert result.margin(np.int64(1), 2) == result.margin(1, 2)


def test_tokens_are_called_what_their_tokenizer_decodes_them_to(unchecked):
    model = hooked()
    pieces = Tokenizer(models.WordLevel({f"\u0120{i}": i for i in range(5)}, unk_token="\u01200"))
    pieces.decoder = decoders.ByteLevel()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)  # of a vocabulary smaller than the model's
    for answers in (None, [1, 2]):
        result = attribute(model, prompts(1)[0], answers=answers)
        assert result.margin(" 1", " 2") == result.margin(1, 2)
        assert " 1".replace(" ", result.token_text(1 if answers is None else 0)[0]) in set(result.to_pandas()["token"])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"n_layers": 3}, "3 layers"),
        ({"gated_mlp": True}, "cfg.gated_mlp"),
        ({"n_key_value_heads": 1}, "cfg.n_key_value_heads"),
        ({"parallel_attn_mlp": True}, "cfg.parallel_attn_mlp"),
        (
            {"use_normalization_before_and_after": True, "norm": "RMS"},
            "cfg.use_normalization_before_and_after",
        ),
        ({"output_logits_soft_cap": 30.0}, "cfg.output_logits_soft_cap"),
        ({"act": "solu_ln", "norm": "LN"}, "cfg.act_fn"),
    ],
    ids=str,
)
def test_a_model_that_is_no_sum_over_these_paths_is_refused(config, named, unchecked):
    with pytest.raises(ValueError, match=named):
        attribute(hooked(**config), prompts())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((prompts(), 5), ValueError, "position must be 'all' or an int from -5 to 4, got 5"),
        ((prompts(), -6), ValueError, "position must be .* got -6"),
        ((prompts(), "last"), ValueError, "position must be .* got 'last'"),
        ((prompts(), True), (TypeError, ValueError), "position must be .* got True"),
        ((prompts(), 1.5), (TypeError, ValueError), "position must be .* got 1.5"),
        ((prompts(), None), (TypeError, ValueError), "position must be .* got None"),
        (("text",), ValueError, "prompt is text, but the model has no tokenizer"),
        ((torch.full((2, 5), 0.5),), TypeError, "prompt must hold integer token ids, got dtype torch.float32"),
        (
            (torch.zeros(2, 0, dtype=torch.long),),
            ValueError,
            r"prompt must be a non-empty .* got shape \(2, 0\)",
        ),
        ((torch.zeros(1, 2, 3, dtype=torch.long),), ValueError, r"got shape \(1, 2, 3\)"),
        ((torch.tensor([0, 7]),), ValueError, "prompt holds token id 7; the vocabulary has ids 0 to 6"),
        ((torch.zeros(13, dtype=torch.long),), ValueError, "prompt is 13 tokens long; .* n_ctx=12"),
        ((3,), TypeError, "prompt must be"),
    ],
    ids=lambda value: str(value).partition(" ")[0],
)
def test_bad_input_is_named_with_what_it_was_and_what_it_should_be(arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        attribute(hooked(), *arguments)


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (("1", "x"), ValueError, "b must be a token of the model's vocabulary, got 'x'"),
        ((9, "1"), ValueError, "a must be a token id from 0 to 6, got 9"),
        ((True, 1), TypeError, "a must be a token's text or its id, got True"),
        ((1, None), TypeError, "b must be a token's text or its id, got None"),
        ((None, 1), TypeError, "a must be a token's text or its id, got None"),
    ],
    ids=str,
)
def test_bad_tokens_for_a_margin_are_named(pair, error, message, unchecked):
    with pytest.raises(error, match=message):
        attribute(perturbed(), prompts()[0]).margin(*pair)


def test_a_batch_without_candidates_has_no_default_margin():
    with pytest.raises(ValueError, match="one prompt and one position"):
        attribute(perturbed(), prompts()).margin()
    with pytest.raises(ValueError, match="one position"):
        attribute(perturbed(), prompts(), "all").by_source()


def test_results_whose_shapes_disagree_cannot_be_made(unchecked):
    result = attribute(hooked(), prompts())
    fields = {name: getattr(result, name) for name in ("values", "logits", "tokens", "paths", "position")}
    for name, wrong, message in (
        ("paths", result.paths[:-1], "paths must label all 73 entries"),
        ("logits", result.logits[:, :-1], r"logits must have shape \(2, 7\), got \(2, 6\)"),
        ("tokens", result.tokens[:, :-1], r"tokens must have shape \(2, 5\), got \(2, 4\)"),
        ("position", "all", r"logits must have shape \(2, 5, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LogitAttribution(**{**fields, name: wrong})


def test_a_path_knows_its_words():
    path = Path.of("embed", (HEADS[1], HEADS[2]), CIRCUIT)
    assert (path.label, path.memory) == ("embed → previous-token head → induction head → unembed", "context")
    assert Path.of("biases", (), CIRCUIT).label == "biases"
