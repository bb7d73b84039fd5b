"""Colours, and a finished figure."""

import io
from typing import Any


class Picture:
    """A finished figure: shows itself in a notebook, and can be saved.

    Attributes:
        figure: the `matplotlib.figure.Figure`.
    """

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained")

    def __repr__(self) -> str:
        return f"Picture({'; '.join(ax.get_xlabel() for ax in self.figure.axes if ax.get_xlabel())})"

    def save(self, path: Any) -> None:
        """Writes the picture; the format follows from the name."""
        self.figure.savefig(path, dpi=150)

    def svg(self) -> str:
        """The picture as an SVG element, its text drawn as outlines."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()[buffer.getvalue().index("<svg") :]

    def png(self, dpi: int = 120) -> bytes:
        """The picture as a PNG file's content."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


# Okabe & Ito's palette, told apart also by colour-blind readers.
COLOURS = {"context": "#0072B2", "weights": "#D55E00", "rest": "#999999"}
