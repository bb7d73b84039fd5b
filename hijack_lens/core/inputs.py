"""Turns what users pass as tokens, answers, prompts, positions, components or circuits into ids and sites."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_list, check_tokens, check_type, shown
from hijack_lens.core.circuit import ROLE_NAMES, Circuit, Component
from hijack_lens.core.hook_points import all_components, check_hook_points, check_model, sites
from hijack_lens.core.tables import visible

Tokens = int | str | Iterable[int | str] | Int[Tensor, "token"] | None
"""Tokens, each as an id or a text, in the user's order; or a single one. `None` is the default, often all tokens."""


def model_tokens(model: Any, prompt: object, name: str = "prompt") -> Int[Tensor, "batch pos"]:
    """Token ids for a model, from text, a list of texts, a `HijackPrompt` or tokens."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer: give token ids")
        try:
            prompt = model.to_tokens(texts, truncate=False)  # prompts that are too long are rejected below
        except Exception as error:  # of the tokenizer, by what the text holds
            raise ValueError(
                f"{name} must be text that the model's tokenizer can read, got {shown(texts)}: {error}"
            ) from error
    try:
        prompt = getattr(prompt, "tokens", prompt)
    except Exception as error:  # raised by an object's own __getattr__
        raise TypeError(f"{name} must be a text or tokens, got {shown(prompt)}") from error
    tokens = check_tokens(name, prompt, model.cfg.d_vocab, model.cfg.n_ctx)
    return (tokens if tokens.ndim == 2 else tokens[None]).to(model.cfg.device)


def single_prompt(model: Any, prompt: object) -> Int[Tensor, "1 pos"]:
    """Token ids of a single prompt, as a batch of one; a `ValueError` for several prompts."""
    tokens = model_tokens(model, prompt)
    if len(tokens) != 1:
        raise ValueError(f"prompt must be a single prompt, got a batch of {len(tokens)}: take them one by one")
    return tokens


def is_single(prompt: Any) -> bool:
    """Whether the user's `prompt` is a single prompt rather than a batch."""
    tokens = getattr(prompt, "tokens", prompt)
    if isinstance(tokens, Tensor):
        return tokens.ndim == 1
    return isinstance(tokens, str) or (np.ndim(tokens) == 1 and not isinstance(tokens[0], str))


def text_tokens(model: Any, text: str, name: str) -> Int[Tensor, "pos"]:
    """Token ids of one text, with the same beginning as the model's prompts (for example, a BOS token)."""
    ids = model_tokens(model, text, name)[0]
    if _knows(model, plain_ids(model, text), text):
        return ids
    raise ValueError(f"{name} must be of words that the model's tokenizer knows, got {shown(text)}")


def plain_ids(model: Any, text: str) -> list[int]:
    """Token ids of a text by itself, with nothing before or after it."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.encode(text).tolist()
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _knows(model: Any, ids: list[int], text: str) -> bool:
    """Whether the tokenizer knows every word of a text, so that no token stands for an unknown word."""
    unknown = model.tokenizer.unk_token
    return unknown is None or unknown in text or model.tokenizer.unk_token_id not in ids


def token_id(model: Any, name: str, token: object) -> int:
    """The id of a token given as an id or a text; does not check that the id is in the vocabulary."""
    if not isinstance(token, str):
        number = as_int(token)
        if number is None:
            raise TypeError(f"{name} must be tokens, each a text or an id, got {shown(token)}")
        return number
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(f"{name} holds the text {shown(token)}, but the model has no tokenizer: give token ids")
    try:
        ids = plain_ids(model, token)
    except Exception:  # of the tokenizer, by what the text holds
        ids = []
    if len(ids) != 1 or not _knows(model, ids, token):
        raise ValueError(f"{name} holds {shown(token)}, which is not a single token of the model's")
    return ids[0]


def token_ids(model: Any, name: str, tokens: Any, at_least: int = 1) -> Int[Tensor, "token"]:
    """Ids of distinct tokens in the order given, on the CPU; of the whole vocabulary for `None`.

    If one token is enough, it need not be in a list.
    """
    if tokens is None:
        return torch.arange(model.cfg.d_vocab)
    alone = at_least == 1 and (isinstance(tokens, str) or as_int(tokens) is not None)
    listed = [tokens] if alone else check_list(name, tokens, "a list of tokens, each a text or an id")
    ids = [token_id(model, name, token) for token in listed]
    if len(set(ids)) < max(at_least, len(ids)):
        count = "one or several" if at_least == 1 else "two or more"
        raise ValueError(f"{name} must be {count} different tokens, got {shown(tokens)}")
    return check_tokens(name, ids, model.cfg.d_vocab)


def answer_tokens(model: Any, answer: str, foil: str) -> list[int]:
    """The tokens of two answers: as written if both are single tokens, otherwise both with a leading space."""
    texts = {"--answer": answer, "--foil": foil}
    for option, text in texts.items():
        if not text.strip() or not _knows(model, plain_ids(model, text), text):
            raise ValueError(f"{option} must be a token that the model's tokenizer knows, got {shown(text)}")
    written = {option: plain_ids(model, text) for option, text in texts.items()}
    several = [option for option, ids in written.items() if len(ids) != 1]
    chosen = [plain_ids(model, f" {text}") for text in texts.values()] if several else list(written.values())
    if any(len(ids) != 1 for ids in chosen):
        pieces = [model.tokenizer.decode([i]) for i in written[several[0]]]
        raise ValueError(
            f"{several[0]} must be a single token of the model's, got {texts[several[0]]!r}, which it reads as {pieces}"
        )
    if chosen[0] == chosen[1]:
        raise ValueError(f"--answer and --foil must be different tokens, got {shown(answer)} and {shown(foil)}")
    return [*chosen[0], *chosen[1]]


def spaced_instead(model: Any, text: str, token: int) -> str | None:
    """The single token that a text would be with a leading space, if it differs from `token`; else `None`."""
    if text.startswith(" ") or getattr(model, "language", None) is not None:
        return None
    ids = plain_ids(model, f" {text}")
    return model.tokenizer.decode(ids) if len(ids) == 1 and ids[0] != token else None


def whole_vocab(model: Any) -> tuple[str, ...] | None:
    """The text of every token, if the model has a tokenizer or a language; else `None`."""
    language = getattr(model, "language", None)
    if language is not None:
        return language.tokens
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else tuple(tokenizer.batch_decode([[i] for i in range(model.cfg.d_vocab)]))


def texts_of(model: Any, ids: Int[Tensor, "..."]) -> dict[int, str] | None:
    """The texts of these tokens by id; decoding all of a large vocabulary would take longer than everything else."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else {i: tokenizer.decode([i]) for i in sorted(set(ids.flatten().tolist()))}


