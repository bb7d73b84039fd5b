"""The tokens whose logits are attributed, and what a reader calls them."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hijack_lens._checks import as_int, check_tokens


def answer_ids(model: Any, answers: object) -> Int[Tensor, "answer"]:
    """Token ids of answers, each given by its id or its text.

    Raises:
        TypeError, ValueError: for what is no token of the model's, and for fewer than two different ones: a single
            logit says nothing, only differences do.
    """
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        raise TypeError(f"answers must be a list of tokens, each a text or an id, got {answers!r:.80}")
    ids = [_id(model, answer) for answer in answers]
    if len(set(ids)) < max(2, len(ids)):
        raise ValueError(f"answers must be two or more different tokens, got {answers!r:.80}")
    return check_tokens("answers", ids, model.cfg.d_vocab).to(model.cfg.device)


def _id(model: Any, answer: object) -> int:
    if isinstance(answer, str):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"answers holds the text {answer!r}, but the model has no tokenizer: give token ids")
        try:
            return model.to_single_token(answer)
        except AssertionError as error:
            raise ValueError(f"answers holds {answer!r}, which is not a single token of the model's") from error
    number = as_int(answer)
    if number is None:
        raise TypeError(f"answers must be tokens, each a text or an id, got {answer!r:.80}")
    return number


def whole_vocab(model: Any) -> tuple[str, ...] | None:
    """The text of every token, where the model has a tokenizer or a language."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.tokens
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tuple(tokenizer.convert_ids_to_tokens(range(model.cfg.d_vocab)))


def texts_of(model: Any, ids: Int[Tensor, "..."]) -> dict[int, str] | None:
    """The texts of some tokens by their ids: with large vocabularies all of them would take longer than the rest."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else {i: tokenizer.decode([i]) for i in sorted(set(ids.flatten().tolist()))}
