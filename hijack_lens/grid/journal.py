"""The outcomes found so far at the points of a grid, on disk: an append-only file of JSON lines."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from hijack_lens.core.checks import check_path
from hijack_lens.core.files import locked, make_folder, write_atomically

_FORMAT = "hijack_lens.sweep.1"
_MOVED = {"hijack_lens.experiments.claims.run_claim": "hijack_lens.reproduction.claims.run_claim"}
"""Maps the names of this library's functions in older files to their present names."""

Outcome = dict[str, Any]
"""The outcome of a point: its "result" or its "error", and the "seconds" it took."""

COLUMNS = ("seconds", "error", "traceback")
"""The columns of every table, in addition to the points' arguments and results."""


def identity(arguments: dict[str, Any]) -> str:
    """The key that identifies a point: its arguments as JSON, sorted by name."""
    return json.dumps(arguments, sort_keys=True)


class Journal:
    """The outcomes of one function's points.

    The file's first line names the function and the seed. Every other line holds a point and its outcome; for several
    lines with the same point, the last one counts. A Parquet file for `out` is made from a JSON lines file beside it.
    """

    def __init__(self, out: str | os.PathLike[str] | None, function: Callable[..., Any], seed: int) -> None:
        self.header = {"format": _FORMAT, "function": _name(function, kept=out is not None), "seed": seed}
        self.records: dict[str, dict[str, Any]] = {}
        self.parquet: Path | None = None
        self.path = None if out is None else check_path("out", out)
        if self.path is None:
            return
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out must end in .jsonl or .parquet, got {str(out)!r}")
        if self.path.suffix == ".parquet":
            if importlib.util.find_spec("pyarrow") is None:
                raise ImportError("out is a Parquet file, which needs pyarrow: pip install 'hijack-lens[parquet]'")
            self.parquet, self.path = self.path, self.path.with_name(f"{self.path.name}.jsonl")
            if self.parquet.exists() and not self.path.exists():
                raise ValueError(f"out={str(out)!r} exists without the {self.path.name} that it was made from")
        for path in (self.path, self.parquet):
            if path is not None and path.exists() and not path.is_file():
                raise ValueError(f"out must be a file, got {str(path)!r}")

    @contextmanager
    def opened(self) -> Iterator["Journal"]:
        """The journal with what its file holds; no other run writes to the file meanwhile."""
        if self.path is None:
            yield self
            return
        make_folder("out", self.path.parent)
        real = Path(os.path.realpath(self.path))
        with locked("out", self.parquet or self.path, real.with_name(f".{real.name}.lock")):
            self._read()
            try:
                yield self
            finally:
                self._write_parquet()

    def _read(self) -> None:
        assert self.path is not None
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        header, *lines = whole.decode(errors="replace").splitlines() or [""]
        if whole:
            self._check_header(header)
        elif data and not json.dumps(self.header).startswith(data.decode(errors="replace")):
            raise ValueError(f"{self.path} is not a grid's file")
        for number, line in enumerate(lines, start=2):
            try:
                record = json.loads(line)
                self.records[identity(record["arguments"])] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.path} holds no outcome of a point in line {number}: {line!r:.80}") from error
        if len(whole) < len(data):  # a line cut short, by a kill or a full disk
            os.truncate(self.path, len(whole))
        if not whole:
            self._append(self.header)

    def _check_header(self, line: str) -> None:
        try:
            header = json.loads(line)
            ours = header["format"] == _FORMAT
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"{self.path} is not a grid's file")
        header["function"] = _MOVED.get(str(header.get("function")), header.get("function"))
        for name in ("function", "seed"):
            if header.get(name) != self.header[name]:
                raise ValueError(
                    f"{self.path} holds a grid of {name}={header.get(name)!r}, not of {name}={self.header[name]!r}: "
                    "give each its own file"
                )

    def _append(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")

    def add(self, arguments: dict[str, Any], outcome: Outcome) -> None:
        """Records the outcome of a point, on disk first."""
        record = {"arguments": arguments, **outcome}
        self._append(record)
        self.records[identity(arguments)] = record

    def table(self, points: list[dict[str, Any]] | None = None) -> pd.DataFrame:
        """One row for each of the points that has an outcome, in the given order; by default, for all known points."""
        keys = list(self.records) if points is None else [identity(point) for point in points]
        records = [self.records[key] for key in keys if key in self.records]
        arguments = dict.fromkeys(name for record in records for name in record["arguments"])
        results = dict.fromkeys(name for record in records for name in record.get("result", {}))
        table = pd.DataFrame(map(_row, records), columns=[*arguments, *results, *COLUMNS])
        table.attrs = {name: self.header[name] for name in ("function", "seed")}
        return table

    def _write_parquet(self) -> None:
        """Writes all known outcomes to the Parquet file, if one was asked for."""
        if self.parquet is None:
            return
        try:
            data = self.table().to_parquet(None, engine="pyarrow", index=False)
        except (TypeError, ValueError) as error:  # pyarrow's own errors are subclasses of these
            raise ValueError(
                f"{self.parquet} cannot be written, since a column mixes types ({error}); {self.path} holds all results"
            ) from error
        write_atomically(self.parquet, data)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    error = record.get("error")
    return {
        **record["arguments"],
        **record.get("result", {}),
        "seconds": record.get("seconds"),
        "error": error and f"{error['type']}: {error['message']}",
        "traceback": error and error["traceback"],
    }


def _name(function: Any, kept: bool) -> str:
    """The name that identifies the function in a file."""
    name = getattr(function, "__qualname__", None)
    if kept and (name is None or "<lambda>" in name):
        raise ValueError(
            f"function must have a name for out to know it by, got {function!r:.80}; what it fixes can be an axis of "
            "the grid with one value"
        )
    return f"{function.__module__}.{name}" if name else repr(function)
