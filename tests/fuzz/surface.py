"""What is public, found by introspection: functions, classes, and the methods of these."""

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ROOMS = ("", "hooks", "metrics", "theory", "training", "memories", "probing", "tasks", "grid", "show", "reproduction")
SPECIAL = ("__call__", "__getitem__", "__contains__")
"""Special methods that take arguments of the user's."""

NOT_OURS = ("push_to_hub",)
"""What would reach a network."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: its name, its annotation, whether it may be left out, and what it then is."""

    name: str
    annotation: Any
    optional: bool
    default: Any


@dataclass(frozen=True)
class Target:
    """Something to call; `owner` is the class of whose instances it is a method, if it is one."""

    name: str
    function: Callable
    parameters: tuple[Parameter, ...]
    returns: Any
    owner: type | None = None


def is_ours(thing: Any) -> bool:
    home = str(getattr(thing, "__module__", ""))
    ours = home.startswith("hijack_lens") and not home.startswith("hijack_lens.hooked")  # TransformerLens's, or like it
    return ours and not getattr(thing, "_is_protocol", False)  # of which there are no instances


def _target(name: str, function: Callable, owner: type | None = None, skip: int = 0) -> Target:
    plain = function.__init__ if inspect.isclass(function) else getattr(function, "__func__", function)
    try:
        hints = typing.get_type_hints(plain)
    except Exception:  # names that are imported for type checkers only
        hints = {}
    parameters = []
    for one in list(inspect.signature(function).parameters.values())[skip:]:
        several = one.kind is one.VAR_POSITIONAL  # which commands take; functions are called by keyword
        if one.kind is one.VAR_KEYWORD or (several and not name.startswith("cli.")):
            continue
        optional = several or one.default is not one.empty
        parameters.append(Parameter(one.name, hints.get(one.name, one.annotation), optional, one.default))
    returns = function if inspect.isclass(function) else hints.get("return")
    return Target(name, function, tuple(parameters), returns, owner)


def _members(name: str, kind: type) -> Iterator[Target]:
    found = {member: inspect.getattr_static(kind, member) for member in dir(kind)}
    for member, static in found.items():
        inner = getattr(static, "__func__", static)
        if not inspect.isfunction(inner) or not is_ours(inner) or (member.startswith("_") and member not in SPECIAL):
            continue
        if member in NOT_OURS or any(member in vars(base) and not is_ours(base) for base in kind.__mro__):
            continue  # its arguments are TransformerLens's
        bound = getattr(kind, member)
        alone = isinstance(static, (classmethod, staticmethod))
        yield _target(f"{name}.{member}", bound, None if alone else kind, skip=0 if alone else 1)


@functools.cache
def targets() -> tuple[Target, ...]:
    """Every public function, class and method of ours, each once."""
    found: dict[int, Target] = {}
    for room in ROOMS:
        module = importlib.import_module(f"hijack_lens.{room}" if room else "hijack_lens")
        listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for short in sorted(listed):
            thing = getattr(module, short)
            name = f"{room or 'hl'}.{short}"
            if hasattr(module, "__all__"):
                public = is_ours(thing) and callable(thing)
            else:  # what a module without a list defines itself
                public = callable(thing) and getattr(thing, "__module__", None) == module.__name__
            if not public or id(thing) in found or isinstance(thing, typing._GenericAlias | typing.TypeVar):
                continue
            if inspect.isclass(thing):
                found[id(thing)] = _target(name, thing)
                found |= {hash((thing, one.name)): one for one in _members(name, thing)}
            elif inspect.isfunction(thing):
                found[id(thing)] = _target(name, thing)
    return tuple(found.values())


def commands() -> tuple[Target, ...]:
    """The commands of the command line, with their options."""
    from hijack_lens.cli import commands

    return tuple(_target(f"cli.{name}", getattr(commands, name)) for name in ("explain", "train", "reproduce"))
