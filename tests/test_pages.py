"""The README and the documentation run as written: each page's blocks of Python, in order."""

from pathlib import Path

import matplotlib
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def run(page):
    document = Sybil(parsers=[PythonCodeBlockParser(doctest_optionflags=0)]).parse(page)
    for example in document.examples():
        example.evaluate()
    return document.namespace


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_as_written(page, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    assert run(page)


def test_a_block_that_fails_is_reported_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        run(page)
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno) == (page, 7)
