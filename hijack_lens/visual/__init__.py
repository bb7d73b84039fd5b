"""Pictures: circuitsvis views, figures, and one-file HTML reports."""

from hijack_lens.visual.report import report

__all__ = ["report"]
