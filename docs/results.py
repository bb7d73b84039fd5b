"""The public kinds of result, found by introspection, and one of each, made by the example of its docstring."""

import dataclasses
import doctest
import inspect
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from public_names import public_names

PLAIN = {bool, int, float, str, type(None), torch.Generator}


def results() -> dict[str, type]:
    """The public classes that are results, by name: all but models, protocols, pictures, pages, and values.

    A value is a dataclass of numbers, texts, seeds, and other values: a `Component`, a `Setting`, a `TrainConfig`. It
    needs no showing: its repr is the code that makes it, in a line or two.
    """
    return {one.name: one.thing for one in public_names() if inspect.isclass(one.thing) and _is_result(one.thing)}


def _is_result(kind: type) -> bool:
    bases = {base.__name__ for base in kind.__mro__}
    if bases & {"Protocol", "Exception", "DOMWidget"} or issubclass(kind, torch.nn.Module):
        return False
    return "Shown" in bases or not (
        _is_value(kind) or kind.__module__.startswith(("hijack_lens.show.", "hijack_lens.explorer."))
    )


def _is_value(kind: Any) -> bool:
    """Whether all fields are numbers, texts, values, or several of these."""
    if not dataclasses.is_dataclass(kind):
        return False
    hints = typing.get_type_hints(kind)
    return all(_is_plain(hints[field.name]) for field in dataclasses.fields(kind))


def _is_plain(hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal or hint is Ellipsis:
        return True
    if origin in (tuple, Sequence, typing.Union, types.UnionType):
        return all(map(_is_plain, parts))
    return hint in PLAIN or _is_value(hint)


def example_of(kind: type) -> Any:
    """A result of this kind, which the example of its docstring leaves in a variable, or in an attribute of one.

    Raises:
        LookupError: if it leaves none.
    """
    given = runpy.run_path(str(Path(__file__).parent / "examples.py"))
    (test,) = doctest.DocTestFinder(recurse=False).find(kind, kind.__name__, globs=given)
    doctest.DocTestRunner(verbose=False).run(test, out=lambda said: None, clear_globs=False)
    # Names that the example makes come last, and are looked at first.
    for value in reversed(test.globs.values()):
        for one in (value, *_parts(value)):
            if isinstance(one, kind):
                return one
    raise LookupError(f"the example of {kind.__name__} must leave one in a variable")


def _parts(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
