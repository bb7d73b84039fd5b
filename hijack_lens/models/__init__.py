"""The two-layer model as a HookedTransformer, written by hand or trained, and any model opened as plain functions."""

from hijack_lens.models.architecture import Architecture, RelativeAttention
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.formed import Formed
from hijack_lens.models.loading import load_model
from hijack_lens.models.real import RealTransformer
from hijack_lens.models.trainable import trainable_transformer
from hijack_lens.models.transformer import BigramTransformer

__all__ = [
    "Architecture",
    "BigramTransformer",
    "Formed",
    "RealTransformer",
    "RelativeAttention",
    "associative_transformer",
    "load_model",
    "trainable_transformer",
]
