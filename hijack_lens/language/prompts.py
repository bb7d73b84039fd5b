"""Prompts that set the two memories against each other."""

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_choice, check_count, check_fields, check_type, shown
from hijack_lens.core.memory import check_memory
from hijack_lens.core.tables import Drawn
from hijack_lens.language.bigrams import BELOW_ONE, STEP, BigramLanguage
from hijack_lens.language.vocabulary import Token

_LETTERS = 600
"""Of a prompt's text, as many as its repr shows."""


@dataclass(frozen=True, repr=False)
class HijackPrompt(Drawn):
    """A prompt, or a batch of them, whose context says one thing and whose language says another.

    It ends with the trigger. In its context the trigger is always followed by `in_context`; the language
    says `global_candidate`. `clean` and `corrupted` differ only in what followed the trigger.

    Attributes:
        tokens: token ids; the clean prompt.
        corrupted: the same, with `alternative` in place of `in_context` after each trigger.
        trigger: q, the last token.
        in_context: c, what the context says.
        global_candidate: g, what the weights say.
        alternative: what the corrupted context says; by default g.
        language: whose tokens these are.

    Examples:
        >>> prompt.text
        'uesqeqe e ts thqeees; dq'
        >>> prompt.clean.shape, bool((prompt.clean != prompt.corrupted).any())
        (torch.Size([24]), True)
        >>> language.tokens[prompt.in_context], language.tokens[prompt.global_candidate]
        ('e', 'u')
    """

    tokens: Int[Tensor, "*batch pos"]
    corrupted: Int[Tensor, "*batch pos"]
    trigger: int
    in_context: int
    global_candidate: int
    alternative: int
    language: BigramLanguage

    def __post_init__(self) -> None:
        check_fields(self)
        if self.corrupted.shape != self.tokens.shape:
            raise ValueError(
                f"corrupted must have the shape of tokens, {tuple(self.tokens.shape)}, got {shown(self.corrupted)}"
            )

    @property
    def clean(self) -> Int[Tensor, "*batch pos"]:
        """The prompt itself, under its name in activation patching."""
        return self.tokens

    @property
    def text(self) -> str | list[str]:
        """The prompt as text; a list of texts for a batch."""
        if self.tokens.ndim == 1:
            return self.language.decode(self.tokens)
        return [self.language.decode(row) for row in self.tokens]

    def __len__(self) -> int:
        return self.tokens.shape[-1]

    def __repr__(self) -> str:
        names = [repr(self.language.tokens[i]) for i in (self.trigger, self.in_context, self.global_candidate)]
        text = repr(self.text)
        if len(text) > _LETTERS:
            n = len(self.tokens) if self.tokens.ndim > 1 else 1
            text = f"{text[: _LETTERS // 2]} … {text[-_LETTERS // 2 :]}, prompt={n}, length={len(self)}"
        return "HijackPrompt({}, trigger={}, in_context={}, global_candidate={})".format(text, *names)

    def to_pandas(self) -> pd.DataFrame:
        """A row per token: prompt, position, token, its text, and both of the corrupted prompt."""
        rows = self.tokens.reshape(-1, len(self))
        prompt = torch.arange(len(rows)).repeat_interleave(len(self))
        columns = {"prompt": prompt, "position": torch.arange(len(self)).repeat(len(rows))}
        columns |= {"token": rows.flatten(), "corrupted_token": self.corrupted.flatten()}
        frame = pd.DataFrame({name: column.tolist() for name, column in columns.items()})
        for name in ("", "corrupted_"):
            frame[f"{name}text"] = [self.language.tokens[i] for i in frame[f"{name}token"]]
        return frame


