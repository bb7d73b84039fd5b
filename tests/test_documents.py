"""The documents lead somewhere: each link to a file, in the repository; none to a file, on a package index."""

import importlib.metadata
import inspect
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*.md")) + sorted(
    path.relative_to(ROOT) for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md")
)


def files_linked(text):
    """What links and images point to, where that is a file beside the document."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    return [target.partition("#")[0] for target in targets if not re.match(r"\w+:|#", target)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_to_a_file_leads_to_one(document):
    linked = files_linked((ROOT / document).read_text(encoding="utf-8"))
    assert [file for file in linked if not (ROOT / document.parent / file).exists()] == []


def test_a_package_index_shows_the_readme_without_links_that_lead_nowhere(monkeypatch):
    built = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=built.update))
    runpy.run_path(str(ROOT / "setup.py"))
    readme, shown = (ROOT / "README.md").read_text(encoding="utf-8"), built["long_description"]
    assert {"docs/which_memory.png", "docs/guarantees.md"} <= set(files_linked(readme))
    assert files_linked(shown) == []
    # Nothing else is lost: neither words, what pictures show and files' names among them, nor links to other sites.
    assert re.findall(r"\w+", shown) == re.findall(r"\w+", re.sub(r"\]\(docs/\w+\.png\)", "", readme))


def test_the_package_was_built_with_that_readme():
    built = importlib.metadata.distribution("hijack-lens")
    fields, readme = (built.read_text("METADATA") or built.read_text("PKG-INFO")).split("\n\n", 1)
    assert "Description-Content-Type: text/markdown" in fields
    assert "https://arxiv.org/abs/2412.11459" in readme
    assert files_linked(readme) == []


def new_names():
    """The right column of the CHANGELOG's tables of renames: each dotted name, with its arguments if it has some."""
    section = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Renamed, and moved")[2]
    cells = re.findall(r"^\| .+? \| (.+) \|$", section.partition("\n### ")[0], flags=re.MULTILINE)
    named = r"(?<!column )(?<!option )(?<!its )`([A-Za-z_][\w.]*)(\([\w=, ]*\))?`(?!s)"
    return sorted({found for cell in cells for found in re.findall(named, cell)})


@pytest.mark.parametrize(("name", "arguments"), new_names(), ids="".join)
def test_what_the_changelog_renames_to_is_there(name, arguments):
    above, _, last = f"hijack_lens.{name}".rpartition(".")
    fields = getattr(pkgutil.resolve_name(above), "__dataclass_fields__", {})
    thing = fields[last] if last in fields else pkgutil.resolve_name(f"{above}.{last}")
    known = inspect.signature(thing).parameters if arguments else {}
    assert set(re.findall(r"\w+", arguments)) <= set(known)


def test_the_tables_of_renames_are_read():
    names = dict(new_names())
    assert len(names) > 100
    assert (names["BigramTransformer"], names["hooks.ablate"]) == ("", "(components=)")
