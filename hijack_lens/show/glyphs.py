"""Fonts for characters that a picture's own font lacks; and what to write for those that no font has."""

import unicodedata
from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager
from matplotlib.text import Text

_SPECIAL = ("bold", "italic", "oblique", "black", "light", "thin", "condensed")


def written(text: str) -> str:
    """A text with escapes for its characters that nobody can see, or that no installed font can draw."""
    return "".join(c if c == "\n" or _is_seen(c) else c.encode("unicode_escape").decode() for c in text)


@cache
def _is_seen(character: str) -> bool:
    """Whether it is no control or format character, nor one of private use, and some font has it."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs") and _font_with(character) is not None


def give_fonts(text: Text) -> None:
    """Has a text drawn with further fonts, where its own lacks some of its characters."""
    own = _characters(font_manager.findfont(text.get_fontproperties()))
    missing = [c for c in text.get_text() if ord(c) not in own and c != "\n"]
    fonts = dict.fromkeys(font for c in missing if (font := _font_with(c)))
    if fonts:
        names = [font_manager.get_font(font).family_name for font in fonts]
        families = [*text.get_fontfamily(), *names]
        text.set_fontfamily(list(dict.fromkeys(families)))


@cache
def _font_with(character: str) -> str | None:
    """The file of an installed font that has a character."""
    return next((font for font in _fonts() if ord(character) in _characters(font)), None)


@cache
def _fonts() -> tuple[str, ...]:
    """All installed fonts: matplotlib's own first, upright and regular ones first."""
    default = font_manager.findfont("DejaVu Sans")
    # matplotlib remembers the fonts that it once found; some may be new.
    known: Iterable[str] = [one.fname for one in font_manager.fontManager.ttflist] + font_manager.findSystemFonts()
    # The font of last resort has a frame for every character, and says no more than a box.
    usable = {name for name in known if "lastresort" not in name.lower()}
    return (default, *sorted(usable, key=lambda name: (any(word in name.lower() for word in _SPECIAL), name)))


@cache
def _characters(font: str) -> frozenset[int]:
    """The characters that a font has; none if matplotlib cannot draw with it, as with fonts of coloured pictures."""
    try:
        if font not in {one.fname for one in font_manager.fontManager.ttflist}:
            font_manager.fontManager.addfont(font)
        return frozenset(font_manager.get_font(font).get_charmap())
    except Exception:  # of many kinds, by what is wrong with the file
        return frozenset()
