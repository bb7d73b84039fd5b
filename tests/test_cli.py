"""The command line, as a person runs it."""

import importlib.metadata
import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import hijack_lens as hl
from hijack_lens import cli, reproduction, theory
from hijack_lens.cli import commands, doctor
from hijack_lens.reproduction import Finding, Result
from hijack_lens.show.style import Picture


def run(capsys, monkeypatch, *arguments, width=120):
    """Exit code, standard output and standard error of `hijack-lens arguments`."""
    monkeypatch.setattr(sys, "argv", ["hijack-lens", *arguments])
    monkeypatch.setenv("COLUMNS", str(width))
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def blank_report(monkeypatch):
    """Reports are blank pages: what stands in them is looked at elsewhere, and takes long to draw."""

    def write(explanation, path):
        path.write_text("")
        return path

    monkeypatch.setattr(hl, "write_report", write)


def test_explain_without_arguments_tells_the_whole_story(capsys, monkeypatch, tmp_path):
    code, out, err = run(capsys, monkeypatch, "explain")
    assert (code, err) == (0, "")
    for part in (
        "hijacks the weights",
        "previous-token head",
        "induction head",
        "bigram memory",
        "theory beside model",
    ):
        assert part in out
    assert str(tmp_path / "hijack-lens-report.html") in out.replace("\n", "")
    assert (tmp_path / "hijack-lens-report.html").stat().st_size > 1_000_000


def test_json_holds_the_numbers_that_the_library_gives(capsys, monkeypatch, tmp_path, blank_report):
    text = "the cat sat on the mat and the dog sat on the log while the cow ate the hay " * 20
    Path("my.txt").write_text(text)
    options = ["--text", "my.txt", "--level", "word", "--trigger", "the", "--in-context", "sat", "--repeats", "2",
               "--length", "40", "--match", "4", "--copy", "7", "--bigram", "0.5", "--seed", "5"]  # fmt: skip
    code, out, err = run(capsys, monkeypatch, "explain", *options, "--json", "--out", "r.html")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    language = hl.BigramLanguage.from_text(text, level="word")
    prompt = hl.hijack_prompt(language, "the", "sat", 2, 40, seed=5)
    assert printed["prompt"] == prompt.text
    assert (printed["trigger"], printed["in_context"]) == ("the", "sat")
    expected = theory.margin(prompt, language, theory.Setting(hl.Strengths(match=4.0, copy=7.0, bigram=0.5)))
    assert printed["margin"]["total"] == pytest.approx(float(expected.total), abs=1e-4)
    assert printed["theory"]["context"] == pytest.approx(float(expected.context))
    assert printed["ablated"]["induction head"] == pytest.approx(float(expected.weights), abs=1e-4)
    assert printed["ablated"]["bigram memory"] == pytest.approx(float(expected.context), abs=1e-4)
    assert sum(path["in_context"] - path["global"] for path in printed["paths"]) == pytest.approx(
        float(expected.total), abs=1e-4
    )
    assert printed["winner"] == ("context" if float(expected.total) > 0 else "weights")
    assert printed["report"] == str(tmp_path / "r.html")


