"""Models whose outputs are not their tokens: fewer, more, or one. Answers are outputs; keys and queries are inputs.

Each model is a part of a larger one with as many outputs as tokens, which gives the same numbers for the part.
"""

import functools

import pytest
import torch
from models_for_tests import CIRCUIT, SHAPE, close, hooked
from test_words import folders
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

import hijack_lens as hl
from hijack_lens import hooks, metrics

LARGE, TOKENS = 20, 7
PROMPTS, OTHERS = (torch.randint(TOKENS, (3, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
PROMPT = PROMPTS[0]


def native(**config):
    options = {**SHAPE, "n_layers": 2, "act_fn": "gelu", "normalization_type": None, "seed": 0, **config}
    return TransformerBridge.boot_native(options, device="cpu", dtype=torch.float64)


@functools.cache
def model_and_larger(family, n_outputs):
    build = hooked if family == "hooked" else native
    larger, model = build(d_vocab=LARGE), build(d_vocab=TOKENS, d_vocab_out=n_outputs)
    generator = torch.Generator().manual_seed(0)
    theirs = dict(larger.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = theirs[name]
            if family != "hooked":
                whole.copy_(0.4 * torch.randn(whole.shape, generator=generator, dtype=torch.float64))
            parameter.copy_(whole[tuple(map(slice, parameter.shape))])
    model.circuit = larger.circuit = CIRCUIT
    return model, larger


def views(result):
    """Everything that shows a result works."""
    assert repr(result)
    for view in ("_repr_html_", "to_pandas", "picture"):
        if hasattr(result, view):
            getattr(result, view)()


@pytest.mark.parametrize(("family", "n_outputs"), [("hooked", 1), ("native", 19)])
def test_answers_are_outputs_and_keys_and_queries_are_tokens(family, n_outputs, tmp_path, unchecked):
    model, larger = model_and_larger(family, n_outputs)
    tokens, outputs = list(range(TOKENS)), list(range(n_outputs))
    close(model(PROMPTS).detach(), larger(PROMPTS)[..., :n_outputs].detach())

    whole = hl.attribute(model, PROMPT)
    part = hl.attribute(larger, PROMPT, answers=outputs)
    close(whole.values, part.values)
    close(whole.logits, part.logits)
    assert whole.axes[-1] == "d_vocab"
    assert whole.top(n_outputs)["token"].tolist() == list(map(str, part.logits.argsort(descending=True).tolist()))
    last = hl.attribute(model, PROMPTS, answers=n_outputs - 1)  # one is enough
    close(last.values[0, ..., 0], whole.values[..., -1])
    views(hl.attribute(model, PROMPT, answers=[n_outputs - 1]))
    whole.save(tmp_path / "whole")
    assert not hl.LogitAttribution.load(tmp_path / "whole").outputs_are_tokens

    given = {"query_tokens": tokens, "answers": outputs}
    context = hl.context_memory(model, PROMPT)
    close(context.values, hl.context_memory(larger, PROMPT, **given).values)
    conflict, expected = hl.memory_conflict(model, PROMPT), hl.memory_conflict(larger, PROMPT, **given)
    for name in ("context", "weights", "rest", "logits"):
        close(getattr(conflict, name), getattr(expected, name))
    assert conflict.winners == expected.winners
    assert conflict.answers == context.answers == tuple(outputs)
    matrix = hl.memory_matrix(model, "bigram")
    close(matrix.values, hl.memory_matrix(larger, "bigram", key_tokens=tokens, value_tokens=outputs).values)
    neurons = hl.memory_neurons(model, "bigram", k=2)
    written = model.blocks[1].mlp.W_out @ model.W_U
    written = written - written.mean(1, keepdim=True) * (n_outputs > 1)
    close(neurons.promoted_logits[:, 0], written.max(1).values.detach())
    assert torch.equal(neurons.promoted[:, 0], written.argmax(1))
    for result in (whole, context, conflict, matrix, neurons):
        views(result)

    logits, other = model(PROMPTS).detach(), model(OTHERS).detach()
    prob = logits[:, -1].softmax(-1)[:, -1].mean()
    assert hl.shapley(model, PROMPTS, metrics.prob(n_outputs - 1)).full == pytest.approx(float(prob))
    sweep = hooks.patch_sweep(model, PROMPTS, OTHERS, metrics.log_prob(n_outputs - 1), "resid_pre", "all")
    assert sweep.clean == pytest.approx(float(logits[:, -1].log_softmax(-1)[:, -1].mean()))
    assert sweep.corrupted == pytest.approx(float(other[:, -1].log_softmax(-1)[:, -1].mean()))
    close(sweep.values[0, 0, 0], torch.tensor(sweep.clean, dtype=torch.float64))


@pytest.mark.parametrize("family", ["hooked", "native"])
def test_an_explanation_and_a_dose_are_of_outputs(family, tmp_path, unchecked):
    model, larger = model_and_larger(family, 3)
    found = hl.explain(model, PROMPT, 2, 0)
    logits = model(PROMPT[None])[0, -1].detach()
    close(found.margin.total, logits[2] - logits[0])
    assert found.names == ("2", "0")
    hl.write_report(found, tmp_path / "report.html")
    doses = [hl.dose_response(one, hl.Bigram(5, 0, 2), 3) for one in (model, larger)]
    close(doses[0].margin.total, doses[1].margin.total)


def test_a_deep_model_shows_the_largest_of_its_outputs():
    for n_outputs, shown in ((1, 1), (3, 3), (50, 10)):
        model = hooked("LN", n_layers=3, d_vocab_out=n_outputs)
        result, logits = hl.attribute(model, PROMPT), model(PROMPT[None])[0, -1].detach()
        assert list(result.answers) == logits.topk(shown).indices.tolist()
        close(result.values.sum((0, 1)), logits.topk(shown).values)
        views(result)
        conflict = hl.memory_conflict(model, PROMPT)
        assert conflict.to_pandas()["predicted"].tolist()[int(PROMPT[-1])] == str(int(logits.argmax()))


def test_one_output_is_its_own_answer(unchecked):
    model, _ = model_and_larger("hooked", 1)
    result = hl.attribute(model, PROMPT)
    close(sum(result.by_memory().values()), model(PROMPT[None])[0, -1].detach())
    assert "logit '0'" in repr(result)
    assert "has the logit" in result._repr_html_()
    for margin in (result.margin, hl.attribute(hooked(), PROMPT, answers=4).margin):
        with pytest.raises(ValueError, match=r"this attribution is of one answer, '[04]', which has no other"):
            margin()
    assert set(hl.memory_conflict(model, PROMPT).winners) == {"both"}


def test_outputs_that_are_no_tokens_are_called_by_their_ids(unchecked):
    tokenizer = AutoTokenizer.from_pretrained(folders() / "words")
    model = hooked(d_vocab=len(tokenizer), d_vocab_out=3)
    model.set_tokenizer(tokenizer)
    result = hl.attribute(model, "Spain is Rome")
    assert [result.token_text(i) for i in range(3)] == ["0", "1", "2"]
    assert result.source_texts() == ["<end>", "Spain", "is", "Rome"]
    memory = hl.context_memory(model, "Spain is Rome")
    assert memory.answer_texts == ("0", "1", "2")
    assert memory.query_texts[2] == "Spain"
    assert hl.memory_conflict(model, "Spain is").to_pandas()["predicted"].isin(["0", "1", "2"]).all()
    assert hl.memory_matrix(model).to_pandas()["value"].unique().tolist() == ["0", "1", "2"]
    assert set(hl.memory_neurons(model).to_pandas()["promoted"].dropna()) <= {"0", "1", "2"}
    refused = "the model's 3 outputs are not its 12 tokens"
    for call in (
        lambda: hl.attribute(model, "Spain is", answers=["Rome", "Paris"]),
        lambda: hl.explain(model, "Spain is", "Rome", "Paris"),
        lambda: hl.logit_diff("Rome", "Paris").on(model),
        lambda: hl.context_memory(model, "Spain is", answers="Rome"),
        lambda: hl.memory_matrix(model, value_tokens="Rome"),
        lambda: hl.dose_response(model, hl.Bigram("is", "Rome", "Paris"), 3),
        lambda: hl.dose_response(model, hl.Fact("Spain", "Rome", "Paris", "{subject} is {answer} ."), 3),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    del model.circuit
    said = hl.explain(model, "Spain is", 0, 1)  # without a circuit
    assert said.names == ("0", "1")
    assert said.total == pytest.approx(float(said.attribution.logits[0] - said.attribution.logits[1]))
    with pytest.raises(ValueError, match="model must have an output per token; got 3 outputs for 12 tokens: name"):
        hl.find_circuit(model)
    for call in (
        lambda: hl.attribute(model, "Spain is", answers=[0, 3]),
        lambda: metrics.prob(3).on(model),
        lambda: hl.context_memory(model, "Spain is", "L1H0", answers=[11]),
        lambda: hl.memory_matrix(model, "all", value_tokens=[3]),
    ):
        with pytest.raises(ValueError, match=r"holds token id (3|11); the vocabulary has ids 0 to 2"):
            call()