def prompt_texts(model: Any, ids: Int[Tensor, "pos"]) -> tuple[str, ...]:
    """The texts of a prompt's tokens, with white space made visible; their ids if the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return tuple(map(str, ids.tolist()))
    return tuple(map(visible, model.to_str_tokens(ids)))


def indices(name: str, given: Any, size: int | None = None, limit: str = "") -> list[int]:
    """Positions, layers, heads or neurons: one int or several, as a list.

    If `size`, their number, is given, `None` means all, and negative indices become non-negative ones. `limit`
    states the size in words; by default, what the model has.
    """
    given = range(size) if given is None and size is not None else given
    alone = as_int(given) is not None
    listed = [given] if alone else check_list(name, given, "an int or several")
    numbers = []
    for value in listed:
        number = as_int(value)
        if number is None:
            raise TypeError(f"{name} must be ints, got {shown(value)}")
        if size is not None and not -size <= number < size:
            raise ValueError(f"{name} holds {shown(number)}; {limit or f'the model has {size}'}")
        numbers.append(number if size is None else number % size)
    if not numbers:
        raise ValueError(f"{name} must hold at least one, got none; None means all")
    return numbers


def circuit_of(model: Any, circuit: Any = None, otherwise: Callable[[], Circuit] = Circuit) -> Circuit:
    """The given circuit, else the model's own, else what `otherwise` returns: by default, an empty circuit."""
    if circuit is None:
        circuit = _own_circuit(model) or otherwise()
    check_type("circuit", circuit, Circuit)
    sites(model, [component for _, component in circuit], name="circuit")
    return circuit


def _own_circuit(model: Any) -> Circuit | None:
    circuit = getattr(model, "circuit", None)
    return circuit if isinstance(circuit, Circuit) else None


Components = Component | Circuit | str | Iterable[Component | Circuit | str] | Mapping[str, Any]
"""What users may pass as components: see `players_of`."""

_PLACE = re.compile(r"L(\d{1,9})(?:H(\d{1,9})|MLP)")
_ONE = 'a Component, its place ("L0H1", "L2MLP") or the name of a role ("induction")'
_KINDS = {"head": "attention heads", "mlp": "MLPs", None: ""}


@dataclass(frozen=True)
class Player:
    """A set of components that is present or absent as a whole.

    Attributes:
        label: its name.
        parts: its heads and MLPs, or names of hook points.
    """

    label: str
    parts: tuple[Component | str, ...]


