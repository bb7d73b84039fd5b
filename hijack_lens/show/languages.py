"""A bigram language, prompts that set the memories against each other, and sampled sequences."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hijack_lens.core.tables import Report, picture_of, report_of, table_of, visible
from hijack_lens.language import BigramLanguage, HijackPrompt, SampledSequences
from hijack_lens.language.sequences import ranked_by_frequency
from hijack_lens.show.style import BLUE, GREEN, GREY, ON_CELL, ORANGE, Picture, heatmap

_TOKENS, _ROWS, _ACROSS, _WIDEST = 32, 8, 32, 6.2  # of a line of boxes, in inches: it fits a phone
_LETTERS = 6
_PREDICTABLE = {"other": GREY, "trigger": GREEN, "follows from the context": BLUE, "jump": ORANGE}


@report_of.register
def language_report(language: BigramLanguage) -> Report:
    """Its most frequent tokens, and what follows each."""
    import pandas as pd

    tokens = [visible(token) for token in language.tokens]
    rows = []
    for i in ranked_by_frequency(language.long_run)[:20].tolist():
        after = language.pi_b[i].topk(min(3, language.d_vocab))
        said = ((tokens[j], p) for j, p in zip(after.indices.tolist(), after.values.tolist(), strict=True))
        rows.append((tokens[i], float(language.long_run[i]), "  ".join(f"{token!r} {p:.2f}" for token, p in said)))
    frame = pd.DataFrame(rows, columns=["token", "frequency", "most likely next"])
    lines = [f"entropy rate {language.entropy_rate:.3f} nats"]
    return Report(repr(language), lines, [table_of(frame, "the most frequent tokens")])


@picture_of.register
def bigram_map(language: BigramLanguage) -> Picture:
    """The probability of the next token after each of the most frequent ones."""
    chosen = ranked_by_frequency(language.long_run)[:_TOKENS].sort().values
    names = [_short(language.tokens[i]) for i in chosen.tolist()]
    side = 0.17 * max(len(names), 8)
    picture = Picture(2.4 + side, 1.3 + side)
    ax = picture.figure.add_subplot()
    table = language.pi_b[chosen][:, chosen]
    rotation = 90 if max(map(len, names)) > 1 else 0
    font: dict[str, Any] = {"fontsize": 8, "family": "monospace", "rotation": rotation}
    drawn = heatmap(ax, table, names, names, attention=True, spread=float(table.max()) or 1.0, **font)
    ax.set_ylabel("token")
    ax.set_xlabel("next token")
    whole = len(names) == language.d_vocab
    ax.set_title(f"{'all' if whole else 'the most frequent'} {len(names)} tokens", fontsize=9)
    picture.figure.colorbar(drawn, ax=ax, label="probability of the next token", pad=0.02)
    return picture


@report_of.register
def prompt_report(prompt: HijackPrompt) -> Report:
    """Its text, the corrupted one, and who says what."""
    tokens = prompt.language.tokens
    said = (
        f"after {tokens[prompt.trigger]!r} the context says {tokens[prompt.in_context]!r}, the weights "
        f"{tokens[prompt.global_candidate]!r}; the corrupted context says {tokens[prompt.alternative]!r}"
    )
    return Report(repr(prompt).splitlines()[0], [said], [table_of(prompt.to_pandas())])


@picture_of.register
def prompt_strip(prompt: HijackPrompt) -> Picture:
    """The first prompts' tokens, the trigger and both candidates in colour; tokens run on from line to line."""
    colours = {prompt.trigger: GREEN, prompt.in_context: BLUE, prompt.global_candidate: ORANGE}
    names = {"trigger": GREEN, "as the context says": BLUE, "as the weights say": ORANGE}
    tokens = prompt.tokens if prompt.tokens.ndim > 1 else prompt.tokens[None]
    after = tokens[:, :-1] == prompt.trigger
    shades = [["#99999933"] * tokens.shape[1] for _ in tokens[:_ROWS]]
    for row, line in enumerate(shades):
        for place, token in enumerate(tokens[row].tolist()):
            # Candidates stand out where they answer the trigger.
            if token == prompt.trigger or (place and bool(after[row, place - 1]) and token in colours):
                line[place] = colours[token]
    return _strips(tokens[:_ROWS], shades, prompt.language.tokens, names)


@report_of.register
def sequences_report(sequences: SampledSequences) -> Report:
    """How many there are, and how much of them follows from the context."""
    share = float(sequences.predictable.double().mean())
    return Report(
        repr(sequences), [f"{share:.1%} of tokens follow from the context"], [table_of(sequences.to_pandas())]
    )


@picture_of.register
def sequence_strips(sequences: SampledSequences) -> Picture:
    """The first sequences' token ids; triggers, what follows from the context, and jumps in colour."""
    shades = []
    for row in range(min(len(sequences.tokens), _ROWS)):
        triggers, line = set(sequences.triggers[row].tolist()), []
        for place, token in enumerate(sequences.tokens[row].tolist()):
            follows = place and bool(sequences.predictable[row, place - 1])
            jumped = place and bool(sequences.jumped[row, place - 1])
            kind = "follows from the context" if follows else "jump" if jumped else "trigger"
            line.append(_PREDICTABLE[kind] if follows or jumped or token in triggers else "#99999933")
        shades.append(line)
    names = {name: colour for name, colour in _PREDICTABLE.items() if name != "other"}
    return _strips(sequences.tokens[:_ROWS], shades, None, names)


def _strips(
    tokens: Tensor, shades: Sequence[Sequence[str]], texts: Sequence[str] | None, legend: dict[str, str]
) -> Picture:
    """Tokens in boxes: of one prompt, on several lines; of several, the start of each on a line."""
    from matplotlib.patches import Patch, Rectangle

    drawn = tokens[:, : _ROWS * _ACROSS if len(tokens) == 1 else _ACROSS].tolist()
    named = [[str(token) if texts is None else _short(texts[token]) for token in row] for row in drawn]
    width = 0.16 + 0.085 * max(len(name) for line in named for name in line)
    across = min(_ACROSS, len(named[0]), int(_WIDEST / width))
    rows: list[Any] = []
    for line, shade in zip(named, shades, strict=True):
        cells = list(zip(line, shade, strict=False))
        several = [cells[i : i + across] for i in range(0, len(cells), across)]
        rows += several[: 2 * _ROWS] if len(tokens) == 1 else several[:1]
    picture = Picture(max(4.6, 0.4 + width * across), 0.75 + 0.32 * len(rows))
    ax = picture.figure.add_subplot()
    for y, row in enumerate(rows):
        for x, (name, colour) in enumerate(row):
            ax.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, color=colour, linewidth=0))
            ink = "black" if len(colour) > 7 else "white" if colour != GREY else ON_CELL
            ax.text(x + 0.5, y + 0.5, name, ha="center", va="center", fontsize=8, family="monospace", color=ink)
    ax.set_xlim(0, across)
    ax.set_ylim(len(rows), 0)
    ax.axis("off")
    hidden = tokens.numel() - sum(map(len, rows))
    handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
    title = f"the first {sum(map(len, rows))} of {tokens.numel()} tokens" if hidden else None
    look: dict[str, Any] = {"loc": "outside upper center", "ncols": 3, "frameon": False}
    picture.figure.legend(handles=handles, fontsize=8, title=title, title_fontsize=8, **look)
    return picture


def _short(text: str) -> str:
    text = visible(text)
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
