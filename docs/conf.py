"""The documentation site: `python -m sphinx -W -b html docs docs/_build/html`."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.domains.python import ObjectEntry
from sphinx.pycode import ModuleAnalyzer

import hijack_lens as hl

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from public_names import public_names, rooms  # noqa: E402

project = "hijack-lens"
author = "The hijack-lens developers"
copyright = author
version = release = hl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "reference/*.py"]
default_role = "code"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
nitpicky = False

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no request leaves a page
nb_mime_priority_overrides = [("html", "text/html", 0)]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "hijack-lens"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_search_scorer = str(DOCS / "_static/scorer.js")
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def copy_notebooks() -> None:
    """Copies the notebooks beside the tutorials' index, without widgets that need a kernel: progress bars."""
    for path in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"].pop("widgets", None)
        for cell in notebook["cells"]:
            shown = [(one, one.get("data", {})) for one in cell.get("outputs", ())]
            kept = [one for one, data in shown if data.pop(_WIDGET, None) is None or "text/html" in data]
            if "outputs" in cell:
                cell["outputs"] = kept
        _write(DOCS / "tutorials" / path.name, json.dumps(notebook))


_WIDGET = "application/vnd.jupyter.widget-view+json"


def _write(path: Path, text: str) -> None:
    """Writes a file unless it holds that already, so that Sphinx need not read it again."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_explorers() -> None:
    """Writes the explorers that the page on them shows, live."""
    language = hl.BigramLanguage.from_text(hl.default_text())
    model = hl.associative_transformer(language)
    prompt = hl.hijack_prompt(language, trigger="q", in_context="e", repeats=3, length=40, seed=0)
    runs = hl.explore_runs(model, prompt.clean, prompt.corrupted, hl.metrics.margin(prompt))
    for name, explorer in (("theory", hl.explore()), ("runs", runs)):
        _write(DOCS / "explorers" / f"{name}.html", explorer._repr_html_())


def write_reference() -> None:
    """Writes a page for each room: what its docstring says, its names in a table, and each of them."""
    names = public_names()
    for room in rooms():
        here = [one for one in names if one.room == room]
        module = importlib.import_module(room)
        title = room.partition(".")[2] or "hijack_lens"
        lines = [title, "=" * len(title), "", f".. py:module:: {room}", "", inspect.getdoc(module) or "", ""]
        lines += [".. list-table::", "   :widths: auto", ""]
        for one in here:
            role = "class" if inspect.isclass(one.thing) else "func" if _is_code(one.thing) else "data"
            lines += [f"   * - :py:{role}:`{one.name} <{one.name}>`", f"     - {_first_line(one)}"]
        for one in here:
            lines += ["", *_described(one)]
        _write(DOCS / "reference" / f"{title}.rst", "\n".join(lines) + "\n")


def _is_code(thing: object) -> bool:
    return inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing))


def _first_line(one) -> str:
    text = (inspect.getdoc(one.thing) or "") if _is_code(one.thing) else _comment(one)
    return re.sub(r"\s+", " ", text.partition("\n\n")[0])


def _described(one) -> list[str]:
    if inspect.isclass(one.thing):
        bases = [base.__name__ for base in one.thing.__mro__ if not base.__module__.startswith("hijack_lens")]
        theirs = [base.__name__ for base in one.thing.__mro__ if base.__module__.startswith("hijack_lens.hooked")]
        return [
            f".. autoclass:: {one.name}",
            "   :members:",
            f"   :inherited-members: {', '.join([*theirs, *bases])}",
        ]
    if _is_code(one.thing):
        return [f".. autofunction:: {one.name}"]
    room, _, short = one.name.rpartition(".")
    return [f".. py:data:: {short}", f"   :module: {room}", "", f"   {_comment(one)}"]


def _comment(one) -> str:
    """The text under a constant, wherever in its room it is defined."""
    short = one.name.rpartition(".")[2]
    for name in sorted(sys.modules):
        if name.startswith("hijack_lens"):
            docs = ModuleAnalyzer.for_module(name).find_attr_docs()
            if ("", short) in docs and getattr(sys.modules[name], short, None) is one.thing:
                return " ".join(docs["", short]).strip()
    raise ValueError(f"{one.name} has no text under it that says what it is")


LINKS = {
    spelling: one.name
    for one in public_names()
    for spelling in (one.name.removeprefix("hijack_lens."), getattr(one.thing, "__name__", ""))
    if _is_code(one.thing) and (spelling[:1].isupper() or spelling == one.name.removeprefix("hijack_lens."))
}
"""What a docstring calls a public name, between single backticks, and the name."""


def as_rest(app, kind, name, thing, options, lines: list[str]) -> None:
    """Docstrings, which are written to be read in a terminal, as reStructuredText."""
    given = "\n".join(lines)
    block = re.compile(r"(?<=:)\n\n(?=(?:    .*\n?|\n)+)")  # what is indented after a colon and a blank line is code
    given = block.sub(":\n\n", given)
    parts = re.split(r"(::\n\n(?:(?:[ ]{4}.*)?(?:\n|$))+|^[ ]*>>>.*(?:\n[ ]*\S.*)*|`[^`]+`)", given, flags=re.MULTILINE)
    for at, part in enumerate(parts):
        if at % 2 == 0:
            parts[at] = re.sub(r"[*|\\]|(?<=\w)_(?=\W|$)", r"\\\g<0>", part)
        elif part.startswith("`"):
            said = LINKS.get(part.strip("`"))
            linked = f":py:obj:`{part[1:-1]} <{said}>`" if said else f"`{part}`"
            parts[at] = linked + ("\\ " if re.match(r"\w", parts[at + 1]) else "")
    lines[:] = "".join(parts).split("\n")


def note_other_names(app, env) -> None:
    """Every other name of a public object leads to the same place."""
    objects = env.get_domain("py").objects
    for one in public_names():
        entry = objects[one.name]
        for name in one.others:
            objects[name] = ObjectEntry(entry.docname, entry.node_id, entry.objtype, True)


def lead_to_tutorials(app, docname: str, source: list[str]) -> None:
    """Links to notebooks, which pages give by their place in the repository, lead to their copies here."""
    source[0] = re.sub(r"\]\((\.\./)*notebooks/([\w.]+\.ipynb)\)", r"](/tutorials/\2)", source[0])


def mathml(self, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw by themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app) -> None:
    """Writes the pages that are made from elsewhere, before Sphinx looks for pages."""
    copy_notebooks()
    write_explorers()
    write_reference()
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.config.html_math_renderer = "mathml"
    app.connect("autodoc-process-docstring", as_rest, priority=400)  # before napoleon
    app.connect("env-updated", note_other_names)
    app.connect("source-read", lead_to_tutorials)
