"""The plan of the house: every module can be imported by name, every public name is found before it is imported."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import hijack_lens as hl


def modules():
    return [found.name for found in pkgutil.walk_packages(hl.__path__, "hijack_lens.")]


def test_every_room_is_packaged():
    root = Path(__file__).parents[1]
    listed = re.search(r"^packages = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    rooms = {f"hijack_lens.{found.parent.name}" for found in (root / "hijack_lens").glob("*/__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == rooms | {"hijack_lens", "hijack_lens.hooks"}


def test_no_public_name_hides_a_module():
    for name in modules():
        module = importlib.import_module(name)
        package, _, leaf = name.rpartition(".")
        assert getattr(importlib.import_module(package), leaf) is module, name


def test_public_names_bear_no_underscore_at_the_end():
    for module in (hl, *(importlib.import_module(name) for name in modules())):
        assert [name for name in getattr(module, "__all__", ()) if name.endswith("_") and name != "__version__"] == []


def test_every_public_name_is_listed_and_there():
    assert set(hl.__all__) <= set(dir(hl))
    for name in hl.__all__:
        assert getattr(hl, name) is not None
    namespace = {}
    exec("from hijack_lens import *", namespace)
    assert set(hl.__all__) <= set(namespace)


FRESH = """
import sys, transformer_lens

def loaded():
    lazy = ("matplotlib", "circuitsvis", "cyclopts", "anywidget", "hijack_lens.reproduction", "hijack_lens.grid")
    lazy += ("hijack_lens.show", "hijack_lens.explorer")
    return {name for name in lazy if name in sys.modules}

before = loaded()
import hijack_lens as hl
print(sorted(loaded() - before))
model = hl.associative_transformer(hl.BigramLanguage.dirichlet(5, seed=0))
print(repr(hl.attribute(model, [0, 1, 2])).splitlines()[0])
print(sorted(loaded() & {"matplotlib", "circuitsvis"} - before))
hl.write_report
print("hijack_lens.show" in loaded())
sys.modules["anywidget"] = None  # as if it were not installed
explorer = hl.explore(repeats=3)
print(explorer._repr_mimebundle_(), "srcdoc" in explorer._repr_html_(), explorer.save("explorer.html"))
try:
    explorer.widget
except ImportError as error:
    print(error)
"""


def test_what_is_not_used_is_not_imported_and_results_print_themselves_all_the_same(tmp_path):
    """What only pictures need is loaded when one is drawn, so that importing costs what TransformerLens costs.

    Without anywidget an explorer's page is there, and its widget names the extra.
    """
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_import, printed, after_printing, after_asking, shown, said = done.stdout.splitlines()
    assert (at_import, after_printing, after_asking) == ("[]", "[]", "True")
    assert printed.startswith("LogitAttribution(path=")
    assert shown == "{} True explorer.html"
    assert "pip install 'hijack-lens[widgets]'" in said
