"""HookedTransformer and its parts: TransformerLens's own (3.9), or ours of the same shape, where it has none (4.x).

Nothing else in the package asks which TransformerLens is installed.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    _installed = version("transformer-lens")
except PackageNotFoundError:
    _installed = "none"
_release = tuple(int(part) for part in _installed.split(".")[:2] if part.isdigit())
if not (3, 9) <= _release < (5,):
    raise ImportError(
        f"hijack-lens needs transformer-lens >=3.9,<5, found {_installed}. "
        "Install it with: pip install 'transformer-lens>=3.9,<5'"
    )

CENTRED_NORMS: tuple[type[Any], ...]
"""Norms that subtract the mean."""
RMS_NORMS: tuple[type[Any], ...]
"""Norms that do not."""
GROUPED_ATTENTION: tuple[type[Any], ...]
"""Attention whose heads share keys and values."""

__all__ = [
    "CENTRED_NORMS",
    "GROUPED_ATTENTION",
    "RMS_NORMS",
    "Attention",
    "HookedTransformer",
    "HookedTransformerConfig",
]

if TYPE_CHECKING:
    from hijack_lens.hooked.attention import Attention
    from hijack_lens.hooked.config import HookedTransformerConfig
    from hijack_lens.hooked.transformer import HookedTransformer


def __getattr__(name: str) -> Any:
    """TransformerLens takes seconds to import, and a grid's workers, say, may never need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_ours() if _release >= (4,) else _theirs())
    return globals()[name]


def _ours() -> dict[str, Any]:
    from hijack_lens.hooked.attention import Attention
    from hijack_lens.hooked.config import HookedTransformerConfig
    from hijack_lens.hooked.parts import LayerNorm, RMSNorm
    from hijack_lens.hooked.transformer import HookedTransformer

    norms = {"CENTRED_NORMS": (LayerNorm,), "RMS_NORMS": (RMSNorm,), "GROUPED_ATTENTION": ()}
    return norms | {kind.__name__: kind for kind in (Attention, HookedTransformer, HookedTransformerConfig)}


def _theirs() -> dict[str, Any]:
    from transformer_lens import HookedTransformer, components
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    return {
        "CENTRED_NORMS": (components.LayerNorm, components.LayerNormPre),
        "RMS_NORMS": (components.RMSNorm, components.RMSNormPre),
        "GROUPED_ATTENTION": (components.GroupedQueryAttention,),
        "Attention": components.Attention,
        "HookedTransformer": HookedTransformer,
        "HookedTransformerConfig": HookedTransformerConfig,
    }
