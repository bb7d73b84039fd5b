"""One self-contained HTML file that opens offline."""

import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hijack_lens.core.files import write_atomically
from hijack_lens.language.prompts import HijackPrompt
from hijack_lens.show.logits import as_html, margin_bars
from hijack_lens.show.views import attention, circuitsvis_script, token_paths

if TYPE_CHECKING:
    from hijack_lens.explanation import Explanation


STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em;
  line-height: 1.45; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: 0.25em 0.8em; text-align: right }
thead th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
.verdict { font-size: 1.15em; padding: 0.8em 1em; background: #f2f5f8; border-left: 4px solid #0072B2 }
.weights { border-left-color: #D55E00 }
code { background: #f2f2f2; padding: 0 0.2em } svg { max-width: 100%; height: auto }
"""


def write_report(explanation: "Explanation", path: str | os.PathLike[str]) -> Path:
    """Writes an explanation as one HTML file, with circuitsvis views that need no network.

    The file is written whole or not at all.

    Args:
        explanation: from `hijack_lens.explain`.
        path: of the file; its folder must exist.

    Returns:
        The file's path.

    Raises:
        ValueError: where the folder does not exist.
    """
    if not hasattr(explanation, "ablated"):
        raise TypeError(f"explanation must come from hijack_lens.explain, got {type(explanation).__name__}")
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {str(target)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {str(target)!r}")
    return write_atomically(target, _page(explanation).encode())


def _page(explanation: "Explanation") -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hijack-lens: which memory wrote the logit?</title>
<style>{STYLE}</style><script>{circuitsvis_script()}</script></head><body>
<h1>Which memory wrote the logit?</h1>
<p class="verdict {explanation.winner}">{escape(explanation.verdict)}</p>
{_question(explanation)}
{margin_bars(explanation).svg()}
<h2>Which paths wrote it</h2>
{as_html(explanation.attribution)}
<h2>What each component is for</h2>
{_ablations(explanation)}
{_theory(explanation)}
{_heads(explanation)}
<h2>Which tokens spoke, through which path</h2>
{token_paths(explanation.attribution).fragment()}
</body></html>
"""


def _question(explanation: "Explanation") -> str:
    """What was asked; and how the circuit is known, where it was found."""
    attribution, evidence = explanation.attribution, explanation.circuit.evidence
    q, c, g = (f"<code>{escape(text)}</code>" for text in (attribution.source_texts()[-1], *explanation.names))
    if isinstance(explanation.prompt, HijackPrompt):
        return (
            f"<p>The prompt ends with {q}. Its context says that {c} follows; the weights, which hold the bigrams of "
            f"the language, say {g}.</p>"
        )
    found = ""
    if evidence is not None:
        verdicts = "".join(f"<li>{escape(line)}</li>" for line in evidence.verdicts.splitlines())
        found = f"<p>The circuit, as found on repeated random tokens:</p><ul>{verdicts}</ul>"
    return (
        f"<p>The prompt ends with {q}. The answer {c}, which stands for the context, is compared with the foil {g}, "
        f"which stands for the weights.</p>{found}"
    )


def _heads(explanation: "Explanation") -> str:
    """The named heads' attention; where none is named, that of the heads which wrote most of the margin."""
    attribution, title = explanation.attribution, "Where the heads look"
    heads = [part for _, part in explanation.circuit if part.kind == "head"]
    if not heads:
        a, b = attribution.pair()
        wrote = (attribution.by_path()[:, a] - attribution.by_path()[:, b]).abs().tolist()
        by_size = sorted(zip(wrote, attribution.paths, strict=True), key=lambda pair: -pair[0])
        last = [path.through[-1] for _, path in by_size if path.through]
        heads = list(dict.fromkeys(part for part in last if part.kind == "head"))[:2]
        title = "Where the heads look that wrote most; the circuit names none"
    if not heads:
        return ""
    view = attention(explanation.model, explanation.prompt, heads, explanation.circuit)
    return f"<h2>{title}</h2>\n{view.fragment()}"


def _ablations(explanation: "Explanation") -> str:
    if not explanation.ablated:
        return "<p>The circuit names no component, so that there is none to switch off.</p>"
    total = float(explanation.margin.total)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{margin:+.3f}</td><td>{margin - total:+.3f}</td></tr>"
        for name, margin in explanation.ablated.items()
    )
    return (
        f"<p>The margin, in logits, with a component's output set to zero; the whole model's is {total:+.3f}.</p>"
        f"<table><thead><tr><th>switched off</th><th>margin</th><th>change</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _theory(explanation: "Explanation") -> str:
    if explanation.theory is None or explanation.flip is None:
        return ""
    rows = "".join(
        f"<tr><td>{part}</td><td>{predicted:+.4f}</td><td>{found:+.4f}</td><td>{abs(predicted - found):.1e}</td></tr>"
        for part, (predicted, found) in explanation.theory_beside_model().items()
    )
    return (
        "<h2>What the theory says</h2>"
        "<p>The closed form predicts the same margin, from the prompt's counts and the memories' strengths alone.</p>"
        "<table><thead><tr><th>margin</th><th>theory</th><th>model</th><th>difference</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        f"<p>Repeats needed among neutral tokens, at this length: {escape(str(explanation.flip))}.</p>"
    )
