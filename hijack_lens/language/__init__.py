"""Bigram languages, prompts that set the memories against each other, and facts."""

from hijack_lens.language.baselines import best_accuracy, shortcut_accuracy, trigger_posterior
from hijack_lens.language.bigrams import BigramLanguage, default_text
from hijack_lens.language.facts import CAPITALS, Bigram, Fact, counterfactuals
from hijack_lens.language.prompts import HijackPrompt, hijack_prompt
from hijack_lens.language.relations import RELATIONS, Relation
from hijack_lens.language.sequences import SampledSequences
from hijack_lens.language.vocabulary import UNKNOWN, Token, Triggers

__all__ = [
    "CAPITALS",
    "RELATIONS",
    "UNKNOWN",
    "Bigram",
    "BigramLanguage",
    "Fact",
    "HijackPrompt",
    "Relation",
    "SampledSequences",
    "Token",
    "Triggers",
    "best_accuracy",
    "counterfactuals",
    "default_text",
    "hijack_prompt",
    "shortcut_accuracy",
    "trigger_posterior",
]
