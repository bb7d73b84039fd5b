"""Runs every notebook top to bottom in a fresh kernel; fails on an error, and where one was not committed executed.

With --write, stores the outputs: that is how a notebook is executed for a commit. Names of notebooks may follow.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

write = "--write" in sys.argv[1:]
named = [Path(name) for name in sys.argv[1:] if name != "--write"]


def run(path: Path) -> str:
    """Runs one notebook; what to print of it."""
    started = time.time()
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not write and any(cell.execution_count is None for cell in code):
        raise SystemExit(f"{path}: commit it executed")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    if write:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps, different at every run
        nbformat.write(notebook, path)
    return f"{path}: {len(code)} cells in {time.time() - started:.0f} s"


# Each runs in a process of its own; the threads only wait for them.
with ThreadPoolExecutor(os.cpu_count()) as pool:
    for line in pool.map(run, named or sorted(Path("notebooks").glob("*.ipynb"))):
        print(line, flush=True)
