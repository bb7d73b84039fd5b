"""Files that are written whole or not at all, and read without trusting them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file under another name and then moves it into place, so that no reader sees a part of it."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A safetensors file's tensors, and the header that says it is of our `kind`.

    Raises:
        ValueError: for any other file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("hijack_lens", "null"))
            ours = isinstance(header, dict) and header.get("format") == kind
            tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if not ours:
        raise ValueError(f"{path} is not a {kind} file")
    return tensors, header
