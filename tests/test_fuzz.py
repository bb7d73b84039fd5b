"""A slice of the fuzzer: see `tests/fuzz`. All of it: `python -m tests.fuzz --inputs 20000`."""

import re
import subprocess
import sys
from pathlib import Path

from hijack_lens.core.checks import shown

ROOT = Path(__file__).parents[1]
SLICE = """
import sys
import hijack_lens.theory as theory

def careless(prompt: object, seed: int, how: str = "zero") -> int:
    return {"zero": 0}[how] + seed[0]

careless.__module__ = "hijack_lens.theory"
theory.careless = careless
theory.__all__.append("careless")
sys.argv = ["fuzz", "--inputs", "230", "--seed", "0", "--quiet"]
from tests.fuzz.run import main
main()
"""


def test_calls_with_hostile_arguments_return_or_name_the_argument():
    """In a process of its own, where no type checker stands before the library's own checks.

    One careless function is planted among the public ones: nobody tells the fuzzer of it, and it alone is found.
    """
    command = [sys.executable, "-W", "ignore", "-c", SLICE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stdout[-8000:] + done.stderr[-2000:]
    wrong = re.findall(r"^ +\d+ (\S+) +\S+", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ inputs to \d\d\d targets, seed 0", done.stdout, re.MULTILINE), said
    assert set(wrong) == {"theory.careless"}, said
    assert "python -m tests.fuzz --only '^theory.careless$' --inputs 230 --seed 0 --replay" in said


def test_values_are_shown_short_whatever_they_do():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    nested: list = []
    for _ in range(100_000):  # beyond the stack of any Python
        nested = [nested]
    assert shown("a" * 1000) == "'" + "a" * 76 + "..."
    assert shown("a\nb") == r"'a\nb'"
    assert (shown(Broken()), shown(nested), shown(10**5000)) == ("<Broken>", "<list>", "<int>")
