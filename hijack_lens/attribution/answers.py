"""The tokens whose logits are attributed, and what a reader calls them."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hijack_lens._checks import as_int, check_tokens
from hijack_lens._inputs import single_token


def answer_ids(model: Any, answers: object, name: str = "answers", at_least: int = 2) -> Int[Tensor, "answer"]:
    """Ids of different tokens, each given by its id or its text; by default two, for one logit alone says nothing.

    Raises:
        TypeError, ValueError: for what is no token of the model's, and for fewer different ones.
    """
    if isinstance(answers, str) or not isinstance(answers, Iterable) or as_int(answers) is not None:
        raise TypeError(f"{name} must be a list of tokens, each a text or an id, got {answers!r:.80}")
    ids = [single_token(model, name, answer) for answer in answers]
    if len(set(ids)) < max(at_least, len(ids)):
        count = "two or more" if at_least == 2 else "one or several"
        raise ValueError(f"{name} must be {count} different tokens, got {answers!r:.80}")
    return check_tokens(name, ids, model.cfg.d_vocab).to(model.cfg.device)


def whole_vocab(model: Any) -> tuple[str, ...] | None:
    """The text of every token, where the model has a tokenizer or a language."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.tokens
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tuple(tokenizer.batch_decode([[i] for i in range(model.cfg.d_vocab)]))


def texts_of(model: Any, ids: Int[Tensor, "..."]) -> dict[int, str] | None:
    """The texts of some tokens by their ids: with large vocabularies all of them would take longer than the rest."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else {i: tokenizer.decode([i]) for i in sorted(set(ids.flatten().tolist()))}
