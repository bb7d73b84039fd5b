"""Runs the fuzzer: draws calls, makes them under a limit of time and memory, and judges what came of each."""

import contextlib
import io
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tqdm import tqdm

from hijack_lens.hooks import Intervention
from tests.fuzz import hostile, values
from tests.fuzz.surface import Parameter, Target, commands, targets

BAD = list(hostile.ALL)
SECONDS, GIB, LONGEST = 10, 2, 500
LONG = {("hl.memory_capacity", "language"): ["5000"], ("training.gradient_steps", "n_sequences"): ["5000"]}
"""What asks for minutes of honest work, behind a progress bar."""

_TOKENS = torch.tensor([[1, 2, 3, 1, 2, 0]])


class TooSlow(BaseException):
    """Raised into a call that has run too long."""


@dataclass
class Call:
    """A drawn call: its arguments as made and as written, and which of them are hostile."""

    target: Target
    number: int
    made: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a call: "returned", "refused", or what was wrong with it."""

    call: Call
    verdict: str
    detail: str = ""
    where: str = ""
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        return self.verdict in ("returned", "refused")


def written(value: Any) -> str:
    try:
        return " ".join(f"{value!r:.100}".split())
    except BaseException:
        return f"<{type(value).__name__}>"


def draw_call(target: Target, number: int, data: st.DataObject) -> Call:
    """Valid arguments, and as a rule one or two hostile ones among them."""
    call = Call(target, number)
    names = [one.name for one in target.parameters]
    for one in target.parameters:
        large = isinstance(one.default, int) and one.default > values.NOT_OMITTED_ABOVE
        if not one.optional or large or data.draw(st.booleans()):
            call.made[one.name] = data.draw(values.valid(one))
            call.written[one.name] = written(call.made[one.name])
    count = data.draw(st.sampled_from([0, 1, 1, 1, 1, 1, 2, 2])) if names else 0
    for name in {data.draw(st.sampled_from(names)) for _ in range(count)}:
        bad = data.draw(st.sampled_from([kind for kind in BAD if kind not in LONG.get((target.name, name), ())]))
        call.made[name], call.written[name], call.bad[name] = hostile.ALL[bad](), f"!{bad}", bad
    if target.owner is not None:
        call.made["self"] = data.draw(st.sampled_from(values.pool()[target.owner]))
        call.written["self"] = written(call.made["self"])
    return call


def draw_command(target: Target, number: int, data: st.DataObject) -> Call:
    """The same for a command: options, and as a rule one or two hostile texts among them."""
    call = Call(target, number)
    small = {"steps": "2", "d_model": "8", "length": "12", "text": "text.txt", "max_vocab": "8", "repeats": "2"}
    for one in target.parameters:
        if one.name in small or (not one.optional) or data.draw(st.integers(0, 3)) == 0:
            value = small.get(one.name) or data.draw(values.of(one.annotation, one.name))
            if value is not None and value is not False:
                call.written[one.name] = str(value)
    for _ in range(data.draw(st.sampled_from([0, 1, 1, 1, 2]))):
        one = data.draw(st.sampled_from(target.parameters))
        # Asked for millions of steps, or for as many as it takes, a training takes them.
        endless = [text for text in hostile.TEXTS if text == "None" or (text.isdigit() and len(text) > 3)]
        texts = [text for text in hostile.TEXTS if not ("steps" in one.name and text in endless)]
        call.written[one.name] = data.draw(st.sampled_from(texts))
        call.bad[one.name] = call.written[one.name]
    return call


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ten seconds."""

    def stop(signum: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def named(message: str, target: Target) -> bool:
    """Whether a message names an argument of the call, also in the singular, or as an option is written."""
    words = set(re.findall(r"[a-z_0-9]+", message.lower().replace("-", "_")))
    words |= {word.strip("_") for word in words}
    own = target.name.rsplit(".", 1)[-1]  # a method may say that it does not suit its result
    return own in words or any(form in words for one in target.parameters for form in forms(one))


def forms(parameter: Parameter) -> set[str]:
    name = parameter.name.lower()
    kinds = {one.__name__.lower() for one in typing.get_args(parameter.annotation) if isinstance(one, type)}
    return {
        *kinds,
        name,
        name.removesuffix("s"),
        f"{name}s",
        *({"json"} if name == "as_json" else {"global"} & {name[:6]}),
    }


def judged(call: Call, error: BaseException) -> Outcome:
    """Whether an error is of the right kind, names an argument, and is short."""
    text = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/hijack_lens/" in frame.filename or "/hooks/" in frame.filename]
    where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed((ours or last)[-3:]))
    detail = f"{type(error).__name__}: {' '.join(text.split())[:200]}"
    paths = [str(call.made[name]) for name in ("out", "path", "folder") if isinstance(call.made.get(name), (str, Path))]
    if isinstance(error, (OSError, ValueError)) and any(path and path in text for path in paths):
        return Outcome(call, "refused", detail, where)  # a file is named by its path
    if isinstance(error, KeyError) and call.target.name.endswith(".__getitem__"):
        return Outcome(call, "refused", detail, where)  # what square brackets raise in Python
    # The user's own: what was raised by a function of theirs, or by what it called.
    if last and (last[0].name == hostile.failing.__name__ or "self.metric(" in str((ours or last)[-1].line)):
        return Outcome(call, "refused", detail, where)
    if not isinstance(error, (ValueError, TypeError)):
        return Outcome(call, type(error).__name__, detail, where)
    if "name" in call.bad or (call.target.owner is not None and not call.bad):
        return Outcome(call, "refused", detail, where)  # told to call the argument so; or the result does not suit
    if not named(text, call.target):
        return Outcome(call, "unnamed", detail, where)
    if len(text) > LONGEST:
        return Outcome(call, "long", detail, where)
    return Outcome(call, "refused", detail, where)


