"""The two-layer architecture: a HookedTransformer that knows its language and its circuit."""

import warnings
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

from hijack_lens.circuit import TWO_LAYER_CIRCUIT, Circuit
from hijack_lens.language import BigramLanguage, Token
from hijack_lens.models.relative_attention import RelativeAttention
from hijack_lens.models.tokenizer import hf_tokenizer
from hijack_lens.theory import Strengths
from hijack_lens.theory.closed_form import Positions


class TwoLayerTransformer(HookedTransformer):
    """A HookedTransformer of two layers over the vocabulary of a bigram language.

    All of TransformerLens works on it. Beyond that, text that the language cannot encode and prompts longer
    than `n_ctx` are refused, where TransformerLens would truncate them.

    Attributes:
        language: its vocabulary, and the bigrams it was written or trained for.
        circuit: the components that carry the two memories.
        positions: "relative" (layer 0 has `RelativeAttention`) or "absolute".
        strengths: of its memories, for a model written by hand; else `None`.
        triggers: token ids that its induction head was written to match; else `None`.
        n_ctx_train: with absolute positions, the last position whose predecessor it knows; else `None`.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig,
        language: BigramLanguage,
        *,
        positions: Positions = "relative",
        n_offsets: int = 2,
        circuit: Circuit = TWO_LAYER_CIRCUIT,
        strengths: Strengths | None = None,
        triggers: list[Token] | None = None,
        n_ctx_train: int | None = None,
    ):
        with warnings.catch_warnings():
            # Known, and the reason for the bound on transformer-lens; a user cannot act on it.
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            super().__init__(cfg, tokenizer=hf_tokenizer(language), default_padding_side="right")
        self.language = language
        self.circuit = circuit
        self.positions: Positions = positions
        self.strengths = strengths
        self.triggers = triggers
        self.n_ctx_train = n_ctx_train
        if positions == "relative":
            self.blocks[0].attn = RelativeAttention(self.cfg, n_offsets, layer_id=0).to(self.cfg.device)
            self.setup()  # without it the new attention's hook points never fire

    def to_tokens(self, input: str | list[str], *args: Any, **kwargs: Any) -> Int[Tensor, "batch pos"]:
        """TransformerLens's `to_tokens`, refusing what it would cut short, pad or fail on.

        Raises:
            ValueError: for text outside the vocabulary, too long for `n_ctx`, or of several lengths.
        """
        texts = [input] if isinstance(input, str) else input
        pieces = [self.language.tokenize(text) for text in texts]
        lengths = sorted({len(piece) for piece in pieces})
        if not lengths or lengths[0] == 0:
            raise ValueError(f"input must hold at least one token, got {input!r}")
        if lengths[-1] > self.cfg.n_ctx:
            raise ValueError(f"input is {lengths[-1]} tokens long; the model takes at most n_ctx={self.cfg.n_ctx}")
        if len(lengths) > 1:
            raise ValueError(f"input texts must be equally long, got {lengths} tokens: the vocabulary has no padding")
        joined = [self.language.joiner.join(piece) for piece in pieces]
        return super().to_tokens(joined[0] if isinstance(input, str) else joined, *args, **kwargs)

    def input_to_embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The first residual stream; refuses prompts longer than `n_ctx`."""
        if isinstance(input, Tensor) and input.shape[-1] > self.cfg.n_ctx:
            raise ValueError(f"input is {input.shape[-1]} tokens long; the model takes at most n_ctx={self.cfg.n_ctx}")
        return super().input_to_embed(input, *args, **kwargs)
