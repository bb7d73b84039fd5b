"""Finding the two memories' components in any model, with the evidence for each."""

from hijack_lens.circuits.evidence import CircuitEvidence
from hijack_lens.circuits.finding import find_circuit

__all__ = ["CircuitEvidence", "find_circuit"]
