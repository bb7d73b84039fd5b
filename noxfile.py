"""Every check in an environment of its own: `nox -l` lists them, `nox -s tests-3.12 -- -k margin` runs one, in part."""

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "docs", "build", "tests-3.12"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
TESTED = ("-c", "constraints.txt")


def run_tests(session: nox.Session) -> None:
    """Runs pytest, with what stands after `--`."""
    # On tiny tensors threads cost more than they give, above all where several processes share few cores.
    session.run("pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The tests, with the versions that this release was tested with."""
    session.install(*TESTED, "-e", ".[test]")
    run_tests(session)


@nox.session(name="tl-3.9")
def tl_3_9(session: nox.Session) -> None:
    """The tests with the newest TransformerLens 3.9."""
    session.install(*TESTED, "-e", ".[test]", "transformer-lens==3.9.*")
    run_tests(session)


@nox.session(name="tl-4")
def tl_4(session: nox.Session) -> None:
    """The tests with the newest TransformerLens 4, and the newest of all else but PyTorch."""
    torch = re.search("^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    session.install(torch, "-e", ".[test]", "transformer-lens==4.*")
    run_tests(session)


@nox.session(python="3.10", venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The tests with exactly the lowest versions that pyproject.toml declares, on the lowest Python."""
    named = ("distributed", "parquet", "slurm", "smollm2", "test")
    extras = (PROJECT["optional-dependencies"][extra] for extra in named)
    declared = sum(extras, PROJECT["dependencies"])
    lowest = [re.sub(r">=([^,;]+)[^;]*", r"==\1", requirement) for requirement in declared if ">=" in requirement]
    # PyTorch 2.6 compiles with setuptools, which it declares from Python 3.12 on only.
    session.install(*lowest, "setuptools", "-e", ".[test]")
    run_tests(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types and layers of what a wheel installs: an editable install hides hooks/ from both tools."""
    session.install(*TESTED, ".[dev]")
    with session.chdir(session.create_tmp()):  # beside the sources, they would be checked instead
        session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "hijack_lens")
        session.run("lint-imports", "--config", str(ROOT / "pyproject.toml"))


@nox.session
def docs(session: nox.Session) -> None:
    """Links lead to files, and every notebook runs."""
    session.install(*TESTED, "-e", ".[dev]")
    session.run("pytest", "-n", "0", "tests/test_documents.py")
    session.run("python", ".ci/notebooks.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """What is published: its metadata, and the README's test command in what the sdist unpacks to."""
    session.install("build", "twine", "check-wheel-contents", "pyroma")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--outdir", str(folder))
    sdist, wheel = *folder.glob("*.tar.gz"), *folder.glob("*.whl")
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    session.run("check-wheel-contents", str(wheel))
    session.run("pyroma", "--min=10", "--skip-tests=AuthorEmail", str(sdist))  # there is no address to give

    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    committed = session.run("git", "ls-files", external=True, silent=True).split()
    assert [file for file in committed if not (unpacked / file).exists()] == [], "not in the sdist"
    (command,) = re.findall("^pip install .* && pytest$", (unpacked / "README.md").read_text(), re.MULTILINE)
    session.run("python", "-m", "venv", str(folder / "fresh"))
    with session.chdir(unpacked):
        script = f". ../fresh/bin/activate && {command} {shlex.join(session.posargs)}"
        session.run("bash", "-euc", script, external=True, env={"OMP_NUM_THREADS": "1"})
