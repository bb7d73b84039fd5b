"""Sizes that do not fit are refused with the memory that they would take, before any of it is taken."""

import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from models_for_tests import handwritten
from trainable_for_tests import LANGUAGE, TRIGGERS

import hijack_lens as hl
from hijack_lens import cli
from hijack_lens.probing import fact_prompts
from hijack_lens.training import gradient_steps

WORDS = " ".join(f"w{i}" for i in range(700))


def with_free(monkeypatch, count):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=count))


@pytest.fixture
def laptop(monkeypatch):
    """A machine with 16 GiB to give."""
    with_free(monkeypatch, 2**34)


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="the process's own limit is read on Linux alone")
def test_a_limit_of_the_process_counts_as_what_is_free(monkeypatch):
    def limited(process, resource):
        assert resource == psutil.RLIMIT_AS
        return process.memory_info().vms + 2**30, psutil.RLIM_INFINITY

    monkeypatch.setattr(psutil.Process, "rlimit", limited)
    with pytest.raises(ValueError, match=r"n_ctx=100000000, .* would take .* and 1\.0 GiB are free"):
        hl.trainable_transformer(LANGUAGE, "absolute", d_model=8, n_ctx=10**8)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_made(laptop, unchecked, monkeypatch):
    small = handwritten()
    prompt = hl.hijack_prompt(small.language, 0, 1, 1, 9, seed=0)
    long = hl.trainable_transformer(LANGUAGE, n_ctx=10**5, d_model=4)
    monkeypatch.setattr(hl.BigramTransformer, "to", lambda *args, **options: pytest.fail("made"))

    def trainable(*args, **sizes):
        return lambda: hl.trainable_transformer(LANGUAGE, *args, **sizes)

    started = time.monotonic()
    for name, make in {
        "n_layers=1000000": trainable(n_layers=10**6),
        "n_layers=1000000 ": trainable(n_layers=10**6, d_model=2, n_ctx=2),
        "d_model=1000000": trainable(d_model=10**6),
        "d_head=1000000000": trainable(d_head=10**9),
        "d_mlp=10000000000": trainable(d_mlp=10**10),
        "n_ctx=100000000": trainable(n_ctx=10**8),
        "n_ctx=100000000000": trainable("rotary", n_ctx=10**11),
        "n_heads=100000000": trainable(n_heads=10**8, d_head=8),
        "n_offsets=1000000000000": trainable(n_offsets=10**12),
        "d_model=1000000000": lambda: hl.associative_transformer(LANGUAGE, d_model=10**9),
        "n_ctx=1000000000": lambda: hl.associative_transformer(LANGUAGE, n_ctx=10**9),
        "n_ctx=1000000": lambda: hl.associative_transformer(LANGUAGE, positions="absolute", n_ctx=10**6),
        "d_vocab=1000000": lambda: hl.BigramLanguage.dirichlet(10**6),
        "n_sequences=1000000000, length=9": lambda: LANGUAGE.sample(10**9, 9, seed=0),
        "n_sequences=1, length=100000000": lambda: LANGUAGE.sample(1, 10**8, seed=0),
        "length=100000000": lambda: hl.hijack_prompt(LANGUAGE, 0, 1, 1, 10**8, seed=0),
        "n_prompts=1000000000": lambda: hl.hijack_prompt(LANGUAGE, 0, 1, 1, 9, n_prompts=10**9, seed=0),
        "repeats=1000000000": lambda: hl.Fact("Oslo", "Norway", "Peru", "{subject}: {answer}.").text(10**9),
        "language=1000000": lambda: hl.memory_capacity(10**6),
        "repeats=10000000000": lambda: fact_prompts(small, hl.Bigram(0, 1, 2), 10**10),
        "repeats=9223372036854775807": lambda: fact_prompts(small, hl.Bigram(0, 1, 2), np.int64(2**63 - 1)),
        "length=1000000000000": lambda: hl.theory.min_repeats(
            LANGUAGE, 0, 1, 2, hl.theory.Setting(hl.Strengths()), length=10**12
        ),
        "n_prompts=10000000000": lambda: hl.find_circuit(small, n_prompts=10**10),
        "n_samples=100000000000": lambda: hl.shapley(
            small, prompt, hl.logit_diff(1, 2), "all", max_exact=1, n_samples=10**11
        ),
        "d_model=10000000": lambda: gradient_steps(LANGUAGE, d_model=10**7),
        "batch_size=64, length=50000": lambda: hl.train(long, LANGUAGE, hl.TrainConfig(TRIGGERS, 50_000, 0, steps=1)),
        "tokens_per_step=4096, length=50000": lambda: hl.train(long, LANGUAGE, hl.TrainConfig(TRIGGERS, 50_000, 0)),
        "eval_sequences=10000, length=20000": lambda: hl.train(
            long,
            LANGUAGE,
            hl.TrainConfig(TRIGGERS, 20_000, 0, steps=1, batch_size=1, eval_sequences=10_000, eval_lengths=(1,)),
        ),
    }.items():
        with pytest.raises(ValueError, match=rf"{name.strip()}.* would take [\w ,.]+ of memory, and 16.0 GiB are"):
            make()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["explain", "--length", "100000000"], "--length=100000000"),
        (["explain", "--level", "word", "--max-vocab", "400", "--length", "100000000"], "--length=100000000"),
        (["train", "--out", "run", "--length", "100000000"], "--length=100000000"),
        (["train", "--out", "run", "--d-model", "1000000"], "d_model=1000000"),
        (
            ["train", "--out", "run", "--level", "word", "--max-vocab", "60000", "--text", "words.txt"],
            "max_vocab=60000",
        ),
    ],
)
def test_the_command_line_names_the_option(arguments, named, laptop, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "words.txt" in arguments:
        (tmp_path / "words.txt").write_text(" ".join(f"w{i}" for i in range(60_000)))
    monkeypatch.setattr("sys.argv", ["hijack-lens", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in said
    assert "GiB of memory, and 16.0 GiB are free" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_text_of_too_many_words_names_the_vocabulary_that_fits(monkeypatch):
    with_free(monkeypatch, 8 * 500**2 + 5000)
    with pytest.raises(ValueError, match=r"different_tokens=700 would take .*: give a max_vocab below 500"):
        hl.BigramLanguage.from_text(WORDS, level="word")
    assert hl.BigramLanguage.from_text(WORDS, level="word", max_vocab=499).d_vocab == 499
    with pytest.raises(ValueError, match="max_vocab=600"):
        hl.BigramLanguage.from_text(WORDS, level="word", max_vocab=600)


def test_words_are_counted_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in (torch.rand(9000, generator=generator).square() * 300).long().tolist()]
    language = hl.BigramLanguage.from_text(" ".join(words), level="word", smoothing=0.25)
    pairs, firsts = Counter(pairwise(words)), Counter(words[:-1])
    for v, row in zip(language.tokens, language.pi_b.tolist(), strict=True):
        whole = firsts[v] + 0.25 * language.d_vocab
        assert row == pytest.approx([(pairs[v, u] + 0.25) / whole for u in language.tokens], abs=1e-15)
