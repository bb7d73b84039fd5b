"""The public names of the package, found by introspection: a new one needs no line here to be in the reference."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import hijack_lens as hl

NOT_FOR_USERS = {"cli", "core", "hooked"}
"""Rooms that hold no names for users; what others re-export from them is public there."""


@dataclass(frozen=True)
class PublicName:
    """A public object, by the shortest of its names.

    Attributes:
        name: the shortest name, `hijack_lens.attribute`.
        room: the room on whose page it stands; "hijack_lens" where that is none.
        thing: the object.
        others: its other names, `hijack_lens.attribution.attribute`.
    """

    name: str
    room: str
    thing: Any
    others: tuple[str, ...]


def rooms() -> list[str]:
    """The modules whose names are public, the package itself first."""
    found = {module.name for module in pkgutil.iter_modules(hl.__path__)}
    found |= {name for name in hl.__all__ if inspect.ismodule(getattr(hl, name))}  # `hooks` may lie in another folder
    return ["hijack_lens", *(f"hijack_lens.{room}" for room in sorted(found - NOT_FOR_USERS))]


def listed(room: str) -> dict[str, Any]:
    """A module's public objects by name, but for modules: its `__all__`, or else what it defines itself."""
    module = importlib.import_module(room)
    own = (name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == room)
    names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
    return {name: thing for name in names if not inspect.ismodule(thing := getattr(module, name))}


def public_names() -> list[PublicName]:
    """Every public object once, in the order of its name."""
    names: dict[int, list[str]] = {}
    things: dict[int, Any] = {}
    for room in rooms():
        for name, thing in listed(room).items():
            things[id(thing)] = thing
            names.setdefault(id(thing), []).append(f"{room}.{name}")
    found = []
    for key, (shortest, *others) in names.items():
        home = ".".join(getattr(things[key], "__module__", "").split(".")[:2])
        room = shortest.rpartition(".")[0]
        if room == "hijack_lens" and home in rooms():
            room = home
        found.append(PublicName(shortest, room, things[key], tuple(others)))
    return sorted(found, key=lambda one: one.name.lower())
