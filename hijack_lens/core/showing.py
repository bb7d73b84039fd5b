"""Which module registers how results are shown: named by the package, imported when the first result is shown."""

import importlib

_module: str | None = None


def shown_by(module: str) -> None:
    """Names the module that registers how results are shown."""
    global _module
    _module = module


def registered() -> None:
    """Imports that module."""
    if _module is not None:
        importlib.import_module(_module)
