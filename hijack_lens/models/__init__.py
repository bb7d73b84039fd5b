"""The two-layer model as a HookedTransformer: written by hand, or to be trained."""

from hijack_lens.models.architecture import Architecture
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.relative_attention import RelativeAttention
from hijack_lens.models.trainable import two_layer_transformer
from hijack_lens.models.two_layer import TwoLayerTransformer

__all__ = [
    "Architecture",
    "RelativeAttention",
    "TwoLayerTransformer",
    "associative_transformer",
    "two_layer_transformer",
]
