"""The whole analysis in one call."""

from hijack_lens.explanation.explaining import explain
from hijack_lens.explanation.of_answer import AnswerExplanation, Check
from hijack_lens.explanation.of_circuit import Explanation

__all__ = ["AnswerExplanation", "Check", "Explanation", "explain"]
