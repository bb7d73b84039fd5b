"""The papers' claims as experiments that anyone can rerun."""

from hijack_lens.reproduction.claims import CLAIMS, Claim
from hijack_lens.reproduction.experiment import Finding, Recipe, Result, trained
from hijack_lens.reproduction.running import Reproduction, reproduce

__all__ = ["CLAIMS", "Claim", "Finding", "Recipe", "Reproduction", "Result", "reproduce", "trained"]
