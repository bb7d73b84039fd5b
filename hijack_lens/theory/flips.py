"""How many repeats in context it takes to overrule the weights, and where the boundary lies.

One layout serves both questions: neutral tokens first (neither the trigger q nor a candidate, except that
`global_count` of them are the global candidate), then n times the bigram (q, c), then q, whose successor is
predicted. Either the prompt's length is fixed, and repeats replace neutral tokens; or the number of neutral
tokens is fixed, and the prompt grows.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_count, check_type, shown
from hijack_lens.core.circuit import Margin, Strengths
from hijack_lens.core.memory import check_memory
from hijack_lens.language import BigramLanguage, Token
from hijack_lens.language.sequences import ranked_by_frequency
from hijack_lens.theory.closed_form import check_setting, previous_token_memory
from hijack_lens.theory.setting import Setting
from hijack_lens.theory.tables import Tables

_SEARCHED = 500
"""Repeats that are tried at most where each is a prompt of its own."""


@dataclass(frozen=True)
class Flip:
    """The smallest number of in-context repeats with which the context wins.

    Attributes:
        repeats: that number; `None` if no number is enough.
        reason: why, in one sentence.

    Examples:
        >>> flip = hl.theory.min_repeats(language, "q", "e", length=24)
        >>> flip.repeats
        1
        >>> print(flip)
        1 (with 1 repeat the context pulls by 9.46, the weights by 6.58)
    """

    repeats: int | None
    reason: str

    def __str__(self) -> str:
        return f"{'no number would do' if self.repeats is None else self.repeats} ({self.reason})"


def min_repeats(
    language: BigramLanguage,
    trigger: Token,
    in_context: Token,
    global_candidate: Token | None = None,
    setting: Setting | Tables = Setting(),
    *,
    length: int | None = None,
    lead: int | None = None,
    global_count: int = 0,
    max_repeats: int = 100_000,
) -> Flip:
    """The smallest n for which n repeats of (trigger, in_context) overrule the weights.

    Follows from the hijack condition b3 (a_c - a_g) > g log(pi_b(g|q) / pi_b(c|q)), where a_v is the induction
    head's attention to token v (Wang & Sato, arXiv 2412.11459, made exact for finite strengths). Exact ties
    are decided by rounding. With tables, no closed form exists: prompts are tried, whose neutral tokens are the
    language's most frequent ones, in turn.

    Args:
        language: the weights' bigrams.
        trigger: q.
        in_context: c, what the context says follows q.
        global_candidate: what the weights say; by default the most likely successor of q.
        setting: the model's setting, or its tables.
        length: the number of tokens in a prompt of fixed length, in which repeats replace neutral tokens.
        lead: or else the number of neutral tokens in a prompt that grows with the repeats.
        global_count: how many of the neutral tokens are the global candidate.
        max_repeats: how far to look if a growing prompt's previous-token memory blurs (finite b1); with tables, no
            further than 500, nor than they have positions.

    Raises:
        TypeError, ValueError: for counts that do not fit, and unless exactly one of `length` and `lead` is given.

    Examples:
        >>> print(hl.theory.min_repeats(language, "q", "e", length=24))
        1 (with 1 repeat the context pulls by 9.46, the weights by 6.58)
        >>> weak = hl.theory.Setting(hl.Strengths(match=2.0))
        >>> print(hl.theory.min_repeats(language, "q", "e", setting=weak, length=24))
        5 (with 5 repeats the context pulls by 6.6, the weights by 6.58)
    """
    check_type("language", language, BigramLanguage)
    check_setting(setting, language)
    q, c, g = _conflict(language, trigger, in_context, global_candidate)
    layout = _Layout(length, lead, global_count)
    most = check_count("max_repeats", max_repeats, minimum=1)
    if isinstance(setting, Tables):
        return _by_search(language, (q, c, g), setting, layout, most)
    log_pi_b = language.finite_log_pi_b()
    ahead = setting.strengths.bigram * float(log_pi_b[q, g] - log_pi_b[q, c])
    if q not in language.trigger_ids(setting.triggers):  # it matches nothing, so all positions score alike
        setting = replace(setting, strengths=replace(setting.strengths, match=0.0))
    if layout.lead is not None and setting.strengths.previous_token == math.inf and setting.positions == "relative":
        return _with_infinite_focus(ahead, setting.strengths, layout.lead, layout.global_count)
    most, limit = layout.limit(most)
    check_memory(64 * (most + 1), max_repeats=max_repeats, length=length)  # as many are tried, in a few tables
    pull = _context_pull(torch.arange(most + 1), setting, layout)
    if (flip := _first_win(pull, ahead)) is not None:
        return flip
    return Flip(None, f"{limit}: the context pulls by at most {float(pull.max()):.3g}, the weights by {ahead:.3g}")


def phase_boundary(
    repeats: Int[Tensor, "repeats"],
    setting: Setting | Tables = Setting(),
    *,
    length: int | None = None,
    lead: int | None = None,
    global_count: int = 0,
    language: BigramLanguage | None = None,
    trigger: Token | None = None,
    in_context: Token | None = None,
    global_candidate: Token | None = None,
) -> Float[Tensor, "repeats"]:
    """The log-ratio log(pi_b(g|q) / pi_b(c|q)) at which both memories pull equally, for each number of repeats.

    Below the boundary the context wins; above it, the weights do. Arguments and errors are those of
    `min_repeats`; the setting's triggers do not matter: q counts as one. By strengths the boundary is the same for
    all tokens; by tables it is that of the trigger and the candidates, which are then required, with the language.

    Returns:
        Natural log-ratios, float64.

    Examples:
        >>> import torch
        >>> hl.theory.phase_boundary(torch.arange(4), length=24)
        tensor([0.0000, 9.4606, 9.7346, 9.8294], dtype=torch.float64)
    """
    layout = _Layout(length, lead, global_count)
    check_setting(setting)
    given = repeats
    try:
        repeats = torch.as_tensor(np.asarray(given))
    except Exception as error:  # of many kinds, by what the elements are
        raise TypeError(f"repeats must be a vector of integers >= 0, got {shown(given)}") from error
    whole = not (repeats.is_floating_point() or repeats.is_complex() or repeats.dtype == torch.bool)
    repeats = repeats.long() if whole else repeats  # small integers are masks as indices, or overflow
    if not whole or repeats.ndim != 1 or not len(repeats) or int(repeats.min()) < 0:
        raise ValueError(f"repeats must be a vector of integers >= 0, got {shown(repeats.tolist())}")
    shortest = 2 * int(repeats.max()) + 1 + layout.global_count
    if layout.length is not None and layout.length < shortest:
        raise ValueError(f"length must be at least 2 * repeats + 1 + global_count = {shortest}, got {length}")
    if isinstance(setting, Tables):
        if language is None or trigger is None or in_context is None:
            raise TypeError("phase_boundary needs language=, trigger= and in_context= where setting is Tables")
        check_type("language", language, BigramLanguage)
        check_setting(setting, language)
        conflict = _conflict(language, trigger, in_context, global_candidate)
        return _pull_by_tables(language, conflict, setting, layout, repeats)[0] / setting.bigram
    if setting.strengths.bigram == 0:
        raise ValueError("strengths.bigram must be > 0: without the weights' memory there is no boundary")
    return _context_pull(repeats, setting, layout) / setting.strengths.bigram


@dataclass(frozen=True)
class _Layout:
    """The layout of a prompt of fixed `length`, or of one that grows after `lead` neutral tokens."""

    length: int | None
    lead: int | None
    global_count: int

    def __post_init__(self) -> None:
        if (self.length is None) == (self.lead is None):
            raise ValueError(f"give either length= or lead=, got length={shown(self.length)}, lead={shown(self.lead)}")
        # As Python's ints, since NumPy's small ones overflow.
        count = check_count("global_count", self.global_count)
        object.__setattr__(self, "global_count", count)
        name, minimum = ("length", 1 + count) if self.lead is None else ("lead", count)
        object.__setattr__(self, name, check_count(name, getattr(self, name), minimum))

    def limit(self, most: int) -> tuple[int, str]:
        """How many repeats there may be, `most` where the prompt grows; and how to say that none of them wins."""
        if self.length is None:
            return most, f"no number of repeats up to {most} wins"
        fits = (self.length - 1 - self.global_count) // 2
        return fits, f"no number of repeats that fits into {self.length} tokens (at most {fits}) wins"


def _conflict(
    language: BigramLanguage, trigger: Token, in_context: Token, global_candidate: Token | None
) -> tuple[int, int, int]:
    """The trigger and its two candidates."""
    q, c = language.index(trigger, "trigger"), language.index(in_context, "in_context")
    weights_say = language.global_candidate(q) if global_candidate is None else global_candidate
    g = language.index(weights_say, "global_candidate")
    if len({q, c, g}) < 3:
        names = (repr(language.tokens[i]) for i in (q, c, g))
        named = "trigger {}, in_context {} and global_candidate {}".format(*names)
        raise ValueError(f"{named} must be three different tokens")
    return q, c, g


def _by_search(
    language: BigramLanguage, conflict: tuple[int, int, int], tables: Tables, layout: _Layout, most: int
) -> Flip:
    """The answer by tables."""
    most = min(most, _SEARCHED)
    if layout.lead is not None and tables.n_positions is not None:
        most = min(most, max(tables.n_positions - 1 - layout.lead, 0) // 2)
    most, limit = layout.limit(most)
    tried = 0
    while True:
        upto = min(max(8, 2 * tried), most)
        pull, ahead = _pull_by_tables(language, conflict, tables, layout, torch.arange(tried, upto + 1))
        if (flip := _first_win(pull, ahead, tried)) is not None:
            return flip
        if upto == most:
            return Flip(None, f"{limit}: the weights pull by {ahead:.3g}")
        tried = upto


def _first_win(pull: Float[Tensor, "repeats"], ahead: float, start: int = 0) -> Flip | None:
    """The first number of repeats, counted from `start`, with which the context pulls by more than the weights."""
    wins = (pull > ahead).nonzero().flatten()
    if not len(wins):
        return None
    n = start + int(wins[0])
    pulls = f"with {n} repeat{'s' * (n != 1)} the context pulls by {float(pull[wins[0]]):.3g}"
    return Flip(n, f"{pulls}, the weights by {ahead:.3g}")


def _pull_by_tables(
    language: BigramLanguage, conflict: tuple[int, int, int], tables: Tables, layout: _Layout, repeats: Tensor
) -> tuple[Float[Tensor, "repeats"], float]:
    """What attention adds to the margin with each number of repeats, and by how much the weights lead."""
    q, c, g = conflict
    neutral = [token for token in ranked_by_frequency(language.long_run).tolist() if token not in conflict]
    most = int(repeats.max())
    longest = layout.length or (layout.lead or 0) + 2 * most + 1
    check_memory(8 * longest * 4 * (longest + len(tables.offset)), repeats=most, length=longest)

    def split(n: int, last: bool) -> Margin:
        """The margin with n repeats; at all positions, or at the last alone."""
        free = ((layout.length or 0) - 1 - 2 * n if layout.lead is None else layout.lead) - layout.global_count
        if free and not neutral:
            raise ValueError(
                f"language must have tokens beside the trigger and its candidates, got {language.d_vocab} in all"
            )
        filler = (neutral * (free // max(len(neutral), 1) + 1))[:free]
        prompt = torch.tensor([g] * layout.global_count + filler + [q, c] * n + [q])
        return tables.written(prompt, last).margin(c, g)

    if layout.lead is not None:  # a shorter prompt is the beginning of a longer one
        grown = split(most, last=False)
        return (grown.context + grown.rest)[layout.lead + 2 * repeats], -float(grown.weights[-1])
    alone = [split(n, last=True) for n in repeats.tolist()]
    return torch.cat([one.context + one.rest for one in alone]), -float(alone[0].weights)


def _with_infinite_focus(ahead: float, strengths: Strengths, lead: int, global_count: int) -> Flip:
    """The answer for a growing prompt and b1 = inf, where the context's pull rises with every repeat."""
    unmatched = math.exp(-strengths.match)
    per_repeat = strengths.copy - ahead * (1 + unmatched)
    # What the repeats must make up for; with lead = 0, position 1 remembers its q as its own predecessor.
    deficit = ahead * (lead + 1) + strengths.copy * global_count if lead else ahead
    if deficit < 0:
        return Flip(0, f"the context is ahead by {-ahead:.3g} without any repeat")
    weights = f"the weights are ahead by {ahead:.3g}"
    if per_repeat <= 0:
        most = f"b3 / (1 + e^-b2) = {strengths.copy / (1 + unmatched):.3g}"
        return Flip(None, f"{weights}, and as repeats pile up the context's pull only tends to {most}")
    tie = deficit * (unmatched if lead else 1.0) / per_repeat
    return Flip(math.floor(tie) + 1, f"{weights}; the context draws level at {tie:.4g} repeats")


