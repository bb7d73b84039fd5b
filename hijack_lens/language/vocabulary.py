"""A vocabulary: its tokens, and text to token ids and back."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_choice, check_list, check_text, check_tokens, check_type, shown
from hijack_lens.core.tables import visible

UNKNOWN = "<unk>"
"""The token that stands for all that a vocabulary of words leaves out."""

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

Token = str | int
"""A token as a user writes it: its text, or its id."""

Triggers = Token | Sequence[Token] | None
"""Triggers as a user writes them: a token, several, or `None` for what is usual where they are asked for."""


def cut(text: str, level: str) -> list[str]:
    """A text's characters, or its words and punctuation marks."""
    return list(text) if level == "char" else _WORD.findall(text)


def listed_triggers(triggers: Any) -> tuple[Token, ...] | None:
    """Triggers as a tuple; `None`, which means every token, stays. A string is one token."""
    if isinstance(triggers, str) or as_int(triggers) is not None:
        triggers = (triggers,)
    return None if triggers is None else tuple(check_list("triggers", triggers, "a token or several"))


class Vocabulary:
    """The texts of `size` tokens, each a character or a word; the arguments are those of `BigramLanguage`."""

    def __init__(self, size: int, tokens: Sequence[str] | None, level: Literal["char", "word"] | None):
        what = "the texts of the tokens"
        names = [str(index) for index in range(size)] if tokens is None else check_list("tokens", tokens, what)
        if len(names) != size:
            raise ValueError(f"tokens must name all {size} rows of pi_b, got {len(names)} names")
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError("tokens must be non-empty strings")
        for name in names:
            check_text("tokens", name)
        if len(set(names)) != size:
            raise ValueError(f"tokens must be distinct, got {shown(Counter(names).most_common(1)[0][0])} twice")
        if level is None:
            level = "char" if all(len(name) == 1 for name in names) else "word"
        check_choice("level", level, ("char", "word"))
        # <unk> stands for many characters, so it alone may be longer than one.
        if level == "char" and (bad := [name for name in names if len(name) != 1 and name != UNKNOWN]):
            raise ValueError(f"tokens of a character-level language are single characters, got {shown(bad[0])}")
        if level == "word" and (bad := [name for name in names if name.split() != [name]]):
            raise ValueError(f"tokens of a word-level language hold no white space, got {shown(bad[0])}")
        self.tokens: tuple[str, ...] = tuple(names)
        self.level: Literal["char", "word"] = level
        self._ids = {name: index for index, name in enumerate(names)}

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def index(self, token: Token, name: str = "token") -> int:
        """The id of a token given as text or as id.

        Raises:
            ValueError: naming `name`, if the vocabulary has no such token.
        """
        check_type("name", name, str)
        if isinstance(token, str):
            if token not in self._ids and self.level == "word":
                token = token.strip()  # words bring no space
            if token not in self._ids:
                raise ValueError(f"{name} {shown(token)} is not one of the language's {self.d_vocab} tokens")
            return self._ids[token]
        number = as_int(token)
        if number is None:
            raise TypeError(f"{name} must be a token's text or its id, got {shown(token)}")
        if not 0 <= number < self.d_vocab:
            raise ValueError(f"{name} {shown(number)} is not a token id; ids run from 0 to {self.d_vocab - 1}")
        return number

    def trigger_ids(self, triggers: Any) -> Int[Tensor, "trigger"]:
        """Ids of the triggers; `None` means every token. A string is one token."""
        listed = listed_triggers(triggers)
        if listed is None:
            return torch.arange(self.d_vocab)
        ids = [self.index(token, "trigger") for token in listed]
        if len(set(ids)) != len(ids):
            raise ValueError(f"triggers must be distinct, got {shown(list(listed))}")
        return torch.tensor(ids, dtype=torch.long)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into the language's tokens.

        Words are cut at white space; a word outside the vocabulary is then split from its punctuation.

        Raises:
            TypeError, ValueError: for no text, and for a piece outside the vocabulary, unless the language has "<unk>".
        """
        text = check_text("text", text)
        if self.level == "char":
            pieces = cut(text, self.level)
        else:
            pieces = []
            for chunk in text.split():
                pieces += [chunk] if chunk in self._ids else cut(chunk, self.level)
        known = [piece if piece in self._ids or UNKNOWN not in self._ids else UNKNOWN for piece in pieces]
        for piece in known:
            if piece not in self._ids:
                raise ValueError(f"text holds {shown(piece)}, which is not one of the language's {self.d_vocab} tokens")
        return known

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        """Token ids of a text; `ValueError` for a piece outside the vocabulary."""
        return torch.tensor([self._ids[piece] for piece in self.tokenize(text)], dtype=torch.long)

    def decode(self, tokens: object) -> str:
        """The text of token ids: characters are joined directly, words by spaces."""
        if isinstance(tokens, Tensor) and tokens.numel() == 0:
            return ""
        return self.joiner.join(self.tokens[i] for i in check_tokens("tokens", tokens, self.d_vocab).flatten())

    @property
    def joiner(self) -> str:
        """What separates two tokens in a text."""
        return "" if self.level == "char" else " "

    def display(self, token: Token) -> str:
        """A token's text with white space made visible, for tables and pictures."""
        return visible(self.tokens[self.index(token)])
