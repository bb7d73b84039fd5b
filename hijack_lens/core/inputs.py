"""Turns what users pass as tokens, answers, prompts, positions, components or circuits into ids and sites."""

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
from hijack_lens.core.texts import chat_ids, decoded, listed_ids, n_outputs, text_ids, tokenizer_of

Tokens = int | str | Iterable[int | str] | Int[Tensor, "token"] | None
"""Tokens, each as an id or a text, in the user's order; or a single one. `None` is the default, often all tokens."""


def model_tokens(model: Any, prompt: object, name: str = "prompt") -> Int[Tensor, "batch pos"]:
    """Token ids for a model, from text, several texts of one length, a `HijackPrompt` or tokens.

    Texts are never padded, nor cut: each is read alone, with the same beginning as the model's prompts (for example, a
    BOS token). Ids are taken as they are. A chat, a list of {"role": ..., "content": ...}, is written out by the
    template of the model's tokenizer.
    """
    if isinstance(prompt, Mapping):
        held = f"{type(prompt).__name__} of {', '.join(map(repr, prompt))}"
        raise TypeError(f"{name} must be text or token ids, got a {held:.80}: give its ids, of prompts of one length")
    texts = _texts(prompt)
    given: Any = prompt
    if is_chat(given):
        given = chat_ids(model, given, name)
    try:
        ids = getattr(given, "tokens", given) if texts is None else [text_ids(model, text, name) for text in texts]
    except (TypeError, ValueError):
        raise
    except Exception as error:  # raised by an object's own __getattr__, or by the tokenizer
        raise TypeError(f"{name} must be text or tokens that can be read, got {shown(prompt)}: {error}") from error
    tokens = check_tokens(name, ids, model.cfg.d_vocab, model.cfg.n_ctx)
    return (tokens if tokens.ndim == 2 else tokens[None]).to(model.cfg.device)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a chat: messages, each with a role and content."""
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return listed and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in prompt)


def _texts(prompt: Any) -> list[str] | None:
    """The texts in a user's prompt; `None` if it is something else."""
    listed = prompt.tolist() if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "UO" else prompt
    listed = [listed] if isinstance(listed, str) else listed
    is_texts = isinstance(listed, (list, tuple)) and len(listed) > 0 and all(isinstance(text, str) for text in listed)
    return list(listed) if is_texts else None


def single_prompt(model: Any, prompt: object, name: str = "prompt") -> Int[Tensor, "1 pos"]:
    """Token ids of a single prompt, as a batch of one; a `ValueError` for several prompts."""
    tokens = model_tokens(model, prompt, name)
    if len(tokens) != 1:
        raise ValueError(f"{name} must be a single prompt, got a batch of {len(tokens)}: take them one by one")
    return tokens


def is_single(prompt: Any) -> bool:
    """Whether the user's `prompt` is a single prompt rather than a batch."""
    if is_chat(prompt):
        return True
    if _texts(prompt) is not None:
        return np.ndim(prompt) == 0
    return np.ndim(getattr(prompt, "tokens", prompt)) == 1


def token_ids(model: Any, name: str, tokens: Any, at_least: int = 1, output: bool = False) -> Int[Tensor, "token"]:
    """Ids of distinct tokens in the order given, on the CPU; of the whole vocabulary for `None`.

    If one token is enough, it need not be in a list. `output` says that they are the model's outputs.
    """
    size = n_outputs(model) if output else model.cfg.d_vocab
    if tokens is None:
        return torch.arange(size)
    alone = at_least == 1 and (isinstance(tokens, str) or as_int(tokens) is not None)
    listed = [tokens] if alone else check_list(name, tokens, "a list of tokens, each a text or an id")
    ids = listed_ids(model, name, listed, output)
    if len(set(ids)) < max(at_least, len(ids)):
        count = "one or several" if at_least == 1 else "two or more"
        raise ValueError(f"{name} must be {count} different tokens, got {shown(tokens)}")
    return check_tokens(name, ids, size)


def prompt_texts(model: Any, ids: Int[Tensor, "pos"]) -> tuple[str, ...]:
    """The texts of a prompt's tokens, with white space made visible; their ids if the model has no tokenizer."""
    if tokenizer_of(model) is None:
        return tuple(map(str, ids.tolist()))
    return tuple(map(visible, decoded(model.tokenizer, ids.tolist())))


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
        circuit = own_circuit(model) or otherwise()
    check_type("circuit", circuit, Circuit)
    sites(model, [component for _, component in circuit], name="circuit")
    return circuit


def own_circuit(model: Any) -> Circuit | None:
    """The circuit that a model brings, if it does."""
    circuit = getattr(model, "circuit", None)
    return circuit if isinstance(circuit, Circuit) else None


Components = Component | Circuit | str | Iterable[Component | Circuit | str] | Mapping[str, Any]
"""What users may pass as components: see `players_of`."""

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
    circuit = circuit or own_circuit(model) or Circuit()
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
    check_model(model)
    if isinstance(given, str) and given in others:
        return given
    if not isinstance(given, (Component, str, tuple, list)) or (isinstance(given, str) and not _is_name(given)):
        error = ValueError if isinstance(given, str) else TypeError
        raise error(f"{name} must be {', '.join([*map(repr, others), _ONE])}; got {shown(given)}")
    found = _parts(_players(model, given, circuit or own_circuit(model) or Circuit(), name, None, False))
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
    return text in ROLE_NAMES or Component.of(text) is not None


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
    parts = getattr(circuit, text) if text in ROLE_NAMES else (Component.of(text) or given,)
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
