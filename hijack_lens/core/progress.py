"""How far a long call has come: a bar in a terminal; elsewhere a line, once it is known how long the call will take."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

_SURE, _LONG = 2.0, 60.0
"""Seconds after which the rest can be estimated, and what is long enough to be said."""

_log = logging.getLogger("hijack_lens")


@contextmanager
def progress(total: int, unit: str, desc: str) -> Iterator[Callable[[int], None]]:
    """Counts up to `total` of what a call named `desc` goes through; what this gives is called with each part's size.

    Where no bar can be seen, a call that will take over a minute says so in its first seconds, through the logger
    "hijack_lens".
    """
    began, seen, silent = time.monotonic(), 0, True
    with tqdm(total=total, desc=desc, unit=unit, disable=None, delay=1) as bar:

        def advance(count: int) -> None:
            nonlocal seen, silent
            bar.update(count)
            seen += count
            taken = time.monotonic() - began
            if bar.disable and silent and seen and taken > _SURE:
                silent = False
                rest = taken * (total - seen) / seen
                if rest > _LONG:
                    _log.warning(
                        "%s will take about %s at this pace: %s %ss", desc, _shown(taken + rest), f"{total:,}", unit
                    )

        yield advance


def _shown(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
