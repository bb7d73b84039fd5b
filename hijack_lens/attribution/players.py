"""The players of the game whose Shapley values are asked for: components, or groups of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from hijack_lens.circuit import Circuit, Component
from hijack_lens.hooks.intervention import check_hook_points
from hijack_lens.hooks.site import Site, sites

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
