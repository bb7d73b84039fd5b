"""Draws two of the README's pictures (benchmarks/birth.py and knob.py draw the others): python docs/figures.py"""

from pathlib import Path

import hijack_lens as hl
from hijack_lens.models import load_model

DOCS = Path(__file__).parent

language = hl.BigramLanguage.from_text(hl.default_text())
model = hl.associative_transformer(language)
prompt = hl.hijack_prompt(language, trigger="q", in_context="e", repeats=3, length=64, seed=0)
hl.show.margin_bars(hl.explain(model, prompt)).save(DOCS / "which_memory.png")

smollm2 = load_model("smollm2-135m")
prompt = "The capital of France is London. The capital of France is"
hl.explain(smollm2, prompt, "London", "Paris").picture().save(DOCS / "which_memory_of_smollm2.png")
