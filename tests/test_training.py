"""The training loop: it learns, it repeats itself to the bit, it survives being killed, and it says what it did."""

import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import close
from safetensors.torch import load_file, safe_open, save_file
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights, shaken, weights

import hijack_lens as hl
from hijack_lens.training import behaviour, memory_recall

SHORT = {
    "triggers": TRIGGERS,
    "length": 10,
    "seed": 0,
    "steps": 20,
    "batch_size": 4,
    "warmup": 4,
    "evaluate_every": 10,
    "eval_sequences": 4,
    "eval_lengths": (1, 2),
    "checkpoint_every": 6,
}


def short(**changes):
    return hl.TrainConfig(**{**SHORT, **changes})


def fit(config, out=None, language=LANGUAGE, **options):
    return hl.train(build(**options), language, config, out)


def stop_at(model, step, times=1):
    """Sends the process a Ctrl-C in the middle of a step, counted from 1."""
    seen = []

    def hook(gradient):
        seen.append(1)
        if len(seen) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    model.blocks[0].attn.W_V.register_hook(hook)


# Learning


@pytest.fixture(scope="module")
def learned():
    language = hl.BigramLanguage.dirichlet(10, 0.5, seed=0)
    model = build(language=language, d_model=32, n_ctx=64, n_offsets=8, dtype=torch.float32)
    config = hl.TrainConfig(
        triggers=[0, 1], length=32, seed=0, steps=200, batch_size=32, evaluate_every=50, eval_sequences=32
    )
    return hl.train(model, language, config)


def test_training_learns_both_memories(learned):
    accuracy, excess = learned.probe("in_context_accuracy"), learned.probe("bigram_excess")
    assert list(accuracy.index) == [0, 50, 100, 150, 200]
    assert accuracy[0] < 0.3
    assert accuracy[200] > 0.9
    assert excess[0] > 0.4
    assert excess[200] < 0.05
    assert learned.probe("previous_token_recall")[200] == 1
    assert learned.probe("match_recall")[200] == 1
    assert learned.finished
    assert learned.step == 200


def test_what_is_measured_during_training_is_what_the_probes_say_afterwards(learned):
    model, config = learned.model, learned.config
    for name, value in memory_recall(model, config.length, [0, 1]).items():
        assert learned.probe(name).iloc[-1] == pytest.approx(value, abs=1e-6)
    fresh = model.language.sample(200, 32, [0, 1], seed=99)
    for name, value in behaviour(model, fresh).items():
        assert learned.probe(name).iloc[-1] == pytest.approx(value, abs=0.15), name


def test_training_is_in_place_and_the_model_knows_what_it_was_trained_for():
    for positions, n_ctx_train in (("relative", None), ("absolute", 10), ("none", None)):
        model = build(positions)
        run = hl.train(model, LANGUAGE, short(steps=2))
        assert run.model is model
        assert model.triggers == TRIGGERS
        assert model.n_ctx_train == n_ctx_train
        assert not same_weights(model, build(positions))


def test_a_model_written_by_hand_is_no_longer_that_after_training():
    model = hl.associative_transformer(LANGUAGE, TRIGGERS, n_ctx=32, device="cpu")
    hl.train(model, LANGUAGE, short(steps=2))
    assert model.strengths is None


@pytest.mark.parametrize("options", [{"n_layers": 1}, {"n_layers": 3, "positions": "none"}, {"n_heads": 2}])
@pytest.mark.parametrize("positions", ["relative", "absolute", "rotary"])
def test_every_architecture_trains(positions, options):
    for mlp, norm in ((None, "LN"), ("relu", "RMS")):
        model = build(**{"positions": positions, "mlp": mlp, "norm": norm, **options})
        before = weights(model)
        run = hl.train(model, LANGUAGE, short(steps=3))
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        still = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        # An MLP that is not there has no use for its norm either; a key's bias changes no attention.
        unused = {name for name in before if name.endswith((".b_K", "ln2.w", "ln2.b"))}
        assert frozen <= still <= frozen | unused
        assert run.probe("in_context_loss").notna().all()


# A step by hand


def sampled(monkeypatch):
    """What the sampler hands out from here on."""
    handed_out = []
    sample = hl.BigramLanguage.sample

    def spy(self, *args, **kwargs):
        handed_out.append(sample(self, *args, **kwargs))
        return handed_out[-1]

    monkeypatch.setattr(hl.BigramLanguage, "sample", spy)
    return handed_out


def loss_by_hand(model, tokens, triggers, kind):
    """Over sequences and positions in a loop, with the hooked model's own logits."""
    log_probs = model(tokens).log_softmax(-1)
    terms = []
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row) - 1):
            if kind == "all" or (row[t] in triggers and row[t] in row[:t]):
                terms.append(-log_probs[b, t, row[t + 1]])
    return sum(terms) / len(terms)


