"""The claims in one run: resumable, reported whole, failures and all."""

import json
import sys

import pandas as pd
import pytest
from browser_for_tests import Opened
from refusals import refused

from hijack_lens import experiments
from hijack_lens.experiments import claims
from hijack_lens.experiments.result import Finding, Result, mean_and_error
from hijack_lens.visual.figures import Picture

NASTY = "</table><img src=x onerror=document.title='PWNED'>"


def outcome(*holds, note=""):
    picture = Picture(4.0, 3.0)
    ax = picture.figure.add_subplot()
    ax.plot([0, 1], [0, 1])
    ax.set_xlabel("repeats")
    findings = tuple(Finding("here", f"at least {i}", NASTY, held) for i, held in enumerate(holds))
    return Result(
        findings,
        pd.DataFrame({"token": [NASTY, "b"], "margin": [1.5e-15, float("nan")], "flip": [float("inf"), 2.0]}),
        picture,
        note,
    )


@pytest.fixture
def three_claims(monkeypatch):
    """A claim that holds, one that holds in part, and one whose experiment breaks; and how often each was run."""
    ran = []

    def experiment(name, result):
        def run(settings):
            ran.append((name, settings))
            if isinstance(result, Exception):
                raise result
            return result

        return claims.Claim(f"{name} is so", "nowhere <1>", run, full="full", quick="quick")

    results = {
        "good": outcome(True, True),
        "half": outcome(True, False, note="a note"),
        "bad": ValueError("no <model>"),
    }
    # Where they are looked up, since worker processes would know nothing of it: these run in this process.
    listed = {name: experiment(name, result) for name, result in results.items()}
    monkeypatch.setattr(claims, "CLAIMS", listed)
    monkeypatch.setattr(sys.modules["hijack_lens.experiments.reproduce"], "CLAIMS", listed)  # not the function
    return ran


def test_a_verdict_follows_from_the_findings():
    assert outcome(True, True).verdict == "reproduced"
    assert outcome(True, False).verdict == "in part"
    assert outcome(False, False).verdict == "not reproduced"
    with pytest.raises(ValueError, match="findings must hold at least one"):
        outcome()
    assert "fails: at least 1" in repr(outcome(True, False))
    assert outcome(True, False).to_pandas()["holds"].tolist() == [True, False]


def test_means_come_with_their_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
    mean, error = mean_and_error([4.0])
    assert mean == 4.0
    assert error != error


def test_every_claim_is_reported_with_what_was_measured(three_claims, tmp_path):
    done = experiments.reproduce(tmp_path / "out", quick=True, workers=1)
    assert done.verdicts == {"good": "reproduced", "half": "in part", "bad": "failed"}
    assert three_claims == [("good", "quick"), ("half", "quick"), ("bad", "quick")]
    written = json.loads(done.data.read_text())
    assert [claim["verdict"] for claim in written] == list(done.verdicts.values())
    assert written[1]["findings"][1] == {
        "setting": "here",
        "predicted": "at least 1",
        "measured": NASTY,
        "holds": False,
    }
    assert written[1]["table"] == [
        {"token": NASTY, "margin": 1.5e-15, "flip": "inf"},
        {"token": "b", "margin": None, "flip": 2.0},
    ]
    assert written[1]["note"] == "a note"
    assert "ValueError: no <model>" in written[2]["error"]
    table = done.to_pandas()
    assert table["verdict"].tolist() == ["reproduced"] * 2 + ["in part"] * 2
    assert table["holds"].tolist() == [True, True, True, False]
    assert "in part  half is so" in repr(done)


def test_a_run_goes_on_where_it_stopped_and_tries_failures_again(three_claims, tmp_path):
    experiments.reproduce(tmp_path, claims=["good", "bad"], workers=1)
    experiments.reproduce(tmp_path, claims=["half", "good", "bad"], workers=1)
    assert [name for name, _ in three_claims] == ["good", "bad", "half", "bad"]
    assert experiments.reproduce(tmp_path, claims="half", workers=1).verdicts == {"half": "in part"}
    experiments.reproduce(tmp_path, quick=True, claims=["good"])
    assert three_claims[-1] == ("good", "quick")  # other settings are another point


@pytest.mark.browser
def test_the_page_opens_offline_and_takes_no_text_for_markup(three_claims, browser, tmp_path):
    done = experiments.reproduce(tmp_path, workers=1)
    opened = Opened(browser, done.report, drawn="svg")
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [done.report.as_uri()]
    assert opened.page.title() != "PWNED"
    text = opened.page.inner_text("body")
    for part in ("good is so", "nowhere <1>", "at least 1", "✗ " + NASTY, "in part", "failed", "no <model>", "a note"):
        assert part in text
    assert opened.page.locator("svg").count() == 2
    assert opened.page.locator("details").first.inner_text() == "2 measurements"


def test_every_claim_says_what_it_is_and_is_measured_at_three_seeds_or_more():
    assert len(experiments.CLAIMS) >= 11
    for claim in experiments.CLAIMS.values():
        assert claim.statement.endswith(".")
        assert "arXiv" in claim.source or "beyond the papers" in claim.source
        for settings in (claim.full, claim.quick):
            assert len(getattr(settings, "seeds", (0, 1, 2))) >= 3
        assert claim.full != claim.quick


def test_two_processes_find_what_one_does(tmp_path):
    one = experiments.reproduce(tmp_path / "one", True, ["closed-form", "stronger-memories"], workers=1)
    two = experiments.reproduce(tmp_path / "two", True, ["closed-form", "stronger-memories"], workers=2)
    drop = ("seconds", "figure")
    left, right = ([{k: v for k, v in o.items() if k not in drop} for o in run.outcomes] for run in (one, two))
    assert left == right


test_refusals = refused(
    ValueError,
    {
        "claims must be one of .*, got 'hijak'": lambda: experiments.reproduce("x", claims=["hijak"]),
        "claims must be one or several different ones": lambda: experiments.reproduce("x", claims=[]),
        "workers must be at least 1, got 0": lambda: experiments.reproduce("x", workers=0),
        "out must be a folder, got the file": lambda: experiments.reproduce(__file__),
    },
)