def make(call: Call) -> Outcome:
    """Makes a call and judges it."""
    arguments = dict(call.made)
    own = [arguments.pop("self")] if call.target.owner is not None else []
    start = time.perf_counter()
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if hasattr(call.target.function, "dispatch"):  # chosen by the type of a positional argument
                own, arguments = list(arguments.values()), {}
            returned = call.target.function(*own, **arguments)
            if isinstance(returned, Intervention):  # whose functions meet their arguments in a run
                with returned:
                    returned.model(_TOKENS)
        outcome = Outcome(call, "returned")
    except TooSlow as error:
        return Outcome(call, "slow", "", judged(call, error).where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        outcome = judged(call, error)
    seconds = time.perf_counter() - start
    return outcome if seconds <= SECONDS else Outcome(call, "slow", f"{seconds:.1f} s; {outcome.detail}", outcome.where)


def run_command(call: Call) -> Outcome:
    """Runs a command in this process; bad input must end in exit code 2 with one line that names an option."""
    from hijack_lens import cli

    argv = ["hijack-lens", call.target.name.removeprefix("cli.")]
    for name, value in call.written.items():
        option = {"as_json": "json", "global_candidate": "global"}.get(name, name).replace("_", "-")
        flag = value in ("True", "False")
        argv += [value] if name == "claims" else [f"--{option}"] if flag else [f"--{option}", value]
    said, before = io.StringIO(), sys.argv
    sys.argv = argv
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main()
        return Outcome(call, "returned")
    except SystemExit as ended:
        if ended.code in (None, 0):
            return Outcome(call, "returned")
        line = said.getvalue().strip().splitlines()[-1:] or [""]
        fine = ended.code == 2 and line[0].startswith("hijack-lens: ") and len(line[0]) <= LONGEST
        fine = fine and (named(line[0], call.target) or any(text in line[0] for text in call.bad.values() if text))
        return Outcome(call, "refused" if fine else f"exit {ended.code}", line[0][:200])
    except TooSlow as error:
        return Outcome(call, "slow", "", judged(call, error).where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return (
            judged(call, error)
            if not isinstance(error, (ValueError, TypeError))
            else Outcome(call, f"raised {type(error).__name__}", str(error)[:200], judged(call, error).where)
        )
    finally:
        sys.argv = before


def prepare(seed: int) -> None:
    """Small models and results; cheap claims; limits of memory. Call it in a process of its own, in an empty folder."""
    warnings.simplefilter("ignore")
    from hijack_lens.reproduction.claims import CLAIMS, Claim
    from hijack_lens.reproduction.findings import Finding, Result

    CLAIMS.clear()  # the real ones take minutes
    found = Result((Finding("a", "b", "c", True),), values.pd.DataFrame({"a": [1]}), values.hl.show.Picture(1, 1))
    CLAIMS["cheap"] = Claim("a claim", "a source", lambda settings: found, 1, 2)
    values.fill_pool(seed)
    with open("text.txt", "w") as file:
        file.write("the cat sat on the mat and the dog sat on the cat " * 20)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + GIB * 2**30, resource.RLIM_INFINITY))


