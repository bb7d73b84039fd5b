"""Direct attribution in deep models, term by term against what is lost when the term is taken out of a frozen run."""

import bridges_for_tests
import pytest
import torch
from bridges_for_tests import booted, gpt2_like, llama_like, neox_like, scattered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import CIRCUIT, HEADS, MLPS, close, handwritten, hooked, perturbed, prompts
from plain_families import ACTIVATIONS, plain_of_hooked
from refusals import refused
from transformers import GPT2Config, GPT2LMHeadModel

import hijack_lens as hl
from hijack_lens import Component, LogitAttribution, attribute
from hijack_lens.attribution import direct, logits
from hijack_lens.attribution.direct import direct_paths

many = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = ("parallel_attn_mlp", "gated_mlp", "n_key_value_heads")


def head(layer, index):
    return Component(layer, "head", index)


def mlp(layer):
    return Component(layer, "mlp")


class Frozen:
    """A run whose patterns, values, norm scales and gates stay, and logits at its last position of a changed stream."""

    def __init__(self, model, plain, tokens):
        self.cfg, self.plain = model.cfg, plain
        _, cache = model.run_with_cache(tokens[None])
        self.cache = {name: value.detach()[0] for name, value in cache.items()}
        self.final = self.cache[f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"]
        self.length, self.n_heads = len(tokens), self.cfg.n_heads

    def normed(self, x, frozen, name, weights):
        """x in place of the stream `frozen`, whose scale is taken."""
        if self.plain.norm_type is None:
            return x
        if self.plain.norm_type.startswith("LN"):
            x, frozen = (y - y.mean(-1, keepdim=True) for y in (x, frozen))
        x = x / (frozen.square().mean(-1, keepdim=True) + self.plain.eps).sqrt()
        return x * weights.get(f"{name}.w", 1.0) + weights.get(f"{name}.b", 0.0)

    def logits(self, taken):
        """The logits' change when `taken` is taken out of the last position's stream."""
        ends = self.plain.ends
        whole, left = (
            self.normed(x, self.final[-1], "ln_final", ends) for x in (self.final[-1], self.final[-1] - taken)
        )
        return (whole - left) @ ends["unembed.W_U"]

    def weight(self, component, name):
        weight = self.plain.layers[component.layer].get(f"attn.{name}")
        return 0.0 if weight is None else weight[component.head * len(weight) // self.n_heads]

    def wrote(self, sender):
        """What a sender wrote at each position, by source: [source, pos, d_model]."""
        if isinstance(sender, str):
            return torch.diag_embed(self.cache[f"hook_{sender}"].T).permute(1, 2, 0)
        at = f"blocks.{sender.layer}.attn"
        v = self.cache[f"{at}.hook_v"]
        v = v[:, sender.head * v.shape[1] // self.n_heads] @ self.weight(sender, "W_O")
        return self.cache[f"{at}.hook_pattern"][sender.head].T[..., None] * v[:, None]

    def writes(self, component, stream):
        """What a component writes at the last position when it reads another stream, everything else being frozen."""
        w, at = self.plain.layers[component.layer], f"blocks.{component.layer}"
        if component.kind == "head":
            read = self.normed(stream, self.read_by(component), "ln1", w)
            v = read @ self.weight(component, "W_V") + self.weight(component, "b_V")
            return self.cache[f"{at}.attn.hook_pattern"][component.head, -1] @ v @ self.weight(component, "W_O")
        read = self.normed(stream, self.read_by(component), "ln2", w)[-1]
        pre, act = self.cache[f"{at}.mlp.hook_pre"][-1], ACTIVATIONS[self.cfg.act_fn]
        # The hooked family adds a gated MLP's bias after the gate; the others have none.
        if "mlp.W_gate" in w:
            after = read @ w["mlp.W_in"] * act(pre) + w.get("mlp.b_in", 0.0)
        else:
            after = (read @ w["mlp.W_in"] + w["mlp.b_in"]) * act(pre) / pre
        return after @ w["mlp.W_out"] + w.get("mlp.b_out", 0.0)

    def read_by(self, component):
        mid = component.kind == "mlp" and not self.plain.parallel
        return self.cache[f"blocks.{component.layer}.hook_resid_{'mid' if mid else 'pre'}"]

    def by_source(self, path):
        """What is lost with a path of one component at most, or with two hops: [source, d_vocab]."""
        *senders, last = (path.source, *path.through)
        if not senders or (senders == ["stream"] and last.kind == "head"):
            return self.logits(self.wrote(last)[:, -1])
        if senders == ["stream"]:
            out = torch.zeros_like(self.final)
            out[-1] = self.cache[f"blocks.{last.layer}.hook_mlp_out"][-1]
            return self.logits(out)
        stream = self.read_by(last)
        return torch.stack(
            [
                self.logits(self.writes(last, stream) - self.writes(last, stream - message))
                for message in self.wrote(senders[-1])
            ]
        )

    def biases(self):
        ends = self.plain.ends
        constant = ends.get("unembed.b_U", 0.0)
        if "ln_final.b" in ends:
            constant = constant + ends["ln_final.b"] @ ends["unembed.W_U"]
        return constant + sum(self.logits(w["attn.b_O"]) for w in self.plain.layers if "attn.b_O" in w)


def check_terms(model, plain, tokens, circuit, atol=1e-10):
    """Every term of an attribution against its knock-out, and their sum against the logits."""
    answers = [0, 2, 5]
    result = attribute(model, tokens, circuit=circuit, answers=answers)
    close(result.values.sum((0, 1)), model(tokens[None])[0, -1, answers].detach(), atol=atol)
    assert result.completeness_error <= atol
    frozen = Frozen(model, plain, tokens)
    expected = {}
    for path in result.paths:
        if path.source == "biases":
            expected[path] = torch.zeros(len(tokens), plain.ends["unembed.W_U"].shape[1]).to(frozen.final)
            expected[path][-1] = frozen.biases()
        else:
            expected[path] = frozen.by_source(path)
    split = [path for path in result.paths if (path.source, *path.through[:-1]) not in (("stream",), ("biases",))]
    for path in split:
        for whole in result.paths:
            if path.through and (whole.source, whole.through) == ("stream", path.through[-1:]):
                expected[whole] = expected[whole] - expected[path]
    for path, value in zip(result.paths, result.values, strict=True):
        close(value, expected[path][:, answers], atol=atol)
    return result


def expected_paths(model, circuit):
    """What an attribution of all bigram memories' gates should hold."""
    embeddings = ["embed"] + ["pos_embed"] * (model.cfg.positional_embedding_type == "standard")
    components = [head(layer, i) for layer in range(model.cfg.n_layers) for i in range(model.cfg.n_heads)]
    components += [] if model.cfg.attn_only else [mlp(layer) for layer in range(model.cfg.n_layers)]
    paths = {(source, ()) for source in embeddings} | {("stream", (component,)) for component in components}
    for reader in (*circuit.induction, *circuit.bigram):
        paths |= {(source, (reader,)) for source in embeddings}
        for sender in (*circuit.previous_token, *circuit.induction):
            same = reader.kind == "mlp" and reader.layer == sender.layer and not model.cfg.parallel_attn_mlp
            if sender.layer < reader.layer or same:
                paths.add(("stream", (sender, reader)))
    return paths | {("biases", ())}


@st.composite
def deep_models(draw):
    """Random models that whole paths are not followed through, and circuits of any of their components."""
    config = {}
    if draw(st.booleans()):
        config |= {"parallel_attn_mlp": True}
    if draw(st.booleans()):
        config |= {"gated_mlp": True}
    if draw(st.booleans()):
        config |= {"n_key_value_heads": 1}
    if draw(st.booleans()):
        config |= {"positional_embedding_type": "rotary", "rotary_dim": draw(st.sampled_from([2, 4]))}
    unusual = any(name in config for name in WHOLE)
    n_layers = draw(st.integers(1 if unusual else 3, 5))
    norm = draw(st.sampled_from([None, "LN", "LNPre", "RMS", "RMSPre"]))
    act = draw(st.sampled_from(["relu", "gelu", "gelu_new", "silu"]))
    if not config and draw(st.booleans()):
        config |= {"attn_only": True}
    model = hooked(norm, act, n_layers, draw(st.integers(0, 10**6)), **config)
    with torch.no_grad():
        # Streams grow with depth where no norm stands in their way; logits stay of a size that rounding leaves alone.
        for block in model.blocks if norm is None else ():
            for parameter in block.parameters():
                parameter *= 0.5
        if draw(st.booleans()):
            model.unembed.W_U.copy_(model.W_E.T)  # tied embeddings
    heads = st.builds(head, st.integers(0, n_layers - 1), st.integers(0, 1))
    some = [tuple(draw(st.lists(heads, max_size=2, unique=True))) for _ in range(2)]
    if not config.get("attn_only"):
        some.append(tuple(draw(st.lists(st.builds(mlp, st.integers(0, n_layers - 1)), max_size=2, unique=True))))
    return model, hl.Circuit(*some)


@given(built=deep_models(), length=st.integers(1, 6), seed=st.integers(0, 100))
@many
def test_every_term_is_what_its_knock_out_takes_away(built, length, seed, unchecked):
    model, circuit = built
    result = check_terms(model, plain_of_hooked(model), prompts(1, length, seed)[0], circuit)
    assert {(path.source, path.through) for path in result.paths} == expected_paths(model, circuit)


@given(built=deep_models(), length=st.integers(1, 8), data=st.data())
@settings(many, max_examples=10)
def test_terms_add_up_to_the_logits_at_any_position_of_any_batch(built, length, data):
    model, circuit = built
    tokens, position = prompts(3, length), data.draw(st.integers(-length, length - 1))
    result = attribute(model, tokens, position, circuit=circuit, answers=[6, 1])
    close(result.values.sum((1, 2)), model(tokens)[:, position, [6, 1]].detach())
    assert result.position == position % length
    assert not result.values[:, :, result.position + 1 :].any()
    for index, row in enumerate(tokens):
        close(result[index].values, attribute(model, row, position, circuit=circuit, answers=[6, 1]).values)


@pytest.fixture(scope="module")
def deep_gpt2():
    config = GPT2Config(
        vocab_size=bridges_for_tests.D_VOCAB,
        n_positions=12,
        n_embd=16,
        n_layer=4,
        n_head=4,
        n_inner=20,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return booted(scattered(GPT2LMHeadModel(config)))


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "Llama"])
def test_every_term_of_a_bridge_is_what_its_knock_out_takes_away(family, deep_gpt2, unchecked):
    bridge = {"GPT-2": lambda: deep_gpt2, "GPT-NeoX": neox_like, "Llama": llama_like}[family]()
    circuit = hl.Circuit((head(0, 1), head(0, 2)), (head(1, 3),), (mlp(0), mlp(1)))
    # Llama's norms round to float32, whatever the model's dtype, and rounding is not linear.
    check_terms(bridge, bridge.plain, prompts(1, 6, d_vocab=9)[0], circuit, atol=1e-5 if family == "Llama" else 1e-10)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_on_a_handwritten_model_the_memories_are_those_of_whole_paths(positions):
    model, tokens = handwritten(positions=positions), prompts(2, 9)
    whole = attribute(model, tokens)
    found, logits, _ = direct_paths(model, tokens, 8, model.circuit, torch.arange(7))
    close(logits, whole.logits)
    for memory, values in whole.by_memory().items():
        ours = sum(value.sum(1) for path, value in found.items() if path.memory == memory)
        close(torch.zeros_like(values) + ours, values)


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_with_two_layers_and_no_biases_terms_are_sums_of_whole_paths(norm):
    model, tokens = hooked(norm), prompts(2, 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".b", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U")):
                parameter.zero_()
    whole = attribute(model, tokens)
    found, _, _ = direct_paths(model, tokens, 4, CIRCUIT, torch.arange(7))

    def summed(chosen):
        return sum(value for path, value in zip(whole.paths, whole.values.unbind(1), strict=True) if chosen(path))

    ours = {(path.source, path.through): value for path, value in found.items()}
    previous, induction, memory = (role[0] for role in (CIRCUIT.previous_token, CIRCUIT.induction, CIRCUIT.bigram))
    # In the first layer heads read nothing but embeddings, so that the sources are the same too.
    for through in ((HEADS[0],), (previous,), (previous, induction), (previous, memory)):
        close(ours["stream", through], summed(lambda path, through=through: path.through == through))
    for source, through in (("embed", ()), ("pos_embed", (induction,)), ("embed", (memory,))):
        key = (source, through)
        close(ours[key], summed(lambda path, key=key: (path.source, path.through) == key))
    for component in (*HEADS, *MLPS):
        writes = summed(lambda path, component=component: path.through[-1:] == (component,)).sum(1)
        close(sum(v.sum(1) for (_, through), v in ours.items() if through[-1:] == (component,)), writes)


def test_terms_are_grouped_and_named_by_the_circuit():
    model, tokens = hooked("LN", n_layers=3), prompts()[0]
    result = attribute(model, tokens, circuit=CIRCUIT)
    labels = {str(path): path.memory for path in result.paths}
    assert len(labels) == len(result.paths)
    assert labels["embed → unembed"] == labels["stream → bigram memory → unembed"] == labels["biases"] == "weights"
    assert labels["embed → bigram memory → unembed"] == "weights"
    assert labels["positional embed → unembed"] == labels["stream → L0MLP → unembed"] == "rest"
    assert labels["stream → previous-token head → unembed"] == "rest"
    assert labels["stream → previous-token head → induction head → unembed"] == "context"
    assert labels["stream → induction head → unembed"] == labels["embed → induction head → unembed"] == "context"
    assert labels["stream → induction head → bigram memory → unembed"] == "context"
    margin = result.margin()
    first, second = result.logits.topk(2).values
    close(margin.total, first - second)
    empty = attribute(model, tokens, circuit=hl.Circuit())
    assert {path.memory for path in empty.paths} == {"weights", "rest"}
    assert len(empty.paths) == 2 + 3 * 3 + 1
    by_writer = {path.through[-1:]: 0 for path in empty.paths}
    for path, value in zip(result.paths, result.by_path(), strict=True):
        if path.through:
            by_writer[path.through[-1:]] = by_writer[path.through[-1:]] + value
    for path, value in zip(empty.paths, empty.by_path(), strict=True):
        if path.through:
            close(value, by_writer[path.through])


def test_a_memory_with_a_norm_inside_stays_whole():
    model, tokens = hooked("LN", "solu_ln", n_layers=3), prompts()[0]
    result = attribute(model, tokens)
    assert result.completeness_error <= 1e-10
    assert [path.source for path in result.paths if path.through[-1:] == CIRCUIT.bigram] == ["stream"]
    assert result.paths[[path.through for path in result.paths].index(CIRCUIT.bigram)].memory == "weights"


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_dtypes_are_kept(dtype, relative, unchecked):
    model = hooked("LN", n_layers=4, dtype=dtype)
    result = attribute(model, prompts(), answers=[1, 2])
    assert result.values.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)  # sums of it need more digits
    assert result.completeness_error <= relative * float(result.by_path().abs().sum(1).max())


def test_prompts_are_run_in_parts_that_fit(monkeypatch):
    model, tokens = hooked("LN", n_layers=3), prompts(5)
    together = attribute(model, tokens, answers=[1, 2])
    monkeypatch.setattr(direct, "rows_at_once", lambda model, length: 2)
    sizes = []
    model.hook_dict["hook_embed"].add_hook(lambda x, hook: sizes.append(len(x)))
    close(attribute(model, tokens, answers=[1, 2]).values, together.values, atol=1e-12)
    assert sizes == [2, 2, 1]


def test_answers_are_by_default_the_candidates_or_the_likeliest(deep_gpt2):
    model = hooked("LN", n_layers=3)
    language = hl.BigramLanguage.dirichlet(7, seed=0)
    prompt = hl.hijack_prompt(language, 0, 4, 1, 6, global_candidate=2, n_prompts=2, seed=0)
    result = attribute(model, prompt)
    assert result.answers == (4, 2) == result.candidates
    assert result.pair() == (0, 1)
    close(result.margin().total, (result.logits[:, 0] - result.logits[:, 1]))
    close(result.logits, model(prompt.tokens)[:, -1, [4, 2]].detach())
    tokens = prompts(1, 6, d_vocab=13)[0]
    result = attribute(deep_gpt2, tokens, circuit=hl.Circuit())
    assert list(result.answers) == deep_gpt2(tokens[None])[0, -1].topk(10).indices.tolist()
    assert result.pair() == (0, 1)
    for answers in ([0, 4], [4, 0], [2, 4]):  # whichever is larger, and whatever the prompt's candidates
        other = attribute(model, prompt, answers=answers)
        first, second = model(prompt.tokens)[:, -1, answers].detach().T
        close(other.margin().total, first - second)
        assert other[0].pair() == (0, 1)


@pytest.mark.parametrize("position", [-1, "all"])
def test_answers_of_a_shallow_model_are_columns_of_the_whole(position):
    model, tokens = perturbed(), prompts()
    whole, some = attribute(model, tokens, position), attribute(model, tokens, position, answers=["5", 0, 3])
    assert some.answers == (5, 0, 3)
    assert some.paths == whole.paths
    close(some.values, whole.values[..., [5, 0, 3]])
    close(some.logits, whole.logits[..., [5, 0, 3]], atol=0)
    for part, value in vars(whole.margin(3, 5)).items():
        close(getattr(some.margin("3", 5), part), value)
    assert some.completeness_error <= 1e-10


def test_answers_are_shown_saved_and_indexed_by_their_tokens(deep_gpt2, tmp_path):
    text = "one two three one two three one"
    result = attribute(deep_gpt2, text, circuit=CIRCUIT, answers=["two", "nine", "b"])
    assert result.answers == (3, 10, 12)
    assert result.axes == ("path", "source", "answer")
    assert result.pair("b", "two") == (2, 0) == result.pair(12, 3)
    assert result.source_texts()[-3:] == text.split()[-3:]
    assert set(result.vocab) == {*result.tokens.tolist(), 3, 10, 12}
    assert "logit 'two'" in str(attribute(deep_gpt2, text, circuit=CIRCUIT, answers=["two", "one"]))
    table = result.to_pandas()
    assert list(table.columns) == ["path", "memory", "source", "token", "logit"]
    sums = table.groupby("token")["logit"].sum()
    close(torch.tensor([sums[token] for token in ("two", "nine", "b")]).double(), result.logits)
    assert set(result.top(2)["token"]) < {"two", "nine", "b"}
    assert "two" in result._repr_html_()
    assert "two" in hl.show.token_paths(result, "two", "b").caption
    result.save(tmp_path / "result")
    loaded = LogitAttribution.load(tmp_path / "result")
    assert torch.equal(loaded.values, result.values)
    assert (loaded.answers, loaded.vocab, loaded.paths) == (result.answers, result.vocab, result.paths)
    assert str(loaded) == str(result)


def test_a_long_table_shows_the_paths_that_make_the_largest_difference():
    model, tokens = hooked("LN", n_layers=16, n_heads=4), prompts()[0]
    result = attribute(model, tokens, circuit=hl.Circuit())
    lines = [line for line in str(result).splitlines() if "→" in line]
    a, b = result.pair()
    difference = (result.by_path()[:, a] - result.by_path()[:, b]).abs()
    assert len(lines) == 20 < 80 < len(result.paths)
    largest = difference.topk(20).indices.tolist()
    left = (result.by_path()[:, a] - result.by_path()[:, b]).sum() - sum(
        result.by_path()[index, a] - result.by_path()[index, b] for index in largest
    )
    said = f"{len(result.paths) - 20} more paths make less of a difference each, {float(left):+.3f} together."
    assert said in str(result)
    for index in largest:
        assert str(result.paths[index]) in str(result)


def test_hooks_stay_and_those_that_go_around_the_weights_are_noticed():
    model, tokens = hooked("LN", n_layers=3), prompts()
    model.hook_dict["hook_embed"].add_hook(lambda x, hook: x * 0.5)
    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    result = attribute(model, tokens, answers=[1, 2])
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    close(result.values.sum((1, 2)), model(tokens)[:, -1, [1, 2]].detach())
    assert not result.values.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with hl.hooks.ablate(model, head(2, 0)), pytest.raises(ValueError, match="misses the logits by up to"):
        attribute(model, tokens, answers=[1, 2])
    for name, component in (("attn.hook_v", "L1H0"), ("mlp.hook_pre", "L1MLP")):
        with (
            model.hooks(fwd_hooks=[(f"blocks.1.{name}", lambda x, hook: x + 1)]),
            pytest.raises(ValueError, match=f"what {component} reads cannot be split"),
        ):
            attribute(model, tokens, answers=[1, 2])


def test_numbers_that_are_none_are_refused_and_so_are_too_many(monkeypatch, unchecked):
    model = hooked("LN", n_layers=3)
    monkeypatch.setattr(logits, "_MOST_CELLS", 100)
    with pytest.raises(ValueError, match="answers must be fewer: their parts are 180 numbers or more, over 100"):
        attribute(model, prompts(), answers=[1, 2])
    monkeypatch.undo()
    with torch.no_grad():
        model.blocks[0].mlp.W_out.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"finite, got nan in blocks\.0\.mlp\.W_out"):
        attribute(model, prompts(), circuit=hl.Circuit(), answers=[1, 2])


DEEP = hooked("LN", n_layers=3)
test_what_has_no_direct_attribution_is_refused = refused(
    ValueError,
    {
        "answers must be given for a batch of prompts to this model: model has 3 layers": lambda: attribute(
            DEEP, prompts()
        ),
        "position must be an int for this model, got 'all': model has 3 layers": lambda: attribute(
            DEEP, prompts(), "all", answers=[1, 2]
        ),
        "cfg.output_logits_soft_cap": lambda: attribute(hooked(n_layers=3, output_logits_soft_cap=30.0), [1, 2]),
        "cfg.use_normalization_before_and_after": lambda: attribute(
            hooked("RMS", n_layers=3, use_normalization_before_and_after=True), [1, 2]
        ),
        r"answers must be one or several different tokens, got \[\]": lambda: attribute(DEEP, [1, 2], answers=[]),
        r"answers must be one or several different tokens, got \[1, 1\]": lambda: attribute(
            DEEP, [1, 2], answers=[1, 1]
        ),
        "answers holds token id 7; the vocabulary has ids 0 to 6": lambda: attribute(DEEP, [1, 2], answers=[1, 7]),
        "answers holds the text 'a', but the model has no tokenizer": lambda: attribute(DEEP, [1], answers=["a", "b"]),
        "answers holds 'a b', which is not a single token": lambda: attribute(
            neox_like(), [1, 2], circuit=hl.Circuit(), answers=["a b", "a"]
        ),
        "answers holds 'x', which is not a single token: the model's tokenizer does not know it": lambda: attribute(
            handwritten(), [1], answers=["x", 1]
        ),
        "a must be a token id among the answers, got 3": lambda: attribute(DEEP, [1, 2], answers=[1, 2]).margin(3, 1),
        "a must be a token of the model's vocabulary among the answers, got '3'": lambda: attribute(
            perturbed(), [1, 2], answers=[1, 2]
        ).margin("3", 1),
    },
)
test_answers_that_are_no_tokens_are_refused = refused(
    TypeError,
    {
        "answers must be a list of tokens, each a text or an id, got 1.5": lambda: attribute(DEEP, [1], answers=1.5),
        "answers must be tokens, each a text .* for each prompt, got tensor.1.5": lambda: attribute(
            DEEP, [1], answers=torch.tensor(1.5)
        ),
        "answers must be tokens, each a text or an id, got 1.5": lambda: attribute(DEEP, [1], answers=[1.5, 2]),
        "answers must be tokens, each a text or an id, got True": lambda: attribute(DEEP, [1], answers=[True, 2]),
    },
)


def test_answers_must_fit_the_last_axis(unchecked):
    result = attribute(DEEP, [1, 2], answers=[1, 2])
    with pytest.raises(ValueError, match="answers must name all 2 tokens of the last axis, got 3"):
        LogitAttribution(**{**vars(result), "answers": (1, 2, 3)})


# Answers of each prompt's own


@pytest.mark.parametrize("name", ["two layers", "deep", "bridge"])
def test_each_prompt_of_a_batch_may_have_its_own_answers(name, tmp_path, unchecked):
    build = {"two layers": lambda: hooked("LN"), "deep": lambda: hooked("LN", n_layers=3), "bridge": gpt2_like}
    model, tokens = build[name](), prompts(3, 5)
    answers = [[1, 2], [3, 0], [2, 1]]
    for position in (-1, 2, *(["all"] if name == "two layers" else [])):
        found = attribute(model, tokens, position, answers=answers)
        with torch.no_grad():
            logits = model(tokens) if position == "all" else model(tokens)[:, position]
        for index, (ids, own) in enumerate(zip(tokens, answers, strict=True)):
            alone = attribute(model, ids, position, answers=own)
            close(found[index].values, alone.values, atol=1e-10)
            assert found[index].answers == alone.answers == tuple(own)
            close(found.logits[index], logits[index][..., own].detach(), atol=1e-10)
            close(found.margin().total[index], alone.margin().total, atol=1e-10)
            close(found.margin().context[index], alone.margin().context, atol=1e-10)
        assert found.completeness_error < 1e-8
    same = attribute(model, tokens, answers=torch.tensor(answers))
    assert same.answers == ((1, 2), (3, 0), (2, 1))
    same.save(tmp_path / "own.safetensors")
    assert hl.LogitAttribution.load(tmp_path / "own.safetensors").answers == same.answers
    table = same.to_pandas()
    assert len(table) == same.values.numel()
    last = table[table["batch"] == 2].groupby("token", sort=False)["logit"].sum()
    close(torch.tensor(last.to_numpy()), same.logits[2], atol=1e-10)
    assert repr(same)
    for wrong, message in (
        ([[1, 2], [3, 0]], r"answers must be one list, or one for each of 3 prompts, got 2 lists"),
        ([[1, 2], [3, 0], [1, 2, 3]], r"answers must be equally many for every prompt, got \[2, 2, 3\]"),
        ([[1, 2], [3, 0], [1, 1]], r"answers\[2\] must be one or several different tokens"),
        ([[1, 2], [3, 0], [1, 99]], r"answers\[2\] holds token id 99"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(model, tokens, answers=wrong)
    with pytest.raises(ValueError, match="index the batch first"):
        same.token_text(0)


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_without_a_circuit_heads_bear_their_places(n_layers, unchecked):
    model = hooked("LN", n_layers=n_layers)
    model.circuit = None
    found = attribute(model, prompts(1, 5)[0])
    last = f"L{n_layers - 1}H1"
    assert any(last in path.label for path in found.paths)
    assert float(found.margin().context) == 0
    close(found.margin().total, found.logits[found.pair()[0]] - found.logits[found.pair()[1]], atol=1e-10)
