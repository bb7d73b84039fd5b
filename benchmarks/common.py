"""What the benchmarks share: the language, the machine, and where results go."""

import json
import os
import platform
from pathlib import Path

import torch

import hijack_lens as hl

RESULTS = Path(__file__).parent / "results"


def english() -> hl.BigramLanguage:
    return hl.BigramLanguage.from_text(hl.default_text())


def most_frequent(language: hl.BigramLanguage, count: int) -> list[str]:
    return [language.tokens[i] for i in language.pi_u.argsort(descending=True)[:count].tolist()]


def machine() -> dict:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))
