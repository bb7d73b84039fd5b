"""The examples in docstrings run as written, and every public function, class and property has one."""

import doctest
import inspect
import re
import runpy
import sys
from functools import cached_property
from pathlib import Path

import matplotlib
import pytest
from sybil.evaluators.doctest import NUMBER, OutputChecker

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
from public_names import public_names  # noqa: E402

FLAGS = NUMBER | doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = {
    one.name: one.thing
    for one in public_names()
    if inspect.isclass(one.thing) or inspect.isfunction(inspect.unwrap(one.thing))
}


def properties(kind):
    """The public properties that this library gives to a class."""
    return {
        name
        for base in kind.__mro__
        if base.__module__.startswith("hijack_lens.") and not base.__module__.startswith("hijack_lens.hooked")
        for name, member in vars(base).items()
        if isinstance(member, property | cached_property) and not name.startswith("_")
    }


def examples(name, thing):
    """The example in its own docstring, as a test; `None` if it has none."""
    found = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(thing), name)
    return next((test for test in found if test.examples), None)


@pytest.fixture(scope="module")
def given():
    """What every example finds there; the documentation shows it at the top of its reference."""
    return {name: thing for name, thing in runpy.run_path(str(DOCS / "examples.py")).items() if name[0] != "_"}


def failures(test, given):
    """What a run of a test says of the examples in it that fail."""
    test.globs = dict(given)
    said = []
    doctest.DocTestRunner(OutputChecker(), verbose=False, optionflags=FLAGS).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs_as_written(name, given, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    test = examples(name, PUBLIC[name])
    assert test is not None, f"{name} has no example: give its docstring an Examples: block of two to six lines"
    assert failures(test, given) == ""


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_an_example_of_a_class_shows_each_of_its_properties(name):
    source = "".join(example.source for example in examples(name, PUBLIC[name]).examples)
    assert {member for member in properties(PUBLIC[name]) if not re.search(rf"\.{member}\b", source)} == set()


def test_an_example_that_says_otherwise_is_noticed(given):
    test = examples("margin", PUBLIC["hijack_lens.theory.margin"])
    test.examples[-1].want = test.examples[-1].want.replace("+9.8538", "+9.8548")
    assert "context=+9.8548" in failures(test, given)
