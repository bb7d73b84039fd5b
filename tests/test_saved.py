"""Results in files: what annotations say comes back, whatever it is; files of the version before; foreign files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Shown

OLDER = Path(__file__).parent / "saved"
KINDS = {
    "LogitAttribution": hl.LogitAttribution,
    "ScoreAttribution": hl.ScoreAttribution,
    "ShapleyValues": hl.ShapleyValues,
    "ShapleyValuesSampled": hl.ShapleyValues,
    "Sweep": hooks.Sweep,
    "PathSweep": hooks.PathSweep,
    "ContextMemory": hl.ContextMemory,
    "MemoryConflict": hl.MemoryConflict,
    "MemoryMatrix": hl.MemoryMatrix,
    "MemoryNeurons": hl.MemoryNeurons,
    "MemoryCapacity": hl.MemoryCapacity,
    "DoseResponse": hl.DoseResponse,
}


def stored(path):
    with safe_open(str(path), "pt") as file:
        return load_file(path), json.loads(file.metadata()["hijack_lens"])


def same(a, b):
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7e77), b.nan_to_num(7e77)) if a.is_floating_point() else torch.equal(a, b)
    elif is_dataclass(a):
        assert type(a) is type(b)
        for one in fields(a):
            if one.compare:
                same(getattr(a, one.name), getattr(b, one.name))
    elif isinstance(a, Mapping):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, tuple):
        assert isinstance(b, tuple)
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert type(a) is type(b)
        assert a == b or (a != a and b != b)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_the_version_before_loads_and_is_kept_whole(name, tmp_path):
    tensors, header = stored(OLDER / f"{name}.safetensors")
    result = KINDS[name].load(OLDER / f"{name}.safetensors")
    # What is read is what lies in the file, by a name of its own or, of a dose-response, in its parts.
    parts = {one.name: getattr(result, one.name) for one in fields(result)}
    if name == "DoseResponse":
        parts |= {part: getattr(result.margin, part) for part in ("context", "weights", "rest")}
        parts |= {"ahead": result.theory.ahead, "theory": result.theory.margin}
    older = {new: old for old, new in KINDS[name].older_names.items()}
    parts = {older.get(part, part): value for part, value in parts.items()}
    for tensor_name, tensor in tensors.items():
        same(parts[tensor_name], tensor)
    for key, value in header.items():
        if key != "format" and isinstance(value, (int, float, str, bool)) and key in parts:
            same(parts[key], value)
    result.save(tmp_path / "again")
    same(KINDS[name].load(tmp_path / "again"), result)
    assert stored(tmp_path / "again")[1]["format"] == header["format"]


@dataclass(frozen=True)
class Part:
    place: int
    weight: Float[Tensor, "n"]
    kind: Literal["head", "mlp"] = "head"


@dataclass(frozen=True, eq=False)
class Everything(Saved, Shown):
    values: Float[Tensor, "a b"]
    maybe: Int[Tensor, "n"] | None
    number: float
    count: int
    flag: bool
    word: str
    optional: float | None
    names: tuple[str, ...] | Mapping[int, str] | None
    pair: tuple[int, float]
    ends: tuple[Part | str, ...]
    nested: Part
    where: int | Literal["all"]
    free: Any = None
    aside: Any = field(default=None, compare=False)


numbers = st.floats(allow_nan=True, allow_infinity=True)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
parts = st.builds(
    Part,
    st.integers(0, 9),
    st.lists(numbers, max_size=3).map(lambda listed: torch.tensor(listed, dtype=torch.float64)),
    st.sampled_from(["head", "mlp"]),
)


@given(
    st.builds(
        Everything,
        values=st.integers(0, 3).map(lambda n: torch.randn(n, 2, dtype=torch.float64)),
        maybe=st.none() | st.integers(0, 3).map(torch.arange),
        number=numbers,
        count=st.integers(-(2**40), 2**40),
        flag=st.booleans(),
        word=words,
        optional=st.none() | numbers,
        names=st.none()
        | st.lists(words, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 99), words, max_size=3),
        pair=st.tuples(st.integers(0, 9), numbers),
        ends=st.lists(parts | words, max_size=3).map(tuple),
        nested=parts,
        where=st.integers(0, 9) | st.just("all"),
        free=st.none() | st.lists(st.integers(0, 9), max_size=2),
        aside=st.just(object()),
    )
)
def test_whatever_annotations_allow_comes_back(tmp_path_factory, result):
    path = tmp_path_factory.mktemp("saved") / "file"
    result.save(path)
    loaded = Everything.load(path)
    same(loaded, result)
    assert loaded.aside is None  # equality ignores it, and no file could hold it


def everything():
    part = Part(1, torch.zeros(2))
    return Everything(torch.zeros(2, 2), None, 0.5, 1, True, "a", None, ("b",), (1, math.inf), (part, "c"), part, "all")


DAMAGE = {
    "lacks number": lambda header, tensors: header.pop("number"),
    "lacks place": lambda header, tensors: header["nested"].pop("place"),
    r"holds \['colour'\]": lambda header, tensors: header.update(colour="red"),
    r"holds \['colour'\], which a Part does not have": lambda header, tensors: header["nested"].update(colour="red"),
    r"holds \['other'\]": lambda header, tensors: tensors.update(other=torch.zeros(1)),
    "values must be a": lambda header, tensors: tensors.update(values=torch.zeros(2)),
    "values must be a .*int": lambda header, tensors: tensors.update(values=torch.zeros(2, 2, dtype=torch.int64)),
    "it lacks weight": lambda header, tensors: tensors.pop("nested.weight"),
    "count is 1.5": lambda header, tensors: header.update(count=1.5),
    "count is True": lambda header, tensors: header.update(count=True),
    "word is 3": lambda header, tensors: header.update(word=3),
    "nested is 'x'": lambda header, tensors: header.update(nested="x"),
    "kind must be one of": lambda header, tensors: header["nested"].update(kind="tail"),
    "none of": lambda header, tensors: header.update(where="some"),
    "zip": lambda header, tensors: header.update(pair=[1, 2.0, 3]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_file_that_annotations_do_not_allow_is_refused(message, tmp_path):
    path = tmp_path / "file"
    everything().save(path)
    tensors, header = stored(path)
    DAMAGE[message](header, tensors)
    save_file(tensors, path, {"hijack_lens": json.dumps(header)})
    with pytest.raises(ValueError, match=rf"file is not a saved Everything: .*{message}"):
        Everything.load(path)


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    values = torch.ones(2, 2)
    part = Part(0, values[0])
    Everything(values, None, 0.0, 0, False, "", None, None, (0, 0.0), (part,), part, 0).save(tmp_path / "file")
    loaded = Everything.load(tmp_path / "file")
    same(loaded.nested.weight, torch.ones(2))
    same(loaded.ends[0].weight, torch.ones(2))
