"""Pictures: circuitsvis views, figures, and one-file HTML reports."""

from hijack_lens.show.logits import attention_maps, margin_bars
from hijack_lens.show.page import write_report
from hijack_lens.show.style import Picture
from hijack_lens.show.views import View, attention, token_paths

__all__ = ["Picture", "View", "attention", "attention_maps", "margin_bars", "token_paths", "write_report"]
