"""A slice of the fuzzer: see `tests/fuzz`. All of it: `python -m tests.fuzz --inputs 20000`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENOUGH = 700


def test_calls_with_hostile_arguments_return_or_name_the_argument():
    """In a process of its own, where no type checker stands before the library's own checks."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(ENOUGH), "--seed", "0", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    summary = done.stdout[-6000:]
    assert done.returncode == 0, summary + done.stderr[-2000:]
    assert " 0 wrong" in summary


def test_the_fuzzer_sees_what_is_wrong(tmp_path):
    """A function that lets a wrong kind of error through is found, and each of its arguments is drawn."""
    script = """
import hijack_lens.theory as theory, os, sys
def careless(prompt: object, seed: int, how: str = "zero") -> int:
    return {"zero": 0}[how] + seed[0]
careless.__module__ = "hijack_lens.theory"
theory.careless = careless
theory.__all__.append("careless")
sys.argv = ["fuzz", "--inputs", "100", "--seed", "1", "--quiet", "--only", "careless"]
from tests.fuzz.run import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "KeyError" in done.stdout, done.stdout + done.stderr
    assert "python -m tests.fuzz --only '^theory.careless$' --seed 1 --replay" in done.stdout


@pytest.mark.usefixtures("unchecked")
def test_values_are_shown_short_whatever_they_do():
    from hijack_lens.core.checks import shown

    class Broken:
        def __repr__(self):
            raise RuntimeError

    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert shown("a" * 1000) == "'" + "a" * 76 + "..."
    assert shown("a\nb") == r"'a\nb'"
    assert (shown(Broken()), shown(nested), shown(10**5000)) == ("<Broken>", "<list>", "<int>")