def fuzz(count: int, seed: int, only: str = "", number: int | None = None, quiet: bool = False) -> list[Outcome]:
    """Makes about `count` calls, spread evenly; with `number`, only the one with that number, of targets `only`."""
    known = [one for one in (*targets(), *commands()) if one.owner is None or values.pool().get(one.owner)]
    chosen = [one for one in known if re.search(only, one.name)]
    # Shares are those of all targets: a call's number means the same call for the same count, whatever `only` says.
    total = sum(1 + len(one.parameters) for one in known)
    outcomes: list[Outcome] = []
    progress = tqdm(total=count, disable=quiet, unit=" calls", smoothing=0)

    for target in chosen:
        share = max(2, math.ceil(count * (1 + len(target.parameters)) / total))
        command = target.name.startswith("cli.")
        numbers = iter(range(10**9))

        def body(data: st.DataObject, target: Target = target, command: bool = command, numbers: Any = numbers) -> None:
            call = (draw_command if command else draw_call)(target, next(numbers), data)
            if number in (None, call.number):
                start = time.perf_counter()
                outcome = (run_command if command else make)(call)
                outcomes.append(replace(outcome, seconds=time.perf_counter() - start))
                progress.update()

        progress.set_description(target.name[:30].ljust(30))
        try:
            values.drawn(body, share, seed)
        except KeyboardInterrupt:
            break
    progress.close()
    return outcomes


def summary(outcomes: list[Outcome], seed: int, count: int) -> str:
    """What was wrong, by function and kind; then an example of each place in the code, to replay."""
    wrong = [one for one in outcomes if not one.fine]
    sizes = [one for one in wrong if any(name in hostile.SIZES for name in one.call.bad.values())]
    kinds = Counter(one.verdict if one.fine else "wrong" for one in outcomes)
    lines = [
        f"{len(outcomes)} inputs to {len({one.call.target.name for one in outcomes})} targets, seed {seed}: "
        f"{kinds['returned']} returned, {kinds['refused']} refused, {kinds['wrong']} wrong "
        f"({len(sizes)} of them with sizes beyond reason; {sum(one.verdict == 'slow' for one in wrong)} slow)"
    ]
    spent: Counter[str] = Counter()
    for one in outcomes:
        spent[one.call.target.name] += one.seconds
    lines += ["most time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.most_common(8))]
    table = Counter((one.call.target.name, one.verdict) for one in wrong)
    lines += [f"{many:6} {name:45} {kind}" for (name, kind), many in sorted(table.items())]
    examples: dict[tuple[str, str], list[Outcome]] = {}
    for one in wrong:
        examples.setdefault((one.verdict, one.where), []).append(one)
    for (kind, where), several in sorted(examples.items(), key=lambda item: -len(item[1])):
        one = several[0]
        lines.append(f"\n{len(several)} x {kind} at {where}\n    {one.detail}")
        arguments = ", ".join(f"{name}={text}" for name, text in one.call.written.items())
        lines.append(f"    {one.call.target.name}({arguments})")
        again = f"--only '^{one.call.target.name}$' --inputs {count} --seed {seed} --replay {one.call.number}"
        lines.append(f"    python -m tests.fuzz {again}")
    return "\n".join(lines)


def main() -> int:
    """The command; exit code 1 where anything was wrong."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument(
        "--only", default="", help="of all calls, those of functions with such names (regular expression)"
    )
    parser.add_argument(
        "--replay", type=int, default=None, help="the number of a call of --only, with --seed and --inputs"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    asked = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # drawn texts hold lone surrogates
    seed = int.from_bytes(os.urandom(3), "big") if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # whatever a call writes, it writes there
        prepare(seed)
        outcomes = fuzz(asked.inputs, seed, asked.only, asked.replay, asked.quiet)
    if asked.replay is not None:
        for one in outcomes:
            print(one.verdict, one.detail, one.call.written, sep="\n")
    print(summary(outcomes, seed, asked.inputs))
    return any(not one.fine for one in outcomes)
