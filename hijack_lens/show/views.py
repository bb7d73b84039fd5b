"""Interactive circuitsvis views that need no network."""

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_fields, check_number, check_texts, check_type, shown
from hijack_lens.core.circuit import ROLE_NAMES, Circuit
from hijack_lens.core.hook_points import SINK, is_deep
from hijack_lens.core.inputs import Components, circuit_of, components_of, prompt_texts, single_prompt
from hijack_lens.core.tables import PRINTED
from hijack_lens.hooks.intervention import record
from hijack_lens.show.logits import shaded_prompt
from hijack_lens.show.style import COLOURS, Picture, heatmap

if TYPE_CHECKING:
    from hijack_lens.language.prompts import HijackPrompt


_MOST_TOKENS = 256
"""Of a prompt whose patterns are drawn cell by cell: of 1,024 tokens, a browser takes minutes and a page 14 MB."""

_PATHS_SHOWN = 24
_TOKENS_NAMED = 48
_LETTERS_PER_INCH = 8


@cache
def circuitsvis_script() -> str:
    """The script from the circuitsvis wheel, safe inside a <script> element; it defines CircuitsVis."""
    import circuitsvis

    script = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # A browser would look for its source map on the network.
    return script.replace("</script", r"<\/script").rsplit("//# sourceMappingURL", 1)[0]


@cache
def _packed_script() -> bytes:
    return gzip.compress(circuitsvis_script().encode(), mtime=0)


_LOADED = """await (window.hijackLensViews ??= (async () => {
    const packed = Uint8Array.from(atob("%s"), (byte) => byte.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Function(`${await new Response(stream).text()}; return CircuitsVis;`)();
})())"""
"""Circuitsvis in a page of many views: each brings the script, in a third of its size; the first unpacks it for all."""


_DARK = """
@media (prefers-color-scheme: dark) { .hijack-lens-view { filter: invert(0.92) hue-rotate(180deg) } }
:is([data-jp-theme-light=false], [data-theme=dark], .vscode-dark) .hijack-lens-view {
  filter: invert(0.92) hue-rotate(180deg) }
:is([data-jp-theme-light=true], [data-theme=light], .vscode-light) .hijack-lens-view { filter: none }
"""
"""circuitsvis draws on white. A dark page, or notebook, turns its lightness round and keeps its hues."""


@dataclass(frozen=True)
class Panel:
    """One React element of circuitsvis.

    Attributes:
        element: its name; `None` where the static picture must do.
        props: its properties, as JSON types.
        title: shown above it; may be empty.
        still: a static picture of the same, as HTML, for when scripts do not run.
    """

    element: str | None
    props: dict[str, Any]
    title: str
    still: str


@dataclass(frozen=True, repr=False)
class View:
    """circuitsvis panels side by side. In a notebook it draws itself, offline.

    circuitsvis's own notebook form probes the network and loads from a CDN if it finds one; this one
    includes the script.

    Attributes:
        panels: what to draw.
        caption: says what is shown, and what the axes mean.

    Examples:
        >>> view = hl.show.attention(model, prompt)
        >>> "<script" in view.fragment()
        True
    """

    panels: tuple[Panel, ...]
    caption: str

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return f"View({', '.join(panel.title or str(panel.element) for panel in self.panels)})"

    def fragment(self) -> str:
        """HTML for a page that has loaded `circuitsvis_script()` once."""
        return self._html()

    def _repr_html_(self) -> str:
        return self._html(_LOADED % base64.b64encode(_packed_script()).decode())

    def _html(self, lens: str = "CircuitsVis") -> str:
        boxes, calls = [], []
        for panel in self.panels:
            name = f"hijack-lens-{uuid4().hex[:12]}"
            # Any "<" could begin what ends the script, or what hides its end from the browser.
            props = json.dumps(panel.props, allow_nan=False).replace("<", r"\u003c")
            if panel.element is not None:
                calls.append(f'lens.render("{name}", lens.{panel.element}, {props});')
            title = f'<div style="text-align:center;font-weight:600">{escape(panel.title)}</div>' if panel.title else ""
            boxes.append(f'<div style="min-width:0;padding-left:1em">{title}<div id="{name}">{panel.still}</div></div>')
        drawn = f"<script>(async () => {{ const lens = {lens}; {''.join(calls)} }})();</script>" if calls else ""
        return (
            f"<style>{_DARK}{PRINTED}</style>"
            '<figure class="hijack-lens-view" style="max-width:1000px;margin:1em 0;background:white;color:#222;'
            'overflow-x:auto">'
            f'<figcaption style="font-size:90%">{escape(self.caption)}</figcaption>'
            '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1em;'
            f'margin-top:0.5em">{"".join(boxes)}</div></figure>'
            f"{drawn}"
        )


