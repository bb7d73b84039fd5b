"""The two-layer model as a HookedTransformer."""

from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.relative_attention import RelativeAttention
from hijack_lens.models.two_layer import TwoLayerTransformer

__all__ = ["RelativeAttention", "TwoLayerTransformer", "associative_transformer"]
