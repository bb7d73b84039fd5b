"""The papers' claims as experiments that anyone can rerun, and sweeps that outgrow one machine."""

from hijack_lens.experiments.claims import CLAIMS, Claim
from hijack_lens.experiments.recipe import Recipe, trained
from hijack_lens.experiments.reproduce import Reproduction, reproduce
from hijack_lens.experiments.result import Finding, Result
from hijack_lens.experiments.sweep import sweep

__all__ = ["CLAIMS", "Claim", "Finding", "Recipe", "Reproduction", "Result", "reproduce", "sweep", "trained"]