@analysis
def attention(
    model: Any,
    prompt: "HijackPrompt | str | Tensor",
    heads: Components | None = None,
    circuit: Circuit | None = None,
    *,
    first_token: bool | None = None,
    prepend_bos: bool | None = None,
) -> View:
    """Attention patterns of heads on one prompt.

    Heads of deep models look at the first token where they look for nothing. Where it gets more than half of a
    head's attention in a model of more than two layers, it is left out, its share is written above the pattern, and
    colours reach to the largest of the rest.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: a single one.
        heads: a `Component`, its place ("L1H0") or a role of the circuit ("induction"); several of these, or a mapping
            to them; a `Circuit`; or "all". By default the circuit's previous-token and induction heads.
        circuit: by which heads are called; by default `model.circuit`, if there is one.
        first_token: whether to show the first token; by default, as said above.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for prompts the model cannot take, batches, and heads that it lacks.

    Examples:
        >>> view = hl.show.attention(model, prompt, "induction")
        >>> type(view).__name__
        'View'
    """
    if first_token is not None:
        check_type("first_token", first_token, bool)
    patterns = attention_patterns(model, prompt, heads, circuit)
    texts = list(prompt_texts(model, single_prompt(model, prompt)[0]))
    panels = [_pattern_panel(name, pattern, texts, is_deep(model), first_token) for name, pattern in patterns.items()]
    said = "Hover over a cell for its number."
    if (side := -(-len(texts) // _MOST_TOKENS)) > 1:
        said = f"So many tokens are drawn in blocks: a cell shows the largest of {side} × {side}."
    return View(
        tuple(panels),
        "Attention patterns, from 0 to 1, or to what is said (blue): each row is a destination token, which "
        f"attends, each column a source token, which is attended to. {said}",
    )


def _pattern_panel(
    name: str, pattern: Float[Tensor, "query key"], texts: list[str], deep: bool, first_token: bool | None
) -> Panel:
    share, most = float(pattern[1:, 0].mean()), 1.0
    if len(texts) > 2 and (deep and share > SINK if first_token is None else not first_token):
        pattern, texts = pattern[1:, 1:], texts[1:]
        most = float(pattern.max()) or 1.0
        name = f"{name}, up to {most:.2f}; the first token, left out, gets {share:.0%} (0 is the second)"
    side = -(-len(texts) // _MOST_TOKENS)
    if side > 1:
        pattern = max_pool2d(pattern[None], side, ceil_mode=True)[0]
        return Panel(None, {}, name, _png(attention_maps({name: pattern}, texts[::side], width=5.0, most=most)))
    still = _png(attention_maps({name: pattern}, texts, width=5.0, most=most))
    return Panel(
        "AttentionPattern",
        {
            "attention": _rounded(pattern, 4),
            "tokens": texts,
            "maxValue": most,
            "minValue": -most,
            "positiveColor": COLOURS["context"],
            "maskUpperTri": True,
            "showAxisLabels": True,
        },
        name,
        still,
    )


@analysis
def attention_patterns(
    model: Any, prompt: "HijackPrompt | str | Tensor", heads: Components | None = None, circuit: Circuit | None = None
) -> dict[str, Float[Tensor, "query key"]]:
    """The patterns that `attention` shows, by the heads' names."""
    circuit = circuit_of(model, circuit)
    chosen = components_of(model, heads, circuit, "heads", "head")
    name = "blocks.{}.attn.hook_pattern".format
    names = [name(layer) for layer in sorted({head.layer for head in chosen})]
    run = record(model, single_prompt(model, prompt), names)[1]
    patterns = {}
    for head in chosen:
        role = circuit.role(head)
        label = str(head) if role is None else f"{ROLE_NAMES[role]} ({head})"
        patterns[label] = run[name(head.layer)][0, head.head]
    return patterns


def attention_maps(
    patterns: dict[str, Float[Tensor, "query key"]], tokens: list[str], width: float = 9.0, most: float = 1.0
) -> Picture:
    """Attention patterns side by side, one heat map per head.

    Args:
        patterns: by the head's name.
        tokens: texts of the positions.
        width: the picture's width, in inches.
        most: the attention that is drawn darkest.

    Examples:
        >>> induction = hl.theory.attention(prompt, language)[1]
        >>> picture = hl.show.attention_maps({"induction head": induction}, list(prompt.text))
        >>> picture.save("attention.png")
    """
    check_type("patterns", patterns, Mapping)
    if not patterns:
        raise ValueError("patterns must hold at least one, got none")
    texts = check_texts("tokens", tokens)
    for name, pattern in patterns.items():
        if not isinstance(pattern, Tensor) or tuple(pattern.shape) != (len(texts),) * 2:
            raise ValueError(f"patterns[{shown(name)}] must be a tensor [{len(texts)}, {len(texts)}] for these tokens")
    width, most = check_number("width", width, positive=True), check_number("most", most, positive=True)
    picture = Picture(width, width / len(patterns) + 0.6)
    axes = picture.figure.subplots(1, len(patterns), squeeze=False)[0]
    crowded = min(len(texts), _TOKENS_NAMED) * max(map(len, texts)) > _LETTERS_PER_INCH * width / len(patterns)
    font: dict[str, Any] = {"fontsize": 7, "family": "monospace", "rotation": 90 if crowded else 0}
    for ax, (name, pattern) in zip(axes, patterns.items(), strict=True):
        drawn = heatmap(ax, pattern, texts, texts, spread=most, attention=True, named=_TOKENS_NAMED, **font)
        ax.set_aspect("equal")
        ax.set_title(name)
        ax.set_xlabel("source token (attended to)")
        ax.set_ylabel("destination token (attending)")
    picture.figure.colorbar(drawn, ax=axes, label="attention", shrink=0.8)
    return picture


def token_paths(result: LogitAttribution, a: str | int | None = None, b: str | int | None = None) -> View:
    """The prompt, each token shaded by what its paths add to `logit[a] - logit[b]`; one button per path.

    All paths share one colour scale, so shades can be compared. Paths that add nothing are left out; so are all but the
    largest of a deep model's hundreds.

    Raises:
        ValueError: for a batch, or an attribution of all positions.

    Examples:
        >>> view = hl.show.token_paths(hl.attribute(model, prompt), "e", "u")
        >>> type(view).__name__
        'View'
    """
    check_type("result", result, LogitAttribution)
    first, second = result.pair(a, b)
    by_source = result.by_source()  # refuses what has no source axis
    texts = result.source_texts()
    difference = result.values[..., first] - result.values[..., second]  # [path, source]
    columns = {"all paths": difference.sum(0)}
    columns |= {memory: part[:, first] - part[:, second] for memory, part in by_source.items()}
    kept = sorted(difference.abs().sum(-1).topk(min(_PATHS_SHOWN, len(difference))).indices.tolist())
    columns |= {result.paths[i].label: difference[i] for i in kept}
    columns = {label: column for label, column in columns.items() if label == "all paths" or bool(column.any())}
    values = torch.stack(list(columns.values()), -1)
    if not bool(values.isfinite().all()):
        raise ValueError("result holds NaN or infinite values, which no shade can show")
    bound = max(float(values.abs().max()), 1e-6)
    names = [repr(result.token_text(token)) for token in (first, second)]
    props = {
        # This element treats its tokens as HTML.
        "tokens": [escape(text + result.joiner) for text in texts],
        "values": _rounded(values, 6),
        "labels": list(columns),
        "positiveBounds": [bound] * len(columns),
        "negativeBounds": [-bound] * len(columns),
    }
    return View(
        (Panel("ColoredTokensMulti", props, "", shaded_prompt(result, first, second)),),
        f"What each source token adds to logit {names[0]} − logit {names[1]} at position {result.position}, by path: "
        f"bluer towards {names[0]}, redder towards {names[1]}, up to the bounds given. "
        "Pick a path above the text; hover over a token for its numbers.",
    )


def _rounded(values: Tensor, decimals: int) -> list[Any]:
    """Nested lists of short numbers: a page holds many, and shows few digits."""
    return values.double().round(decimals=decimals).tolist()


def _png(picture: Picture) -> str:
    data = picture.png(dpi=80)
    name, encoded = escape(picture.alt, quote=True), base64.b64encode(data).decode()
    return f'<img style="max-width:100%" alt="{name}" src="data:image/png;base64,{encoded}">'
