"""The associative-memory transformer in closed form: from counts and strengths, with no model involved."""

from hijack_lens.theory.closed_form import attention, logits, margin
from hijack_lens.theory.flip import Flip, min_repeats, phase_boundary
from hijack_lens.theory.margin import Margin
from hijack_lens.theory.strengths import Strengths

__all__ = ["Flip", "Margin", "Strengths", "attention", "logits", "margin", "min_repeats", "phase_boundary"]