def players_of(
    model: Any,
    components: Any,
    circuit: Circuit | None = None,
    name: str = "components",
    kind: Literal["head", "mlp"] | None = None,
    points: bool = False,
) -> tuple[Player, ...]:
    """The players that the user's `components` name, in order.

    Args:
        model: the model that the components belong to.
        components: a `Component`, or its place ("L0H1", "L2MLP"); the name of a role ("induction"), whose components
            together are one player; several of these; a `Circuit`, or "all" heads and MLPs of the model, where each
            component is one player; a mapping from labels to any of these, one player per label. `None` is the circuit.
        circuit: the circuit that defines the roles and the components' labels; by default the model's own.
        name: the argument's name, for error messages.
        kind: the kind that all must have, if any; a `Circuit` or "all" then yields only components of this kind.
        points: whether any other text is taken as the name of a hook point.
    """
    check_model(model)
    circuit = circuit or _own_circuit(model) or Circuit()
    found = _players(model, circuit if components is None else components, circuit, name, kind, points)
    if not found:
        wanted = (
            "be given, since the model has no circuit that names any" if components is None else "name at least one"
        )
        raise ValueError(f"{name} must {wanted}, got none")
    for player in found:
        if not isinstance(player.label, str):
            raise TypeError(f"{name} must have names as keys, got {shown(player.label)}")
        if not player.parts:
            raise ValueError(f"{name}[{player.label!r}] must name at least one, got none")
        at = sites(model, player.parts, name=name)  # rejects what the model lacks
        if kind == "mlp":
            check_hook_points(model, (site.name for site in at))
    return tuple(found)


def components_of(model: Any, components: Any, *args: Any, **options: Any) -> tuple[Any, ...]:
    """The parts of all players, each once. Arguments and errors are those of `players_of`."""
    return _parts(players_of(model, components, *args, **options))


def one_component(model: Any, given: Any, name: str, others: Sequence[str] = (), circuit: Circuit | None = None) -> Any:
    """The component that the user names, directly or by a role that only it plays; or one of the names in `others`."""
    if isinstance(given, str) and given in others:
        check_model(model)
        return given
    if not isinstance(given, (Component, str, tuple, list)) or (isinstance(given, str) and not _is_name(given)):
        error = ValueError if isinstance(given, str) else TypeError
        raise error(f"{name} must be {', '.join([*map(repr, others), _ONE])}; got {shown(given)}")
    found = _parts(_players(model, given, circuit or _own_circuit(model) or Circuit(), name, None, False))
    if len(found) != 1:
        what = "head" if name == "head" else "component"
        raise ValueError(f"{name} must be one {what}, got {len(found)}: {', '.join(map(str, found))}")
    sites(model, found, name=name)  # rejects what the model lacks
    return found[0]


def one_head(model: Any, head: Any, circuit: Circuit) -> Component:
    """The head that the user names; by default the circuit's only induction head. Errors as for `one_component`."""
    if head is None and len(circuit.induction) != 1:
        raise ValueError(f"head must be given, since the circuit names {len(circuit.induction)} induction heads")
    found = one_component(model, circuit.induction if head is None else head, "head", circuit=circuit)
    if found.kind != "head":
        raise ValueError(f"head must be an attention head, got {found}")
    return found


def _parts(players: Iterable[Player]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(part for player in players for part in player.parts))


def _is_name(text: str) -> bool:
    return text in ROLE_NAMES or _PLACE.fullmatch(text) is not None


def _players(model: Any, given: Any, circuit: Circuit, name: str, kind: str | None, points: bool) -> list[Player]:
    if isinstance(given, Mapping):
        inside = [(label, f"{name}[{label!r}]", value) for label, value in given.items()]
        return [Player(label, _parts(_players(model, v, circuit, one, kind, points))) for label, one, v in inside]
    alone = isinstance(given, (Component, str, Circuit)) or not isinstance(given, Iterable)
    expected = f'{_ONE}, several of these, a Circuit, a mapping from labels to these, or "all"'
    listed = [given] if alone else check_list(name, given, expected)
    return [p for one in listed for p in _named(model, one, circuit, name, kind, points)]


def _named(model: Any, given: Any, circuit: Circuit, name: str, kind: str | None, points: bool) -> list[Player]:
    text = given if isinstance(given, str) else ""
    if isinstance(given, Circuit) or text == "all":
        members = all_components(model) if text else dict.fromkeys(member for _, member in given)
        return [Player(circuit.label(member), (member,)) for member in members if kind in (None, member.kind)]
    if text and points and not _is_name(text):
        return [Player(text, (text,))]
    if place := _PLACE.fullmatch(text):
        given = Component(int(place[1]), "head", int(place[2])) if place[2] else Component(int(place[1]), "mlp")
    parts = getattr(circuit, text) if text in ROLE_NAMES else (given,)
    if not parts:
        raise ValueError(f"{name} names {shown(text)}, a role that no component of the circuit plays")
    for part in parts:
        if not isinstance(part, Component):
            expected = f'{_ONE}, several of these, a Circuit, a mapping from labels to these, or "all"'
            expected += ", or names of hook points" * points
            raise (ValueError if text else TypeError)(f"{name} must be {expected}; got {shown(part)}")
        if kind not in (None, part.kind):
            raise ValueError(f"{name} must be {_KINDS[kind]}, got {part}")
    return [Player(circuit.role_label(text) if text in ROLE_NAMES else circuit.label(parts[0]), parts)]
