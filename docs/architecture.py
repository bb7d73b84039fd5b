"""Draws docs/architecture.png from the imports themselves: python docs/architecture.py

Rooms are the packages and modules of hijack_lens, on the floors that pyproject.toml's import contract gives them. An
arrow means "imports". Short cuts, where a longer way leads to the same room, and the arrows to core,
which all import, are left out.
"""

import ast
import textwrap
from pathlib import Path

import tomllib
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from hijack_lens.show.style import BLUE, Picture

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, GAP, FLOOR = 3.1, 0.9, 0.35, 1.4  # inches
ARROW = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "#555555", "linewidth": 1.0, "zorder": 5}


def rooms() -> dict[str, list[Path]]:
    """The files of each room."""
    library = ROOT / "hijack_lens"
    found = {"hooks": sorted((ROOT / "hooks").glob("*.py"))}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if inside[0] not in ("__init__.py", "hooks"):
            found.setdefault(inside[0].removesuffix(".py"), []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = [
        name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hijack_lens"
        for name in ([node.module] if "." in node.module else [f"hijack_lens.{alias.name}" for alias in node.names])
    ]
    return {name.split(".")[1] for name in names}


def arrows(files: dict[str, list[Path]]) -> set[tuple[str, str]]:
    """(room, room that it imports), short cuts left out."""
    direct = {
        room: {other for path in paths for other in imported(path)} & files.keys() - {room}
        for room, paths in files.items()
    }

    def below(room: str) -> set[str]:
        return direct[room].union(*(below(other) for other in direct[room])) if direct[room] else set()

    return {
        (room, other)
        for room, others in direct.items()
        for other in others - {"core"}
        if not any(other in below(between) for between in others)
    }


def sentence(paths: list[Path]) -> str:
    """What a room says of itself: the first sentence of its docstring."""
    first = next((path for path in paths if path.name == "__init__.py"), paths[0])
    return (
        (ast.get_docstring(ast.parse(first.read_text(encoding="utf-8"))) or "")
        .split(".\n")[0]
        .split("\n\n")[0]
        .rstrip(".")
    )


def draw() -> Picture:
    """The house, its ground floor at the bottom."""
    files = rooms()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = [[room.strip() for room in floor.split("|")] for floor in reversed(contracts[0]["layers"])]
    widest = max(map(len, floors))
    picture = Picture(widest * (WIDTH + GAP) + 0.6, len(floors) * FLOOR)
    ax = picture.figure.add_subplot()
    middle = {}
    for level, floor in enumerate(floors):
        left = (widest - len(floor)) * (WIDTH + GAP) / 2
        for place, room in enumerate(floor):
            x, y, paths = left + place * (WIDTH + GAP), level * FLOOR, files[room]
            middle[room] = (x + WIDTH / 2, y + HEIGHT / 2)
            box = FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0.04", facecolor="#f2f5f8", edgecolor=BLUE, zorder=3)
            ax.add_patch(box)
            n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
            size = f"{n_lines:,} lines" + (f", {len(paths)} files" if len(paths) > 1 else "")
            ax.text(
                x + WIDTH / 2,
                y + 0.83 * HEIGHT,
                f"{room}  ({size})",
                ha="center",
                va="center",
                weight="bold",
                fontsize=9,
                zorder=4,
            )
            words = "\n".join(textwrap.wrap(sentence(paths), 46)[:3])
            ax.text(x + WIDTH / 2, y + 0.36 * HEIGHT, words, ha="center", va="center", fontsize=7.5, zorder=4)
    for room, other in sorted(arrows(files)):
        (x1, y1), (x2, y2) = middle[room], middle[other]
        lean = max(-0.4 * WIDTH, min(0.4 * WIDTH, 0.15 * (x2 - x1)))  # so that arrows do not meet in one point
        start, end = (x1 + lean, y1 - HEIGHT / 2), (x2 - lean, y2 + HEIGHT / 2)
        ax.add_patch(FancyArrowPatch(start, end, shrinkA=4, shrinkB=4, **ARROW))
    ax.set_xlim(-0.2, widest * (WIDTH + GAP) - GAP + 0.2)
    ax.set_ylim(-0.2, (len(floors) - 1) * FLOOR + HEIGHT + 0.2)
    ax.set_axis_off()
    return picture


if __name__ == "__main__":
    draw().save(ROOT / "docs" / "architecture.png")
