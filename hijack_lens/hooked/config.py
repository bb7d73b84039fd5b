"""The configuration of a HookedTransformer, where TransformerLens has none (4.x)."""

import math
from dataclasses import dataclass

from transformer_lens.config.transformer_lens_config import TransformerLensConfig

_SUPPORTED = {
    "attention_dir": ("causal",),
    "final_rms": (False,),
    "gated_mlp": (False,),
    "init_weights": (False,),
    "n_devices": (1,),
    "n_key_value_heads": (None,),
    "num_experts": (None,),
    "normalization_type": (None, "LN", "RMS"),
    "parallel_attn_mlp": (False,),
    "positional_embedding_type": ("standard", "rotary"),
    "ungroup_grouped_query_attention": (False,),
}
"""What this HookedTransformer can be, of what TransformerLens's could: by setting, the values that it takes."""


@dataclass(repr=False)
class HookedTransformerConfig(TransformerLensConfig):
    """The settings that TransformerLens 3.9 had for a HookedTransformer, as far as this one has them.

    Attributes:
        use_attn_scale: whether attention scores are divided by `attn_scale`.
        attn_scale: by default sqrt(d_head).
        use_attn_in: whether each head's input passes through `hook_attn_in`.
        use_hook_mlp_in: whether each MLP's input passes through `hook_mlp_in`.
        rotary_dim: with rotary positions, how many dimensions of a head are turned; by default all.
        rotary_base: with rotary positions, the base of their wavelengths.
        d_vocab_out: number of outputs; by default `d_vocab`.
        tokenizer_prepends_bos: whether the tokenizer begins texts with a token of its own, once there is one.
    """

    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    rotary_dim: int | None = None
    rotary_base: float = 10000
    d_vocab_out: int = -1
    tokenizer_prepends_bos: bool | None = None
    model_name: str = "custom"
    attention_dir: str = "causal"
    parallel_attn_mlp: bool = False
    ungroup_grouped_query_attention: bool = False
    init_weights: bool = False
    n_devices: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, taken in _SUPPORTED.items():
            if getattr(self, name) not in taken:
                raise ValueError(f"{name} must be one of {taken}, got {getattr(self, name)!r}")
        if self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head

    def __repr__(self) -> str:
        fields = "\n".join(f"    {name}={value!r}," for name, value in vars(self).items())
        return f"{type(self).__name__}(\n{fields}\n)"
