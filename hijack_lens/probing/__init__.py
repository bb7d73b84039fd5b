"""Conflict probes: facts that a context denies, and how often it must do so to be believed."""

from hijack_lens.probing.curve import DoseTheory
from hijack_lens.probing.dose import dose_response
from hijack_lens.probing.facts import Bigram, Conflict, Fact, conflict, counterfactuals
from hijack_lens.probing.result import DoseResponse

__all__ = ["Bigram", "Conflict", "DoseResponse", "DoseTheory", "Fact", "conflict", "counterfactuals", "dose_response"]
