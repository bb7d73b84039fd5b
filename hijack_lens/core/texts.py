"""From text to token ids and back: whole prompts, and single tokens, as a model's tokenizer reads them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_text, check_type, shown
from hijack_lens.core.tables import visible

begins: ContextVar[bool | None] = ContextVar("whether texts begin with the begin token", default=None)
"""`None`: as the model's `to_tokens` has it."""


@contextmanager
def texts_begin(prepend_bos: bool | None) -> Iterator[None]:
    """As long as the context lasts, texts begin with the tokenizer's begin token, or do not; `None` changes nothing."""
    if prepend_bos is not None:
        check_type("prepend_bos", prepend_bos, bool)
    token = begins.set(begins.get() if prepend_bos is None else prepend_bos)
    try:
        yield
    finally:
        begins.reset(token)


def tokenizer_of(model: Any) -> Any:
    """A model's tokenizer; `None` where it has none, or the empty one that transformers makes up for a folder."""
    tokenizer = getattr(model, "tokenizer", None)
    return tokenizer if getattr(tokenizer, "vocab_size", 1) else None


def text_ids(model: Any, text: str, name: str) -> list[int]:
    """Token ids of a text, with the same beginning as the model's prompts (for example, a BOS token)."""
    text = check_text(name, text)
    if tokenizer_of(model) is None:
        raise ValueError(f"{name} is text, but the model has no tokenizer: give token ids")
    unknown = _unknown(model, text)
    if unknown:
        raise ValueError(
            f"{name} must be of words that the model's tokenizer knows, which lacks {', '.join(map(repr, unknown)):.80}"
        )
    prepend_bos = begins.get()
    if prepend_bos and getattr(model.tokenizer, "bos_token", None) is None:
        raise ValueError("prepend_bos must not be True: the model's tokenizer has no token that begins a text")
    asked = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    try:
        ids = model.to_tokens(text, truncate=False, **asked)[0].tolist()
    except ValueError as error:  # a model's own, of what it calls its input
        said = str(error)
        raise ValueError(f"{name}{said.removeprefix('input')}" if said.startswith("input ") else said) from error
    ids = [int(i) for i in ids]  # a tokenizer returns floats for an empty text
    begin = getattr(model.tokenizer, "bos_token_id", None)
    # A text that spells out the begin token, as chat templates do, has one already.
    twice = begin is not None and ids[:2] == [begin] * 2 and text.startswith(model.tokenizer.bos_token)
    return ids[1:] if twice else ids


