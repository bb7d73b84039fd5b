"""The plan of the house: every module can be imported by name, every public name is found before it is imported."""

import importlib
import pkgutil
import subprocess
import sys

import hijack_lens as hl


def modules():
    return [found.name for found in pkgutil.walk_packages(hl.__path__, "hijack_lens.")]


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


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_what_is_not_used_is_not_imported():
    lazy = ("matplotlib", "circuitsvis", "hijack_lens.reproduction", "hijack_lens.grid", "hijack_lens.show")
    listed = (
        f"import sys, transformer_lens; before = {{m for m in {lazy} if m in sys.modules}}; import hijack_lens as hl"
    )
    assert fresh(f"{listed}; print([m for m in {lazy} if m in sys.modules and m not in before])") == "[]\n"
    # The test can fail: a name that needs one of them brings it in.
    assert "hijack_lens.show" in fresh(f"{listed}; hl.write_report; print([m for m in {lazy} if m in sys.modules])")


def test_results_print_themselves_in_a_process_that_never_asked_for_pictures():
    code = (
        "import hijack_lens as hl; m = hl.associative_transformer(hl.BigramLanguage.dirichlet(5, seed=0)); "
        "print(hl.attribute(m, [0, 1, 2]))"
    )
    assert fresh(code).startswith("LogitAttribution(path=")
