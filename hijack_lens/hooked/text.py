"""Text and tokens of a HookedTransformer."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.defaults_utils import LocallyOverridenDefaults
from transformer_lens.utilities.tokenize_utils import (
    get_attention_mask,
    get_input_with_manually_prepended_bos,
    get_tokens_with_bos_removed,
)

from hijack_lens.hooked.weights import StackedWeights


class TextAndTokens(StackedWeights):
    """TransformerLens's names for what a model's tokenizer does."""

    tokenizer: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Makes a transformers tokenizer the model's."""
        if default_padding_side not in ("left", "right", None):
            raise ValueError(f"default_padding_side must be 'left', 'right' or None, got {default_padding_side!r}")
        tokenizer.padding_side = default_padding_side or tokenizer.padding_side or "right"
        for name in ("pad_token", "bos_token"):
            if getattr(tokenizer, name) is None:
                setattr(tokenizer, name, tokenizer.eos_token)
        self.tokenizer = tokenizer
        self.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of a text, or of texts, padded to one length.

        Args:
            input: the text or texts.
            prepend_bos: whether to begin with the tokenizer's begin token; by default `cfg.default_prepend_bos`.
            padding_side: "left" or "right"; by default the tokenizer's.
            move_to_device: whether the ids go to the model's device.
            truncate: whether to cut what is longer than `cfg.n_ctx`.

        Raises:
            ValueError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"input must be token ids, since the model has no tokenizer, got {input!r:.80}")
        begins = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        with LocallyOverridenDefaults(self, padding_side=padding_side):
            if begins and not self.cfg.tokenizer_prepends_bos:
                input = get_input_with_manually_prepended_bos(self.tokenizer.bos_token, input)
            cut = {"truncation": True, "max_length": self.cfg.n_ctx} if truncate else {}
            tokens = self.tokenizer(input, return_tensors="pt", padding=True, **cut)["input_ids"]
            if self.cfg.tokenizer_prepends_bos and not begins:
                tokens = get_tokens_with_bos_removed(self.tokenizer, tokens)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def as_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of texts, or those given, on the model's device."""
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos, padding_side)
        return (tokens[None] if tokens.ndim == 1 else tokens).to(self.cfg.device)

    def padding_mask(
        self, tokens: Int[Tensor, "batch pos"], prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Int[Tensor, "batch pos"]:
        """0 where a token is padding, else 1."""
        if self.tokenizer is None:
            return torch.ones_like(tokens)
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            return get_attention_mask(self.tokenizer, tokens, self.cfg.default_prepend_bos)

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of tokens, [pos], or the texts of a batch, [batch, pos]."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [str(self.to_string(row)) for row in ids]
        if ids.ndim > 2:
            raise ValueError(f"tokens must be [pos] or [batch, pos], got shape {tuple(ids.shape)}")
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        input: str | list | np.ndarray | Int[Tensor, "..."],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> list[str] | list[list[str]]:
        """Each token of a text, or of token ids, as text; of a list of those, a list each."""
        if isinstance(input, list):
            rows: Any = [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
            return rows
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        ids = torch.as_tensor(input).squeeze()
        if ids.ndim > 1:
            raise ValueError(f"input must be one prompt, got shape {tuple(ids.shape)}")
        return [str(self.to_string(token[None])) for token in ids.reshape(-1)]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token."""
        tokens = self.to_tokens(string, prepend_bos=False)
        if tokens.numel() != 1:
            raise ValueError(f"string must be a single token, got {string!r}, which is {tokens.numel()}")
        return int(tokens)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return str(self.to_string(torch.tensor([int_token])))

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, "..."],
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """The first or last position of a token in a prompt."""
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', got {mode!r}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        tokens = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else input
        if tokens.ndim > 1 and len(tokens) > 1:
            raise ValueError(f"input must be one prompt, got shape {tuple(tokens.shape)}")
        found = (tokens.reshape(-1) == token).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"single_token {single_token!r} does not occur in the input")
        return found[0 if mode == "first" else -1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The unembedding of tokens."""
        index: Any = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        if isinstance(index, Tensor) and index.numel() == 1:
            index = int(index)
        return self.W_U.T[index]
