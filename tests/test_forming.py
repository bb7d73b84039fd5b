"""Training until the circuit has formed: its two phases, their data, and going on in either."""

import math
import signal

import pandas as pd
import pytest
import torch
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights

import hijack_lens as hl

QUICK = {
    "length": 12,
    "seed": 0,
    "batch_size": 4,
    "warmup": 4,
    "evaluate_every": 5,
    "eval_sequences": 4,
    "eval_lengths": (1,),
    "checkpoint_every": 3,
    "max_steps": 20,
    "finish_steps": 15,
    "forming_tokens": 60,
    "forming_length": 10,
}


def quick(triggers=TRIGGERS, n_triggers=None, **changes):
    return hl.TrainConfig.until_formed(triggers, n_triggers=n_triggers, **{**QUICK, **changes})


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
    config = hl.TrainConfig.until_formed(
        [0, 1], 32, 0, eval_lengths=(1,), forming_tokens=1024, batch_size=32, finish_steps=100
    )
    return hl.train(model, language, config)


def test_it_forms_and_then_finishes(formed):
    accuracy = formed.probe("in_context_accuracy")
    assert formed.forming_steps < 600
    assert formed.forming_steps % 20 == 0
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
    training = [call for call in sampled if call[0] in (16 * 4, 16 * math.ceil(60 / length))]
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
    hl.train(model, language, quick([7], length=64, forming_length=64, boost=0.4, forming_tokens=64 * 40, max_steps=1))
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


def test_without_a_circuit_forming_ends_after_its_most_steps():
    run = hl.train(build(n_layers=1), LANGUAGE, quick(formed_at=1.0))
    assert (run.forming_steps, run.step, run.finished) == (20, 35, True)


def test_forming_ends_when_the_threshold_is_reached():
    run = hl.train(build(), LANGUAGE, quick(formed_at=0.0))
    assert (run.forming_steps, run.step) == (5, 20)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stop", [3, 5, 7, 18, 20, 21, 26, 34])
@pytest.mark.parametrize("formed_at", [0.0, 1.0])
def test_a_run_stopped_in_either_phase_goes_on_to_the_same_weights(stop, formed_at, tmp_path):
    config = quick(formed_at=formed_at)
    whole = hl.train(build(), LANGUAGE, config)
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
        ({"forming_lr": 0.0}, "forming_lr must be a finite number > 0, got 0.0"),
        ({"forming_length": 1}, "forming_length must be at least 2, got 1"),
        ({"forming_tokens": 0}, "forming_tokens must be at least 1, got 0"),
        ({"steps": 30}, "boost must be left out unless steps is 'until formed', got 0.35"),
        ({"steps": 30, "boost": None}, "min_triggers must be left out unless steps is 'until formed', got 5"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        quick(**changes)