def hijack_prompt(
    language: BigramLanguage,
    trigger: Token,
    in_context: Token,
    repeats: int,
    length: int,
    distance: int | None = None,
    filler: Literal["sample", "avoid"] = "sample",
    *,
    global_candidate: Token | None = None,
    alternative: Token | None = None,
    n_prompts: int | None = None,
    seed: Seed,
) -> HijackPrompt:
    """A prompt in which `in_context` follows `trigger`, `repeats` times, and which ends with `trigger`.

    The rest is drawn from the language without the trigger, so that `repeats` is exact. A filler token always
    comes first, since position 1 has no previous token to remember.

    Args:
        language: the prompt's language.
        trigger: q.
        in_context: c, what follows q in the context.
        repeats: how often c follows q; 0 for a prompt without evidence.
        length: tokens in the prompt, the final trigger included.
        distance: how far before the final trigger the last repeat's trigger stands; by default all repeats
            stand at random places.
        filler: "sample" draws any token but the trigger; "avoid" keeps both candidates out as well, so
            that they occur nowhere but in the repeats.
        global_candidate: g, what the weights say; by default the most likely successor of q.
        alternative: what follows q in the corrupted prompt; by default g.
        n_prompts: prompts in a batch; by default one prompt, without a batch axis.
        seed: for places and filler.

    Raises:
        TypeError, ValueError: for unknown tokens, candidates that do not conflict, and repeats that do not fit.

    Examples:
        >>> hl.hijack_prompt(language, "q", "e", repeats=2, length=16, seed=0)
        HijackPrompt(' eeqeqee s. ts q', trigger='q', in_context='e', global_candidate='u')
        >>> batch = hl.hijack_prompt(language, "q", "e", repeats=2, length=16, n_prompts=5, seed=0)
        >>> batch.tokens.shape
        torch.Size([5, 16])
    """
    check_type("language", language, BigramLanguage)
    q, c = language.index(trigger, "trigger"), language.index(in_context, "in_context")
    weights_say = language.global_candidate(q) if global_candidate is None else global_candidate
    g = language.index(weights_say, "global_candidate")
    other = g if alternative is None else language.index(alternative, "alternative")
    name = language.tokens
    if c == g:
        raise ValueError(
            f"in_context {name[c]!r} is also what the weights say after {name[q]!r}: "
            "choose another, or give global_candidate="
        )
    for role, token in (("in_context", c), ("global_candidate", g), ("alternative", other)):
        if token == q:
            raise ValueError(f"{role} must not be the trigger itself, {name[q]!r}")
    if other == c:
        raise ValueError(f"alternative must differ from in_context, got {shown(name[c])} for both")
    repeats = check_count("repeats", repeats)
    check_choice("filler", filler, ("sample", "avoid"))
    if check_count("length", length, minimum=1) < 2 * repeats + 2:
        raise ValueError(
            f"repeats={repeats} do not fit: length must be at least 2 * repeats + 2 = {2 * repeats + 2}, got {length}"
        )
    latest = length - 3
    if distance is not None:
        if repeats == 0:
            raise ValueError("distance needs repeats of at least 1, got 0")
        furthest = length - 2 * repeats
        if not 2 <= check_count("distance", distance) <= furthest:
            raise ValueError(
                f"distance must lie between 2 and {furthest} for {repeats} repeats in {length} tokens, got {distance}"
            )
        latest = length - 1 - distance
    count = 1 if n_prompts is None else check_count("n_prompts", n_prompts, minimum=1)
    check_memory((6 * 8 * count + STEP) * int(length), n_prompts=count, length=length)
    generator = as_generator(seed)

    starts = _pair_starts(count, repeats, latest, distance is not None, generator)
    kept_out = [q] if filler == "sample" else [q, c, g, other]
    tokens = _fill(language, kept_out, starts, q, c, length, generator)
    corrupted = tokens.clone().scatter_(1, starts + 1, other)
    if n_prompts is None:
        tokens, corrupted = tokens[0], corrupted[0]
    return HijackPrompt(tokens, corrupted, q, c, g, other, language)


def _pair_starts(
    count: int, repeats: int, latest: int, at_latest: bool, generator: torch.Generator
) -> Int[Tensor, "prompt repeat"]:
    """Where the pairs begin: without overlap, between 1 and `latest`, the last at `latest` if asked."""
    # Pairs that do not overlap are distinct places once each earlier pair counts as one token.
    free = repeats - 1 if at_latest else repeats
    places = latest - (repeats - 1) - (1 if at_latest else 0)
    chosen = torch.rand(count, max(places, 0), generator=generator).argsort(1)[:, :free].sort(1).values + 1
    if at_latest:
        chosen = torch.cat([chosen, torch.full((count, 1), latest - (repeats - 1))], 1)
    return chosen + torch.arange(repeats)


def _fill(
    language: BigramLanguage,
    kept_out: list[int],
    starts: Int[Tensor, "prompt repeat"],
    q: int,
    c: int,
    length: int,
    generator: torch.Generator,
) -> Int[Tensor, "prompt length"]:
    """Prompts with the pairs in place; the rest is drawn from the language without the tokens in `kept_out`."""
    allowed = torch.ones(language.d_vocab, dtype=torch.float64)
    allowed[kept_out] = 0
    if not bool(allowed.any()):
        raise ValueError(f"language has {language.d_vocab} tokens, none of them left to fill the prompt with")
    start = language.pi_u * allowed
    start = start / start.sum() if start.sum() > 0 else allowed / allowed.sum()
    rows = language.pi_b * allowed
    rows = torch.where(rows.sum(-1, keepdim=True) > 0, rows, start)
    filler = BigramLanguage(rows / rows.sum(-1, keepdim=True), start)

    fixed = torch.full((len(starts), length), -1)
    fixed.scatter_(1, starts, q).scatter_(1, starts + 1, c)
    fixed[:, -1] = q
    uniform = torch.rand(length, len(starts), generator=generator, dtype=torch.float64).clamp_(max=BELOW_ONE)
    tokens = filler.sample(len(starts), 1, seed=generator).tokens
    columns = [tokens[:, 0]]
    for at, drawn in zip(fixed.T[1:], uniform[1:], strict=True):
        columns.append(torch.where(at >= 0, at, filler._successors(columns[-1], drawn)))
    return torch.stack(columns, 1)
