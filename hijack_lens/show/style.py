"""How pictures look: colours, a finished figure, and the one heat map."""

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from hijack_lens.core.checks import check_count, check_list, check_number, check_texts, check_type, shown
from hijack_lens.core.files import check_target, write_atomically
from hijack_lens.core.tables import PAGE

# Okabe & Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999"
COLOURS = {"context": BLUE, "weights": ORANGE, "rest": GREY}
"""The memories' colours."""

PLAIN = "#777777"
"""Of what belongs to no memory: as legible on white as on black."""

MAP_WIDEST = 4.6  # inches: it fits a phone

ON_CELL = "#010101"
"""Black in all pages, on cells and boxes that are light in all; plain black is the page's own colour of text."""

PAGE_STYLE = (
    PAGE
    + """
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.6em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: 0.25em 0.8em; text-align: right }
thead th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
.verdict { font-size: 1.15em; padding: 0.8em 1em; background: #0072b218; border-left: 4px solid #0072B2 }
.weights { background: #d55e0018; border-left-color: #D55E00 }
.warning { padding: 0.4em 1em; background: #e69f0028; border-left: 4px solid #E69F00 }
code { background: #88888828; padding: 0 0.2em } .wide { overflow-x: auto } svg { max-width: 100%; height: auto }
"""
)
"""The style sheet of HTML files."""

_DIVERGING = "PuOr_r"  # purple one way, orange the other
_ABSENT = "#dcdcdc"
_DIGITS = 15  # of a float64
_NAMES_SHOWN = 60
_INCHES = 400
_DPI = 10  # matplotlib draws no text below
_LARGEST = 250_000  # bytes of an SVG element
_PIXELS = 80  # per inch, as shown in a page
_SMALLEST = 0.75  # of that, at which text of 8 points is still legible
_UNUSED = re.compile(
    r"<metadata>.*?</metadata>"
    r'| id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|[xy]tick|legend|\w+Collection)_\d+"',
    re.DOTALL,
)


