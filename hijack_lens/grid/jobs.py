"""Points as jobs: what a worker does, and how a driver hands them out and takes them back."""

import itertools
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from typing import Any

from hijack_lens.grid.journal import COLUMNS, Outcome

Arguments = dict[str, Any]

_POLL = 0.05
"""Seconds between looks at jobs that are no futures."""
_TRACEBACK = 2000
"""Characters kept of a traceback, its last."""
_NAMED = 8
"""Points that an error lists."""
_BROKEN = (BrokenExecutor, CancelledError)
"""What a job raises where the executor is at an end, rather than the job."""


def run_point(function: Callable[..., Mapping[str, Any]], arguments: Arguments) -> Outcome:
    """Calls the function, in whatever process this is, and turns what it raises into an outcome."""
    started = time.perf_counter()
    try:
        outcome: Outcome = {"result": _result(function(**arguments), arguments)}
    except (Exception, SystemExit) as error:
        outcome = failure(error)
    return {**outcome, "seconds": round(time.perf_counter() - started, 6)}


def failure(error: BaseException) -> Outcome:
    """The outcome of a point that raised."""
    text = "".join(traceback.format_exception(error))
    return {"error": {"type": type(error).__name__, "message": str(error), "traceback": text[-_TRACEBACK:]}}


def scalar(name: str, value: Any) -> int | float | str | bool | None:
    """A number, string, truth value or `None`, as Python's own; NumPy's and PyTorch's become these."""
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    raise TypeError(f"{name} must be a number, a string, True, False or None, got {value!r:.80}")


def _result(result: Any, arguments: Arguments) -> Arguments:
    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        raise TypeError(f"function must return a dict of names to numbers, got {result!r:.80}")
    taken = sorted(result.keys() & {*arguments, *COLUMNS})
    if taken:
        raise ValueError(f"function must not return {', '.join(map(repr, taken))}: the table has such columns already")
    return {name: scalar(f"function's {name!r}", value) for name, value in result.items()}


def makes_executors(executor: Any) -> bool:
    """Whether it is to be called for an executor, rather than be one: a class has a `submit` too, for its instances."""
    return callable(executor) and (isinstance(executor, type) or not hasattr(executor, "submit"))


def run_points(
    function: Callable[..., Mapping[str, Any]],
    points: Iterable[Arguments],
    executor: Any,
    in_flight: int,
    note: Callable[[Arguments, Outcome], None],
) -> None:
    """Runs every point and notes each outcome as it comes.

    Whatever ends this early cancels the jobs that have not started; those that have finished by then are noted.
    """
    if executor is None:
        for arguments in points:
            note(arguments, run_point(function, arguments))
        return
    waiting = deque(points)
    if not makes_executors(executor):
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
            # A broken pool cannot tell which point broke it. That one breaks the next too, where it is alone.
            with _made(executor) as made:
                culprit, broke = _hand_out(function, suspects, made, 1, note)
            if culprit and broke is not None:
                note(culprit[0], failure(broke))
            waiting.extendleft(reversed(suspects))


@contextmanager
def _made(make: Callable[[], Any]) -> Iterator[Executor]:
    """A new executor, shut down in the end."""
    executor = make()
    if not isinstance(executor, Executor):
        raise TypeError(f"executor must make a concurrent.futures.Executor, got {executor!r:.80}")
    with executor:
        try:
            executor.submit(int).result()
        except _BROKEN as error:  # or else every point would be found to have broken one
            raise RuntimeError(f"executor broke before it had any point ({type(error).__name__}: {error})") from error
        yield executor


def _hand_out(
    function: Callable[..., Mapping[str, Any]],
    points: deque[Arguments],
    executor: Any,
    in_flight: int,
    note: Callable[[Arguments, Outcome], None],
) -> tuple[deque[Arguments], BaseException | None]:
    """Takes points from the left and has them run, until there are no more or the executor breaks.

    Returns:
        The points that were with it when it broke, in their order, and its error.
    """
    jobs, broke = dict[Any, Arguments](), None
    try:
        while points or jobs:
            while points and len(jobs) < in_flight:
                job = executor.submit(run_point, function, points[0])
                jobs[job] = points.popleft()
            for job in _finished(jobs):
                note(jobs[job], _outcome(job))
                del jobs[job]
    except _BROKEN as error:
        broke = error
        if isinstance(error, BrokenExecutor):
            # It is still failing its jobs, one by one, and Python 3.11's chokes on one that is cancelled before.
            executor.shutdown()
    finally:
        for job in list(jobs):
            if not job.cancel() and job.done() and job.exception() is None:
                note(jobs.pop(job), job.result())
    return deque(jobs.values()), broke


def _listed(points: Collection[Arguments]) -> str:
    """The first few, among which are those that had started, and how many more; with the verb."""
    few = ", ".join(map(str, itertools.islice(points, _NAMED)))
    more = f" and {len(points) - _NAMED} more" if len(points) > _NAMED else ""
    return f"{few}{more} {'was' if len(points) == 1 else 'were'}" if points else "nothing was"


def _finished(jobs: Iterable[Any]) -> list[Any]:
    """Those that are done, once there are any."""
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
    except Exception as error:  # the executor's own: a worker was lost, or something could not be sent
        return failure(error)
