"""Points as jobs: what a worker does, and how a driver hands them out and takes them back."""

import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from typing import Any

from hijack_lens.experiments.sweep_journal import COLUMNS, Outcome

Arguments = dict[str, Any]

_POLL = 0.05
"""Seconds between looks at jobs that are no futures."""
_TRACEBACK = 2000
"""Characters kept of a traceback, its last."""


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
    waiting, jobs = iter(points), dict[Any, Arguments]()
    try:
        while True:
            for arguments in itertools.islice(waiting, in_flight - len(jobs)):
                jobs[executor.submit(run_point, function, arguments)] = arguments
            if not jobs:
                return
            for job in _finished(jobs):
                note(jobs[job], _outcome(job))
                del jobs[job]
    except (BrokenExecutor, CancelledError) as error:
        raise RuntimeError(
            f"executor broke while {len(jobs)} points were with it ({type(error).__name__}: {error}); what has "
            "finished is kept: call again with a new one for the rest"
        ) from error
    finally:
        for job, arguments in jobs.items():
            if not job.cancel() and job.done() and job.exception() is None:
                note(arguments, job.result())


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
    except (BrokenExecutor, CancelledError):
        raise
    except Exception as error:  # the executor's own: a worker was lost, or something could not be sent
        return failure(error)
