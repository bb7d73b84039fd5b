"""Conflict probes: facts that a context contradicts, and how many repeats make the model follow it."""

from hijack_lens.language.facts import FactPrompts, fact_prompts
from hijack_lens.probing.doses import DoseResponse, DoseTheory, dose_response

__all__ = ["DoseResponse", "DoseTheory", "FactPrompts", "dose_response", "fact_prompts"]
