"""A function measured at every point of a grid, on one core or many machines, and resumed where it was stopped."""

import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.core.checks import check_count
from hijack_lens.grid.jobs import Arguments, makes_executors, run_points, scalar
from hijack_lens.grid.journal import COLUMNS, Journal, Outcome, identity


def run_grid(
    function: Callable[..., Mapping[str, Any]],
    grid: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]],
    executor: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    retry_failed: bool = False,
    in_flight: int = 256,
) -> pd.DataFrame:
    """Calls a function at every point of a grid and gathers what it returns, a row per point.

    Executors: `None` runs the points one by one in this process. Any `concurrent.futures.Executor` runs them in its
    workers, threads and process pools among them; so do a Dask cluster (`dask.distributed.Client(...).get_executor()`),
    and Slurm (`submitit.AutoExecutor(folder)`, a job per point). The function must be one that the workers can import,
    or for Dask and Slurm one that cloudpickle can send.

    A point that takes its process down, by a crash or for want of memory, fails alone with Dask and Slurm. A process
    pool breaks at it. So give a function that makes one, `lambda: ProcessPoolExecutor(8)`: when a pool breaks, the
    sweep makes another and runs the points that were with it one at a time, and the one that breaks that too is
    recorded as failed. A pool that was made elsewhere ends the sweep when it breaks.

    Seeds: a function with a parameter `seed` gets a seed of its own at each point, below 2^32, made from the sweep's
    seed and the point alone, so that neither the executor nor the order nor the rest of the grid matters; where `seed`
    is an axis of the grid, it gets that. For repeats with other seeds, give the function one more argument as an axis.

    Files: with `out`, each outcome is appended as it comes, one line written whole. Called again with the same
    `out`, only points that the file lacks are run; a line cut short by a kill is dropped and its point run again. A
    file belongs to one function (by module and name; its code is not compared) and one seed, is written by one sweep
    at a time, and may serve several grids in turn. A Parquet file cannot be appended to: outcomes are appended to lines
    kept beside it, `NAME.parquet.jsonl`, and it is made from them whenever a sweep ends, if by an error; after a kill,
    when the next one ends, even if that finds nothing left to run.

    A point at which the function raises is recorded with its error, and the others run on. A Ctrl-C cancels what has
    not started, keeps what has finished, and raises.

    Args:
        function: called with a point's values by name; returns a dict of numbers, strings, truth values or `None`.
        grid: names to values, every combination a point; or the points themselves. Values are of the same kinds as
            results. 1 and 1.0 are different points.
        executor: with a `submit` as above; or a function without arguments that makes a `concurrent.futures.Executor`,
            which is shut down in the end; `None` for this process.
        out: a file that ends in .jsonl, or .parquet (which needs the extra `parquet`); `None` keeps nothing.
        seed: of the sweep.
        retry_failed: run also the points that the file holds with an error.
        in_flight: the most points that are with the executor at a time, at least as many as it has workers.

    Returns:
        A row per point in the grid's order, with its arguments, results, "seconds", and "error" and "traceback" where
        it failed.

    Raises:
        TypeError, ValueError: for a grid that the function cannot be called with, and a file of another function or
            seed.
        ImportError: for a Parquet file without pyarrow.
        RuntimeError: where an executor breaks that was not made here, or one that was cannot even start; what has
            finished is kept.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {function!r:.80}")
    if executor is not None and not makes_executors(executor) and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            "executor must be None, have a submit(function, *arguments) or be a function that makes such a one, "
            f"got {executor!r:.80}"
        )
    check_count("seed", seed)
    check_count("in_flight", in_flight, minimum=1)
    points = [_seeded(function, point, seed) for point in _points(function, grid)]
    journal = Journal(out, function, seed)

    missing = []
    for point in points:
        record = journal.records.get(identity(point))
        if record is None or (retry_failed and "error" in record):
            missing.append(point)
    failed = 0
    with tqdm(total=len(points), initial=len(points) - len(missing), disable=None, unit="point") as bar:

        def note(arguments: Arguments, outcome: Outcome) -> None:
            nonlocal failed
            journal.add(arguments, outcome)
            failed += "error" in outcome
            bar.set_postfix_str(f"{failed} failed" if failed else "", refresh=False)
            bar.update()

        try:
            run_points(function, missing, executor, in_flight, note)
        finally:
            journal.close()
    return journal.table(points)


def _points(function: Callable[..., Any], grid: Any) -> list[Arguments]:
    """The grid's points, each such that the function can be called with it."""
    if isinstance(grid, Mapping):
        axes = {name: _values(name, values) for name, values in grid.items()}
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    elif isinstance(grid, Iterable) and not isinstance(grid, (str, bytes)):
        points = list(grid)
    else:
        raise TypeError(f"grid must be a mapping of names to values, or points as mappings, got {grid!r:.80}")
    for index, point in enumerate(points):
        if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
            raise TypeError(f"grid must hold mappings of names to values, got {point!r:.80}")
        points[index] = {name: scalar(f"grid's {name!r}", value) for name, value in point.items()}
    if not points:
        raise ValueError("grid must have at least one point, got none")
    seen = set[str]()
    for point in points:
        _check_callable_with(function, point)
        if identity(point) in seen:
            raise ValueError(f"grid must name each point once, got {point} twice")
        seen.add(identity(point))
    return points


def _values(name: object, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"grid's {name!r} must be a list of values, got {values!r:.80}")
    return list(values)


def _check_callable_with(function: Callable[..., Any], point: Arguments) -> None:
    reserved = sorted(point.keys() & set(COLUMNS))
    if reserved:
        raise ValueError(f"grid must not name {', '.join(map(repr, reserved))}: the table has such columns already")
    try:
        inspect.signature(function).bind(**_seeded(function, point, 0))
    except TypeError as error:
        raise ValueError(f"grid must name the arguments of the function, got {point}: {error}") from error


def _seeded(function: Callable[..., Any], point: Arguments, seed: int) -> Arguments:
    """The point, with a seed of its own for a function that takes one."""
    if "seed" in point or "seed" not in inspect.signature(function).parameters:
        return point
    digest = hashlib.sha256(f"hijack-lens sweep {seed} {identity(point)}".encode()).digest()
    return {**point, "seed": int.from_bytes(digest[:4], "big")}
