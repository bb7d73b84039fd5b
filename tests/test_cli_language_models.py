"""`hijack-lens explain` on language models from disk, as a person runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser_for_tests import Opened
from handmade_for_tests import save_handmade, save_with_bpe
from models_for_tests import close, handwritten
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens import cli
from hijack_lens.core.texts import spaced_instead, token_id
from hijack_lens.models.loading import load_model

PROMPT = "we say France is Rome . France is Rome . France is"
ASKED = ["--prompt", PROMPT, "--answer", "Rome", "--foil", "Paris"]


def run(capsys, monkeypatch, *arguments):
    """Exit code, standard output and standard error of `hijack-lens explain arguments`."""
    monkeypatch.setattr(sys, "argv", ["hijack-lens", "explain", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
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


@pytest.fixture(scope="module")
def handmade(tmp_path_factory):
    """A folder with a Hugging Face model whose memories are written by hand, and the model that it computes."""
    folder = tmp_path_factory.mktemp("handmade")
    return folder, save_handmade(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a random model of three layers, whose tokens bring their own spaces."""
    folder = tmp_path_factory.mktemp("bpe")
    save_with_bpe(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with one of our own models."""
    folder = tmp_path_factory.mktemp("own")
    handwritten(5, n_ctx=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def told(handmade, tmp_path_factory):
    """What the command prints in a process of its own, with its report."""
    out = tmp_path_factory.mktemp("told") / "report.html"
    command = [sys.executable, "-c", "from hijack_lens.cli import main; main()", "explain", "--model", handmade[0]]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [*map(str, command), *ASKED, "--find-circuit", "--out", str(out)],
        capture_output=True,
        text=True,
        env=offline,
        check=False,
    )
    return done, out


def margin_of(twin, ablated=None):
    """The margin by the associative-memory transformer that the model computes, with a component's output zeroed."""
    tokens = twin.language.encode("<end> " + PROMPT)[None]
    zeros = [] if ablated is None else [(ablated, lambda x, hook: torch.zeros_like(x))]
    logits = twin.run_with_hooks(tokens, fwd_hooks=zeros)[0, -1].detach()
    return float(logits[twin.language.index("Rome")] - logits[twin.language.index("Paris")])


def test_a_person_sees_the_tokens_the_circuit_the_verdict_and_the_tables(told, handmade):
    done, out = told
    assert (done.returncode, done.stderr) == (0, "")
    margin = margin_of(handmade[1])
    assert margin > 0
    for part in (
        PROMPT,
        "answer: 'Rome', token 5",
        "foil: 'Paris', token 4",
        "circuit: previous-token head: L0H0; induction head: L1H0; bigram memory: L1MLP",
        "of the in-context gain lost without it",
        f"The context hijacks the weights: after 'is' the model prefers 'Rome' to 'Paris', by {margin:.2f} logits.",
        "embed → induction head → unembed",
        f"{margin_of(handmade[1], 'blocks.1.attn.hook_z'):+.3f}",
        f"Report: {out}",
    ):
        assert part in done.stdout


@pytest.mark.browser
def test_the_report_shows_the_named_heads_offline(told, browser):
    opened = Opened(browser, told[1])
    opened.page.wait_for_timeout(500)
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [told[1].as_uri()]
    text = opened.page.inner_text("body")
    for part in (
        "previous-token head (L0H0)",
        "induction head (L1H0)",
        "The context hijacks the weights",
        "switched off",
    ):
        assert part in text
    assert len(opened.inked()) == 2
    assert min(opened.inked()) > 5_000


def test_json_holds_what_the_model_computes(capsys, monkeypatch, tmp_path, handmade):
    folder, twin = handmade
    asked = ["--model", folder, *ASKED, "--find-circuit"]
    code, out, err = run(capsys, monkeypatch, *asked, "--json", "--out", "r.html")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    log_pi_b = twin.language.log_pi_b[twin.language.index("is")]
    weights = float(log_pi_b[twin.language.index("Rome")] - log_pi_b[twin.language.index("Paris")])
    assert printed["answer"] == {"text": "Rome", "id": twin.language.index("Rome")}
    assert printed["foil"] == {"text": "Paris", "id": twin.language.index("Paris")}
    assert printed["circuit"] == {"previous_token": ["L0H0"], "induction": ["L1H0"], "bigram": ["L1MLP"]}
    assert len(printed["evidence"]) == 3
    assert printed["margin"]["weights"] == pytest.approx(weights, abs=1e-3)
    assert printed["margin"]["total"] == pytest.approx(margin_of(twin), abs=1e-3)
    assert printed["margin"]["rest"] == pytest.approx(0.0, abs=1e-3)
    assert printed["ablated"] == {
        name: pytest.approx(margin_of(twin, at), abs=1e-3)
        for name, at in {
            "previous-token head": "blocks.0.attn.hook_z",
            "induction head": "blocks.1.attn.hook_z",
            "bigram memory": "blocks.1.hook_mlp_out",
        }.items()
    }
    assert sum(path["answer"] - path["foil"] for path in printed["paths"]) == pytest.approx(
        printed["margin"]["total"], abs=1e-3
    )
    assert printed["winner"] == "context"
    assert printed["prompt"] == PROMPT
    assert printed["report"] == str(tmp_path / "r.html")


def test_a_deep_model_without_a_circuit_is_said_to_have_none(capsys, monkeypatch, tmp_path, bpe):
    asked = ["--prompt", "France's capital is", "--answer", "Rome", "--foil", "Paris"]
    code, out, err = run(capsys, monkeypatch, "--model", bpe, *asked, "--find-circuit")
    assert (code, err) == (0, "")
    # The tokenizer cuts both words where no space is before them.
    assert "answer: ' Rome', token" in out
    assert "foil: ' Paris', token" in out
    assert "no induction head: " in out
    assert "no previous-token head: " in out
    model = load_model(bpe)
    logits = model("France's capital is")[0, -1].detach()
    margin = float(logits[model.to_single_token(" Rome")] - logits[model.to_single_token(" Paris")])
    preferred = ("␣Rome", "␣Paris") if margin > 0 else ("␣Paris", "␣Rome")
    assert f"the model prefers {preferred[0]!r} to {preferred[1]!r}, by {abs(margin):.2f} logits." in out.replace(
        "\n", " "
    )
    parts = hl.explain(model, "France's capital is", " Rome", " Paris", circuit=hl.Circuit()).margin
    others_decide = float(parts.rest * parts.total) > 0 and abs(float(parts.rest)) >= abs(float(parts.weights))
    assert ("By source tokens" in out) == others_decide
    page = Path("hijack-lens-report.html").read_text(encoding="utf-8")
    assert "Where the heads that wrote most look; the circuit names none" in page


def test_without_a_circuit_the_answer_is_traced_to_its_source_tokens(capsys, monkeypatch, tmp_path, handmade):
    folder, twin = handmade
    asked = ["--model", folder, *ASKED, "--context", "France is Rome"]
    code, out, err = run(capsys, monkeypatch, *asked, "--json", "--out", "r.html")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    bridge = load_model(folder)
    said = hl.explain(bridge, PROMPT, "Rome", "Paris", context="France is Rome")
    assert printed["verdict"] == said.verdict
    assert printed["tokens"] == list(said.texts)
    assert printed["margin"]["total"] == pytest.approx(margin_of(twin), abs=1e-3)
    assert printed["margin"]["rest"] == 0
    assert sum(printed["shares"].values()) == pytest.approx(margin_of(twin), abs=1e-3)
    assert [check["what"] for check in printed["checks"]] == [check.what for check in said.checks]
    code, out, err = run(capsys, monkeypatch, *asked, "--out", "r.html")
    assert (code, err) == (0, "")
    for part in (
        "answer: 'Rome', token 5",
        "The context wins: 'Rome' over 'Paris'",
        "attribution beside interventions",
    ):
        assert part in out
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Where the heads that brought most look" in page
    assert "by all routes" in page


def test_an_answer_is_taken_as_written_where_that_is_a_token_and_else_with_a_space(bpe):
    model = load_model(bpe)
    token = model.to_single_token
    for answer, chosen in {"i": "i", "is": "is", " is": " is", "Rome": " Rome", " Rome": " Rome"}.items():
        assert token_id(model, "--answer", answer) == token(chosen)
    assert spaced_instead(model, "Rome", token(" Rome")) is None
    assert spaced_instead(model, "a", token("a")) == (
        " a" if len(model.to_tokens(" a", prepend_bos=False)[0]) == 1 else None
    )


def test_prompts_of_your_own_go_to_our_models_too(capsys, monkeypatch, own):
    model = handwritten(5, n_ctx=40)
    language = model.language
    prompt = language.decode([1, 0, 3, 2, 0, 3, 1, 0])
    answer, foil = language.tokens[3], language.tokens[language.global_candidate(0)]
    foil = foil if foil != answer else language.tokens[4]
    code, out, err = run(
        capsys, monkeypatch, "--model", own, "--prompt", prompt, "--answer", answer, "--foil", foil, "--json"
    )
    assert (code, err) == (0, "")
    printed = json.loads(out)
    predicted = hl.theory.margin(
        language.encode(prompt), language, hl.theory.Setting(model.strengths), in_context=answer, global_candidate=foil
    )
    assert printed["margin"]["context"] == pytest.approx(float(predicted.context), abs=1e-9)
    assert printed["margin"]["total"] == pytest.approx(float(predicted.total), abs=1e-9)
    assert printed["evidence"] is None


def test_explaining_in_python_gives_the_same_on_tokens_and_text(handmade):
    bridge = TransformerBridge.boot_transformers(str(handmade[0]), device="cpu", dtype=torch.float32).eval()
    circuit = handmade[1].circuit
    said = hl.explain(bridge, PROMPT, "Rome", "Paris", circuit=circuit)
    ids = hl.explain(bridge, bridge.to_tokens(PROMPT)[0], 5, 4, circuit=circuit)
    close(said.attribution.values, ids.attribution.values, atol=0)
    assert said.verdict == ids.verdict
    assert said.names == ("Rome", "Paris")
    turned = hl.explain(bridge, PROMPT, "Paris", "Rome", circuit=circuit)
    assert float(turned.margin.total) == pytest.approx(-float(said.margin.total), abs=1e-4)
    assert turned.winner == "weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "--model, --prompt, --answer and --foil go together; --model is missing"),
        (["--model", "HF", "--prompt", PROMPT, "--foil", "Rome"], "--answer is missing"),
        (["--model", "HF", *ASKED, "--repeats", "3"], "--repeats does not go with --prompt"),
        (["--model", "HF", *ASKED, "--in-context", "x"], "--in-context does not go with --prompt"),
        (["--model", "HF", *ASKED, "--previous-token", "3"], "--previous-token does not go with --prompt"),
        (["--context", "x"], "--context does not go with a conflict in a bigram language"),
        (["--model", "HF", *ASKED, "--context", "of Spain"], "context must be a part of the prompt, got 'of Spain'"),
        (["--model", "HF"], "is a language model: ask it with --prompt, --answer and --foil"),
        (["--model", "/no/such", *ASKED], "--model '/no/such' is not a folder"),
        (["--model", "EMPTY", *ASKED], "holds neither model.safetensors nor a checkpoint"),
        (["--model", "BARE", *ASKED], "cannot be loaded as a language model"),
        (
            ["--model", "HF", "--prompt", "we fly", "--answer", "Rome", "--foil", "Paris"],
            "--prompt must be of words that the model's tokenizer knows, which lacks 'fly'",
        ),
        (
            ["--model", "HF", "--prompt", PROMPT, "--answer", "Bonn", "--foil", "Paris"],
            "--answer holds 'Bonn', which is",
        ),
        (
            ["--model", "HF", "--prompt", PROMPT, "--answer", "Rome", "--foil", "we say", "--find-circuit"],
            "--foil holds 'we say', which is not a single token: the model's tokenizer reads it as ['we', 'say']",
        ),
        (["--model", "HF", "--prompt", PROMPT, "--answer", "Rome", "--foil", "Rome"], "must be different tokens"),
        (["--model", "HF", "--prompt", PROMPT, "--answer", "", "--foil", "Rome"], "--answer holds ''"),
        (["--model", "HF", "--prompt", "", "--answer", "Rome", "--foil", "Paris"], "--prompt must be a text, got ''"),
        (["--model", "HF", "--prompt", "is " * 99, "--answer", "Rome", "--foil", "Paris"], "takes at most n_ctx=64"),
    ],
)
def test_bad_input_ends_with_one_clear_line(capsys, monkeypatch, tmp_path, handmade, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BARE").mkdir()
    (tmp_path / "BARE" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    arguments = [str(handmade[0]) if argument == "HF" else argument for argument in arguments]
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("hijack-lens: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["BARE", "EMPTY"]


def test_a_name_that_the_hub_does_not_give_is_one_line_too(capsys, monkeypatch):
    def unreachable(name, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your internet connection.")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", unreachable)
    code, out, err = run(capsys, monkeypatch, "--model", "no/such-model", *ASKED)
    assert (code, out) == (2, "")
    assert err == (
        "hijack-lens: --model 'no/such-model' cannot be loaded as a language model: We couldn't connect to "
        "'https://huggingface.co'\n"
    )


def test_a_model_without_a_tokenizer_is_said_to_have_none(bpe, tmp_path):
    for file in bpe.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded as a language model: it has no tokenizer"):
        load_model(tmp_path)


def test_progress_bars_are_as_they_were(handmade):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(handmade[0])
    assert logging.is_progress_bar_enabled() == before