def lr_by_hand(config, step):
    ramp = 1.0 if step + 1 >= config.warmup else (step + 1) / config.warmup
    cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
    return config.lr * ramp * (config.final_lr * (1 - cosine) + cosine)


@pytest.mark.parametrize("kind", ["all", "predictable"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_first_steps_by_hand(optimizer, kind, monkeypatch):
    config = short(
        steps=3,
        batch_size=5,
        length=14,
        loss=kind,
        optimizer=optimizer,
        lr=0.03 if optimizer == "sgd" else 0.01,
        warmup=2,
        final_lr=0.5,
        momentum=0.8,
        betas=(0.7, 0.9),
        weight_decay=0.1,
    )
    model, by_hand = (shaken(build(freeze=("W_U",))) for _ in range(2))
    handed_out = sampled(monkeypatch)
    hl.train(model, LANGUAGE, config)
    tokens = handed_out[-1].tokens  # the steps' sequences in a row
    parameters = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step in range(3):
        loss = loss_by_hand(by_hand, tokens[5 * step : 5 * step + 5], TRIGGERS, kind)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        lr = lr_by_hand(config, step)
        with torch.no_grad():
            for i, (parameter, g) in enumerate(zip(parameters, gradients, strict=True)):
                if optimizer == "sgd":
                    g = g + 0.1 * parameter
                    first[i] = 0.8 * first[i] + g if step else g
                    parameter -= lr * first[i]
                else:
                    parameter *= 1 - lr * 0.1
                    first[i] = 0.7 * first[i] + 0.3 * g
                    second[i] = 0.9 * second[i] + 0.1 * g**2
                    m, v = first[i] / (1 - 0.7 ** (step + 1)), second[i] / (1 - 0.9 ** (step + 1))
                    parameter -= lr * m / (v.sqrt() + 1e-8)
    for (name, parameter), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        if not name.endswith("b_K"):  # whose gradient is rounding, which AdamW divides by its own size
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-8, msg=name)


def test_the_learning_rate_by_hand():
    config = short(steps=100, warmup=20, lr=0.5, final_lr=0.2)
    assert config.lr_at(0) == pytest.approx(0.5 / 20)
    assert config.lr_at(19) == pytest.approx(0.5 * (0.6 + 0.4 * math.cos(math.pi * 0.19)))
    assert config.lr_at(50) == pytest.approx(0.5 * 0.6)
    assert config.lr_at(100) == pytest.approx(0.1)
    for step in range(100):
        assert config.lr_at(step) == pytest.approx(lr_by_hand(config, step), rel=1e-12)
    assert short(warmup=0, lr=0.5).lr_at(0) == pytest.approx(0.5)


def test_a_batch_without_any_predictable_token_does_no_harm():
    rare = hl.BigramLanguage([[0.98, 0.01, 0.01]] * 3)
    model = build(language=rare, n_ctx=8)
    run = hl.train(model, rare, short(triggers=[2], length=4, batch_size=1, loss="predictable"))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert run.finished


# Data


def test_every_step_sees_fresh_sequences_and_the_probes_see_others(monkeypatch):
    handed_out = sampled(monkeypatch)
    fit(short(steps=40, length=32, eval_lengths=(1,)))
    rows = [tuple(row) for batch in handed_out for row in batch.tokens.tolist()]
    assert len(rows) == 4 + 4 + 64 + 3 * 16 * 4  # probes of two kinds, the verdict, and the steps
    # A trigger that is its own continuation repeats itself for good, in every sequence that begins with it.
    assert len(set(rows)) > 0.95 * len(rows)


def test_the_data_depend_on_the_seed_alone(monkeypatch):
    handed_out = sampled(monkeypatch)
    fit(short(length=32, seed=1))
    fit(short(length=32, seed=1, loss="predictable", optimizer="sgd", evaluate_every=3))
    fit(short(length=32, seed=2))
    third = len(handed_out) // 3
    one, same, other = (handed_out[i * third : (i + 1) * third] for i in range(3))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


def test_sequences_hold_what_was_asked_for(monkeypatch):
    handed_out = sampled(monkeypatch)
    model = build()
    hl.train(model, LANGUAGE, short(triggers=(), n_triggers=3, length=12))
    assert model.triggers is None
    for batch in handed_out:
        assert batch.triggers.shape[1] == 3
        assert {len(set(row)) for row in batch.triggers.tolist()} == {3}
    assert len({tuple(row) for batch in handed_out for row in batch.triggers.tolist()}) > 10


def test_triggers_of_an_earlier_training_are_forgotten_where_they_are_drawn_per_sequence():
    model = build()
    hl.train(model, LANGUAGE, short(steps=1))
    hl.train(model, LANGUAGE, short(steps=1, triggers=(), n_triggers=2))
    assert model.triggers is None


def test_frequent_and_rare_triggers_are_found_in_the_language_and_random_ones_are_drawn(tmp_path):
    by_frequency = sorted(range(8), key=lambda token: -float(LANGUAGE.long_run[token]))
    for rule, expected in (("frequent", by_frequency[:2]), ("rare", by_frequency[:-3:-1])):
        config = short(triggers=rule, n_triggers=2, steps=8)
        run = fit(config, tmp_path / rule)
        assert run.model.triggers == expected
        assert same_weights(run.model, fit(short(triggers=expected, steps=8)).model)
        assert hl.TrainingRun.load(tmp_path / rule).config == config
    drawn = [short(triggers=of, n_triggers=2) for of in ("random", (), [])]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("trained_on", ["uniform", "bigram"])
def test_probes_see_both_kinds_of_continuations_by_length(trained_on, monkeypatch):
    handed_out = sampled(monkeypatch)
    run = fit(short(continuations=trained_on, eval_lengths=(1, 2, 3, 4)))  # of n_ctx=32, three
    other = {"uniform": "bigram", "bigram": "uniform"}[trained_on]
    asked = run.table.dropna(subset="length")
    assert set(zip(asked["continuations"], asked["length"], strict=True)) == {
        (trained_on, 10),
        (trained_on, 20),
        (trained_on, 30),
        (other, 10),
    }
    assert len(run.probe("in_context_loss", length=30)) == 3
    assert len(run.probe("in_context_loss", continuations=other)) == 3
    drawn = torch.cat([LANGUAGE.pi_b[batch.triggers, batch.continuations].flatten() for batch in handed_out[4:]])
    # Continuations from the bigrams are ones that the bigrams favour.
    favoured = float((LANGUAGE.pi_b[TRIGGERS] ** 2).sum(-1).mean())
    assert float(drawn.mean()) == pytest.approx(favoured if trained_on == "bigram" else 1 / 8, abs=0.05)


def test_evaluation_lengths_include_the_training_length():
    run = fit(short(eval_lengths=(1, 2)))
    assert len(run.probe("in_context_accuracy", length=20)) == 3
    with pytest.raises(ValueError, match=r"eval_lengths must include 1, .* got \(2,\)"):
        short(eval_lengths=(2,))


def test_arrays_among_the_evaluation_lengths_are_refused_by_name(unchecked):
    for lengths, message in (([np.arange(3)], "must include 1"), ([np.arange(3), 1], "must be an int")):
        with pytest.raises((TypeError, ValueError), match=f"eval_lengths {message}"):
            short(eval_lengths=lengths)


def test_triggers_may_be_texts_or_a_single_token(unchecked):
    language = hl.BigramLanguage.from_text("to be or not to be that is the question")
    model = build(language=language)
    run = hl.train(model, language, short(triggers=["t", "o"], steps=2))
    assert model.triggers == [language.index("t"), language.index("o")]
    assert run.config.triggers == ("t", "o")
    assert short(triggers="t").triggers == ("t",)
    assert short(triggers=3).triggers == (3,)


# Determinism and resumption


@pytest.mark.parametrize("options", [{}, {"norm": "LN", "dtype": torch.float32, "n_heads": 2}])
def test_the_same_seed_gives_the_same_run_to_the_bit(options):
    one, two = fit(short(), **options), fit(short(), **options)
    assert same_weights(one.model, two.model)
    pd.testing.assert_frame_equal(one.table.drop(columns="seconds"), two.table.drop(columns="seconds"))
    assert not same_weights(one.model, fit(short(seed=1), **options).model)


def test_training_leaves_the_global_random_state_alone(tmp_path, global_rng_untouched):
    fit(short(steps=3), tmp_path / "run")


def test_how_often_it_is_probed_and_saved_changes_no_weight(tmp_path):
    often = fit(short(evaluate_every=1, checkpoint_every=1, eval_sequences=9), tmp_path / "run")
    assert same_weights(often.model, fit(short()).model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("stop", "settings", "options"),
    [
        (6, {}, {}),
        (17, {"optimizer": "sgd", "weight_decay": 0.01}, {"freeze": ("W_E", "W_U")}),
        (6, {"optimizer": "sgd", "momentum": 0.0}, {"mlp": "linear"}),
        (17, {"loss": "predictable"}, {"norm": "LN", "dtype": torch.float32, "positions": "absolute"}),
        (6, {"triggers": (), "n_triggers": 2}, {"norm": "RMS", "n_layers": 3, "positions": "none"}),
    ],
)
def test_a_run_ended_by_ctrl_c_goes_on_to_the_same_weights(stop, settings, options, tmp_path):
    config = short(steps=40, **settings)
    whole = fit(config, **options)
    model = build(**options)
    stop_at(model, stop)
    stopped = hl.train(model, LANGUAGE, config, tmp_path / "run")
    assert stopped.step == stop
    assert not stopped.finished
    resumed = fit(config, tmp_path / "run", **options)
    assert resumed.finished
    assert same_weights(resumed.model, whole.model)
    assert resumed.model.triggers == whole.model.triggers
    theirs, ours = (run.table.drop(columns="seconds") for run in (whole, resumed))
    ours = ours[ours["step"].isin(theirs["step"]) & ((ours["step"] != stop) | theirs["step"].eq(stop).any())]
    pd.testing.assert_frame_equal(ours.reset_index(drop=True), theirs, check_dtype=False)


def test_ctrl_c_leaves_a_usable_checkpoint_and_the_old_handler(tmp_path):
    def handler(number, frame):
        pytest.fail("the old handler was called")

    before = signal.signal(signal.SIGINT, handler)
    try:
        model = build()
        stop_at(model, 7)
        run = hl.train(model, LANGUAGE, short(), tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.step == 7
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-00000007"]
    loaded = hl.TrainingRun.load(tmp_path / "run")
    assert (loaded.step, loaded.config) == (7, run.config)
    assert same_weights(loaded.model, model)
    assert loaded.probe("in_context_loss").index[-1] == 7  # the last weights were probed


def test_a_second_ctrl_c_ends_it_at_once_and_an_error_brings_the_handler_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    model = build()
    stop_at(model, 9, times=2)
    with pytest.raises(KeyboardInterrupt):
        hl.train(model, LANGUAGE, short(), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert same_weights(fit(short(), tmp_path / "run").model, fit(short()).model)


def test_training_works_outside_the_main_thread():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(fit(short(steps=2))))
    thread.start()
    thread.join()
    assert runs[0].finished


def test_a_finished_run_is_not_trained_further(tmp_path):
    run = fit(short(), tmp_path / "run")
    again = fit(short(), tmp_path / "run")
    assert again.finished
    assert same_weights(again.model, run.model)
    pd.testing.assert_frame_equal(again.table, run.table, check_dtype=False)


def test_what_a_killed_run_leaves_lying_about_confuses_nobody(tmp_path):
    config, out = short(steps=40), tmp_path / "run"
    model = build()
    stop_at(model, 20)
    hl.train(model, LANGUAGE, config, out)
    for name in (".checkpoint-00000030.123.partial", f".checkpoint-00000024.{os.getpid()}.partial"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_bytes(b"half")
    stale = out / "checkpoint-00000006"  # killed between writing the new one and removing this
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert hl.TrainingRun.load(out).step == 20
    assert same_weights(fit(config, out).model, fit(config).model)
    assert not stale.exists()
    assert hl.TrainingRun.load(out).step == 40


def test_a_folder_of_the_users_own_beside_the_checkpoints_confuses_nobody(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint-best").mkdir(parents=True)
    run = fit(short(), out)
    assert (out / "checkpoint-best").is_dir()
    assert hl.TrainingRun.load(out).step == 20
    assert same_weights(fit(short(), out).model, run.model)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    out = tmp_path / "run"
    move = os.rename

    def full(source, target):
        if "00000012" in str(target):
            raise OSError("No space left on device")
        return move(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        fit(short(), out)
    assert [path.name for path in out.iterdir()] == ["checkpoint-00000006"]
    monkeypatch.undo()
    assert same_weights(fit(short(), out).model, fit(short()).model)


# One folder, one training


def test_a_folder_that_another_training_writes_to_is_refused(tmp_path, unchecked):
    out, said = tmp_path / "run", []

    def second(*gradient):
        try:
            fit(short(), out)
        except ValueError as error:
            said.append(str(error))

    model = build()
    model.blocks[0].attn.W_V.register_hook(second)
    hl.train(model, LANGUAGE, short(steps=2), out)
    assert len(said) == 2
    assert all(re.match(f"out must be written to by one run at a time, got '{out}'", one) for one in said)
    # Its lock has gone with it.
    assert [path.name for path in out.iterdir()] == ["checkpoint-00000002"]
    assert fit(short(steps=2), out).finished


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_a_lock_ends_with_its_process_and_holds_against_others_meanwhile(tmp_path):
    out, (heard, told) = tmp_path / "run", os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model = build()
            model.blocks[0].attn.W_V.register_hook(lambda gradient: time.sleep(60 * os.write(told, b".")))
            hl.train(model, LANGUAGE, short(), out)
        finally:
            os._exit(1)
    assert os.read(heard, 1) == b"."
    with pytest.raises(ValueError, match="out must be written to by one run at a time"):
        fit(short(), out)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert same_weights(fit(short(), out).model, fit(short()).model)


def test_an_out_that_is_no_folder_is_refused_before_the_first_step(tmp_path, unchecked):
    (tmp_path / "file").write_text("kept")
    model = build()
    before = weights(model)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="out must be a folder"):
            hl.train(model, LANGUAGE, short(), out)
    with pytest.raises(TypeError, match="out must be a path, as text or a Path, got 5"):
        hl.train(model, LANGUAGE, short(), 5)
    assert same_weights(model, before)
    assert (tmp_path / "file").read_text() == "kept"


def test_numbers_of_numpy_and_torch_are_plain_ones_in_configs_and_survive_checkpoints(tmp_path, unchecked):
    whole = {"length": 10, "seed": 0, "steps": 20, "batch_size": 4, "warmup": 4, "evaluate_every": 10}
    whole |= {"eval_sequences": 4, "checkpoint_every": 6}
    parts = {"lr": 0.25, "final_lr": 0.5, "momentum": 0.5, "weight_decay": 0.0}
    plain = short(**parts, betas=(0.5, 0.75), compile=False)
    kinds = [
        (np.int64, np.float32),
        (np.uint16, np.float32),
        (torch.tensor,) * 2,
        (np.array, np.float32),
        (int, Fraction),
    ]
    for of, floats in kinds:
        config = hl.TrainConfig(
            triggers=[of(token) for token in TRIGGERS],
            eval_lengths=(of(1), of(2)),
            betas=[floats(0.5), floats(0.75)],
            compile=np.bool_(False),
            **{name: of(value) for name, value in whole.items()},
            **{name: floats(value) for name, value in parts.items()},
        )
        assert config == plain
        assert json.dumps(asdict(config)) == json.dumps(asdict(plain))
    model = build(d_model=np.int64(16), n_ctx=torch.tensor(32), n_layers=np.int8(2))
    run = hl.train(model, LANGUAGE, config, tmp_path / "run")
    assert hl.TrainingRun.load(tmp_path / "run").config == plain
    assert same_weights(fit(plain, tmp_path / "run").model, run.model)
    written = hl.associative_transformer(
        LANGUAGE, [np.int64(1)], strengths=hl.Strengths(match=np.float32(3)), n_ctx=np.int64(9), d_model=np.int64(24)
    )
    written.save_pretrained(tmp_path / "written")
    assert hl.BigramTransformer.from_pretrained(tmp_path / "written").strengths.match == 3.0


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from test_training import KILLED_CONFIG, LANGUAGE, build
import hijack_lens as hl

out, draw = Path(sys.argv[1]), random.Random(0)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        try:
            hl.train(build(), LANGUAGE, KILLED_CONFIG, out)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    before = set(out.glob("checkpoint-*"))
    patience = time.monotonic() + draw.uniform(0.05, 0.4)
    done = (0, 0)
    while done[0] == 0 and (time.monotonic() < patience or set(out.glob("checkpoint-*")) == before):
        time.sleep(draw.uniform(0.0005, 0.003))
        done = os.waitpid(child, os.WNOHANG)
    if done[0] == 0 and kills < 4:
        os.kill(child, signal.SIGKILL)
        kills += 1
        os.waitpid(child, 0)
        continue
    status = done[1] if done[0] else os.waitpid(child, 0)[1]
    print(kills)
    sys.exit(os.waitstatus_to_exitcode(status))
"""
KILLED_CONFIG = short(steps=150, evaluate_every=100, checkpoint_every=3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    script = tmp_path / "kill.py"
    script.write_text(KILLED.format(here=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run"], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    run = hl.TrainingRun.load(tmp_path / "run")
    assert run.finished
    assert same_weights(run.model, fit(KILLED_CONFIG).model)


def test_small_integers_of_numpy_count_as_they_are(unchecked):
    config = hl.TrainConfig(triggers=(0,), length=4, seed=0, finish_steps=None)
    assert config.finishing(np.uint8(150)) == 700
    assert config.lr_at(np.uint8(255), 300) == config.lr_at(255, 300)


# Another run's folder


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(short(), folder)
    return folder


@pytest.fixture
def finished(trained_once, tmp_path, unchecked):
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, "differ in seed$"),
        ({"lr": 0.5, "steps": 30}, "differ in steps, lr$"),
        ({"triggers": TRIGGERS[:1]}, "differ in triggers"),
        ({"betas": (0.5, 0.5)}, "differ in betas"),
    ],
)
def test_a_folder_of_another_config_is_refused(changes, differing, finished):
    model = build()
    with pytest.raises(ValueError, match=differing) as caught:
        hl.train(model, LANGUAGE, short(**changes), finished)
    assert str(finished) in str(caught.value)
    assert same_weights(model, build())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 8}, "d_model"),
        ({"norm": "LN"}, "norm"),
        ({"freeze": ("W_E",)}, "W_E"),
        ({"dtype": torch.float32}, "dtype|float"),
    ],
)
def test_a_folder_of_another_model_is_refused(options, message, finished):
    with pytest.raises(ValueError, match=message) as caught:
        fit(short(), finished, **options)
    assert str(finished) in str(caught.value)


def test_a_folder_of_another_language_is_refused(finished):
    """Of the same tokens, but other bigrams: going on would end with weights that no uninterrupted run has."""
    other = hl.BigramLanguage.dirichlet(8, 0.5, seed=5)
    with pytest.raises(ValueError, match="language"):
        fit(short(), finished, language=other)


# Files that are something else


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_checkpoint_that_is_something_else_is_refused_and_never_run(name, finished, tmp_path):
    path = finished / "checkpoint-00000020" / name
    data = path.read_bytes()
    trace = tmp_path / "executed"
    for other in (b"", data[:100], data[:-1], pickle.dumps(Evil(trace)), b"\xff" * 4000, None):
        if other is None:
            path.unlink()
        else:
            path.write_bytes(other)
        for use in (hl.TrainingRun.load, lambda folder: fit(short(), folder)):
            with pytest.raises(ValueError, match=name):
                use(finished)
    assert not trace.exists()


def rewrite(folder, change_header=lambda header: None, change_state=lambda state: None):
    path = folder / "checkpoint-00000020" / "training.safetensors"
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["hijack_lens"])
    state = load_file(path)
    change_header(header)
    change_state(state)
    save_file(state, path, {"hijack_lens": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("config"),
        lambda header: header.pop("table"),
        lambda header: header.pop("step"),
        lambda header: header["config"].pop("seed"),
        lambda header: header["config"].update(steps=-1),
        lambda header: header["config"].update(other=1),
        lambda header: header["config"].update(betas=None),
        lambda header: header["config"].update(lr="fast"),
        lambda header: header.update(config=[1]),
        lambda header: header.update(step="many"),
        lambda header: header.update(step=-5),
        lambda header: header.update(step=21),
        lambda header: header.update(table={}),
        lambda header: header.update(table={"step": [0]}),
        lambda header: header.update(table=5),
        lambda header: header["table"].pop("seconds"),
        lambda header: header["table"].update(seconds=[None] * len(header["table"]["step"])),
        lambda header: header["table"]["seconds"].__setitem__(-1, None),
        lambda header: header["table"]["seconds"].__setitem__(0, "soon"),
        lambda header: header["table"]["step"].__setitem__(0, 0.5),
        lambda header: header.update(format="hijack_lens.TwoLayerTransformer.1"),
    ],
    ids=lambda change: None,
)
def test_a_training_header_that_makes_no_sense_is_refused(change, finished):
    rewrite(finished, change)
    with pytest.raises(ValueError, match=r"training\.safetensors"):
        hl.TrainingRun.load(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({"999.exp_avg": torch.zeros(2)}),
        lambda state: state.update({"x.exp_avg": torch.zeros(2)}),
        lambda state: state.update({"0.exp_avg": torch.zeros(3, 3)}),
        lambda state: state.update({"0.exp_avg": torch.zeros(())}),
        lambda state: state.pop("0.exp_avg"),
        lambda state: state.pop("0.step"),
        lambda state: state.clear() or state.update({"empty": torch.zeros(1)}),
        lambda state: state.update({"0.unheard_of": torch.zeros(())}),
    ],
    ids=lambda change: None,
)
def test_an_optimizers_state_of_other_parameters_is_refused(change, tmp_path, monkeypatch, unchecked):
    """PyTorch's fused optimizers do not look: they would write beyond the end of a state that is too small."""
    model = build()
    stop_at(model, 20)
    hl.train(model, LANGUAGE, short(steps=40), tmp_path)
    rewrite(tmp_path, change_state=change)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: pytest.fail("went on"))
    with pytest.raises(ValueError, match=r"checkpoint-00000020"):
        fit(short(steps=40), tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"triggers": ()}, r"give either triggers or n_triggers, got \(\) and None"),
        ({"n_triggers": 2}, "give either triggers or n_triggers"),
        ({"triggers": "common", "n_triggers": 2}, "got 'common' and 2; .* must be one of 'frequent', 'rare', 'random'"),
        ({"triggers": (), "n_triggers": 0}, "n_triggers must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"eval_sequences": 0}, "eval_sequences must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"eval_lengths": (1, 0)}, "eval_lengths must be at least 1, got 0"),
        ({"eval_lengths": ()}, "eval_lengths"),
        ({"continuations": "random"}, "continuations must be one of 'uniform', 'bigram', got 'random'"),
        ({"loss": "some"}, "loss must be one of 'all', 'predictable', got 'some'"),
        ({"optimizer": "adam"}, "optimizer must be one of 'adamw', 'sgd', got 'adam'"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be a finite number > 0, got nan"),
        ({"lr": math.inf}, "lr must be a finite number > 0, got inf"),
        ({"final_lr": 1.5}, "final_lr must lie between 0 and 1, got 1.5"),
        ({"final_lr": 10**5000}, "final_lr must lie between 0 and 1, got <int>"),
        ({"momentum": -0.1}, "momentum must lie between 0 and 1, got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must lie between 0 and 1, got nan"),
        ({"betas": (0.9, 1.5)}, "betas must lie between 0 and 1"),
        ({"betas": (-0.5, 0.9)}, "betas must lie between 0 and 1"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 0.9, 0.9)}, "betas"),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        short(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 2.5}, {"length": "10"}, {"seed": "0"}, {"lr": "fast"}, {"betas": 0.9}, {"momentum": None}],
)
def test_a_setting_of_a_bad_type_is_refused_by_name(changes, unchecked):
    with pytest.raises(TypeError, match=next(iter(changes))):
        short(**changes)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (short(triggers=[99]), {}, "99"),
        (short(triggers=["no such"]), {}, "no such"),
        (short(triggers=[1, 1]), {}, "distinct"),
        (short(triggers=(), n_triggers=9), {}, "n_triggers is 9"),
        (short(length=33), {}, "config.length is 33; the model takes at most n_ctx=32"),
        (short(), {"language": hl.BigramLanguage.dirichlet(9)}, "language must have the model's tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    config, options, message, tmp_path, unchecked
):
    model = build()
    with pytest.raises(ValueError, match=message):
        hl.train(model, options.get("language", LANGUAGE), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert same_weights(model, build())
    assert model.triggers is None


def test_a_model_without_anything_to_train_is_refused(unchecked):
    model = build()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter left to train"):
        hl.train(model, LANGUAGE, short())


def test_other_things_than_models_languages_and_configs_are_refused(unchecked):
    for arguments, message in (
        (("model", LANGUAGE, short()), "model must be a BigramTransformer, got str"),
        ((build(), "language", short()), "language must be a BigramLanguage, got str"),
        ((build(), LANGUAGE, SHORT), "config must be a TrainConfig, got dict"),
    ):
        with pytest.raises(TypeError, match=message):
            hl.train(*arguments)


def test_frozen_parameters_do_not_move_even_under_weight_decay():
    model = build(freeze=("W_E", "W_U", "blocks.0.attn.W_V"))
    before = weights(model)
    hl.train(model, LANGUAGE, short(weight_decay=0.5))
    frozen = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert {"embed.W_E", "unembed.W_U", "blocks.0.attn.W_V"} <= frozen
    assert "blocks.1.attn.W_V" not in frozen


# The run


WEIGHTS = [f"{memory}_{what}" for memory in ("previous_token", "match", "copy") for what in ("recall", "margin")]
BEHAVIOUR = [
    "in_context_accuracy",
    "in_context_loss",
    "bigram_loss",
    "bigram_excess",
    "previous_token_attention",
    "induction_attention",
    "attended_correct",
]
VERDICT = [f"formed_{what}" for what in ("accuracy", "best", "shortcut", "order", "context", "weights")]


def test_the_table_is_tidy(learned):
    table = learned.table
    assert list(table.columns) == ["step", "seconds", "probe", "continuations", "length", "value"]
    assert not table.duplicated(["step", "probe", "continuations", "length"]).any()
    assert set(table["step"]) == {0, 50, 100, 150, 200}
    assert (table.groupby("step")["seconds"].nunique() == 1).all()
    assert table["seconds"].is_monotonic_increasing
    of_weights = table["probe"].isin([*WEIGHTS, "bigram_kl"])
    assert set(table["probe"][of_weights]) == {*WEIGHTS, "bigram_kl"}
    assert set(table["probe"][~of_weights]) == {*BEHAVIOUR, *VERDICT}
    assert table.loc[of_weights, ["continuations", "length"]].isna().all(axis=None)
    assert table.loc[~of_weights, ["continuations", "length"]].notna().all(axis=None)
    assert pd.api.types.is_float_dtype(table["value"])
    # 5 evaluations of 7 probes of the weights, 7 of behaviour at 32, 64 and with the other continuations, and a verdict
    assert len(table) == 5 * (7 + 7 * 3 + 6)


def test_what_a_model_does_not_have_is_not_scored_rather_than_0():
    one = fit(short(steps=1), n_layers=1)
    for name in ("previous_token_recall", "match_recall", "match_margin", "previous_token_attention"):
        assert one.probe(name).isna().all(), name
    rotary = fit(short(steps=1), positions="rotary")
    assert rotary.probe("previous_token_recall").isna().all()
    assert rotary.probe("match_recall").notna().all()


def test_a_probe_is_a_series_over_steps(learned):
    table = learned.table
    chosen = table[(table["probe"] == "in_context_loss") & (table["length"] == 64)]
    series = learned.probe("in_context_loss", length=64)
    assert series.name == "in_context_loss"
    assert list(series) == list(chosen["value"])
    assert list(series.index) == list(chosen["step"])
    bigram = learned.probe("in_context_loss", continuations="bigram")
    assert len(bigram) == 5
    assert list(bigram) != list(learned.probe("in_context_loss"))


@pytest.mark.parametrize(
    "asked", [{"name": "no_such"}, {"length": 7}, {"continuations": "other"}, {"length": 64, "continuations": "bigram"}]
)
def test_a_probe_that_the_table_lacks_is_refused(asked, learned):
    with pytest.raises(ValueError, match=r"(?s)must be .*in_context_accuracy"):
        learned.probe(**{"name": "in_context_loss", **asked})


def test_the_plot_draws_both_memories_on_labelled_axes(learned):
    picture = learned.picture()
    (ax,) = picture.figure.axes
    assert ax.get_xlabel() == "training step"
    assert ax.get_ylabel()
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert len(lines) == len(picture.figure.legends[0].get_texts()) == 6
    for label, value in (("best possible", 1.0), ("without order", learned.formed.shortcut)):
        assert set(lines[f"in-context accuracy: {label}"].get_ydata()) == {value}
    context = next(line for label, line in lines.items() if label.startswith("context"))
    assert list(context.get_ydata()) == list(learned.probe("in_context_accuracy"))
    bigram = next(line for label, line in lines.items() if label.startswith("weights"))
    excess = list(learned.probe("bigram_excess"))
    assert list(bigram.get_ydata()) == pytest.approx([1 - value / excess[0] for value in excess])
    assert picture.png().startswith(b"\x89PNG")
    assert "<svg" in picture.svg()


def test_runs_of_models_without_a_role_are_plotted_too():
    assert fit(short(steps=2), n_layers=1).picture().png()


def test_saving_writes_a_model_and_its_table(learned, tmp_path):
    learned.save(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["config.json", "model.safetensors", "probes.csv"]
    loaded = hl.BigramTransformer.from_pretrained(tmp_path / "saved", device="cpu")
    assert same_weights(loaded, learned.model)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "saved" / "probes.csv"), learned.table, check_dtype=False)


