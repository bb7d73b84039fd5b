"""How much memory there is, and refusing what would take more before any of it is taken."""

from contextlib import suppress
from pathlib import Path

import psutil

from hijack_lens.core.checks import check_number

_LITTLE = 2**20
"""Bytes that are always there; asking the machine takes longer than filling them."""


def free_memory() -> int:
    """Bytes of memory that the machine, the container that this runs in, and the process's own limit still give."""
    free = psutil.virtual_memory().available
    own = psutil.Process()
    if hasattr(own, "rlimit"):  # Linux's `ulimit -v`
        limit, _ = own.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free = min(free, max(limit - own.memory_info().vms, 0))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such container, or no limit ("max")
            free = min(free, int(Path(limit).read_text()))
    return free


def check_memory(needed: int, remedy: str = "choose smaller", /, **sizes: object) -> None:
    """There is memory for what these arguments ask for, in bytes; to be called before any of it is taken."""
    if needed < _LITTLE:
        return
    free = free_memory()
    if needed > free:
        given = ", ".join(f"{name}={value!s:.80}" for name, value in sizes.items())
        raise ValueError(
            f"{given} would take {_shown_bytes(needed)} of memory, and {_shown_bytes(free)} are free: {remedy}"
        )


def memory_budget(memory_gb: object) -> float:
    """The argument `memory_gb` in bytes; finite, to be divided."""
    return min(check_number("memory_gb", memory_gb, positive=True) * 2**30, 2.0**62)


def _shown_bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count < 2**60 else "more than a million TiB"
