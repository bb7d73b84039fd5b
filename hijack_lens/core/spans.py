"""Parts of a prompt that users name: by text, by positions, or by what comes before the last sentence."""

import re
from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_text, shown
from hijack_lens.core.inputs import indices
from hijack_lens.core.texts import UNDECODED, decoded, known_ids, spellings, tokenizer_of

Span = str | int | Iterable[str | int] | Int[Tensor, "word"] | None
"""A part of a prompt: a text, or several, wherever they occur; or positions, negative ones counted from the end."""

_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s+|\n+")


def positions_of(model: Any, ids: Int[Tensor, "pos"], given: Span, name: str) -> list[int]:
    """The positions of a part of a prompt, in order.

    A text is found in the text of the prompt's tokens, within words too, and stands for every token with some of it.

    Raises:
        TypeError, ValueError: for what is neither text nor positions, and for what the prompt does not hold.
    """
    if is_text(given):
        texts: Any = [given] if isinstance(given, str) else given
        return sorted({position for text in texts for position in _of_text(model, ids, text, name)})
    if isinstance(given, (list, tuple)) and not given:
        raise ValueError(f"{name} must hold at least one text or position, got none")
    if as_int(given) is None and not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a text of the prompt, or positions in it, got {shown(given)}")
    return sorted(set(indices(name, given, len(ids), f"the prompt has {len(ids)} tokens")))


def is_text(given: object) -> bool:
    """Whether a part of a prompt is named by one or several texts."""
    several = isinstance(given, (list, tuple)) and len(given) > 0 and all(isinstance(one, str) for one in given)
    return isinstance(given, str) or several


def before_last_sentence(model: Any, ids: Int[Tensor, "pos"]) -> list[int]:
    """The positions of all that comes before a prompt's last sentence; none, if it is the only one."""
    text, spans = _pieces(model, ids)
    ends = [match.end() for match in _SENTENCE_END.finditer(text.rstrip())]
    # A space before a word belongs to the word's token.
    return [at for at, (start, _) in enumerate(spans) if ends and start < len(text[: ends[-1]].rstrip())]


def _of_text(model: Any, ids: Int[Tensor, "pos"], wanted: str, name: str) -> list[int]:
    if tokenizer_of(model) is None:
        raise ValueError(f"{name} is the text {shown(wanted)}, but the model has no tokenizer: give positions")
    text, spans = _pieces(model, ids)
    sought = check_text(name, wanted).strip()
    # Occurrences may overlap.
    found = [(at.start(), at.start() + len(sought)) for at in re.finditer(f"(?={re.escape(sought)})", text) if sought]
    if not found:
        raise ValueError(f"{name} must be a part of the prompt, got {shown(wanted)}, which it does not hold")
    return [at for at, (start, end) in enumerate(spans) if any(first < end and start < last for first, last in found)]


_PIECES = 8
"""The most tokens that one character is cut into."""


def _pieces(model: Any, ids: Int[Tensor, "pos"]) -> tuple[str, list[tuple[int, int]]]:
    """A prompt's text, and where in it each token stands; the pieces of a character all stand where it does."""
    between = joiner(model, ids)
    text, spans, waiting = "", [], []
    for token in ids.tolist():
        waiting.append(token)
        piece = decoded(model.tokenizer, waiting)[0] if len(waiting) == 1 else model.tokenizer.decode(waiting)
        whole = UNDECODED not in model.tokenizer.decode(waiting)
        if not whole and len(waiting) < _PIECES:
            continue
        spans += [(len(text), len(text) + len(piece))] * len(waiting)
        text, waiting = text + piece + between, []
    return text, spans + [(len(text), len(text))] * len(waiting)


def joiner(model: Any, tokens: Int[Tensor, "pos"]) -> str:
    """What stands between tokens: nothing if they contain their own spaces."""
    own = getattr(getattr(model, "language", None), "joiner", None)
    tokenizer = tokenizer_of(model)
    if own is not None or tokenizer is None:
        return " " if own is None else own
    whole = [i for i in tokens.tolist() if UNDECODED not in tokenizer.decode([i])]  # the others are parts of characters
    return "" if "".join(tokenizer.decode([i]) for i in whole) == tokenizer.decode(whole) else " "


def token_runs(model: Any, given: str | Iterable[str], name: str) -> list[list[int]]:
    """The token ids that stand for some texts within a prompt: with a space before, and without."""
    if tokenizer_of(model) is None:
        raise ValueError(f"{name} is text, but the model has no tokenizer: give positions")
    found = []
    for text in [given] if isinstance(given, str) else given:
        known = [ids for spelled in spellings(check_text(name, text)) if (ids := known_ids(model, spelled))]
        if not known:
            raise ValueError(f"{name} must be words that the model's tokenizer knows, got {shown(text)}")
        found += known
    return found
