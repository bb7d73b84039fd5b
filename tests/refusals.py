"""Tests that bad input is refused, with a message that names the argument and its value."""

from collections.abc import Callable, Mapping

import pytest


def refused(error: type[Exception], cases: Mapping[str, Callable[[], object]]) -> Callable[[str], None]:
    """A test per case: from the pattern that the message must match to what must raise `error`."""

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("message", cases)
    def test(message: str) -> None:
        with pytest.raises(error, match=message):
            cases[message]()

    return test