def _context_pull(repeats: Int[Tensor, "repeats"], setting: Setting, layout: _Layout) -> Float[Tensor, "repeats"]:
    """b3 (a_c - a_g) at the end of the prompt with each number of repeats."""
    if layout.lead is not None:
        return _pull(repeats, setting, layout)
    # At a fixed length, each number of repeats has its own positions: take some at a time, to bound the memory.
    rows = max(1, 2_000_000 // (int(repeats.max()) + 1))
    return torch.cat([_pull(part, setting, layout) for part in repeats.split(rows)])


def _pull(repeats: Int[Tensor, "repeats"], setting: Setting, layout: _Layout) -> Float[Tensor, "repeats"]:
    """`_context_pull` in one go; in logarithms, since large strengths make attention weights over- or underflow."""
    n = repeats.double()
    if layout.lead is not None:
        # The pairs of a shorter prompt are a prefix of a longer one's: one running sum serves every n.
        start, row = torch.tensor([float(layout.lead)], dtype=torch.float64), torch.zeros_like(repeats)
    else:
        assert layout.length is not None
        start, row = layout.length - 1 - 2 * n, torch.arange(len(repeats))
    k = torch.arange(1, int(repeats.max()) + 1, dtype=torch.float64)

    def score(pos: Tensor, count: Tensor, before: float) -> Tensor:
        """b2 m at a position, from how often q has occurred and whether it came just before."""
        seen = torch.full_like(pos, before)
        return setting.strengths.match * previous_token_memory(count.expand_as(pos), seen, pos, setting)

    on_q = score(start[:, None] + 2 * k - 1, k, 0.0)
    on_c = score(start[:, None] + 2 * k, k, 1.0)
    # Running sums up to each number of repeats, with the empty sum in front.
    running = torch.nn.functional.pad(torch.stack([on_q, on_c]).logcumsumexp(-1), (1, 0), value=-torch.inf)
    sum_q, sum_c = running[:, row, repeats]
    last = score(start + 2 * n + 1, n + 1, 0.0)
    total = torch.stack([start.log().expand_as(n), sum_q, sum_c, last]).logsumexp(0)
    return setting.strengths.copy * ((sum_c - total).exp() - layout.global_count * (-total).exp())
