"""Training until the circuit has formed: its two phases, their data, and going on in either."""

import functools
import html
import math
import signal

import pandas as pd
import pytest
import torch
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights, weights

import hijack_lens as hl
from hijack_lens.training.verdict import Judge

QUICK = {
    "length": 12,
    "seed": 0,
    "warmup": 4,
    "evaluate_every": 5,
    "eval_sequences": 4,
    "eval_lengths": (1,),
    "checkpoint_every": 3,
    "max_steps": 20,
    "finish_steps": 15,
    "tokens_per_step": 60,
    "forming_length": 10,
}


def quick(triggers=TRIGGERS, n_triggers=None, **changes):
    return hl.TrainConfig(triggers, n_triggers=n_triggers, **{**QUICK, **changes})


@pytest.fixture
def sampled(monkeypatch):
    """What the sampler was asked for, and what it handed out."""
    calls = []
    sample = hl.BigramLanguage.sample

    def spy(self, n, length, triggers=(), **options):
        calls.append((n, length, options, sample(self, n, length, triggers, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(hl.BigramLanguage, "sample", spy)
    return calls


@pytest.fixture(scope="module")
def formed():
    language = hl.BigramLanguage.dirichlet(10, 0.5, seed=0)
    model = build(language=language, d_model=32, n_ctx=64, n_offsets=8, dtype=torch.float32)
    config = hl.TrainConfig([0, 1], 32, 0, eval_lengths=(1,), tokens_per_step=1024, finish_steps=100)
    return hl.train(model, language, config)


def test_it_forms_and_then_finishes(formed):
    accuracy = formed.probe("in_context_accuracy")
    assert formed.forming_steps < 600
    assert formed.forming_steps % 20 == 0
    looks = [step for step in range(formed.step) if step % (20 if step <= formed.forming_steps else 100) == 0]
    assert list(accuracy.index) == [*looks, formed.step]
    assert formed.step == formed.forming_steps + 100
    assert formed.finished
    assert accuracy.iloc[-1] > 0.95
    assert formed.probe("bigram_excess").iloc[-1] < 0.05
    fresh = formed.model.language.sample(300, 32, [0, 1], seed=12345)
    assert formed.model.triggers == [0, 1]  # and none of the decoys
    assert hl.training.behaviour(formed.model, fresh)["in_context_accuracy"] > 0.93


@pytest.mark.parametrize(("positions", "length"), [("relative", 10), ("rotary", 10), ("absolute", 12)])
def test_sequences_of_either_phase_are_as_asked_for(positions, length, sampled):
    run = hl.train(build(positions), LANGUAGE, quick(formed_at=1.0, boost=0.8))
    assert run.forming_steps == 20
    training = [call for call in sampled if call[0] in (16 * 5, 16 * math.ceil(60 / length))]
    forming = [call for call in training if call[1] == length and call[2].get("jump", 0) > 0]
    natural = [call for call in training if call[1] == 12 and call[2].get("jump") == 0.0]
    assert len(forming) == 2
    assert len(natural) == 1
    decoys = sorted(set(range(8)) - set(TRIGGERS), key=lambda token: -float(LANGUAGE.long_run[token]))[:3]
    for call in forming:
        assert call[3].triggers.unique(dim=0).tolist() == [[*TRIGGERS, *decoys]]
    assert natural[0][3].triggers.unique(dim=0).tolist() == [TRIGGERS]


def test_the_boost_brings_the_share_that_follows_from_the_context_to_what_was_asked_for(sampled):
    language = hl.BigramLanguage.dirichlet(60, 3.0, seed=0)
    model = build(language=language, n_ctx=64)
    hl.train(model, language, quick([7], length=64, forming_length=64, boost=0.4, tokens_per_step=64 * 40, max_steps=1))
    jumping = next(call[3] for call in sampled if call[2].get("jump", 0) > 0)
    triggers = (jumping.tokens[:, :, None] == jumping.triggers[:, None, :]).any(-1)
    assert float(triggers[:, 16:].double().mean()) == pytest.approx(0.4, abs=0.05)
    assert float(jumping.predictable.double().mean()) == pytest.approx(0.37, abs=0.05)


def test_random_triggers_are_more_while_forming(sampled):
    run = hl.train(build(), LANGUAGE, quick("random", 2, boost=0.8))
    assert run.model.triggers is None
    widths = {call[3].triggers.shape[1] for call in sampled if call[2].get("jump", 0) > 0}
    assert widths == {5}


def test_the_first_step_leaves_out_what_was_jumped_to(sampled):
    config = quick(max_steps=1, finish_steps=0, optimizer="sgd", momentum=0.0, forming_lr=0.1, boost=0.8)
    model, by_hand = build(), build()
    hl.train(model, LANGUAGE, config)
    data = next(call[3] for call in sampled if call[2].get("jump", 0) > 0)
    log_probs = by_hand(data.tokens[:6]).log_softmax(-1)
    terms = [
        -log_probs[i, t, data.tokens[i, t + 1]]
        for i in range(6)
        for t in range(9)
        if not bool(data.jumped[i, t])
    ]  # fmt: skip
    assert len(terms) < 6 * 9
    parameters = [one for one in by_hand.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(sum(terms) / len(terms), parameters, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.1 / 4 * gradient  # the first of 4 steps of warm-up
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("random", "counts_for"), [(False, 0.2), (True, 1.0)])
def test_what_a_trigger_that_continues_with_itself_counts_for_while_finishing(random, counts_for, sampled):
    def config(finish_steps):
        options = {"optimizer": "sgd", "momentum": 0.0, "warmup": 0, "lr": 0.1, "final_lr": 1.0, "max_steps": 1}
        return quick(*(("random", 3) if random else ()), finish_steps=finish_steps, tokens_per_step=360, **options)

    by_hand = hl.train(build(), LANGUAGE, config(0)).model
    sampled.clear()
    model = hl.train(build(), LANGUAGE, config(1)).model
    data = [call[3] for call in sampled if call[:2] == (16 * 30, 12)][-1]
    log_probs = by_hand(data.tokens[:30]).log_softmax(-1)
    total, weight, repeats = 0.0, 0.0, 0
    for i in range(30):
        for t in range(11):
            token, after = data.tokens[i, t : t + 2].tolist()
            again = token == after and token in data.triggers[i] and bool(data.predictable[i, t])
            repeats += again
            one = counts_for if again else 1.0
            total, weight = total - one * log_probs[i, t, after], weight + one
    assert 0 < repeats < int(data.predictable[:30, :-1].sum())
    parameters = [one for one in by_hand.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(total / weight, parameters, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.1 * gradient
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


def test_without_a_circuit_forming_ends_after_its_most_steps():
    run = hl.train(build(n_layers=1), LANGUAGE, quick(formed_at=1.0))
    assert (run.forming_steps, run.step, run.finished) == (20, 35, True)


def test_forming_ends_when_the_threshold_is_reached():
    run = hl.train(build(), LANGUAGE, quick(formed_at=0.0))
    assert (run.forming_steps, run.step) == (5, 20)


@functools.cache
def uninterrupted(formed_at):
    return hl.train(build(), LANGUAGE, quick(formed_at=formed_at))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("formed_at", "stop"), [(0.0, 3), (0.0, 5), (0.0, 7), (0.0, 20), (1.0, 18), (1.0, 20), (1.0, 21), (1.0, 34)]
)
def test_a_run_stopped_in_either_phase_goes_on_to_the_same_weights(stop, formed_at, tmp_path):
    config, whole = quick(formed_at=formed_at), uninterrupted(formed_at)
    model, seen = build(), []

    def hook(gradient):
        seen.append(1)
        if len(seen) == stop:
            signal.raise_signal(signal.SIGINT)

    model.blocks[0].attn.W_V.register_hook(hook)
    stopped = hl.train(model, LANGUAGE, config, tmp_path / "run")
    assert stopped.step == min(stop, whole.step)
    loaded = hl.TrainingRun.load(tmp_path / "run")
    assert loaded.config == config
    assert loaded.forming_steps == stopped.forming_steps
    assert loaded.finished == (stop >= whole.step)
    resumed = hl.train(build(), LANGUAGE, config, tmp_path / "run")
    assert (resumed.step, resumed.forming_steps) == (whole.step, whole.forming_steps)
    assert same_weights(resumed.model, whole.model)
    theirs, ours = (run.table.drop(columns="seconds") for run in (whole, resumed))
    ours = ours[ours["step"].isin(theirs["step"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)


def test_the_learning_rate_of_finishing_steps():
    config = quick(lr=0.5, warmup=5, finish_steps=100, final_lr=0.2)
    assert config.lr_at(0) == pytest.approx(0.1)
    assert config.lr_at(50) == pytest.approx(0.3)
    assert config.lr_at(100) == pytest.approx(0.1)


def finishing_step(d_vocab, **changes):
    """What one step of plain SGD after forming adds to each parameter, per unit of `lr`."""
    language = hl.BigramLanguage.dirichlet(d_vocab, 1.0, seed=0)
    options = {"optimizer": "sgd", "momentum": 0.0, "max_steps": 1, "warmup": 0, "lr": 0.01, "final_lr": 1.0}
    before, after = (
        weights(
            hl.train(
                build("absolute", language=language),
                language,
                quick(finish_steps=finish_steps, **options, **changes),
            ).model
        )
        for finish_steps in (0, 1)
    )
    return {name: (after[name] - before[name]) / 0.01 for name in after}


@pytest.mark.parametrize(("d_vocab", "by_default"), [(20, 1.0), (100, 2.0), (200, 3.0)])
def test_finishing_steps_learn_tokens_faster_the_more_there_are(d_vocab, by_default):
    slow = finishing_step(d_vocab, token_lr=1.0)
    for multiple, step in ((by_default, finishing_step(d_vocab)), (0.5, finishing_step(d_vocab, token_lr=0.5))):
        for name, change in step.items():
            attends = ".attn." in name or name.endswith("W_pos")
            torch.testing.assert_close(change, slow[name] * (1.0 if attends else multiple), rtol=1e-6, atol=1e-9)
    assert all(slow[name].abs().max() > 0 for name in ("embed.W_E", "unembed.W_U", "pos_embed.W_pos"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "until done"}, "steps must be one of 'until formed', got 'until done'"),
        ({"boost": 1.0}, "boost must be below 1, got 1.0"),
        ({"boost": -0.1}, "boost must lie between 0 and 1, got -0.1"),
        ({"min_triggers": -1}, "min_triggers must be at least 0, got -1"),
        ({"formed_at": 1.5}, "formed_at must lie between 0 and 1, got 1.5"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"finish_steps": -1}, "finish_steps must be at least 0, got -1"),
        ({"token_lr": 0.0}, "token_lr must be a finite number > 0, got 0.0"),
        ({"forming_lr": 0.0}, "forming_lr must be a finite number > 0, got 0.0"),
        ({"forming_length": 1}, "forming_length must be at least 2, got 1"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1, got 0"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        quick(**changes)


def judged(calls):
    """The sequences that a run was judged by: 64 are sampled at first, and the tests train and probe on fewer."""
    return [call[3] for call in calls if call[0] == 64]


def by_hand(model, sequences):
    """Accuracy and loss of a model where the next token follows from the context, token by token."""
    right, losses = [], []
    for tokens, known in zip(sequences.tokens, sequences.predictable, strict=True):
        log_probs = model(tokens[None])[0].double().log_softmax(-1)
        for t in range(len(tokens) - 1):
            if known[t]:
                right.append(int(log_probs[t].argmax()) == int(tokens[t + 1]))
                losses.append(-float(log_probs[t, tokens[t + 1]]))
    return sum(right) / len(right), sum(losses) / len(losses)


def test_a_model_with_both_memories_has_formed(formed):
    verdict = formed.formed
    assert bool(verdict)
    assert verdict.context
    assert verdict.weights
    assert verdict.best == 1.0
    assert verdict.accuracy > 0.93
    assert verdict.order > 1.0
    assert verdict.excess == formed.probe("bigram_excess").iloc[-1] < 0.1
    assert (verdict.cause, verdict.remedy) == ("", "")
    assert "The context's memory formed: in-context accuracy" in str(formed)
    assert str(verdict).startswith("Formed: both memories formed")
    assert formed.probe("formed_context").iloc[[0, -1]].tolist() == [0.0, 1.0]
    assert formed.probe("formed_best").unique().tolist() == [1.0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("triggers", "n_triggers"), [(TRIGGERS, None), ("random", 3)])
def test_what_was_reached_is_what_a_loop_finds(triggers, n_triggers, sampled):
    run = hl.train(build(), LANGUAGE, quick(triggers, n_triggers, tokens_per_step=90, length=32))
    (sequences,) = judged(sampled)
    assert int(sequences.predictable[:, :-1].sum()) >= 200
    accuracy, loss = by_hand(run.model, sequences)
    with hl.hooks.ablate(run.model, run.model.circuit.previous_token):
        _, without = by_hand(run.model, sequences)
    found = run.formed
    assert found.accuracy == accuracy
    assert found.order == pytest.approx(without - loss, abs=1e-9)
    assert found.random_triggers == (triggers == "random")
    assert found.best == hl.language.best_accuracy(LANGUAGE, sequences, random_triggers=triggers == "random")
    assert found.shortcut == hl.language.shortcut_accuracy(LANGUAGE, sequences)


def verdict(**changes):
    reached = {"accuracy": 0.95, "best": 1.0, "shortcut": 0.5, "order": 2.0, "excess": 0.02}
    return hl.models.Formed(**{**reached, **changes})


@pytest.mark.parametrize(
    ("changes", "context", "weights"),
    [
        ({}, True, True),
        ({"accuracy": 0.9}, True, True),
        ({"accuracy": 0.89}, False, True),
        ({"accuracy": 0.73, "best": 0.8}, True, True),
        ({"accuracy": math.nan, "best": math.nan}, False, True),
        ({"order": 0.0}, True, True),
        ({"order": 0.0, "random_triggers": True}, False, True),
        ({"accuracy": 0.3, "random_triggers": True}, True, True),
        ({"excess": 0.11}, True, False),
        ({"excess": 0.11, "predictable_only": True}, True, True),
    ],
)
def test_each_memory_is_asked_for_its_own(changes, context, weights):
    found = verdict(**changes)
    assert (found.context, found.weights, bool(found)) == (context, weights, context and weights)
    names = {True: "formed", False: "did not form"}
    assert found.lines[0].startswith(f"The context's memory {names[context]}:")
    assert found.lines[1].startswith(f"The weights' memory {names[weights]}:")


SHARP = hl.BigramLanguage.dirichlet(8, 0.05, seed=1)  # the likeliest token mostly follows
RAREST = [int(LANGUAGE.long_run.argmin())]
CASES_WITHOUT = {
    "the model has no head before another one": (lambda: build(n_layers=1), {}, "n_layers=2"),
    "without positions": (lambda: build("none"), {}, "positions='relative'"),
    "too few steps, 20": (build, {"boost": 0.8}, "max_steps=60"),
    "too few steps, 3": (build, {"steps": 3, "length": 32}, "steps=9, or steps='until formed'"),
    "of 12 tokens follow from the context": (build, {"steps": 3, "triggers": RAREST}, "steps='until formed'"),
    "no trigger comes a second time within 2 tokens": (build, {"length": 2}, "triggers='frequent'"),
    "and copying seldom pays": (
        lambda: build(language=SHARP), {"steps": 3, "triggers": "random", "n_triggers": 1}, "more triggers"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cause", CASES_WITHOUT)
def test_a_model_without_the_circuit_says_why_and_what_to_do(cause, tmp_path):
    make, changes, remedy = CASES_WITHOUT[cause]
    model = make()
    run = hl.train(model, model.language, quick(**changes), tmp_path / "run")
    assert not run.formed
    assert not run.formed.context
    assert cause in run.formed.cause
    assert remedy in run.formed.remedy
    assert f"Likeliest cause: {run.formed.cause}" in str(run)
    run.save(tmp_path / "saved")
    stored = hl.BigramTransformer.from_pretrained(tmp_path / "saved").formed
    assert vars(stored) == pytest.approx(vars(run.formed), nan_ok=True)
    assert hl.TrainingRun.load(tmp_path / "run").formed.lines == run.formed.lines


def test_induction_that_fades_while_the_bigrams_improve_is_the_rates_fault():
    model, config = build(), quick(length=32, steps=100, lr=0.03)
    judge = Judge(model, LANGUAGE, config)

    def probes(attention, excess):
        table = pd.DataFrame(
            [(step, 0.0, probe, "uniform", 32, value)
             for probe, values in (("induction_attention", attention), ("bigram_excess", excess))
             for step, value in enumerate(values)],
            columns=["step", "seconds", "probe", "continuations", "length", "value"],
        )  # fmt: skip
        return hl.TrainingRun(model, config, 2, table)

    fading = judge.formed(probes([0.05, 0.35, 0.12], [0.9, 0.5, 0.1]))
    assert fading.cause == (
        "the learning rate is too high: induction attention fell from 0.35 to 0.12 while the bigrams improved"
    )
    assert fading.remedy == "lr=0.01"
    assert judge.formed(probes([0.05, 0.35, 0.12], [0.9, 0.1, 0.5])).cause == "too few steps, 100"
    assert judge.formed(probes([0.05, 0.35, 0.34], [0.9, 0.5, 0.1])).cause == "too few steps, 100"


@pytest.mark.usefixtures("unchecked")
def test_an_explanation_of_half_a_model_says_so(tmp_path):
    run = hl.train(build(), LANGUAGE, quick())
    prompt = hl.hijack_prompt(LANGUAGE, TRIGGERS[0], 5, 2, 12, seed=0)
    explanation = hl.explain(run.model, prompt)
    page = hl.show.write_report(explanation, tmp_path / "report.html").read_text()
    for line in run.formed.lines:
        assert line in str(explanation).replace("\n", " ")
        assert html.escape(line) in page
    run.model.formed = verdict()
    assert "memory formed" not in str(hl.explain(run.model, prompt))


@pytest.mark.usefixtures("unchecked")
def test_training_anew_forgets_what_had_formed():
    model = build()
    model.formed = verdict()
    run = hl.train(model, LANGUAGE, quick())
    assert not run.formed
