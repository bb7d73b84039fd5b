"""Pictures: circuitsvis views, figures, and one-file HTML reports."""

from hijack_lens.visual.figures import Picture, attention_maps, margin_bars
from hijack_lens.visual.report import report
from hijack_lens.visual.views import View, attention, token_paths

__all__ = ["Picture", "View", "attention", "attention_maps", "margin_bars", "report", "token_paths"]
