"""Which TransformerLens is installed; an `ImportError` if it is none that this library works with."""

from importlib.metadata import PackageNotFoundError, version

try:
    _found = version("transformer-lens")
except PackageNotFoundError:
    _found = "none"
TRANSFORMER_LENS = tuple(int(part) for part in _found.split(".")[:2] if part.isdigit())
"""Its release: (3, 9), ..."""

if not (3, 9) <= TRANSFORMER_LENS < (5,):
    raise ImportError(
        f"hijack-lens needs transformer-lens >=3.9,<5, found {_found}. "
        "Install it with: pip install 'transformer-lens>=3.9,<5'"
    )
