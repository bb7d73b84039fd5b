"""What both explorers share: one page that needs neither kernel nor network, and the same as a live widget."""

import json
import os
from functools import cache
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from hijack_lens.core.files import check_target, write_atomically
from hijack_lens.show.style import COLOURS

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>html { background: light-dark(#fff, #16191e) } body { max-width: 1040px; margin: 0 auto }
$style</style>
</head>
<body>
<div id="explorer"><noscript>This page needs JavaScript.</noscript></div>
<script type="module">
$script
standAlone(render, $state);
</script>
</body>
</html>
""")


class Page:
    """A page of sliders, and what they are set to.

    In a notebook it shows itself. Where anywidget is installed (the extra `widgets`), the kernel knows what a reader
    drags; without it, or without a kernel, the page moves all the same, in a frame.

    Attributes:
        title: the page's title.
        scripts: the files that draw it, in order.
    """

    title: ClassVar[str]
    scripts: ClassVar[tuple[str, ...]]

    def __init__(self, data: dict[str, Any], values: dict[str, Any]):
        self._data, self._values = data, values
        self._widget: Any = None

    @property
    def values(self) -> dict[str, Any]:
        """What the sliders are set to, by their names."""
        return dict(self._values if self._widget is None else self._widget.values)

    @property
    def widget(self) -> Any:
        """The page as an anywidget, linked to this object.

        Raises:
            ImportError: without anywidget.
        """
        if self._widget is None:
            try:
                kind = _widget_kind(self.scripts)
            except ImportError as error:
                raise ImportError(
                    "a live widget needs anywidget: pip install 'hijack-lens[widgets]'; save and a notebook's display "
                    "show the page without it"
                ) from error
            self._widget = kind(data=self._data, values=self._values)
        return self._widget

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, as it is now set, as one HTML file that opens offline; whole or not at all.

        Raises:
            TypeError, ValueError: if the path is a folder, cannot be written, or lies in no existing folder.
        """
        return write_atomically(check_target("path", path), self._html().encode())

    def _html(self) -> str:
        # Any "<" could begin what ends the script.
        state = json.dumps({"data": self._data, "values": self.values}, allow_nan=False).replace("<", r"\u003c")
        return _PAGE.substitute(title=escape(self.title), style=_style(), script=_script(self.scripts), state=state)

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self._html())}" title="{escape(self.title)}" '
            'style="width:100%;height:1000px;border:0"></iframe>'
        )

    def _repr_mimebundle_(self, **chosen: Any) -> dict[str, Any]:
        if find_spec("anywidget") is None:
            return {}
        shown = self.widget._repr_mimebundle_() or {}
        bundle = shown[0] if isinstance(shown, tuple) else shown
        kind = "application/vnd.jupyter.widget-view+json"
        return {kind: bundle[kind]} if kind in bundle else {}


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(names: tuple[str, ...]) -> str:
    return "\n".join(map(_file, names))


def _style() -> str:
    colours = "".join(f"--{memory}: {colour}; " for memory, colour in COLOURS.items())
    return f".hijack-lens-explorer {{ {colours}}}\n{_file('explorer.css')}"


@cache
def _widget_kind(scripts: tuple[str, ...]) -> Any:
    """The class of the widgets that these scripts draw."""
    from anywidget import AnyWidget
    from traitlets import Dict

    class ExplorerWidget(AnyWidget):
        _esm = f"{_script(scripts)}\nexport default {{ render }};"
        _css = _style()
        data = Dict().tag(sync=True)
        values = Dict().tag(sync=True)

    return ExplorerWidget
