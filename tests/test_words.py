"""From a user's text to token ids, on both families of models: never padded, never unknown, never a mere piece."""

import functools
import inspect
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_for_tests import save_handmade, save_with_bpe
from models_for_tests import close, hooked, native, prompts
from transformers import AutoTokenizer

import hijack_lens as hl
from hijack_lens import core, hooks, metrics, show
from hijack_lens.models.loading import load_model

SHORT, LONG = "Rome is", "Rome is Paris and Rome is"
PAIR = [f"France's capital is {city}" for city in ("Rome", "Paris")]
NO_CIRCUIT = hl.Circuit()


@functools.cache
def folders():
    """Folders with a GPT-2 of subword tokens, and with one of whole words, some of them unknown."""
    root = Path(tempfile.mkdtemp())
    for name, save in (("bpe", functools.partial(save_with_bpe, n_layers=2)), ("words", save_handmade)):
        (root / name).mkdir()
        save(root / name)
    return root


@functools.cache
def model_of(family, kind="bpe"):
    folder = folders() / kind
    if family == "bridge":
        model = load_model(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = hooked("LN", d_vocab=len(tokenizer), n_ctx=96)
        model.set_tokenizer(tokenizer)
    model.circuit = hl.Circuit("L0H0", "L1H0", "L1MLP")
    return model


FAMILIES = pytest.mark.parametrize("family", ["hooked", "bridge"])
DIFF = hl.logit_diff(5, 6)

# Everything that takes prompts, as a function of two (lists of) prompts.
TAKES = {
    "attribute": lambda m, p, q: hl.attribute(m, p, answers=[5, 6]),
    "shapley": lambda m, p, q: hl.shapley(m, p, DIFF),
    "shapley's reference": lambda m, p, q: hl.shapley(m, q, DIFF, how="mean", reference=p),
    "patch_sweep": lambda m, p, q: hooks.patch_sweep(m, p, q, DIFF, "attn_out"),
    "corrupted": lambda m, p, q: hooks.patch_sweep(m, q, p, DIFF, "attn_out"),
    "attribution_patch": lambda m, p, q: hooks.attribution_patch(m, p, q, DIFF, "attn_out"),
    "ablate_sweep": lambda m, p, q: hooks.ablate_sweep(m, p, DIFF),
    "ablate_sweep's reference": lambda m, p, q: hooks.ablate_sweep(m, q, DIFF, how="mean", reference=p),
    "path_sweep": lambda m, p, q: hooks.path_sweep(m, p, q, DIFF, ["L0H0"]),
    "edge_attribution": lambda m, p, q: hooks.edge_attribution(m, p, q, DIFF, ["L0H0"]),
    "ablate": lambda m, p, q: hooks.ablate(m, "all", "mean", p),
    "patch": lambda m, p, q: hooks.patch(m, "all", p),
    "patch_path": lambda m, p, q: hooks.patch_path(m, "embed", "unembed", "unembed", p),
}
SINGLE = {  # and of one prompt
    "explain": lambda m, p: hl.explain(m, p, 5, 6),
    "attribute_scores": lambda m, p: hl.attribute_scores(m, p),
    "context_memory": lambda m, p: hl.context_memory(m, p, query_tokens=[5], answers=[5]),
    "memory_conflict": lambda m, p: hl.memory_conflict(m, p, query_tokens=[5], answers=[5, 6]),
    "attention": lambda m, p: hl.show.attention(m, p),
}


@FAMILIES
@pytest.mark.parametrize("name", TAKES)
def test_prompts_of_unequal_length_are_refused_by_their_lengths(family, name, unchecked):
    model, take = model_of(family), TAKES[name]
    lengths = [model.to_tokens(text).shape[1] for text in (SHORT, LONG)]
    ragged = [[1, 2, 3], [4, 5]]
    for texts in ([SHORT, LONG], (SHORT, LONG), np.array([SHORT, LONG])):
        with pytest.raises(
            ValueError, match=rf"of one length, .* got \[{lengths[0]}, {lengths[1]}\] tokens: pass texts"
        ):
            take(model, texts, PAIR)
    for ids in (ragged, tuple(map(tuple, ragged)), list(map(torch.tensor, ragged)), list(map(np.array, ragged))):
        with pytest.raises(ValueError, match=r"of one length, .* got \[3, 2\] tokens"):
            take(model, ids, PAIR)
    padded = model.tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    with pytest.raises(TypeError, match=r"got a BatchEncoding of 'input_ids'.*'attention_mask': give its ids"):
        take(model, padded, PAIR)
    with pytest.raises(TypeError, match=r"got a dict of 'input_ids', 'attention_mask'"):
        take(model, dict(padded), PAIR)


@FAMILIES
def test_texts_in_a_batch_are_what_each_is_alone(family, unchecked):
    model = model_of(family)
    each = [hl.attribute(model, text, answers=[5, 6]) for text in PAIR]
    for batch in (PAIR, tuple(PAIR), np.array(PAIR), [model.to_tokens(text)[0].tolist() for text in PAIR]):
        together = hl.attribute(model, batch, answers=[5, 6])
        for row, alone in enumerate(each):
            close(together[row].values, alone.values, atol=1e-5)
            close(alone.logits, model(model.to_tokens(PAIR[row]))[0, -1, [5, 6]].detach(), atol=1e-5)
        single = [hl.shapley(model, text, DIFF).values for text in PAIR]
        close(hl.shapley(model, batch, DIFF).values, (single[0] + single[1]) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="position must be 'all' or an int from -"):
        hl.attribute(model, SHORT, model.to_tokens(SHORT).shape[1], answers=[5, 6])  # a longer text's last position


@FAMILIES
def test_words_that_the_tokenizer_lacks_are_named_wherever_they_go_in(family, unchecked):
    model, known = model_of(family, "words"), ["Spain is", "Norway is"]
    unknown = ["Spain is", "Germany is"]
    for name, take in TAKES.items():
        with pytest.raises(
            ValueError, match="must be of words that the model's tokenizer knows, which lacks 'Germany'"
        ):
            take(model, unknown, known)
        assert take(model, known, known) is not None, name
    for take in SINGLE.values():
        with pytest.raises(ValueError, match="which lacks 'Germany', 'Peru'"):
            take(model, "Germany is Peru of")
    unknown = "'London', which is not a single token: the model's tokenizer does not know it"
    for call in (
        lambda: hl.logit_diff("London", "Berlin").on(model),
        lambda: metrics.prob(["London", "Paris"]).on(model),
        lambda: hl.attribute(model, "Spain is", answers=["London", "Berlin"]),
        lambda: hl.explain(model, "Spain is", "London", "Paris"),
        lambda: hl.context_memory(model, "Spain is", answers="London"),
        lambda: hl.context_memory(model, "Spain is", query_tokens=["London"]),
        lambda: hl.memory_matrix(model, key_tokens=["London"]),
        lambda: hl.memory_neurons(model, key_tokens=["London"]),
        lambda: hl.find_circuit(model, vocabulary=["London", "Paris"]),
        lambda: hl.find_circuit(model, triggers=["London"]),
        lambda: hl.dose_response(model, hl.Bigram("is", "London", "Paris"), 3),
    ):
        with pytest.raises(ValueError, match=unknown):
            call()
    with pytest.raises(ValueError, match='which lacks "Germany\'s"'):
        hl.dose_response(model, hl.Fact("Germany", "Rome", "Paris"), 3)
    written_out = hl.attribute(model, "<end> Spain is").tokens  # written out, it is known; and is there once
    assert written_out.tolist() == hl.attribute(model, "Spain is").tokens.tolist()
    assert hl.attribute(model, "Spain <end> is").tokens.tolist().count(0) == 2


def test_a_language_with_a_token_for_the_unknown_does_not_take_it_for_any(unchecked):
    language = hl.BigramLanguage.from_text("the cat sat on the mat", level="word", max_vocab=4)
    assert "<unk>" in language.tokens
    model = hl.associative_transformer(language, n_ctx=8, device="cpu")
    with pytest.raises(ValueError, match="which lacks 'zebra', 'dog'"):
        hl.attribute(model, "the zebra sat dog")
    with pytest.raises(ValueError, match="holds 'zebra', which is not a single token"):
        hl.attribute(model, "the", answers=["zebra", "the"])
    spaced, plain = (hl.hijack_prompt(language, f"{s}the", f"{s}cat", 1, 8, seed=0) for s in (" ", ""))
    assert torch.equal(spaced.tokens, plain.tokens)
    close(hl.theory.margin(spaced, language).total, hl.theory.margin(plain, language).total)


@FAMILIES
def test_an_answer_is_found_with_and_without_its_space_and_the_result_shows_which(family, tmp_path, unchecked):
    model, prompt = model_of(family), "France's capital is"
    rome, paris = (model.to_single_token(f" {city}") for city in ("Rome", "Paris"))
    logits = model(model.to_tokens(prompt))[0, -1].detach()
    truth = float(logits[rome] - logits[paris])
    for answers in (["Rome", "Paris"], [" Rome", " Paris"], (" Rome", "Paris"), np.array(["Rome", " Paris"])):
        result = hl.attribute(model, prompt, answers=answers)
        assert result.answers == (rome, paris)
        assert [result.token_text(i) for i in (0, 1)] == ["␣Rome", "␣Paris"]
        assert "logit '␣Rome'" in repr(result)
        assert float(result.margin().total) == pytest.approx(truth, abs=1e-5)
        assert torch.equal(result.margin("Rome", " Paris").total, result.margin(" Rome", "Paris").total)
        metric = hl.logit_diff(answers[0], answers[1]).on(model)
        assert metric.name == "logit '␣Rome' − logit '␣Paris'"
        assert float(metric(logits[None, None])) == pytest.approx(truth, abs=1e-5)
        explained = hl.explain(model, prompt, answers[0], answers[1], circuit=NO_CIRCUIT)
        assert explained.names == ("␣Rome", "␣Paris")
        assert float(explained.margin.total) == pytest.approx(truth, abs=1e-5)
        memory = hl.context_memory(model, prompt, query_tokens=answers, answers=answers)
        assert memory.answer_texts == memory.query_texts == ("␣Rome", "␣Paris")
        assert memory.row("Rome") == memory.row(" Rome") == 0
        dose = hl.dose_response(
            model, hl.Fact("France", answers[1], answers[0], "{subject}'s capital is {answer}."), 3, circuit=NO_CIRCUIT
        )
        assert dose.conflicts[0].texts == (" Rome", " Paris")
        assert float(dose.margin.total[0, 0]) == pytest.approx(truth, abs=1e-5)
    assert hl.attribute(model, prompt, answers=["is", " is"]).answers == tuple(
        map(model.to_single_token, ("is", " is"))
    )


@FAMILIES
def test_the_pieces_of_a_word_are_not_its_answers(family, unchecked):
    model = model_of(family)
    ids = model.tokenizer("Rome", add_special_tokens=False)["input_ids"]
    pieces = [model.tokenizer.decode([i]) for i in ids]
    assert len(pieces) > 1
    hint = rf"holds \['{pieces[0]}', .*, the pieces of 'Rome' .* with one, ' Rome' is a single token"
    for call in (
        lambda: hl.attribute(model, "Rome is", answers=pieces),
        lambda: hl.logit_diff(pieces, 5).on(model),
        lambda: metrics.prob(tuple(pieces)).on(model),
        lambda: hl.context_memory(model, "Rome is", answers=pieces),
    ):
        with pytest.raises(ValueError, match=hint):
            call()
    assert hl.attribute(model, "Rome is", answers=["A", "B"]).answers == tuple(map(model.to_single_token, "AB"))
    assert hl.attribute(model, "Rome is", answers=pieces[::-1]).answers == tuple(ids[::-1])
    with pytest.raises(
        ValueError, match="holds 'Romeo', which is not a single token: the model's tokenizer reads it as"
    ):
        hl.attribute(model, "Rome is", answers="Romeo")


def test_ids_in_any_container_are_the_same_prompt():
    for model in (hooked(), native()[0]):
        ids = prompts(2)
        expected = hl.attribute(model, ids, answers=[1, 2]).values
        for given in (
            ids.tolist(),
            ids.numpy(),
            ids.numpy().astype(np.int32),
            list(ids),
            tuple(map(tuple, ids.tolist())),
        ):
            close(hl.attribute(model, given, answers=[1, 2]).values, expected)


def _patched(intervention):
    """What the last logits are under an intervention."""
    with torch.no_grad(), intervention:
        return intervention.model(torch.tensor([[1, 2, 3, 4]]))[0, -1]


# Everything that takes texts, as a function of (lists of) texts or tokens and `prepend_bos`.
BEGIN = {
    "attribute": lambda m, p, **o: hl.attribute(m, p, answers=[5, 6], **o).values,
    "attribute_sources": lambda m, p, **o: hl.attribute_sources(m, p, [5, 6], context=[1], **o).values,
    "attribute_scores": lambda m, p, **o: hl.attribute_scores(m, p, "L1H0", **o).values,
    "shapley": lambda m, p, **o: hl.shapley(m, p, DIFF, **o).values,
    "shapley's reference": lambda m, p, **o: hl.shapley(m, p, DIFF, how="patch", reference=p, **o).values,
    "explain": lambda m, p, **o: torch.tensor(hl.explain(m, p, 5, 6, **o).total),
    "context_memory": lambda m, p, **o: hl.context_memory(m, p, answers=[5, 6], **o).attention,
    "memory_conflict": lambda m, p, **o: hl.memory_conflict(m, p, query_tokens=[3, 4], answers=[5, 6], **o).logits,
    "patch_sweep": lambda m, p, **o: hooks.patch_sweep(m, p, p, DIFF, "attn_out", **o).clean,
    "ablate_sweep": lambda m, p, **o: hooks.ablate_sweep(m, p, DIFF, "attn_out", **o).values,
    "attribution_patch": lambda m, p, **o: hooks.attribution_patch(m, p, p, DIFF, "attn_out", **o).clean,
    "path_sweep": lambda m, p, **o: hooks.path_sweep(m, p, p, DIFF, ["L0H0", "L1H0"], **o).clean,
    "edge_attribution": lambda m, p, **o: hooks.edge_attribution(m, p, p, DIFF, ["L0H0", "L1H0"], **o).clean,
    "attention": lambda m, p, **o: torch.tensor(show.attention(m, p, "L0H0", **o).panels[0].props["attention"]),
}


@FAMILIES
@pytest.mark.parametrize("name", BEGIN)
def test_texts_begin_as_they_are_asked_to(family, name, unchecked):
    model = model_of(family)
    for begins in (True, False):
        tokens = model.to_tokens(LONG, prepend_bos=begins)[0]
        assert (int(tokens[0]) == model.tokenizer.bos_token_id) == begins
        close(BEGIN[name](model, LONG, prepend_bos=begins), BEGIN[name](model, tokens))
    assert core.texts.text_ids(model, LONG, "prompt") == model.to_tokens(LONG)[0].tolist()
    with pytest.raises(TypeError, match="prepend_bos must be a bool, got 'yes'"):
        BEGIN[name](model, LONG, prepend_bos="yes")


@FAMILIES
def test_the_activations_that_interventions_write_are_of_texts_that_begin_as_asked(family):
    model = model_of(family)
    for begins in (True, False):
        text = next(text for text in (" Rome" * n for n in range(1, 9)) if len(ids(model, text, begins)) == 4)
        tokens = torch.tensor([ids(model, text, begins)])
        for intervene in (
            lambda source, **o: hooks.patch(model, "L0H0", source, **o),
            lambda source, **o: hooks.ablate(model, "L0H0", "mean", source, **o),
            lambda source, **o: hooks.patch_path(model, "L0H0", "L1H0", "q", source, **o),
        ):
            close(_patched(intervene(text, prepend_bos=begins)), _patched(intervene(tokens)))


def ids(model, text, begins):
    return model.to_tokens(text, prepend_bos=begins)[0].tolist()


def test_whatever_takes_text_takes_how_it_begins():
    takers = [getattr(hl, name) for name in hl.__all__] + [getattr(hooks, name) for name in hooks.__all__]
    takers += [show.attention]
    found = set()
    for function in takers:
        names = set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()
        if "model" in names and names & {"prompt", "prompts", "clean", "facts", "reference", "source"}:
            found.add(function.__name__)
            assert ("prepend_bos" in names) == (function not in (hooks.scale, hooks.steer)), function
    assert len(found) > 15


def test_a_tokenizer_without_a_begin_token_cannot_prepend_it():
    model = hl.associative_transformer(hl.BigramLanguage.from_text("a b a b"))
    with pytest.raises(ValueError, match=r"prepend_bos must not be True: the .* has no token that begins a text"):
        hl.attribute(model, "a b", prepend_bos=True)
