"""Runs a function at every point of a grid, on one core or many machines, and resumes where it was stopped."""

import hashlib
import inspect
import itertools
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hijack_lens.core.checks import check_count, check_list, plain_scalar, shown
from hijack_lens.grid.journal import COLUMNS, Journal, Outcome, identity

Arguments = dict[str, Any]
Function = Callable[..., Mapping[str, Any]]
Note = Callable[[Arguments, Outcome], None]

_POLL = 0.05  # seconds between checks of jobs that are not `concurrent.futures` futures
_TRACEBACK = 2000  # how many characters of a traceback to keep, from its end
_NAMED = 8  # how many points an error message lists
_BROKEN = (BrokenExecutor, CancelledError)  # raised by a job because its executor broke, not by the function


def run_grid(
    function: Function,
    grid: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]],
    executor: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    retry_failed: bool = False,
    in_flight: int = 256,
) -> pd.DataFrame:
    """Calls a function at every point of a grid and collects the results, one row per point.

    Executors: `None` runs the points one by one in this process. Any `concurrent.futures.Executor` runs them in its
    workers, threads or processes; so do a Dask cluster (`dask.distributed.Client(...).get_executor()`) and Slurm
    (`submitit.AutoExecutor(folder)`, one job per point). The workers must be able to import the function; for Dask and
    Slurm, it is enough that cloudpickle can send it.

    If a point kills its process, by a crash or by running out of memory, only that point fails with Dask and Slurm. A
    process pool breaks, and if you passed in the pool itself, the run ends. So pass a function that makes a pool,
    `lambda: ProcessPoolExecutor(8)`: when a pool breaks, a new one is made and runs the points that were with the old
    one, one at a time. The point that breaks this pool too is recorded as failed.

    Seeds: a function with a parameter `seed` gets its own seed at each point, below 2^32. It is made from `seed` and
    the point alone, so it does not depend on the executor, the order or the rest of the grid. If `seed` is an axis of
    the grid, the function gets that value. For repeats with other seeds, add another argument as an axis.

    Files: with `out`, each outcome is appended as it arrives, as one whole line. If called again with the same `out`,
    only points missing from the file are run; a line cut short by a kill is dropped and its point is run again. A file
    belongs to one function (by module and name; its code is not compared) and one seed. Several grids may use it in
    turn; while one run writes to it, another is refused. A Parquet file cannot be appended to, so it is made from a
    file beside it, `NAME.parquet.jsonl`, whenever a run ends, even by an error; after a kill, when the next run ends.

    If the function raises at a point, the error is recorded and the other points still run. Ctrl-C cancels what has
    not started, keeps what has finished, and raises.

    Args:
        function: called with a point's values by name; returns a dict of numbers, strings, booleans or `None`.
        grid: a mapping from names to values, where every combination is a point; or the points themselves. Values may
            have the same types as results. 1 and 1.0 are different points.
        executor: an object with a `submit` method, as above; or a function without arguments that makes a
            `concurrent.futures.Executor`, which is shut down at the end; `None` for this process.
        out: a file that ends in .jsonl or .parquet (which needs the extra `parquet`); `None` saves nothing.
        seed: the seed of the grid.
        retry_failed: whether to run again the points that failed according to the file.
        in_flight: the most points to hand to the executor at a time; at least its number of workers.

    Returns:
        One row per point in the grid's order, with its arguments, results and "seconds", and with "error" and
        "traceback" if it failed.

    Raises:
        TypeError, ValueError: if the function cannot be called with the grid, or the file belongs to another function
            or seed.
        ImportError: for a Parquet file without pyarrow.
        RuntimeError: if an executor that you passed in breaks, or one that was made here cannot even start; what has
            finished is kept.

    Examples:
        >>> def flip(match):
        ...     setting = hl.theory.Setting(hl.Strengths(match=match))
        ...     return {"repeats": hl.theory.min_repeats(language, "q", "e", setting=setting, length=24).repeats}
        >>> table = hl.grid.run_grid(flip, {"match": [2.0, 3.0, 6.0]})
        >>> table[["match", "repeats"]]
           match  repeats
        0    2.0        5
        1    3.0        3
        2    6.0        1
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {shown(function)}")
    try:
        fits = executor is None or _makes_executors(executor) or callable(getattr(executor, "submit", None))
    except Exception:  # raised by an object's own __getattr__
        fits = False
    if not fits:
        raise TypeError(
            "executor must be None, have a submit(function, *arguments) or be a function that makes such a one, "
            f"got {shown(executor)}"
        )
    check_count("seed", seed)
    check_count("in_flight", in_flight, minimum=1)
    points = [_seeded(function, point, seed) for point in _points(function, grid)]
    failed = 0
    with Journal(out, function, seed).opened() as journal:
        known = {key for key, record in journal.records.items() if not (retry_failed and "error" in record)}
        missing = [point for point in points if identity(point) not in known]
        with tqdm(total=len(points), initial=len(points) - len(missing), disable=None, unit="point") as bar:

            def note(arguments: Arguments, outcome: Outcome) -> None:
                nonlocal failed
                journal.add(arguments, outcome)
                failed += "error" in outcome
                bar.set_postfix_str(f"{failed} failed" if failed else "", refresh=False)
                bar.update()

            _run(function, missing, executor, in_flight, note)
    return journal.table(points)


def _points(function: Function, grid: Any) -> list[Arguments]:
    """The grid's points, after a check that the function can be called with each."""
    if isinstance(grid, Mapping):
        axes = {name: _values(name, values) for name, values in grid.items()}
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        points = check_list("grid", grid, "a mapping of names to values, or points as mappings")
    for index, point in enumerate(points):
        if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
            raise TypeError(f"grid must hold mappings of names to values, got {shown(point)}")
        points[index] = {name: _scalar(f"grid's {name!r}", value) for name, value in point.items()}
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
        raise TypeError(f"grid's {name!r} must be a list of values, got {shown(values)}")
    return list(values)


