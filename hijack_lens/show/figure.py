"""A figure whose texts say what is written, in any script; imported when the first picture is drawn."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter, LogFormatterMathtext
from matplotlib.transforms import Bbox

from hijack_lens.show.glyphs import give_fonts, written

_NAMES = (FixedFormatter, FuncFormatter, StrCategoryFormatter)
_ROUNDS = 8
_SLACK = 0.02  # inches
_GAP = 3.0  # points, between a number beside a bar and the end of its axes
_LABEL = 3.6  # inches, of a title or label that stays in one line whatever its axes
_INCHES = 400.0
_RAISED = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class LiteralFigure(Figure):
    """A figure that parses no text, since tokens may hold dollars, braces and backslashes, and can draw any of them."""

    def draw(self, renderer: Any) -> None:
        """Draws the figure, with all texts that it has by now and those that drawing adds."""
        with self._literal():
            super().draw(renderer)

    @contextmanager
    def _literal(self) -> Iterator[None]:
        """Has all texts say what is written, those made meanwhile included."""
        with rc_context({"text.parse_math": False, "text.usetex": False}):
            for axis in self.findobj(Axis):
                for get, set_formatter in (
                    (axis.get_major_formatter, axis.set_major_formatter),
                    (axis.get_minor_formatter, axis.set_minor_formatter),
                ):
                    if isinstance(formatter := get(), LogFormatterMathtext):
                        set_formatter(_Rewritten(formatter, _in_letters))
                    elif isinstance(formatter, _NAMES):
                        set_formatter(_Rewritten(formatter, written))
                axis.get_ticklabels()  # makes them, so that they are among the texts
            for text in self.findobj(Text):
                text.set(parse_math=False, usetex=False, text=written(text.get_text()))
                give_fonts(text)
            yield

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """Fits it, and holds that layout, which takes longer than to draw it."""
        self.fit()
        engine = self.get_layout_engine()
        # Not "none", which stands in for an engine: matplotlib draws a figure that has one twice.
        with rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
            self.set_layout_engine()
        try:
            yield
        finally:
            self.set_layout_engine(engine)

    def fit(self) -> None:
        """Grows until no text is cut and no title or label lies on another; ticks too close to be named lose names.

        matplotlib's layout makes room for the names of ticks, but not for a title or label longer than its axes, which
        is broken into lines, nor for numbers beside bars, for which the axes reach further.
        """
        canvas = FigureCanvasAgg(self)
        for _ in range(_ROUNDS):
            with self._literal():
                if engine := self.get_layout_engine():
                    engine.execute(self)
            renderer = canvas.get_renderer()
            for ax in self.axes:
                place = ax.get_axes_locator()
                ax.apply_aspect(None if place is None else place(ax, renderer))
            changed = [_thin(axis, renderer) for axis in self.findobj(Axis)]
            changed += [self._break(text, renderer) for text in self._labels()]
            changed += [_widen(ax, renderer) for ax in self.axes]
            size = self.get_size_inches()
            missing = self._missing(renderer)
            if not any(changed) and missing.max() < _SLACK:
                return
            self.set_size_inches(*np.minimum(size + missing, _INCHES))

    def strips(self) -> Iterator[Bbox]:
        """Panels that can be read one by one, from left to right: where each is, in inches, while all else is hidden.

        What lies above or below another stays with it, as do a colour bar and axes whose rows are named only by those
        to the left of them.
        """
        renderer = FigureCanvasAgg(self).get_renderer()
        shown = [one for one in (*self.axes, *self.legends, *self.texts) if one.get_visible()]
        boxes = [(one.get_tightbbox(renderer), one) for one in shown]
        placed = sorted(((box, one) for box, one in boxes if box is not None), key=lambda pair: pair[0].x0)
        found: list[tuple[Bbox, bool]] = []
        for box, artist in placed:
            last, stands = found[-1] if found else (box, False)
            if found and (box.x0 < last.x1 or not stands or not _is_read_alone(artist)):
                found[-1] = Bbox.union([last, box]), stands or isinstance(artist, Axes)
            else:
                found.append((box, isinstance(artist, Axes)))
        width, height = self.bbox.size
        cuts = [(one.x1 + other.x0) / 2 for (one, _), (other, _) in itertools.pairwise(found)]
        for (left, right), (part, _) in zip(itertools.pairwise([0.0, *cuts, width]), found, strict=True):
            hidden = [artist for box, artist in placed if not left <= (box.x0 + box.x1) / 2 <= right]
            for artist in hidden:
                artist.set_visible(False)
            try:
                yield Bbox(np.array([[left, max(0.0, part.y0 - 2.0)], [right, height]]) / self.dpi)
            finally:
                for artist in hidden:
                    artist.set_visible(True)

    def _break(self, text: Text, renderer: Any) -> bool:
        """Whether a title or label was longer than its axes: its longest line is broken at the space in its middle."""
        side = 0 if text.get_rotation() == 0 else 1
        room = max((text.axes or self).bbox.size[side], _LABEL * self.dpi)
        lines = text.get_text().split("\n")
        longest = max(range(len(lines)), key=lambda i: len(lines[i]))
        spaces = [i for i, letter in enumerate(lines[longest]) if letter == " "]
        if text.get_window_extent(renderer).size[side] <= room or not spaces:
            return False
        middle = min(spaces, key=lambda i: abs(2 * i - len(lines[longest])))
        lines[longest] = f"{lines[longest][:middle].rstrip()}\n{lines[longest][middle:].lstrip()}"
        text.set_text("\n".join(lines))
        return True

    def _missing(self, renderer: Any) -> np.ndarray:
        """The inches of width and height that would help."""
        box, size = self.get_tightbbox(renderer), self.get_size_inches()
        outside = np.maximum(np.negative(box.min), 0) + np.maximum(box.max - size, 0)
        boxes = [text.get_window_extent(renderer) for text in self._labels()]
        shared = np.zeros(2)
        for one, other in itertools.combinations(boxes, 2):
            common = np.minimum(one.max, other.max) - np.maximum(one.min, other.min)
            if (common > 1).all():
                # The shorter way apart; axes grow with the figure, so that each gets a part of what is added.
                side = int(common.argmin())
                shared[side] = max(shared[side], common[side] / self.dpi * max(2, len(self.axes)))
        # A label is centred on its axes: half of what they grow is room on either side of it.
        return np.maximum(2 * outside, shared)

    def _labels(self) -> list[Text]:
        """The titles and labels of all axes, and of the figure."""
        found = [t for ax in self.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label)]
        found += [text for text in self.texts if text.get_in_layout()]
        return [text for text in found if text.get_text() and text.get_visible()]


def _is_read_alone(artist: Artist) -> bool:
    """Whether it is axes that name their own rows, and no colour bar: these are named on the right."""
    if not isinstance(artist, Axes) or artist.yaxis.get_label_position() == "right":
        return False
    named = artist.yaxis.get_tick_params().get("labelleft", True)
    return bool(artist.get_ylabel() or (named and any(map(Text.get_text, artist.get_yticklabels()))))


def _thin(axis: Axis, renderer: Any) -> bool:
    """Whether an axis had names of ticks that overlap: they are turned upright or, if they are, every other one left.

    Numbers need none of that: matplotlib spaces them.
    """
    if not isinstance(getattr(axis.get_major_formatter(), "names", None), _NAMES):
        return False
    ticks, labels = list(axis.get_majorticklocs()), axis.get_ticklabels()
    side = 0 if isinstance(axis, XAxis) else 1
    ends = sorted(_along(label, side, renderer) for label in labels if label.get_text())
    if all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends)):
        return False
    if side == 0 and labels[0].get_rotation() == 0:
        axis.set_tick_params(labelrotation=90)
    else:
        axis.set_ticks(ticks[::2], [label.get_text() for label in labels[: len(ticks) : 2]])
    return True


def _widen(ax: Axes, renderer: Any) -> bool:
    """Whether a number beside a bar (`write_beside`) lay beyond its axes, or on their end: these now reach further."""
    texts = [one for one in ax.texts if isinstance(one, Annotation) and one.anncoords == "offset points"]
    boxes = [one.get_window_extent(renderer) for one in texts if one.xyann[1] == 0]
    gap = renderer.points_to_pixels(_GAP)
    left = max([0.0, *(ax.bbox.x0 + gap - box.x0 for box in boxes)])
    right = max([0.0, *(box.x1 + gap - ax.bbox.x1 for box in boxes)])
    if max(left, right) == 0:
        return False
    ends = [[ax.bbox.x0 - 1.3 * left, 0], [ax.bbox.x1 + 1.3 * right, 0]]  # more: all bars get shorter by it
    ax.set_xlim(*ax.transData.inverted().transform(ends)[:, 0])
    return True


def _along(label: Text, side: int, renderer: Any) -> tuple[float, float]:
    """Where a tick's name begins and ends along its axis; slanted ones run side by side, a line's height apart."""
    box, slant = label.get_window_extent(renderer), math.sin(math.radians(label.get_rotation()))
    if side == 0 and 0.0 < slant < 0.99:
        return box.max[0] - renderer.points_to_pixels(label.get_fontsize()) / slant, box.max[0]
    return box.min[side], box.max[side]


class _Rewritten(Formatter):
    """The names of ticks, which matplotlib looks up each time that it draws them, put in other letters."""

    def __init__(self, names: Formatter, rewrite: Callable[[str], str]):
        self.names, self.rewrite = names, rewrite

    def __call__(self, x: Any, pos: int | None = None) -> str:
        return self.rewrite(self.names(x, pos))

    def format_ticks(self, values: Any) -> list[str]:
        """The names of all ticks at once."""
        return list(map(self.rewrite, self.names.format_ticks(values)))

    def set_locs(self, locs: Any) -> None:
        """Tells which ticks there are, by which some formatters decide what to label."""
        self.names.set_locs(locs)


def _in_letters(parsed: str) -> str:
    """A label of a logarithmic axis, which matplotlib writes in mathematics only."""
    text = re.sub(r"\^\{(.*?)\}", lambda power: power[1].translate(_RAISED), parsed)
    return text.removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", "×")
