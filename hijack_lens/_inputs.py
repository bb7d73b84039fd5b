"""From what a user calls a prompt to token ids on the model's device."""

from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from hijack_lens._checks import check_tokens


def model_tokens(model: Any, prompt: object, name: str = "tokens") -> Int[Tensor, "batch pos"]:
    """Token ids for a model, from text, a list of texts, a `HijackPrompt` or tokens.

    Raises:
        TypeError, ValueError: for what is none of these, and for tokens that the model cannot take.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer: give token ids")
        prompt = model.to_tokens(texts)
    tokens = check_tokens(name, getattr(prompt, "tokens", prompt), model.cfg.d_vocab, model.cfg.n_ctx)
    return (tokens if tokens.ndim == 2 else tokens[None]).to(model.cfg.device)


def is_single(prompt: Any) -> bool:
    """Whether what a user calls a prompt is one, rather than a batch."""
    tokens = getattr(prompt, "tokens", prompt)
    if isinstance(tokens, Tensor):
        return tokens.ndim == 1
    return isinstance(tokens, str) or (np.ndim(tokens) == 1 and not isinstance(tokens[0], str))
