"""What no parameter wants: each made anew for every call."""

import decimal
import fractions
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Maker = Callable[[], Any]


def raising(*names: str) -> Maker:
    """Makes objects with these special methods, each of which raises an error of no helpful kind."""

    def broken(self: Any, *arguments: Any) -> Any:
        raise RuntimeError("this object is broken")

    return lambda: type("Broken", (), {"__hash__": object.__hash__, **dict.fromkeys(names, broken)})()


def failing(*arguments: Any, **options: Any) -> Any:
    """A function of the user's that raises an error of its own, which is the user's to see."""
    return 1 // 0


def looped() -> list:
    """A list that holds itself."""
    inside: list = [1]
    inside.append(inside)
    return inside


def nested(depth: int = 2000) -> list:
    """A list in a list in a list ..."""
    inside: list = [1]
    for _ in range(depth):
        inside = [inside]
    return inside


def float8() -> torch.Tensor:
    """A tensor of a dtype that PyTorch can hold and hardly compute with."""
    return torch.ones(5).to(torch.float8_e4m3fn)


VALUES: dict[str, Maker] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "7": lambda: 7,
    "-(10**6)": lambda: -(10**6),
    "-(2**63) - 1": lambda: -(2**63) - 1,
    "0.5": lambda: 0.5,
    "2.0": lambda: 2.0,
    "-0.0": lambda: -0.0,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e308": lambda: 1e308,
    "-1e308": lambda: -1e308,
    "5e-324": lambda: 5e-324,
    "1j": lambda: 1j,
    "Decimal": lambda: decimal.Decimal("1.5"),
    "Decimal(sNaN)": lambda: decimal.Decimal("sNaN"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "''": lambda: "",
    "' '": lambda: " ",
    "'\\0'": lambda: "a\0b",
    "'a'": lambda: "a",
    "'all'": lambda: "all",
    "'L0H0'": lambda: "L0H0",
    "'L9H9'": lambda: "L9H9",
    "'L' + digits": lambda: "L" + "9" * 5000 + "H0",
    "digits": lambda: "9" * 5000,
    "'induction'": lambda: "induction",
    "surrogate": lambda: "\ud800",
    "odd text": lambda: "<script>$\\{é\u202e\n🙂{0}%s</script>",
    "long text": lambda: "x" * 100_000,
    "b''": lambda: b"",
    "bytes": lambda: b"\xff\x00abc",
    "bytearray": lambda: bytearray(b"abc"),
    "[]": lambda: [],
    "()": lambda: (),
    "{}": lambda: {},
    "set()": lambda: set(),
    "[None]": lambda: [None],
    "[[]]": lambda: [[]],
    "[1, 'a']": lambda: [1, "a"],
    "[1, 1]": lambda: [1, 1],
    "[-1]": lambda: [-1],
    "[0.5]": lambda: [0.5],
    "[True]": lambda: [True],
    "[nan]": lambda: [math.nan],
    "[1, [2, 3]]": lambda: [1, [2, 3]],
    "[[1, 2], [3]]": lambda: [[1, 2], [3]],
    "[10**26]": lambda: [10**26],
    "[tensor]": lambda: [torch.tensor([1, 2])],
    "[array]": lambda: [np.arange(3)],
    "['']": lambda: [""],
    "['surrogate']": lambda: ["\udfff"],
    "{1, 2}": lambda: {1, 2},
    "{'a': 1}": lambda: {"a": 1},
    "{1: 2}": lambda: {1: 2},
    "{'a': []}": lambda: {"a": []},
    "{'a': None}": lambda: {"a": None},
    "looped list": looped,
    "nested list": nested,
    "generator": lambda: (i for i in range(3)),
    "failing generator": lambda: (1 // (1 - i) for i in range(3)),
    "map": lambda: map(str, range(2)),
    "range(0)": lambda: range(0),
    "slice": lambda: slice(None),
    "Ellipsis": lambda: ...,
    "object": object,
    "int": lambda: int,
    "print": lambda: print,
    "lambda": lambda: lambda *a, **k: None,
    "failing function": lambda: failing,
    "module": lambda: math,
    "error": lambda: ValueError("an error as a value"),
    "no __len__": raising("__len__"),
    "no __iter__": raising("__iter__"),
    "no __bool__": raising("__bool__"),
    "no __eq__": raising("__eq__"),
    "no __repr__": raising("__repr__", "__str__"),
    "no __index__": raising("__index__", "__int__", "__float__"),
    "no __hash__": raising("__hash__"),
    "no __array__": raising("__array__", "__len__", "__getitem__"),
    "no __getattr__": raising("__getattr__"),
    "no __fspath__": raising("__fspath__"),
    "np.int64": lambda: np.int64(3),
    "np.uint8": lambda: np.uint8(200),
    "np.float32": lambda: np.float32(0.5),
    "np.float64(nan)": lambda: np.float64("nan"),
    "np.bool_": lambda: np.bool_(True),
    "np.str_": lambda: np.str_("a"),
    "np.datetime64": lambda: np.datetime64("2020-01-01"),
    "array": lambda: np.arange(4),
    "array 0-d": lambda: np.array(2),
    "array of strings": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, object()], dtype=object),
    "array empty": lambda: np.array([]),
    "array bool": lambda: np.array([True, False]),
    "array 3-d": lambda: np.zeros((2, 2, 2)),
    "array uint64": lambda: np.array([2**64 - 1], dtype=np.uint64),
    "array structured": lambda: np.zeros(2, dtype=[("a", int), ("b", float)]),
    "tensor": lambda: torch.arange(4),
    "tensor 0-d": lambda: torch.tensor(2),
    "tensor 0-d float": lambda: torch.tensor(1.5),
    "tensor one element": lambda: torch.tensor([3]),
    "tensor [[3]]": lambda: torch.tensor([[3]]),
    "tensor one float": lambda: torch.tensor([0.5]),
    "tensor bool": lambda: torch.tensor([True, False]),
    "tensor 0-d bool": lambda: torch.tensor(True),
    "tensor empty": lambda: torch.tensor([]),
    "tensor [0, 4]": lambda: torch.zeros(0, 4, dtype=torch.long),
    "tensor nan": lambda: torch.full((5,), math.nan),
    "tensor complex": lambda: torch.ones(3, dtype=torch.complex64),
    "tensor float8": float8,
    "tensor bfloat16": lambda: torch.ones(5, dtype=torch.bfloat16),
    "tensor uint8": lambda: torch.ones(5, dtype=torch.uint8),
    "tensor uint16": lambda: torch.ones(5, dtype=torch.uint16),
    "tensor 3-d": lambda: torch.zeros(2, 3, 4),
    "tensor 5-d": lambda: torch.zeros(1, 1, 1, 1, 2, dtype=torch.long),
    "tensor on meta": lambda: torch.zeros(5, dtype=torch.long, device="meta"),
    "tensor sparse": lambda: torch.eye(3).to_sparse(),
    "tensor with grad": lambda: torch.ones(5, requires_grad=True),
    "tensor large ids": lambda: torch.tensor([2**62]),
    "torch.float8": lambda: torch.float8_e4m3fn,
    "torch.int64": lambda: torch.int64,
    "torch.float16": lambda: torch.float16,
    "torch.complex64": lambda: torch.complex64,
    "'float32'": lambda: "float32",
    "'gpu'": lambda: "gpu",
    "'cuda'": lambda: "cuda",
    "'cuda:99'": lambda: "cuda:99",
    "'meta'": lambda: "meta",
    "'cpu:3'": lambda: "cpu:3",
    "device meta": lambda: torch.device("meta"),
    "Generator": lambda: torch.Generator().manual_seed(0),
    "np Generator": lambda: np.random.default_rng(0),
    "nn.Linear": lambda: torch.nn.Linear(2, 2),
}
"""By name, what is small."""

SIZES: dict[str, Maker] = {
    "5000": lambda: 5000,
    "10**5": lambda: 10**5,
    "10**9": lambda: 10**9,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "10**26": lambda: 10**26,
    "10**5000": lambda: 10**5000,
    "range(10**12)": lambda: range(10**12),
    "count()": itertools.count,
    "np.int64 max": lambda: np.int64(2**63 - 1),
    "1e10": lambda: 1e10,
    "0-d tensor 10**12": lambda: torch.tensor(10**12),
}
"""By name, what would take time or memory if believed."""

ALL = {**VALUES, **SIZES}

TEXTS = [
    "", " ", "0", "-1", "7", "0.5", "nan", "inf", "-inf", "1e308", "1e-320", "1e999", "10**26", "1" * 30, "9" * 5000,
    "100000000", "1000000", "--", "-", "--seed", "None", "true", "é", "🙂", "\ud800", "$\\{", "<script>", "[1, 2]",
    "{}", "a b", "x" * 5000, "the", "e", "word", "char", "absolute", "rotary", "missing/folder/file", ".", "..", "~",
]  # fmt: skip
"""What stands behind an option on the command line."""
