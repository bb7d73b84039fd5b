"""A real language model of thirty layers, from a package: which memory wrote its answers, and the knob."""

import pytest
import torch

import hijack_lens as hl
from hijack_lens import Component, attribute_sources, hooks
from hijack_lens.models import load_model

QUESTION = "The capital of France is"
SAID = "The capital of France is London. "
# Measured once with an implementation of its own, by automatic differentiation in float64.
MARGINS = {
    QUESTION: {"total": -4.13, "first token": -3.30},
    SAID + QUESTION: {"total": -1.75, "first token": -2.06, "London": 0.75},
    SAID * 3 + QUESTION: {"total": 2.75, "first token": -0.59, "London": 3.20},
    "The capital of Italy is London. " + QUESTION: {"total": -6.30, "first token": -3.44, "London": -0.22},
}


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m")


def test_it_reads_text_as_its_own_tokenizer_does(model):
    assert hl.attribute_sources(model, QUESTION).source_texts() == ["The", "␣capital", "␣of", "␣France", "␣is"]
    chat = attribute_sources(model, [{"role": "user", "content": QUESTION}])
    assert chat.source_texts()[0] == "<|im_start|>"
    assert chat.source_texts().count("<|im_start|>") == 3  # system, user, assistant; none twice


@pytest.mark.parametrize(
    ("prompt", "context", "expected"),
    [
        ("The fox ate it. Then pi is 3.14 and it is", None, " fox ate it."),
        ("The 🦊 ate it. Then pi is 3.14 and it is", None, " 🦊 ate it."),
        ("The 🦊 lives in Ouagadougou. It lives in", "Ouagadougou", " Ouagadougou"),
        ("So the 🦊 is in 北京 café. Then it is", "北京", " 北京"),
        ("So one two one two one. Then it is", "one two one", " one two one two one"),
    ],
)
def test_parts_of_prompts_are_found_whatever_their_characters_are_cut_into(prompt, context, expected, model):
    result = attribute_sources(model, prompt, [" Paris", " Rome"], context=context)
    assert model.tokenizer.decode(result.tokens[list(result.context)]) == expected


def test_both_answers_are_compared_as_the_contexts_is_written_there(model):
    prompts = [f"The capital of {x} is Rome. So the capital of {x} is" for x in ("France", "Spain", "Japan", "Poland")]
    found = []
    for rome, paris in (("Rome", "Paris"), (" Rome", "Paris"), ("Rome", " Paris"), (" Rome", " Paris")):
        try:
            found.append(hl.find_carriers(model, prompts, [rome] * 4, [paris] * 4).flow)
        except ValueError as error:  # so few prompts may single out no head; then all say so alike
            found.append(str(error))
    assert all(torch.equal(one, found[0]) if isinstance(one, torch.Tensor) else one == found[0] for one in found)


@pytest.mark.parametrize("prompt", MARGINS)
def test_shares_of_source_tokens_are_those_of_another_implementation(prompt, model):
    result = attribute_sources(model, prompt, [" London", " Paris"])
    with torch.no_grad():
        logits = model(prompt)[0, -1]
    london, paris = (model.to_single_token(word) for word in (" London", " Paris"))
    assert float(result.margin().total) == pytest.approx(float(logits[london] - logits[paris]), abs=1e-4)
    shares = (result.values[..., 0] - result.values[..., 1]).sum(0)
    texts = result.source_texts()
    found = {
        "total": float(result.margin().total),
        "first token": float(shares[0]),
        "London": float(sum(share for share, text in zip(shares, texts, strict=True) if text == "␣London")),
    }
    assert {name: found[name] for name in MARGINS[prompt]} == pytest.approx(MARGINS[prompt], abs=0.011)
    assert result.completeness_error < 1e-4


def test_it_is_explained_in_one_call(model):
    said = hl.explain(model, SAID + QUESTION, "London", "Paris")
    assert said.names == ("␣London", "␣Paris")
    assert said.winner == "weights"
    # Its first token is the statement's, with which it is left out and said again.
    tokens = [model.to_single_token(word) for word in (" London", " Paris")]
    for dose, margin in said.doses.items():
        logits = model(SAID * dose + QUESTION)[0, -1].detach()
        assert margin == pytest.approx(float(logits[tokens[0]] - logits[tokens[1]]), abs=1e-4)
    assert said.doses[2] > 0  # said twice, it wins
    assert said.verdict.startswith("The weights win: '␣Paris' over '␣London' by 1.75 logits; the context gave +0.56")


def test_the_knob_turns_what_the_carriers_read(model):
    heads = tuple(Component(23, "head", head) for head in (0, 1, 2, 4, 5, 7))
    prompt = "The language spoken in Peru is German. The language spoken in Peru is"
    german, spanish = (model.to_single_token(word) for word in (" German", " Spanish"))
    margins = []
    for strength in (0.0, 1.0, 2.0, 4.0, 8.0):
        with torch.no_grad(), hooks.scale(model, heads, strength, source="German"):
            logits = model(prompt)[0, -1]
        margins.append(float(logits[german] - logits[spanish]))
    assert margins == sorted(margins)
    assert margins[0] < 0 < margins[-1]
    with torch.no_grad():
        plain = model("The language spoken in Peru is")
        with hooks.scale(model, heads, 8.0, source="German"):
            assert torch.equal(model("The language spoken in Peru is"), plain)
            generated = model.generate(prompt, max_new_tokens=3, do_sample=False, verbose=False)
    assert generated.removeprefix(prompt).startswith(" German")
