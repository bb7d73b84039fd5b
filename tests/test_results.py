"""Every result shows itself: found by introspection, each kind of one shows all of what it should."""

import dataclasses
import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch
from browser_for_tests import faults_on_a_phone

import hijack_lens as hl
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, Shown

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
from results import example_of, results  # noqa: E402

KINDS = results()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A result of a kind, made once."""
    matplotlib.use("Agg")
    known = {}

    def make(name):
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("example"))
                known[name] = example_of(KINDS[name])
        return known[name]

    return make


@pytest.fixture(scope="module")
def html_of(made):
    """A result of a kind as a notebook shows it, drawn once."""
    return cache(lambda name: made(name)._repr_html_())


def test_the_kinds_of_result_are_found():
    assert {"hijack_lens.Sweep", "hijack_lens.hooks.Sweep"} & set(KINDS)
    for name in ("Explanation", "Circuit", "LogOdds", "TrainingRun", "Metric", "SampledSequences", "HijackPrompt"):
        assert f"hijack_lens.{name}" in KINDS
    for value in ("Component", "Strengths", "TrainConfig", "Fact", "Path", "theory.Setting", "BigramTransformer"):
        assert f"hijack_lens.{value}" not in KINDS
    assert not any(name.startswith("hijack_lens.show.") for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_result_has_all_that_shows_it(name):
    assert issubclass(KINDS[name], Shown), f"{name} must be Shown, or Drawn if it measures something: see CONTRIBUTING"
    assert KINDS[name].to_pandas is not Shown.to_pandas, f"{name} must have to_pandas()"


@pytest.mark.parametrize("name", KINDS)
def test_a_result_in_a_terminal_is_short_and_computes_nothing(name, made, unchecked, monkeypatch):
    result = made(name)
    repr(result)  # imports what draws

    def refused(*args, **kwargs):
        raise AssertionError("a model was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", refused)
    monkeypatch.setattr(hl.show.Picture, "__init__", refused)
    lines = repr(result).splitlines()
    assert 1 <= len(lines) <= 15
    assert max(map(len, lines)) <= 1000
    assert name.rsplit(".")[-1][:4].lower() in lines[0].lower() or len(lines[0]) > 20


class Page(HTMLParser):
    """A page's tags in order, those left open, and its text."""

    VOID = frozenset({"br", "img", "meta", "input", "path", "use", "rect", "image"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", KINDS)
def test_a_result_in_a_notebook_is_a_line_a_small_picture_and_folded_tables(name, made, html_of, unchecked):
    result, html = made(name), html_of(name)
    assert len(html) < 300_000
    page = Page(html)
    assert page.open == []
    # Where styles are stripped, the text stands in for what is hidden.
    assert page.text.replace("\n", " ").find(repr(result).splitlines()[0][:60]) >= 0
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "div"][:2] == ["hijack-lens", "shown"]
    tags = [tag for tag, _ in page.tags]
    assert "details" in tags
    assert "table" in tags[tags.index("details") :]
    # Panels that stand side by side are one picture, which bears the name.
    pictures = [attrs for tag, attrs in page.tags if tag == "img" or attrs.get("role") == "img"]
    assert bool(pictures) == isinstance(result, Drawn)
    assert all(attrs.get("aria-label") or attrs.get("alt") for attrs in pictures)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)


@pytest.mark.browser
@pytest.mark.parametrize("name", KINDS)
def test_a_result_fits_a_phone_with_its_tables_open(name, html_of, unchecked, phone):
    assert faults_on_a_phone(phone, html_of(name)) == []


@pytest.mark.browser
def test_no_number_is_broken_into_two_lines(made, unchecked, phone):
    result = made("hijack_lens.reproduction.Result")
    said = " ".join(f"{'m' * (n % 11)} -1.6e-15" for n in range(100))
    finding = dataclasses.replace(result.findings[0], predicted=said, measured=said, setting=said)
    assert faults_on_a_phone(phone, dataclasses.replace(result, findings=(finding,))._repr_html_()) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_result_has_a_picture_unless_it_measures_nothing(name, made, unchecked):
    result = made(name)
    table = result.to_pandas()
    assert isinstance(table, pd.DataFrame)
    assert len(table) > 0
    measured = [column for column, kind in table.dtypes.items() if kind.kind == "f"]
    if isinstance(result, Drawn):
        picture = result.picture()
        assert isinstance(picture, hl.show.Picture)
        assert picture.figure.axes
    else:
        assert measured == [], f"{name} has numbers to draw: make it Drawn, and register its picture"


@pytest.mark.parametrize("name", KINDS)
def test_a_result_is_saved_as_a_page_a_table_a_picture_and_data(name, made, unchecked, tmp_path):
    result, kind = made(name), KINDS[name]
    result.save(tmp_path / "result.html")
    page = (tmp_path / "result.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    result.save(tmp_path / "result.csv")
    assert list(pd.read_csv(tmp_path / "result.csv").columns) == list(result.to_pandas().columns)
    if isinstance(result, Drawn):
        result.save(tmp_path / "result.PNG")
        assert (tmp_path / "result.PNG").read_bytes()[:4] == b"\x89PNG"
    else:
        with pytest.raises(ValueError, match=r"path must end in one of \.html, \.csv, got "):
            result.save(tmp_path / "result.png")
    if issubclass(kind, Saved):
        result.save(tmp_path / "result")
        assert repr(kind.load(tmp_path / "result")) == repr(result)
    elif not hasattr(kind, "load"):
        with pytest.raises(ValueError, match=r"path must end in one of \.html, \.csv,"):
            result.save(tmp_path / "result")
