"""The claims in one run: resumable, reported whole, failures and all."""

import importlib
import json
import math
import re

import pandas as pd
import pytest
import torch
from browser_for_tests import Opened
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from hijack_lens import reproduction
from hijack_lens.reproduction import claims
from hijack_lens.reproduction.findings import Condition, Finding, Result, over_seeds
from hijack_lens.show.style import Picture

PLANTED = """
import os

import torch

from hijack_lens import reproduction


def deadly(settings):
    os._exit(1)


def plant(n_threads):
    torch.set_num_threads(n_threads)
    reproduction.CLAIMS["facts"] = reproduction.Claim("", "nowhere", deadly, "full", "quick")
"""

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
    monkeypatch.setattr(claims, "CLAIMS", {name: experiment(name, result) for name, result in results.items()})
    return ran


def test_a_verdict_follows_from_the_findings():
    assert outcome(True, True).verdict == "reproduced"
    assert outcome(True, False).verdict == "in part"
    assert outcome(False, False).verdict == "not reproduced"
    assert outcome(True, None).verdict == outcome(False, None).verdict == outcome(None).verdict == "undecided"
    assert outcome(True, False, None).verdict == "in part"
    assert "undecided: at least 0" in repr(outcome(None))
    with pytest.raises(ValueError, match="findings must hold at least one"):
        outcome()
    assert "fails: at least 1" in repr(outcome(True, False))
    assert outcome(True, False).to_pandas()["holds"].tolist() == [True, False]


def test_means_come_with_their_interval():
    found = over_seeds([1.0, 2.0, 3.0])
    reach = 4.3027 / 3**0.5  # Student's quantile at two degrees of freedom, as printed
    assert (found.mean, found.reach) == pytest.approx((2.0, reach), abs=1e-4)
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach), abs=1e-4)
    assert f"{found:.1f}" == "2.0 ± 2.5"
    assert f"{found:+.0%}" == "+200% ± 248%"


@pytest.mark.parametrize("values", [[4.0], [1.0, float("nan"), 3.0]])
def test_no_threshold_is_met_or_missed_without_an_interval(values):
    found = over_seeds(values)
    for threshold in (-1e9, 1e9):
        for how in ("at_least", "above", "at_most", "below"):
            assert getattr(found, how)(threshold) == Condition(None, None)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-5, 5))
def test_an_interval_meets_a_threshold_misses_it_or_decides_nothing(values, threshold):
    found = over_seeds(values)
    straddles = found.low < threshold < found.high
    for how, met in (("at_least", found.low >= threshold), ("at_most", found.high <= threshold)):
        assert getattr(found, how)(threshold).holds == (None if straddles else met)
        strict = {"at_least": "above", "at_most": "below"}[how]
        if not {found.low, found.high} & {threshold}:
            assert getattr(found, strict)(threshold) == getattr(found, how)(threshold)
    needed = found.at_least(threshold).seeds
    if needed is not None:  # with so many seeds of the same spread, the interval would no longer reach
        assert found.reach * (len(values) / needed) ** 0.5 <= abs(found.mean - threshold) * (1 + 1e-9)
        assert needed > len(values) or math.isclose(found.reach, abs(found.mean - threshold))


def test_a_finding_holds_fails_or_says_how_many_seeds_would_decide():
    clear, open_ = over_seeds([1.0, 1.1, 0.9]), over_seeds([1.0, 3.0, -1.0])
    assert Finding.judged("s", "p", "m", clear.above(0.0), True).holds is True
    assert Finding.judged("s", "p", "m", open_.above(0.0), clear.below(0.0)).holds is False
    undecided = Finding.judged("s", "p", "m", open_.above(0.0), clear.above(0.0))
    assert undecided.holds is None
    # The mean is 1, the spread 2: an interval of 4.3027 * 2 / sqrt(3) = 4.968 must shrink to 1.
    assert undecided.measured == "m; undecided: about 75 seeds would tell"
    assert Finding.judged("s", "p", "m", over_seeds([1.0]).above(0.0)).measured == "m; undecided"


def test_every_claim_is_reported_with_what_was_measured(three_claims, tmp_path):
    done = reproduction.reproduce(tmp_path / "out", quick=True, workers=1)
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
    assert written[2]["error"] == "ValueError: no <model>"
    assert "raise result" in written[2]["traceback"]
    assert {claim["settings"] for claim in written} == {"'quick'"}
    for claim, outcome in zip(written, done.outcomes, strict=True):
        assert {**claim, "figure": outcome["figure"]} == outcome
    assert "│ in part    │ half is so │" in repr(done)


def test_a_table_of_findings_leaves_no_claim_out(three_claims, tmp_path):
    table = reproduction.reproduce(tmp_path, workers=1).to_pandas()
    assert list(table) == ["claim", "source", "setting", "predicted", "measured", "holds", "verdict"]
    assert table["claim"].tolist() == ["good", "good", "half", "half", "bad"]
    assert table["source"].unique().tolist() == ["nowhere <1>"]
    assert table["predicted"].tolist() == ["at least 0", "at least 1"] * 2 + [""]
    assert table["measured"].tolist() == [NASTY] * 4 + ["ValueError: no <model>"]
    assert table["holds"].tolist() == [True, True, True, False, None]
    assert table["verdict"].tolist() == ["reproduced"] * 2 + ["in part"] * 2 + ["failed"]