def _check_callable_with(function: Function, point: Arguments) -> None:
    reserved = sorted(point.keys() & set(COLUMNS))
    if reserved:
        raise ValueError(f"grid must not name {', '.join(map(repr, reserved))}: the table has such columns already")
    try:
        inspect.signature(function).bind(**_seeded(function, point, 0))
    except TypeError as error:
        raise ValueError(f"grid must name the arguments of the function, got {point}: {error}") from error


def _seeded(function: Function, point: Arguments, seed: int) -> Arguments:
    """The point, with its own seed added if the function takes one."""
    if "seed" in point or "seed" not in inspect.signature(function).parameters:
        return point
    text = f"hijack-lens sweep {seed} {identity(point)}"  # changing this text changes the seeds
    digest = hashlib.sha256(text.encode()).digest()
    return {**point, "seed": int.from_bytes(digest[:4], "big")}


def _run_point(function: Function, arguments: Arguments) -> Outcome:
    """Calls the function in the current process, and turns any exception into an outcome."""
    started = time.perf_counter()
    try:
        outcome: Outcome = {"result": _result(function(**arguments), arguments)}
    except (Exception, SystemExit) as error:
        outcome = _failure(error)
    return {**outcome, "seconds": round(time.perf_counter() - started, 6)}


def _failure(error: BaseException) -> Outcome:
    """The outcome of a point that raised."""
    text = "".join(traceback.format_exception(error))
    return {"error": {"type": type(error).__name__, "message": str(error), "traceback": text[-_TRACEBACK:]}}


def _scalar(name: str, value: Any) -> int | float | str | bool | None:
    """A number, string, boolean or `None` as a Python value; NumPy and PyTorch scalars are converted."""
    value = plain_scalar(value)
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    raise TypeError(f"{name} must be a number, a string, True, False or None, got {shown(value)}")


def _result(result: Any, arguments: Arguments) -> Arguments:
    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        raise TypeError(f"function must return a dict of names to numbers, got {shown(result)}")
    taken = sorted(result.keys() & {*arguments, *COLUMNS})
    if taken:
        raise ValueError(f"function must not return {', '.join(map(repr, taken))}: the table has such columns already")
    return {name: _scalar(f"function's {name!r}", value) for name, value in result.items()}


