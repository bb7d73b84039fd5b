"""From what a user calls a prompt to token ids on the model's device."""

from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from hijack_lens._checks import as_int, check_tokens


def model_tokens(model: Any, prompt: object, name: str = "tokens") -> Int[Tensor, "batch pos"]:
    """Token ids for a model, from text, a list of texts, a `HijackPrompt` or tokens.

    Raises:
        TypeError, ValueError: for what is none of these, and for tokens that the model cannot take.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer: give token ids")
        prompt = model.to_tokens(texts, truncate=False)  # what is too long is refused below, not cut
    tokens = check_tokens(name, getattr(prompt, "tokens", prompt), model.cfg.d_vocab, model.cfg.n_ctx)
    return (tokens if tokens.ndim == 2 else tokens[None]).to(model.cfg.device)


def single_token(model: Any, name: str, token: object) -> int:
    """The id of a token given by its id or its text; not that the vocabulary has it.

    Raises:
        TypeError, ValueError: for what is neither, and text that is not a single token.
    """
    if isinstance(token, str):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"{name} holds the text {token!r}, but the model has no tokenizer: give token ids")
        try:
            return model.to_single_token(token)
        except AssertionError as error:
            raise ValueError(f"{name} holds {token!r}, which is not a single token of the model's") from error
    number = as_int(token)
    if number is None:
        raise TypeError(f"{name} must be tokens, each a text or an id, got {token!r:.80}")
    return number


def text_tokens(model: Any, text: str, name: str) -> Int[Tensor, "pos"]:
    """Token ids of one text, begun as the model's prompts are.

    Raises:
        ValueError: for words that the tokenizer does not know, for what is too long, and without a tokenizer.
    """
    ids = model_tokens(model, text, name)[0]
    if knows(model, plain_ids(model, text), text):
        return ids
    raise ValueError(f"{name} must be of words that the model's tokenizer knows, got {text!r:.80}")


def plain_ids(model: Any, text: str) -> list[int]:
    """Token ids of a text by itself, with nothing before or after it."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.encode(text).tolist()
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def knows(model: Any, ids: list[int], text: str) -> bool:
    """Whether none of a text's tokens stands for a word that the tokenizer lacks."""
    unknown = model.tokenizer.unk_token
    return unknown is None or unknown in text or model.tokenizer.unk_token_id not in ids


def is_single(prompt: Any) -> bool:
    """Whether what a user calls a prompt is one, rather than a batch."""
    tokens = getattr(prompt, "tokens", prompt)
    if isinstance(tokens, Tensor):
        return tokens.ndim == 1
    return isinstance(tokens, str) or (np.ndim(tokens) == 1 and not isinstance(tokens[0], str))
