"""The associative-memory transformer in closed form: from counts and strengths, or from tables of its tokens."""

from hijack_lens.core.circuit import Margin, Strengths
from hijack_lens.theory.closed_form import attention, logits, margin
from hijack_lens.theory.flips import Flip, min_repeats, phase_boundary
from hijack_lens.theory.setting import Setting
from hijack_lens.theory.tables import Tables

__all__ = [
    "Flip",
    "Margin",
    "Setting",
    "Strengths",
    "Tables",
    "attention",
    "logits",
    "margin",
    "min_repeats",
    "phase_boundary",
]
