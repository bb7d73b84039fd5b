"""Conflict probes: facts that a context denies, and how often it must do so to be believed."""

from hijack_lens.language.facts import FactPrompts, fact_prompts
from hijack_lens.probing.doses import DoseResponse, DoseTheory, dose_response

__all__ = ["DoseResponse", "DoseTheory", "FactPrompts", "dose_response", "fact_prompts"]