def test_absolute_positions_and_weights_that_win(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "explain", "--positions", "absolute", "--copy", "2", "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["winner"] == "weights"
    assert printed["repeats_needed"] is None
    assert "overrule the context" in printed["verdict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trigger", "日"], "trigger '日' is not one of the language's"),
        (["--in-context", "u", "--trigger", "q"], "in_context 'u' is also what the weights say"),
        (["--repeats", "60"], "repeats=60 do not fit"),
        (["--repeats", "many"], "many"),
        (["--length", "0"], "length must be at least 1, got 0"),
        (["--level", "syllable"], "syllable"),
        (["--match", "nan"], "match must be a finite number >= 0, got nan"),
        (["--text", "missing.txt"], "--text 'missing.txt' cannot be read"),
        (["--text", "x" * 300], f"--text must be a path that a file can have, got PosixPath('{'x' * 60}"),
        (["--text", "empty.txt"], "text must hold at least two tokens, got ''"),
        (["--text", "binary.txt"], "--text 'binary.txt' cannot be read as --encoding utf-8"),
        (["--encoding", "klingon"], "--encoding must be one that Python knows, such as latin-1, got 'klingon'"),
        (["--prepend-bos"], "--prepend-bos does not go with a conflict in a bigram language"),
        (["--out", "no/such/folder.html"], "--out must be a file in an existing folder, got 'no/such/folder.html'"),
        (["--out", "."], "--out must be a file in an existing folder, got '.'"),
        (["--model", "m", "--match", "3"], "--match does not go with --model"),
        (["--model", "missing"], "missing is not a folder"),
        (["--max-vocab", "1"], "max_vocab must be at least 2, got 1"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_input_ends_with_one_clear_line(capsys, monkeypatch, tmp_path, arguments, message):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    code, out, err = run(capsys, monkeypatch, "explain", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("hijack-lens: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary.txt", "empty.txt"]


def test_a_trigger_that_mostly_follows_itself_is_one_like_any_other(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "explain", "--trigger", " ", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["global"] != " "
    Path("runs.txt").write_text("a" * 50 + "b" * 50 + "c" * 50)
    code, out, err = run(capsys, monkeypatch, "explain", "--text", "runs.txt", "--json")
    assert (code, err) == (0, "")


def test_brackets_in_names_are_no_markup(capsys, monkeypatch, tmp_path, blank_report):
    (tmp_path / "d[red]x").mkdir()
    code, out, _ = run(capsys, monkeypatch, "explain", "--trigger", "]", "--global", "[", "--out", "d[red]x/r.html")
    assert code == 0
    assert "d[red]x/r.html" in out.replace("\n", "")


def test_words_are_limited_to_a_vocabulary_that_fits(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "explain", "--level", "word", "--json")
    assert code == 0
    assert "<unk>" in json.loads(out)["prompt"]


def test_a_table_of_numbers_offers_no_unknown_word_as_an_answer(capsys, monkeypatch):
    Path("numbers.txt").write_text(" ".join(f"{i * i % 97}.5 7" for i in range(900)))
    options = ["--text", "numbers.txt", "--level", "word", "--max-vocab", "20", "--json"]
    code, out, err = run(capsys, monkeypatch, "explain", *options)
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert "<unk>" in printed["prompt"]
    assert "<unk>" not in {printed[name] for name in ("trigger", "in_context", "global")}


def test_a_text_in_another_encoding(capsys, monkeypatch):
    Path("latin.txt").write_bytes("le théâtre où l'on rêve déjà ".encode("latin-1") * 40)
    options = ["--text", "latin.txt", "--encoding", "latin-1", "--trigger", "é", "--json"]
    code, out, err = run(capsys, monkeypatch, "explain", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["trigger"] == "é"


def test_a_report_is_written_beside_json_only_where_it_is_asked_for(capsys, monkeypatch, tmp_path, blank_report):
    code, out, _ = run(capsys, monkeypatch, "explain", "--json")
    assert code == 0
    assert json.loads(out)["report"] is None
    assert list(tmp_path.iterdir()) == []
    for said in ("Report: ", "Report, in place of the one there: "):
        code, out, _ = run(capsys, monkeypatch, "explain")
        assert said + str(tmp_path) in out


def test_tables_fit_the_terminal_and_no_number_is_cut(capsys, monkeypatch, blank_report):
    _, out, _ = run(capsys, monkeypatch, "explain", "--json")
    printed = json.loads(out)
    numbers = [f"{row[side]:+.3f}" for row in printed["paths"] for side in ("in_context", "global")]
    numbers += [f"{printed['margin']['total']:+.3f}", *(f"{margin:+.3f}" for margin in printed["ablated"].values())]
    for width in (40, 80, 200):
        _, out, _ = run(capsys, monkeypatch, "explain", width=width)
        tables = [line for line in out.splitlines() if "Report" not in line]
        assert max(map(len, tables)) <= width
        assert [number for number in numbers if number not in out] == []


def test_the_default_that_help_gives_is_the_one_used():
    assert f"[default: {hl.TrainConfig.max_steps}]" in inspect.getdoc(commands.train)


def test_training_and_explaining_close_the_loop(capsys, monkeypatch, blank_report):
    Path("my.txt").write_text("abcdefgh" * 40 + "hgfedcba" * 40)
    options = ["--text", "my.txt", "--out", "run", "--steps", "3", "--length", "16", "--d-model", "16"]
    code, out, err = run(capsys, monkeypatch, "train", *options)
    assert (code, err) == (0, "")
    assert "in context accuracy" in out
    half = "The context's memory did not form"
    assert half in out
    assert "Likeliest cause: " in out
    assert {"model.safetensors", "config.json", "probes.csv", "memories.png"} <= {f.name for f in Path("run").iterdir()}
    code, out, err = run(capsys, monkeypatch, "explain", "--model", "run", "--length", "16", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["theory"]["total"] == pytest.approx(found["margin"]["total"], abs=1e-4)  # by tables, of float32
    assert json.loads(out)["formed"][0].startswith(half)
    code, out, err = run(capsys, monkeypatch, "explain", "--model", "run", "--length", "16")
    assert half in out


def test_training_goes_on_until_the_circuit_has_formed(capsys, monkeypatch, tmp_path):
    options = ["--text", "my.txt", "--out", "run", "--length", "16", "--d-model", "32", "--finish-steps", "60"]
    Path("my.txt").write_text("abcdefgh" * 40 + "hgfedcba" * 40 + "aceg" * 9 + "bdfh" * 9)
    triggers = ["--triggers", "rare", "--n-triggers", "2"]
    code, out, err = run(capsys, monkeypatch, "train", *options, *triggers)
    assert (code, err) == (0, "")
    assert "The context's memory formed" in out
    formed = hl.TrainingRun.load("run")
    assert formed.forming_steps < 600
    assert formed.step == formed.forming_steps + 60
    assert formed.config.n_triggers == 2
    code, out, err = run(capsys, monkeypatch, "explain", "--model", "run", "--length", "16", "--json")
    assert json.loads(out)["formed"] == list(formed.formed.lines)


def test_a_terminal_says_what_takes_long_and_then_forgets_it(capsys, monkeypatch, blank_report):
    language = hl.BigramLanguage.dirichlet(12, seed=0)
    hl.associative_transformer(language, n_ctx=16).save_pretrained("mine")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = run(capsys, monkeypatch, "explain", "--model", "mine", "--length", "16", "--repeats", "1", width=15)
    said = err.split("\r")
    assert (code, said[::2]) == (0, ["Loading Transf", "Loading mine .", "Explaining ...", ""])
    assert said[1::2] == [" " * 14] * 3


def test_an_unknown_command_is_bad_input_and_none_shows_help(capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "explode")
    assert code == 2
    assert "explode" in err
    code, out, _ = run(capsys, monkeypatch)
    assert code == 0
    assert "explain" in out


def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "explian")
    assert (code, out) == (2, "")
    assert err == (
        "hijack-lens: 'explian' is no command. Did you mean 'explain'? There are explain, train, reproduce, doctor.\n"
    )


AT_ONCE = """
import sys
sys.argv = ["hijack-lens", *sys.argv[1:]]
from hijack_lens.cli import main
try:
    main()
except SystemExit:
    pass
print(sorted({"torch", "transformer_lens", "pandas", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "asked",
    [["--version"], ["--help"], [], ["explian"], ["--install-completion", "--help"]]
    + [[name, "--help"] for name in ("explain", "train", "reproduce", "doctor")],
)
def test_what_needs_no_model_imports_none_and_answers_at_once(asked, tmp_path):
    """Imports of half a second and more wait for a command that needs them."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *asked], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 1.0  # of CPU; 0.3 on an idle core


def test_the_version_names_what_it_stands_on(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--version")
    torch_is, lens_is = (importlib.metadata.version(name) for name in ("torch", "transformer-lens"))
    assert (code, out) == (0, f"hijack-lens {hl.__version__} (torch {torch_is}, transformer-lens {lens_is})\n")


def test_each_command_says_of_itself_what_help_says_of_it():
    for name, said in cli._COMMANDS.items():
        command = getattr(doctor if name == "doctor" else commands, name)
        assert inspect.getdoc(command).splitlines()[0] == said


def test_doctor_says_what_is_installed_and_that_it_works(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "doctor")
    assert (code, err) == (0, "")
    for part in (f"hijack-lens {hl.__version__}", f"torch {torch.__version__}", "devices: cpu", "self-test: passed in"):
        assert part in out


def test_doctor_notices_a_model_that_theory_does_not_predict(capsys, monkeypatch):
    logits = theory.logits
    monkeypatch.setattr(theory, "logits", lambda *given: logits(*given) + 1e-3)
    code, out, _ = run(capsys, monkeypatch, "doctor")
    assert code == 1
    assert "self-test: NOT passed: theory and model differ by 1.0e-03" in out


def test_completion_is_written_where_it_is_asked_for(capsys, monkeypatch, tmp_path):
    code, _, _ = run(capsys, monkeypatch, "--install-completion", "--shell", "bash", "--output", str(tmp_path / "done"))
    assert code == 0
    assert "explain" in (tmp_path / "done").read_text()


def test_workers_that_cannot_start_end_a_reproduction_with_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", os._exit)  # what every worker calls first
    code, out, err = run(capsys, monkeypatch, "reproduce", "closed-form", "facts", "--quick", "--workers", "2")
    assert (code, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("hijack-lens: executor broke before it had any point")]
    assert "Traceback" not in err


def test_reproduce_prints_each_prediction_beside_what_was_measured(capsys, monkeypatch, tmp_path):
    def fine(settings):
        findings = (Finding("here", f"first {'much ' * 20}", "one", True), Finding("here", "second", "two", False))
        return Result(findings, pd.DataFrame({"a": [1]}), Picture(1.0, 1.0))

    def broken(settings):
        raise KeyError("no luck")

    for name, experiment in (("facts", fine), ("data", broken)):
        claim = reproduction.Claim(name, "nowhere", experiment, "full", "quick")
        monkeypatch.setitem(reproduction.CLAIMS, name, claim)
    code, out, err = run(capsys, monkeypatch, "reproduce", "facts", "data", "--workers", "1", "--out", "claims")
    assert code == 1
    assert "Traceback" not in err
    (first,), (second,), (third,) = (
        [line for line in out.splitlines() if part in line] for part in ("first", "second", "no luck")
    )
    assert "facts" in first
    assert "✓ one" in first
    assert "in part" in first
    assert "✗ two" in second
    assert "data" in third
    assert "failed" in third
    assert str(tmp_path / "claims" / "report.html") in out.replace("\n", "")
    code, _, _ = run(capsys, monkeypatch, "reproduce", "facts", "--out", "claims")
    assert code == 0  # what failed was not asked for
    code, _, err = run(capsys, monkeypatch, "reproduce", "hijak")
    assert code == 2
    assert "claims must be one of" in err
