"""The command line: `hijack-lens COMMAND`. Commands are imported when they are asked for: all else answers at once."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError, UnusedCliTokensError

from hijack_lens import __version__


def _versions() -> str:
    others = (f"{name} {version(name)}" for name in ("torch", "transformer-lens"))
    return f"hijack-lens {__version__} ({', '.join(others)})"


app = App(
    name="hijack-lens",
    help="Which memory wrote each output logit: the context, or the weights?",
    version=_versions,
    default_parameter=Parameter(negative=()),
)
_COMMANDS = {
    "explain": "Set the two memories against each other, and say which one wrote the prediction.",
    "train": "Train a two-layer model on the bigrams of a text, with triggers, and watch both memories form.",
    "reproduce": "Test the papers' claims, and say which hold, how far, and where they fail.",
    "doctor": "Say what is installed, on which devices, and whether it works.",
}
for _name, _help in _COMMANDS.items():
    app.command(f"hijack_lens.cli.{'doctor' if _name == 'doctor' else 'commands'}:{_name}", help=_help)
app.register_install_completion_command()


def main() -> None:
    """Runs the command line; bad input ends it with one line and exit code 2."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except UnknownCommandError as error:  # whose own message imports every command
        given, *_ = error.unused_tokens or [""]
        close = "".join(f" Did you mean {name!r}?" for name in get_close_matches(given, _COMMANDS, 1))
        fail(f"{given[:80]!r} is no command.{close} There are {', '.join(_COMMANDS)}.")
    except CycloptsError as error:
        if isinstance(error, UnusedCliTokensError):
            first, *_ = error.unused_tokens or [""]
            fail(f"{first[:80]!r} belongs to no option; flags such as --quick and --json take no value")
        error.verbose = False  # without it, the message names Python functions
        fail(re.sub(r"\S{81,}", lambda word: f"{word[0][:77]}...", str(error)))
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def working(said: str) -> Iterator[None]:
    """Says on a terminal what is being done; afterwards the line is gone."""
    if not sys.stderr.isatty():
        yield
        return
    line = f"{' '.join(said.split())} ..."[: shutil.get_terminal_size().columns - 1]
    print(line, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(line), end="\r", file=sys.stderr, flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on standard error."""
    print(f"hijack-lens: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
