"""What every example in the docstrings finds there already."""

# begin
import hijack_lens as hl

language = hl.BigramLanguage.from_text("the quick queen quits; the squid acquires quite equal quays. " * 9)
model = hl.associative_transformer(language, n_ctx=64)
prompt = hl.hijack_prompt(language, trigger="q", in_context="e", repeats=3, length=24, seed=0)
# end
