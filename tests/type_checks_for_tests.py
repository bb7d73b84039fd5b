"""The run-time type checker of the tests, which pyproject.toml names to jaxtyping: beartype, when it is needed, once.

Whenever a `def` runs, a closure's too, jaxtyping asks for a checker of its arguments; most are never called. It hands
over a stand-in with the function's signature and no body, so what beartype makes of one is good for every other of that
name and signature.
"""

import inspect

from beartype import beartype

_made = {}


def checked(stand_in):
    """What `beartype(stand_in)` is, made at the first call."""
    checker = None

    def check(*args, **kwargs):
        nonlocal checker
        if checker is None:
            checker = _checker(stand_in)
        return checker(*args, **kwargs)

    return check


def _checker(stand_in):
    alike = (stand_in.__module__, stand_in.__qualname__, inspect.signature(stand_in))
    try:
        return _made[alike]
    except KeyError:
        _made[alike] = beartype(stand_in)
        return _made[alike]
    except TypeError:  # a default value that has no hash
        return beartype(stand_in)
