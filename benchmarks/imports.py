"""What `import hijack_lens` adds to `import transformer_lens`: fresh processes, taking turns."""

import statistics
import subprocess
import sys
import time

from common import write

PAIRS = 10


def seconds(module: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


seconds("hijack_lens")  # files are read from the disk once before
times = {module: [] for module in ("transformer_lens", "hijack_lens")}
for pair in range(PAIRS):
    for module in sorted(times, reverse=bool(pair % 2)):
        times[module].append(seconds(module))
ratios = [ours / theirs for ours, theirs in zip(times["hijack_lens"], times["transformer_lens"], strict=True)]
write(
    "imports",
    {
        "seconds": {module: statistics.median(values) for module, values in times.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "pairs": PAIRS,
    },
)
