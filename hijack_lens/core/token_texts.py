"""What people see of a single token."""

import re
from collections.abc import Sequence
from typing import Any

UNDECODED = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)}
"""Bytes by the characters that byte-level tokenizers write for them."""


def token_texts(model: Any, ids: Sequence[int]) -> list[str]:
    """Each token's text by itself. A piece of a character has none, and is shown as its bytes."""
    tokenizer = model.tokenizer
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [
        _bytes_of(tokenizer.convert_ids_to_tokens(i), text) if UNDECODED in text else text
        for i, text in zip(ids, texts, strict=True)
    ]


def _bytes_of(token: str | None, text: str) -> str:
    """A token's bytes: one as "<0xF0>", or those that a byte-level tokenizer writes as letters; else its `text`."""
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token or ""):
        return rf"\x{fallback[1].lower()}"
    if token and _BYTES.keys() >= set(token):
        return bytes(map(_BYTES.__getitem__, token)).decode(errors="backslashreplace")
    return text
