"""How a token's text is shown."""

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "Ġ": "␣", "Ċ": "⏎", "▁": "␣"}


def visible(text: str) -> str:
    """A token's text with white space made visible, also as byte-level tokenizers write it."""
    return "".join(_VISIBLE.get(character, character) for character in text)
