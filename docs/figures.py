"""Draws the README's first picture (benchmarks/birth.py draws the other): python docs/figures.py"""

from pathlib import Path

import hijack_lens as hl

language = hl.BigramLanguage.from_text(hl.default_text())
model = hl.associative_transformer(language)
prompt = hl.hijack_prompt(language, trigger="q", in_context="e", repeats=3, length=64, seed=0)
hl.show.margin_bars(hl.explain(model, prompt)).save(Path(__file__).parent / "which_memory.png")
