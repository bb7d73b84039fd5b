"""Bigram languages, prompts that set the memories against each other, and facts."""

from hijack_lens.language.bigrams import UNKNOWN, BigramLanguage, SampledSequences, Token, default_text
from hijack_lens.language.facts import CAPITALS, Bigram, Fact, counterfactuals
from hijack_lens.language.prompts import HijackPrompt, hijack_prompt

__all__ = [
    "CAPITALS",
    "UNKNOWN",
    "Bigram",
    "BigramLanguage",
    "Fact",
    "HijackPrompt",
    "SampledSequences",
    "Token",
    "counterfactuals",
    "default_text",
    "hijack_prompt",
]
