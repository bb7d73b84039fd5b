"""A figure whose texts say what is written, never mathematics; imported when the first picture is drawn."""

import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import Formatter, LogFormatterMathtext

_RAISED = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class LiteralFigure(Figure):
    """A figure that parses no text: tokens may hold dollars, braces and backslashes."""

    def draw(self, renderer: Any) -> None:
        """Draws the figure, with all texts that it has by now and those that drawing adds."""
        with rc_context({"text.parse_math": False, "text.usetex": False}):
            for text in self.findobj(Text):
                text.set(parse_math=False, usetex=False)
            for axis in self.findobj(Axis):
                for get, set_formatter in (
                    (axis.get_major_formatter, axis.set_major_formatter),
                    (axis.get_minor_formatter, axis.set_minor_formatter),
                ):
                    if isinstance(formatter := get(), LogFormatterMathtext):
                        set_formatter(_Unparsed(formatter))
            super().draw(renderer)


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