def _makes_executors(executor: Any) -> bool:
    """Whether calling `executor` makes one, rather than it being one; a class counts, though it has a `submit` too."""
    return callable(executor) and (isinstance(executor, type) or not hasattr(executor, "submit"))


def _run(function: Function, points: Iterable[Arguments], executor: Any, in_flight: int, note: Note) -> None:
    """Runs every point and records each outcome as it arrives.

    If this ends early, for whatever reason, jobs that have not started are cancelled and finished ones are recorded.
    """
    if executor is None:
        for arguments in points:
            note(arguments, _run_point(function, arguments))
        return
    waiting = deque(points)
    if not _makes_executors(executor):
        lost, broke = _hand_out(function, waiting, executor, in_flight, note)
        if broke is not None:
            raise RuntimeError(
                f"executor broke ({type(broke).__name__}: {broke}) while {_listed(lost)} with it; what has finished is "
                "kept: call again with a new one for the rest. Where executor is a function that makes one, such a "
                "point is recorded as failed and the rest run on"
            ) from broke
        return
    while waiting:
        with _made(executor) as made:
            suspects, broke = _hand_out(function, waiting, made, in_flight, note)
        if suspects:
            # A broken pool cannot tell which point broke it. Run one at a time, that point breaks the next pool too.
            with _made(executor) as made:
                culprit, broke = _hand_out(function, suspects, made, 1, note)
            if culprit and broke is not None:
                note(culprit[0], _failure(broke))
            waiting.extendleft(reversed(suspects))


@contextmanager
def _made(make: Callable[[], Any]) -> Iterator[Executor]:
    """A new executor, shut down at the end."""
    executor = make()
    if not isinstance(executor, Executor):
        raise TypeError(f"executor must make a concurrent.futures.Executor, got {shown(executor)}")
    with executor:
        try:
            executor.submit(int).result()
        except _BROKEN as error:  # otherwise every point would seem to have broken it
            raise RuntimeError(f"executor broke before it had any point ({type(error).__name__}: {error})") from error
        yield executor


def _hand_out(
    function: Function, points: deque[Arguments], executor: Any, in_flight: int, note: Note
) -> tuple[deque[Arguments], BaseException | None]:
    """Takes points from the left and submits them, until none are left or the executor breaks.

    Returns:
        The points that the executor held when it broke, in order, and its error; otherwise no points and `None`.
    """
    jobs, broke = dict[Any, Arguments](), None
    try:
        while points or jobs:
            while points and len(jobs) < in_flight:
                job = executor.submit(_run_point, function, points[0])
                jobs[job] = points.popleft()
            for job in _finished(jobs):
                note(jobs[job], _outcome(job))
                del jobs[job]
    except _BROKEN as error:
        broke = error
        if isinstance(error, BrokenExecutor):
            # It is still failing its jobs one by one; in Python 3.11 it crashes on a job that was cancelled first.
            executor.shutdown()
    finally:
        for job in list(jobs):
            if not job.cancel() and job.done() and job.exception() is None:
                note(jobs.pop(job), job.result())
    return deque(jobs.values()), broke


def _listed(points: Collection[Arguments]) -> str:
    """The first few points (those that had started are among them), how many more there are, and the verb."""
    few = ", ".join(map(str, itertools.islice(points, _NAMED)))
    more = f" and {len(points) - _NAMED} more" if len(points) > _NAMED else ""
    return f"{few}{more} {'was' if len(points) == 1 else 'were'}" if points else "nothing was"


def _finished(jobs: Iterable[Any]) -> list[Any]:
    """Waits until at least one job is done; returns those that are."""
    jobs = list(jobs)
    if all(isinstance(job, Future) for job in jobs):
        return list(wait(jobs, return_when=FIRST_COMPLETED).done)
    while not (done := [job for job in jobs if job.done()]):
        time.sleep(_POLL)
    return done


def _outcome(job: Any) -> Outcome:
    try:
        return job.result()
    except _BROKEN:
        raise
    except Exception as error:  # raised by the executor: a worker was lost, or something could not be sent
        return _failure(error)
