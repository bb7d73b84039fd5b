"""The explorer of the theory: drag a slider, and see which memory wins."""

import math

import torch

from hijack_lens.core.checks import check_count, check_number, check_type, shown
from hijack_lens.core.circuit import Margin, Strengths
from hijack_lens.explorer.page import Page
from hijack_lens.language import BigramLanguage, HijackPrompt
from hijack_lens.theory import Setting, margin

_LONGEST = 256  # each repeat is a prompt of its own to the phase diagram, which is drawn anew at every move
_TOKENS = ("·", "q", "c", "g")
_STEEPEST = 600.0  # a ratio of probabilities that float64 can hold
_STRENGTHS = ("previous_token", "match", "copy", "bigram")
_RANGES = {  # least, most and step; a slider goes further if what is given does
    "repeats": (0, 16, 1),
    "length": (4, 64, 1),
    "distance": (2, 32, 1),
    "preference": (0, 12, 0.1),
    "previous_token": (0, 10, 0.1),
    "match": (0, 10, 0.1),
    "copy": (0, 20, 0.1),
    "bigram": (0, 3, 0.05),
}


class Explorer(Page):
    """Two memories that disagree, in closed form, with a slider for all that decides between them; from `explore`.

    Examples:
        >>> explorer = hl.explore(repeats=3)
        >>> explorer.values["repeats"], explorer.values["preference"]
        (3, 6.0)
        >>> explorer.prompt.text, explorer.setting.strengths.match
        ('·························qcqcqcq', 3.0)
        >>> print(explorer.margin)
        Margin(context=+6.6909, weights=-6.0000, rest=+0.0000, total=+0.6909)
        >>> explorer.save("explorer.html").name, type(explorer.widget).__name__
        ('explorer.html', 'ExplorerWidget')
    """

    title = "Which memory writes the next token?"
    scripts = ("parts.js", "closed_form.js", "in_theory.js")

    def __init__(self, repeats: int, length: int, distance: int, preference: float, strengths: Strengths):
        check_type("strengths", strengths, Strengths)
        repeats, distance = check_count("repeats", repeats), check_count("distance", distance, minimum=2)
        length, preference = check_count("length", length, minimum=4), check_number("preference", preference)
        if length > _LONGEST:
            raise ValueError(f"length must be at most {_LONGEST}, got {shown(length)}")
        if 2 * repeats + distance > length + 1:
            raise ValueError(
                f"repeats={repeats} and distance={distance} do not fit: length must be at least "
                f"2 * repeats + distance - 1 = {2 * repeats + distance - 1}, got {length}"
            )
        named = {name: getattr(strengths, name) for name in _STRENGTHS}
        for name, value in {"preference": preference, **named}.items():
            if value > _STEEPEST:
                what = "preference" if name == "preference" else f"strengths.{name}"
                raise ValueError(f"{what} must be at most {_STEEPEST:g}, to be put on a slider, got {value:g}")
        values = {"repeats": repeats, "length": length, "distance": distance, "preference": preference, **named}
        ranges = {
            name: {"min": low, "max": max(high, math.ceil(values[name])), "step": step}
            for name, (low, high, step) in _RANGES.items()
        }
        super().__init__({"ranges": ranges}, values)

    @property
    def prompt(self) -> HijackPrompt:
        """The prompt that the sliders say, in a language of four tokens: q, c, g, and "·" for any other."""
        values, (neutral, q, c, g) = self.values, range(4)
        tokens = torch.full((values["length"],), neutral)
        first = values["length"] + 1 - values["distance"] - 2 * values["repeats"]
        at = torch.arange(values["repeats"]) * 2 + first
        tokens[at], tokens[at + 1], tokens[-1] = q, c, q
        corrupted = torch.where(tokens == c, g, tokens)
        return HijackPrompt(tokens, corrupted, q, c, g, g, _language(values["preference"]))

    @property
    def setting(self) -> Setting:
        """The strengths that the sliders say, as `theory` takes them."""
        return Setting(Strengths(**{name: float(self.values[name]) for name in _STRENGTHS}))

    @property
    def margin(self) -> Margin:
        """`theory.margin` of the prompt in that setting."""
        prompt = self.prompt
        return margin(prompt, prompt.language, self.setting)

    def __repr__(self) -> str:
        return f"Explorer({', '.join(f'{name}={value}' for name, value in self.values.items())})"


def explore(
    repeats: int = 2,
    length: int = 32,
    distance: int = 2,
    preference: float = 6.0,
    strengths: Strengths = Strengths(previous_token=8.0, match=3.0),
) -> Explorer:
    """Sliders for what the context says and what the weights prefer: the margin by memory, both heads' attention, and
    the phase diagram with its flip threshold move with them.

    It computes the closed form of `theory` in the browser, so that it needs no model, no kernel and no network: shown
    in a notebook, exported with it, or saved as a page. With the extra `widgets`, the returned object knows what
    was dragged in a live notebook; without, it keeps what it was given. To export a notebook, run it by
    `jupyter nbconvert --execute --ExecutePreprocessor.store_widget_state=False`: a stored state would be drawn
    by scripts from the network.

    Args:
        repeats: how often the context says c after the trigger q.
        length: tokens in the prompt, from 4 to 256: neutral ones, the repeats, and q at the end.
        distance: from the last q that c follows to the q at the end, at least 2.
        preference: log(pi_b(g|q) / pi_b(c|q)), by how much the weights prefer g after q; natural, from 0 to 600.
        strengths: of the memories.

    Raises:
        TypeError, ValueError: for anything else, and for repeats that do not fit.

    Examples:
        >>> explorer = hl.explore(repeats=5, length=48, strengths=hl.Strengths(match=4.0))
        >>> explorer.margin.total > 0
        tensor(True)
        >>> explorer.save("explorer.html").name
        'explorer.html'
    """
    return Explorer(repeats, length, distance, preference, strengths)


def _language(preference: float) -> BigramLanguage:
    """Four tokens, of which q prefers g to c by that much."""
    pi_b = torch.full((len(_TOKENS),) * 2, 1 / len(_TOKENS), dtype=torch.float64)
    pi_b[1] = torch.tensor([0.0, 0.0, -preference, 0.0], dtype=torch.float64).softmax(-1)
    return BigramLanguage(pi_b, tokens=_TOKENS)
