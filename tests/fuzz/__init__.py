"""A fuzzer of every public function, and of the command line: `python -m tests.fuzz --inputs 20000`.

Functions, their parameters and the kinds of these are found by introspection: a new function is fuzzed without a line
being added here. Most arguments are valid, one or two are hostile. A call must return, or raise a `ValueError` or
`TypeError` that names an argument; within 10 s and 2 GiB.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
_ROOT = str(Path(__file__).parents[2])
if sys.path[0] == _ROOT:  # what is installed comes first: a checkout keeps hooks/ in another place
    sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the small models of the other tests
