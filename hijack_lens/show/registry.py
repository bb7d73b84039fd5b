"""What shows a result: a function for its class, which the other files here register."""

from functools import singledispatch
from typing import Any

from hijack_lens.core.tables import Report
from hijack_lens.show.style import Picture


@singledispatch
def report_of(result: Any) -> Report:
    """What a result says of itself, as lines and tables.

    Raises:
        TypeError: for what is no result.
    """
    raise TypeError(f"result must be a result of hijack_lens, got {result!r:.80}")


@singledispatch
def picture_of(result: Any) -> Picture:
    """A result drawn.

    What may be chosen differs by result: `normalised=` of a `Sweep`, `key=` of a `ScoreAttribution`, `query_tokens=`
    and `answers=` of a `ContextMemory` or `MemoryConflict`, `most=` of `MemoryNeurons`.

    Raises:
        TypeError: for what is no result.
    """
    raise TypeError(f"result must be a result of hijack_lens with a picture, got {result!r:.80}")


@singledispatch
def html_of(result: Any) -> str | None:
    """A result for a notebook; `None` where its picture says it all."""
    return report_of(result).html()
