"""Runs every notebook top to bottom in a fresh kernel; fails on an error, and where one was not committed executed.

With --write, stores the outputs: that is how a notebook is executed for a commit.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

write = sys.argv[1:] == ["--write"]
for path in sorted(Path("notebooks").glob("*.ipynb")):
    started = time.time()
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not write and any(cell.execution_count is None for cell in code):
        sys.exit(f"{path}: commit it executed")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    if write:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps, different at every run
        nbformat.write(notebook, path)
    print(f"{path}: {len(code)} cells in {time.time() - started:.0f} s")