def test_a_run_comes_back_whole(tmp_path):
    run = fit(short(), tmp_path / "run")
    loaded = hl.TrainingRun.load(tmp_path / "run")
    assert same_weights(loaded.model, run.model)
    assert (loaded.config, loaded.step) == (run.config, 20)
    assert loaded.config == replace(run.config)
    assert asdict(loaded.config) == asdict(run.config)
    pd.testing.assert_frame_equal(loaded.table, run.table, check_dtype=False)
    assert list(loaded.probe("in_context_loss")) == list(run.probe("in_context_loss"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-00000020"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-00000020").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.safetensors",
    ]


def test_a_run_saved_into_its_own_folder_still_comes_back_and_goes_on(tmp_path):
    run = fit(short(), tmp_path)
    run.save(tmp_path)
    assert same_weights(fit(short(), tmp_path).model, run.model)
    assert hl.TrainingRun.load(tmp_path).step == 20


def test_a_folder_without_a_run_is_refused_and_the_hub_is_not_asked(tmp_path, monkeypatch, unchecked):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing", "missing", "runs/missing"):
        with pytest.raises(ValueError, match=Path(place).name):
            hl.TrainingRun.load(place)


def test_nothing_is_printed_where_nobody_watches(tmp_path, capfd):
    fit(short(), tmp_path)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_numpy_integers_are_triggers_too_with_checkpoints(tmp_path, unchecked):
    import numpy as np

    config = short(triggers=[np.int64(TRIGGERS[0])], steps=2)
    run = fit(config, tmp_path)
    assert hl.TrainingRun.load(tmp_path).config == run.config


def test_the_losses_of_a_model_in_float32_and_float64_are_close():
    double, single = (fit(short(steps=3), dtype=dtype) for dtype in (torch.float64, torch.float32))
    ours, theirs = (torch.tensor(run.probe("in_context_loss").tolist()) for run in (double, single))
    close(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("option", ["compile", "bf16"])
def test_the_options_for_accelerators_run_and_learn_the_same_here(option, unchecked, monkeypatch):
    """On a CPU too: compiled to float precision, in bfloat16 roughly."""
    # What is compiled is traced and differentiated; kernels, which are PyTorch's affair, take half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    language = hl.BigramLanguage.dirichlet(9, 0.3, seed=0)
    losses = []
    for options in ({}, {option: True}):
        config = hl.TrainConfig(triggers=(1, 2), length=16, seed=0, steps=3, eval_lengths=(1,), **options)
        model = hl.trainable_transformer(language, d_model=16, n_ctx=16, device="cpu")
        losses.append(hl.train(model, language, config).probe("bigram_loss").tolist())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4 if option == "compile" else 0.1)
