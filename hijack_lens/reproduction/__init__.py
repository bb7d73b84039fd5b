"""The papers' claims as experiments that anyone can rerun."""

from hijack_lens.reproduction.claims import CLAIMS, Claim, Reproduction, claims_of, reproduce
from hijack_lens.reproduction.experiment import Recipe, trained
from hijack_lens.reproduction.findings import Finding, Result

__all__ = ["CLAIMS", "Claim", "Finding", "Recipe", "Reproduction", "Result", "claims_of", "reproduce", "trained"]
