"""A figure whose texts say what is written, in any script; imported when the first picture is drawn."""

import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter, LogFormatterMathtext

from hijack_lens.show.glyphs import give_fonts, written

_NAMES = (FixedFormatter, FuncFormatter, StrCategoryFormatter)
_RAISED = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class LiteralFigure(Figure):
    """A figure that parses no text, since tokens may hold dollars, braces and backslashes, and can draw any of them."""

    def draw(self, renderer: Any) -> None:
        """Draws the figure, with all texts that it has by now and those that drawing adds."""
        with rc_context({"text.parse_math": False, "text.usetex": False}):
            for axis in self.findobj(Axis):
                for get, set_formatter in (
                    (axis.get_major_formatter, axis.set_major_formatter),
                    (axis.get_minor_formatter, axis.set_minor_formatter),
                ):
                    if isinstance(formatter := get(), LogFormatterMathtext):
                        set_formatter(_Unparsed(formatter))
                    elif isinstance(formatter, _NAMES):
                        set_formatter(_Written(formatter))
                axis.get_ticklabels()  # makes them, so that they are among the texts
            for text in self.findobj(Text):
                text.set(parse_math=False, usetex=False, text=written(text.get_text()))
                give_fonts(text)
            super().draw(renderer)


class _Written(Formatter):
    """The names of ticks, which matplotlib looks up each time that it draws them."""

    def __init__(self, names: Formatter):
        self.names = names

    def __call__(self, x: Any, pos: int | None = None) -> str:
        return written(self.names(x, pos))

    def format_ticks(self, values: Any) -> list[str]:
        """The names of all ticks at once."""
        return [written(name) for name in self.names.format_ticks(values)]

    def set_locs(self, locs: Any) -> None:
        """Tells which ticks there are."""
        self.names.set_locs(locs)


class _Unparsed(Formatter):
    """Ticks of a logarithmic axis, which matplotlib labels in mathematics only, in plain letters."""

    def __init__(self, parsed: LogFormatterMathtext):
        self.parsed = parsed

    def __call__(self, x: Any, pos: int | None = None) -> str:
        text = re.sub(r"\^\{(.*?)\}", lambda power: power[1].translate(_RAISED), self.parsed(x, pos))
        return text.removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", "×")

    def set_locs(self, locs: Any) -> None:
        """Tells which ticks there are, by which the formatter decides what to label."""
        self.parsed.set_locs(locs)
