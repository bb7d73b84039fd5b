"""The run-time type checker of the tests, which pyproject.toml names to jaxtyping: beartype, with a memory.

Whenever a `def` runs, a closure's too, jaxtyping asks for a checker of its arguments. It hands over a stand-in with the
function's signature and no body, so what beartype makes of one is good for every other of that name and signature.
"""

import inspect

from beartype import beartype

_made = {}


def checked(stand_in):
    """`beartype(stand_in)`, made once."""
    alike = (stand_in.__module__, stand_in.__qualname__, inspect.signature(stand_in))
    try:
        return _made[alike]
    except KeyError:
        _made[alike] = beartype(stand_in)
        return _made[alike]
    except TypeError:  # a default value that has no hash
        return beartype(stand_in)