class Picture:
    """A finished figure: shows itself in a notebook, and can be saved.

    Attributes:
        figure: the `matplotlib.figure.Figure`.

    Examples:
        >>> picture = hl.explain(model, prompt).picture()
        >>> picture.save("margin.png")
        >>> picture.svg()[:4]
        '<svg'
        >>> picture.alt[:12]
        'weights win:'
    """

    def __init__(self, width: float, height: float):
        from hijack_lens.show.figure import LiteralFigure

        size = check_number("width", width, positive=True), check_number("height", height, positive=True)
        for name, inches in zip(("width", "height"), size, strict=True):
            if inches > _INCHES:
                raise ValueError(f"{name} must be at most {_INCHES} inches, got {shown(inches)}")
        self.figure = LiteralFigure(figsize=size, layout="constrained")

    def __repr__(self) -> str:
        return f"Picture({'; '.join(ax.get_xlabel() for ax in self.figure.axes if ax.get_xlabel())})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture, whole or not at all; the file name's extension sets the format, by default PNG.

        Raises:
            TypeError, ValueError: for an extension of no such format, and a path that cannot be written.
        """
        target, known = check_target("path", path), self.figure.canvas.get_supported_filetypes()
        kind = target.suffix[1:].lower() or "png"
        if kind not in known:
            raise ValueError(f"path must end in one of {', '.join(known)}, got {str(path)!r}")
        buffer = io.BytesIO()
        with self.figure.fitted():
            self.figure.savefig(buffer, format=kind, dpi=150)
        write_atomically(target, buffer.getvalue())

    def svg(self, alt: str = "") -> str:
        """The picture as an SVG element, its text drawn as outlines, what is black in the colour of the page's text.

        Args:
            alt: what it shows, for readers who do not see it; by default its axes' titles and labels.
        """
        check_type("alt", alt, str)
        with self.figure.fitted():
            return self._element(f'role="img" aria-label="{self._name(alt)}"', self.figure.bbox_inches)

    def html(self, alt: str = "") -> str:
        """The picture for a page: as SVG or, where that would be large, as PNG on white.

        Panels that stand side by side, and can be read one by one, stand below one another in a narrow page.
        """
        check_type("alt", alt, str)
        with self.figure.fitted():
            drawn = [self._element("", strip) for strip in self.figure.strips()]
            if large := sum(map(len, drawn)) > _LARGEST:
                data = base64.b64encode(self._pixels(dpi=100)).decode()
        named = f'role="img" aria-label="{self._name(alt)}"'
        if not large:
            return f'<div {named} style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(drawn)}</div>'
        style = f"{_size(self.figure.get_size_inches()[0])};background:white"
        return f'<img alt="{self._name(alt)}" style="{style}" src="data:image/png;base64,{data}">'

    def _element(self, attributes: str, part: Any) -> str:
        """A part of the fitted picture, a box in inches, as an SVG element."""
        buffer = io.StringIO()
        plain: dict[str, Any] = {"transparent": True, "metadata": {"Date": None, "Creator": None}}
        self.figure.savefig(buffer, format="svg", bbox_inches=part, **plain)
        element = _UNUSED.sub("", buffer.getvalue()[buffer.getvalue().index("<svg") :])
        element = element.replace("#000000", "currentColor")
        return element.replace("<svg", f'<svg {attributes} fill="currentColor" style="{_size(part.width)}"', 1)

    def _name(self, alt: str) -> str:
        return escape(alt or self.alt, quote=True)

    @property
    def alt(self) -> str:
        """What it shows, in words: the titles and labels of its axes."""
        parts = []
        for ax in self.figure.axes:
            across, up = ax.get_xlabel(), ax.get_ylabel()
            axes = " against ".join(filter(None, (up, across)))
            parts += [": ".join(filter(None, (ax.get_title(), axes)))]
        return "; ".join(filter(None, [self.figure.get_suptitle(), *parts])).replace("\n", " ")

    def png(self, dpi: int = 120) -> bytes:
        """The picture as the bytes of a PNG file."""
        dpi = check_count("dpi", dpi, minimum=_DPI)
        with self.figure.fitted():
            return self._pixels(dpi)

    def _pixels(self, dpi: int) -> bytes:
        """The fitted picture as a PNG file."""
        size = dpi * self.figure.get_size_inches()
        if max(size) >= 2**16 or math.prod(size) > 2**28:
            raise ValueError(f"dpi must be smaller for a picture this large, got {shown(dpi)}")
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()

    def _repr_html_(self) -> str:
        return f"<div style='overflow-x:auto'>{self.html()}</div>"


def _size(inches: float) -> str:
    """As wide as its page, or its part of a row, but no narrower than it is legible: there it scrolls."""
    width = round(_PIXELS * inches)
    least = round(_SMALLEST * width)
    return f"width:{width}px;min-width:{least}px;max-width:min(100%, {width}px);flex:{width} 1 {least}px;height:auto"


def frameless(*axes: Any) -> None:
    """Removes the top and right lines of the frame."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def whole_ticks(axis: Any, most: int = 9) -> None:
    """Has an axis name whole numbers only, in so many steps at most."""
    axis.get_major_locator().set_params(integer=True, nbins=most)


def name_rows(*axes: Any) -> None:
    """Has axes that share their rows name them all: each can then be read alone, below the others in a narrow page."""
    for ax in axes:
        ax.tick_params(axis="y", labelleft=True)