def chat_ids(model: Any, messages: Sequence[Mapping[str, str]], name: str) -> list[int]:
    """Token ids of a chat by the tokenizer's own template, up to where the assistant's answer begins."""
    tokenizer: Any = tokenizer_of(model)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name} is a chat, but the model's tokenizer has no template for chats: give text")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # raised by the template, in words of its own
        raise ValueError(f"{name} must be a chat that the tokenizer's template takes, got {shown(messages)}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain_ids(model: Any, text: str) -> list[int]:
    """Token ids of a text by itself, with nothing before or after it."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.encode(text).tolist()
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def known_ids(model: Any, text: str) -> list[int] | None:
    """The same; `None` if the tokenizer lacks a word of the text."""
    try:
        ids = _plain_ids(model, text)
    except Exception:  # a language without "<unk>"; and tokenizers have no error of their own for words
        return None
    unknown = model.tokenizer.unk_token
    spelled_out = 0 if unknown is None else text.count(unknown)
    return ids if unknown is None or ids.count(model.tokenizer.unk_token_id) <= spelled_out else None


def _unknown(model: Any, text: str) -> list[str]:
    """The words of a text that the tokenizer lacks."""
    if known_ids(model, text) is not None:
        return []
    return [word for word in dict.fromkeys(text.split()) if known_ids(model, word) is None] or [text]


def spellings(text: str) -> tuple[str, ...]:
    """A token's text as a user may have written it: as it stands; else with a leading space, or without the one."""
    other = text[1:] if text.startswith(" ") else f" {text}"
    return (text, other) if text.strip() and not other.startswith("  ") and not text.startswith("  ") else (text,)


def token_id(model: Any, name: str, token: object, output: bool = False) -> int:
    """The id of a token given as an id or a text; does not check that the id is in the vocabulary.

    A text is read as it stands, if that is a single token; else with a leading space, or without the one that it has.

    Args:
        model: whose token; not used for an id.
        name: the argument's name, for error messages.
        token: what the user gives.
        output: whether it is one of the model's outputs, which have texts only if they are its tokens.
    """
    if not isinstance(token, str):
        number = as_int(token)
        if number is None:
            raise TypeError(f"{name} must be tokens, each a text or an id, got {shown(token)}")
        return number
    token = check_text(name, token)
    if tokenizer_of(model) is None:
        raise ValueError(f"{name} holds the text {shown(token)}, but the model has no tokenizer: give token ids")
    if output and not outputs_are_tokens(model):
        raise ValueError(
            f"{name} holds the text {shown(token)}, but the model's {n_outputs(model)} outputs are not its "
            f"{model.cfg.d_vocab} tokens: give ids of outputs"
        )
    for spelled in spellings(token):
        ids = known_ids(model, spelled)
        # "▁Paris" brings its space; where tokens do not, " a" is a space and an "a".
        if ids is not None and len(ids) == 1 and (spelled != token[1:] or _brings_space(model, ids[0])):
            return ids[0]
    pieces = known_ids(model, token)
    found = "does not know it" if pieces is None else f"reads it as {decoded(model.tokenizer, pieces)}"
    raise ValueError(f"{name} holds {shown(token)}, which is not a single token: the model's tokenizer {found:.80}")


def _brings_space(model: Any, token: int) -> bool:
    if getattr(model, "language", None) is not None:
        return False
    return visible(str(model.tokenizer.convert_ids_to_tokens(token))).startswith("␣")


def decoded(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token; of a piece of a character its bytes; its id where the tokenizer has no such token."""
    listed = list(ids)
    if not listed:
        return []  # as which tokenizers do not decode nothing
    pieces = tokenizer.convert_ids_to_tokens(listed)
    texts = [
        _bytes_of(piece, text) if UNDECODED in text else text
        for piece, text in zip(
            pieces, tokenizer.batch_decode([[i] for i in listed], clean_up_tokenization_spaces=False), strict=True
        )
    ]
    # Alone, "▁Paris" would lose its space.
    spaced = (
        " " * (str(piece).startswith("▁") and not text.startswith(" "))
        for piece, text in zip(pieces, texts, strict=True)
    )
    return [space + text or str(i) for space, text, i in zip(spaced, texts, listed, strict=True)]


UNDECODED = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)}
"""Bytes by the characters that byte-level tokenizers write for them."""


def _bytes_of(token: str | None, text: str) -> str:
    """A token's bytes: "<0xF0>" is one, and byte-level tokenizers write theirs as letters; else its `text`."""
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token or ""):
        return rf"\x{fallback[1].lower()}"
    if token and _BYTES.keys() >= set(token):
        return bytes(map(_BYTES.__getitem__, token)).decode(errors="backslashreplace")
    return text


def listed_ids(model: Any, name: str, tokens: Sequence[object], output: bool = False) -> list[int]:
    """The ids of several tokens; refuses texts that are the pieces of one word, given by mistake for its token."""
    ids = [token_id(model, name, token, output) for token in tokens]
    texts = [token for token in tokens if isinstance(token, str)]
    if len(texts) == len(tokens) > 1:
        word = "".join(texts)
        whole = known_ids(model, f" {word}")
        if known_ids(model, word) == ids and whole is not None and len(whole) == 1:
            raise ValueError(
                f"{name} holds {shown(texts)}, the pieces of {shown(word)} without a space before it; with one, "
                f"{shown(decoded(model.tokenizer, whole)[0])} is a single token"
            )
    return ids


def n_outputs(model: Any) -> int:
    """How many logits a position has; not always as many as there are tokens."""
    return int(model.W_U.shape[-1])


def outputs_are_tokens(model: Any) -> bool:
    """Whether output i stands for token i, as far as their numbers tell."""
    return n_outputs(model) == model.cfg.d_vocab


def spaced_instead(model: Any, text: str, token: int) -> str | None:
    """The single token that a text would be with a leading space, if it differs from `token`; else `None`."""
    ids = None if text.startswith(" ") else known_ids(model, f" {text}")
    return decoded(model.tokenizer, ids)[0] if ids is not None and len(ids) == 1 and ids[0] != token else None


def whole_vocab(model: Any) -> tuple[str, ...] | None:
    """The text of every token, if the model has a tokenizer or a language; else `None`."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.tokens
    tokenizer = tokenizer_of(model)
    return None if tokenizer is None else tuple(decoded(tokenizer, range(model.cfg.d_vocab)))


def texts_of(model: Any, ids: Int[Tensor, "..."]) -> dict[int, str] | None:
    """The texts of these tokens by id; decoding all of a large vocabulary would take longer than everything else."""
    tokenizer = tokenizer_of(model)
    chosen = sorted(set(ids.flatten().tolist()))
    return None if tokenizer is None else dict(zip(chosen, decoded(tokenizer, chosen), strict=True))
