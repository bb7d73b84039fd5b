"""HookedTransformer and its parts: TransformerLens's own (3.9), or ours of the same shape, where it has none (4.x).

Nothing else in the package asks which TransformerLens is installed.
"""

from typing import TYPE_CHECKING, Any

from hijack_lens.core.installed import TRANSFORMER_LENS

CENTRED_NORMS: tuple[type[Any], ...]
"""Norms that subtract the mean."""
RMS_NORMS: tuple[type[Any], ...]
"""Norms that do not."""
GROUPED_ATTENTION: tuple[type[Any], ...]
"""Attention whose heads share keys and values."""

if TYPE_CHECKING or TRANSFORMER_LENS >= (4,):
    from hijack_lens.hooked.attention import Attention
    from hijack_lens.hooked.config import HookedTransformerConfig
    from hijack_lens.hooked.parts import LayerNorm, RMSNorm
    from hijack_lens.hooked.transformer import HookedTransformer

    CENTRED_NORMS, RMS_NORMS, GROUPED_ATTENTION = (LayerNorm,), (RMSNorm,), ()
else:
    from transformer_lens import HookedTransformer
    from transformer_lens.components import (
        Attention,
        GroupedQueryAttention,
        LayerNorm,
        LayerNormPre,
        RMSNorm,
        RMSNormPre,
    )
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    CENTRED_NORMS, RMS_NORMS = (LayerNorm, LayerNormPre), (RMSNorm, RMSNormPre)
    GROUPED_ATTENTION = (GroupedQueryAttention,)

__all__ = [
    "CENTRED_NORMS",
    "GROUPED_ATTENTION",
    "RMS_NORMS",
    "Attention",
    "HookedTransformer",
    "HookedTransformerConfig",
]
