"""From what a user calls a token, an answer, a prompt, a position or a component to ids and sites."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_tokens
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import Site, check_hook_points, sites


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


def token_ids(model: Any, name: str, tokens: Any) -> Int[Tensor, "token"]:
    """Distinct ids of tokens given as ids or texts.

    Raises:
        TypeError, ValueError: for what is no token of the model's.
    """
    listed = [tokens] if isinstance(tokens, str) or as_int(tokens) is not None else tokens
    if not isinstance(listed, Iterable):
        raise TypeError(f"{name} must be token ids or texts, got {tokens!r:.80}")
    ids = [single_token(model, name, token) if isinstance(token, str) else token for token in listed]
    checked = check_tokens(name, ids, model.cfg.d_vocab)
    if len(checked.unique()) != len(checked):
        raise ValueError(f"{name} must be distinct, got {tokens!r:.80}")
    return checked.cpu()


def as_positions(positions: Any) -> list[int] | None:
    """A list of positions, or `None` for all."""
    if positions is None:
        return None
    single = as_int(positions)
    if single is not None:
        return [single]
    if not isinstance(positions, Iterable) or isinstance(positions, str):
        raise TypeError(f"positions must be an int or several, got {positions!r}")
    listed = []
    for position in positions:
        number = as_int(position)
        if number is None:
            raise TypeError(f"positions must be ints, got {position!r}")
        listed.append(number)
    if not listed:
        raise ValueError("positions must hold at least one position, got none; None means all")
    return listed


def answer_tokens(model: Any, answer: str, foil: str) -> list[int]:
    """The tokens of two answers: as they are written where both are single tokens, else both with a space before them.

    Raises:
        ValueError: where neither makes them two different tokens that the tokenizer knows.
    """
    texts = {"answer": answer, "foil": foil}
    for option, text in texts.items():
        if not text.strip() or not knows(model, plain_ids(model, text), text):
            raise ValueError(f"--{option} must be a token that the model's tokenizer knows, got {text!r}")
    written = {option: plain_ids(model, text) for option, text in texts.items()}
    chosen = written
    if not _are_single(written):
        chosen = {option: plain_ids(model, f" {text}") for option, text in texts.items()}
    if not _are_single(chosen):
        option, ids = next((option, ids) for option, ids in written.items() if len(ids) != 1)
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(
            f"--{option} must be a single token of the model's, got {texts[option]!r}, which it reads as {pieces}"
        )
    if chosen["answer"] == chosen["foil"]:
        raise ValueError(f"--answer and --foil must be different tokens, got {answer!r} and {foil!r}")
    return [token for ids in chosen.values() for token in ids]


def spaced_instead(model: Any, text: str, token: int) -> str | None:
    """The single token that a text would be with a space before it, where that is another than the one taken."""
    if text.startswith(" ") or getattr(model, "language", None) is not None:
        return None
    ids = plain_ids(model, f" {text}")
    return model.tokenizer.decode(ids) if len(ids) == 1 and ids[0] != token else None


def _are_single(ids: dict[str, list[int]]) -> bool:
    return all(len(one) == 1 for one in ids.values())


_EXPECTED = "a Circuit, Components, names of hook points, or a mapping from names to these"


@dataclass(frozen=True)
class Player:
    """What is present or absent as a whole.

    Attributes:
        label: what to call it.
        parts: its heads and MLPs, or names of hook points.
    """

    label: str
    parts: tuple[Component | str, ...]


def players_of(model: Any, components: Any) -> tuple[Player, ...]:
    """The players that a user's `components` name, in their order.

    Raises:
        TypeError, ValueError: for what names no component, or one of them twice.
    """
    if components is None:
        components = getattr(model, "circuit", None)
        if components is None:
            raise ValueError(f"components must be given, since the model has no circuit of its own: {_EXPECTED}")
    circuit = components if isinstance(components, Circuit) else getattr(model, "circuit", None) or Circuit()
    if isinstance(components, Mapping):
        for label in components:
            if not isinstance(label, str):
                raise TypeError(f"components must have names as keys, got {label!r:.80}")
        players = tuple(Player(label, _parts(f"components[{label!r}]", part)) for label, part in components.items())
    else:
        # A component may play several roles, and is still one.
        listed = dict.fromkeys(part for _, part in circuit) if isinstance(components, Circuit) else components
        players = tuple(
            Player(part if isinstance(part, str) else circuit.label(part), (part,))
            for part in _parts("components", listed)
        )
    if not players:
        raise ValueError("components must name at least one, got none")
    return players


def sites_of(model: Any, players: Sequence[Player]) -> dict[str, list[Site]]:
    """Where each player's outputs are, by its label.

    Raises:
        TypeError, ValueError: for components that the model lacks, or whose edits it would ignore; and where two
            overlap, so that one cannot be absent while the other is present.
    """
    found = [sites(model, player.parts) for player in players]
    named = list(zip((part for player in players for part in player.parts), chain.from_iterable(found), strict=True))
    check_hook_points(model, (site.name for _, site in named))
    points = model.hook_dict
    for (first, at), (second, there) in combinations(named, 2):
        # By the point itself, since a bridge has several names for one.
        same_point = points[at.name] is points[there.name]
        if same_point and (at.head is None or there.head is None or at.head == there.head):
            raise ValueError(f"components must not overlap, got {first} and {second}")
    return dict(zip((player.label for player in players), found, strict=True))


def _parts(argument: str, value: Any) -> tuple[Component | str, ...]:
    if not isinstance(value, (Component, str, Iterable)):
        raise TypeError(f"{argument} must be {_EXPECTED}, got {value!r:.80}")
    parts = (value,) if isinstance(value, (Component, str)) else tuple(value)
    for part in parts:
        if not isinstance(part, (Component, str)):
            raise TypeError(f"{argument} must hold Components or names of hook points, got {part!r:.80}")
    if not parts:
        raise ValueError(f"{argument} must name at least one, got none")
    return parts


def one_head(model: Any, head: Any, circuit: Circuit | None) -> Component:
    """The head that a user names, alone or in a role; by default the circuit's induction head.

    Raises:
        TypeError, ValueError: where that is not one head of the model.
    """
    if head is None:
        named = () if circuit is None else circuit.induction
        if len(named) != 1:
            raise ValueError(f"head must be given, since the circuit names {len(named)} induction heads")
        (head,) = named
    elif isinstance(head, (tuple, list)):
        if len(head) != 1:
            raise ValueError(f"head must be one head, got {len(head)}: {', '.join(map(str, head))}")
        (head,) = head
    if not isinstance(head, Component):
        raise TypeError(f"head must be a Component, got {head!r:.80}")
    if head.kind != "head":
        raise ValueError(f"head must be an attention head, got {head}")
    sites(model, head)  # refuses what the model lacks
    return head
