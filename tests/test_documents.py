"""The documents lead somewhere: each link to a file, in the repository; none to a file, on a package index."""

import importlib.metadata
import re
from pathlib import Path

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


def test_the_readme_on_a_package_index_has_no_link_that_leads_nowhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"docs/which_memory.png", "docs/guarantees.md"} <= set(files_linked(readme))
    metadata = importlib.metadata.metadata("hijack-lens")
    shown = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert files_linked(shown) == []
    # Nothing else was lost: neither words, nor what pictures show, nor links to other sites.
    assert "https://arxiv.org/abs/2412.11459" in shown
    assert "Three repeats of" in shown
    assert [heading for heading in readme.splitlines() if heading.startswith("#") and heading not in shown] == []
