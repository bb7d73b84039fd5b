"""Conflict probes: prompts that deny a fact k times, the margin's dose-response, and the theory beside it."""

import dataclasses
import math

import pytest
import torch
from bridges_for_tests import D_VOCAB as BRIDGE_VOCAB
from bridges_for_tests import gpt2_like
from handmade_for_tests import STRENGTHS, save_handmade, save_with_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import CIRCUIT, close, handwritten, hooked, prompts
from plain_network import Run, run
from refusals import refused
from test_sources import BRIDGES, MODERN
from test_words import folders
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

import hijack_lens as hl
from hijack_lens.attribution.frozen import FrozenModel
from hijack_lens.language import Bigram, Fact, counterfactuals
from hijack_lens.probing import DoseResponse, dose_response, fact_prompts
from hijack_lens.probing.doses import crossing, theory_of_margins

IS = "{subject} is {answer} ."
FACTS = [Fact("France", "Paris", "Rome", IS), Fact("Spain", "Paris", "Oslo", IS)]


@pytest.fixture(scope="module")
def handmade(tmp_path_factory):
    """A bridge booted from disk whose memories are written by hand, and the model that it computes."""
    folder = tmp_path_factory.mktemp("handmade")
    twin = save_handmade(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32).eval(), twin


@pytest.fixture(scope="module")
def response(handmade):
    return dose_response(handmade[0], FACTS, 8, lead="we say of", circuit=hl.find_circuit(handmade[0]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A booted bridge, its weights random, whose tokens bring their own spaces and cut rare words."""
    folder = tmp_path_factory.mktemp("bpe")
    save_with_bpe(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float64).eval()


def margins(model, one):
    """The margins, straight from the model's logits."""
    logits = [model(one.tokens(n)[None])[0, -1].detach().double() for n in range(len(one.prompts))]
    return torch.stack([row[one.context] - row[one.weights] for row in logits])


def test_a_prompt_says_its_statement_so_many_times_and_then_asks():
    fact = Fact("France", "Paris", "Rome")
    assert fact.text(0) == "France's capital is"
    assert fact.text(2, "Listen.") == (
        "Listen. France's capital is Rome. France's capital is Rome. France's capital is"
    )
    facts = counterfactuals({"France": "Paris", "Spain": "Madrid", "Italy": "Rome"}, "In {subject}: {answer}!")
    assert [(fact.subject, fact.weights, fact.context) for fact in facts] == [
        ("France", "Paris", "Madrid"),
        ("Spain", "Madrid", "Rome"),
        ("Italy", "Rome", "Paris"),
    ]
    assert facts[2].text(1) == "In Italy: Paris! In Italy:"


def test_prompts_are_the_tokenizers_own_and_nothing_is_padded(bpe, handmade):
    for model, fact in [(bpe, Fact("France", "Paris", "Rome")), (handmade[0], FACTS[0])]:
        one = fact_prompts(model, fact, 4)
        for n, prompt in enumerate(one.prompts):
            assert list(prompt) == model.to_tokens(fact.text(n))[0].tolist()
            assert prompt.count(one.context) == n
            assert one.weights not in prompt
        assert one.lengths == tuple(one.lengths[0] + n * one.period for n in range(5))
        assert one.whole == (True, True)
    assert one.texts == ("Rome", "Paris")
    assert fact_prompts(bpe, Fact("France", "Paris", "Rome"), 1).texts == (" Rome", " Paris")


def test_answers_of_several_tokens_are_scored_by_their_first(bpe):
    one = fact_prompts(bpe, Fact("France", "Paris", "Romulan"), 3)
    assert one.texts[1] == " Paris"
    assert one.whole == (False, True)
    pieces = bpe.to_tokens(" Romulan", prepend_bos=False)[0].tolist()
    assert len(pieces) > 1
    assert one.context == pieces[0]
    found = dose_response(bpe, Fact("France", "Paris", "Romulan"), 3)
    close(found.margin.total[0], margins(bpe, one))
    assert "Answers of several tokens are scored by the first: 1 of the facts" in str(found)


def test_bigrams_are_given_as_ids_where_there_is_no_tokenizer():
    model = hooked("LN", n_layers=3)
    one = fact_prompts(model, Bigram(trigger=1, weights=2, context=3), 3, lead=[4, 5])
    assert one.prompts == ((4, 5, 1), (4, 5, 1, 3, 1), (4, 5, 1, 3, 1, 3, 1), (4, 5, 1, 3, 1, 3, 1, 3, 1))
    assert (one.context, one.weights, one.texts) == (3, 2, ("3", "2"))


def test_bigrams_of_text_begin_as_the_models_prompts_do():
    bridge = gpt2_like()
    one = fact_prompts(bridge, Bigram("one", "two", "three"), 2)
    assert one.prompts[2] == tuple(bridge.to_tokens("one three one three one")[0].tolist())
    led = fact_prompts(bridge, Bigram("one", "two", "three"), 2, lead="a b")
    assert led.prompts[1] == tuple(bridge.to_tokens("a b one three one")[0].tolist())


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_margins_are_the_models_own_and_are_split_as_attribute_splits_them(kind):
    model = hooked("LN", n_layers=3) if kind == "HookedTransformer" else gpt2_like()
    facts = [Bigram(1, 2, 3), Bigram(4, 5, 3)]
    found = dose_response(model, facts, 4, circuit=CIRCUIT)
    assert found.repeats == range(5)
    assert found.completeness_error < 1e-10
    for row, fact in enumerate(facts):
        one = fact_prompts(model, fact, 4)
        assert found.conflicts[row] == one
        close(found.margin.total[row], margins(model, one))
        for n in found.repeats:
            alone = hl.attribute(model, one.tokens(n), circuit=CIRCUIT, answers=[one.context, one.weights]).margin(
                one.context, one.weights
            )
            for part in ("context", "weights", "rest"):
                close(getattr(found.margin, part)[row, n], getattr(alone, part))
    assert bool(found.margin.context.abs().max() > 0.01)


def test_a_model_written_by_hand_does_what_the_theory_predicts_of_its_weights():
    strengths = hl.Strengths(previous_token=30.0, match=1.0, copy=8.0)
    model = handwritten(9, n_ctx=32, strengths=strengths)
    row = model.language.pi_b[0].clone()
    row[0] = row[1:].mean()
    order = [token for token in row.argsort().tolist() if token]
    facts = [Bigram(0, order[-1], order[i]) for i in (0, 2, 5)]
    neutral = next(
        i for i in range(1, 9) if i not in {token for fact in facts for token in (fact.weights, fact.context)}
    )
    found = dose_response(model, facts, 8, lead=[neutral] * 3)
    assert found.theory.source == "weights"
    assert found.circuit is model.circuit
    close(found.theory.margin, found.margin.total)
    assert found.theory.r2 == pytest.approx(1.0)
    close(found.margin.weights, -found.theory.ahead[:, None].expand(-1, 9))
    for flip, predicted, fact in zip(found.flips, found.theory.flips, facts, strict=True):
        assert predicted.repeats == flip
        least = hl.theory.min_repeats(
            model.language, 0, fact.context, fact.weights, hl.theory.Setting(found.theory.strengths), lead=3
        ).repeats
        assert flip == least
    assert len({*found.flips}) > 1


def test_effective_strengths_are_those_that_a_booted_model_was_written_with(response, handmade):
    bridge, twin = handmade
    assert response.theory.source == "margins"
    assert response.circuit == twin.circuit  # found, from the bridge alone
    assert response.theory.strengths.match == pytest.approx(STRENGTHS.match, abs=1e-3)
    assert response.theory.strengths.copy == pytest.approx(STRENGTHS.copy, abs=1e-3)
    is_ = twin.language.index("is")
    for one, ahead in zip(response.conflicts, response.theory.ahead.tolist(), strict=True):
        log_pi_b = twin.language.log_pi_b[is_]
        assert ahead == pytest.approx(float(log_pi_b[one.weights] - log_pi_b[one.context]), abs=1e-3)
        close(margins(twin, one), margins(bridge, one), atol=1e-4)
    assert response.theory.r2 > 0.999999
    assert response.flips == tuple(flip.repeats for flip in response.theory.flips)
    assert response.flips == (1, 2)
    close(response.margin.rest, torch.zeros(2, 9).double(), atol=1e-4)
    assert response.known == (True, True)


@pytest.mark.parametrize("family", ["handmade", "bpe"])
def test_without_a_circuit_each_dose_is_split_by_its_source_tokens(family, handmade, bpe):
    model = handmade[0] if family == "handmade" else bpe
    facts = FACTS if family == "handmade" else [FACTS[0]]
    found = dose_response(model, facts, 4)
    assert found.by_source
    for row, one in enumerate(found.conflicts):
        question = len(one.prompts[0])  # nothing leads
        for n in range(5):
            tokens = one.tokens(n)
            statements = list(range(1, len(tokens) - one.query))
            # A first word has no space before it, and may be another token.
            assert tokens[1 - one.query :].tolist() == tokens[question - one.query + 1 : question].tolist()
            result = hl.attribute_sources(model, tokens, [one.context, one.weights], context=statements if n else [0])
            split = result.margin(one.context, one.weights)
            expected = {"total": split.total, "rest": 0.0} | ({"context": split.context} if n else {"context": 0.0})
            for part, value in expected.items():
                assert float(found.margin.parts[part][row, n]) == pytest.approx(float(value), abs=2e-4)
    older = dataclasses.replace(found, statements=None)  # as of a file that was written before there were any
    for one in (found, older):
        assert "split by source tokens" in str(one)
        assert "No induction head" not in str(one)
        assert ("Statements:" in str(one)) == (one is found)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(("norm", "act"), [("LN", "gelu"), ("RMS", "silu"), (None, "relu")])
def test_the_statements_share_is_that_of_what_the_questions_tokens_read(norm, act, begun):
    """Against a plain network with some rows of its patterns, scales and gates taken from its other run."""
    tokenizer = AutoTokenizer.from_pretrained(folders() / "words")
    model = hooked(norm, act, n_layers=3, d_vocab=len(tokenizer), n_ctx=40)
    model.set_tokenizer(tokenizer)
    model.circuit = None
    fact = Fact("Spain", "Paris", "Oslo", "we say of {subject} is {answer} .")
    found = dose_response(model, fact, 3, prepend_bos=begun)
    (one,) = found.conflicts
    assert one.query == 5
    assert one.lengths[0] == 5 + begun
    rows = 5 if begun else 4  # else the question's first token is the prompt's as well
    runs = [run(model, one.tokens(n)[None]) for n in range(4)]

    def margin(n, responds):
        """The prompt of one dose, whose last rows respond as in another's."""
        mixed, other = Run(patterns=runs[n].patterns), runs[responds]
        for kind in ("scales", "gates"):
            for key, own in getattr(runs[n], kind).items():
                last = getattr(other, kind)[key][:, -rows:]
                getattr(mixed, kind)[key] = torch.cat([own[:, :-rows], last], 1)
        logits = run(model, one.tokens(n)[None], frozen=mixed).logits[0, -1]
        return float(logits[one.context] - logits[one.weights])

    for n in range(1, 4):
        assert margin(n, n) == pytest.approx(float(found.margin.total[0, n]))
        expected = (margin(n, n) - margin(0, n) + margin(n, 0) - margin(0, 0)) / 2
        assert float(found.statements[0, n]) == pytest.approx(expected, abs=1e-9)
    assert float(found.statements[0, 0]) == 0.0
    assert float(found.statements.abs().max()) > 0.01
    assert found.to_pandas()["statements"].tolist() == found.statements.flatten().tolist()
    assert f"{float(found.statements[0, 3]):+.3f}" in str(found)


@pytest.mark.parametrize("family", ["GPT-2", *MODERN])
def test_a_run_that_responds_as_itself_is_itself(family):
    bridge = BRIDGES[family]() if family in BRIDGES else gpt2_like()
    tokens = prompts(2, 6, d_vocab=13)
    frozen = FrozenModel.of(bridge, tokens)
    for n in (1, 4, 6):
        logits = frozen.answering(torch.tensor([2, 9]), n, frozen)
        close(logits, frozen.logits[:, [2, 9]], atol=1e-5 * float(frozen.logits.abs().max()))


@given(
    match=st.floats(0.3, 8.0),
    copy=st.floats(0.5, 20.0),
    aheads=st.lists(st.floats(-3.0, 12.0).filter(lambda d: abs(d) > 0.01), min_size=1, max_size=3),
    start=st.integers(1, 30),
    period=st.integers(2, 9),
)
@settings(max_examples=40)
def test_the_fit_finds_the_strengths_of_a_curve_and_its_flip(match, copy, aheads, start, period):
    lengths = torch.tensor([[start + period * n for n in range(7)]] * len(aheads))

    def margin(n, ahead):
        weight = math.exp(match) * n
        return copy * weight / (weight + start + period * n - n) - ahead

    measured = torch.tensor([[margin(n, ahead) for n in range(7)] for ahead in aheads], dtype=torch.float64)
    found = theory_of_margins(measured, lengths)
    close(found.margin, measured, atol=1e-4)
    assert found.r2 == pytest.approx(1.0, abs=1e-6)
    assert found.strengths.match == pytest.approx(match, abs=1e-2)
    assert found.strengths.copy == pytest.approx(copy, rel=1e-2)
    for ahead, flip in zip(aheads, found.flips, strict=True):
        exact = next((n for n in range(3000) if margin(n, ahead) > 0), None)
        near_tie = [margin(n, ahead) for n in range(3000) if abs(margin(n, ahead)) < 1e-3]
        if not near_tie:
            assert flip.repeats == exact or (exact is None and flip.repeats > 2999)


def test_a_repeat_of_two_tokens_is_the_theorys_own_growing_prompt():
    """The flip at effective strengths against `theory.min_repeats`, which is checked against models elsewhere."""
    language = hl.BigramLanguage.dirichlet(6, seed=2)
    order = [i for i in language.pi_b[0].argsort().tolist() if i]
    c, g, lead = order[0], order[-1], 5
    ahead = float(language.log_pi_b[0, g] - language.log_pi_b[0, c])
    for copy in (1.05 * ahead, 1.4 * ahead, 3 * ahead, 0.9 * ahead):
        strengths = hl.Strengths(math.inf, 3.0, copy, 1.0)
        n = torch.arange(6).double()
        lengths = (lead + 1 + 2 * torch.arange(6))[None]
        measured = copy * n / (n + (lengths - n) * math.exp(-3.0)) - ahead
        expected = hl.theory.min_repeats(language, 0, c, g, hl.theory.Setting(strengths), lead=lead).repeats
        assert theory_of_margins(measured, lengths).flips[0].repeats == expected


def test_what_the_theory_does_not_explain_shows_in_r2():
    lengths = torch.tensor([[3 + 4 * n for n in range(6)]])
    falling = theory_of_margins(-torch.arange(6).double()[None], lengths)
    assert falling.strengths.copy == 0.0  # no copy head makes a margin fall
    assert falling.r2 == pytest.approx(0.0)
    level = theory_of_margins(torch.full((1, 6), -2.0).double(), lengths)
    assert math.isnan(level.r2)
    assert level.flips[0].repeats is None
    zigzag = theory_of_margins(torch.tensor([[-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]]).double(), lengths)
    assert 0 < zigzag.r2 < 0.5


def test_crossings_lie_between_the_repeats_around_them():
    assert crossing([-3.0, -1.0, 1.0, 5.0]) == 1.5
    assert crossing([-1.0, -0.5, 0.0, 0.5]) == 2.0
    assert crossing([0.1, -2.0, 3.0]) == 0.0
    assert math.isnan(crossing([-3.0, -2.0, -1.0]))


def test_tables_hold_the_same_numbers(response):
    table = response.to_pandas()
    assert list(table.columns) == ["fact", "repeats", "length", "context", "weights", "rest", "total", "theory"]
    assert len(table) == 18
    assert table["total"].tolist() == pytest.approx(response.margin.total.flatten().tolist())
    assert table["length"].tolist() == response.lengths.flatten().tolist()
    means = response.by_repeats()
    assert means["total"].tolist() == pytest.approx(response.margin.total.mean(0).tolist())
    assert means["spread"].tolist() == pytest.approx(response.margin.total.std(0).tolist())
    facts = response.by_fact()
    assert facts["flip"].tolist() == [1, 2]
    assert facts["theory_flip"].tolist() == [1, 2]
    for view in (str(response), response._repr_html_()):
        assert "Spain: Oslo, not Paris" in view
        assert "b2 = 3" in view
        assert f"R² = {response.theory.r2:.3f}" in view
        assert f"{float(response.margin.total[:, 3].mean()):+.3f}" in view


def test_tables_say_what_a_reader_must_know():
    found = dose_response(gpt2_like(), [Bigram(1, 2, 3), Bigram(4, 2, 3)], 4, circuit=hl.Circuit())
    assert found.known == tuple((found.margin.total[:, 0] < 0).tolist())
    assert not all(found.known)
    assert "No induction head is named" in str(found)
    assert "The weights do not prefer their answer to begin with" in str(found)


def test_the_picture_draws_the_theory_over_the_measurement(response):
    (ax,) = response.picture().figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    means = response.by_repeats()
    for part in ("context", "weights", "rest", "total"):
        assert list(drawn[part]) == pytest.approx(means[part].tolist())
    (theory,) = [label for label in drawn if label.startswith("two-layer theory, fitted (R²")]
    assert list(drawn[theory]) == pytest.approx(means["theory"].tolist())
    assert "says its answer" in ax.get_xlabel()
    assert "logit" in ax.get_ylabel()
    flip = crossing(means["total"].tolist())
    assert [text.get_text() for text in ax.texts] == [f"flip at {flip:.2f}"]


def test_a_saved_response_comes_back_whole(response, tmp_path):
    response.save(tmp_path / "r.safetensors")
    again = DoseResponse.load(tmp_path / "r.safetensors")
    assert repr(again) == repr(response)
    with pytest.raises(ValueError, match="conflicts must hold at least one, got none"):
        dataclasses.replace(response, conflicts=())
    assert again.conflicts == response.conflicts
    assert again.circuit == response.circuit
    assert again.theory.flips == response.theory.flips
    assert torch.equal(again.margin.total, response.margin.total)
    assert torch.equal(again.theory.margin, response.theory.margin)
    hl.attribute(handwritten(), torch.tensor([1, 2])).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is not a hijack_lens\.DoseResponse\.1 file"):
        DoseResponse.load(tmp_path / "other.safetensors")


def test_the_model_is_left_as_it_was(global_rng_untouched):
    model = hooked("LN", n_layers=3)
    model.train()
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda x, hook: None)
    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    dose_response(model, Bigram(1, 2, 3), 3, circuit=CIRCUIT)
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def plain():
    return hooked("LN", n_layers=3)


test_bad_input_is_refused = refused(
    ValueError,
    {
        "subject must be a text, got ''": lambda: Fact("", "Paris", "Rome"),
        "context must differ from what the weights say, got 'Rome'": lambda: Fact("Italy", "Rome", "Rome"),
        "template must hold '{answer}' once": lambda: Fact("Italy", "Rome", "Oslo", "{subject} is what?"),
        "template must hold '{answer}' once, after": lambda: Fact("Italy", "Rome", "Oslo", "{answer} is {subject}"),
        "answers must hold two subjects or more": lambda: counterfactuals({"Italy": "Rome"}),
        "repeats must be at least 3, got 2": lambda: dose_response(plain(), Bigram(1, 2, 3), 2),
        "facts must hold at least one, got none": lambda: dose_response(plain(), [], 4),
        "fact is text, but the model has no tokenizer": lambda: fact_prompts(plain(), Fact("a", "b", "c")),
        "bigram holds the text 'a', but the model has no tokenizer": lambda: fact_prompts(plain(), Bigram("a", 2, 3)),
        "bigram must be one or several different tokens": lambda: fact_prompts(plain(), Bigram(1, 3, 3)),
        "bigram holds 'one two', which is not a single": lambda: fact_prompts(gpt2_like(), Bigram("one two", 4, 5)),
        f"bigram holds token id {BRIDGE_VOCAB};": lambda: fact_prompts(gpt2_like(), Bigram(1, 2, BRIDGE_VOCAB)),
        "lead must be the tokens of one prompt, got": lambda: fact_prompts(plain(), Bigram(1, 2, 3), 3, lead=[[4, 5]]),
        "lead must not hold the trigger 1": lambda: fact_prompts(plain(), Bigram(1, 2, 3), 3, lead=[4, 1]),
        "the prompt must hold the context's '3' once per repeat and the weights' '2' never, got 4 in 3": lambda: (
            fact_prompts(plain(), Bigram(1, 2, 3), 3, lead=[3])
        ),
        "bigram's prompts is 17 tokens long; the model takes at most n_ctx=12": lambda: fact_prompts(
            plain(), Bigram(1, 2, 3), 8
        ),
        "fact must be of words that the model's tokenizer knows, which lacks 'is'": lambda: fact_prompts(
            gpt2_like(), Fact("zero", "one", "two", "{subject} is {answer}")
        ),
        r"fact is \d+ tokens long; the model takes at most n_ctx=24": lambda: fact_prompts(
            gpt2_like(), Fact("zero", "one", "two", "{subject} four {answer}"), 12
        ),
    },
)

test_what_is_no_fact_is_refused = refused(
    TypeError,
    {
        "facts must be a Fact or Bigram, or several, got 5": lambda: dose_response(plain(), 5, 4),
        "fact must be a Fact or a Bigram, got 'France'": lambda: dose_response(plain(), ["France"], 4),
        "model must be a HookedTransformer or TransformerBridge": lambda: dose_response("gpt2", Bigram(1, 2, 3)),
        "lead must be text, as the fact is": lambda: fact_prompts(gpt2_like(), Fact("a", "one", "two"), 3, lead=[1]),
    },
)


def test_answers_that_begin_alike_and_prompts_that_are_cut_otherwise_are_refused(bpe):
    with pytest.raises(ValueError, match="both answers begin with the token ' '"):
        fact_prompts(bpe, Fact("Italy", "Zolo", "Zuga"))
    with pytest.raises(ValueError, match="does not part the answer 'tal' from the words around"):
        fact_prompts(bpe, Fact("France", "tal", "Rome", "{subject}'s capi{answer}"))
    with pytest.raises(ValueError, match="the weights' ' Paris' never, got 3 in 3 repeats and 4"):
        fact_prompts(bpe, Fact("of Paris", "Paris", "Rome", "The town {subject} is {answer}."), 3)
