"""The loop of a training, whatever it trains: steps, looks, checkpoints, progress, and an end at Ctrl-C."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, runtime_checkable

from tqdm.auto import tqdm


@runtime_checkable
class Course(Protocol):
    """A training, as the loop sees it; it keeps its own model, optimizer and table.

    Attributes:
        evaluate_every: steps between looks.
        checkpoint_every: steps between checkpoints.
    """

    @property
    def evaluate_every(self) -> int: ...  # noqa: D102

    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102

    @property
    def end(self) -> int:
        """The step that it ends before; while that is open, the latest that it can be."""

    def take(self, step: int) -> int:
        """Takes an optimizer step, counted from 0; how many tokens it saw."""

    def look(self, step: int, seconds: float) -> str:
        """Evaluates the model after so many steps; what the progress bar shall say."""

    def turn(self, step: int) -> None:
        """Goes on to the next phase, if this step, and what was seen at it, ends one."""

    def save(self, step: int) -> None:
        """Writes a checkpoint, if the training has a folder."""


def run_course(course: Course, step: int, elapsed: float) -> int:
    """Runs a training from a step on, after so many seconds, to its end or a Ctrl-C; the steps taken in the end."""
    started, seen, began = time.monotonic() - elapsed, 0, time.monotonic()
    with _interruptible() as interrupted, tqdm(total=course.end, initial=step, disable=None, unit="step") as bar:

        def look() -> None:
            text = course.look(step, time.monotonic() - started)
            bar.set_postfix_str(f"{text}, {seen / (time.monotonic() - began):,.0f} tokens/s")

        if step == 0:
            course.look(step, 0.0)
        while step < course.end:
            seen += course.take(step)
            step += 1
            looked = step % course.evaluate_every == 0
            if looked:
                look()
            course.turn(step)
            bar.total = course.end
            last = step == course.end or bool(interrupted)
            if last and not looked:
                look()
            bar.update()
            if step % course.checkpoint_every == 0 or last:
                course.save(step)
            if interrupted:
                break
    return step


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Records a Ctrl-C in the list, so that the current step can finish; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        yield received
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