def test_a_report_is_on_all_claims_that_its_folder_knows_at_these_settings(three_claims, tmp_path):
    def reported(done):
        names = [claim["claim"] for claim in json.loads(done.data.read_text())]
        page = done.report.read_text()
        assert [page.index(f"<h2 id='{name}'>") for name in names] == sorted(
            page.index(f"<h2 id='{n}'>") for n in names
        )
        assert page.count("<h2") == len(names)
        return names

    assert reported(reproduction.reproduce(tmp_path, claims=["half", "bad"], workers=1)) == ["half", "bad"]
    done = reproduction.reproduce(tmp_path, claims="good")
    assert done.verdicts == {"good": "reproduced"}
    assert reported(done) == ["good", "half", "bad"]
    assert [name for name, _ in three_claims] == ["half", "bad", "good"]
    assert reported(reproduction.reproduce(tmp_path, quick=True, claims="half")) == ["half"]
    assert reported(reproduction.reproduce(tmp_path, claims="half")) == ["good", "half", "bad"]


def test_a_folder_that_knows_the_experiments_by_their_former_place_is_resumed(three_claims, tmp_path):
    done = reproduction.reproduce(tmp_path, workers=1)
    kept = tmp_path / "claims.jsonl"
    name = '"function": "hijack_lens.{}.claims.run_claim"'
    header, *lines = kept.read_text().splitlines(keepends=True)
    assert name.format("reproduction") in header
    kept.write_text("".join([header.replace(name.format("reproduction"), name.format("experiments")), *lines]))
    three_claims.clear()
    assert reproduction.reproduce(tmp_path, workers=1).verdicts == done.verdicts
    assert [claim for claim, _ in three_claims] == ["bad"]  # as always, what failed is tried again
    kept.write_text("".join([header.replace("run_claim", "other"), *lines]))
    with pytest.raises(ValueError, match="holds a grid of function="):
        reproduction.reproduce(tmp_path, workers=1)


@pytest.mark.browser
def test_the_page_opens_offline_and_takes_no_text_for_markup(three_claims, browser, tmp_path):
    done = reproduction.reproduce(tmp_path, workers=1)
    opened = Opened(browser, done.report, drawn="svg")
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [done.report.as_uri()]
    assert opened.page.title() != "PWNED"
    text = opened.page.inner_text("body")
    for part in ("good is so", "nowhere <1>", "at least 1", "✗ " + NASTY, "in part", "failed", "no <model>", "a note"):
        assert part in text
    assert "3 claims: 1 reproduced, 1 in part, 1 failed." in text
    assert opened.page.locator("thead th").all_inner_texts()[:6] == [
        "claim",
        "source",
        "setting",
        "predicted",
        "measured",
        "verdict",
    ]
    assert opened.page.locator("svg").count() == 2
    assert "2 measurements" in opened.page.locator("summary").all_inner_texts()


@pytest.mark.browser
def test_the_page_does_not_overflow_a_narrow_window_and_its_verdicts_can_be_read(three_claims, browser, tmp_path):
    page = Opened(browser, reproduction.reproduce(tmp_path, workers=1).report, drawn="svg").page
    page.set_viewport_size({"width": 480, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    for verdict in page.locator(".summary .verdict-of").all():
        colour = verdict.evaluate("element => getComputedStyle(element).color")
        assert contrast_with_white(colour) >= 4.5  # WCAG's AA


def contrast_with_white(colour):
    """Of "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_every_claim_says_what_it_is_and_is_measured_at_several_seeds():
    assert len(reproduction.CLAIMS) >= 11
    for name, claim in reproduction.CLAIMS.items():
        assert claim.statement.endswith(".")
        assert "arXiv" in claim.source or "beyond the papers" in claim.source
        of_task = name in reproduction.claims_of("tasks")  # whose bars hold at every seed, or do not
        for settings, least in ((claim.full, 5 if of_task else 3), (claim.quick, 2 if of_task else 3)):
            assert len(getattr(settings, "seeds", range(5))) >= least
        assert claim.full != claim.quick


def test_processes_find_what_one_does_and_one_that_dies_fails_its_claim_alone(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)  # the workers' too
    planted = importlib.import_module("planted")
    monkeypatch.setitem(reproduction.CLAIMS, "facts", None)
    planted.plant(1)
    monkeypatch.setattr(torch, "set_num_threads", planted.plant)  # what every worker calls first
    died, found = reproduction.reproduce(tmp_path / "out", True, ["facts", "closed-form"], workers=2).outcomes
    assert (died["claim"], died["verdict"], died["seconds"]) == ("facts", "failed", None)
    assert died["error"].startswith("BrokenProcessPool: ")
    assert died["error"] in (tmp_path / "out" / "report.html").read_text()
    (here,) = reproduction.reproduce(tmp_path / "here", True, "closed-form").outcomes
    drop = ("seconds", "figure")
    left, right = ({key: value for key, value in one.items() if key not in drop} for one in (found, here))
    assert left == right


def at_least(*given):
    return reproduction.Finding.at_least("one", "another", *given)


test_refusals = refused(
    ValueError,
    {
        "claims must be one of .*, got 'hijak'": lambda: reproduction.reproduce("x", claims=["hijak"]),
        "claims must be one or several different ones": lambda: reproduction.reproduce("x", claims=[]),
        "workers must be at least 1, got 0": lambda: reproduction.reproduce("x", workers=0),
        "out must be a folder, got the file": lambda: reproduction.reproduce(__file__),
        "threshold must be a number that a float can hold, got ": lambda: at_least([0.0], 10**400),
        "by_seed must be a number that a float can hold, got ": lambda: at_least([10**400], 0.0),
        "spec must be a format for numbers, such as '.1%', got 'q'": lambda: at_least([0.0], 0.0, "q"),
    },
)
