"""How results are shown: reports, pictures, circuitsvis views, and one-file HTML reports.

Each file registers what it can show; results know nothing about it.
"""

from hijack_lens.core.tables import html_of, page_of, picture_of, report_of
from hijack_lens.show import (  # noqa: F401
    answers,
    carriers,
    circuits,
    components,
    curves,
    dual,
    explanations,
    languages,
    logits,
    margins,
    memories,
    scores,
    sweeps,
    tasks,
    theories,
    weights,
)
from hijack_lens.show.explanations import margin_bars, write_report
from hijack_lens.show.style import Picture, heatmap
from hijack_lens.show.tasks import context_shares
from hijack_lens.show.views import View, attention, attention_maps, token_paths

__all__ = [
    "Picture",
    "View",
    "attention",
    "attention_maps",
    "context_shares",
    "heatmap",
    "html_of",
    "margin_bars",
    "page_of",
    "picture_of",
    "report_of",
    "token_paths",
    "write_report",
]