def map_axes(count: int, across: int, width: float, height: float) -> tuple[Picture, Any, Any, Any]:
    """A picture with `count` maps in rows: its axes, the lowest axes of each column, and the first of each row."""
    picture = Picture(width, height)
    lines = -(-count // across)
    axes = picture.figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flatten()
    lowest = axes[max(0, count - across) : count]
    for ax in axes[count:]:
        ax.remove()
    for ax in lowest:
        ax.tick_params(labelbottom=True)
    name_rows(*axes[:count])
    return picture, axes[:count], lowest, axes[::across]


def stacked_bars(ax: Any, rows: Any, margin: Any, height: float) -> None:
    """Stacked bars of a margin's parts on either side of zero."""
    high, low = np.zeros(np.size(rows)), np.zeros(np.size(rows))
    for memory, colour in COLOURS.items():
        values = np.atleast_1d(margin.parts[memory].detach().cpu().double().numpy())
        ax.barh(rows, values, left=np.where(values >= 0, high, low), color=colour, height=height, label=memory)
        high, low = high + np.maximum(values, 0), low + np.minimum(values, 0)
    ax.axvline(0, color="black", linewidth=1)


def write_beside(ax: Any, text: str, end: float, row: int, points: int, **style: Any) -> None:
    """Writes a text beside the end of a horizontal bar, `points` further from zero."""
    side, align = (points, "left") if end >= 0 else (-points, "right")
    ax.annotate(text, (end, row), xytext=(side, 0), textcoords="offset points", ha=align, va="center", **style)


def spread_of(image: np.ndarray, centre: float = 0.0) -> float:
    """The largest distance from the centre; 1 if there is none."""
    return float(np.max(np.abs(image - centre), initial=0.0, where=np.isfinite(image))) or 1.0


def heatmap(
    ax: Any,
    image: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    centre: float = 0.0,
    spread: float | None = None,
    attention: bool = False,
    decimals: int | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    named: int = _NAMES_SHOWN,
    **font: Any,
) -> Any:
    """Draws a matrix; cells with NaN are grey.

    Args:
        ax: the axes to draw on.
        image: [row, column], an array or tensor.
        rows: the rows' names.
        columns: the columns' names.
        centre: the value that is drawn white.
        spread: how far the colours reach on either side of `centre`; by default, to the value furthest from it.
        attention: use a scale of blues instead, from 0 to 1, or to `spread`.
        decimals: the fewest decimals for values written into the cells; none if the spread is 100 or more.
        texts: texts to write into the cells instead.
        named: the largest number of rows, and of columns, to name.
        **font: the names' fontsize and family, and the rotation of the columns' names.

    Returns:
        The drawn image, for a colour bar.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> figure, axes = plt.subplots()
        >>> image = hl.show.heatmap(axes, [[1.0, -2.0], [0.5, 3.0]], rows=["a", "b"], columns=["x", "y"])
        >>> image.get_clim()
        (-3.0, 3.0)
        >>> plt.close(figure)
    """
    import matplotlib
    from matplotlib.axes import Axes

    check_type("ax", ax, Axes)
    check_type("attention", attention, bool)
    try:
        image = np.asarray(image.detach().cpu().double() if isinstance(image, Tensor) else image, dtype=float)
    except Exception as error:  # of many kinds, by what the elements are
        raise TypeError(f"image must be a matrix of numbers, got {shown(image)}") from error
    if image.ndim != 2 or not image.size:
        raise ValueError(f"image must be a matrix [row, column], got shape {image.shape}")
    check_number("centre", abs(centre) if isinstance(centre, (int, float)) else centre)
    check_number("spread", 1.0 if spread is None else spread, positive=True)
    if check_count("decimals", 0 if decimals is None else decimals) > _DIGITS:
        raise ValueError(f"decimals must be at most {_DIGITS}, got {shown(decimals)}")
    check_count("named", named, minimum=1)
    for argument, given, size in (("rows", rows, image.shape[0]), ("columns", columns, image.shape[1])):
        if given is not None and len(check_texts(argument, given)) != size:
            raise ValueError(f"{argument} must name all {size} of the image, got {shown(given)}")
    if texts is not None:
        lines = [check_texts("texts", line) for line in check_list("texts", texts, "a list of texts for each row")]
        if len(lines) != len(image) or any(len(line) != image.shape[1] for line in lines):
            raise ValueError(f"texts must have the image's shape {image.shape}, got {shown(texts)}")
    most, spread = (1.0, spread_of(image, centre)) if spread is None else (spread, spread)
    low, high = (0.0, most) if attention else (centre - spread, centre + spread)
    colours = matplotlib.colormaps["Blues" if attention else _DIVERGING].with_extremes(bad=_ABSENT)
    drawn = ax.imshow(image, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    rotation = font.pop("rotation", 0)
    for names, set_ticks, turn in ((rows, ax.set_yticks, 0), (columns, ax.set_xticks, rotation)):
        if names is not None:
            ticks = range(0, len(names), -(-len(names) // named) or 1)
            set_ticks(ticks, [names[i] for i in ticks], rotation=turn, **font)
    if decimals is not None or texts is not None:
        fewest = decimals if decimals and spread < 100 else 0
        decimals = max(fewest, 1 - math.floor(math.log10(spread)))
        for (row, column), value in np.ndenumerate(image):
            if np.isfinite(value):
                number = f"{value:+.{decimals}f}" if round(value, decimals) else "0"
                text, size = (number, 7) if texts is None else (texts[row][column], 9)
                colour = "white" if abs(value - centre) > 0.6 * spread else ON_CELL
                ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    return drawn
