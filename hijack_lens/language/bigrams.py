"""The bigram language: a Markov chain over tokens, estimated from text or drawn at random, and sampled in batches."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import (
    Seed,
    as_generator,
    check_choice,
    check_count,
    check_distribution,
    check_fraction,
    check_number,
    check_tensor,
    check_text,
    fixed_seed,
    shown,
)
from hijack_lens.core.memory import check_memory, free_memory
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.language.sequences import (
    SampledSequences,
    drawn_jumps,
    drawn_per_sequence,
    drawn_triggers,
    ranked_triggers,
)
from hijack_lens.language.vocabulary import UNKNOWN, Token, Triggers, Vocabulary, cut

_CELL = 8
"""Bytes of a cell of `pi_b`."""

_MOST_SMOOTHING = 1e100
"""What float64 can still add up over any vocabulary."""

STEP = 600
"""Bytes of a tensor of its own for a time step, beside what it holds."""

BELOW_ONE = 1 - 2**-32
"""The largest number to invert a row's distribution at: any larger, it could round up into the next token's row."""

_SQUARED = 1000
"""Tokens up to which a chain's long-run frequencies are found by squaring it, in less than a second."""


class BigramLanguage(Vocabulary, Drawn):
    """A Markov chain over `d_vocab` tokens: `pi_b[v, u]` is the probability of u after v.

    The setting of Bietti et al. 2023 (arXiv 2306.00802, section 3) and Wang & Sato (arXiv 2412.11459). All
    probabilities are float64, on the CPU.

    Args:
        pi_b: transition probabilities, [d_vocab, d_vocab]; every row sums to 1 (to 1e-6).
        pi_u: probabilities of the first token, [d_vocab]; by default the chain's long-run frequencies.
        tokens: the text of each token, distinct; by default "0", "1", ...
        level: how text is cut into tokens, "char" (every character one token) or "word" (at white
            space); by default "char" if every token is one character.

    Raises:
        TypeError, ValueError: for invalid probabilities or token texts.

    Examples:
        >>> language = hl.BigramLanguage.from_text("the cat sat on the mat. the cat ate. " * 9, level="word")
        >>> language.d_vocab, language.joiner, language.tokens
        (7, ' ', ('.', 'ate', 'cat', 'mat', 'on', 'sat', 'the'))
        >>> language.tokens[language.global_candidate("the")]
        'cat'
        >>> f"{language.log_pi_b[language.index('the'), language.index('cat')]:.3f}"
        '-0.426'
        >>> round(language.entropy_rate, 3), language.long_run.shape
        (0.516, torch.Size([7]))
        >>> language.sample(2, 8, seed=0).tokens.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        pi_b: Any,
        pi_u: object = None,
        tokens: Sequence[str] | None = None,
        *,
        level: Literal["char", "word"] | None = None,
    ):
        try:
            shape = np.shape(pi_b)
        except Exception as error:  # of many kinds, by what the elements are
            raise TypeError(f"pi_b must be a [d_vocab, d_vocab] matrix, got {shown(pi_b)}") from error
        size = shape[0] if len(shape) == 2 else 0
        if size == 0:
            raise ValueError(f"pi_b must be a [d_vocab, d_vocab] matrix, got {shown(pi_b)}")
        self.pi_b: Float[Tensor, "d_vocab d_vocab"] = check_distribution("pi_b", pi_b, (size, size))
        super().__init__(size, tokens, level)
        start = torch.full((size,), 1 / size, dtype=torch.float64)
        self.pi_u: Float[Tensor, d_vocab] = (
            self._long_run(start) if pi_u is None else check_distribution("pi_u", pi_u, (size,))
        )

    @classmethod
    def from_text(
        cls, text: str, level: Literal["char", "word"] = "char", max_vocab: int | None = None, smoothing: float = 0.1
    ) -> "BigramLanguage":
        """The bigram language of a text, by counting.

        Args:
            text: any text of two tokens or more.
            level: tokens are characters, or words and punctuation marks.
            max_vocab: how many tokens to have: the most frequent, and "<unk>" for all the rest.
            smoothing: added to every bigram's count, so that no `log_pi_b` is -inf. With 0, bigrams
                that the text lacks have probability 0; then build models from `language.floored(...)`.

        Raises:
            TypeError, ValueError: for no text, or one of fewer than two tokens; for more different tokens than there is
                memory for, which grows with their square; or for a smoothing that is negative or beyond 1e100.
        """
        text = check_text("text", text)
        check_choice("level", level, ("char", "word"))
        smoothing = check_number("smoothing", smoothing)
        if smoothing > _MOST_SMOOTHING:
            raise ValueError(f"smoothing must be at most {_MOST_SMOOTHING:g}, got {shown(smoothing)}")
        pieces = cut(text, level)
        if len(pieces) < 2:
            raise ValueError(f"text must hold at least two tokens, got {shown(text)}")
        counts = Counter(pieces)
        if max_vocab is not None and len(counts) > check_count("max_vocab", max_vocab, minimum=2):
            kept = {token for token, _ in counts.most_common(max_vocab - 1)} - {UNKNOWN}
            pieces = [piece if piece in kept else UNKNOWN for piece in pieces]
        tokens = sorted(set(pieces))
        size = len(tokens)
        fits = math.isqrt(free_memory() // _CELL)
        check_memory(_CELL * size**2, f"give a max_vocab below {fits}", max_vocab=max_vocab, different_tokens=size)
        index = {token: i for i, token in enumerate(tokens)}
        ids = torch.tensor([index[piece] for piece in pieces])
        found, times = (ids[:-1] * size + ids[1:]).unique(return_counts=True)
        bigrams = torch.full((size, size), float(smoothing), dtype=torch.float64)
        bigrams.view(-1)[found] += times
        unigrams = torch.bincount(ids, minlength=size).double() + smoothing
        # The text's last token may have no successor: then any token follows it, by its frequency.
        bigrams[bigrams.sum(-1) == 0] = unigrams
        bigrams /= bigrams.sum(-1, keepdim=True)
        language = cls.__new__(cls)  # as `cls(...)`, without a copy of what may be large
        Vocabulary.__init__(language, size, tokens, level)
        language.pi_b = check_distribution("pi_b", bigrams, (size, size), copy=False)
        language.pi_u = check_distribution("pi_u", unigrams / unigrams.sum(), (size,))
        return language

    @classmethod
    def dirichlet(cls, d_vocab: int, concentration: float = 1.0, seed: Seed = 0) -> "BigramLanguage":
        """A random language: each row of `pi_b` drawn from a symmetric Dirichlet distribution.

        Args:
            d_vocab: number of tokens, named "0", "1", ...
            concentration: below 1, few likely continuations per token; above, many.
            seed: for the random draw.
        """
        d_vocab = check_count("d_vocab", d_vocab, minimum=2)
        check_memory(2 * _CELL * d_vocab**2, d_vocab=d_vocab)
        check_number("concentration", concentration, positive=True)
        rows = np.random.default_rng(fixed_seed(as_generator(seed))).dirichlet([concentration] * d_vocab, size=d_vocab)
        if not (abs(rows.sum(-1) - 1) < 1e-6).all():
            raise ValueError(f"concentration must be a number that float64 can draw with, got {shown(concentration)}")
        return cls(rows, level="word")

    def floored(self, floor: float) -> "BigramLanguage":
        """The language mixed with a uniform one, just enough that every probability is at least `floor`."""
        floor = check_number("floor", floor, positive=True)
        if floor >= 1 / self.d_vocab:
            raise ValueError(f"floor must lie between 0 and 1/d_vocab = {1 / self.d_vocab:g}, got {shown(floor)}")
        mixed = self.pi_b * (1 - self.d_vocab * floor) + floor
        return BigramLanguage(mixed, self.pi_u, tokens=self.tokens, level=self.level)

    def __repr__(self) -> str:
        return f"BigramLanguage(d_vocab={self.d_vocab}, level={self.level!r})"

    def to_pandas(self) -> pd.DataFrame:
        """A row per bigram: token, next_token, and the probability of the second after the first."""
        return tidy({"token": self.tokens, "next_token": self.tokens}, probability=self.pi_b)

    @cached_property
    def log_pi_b(self) -> Float[Tensor, "d_vocab d_vocab"]:
        """Natural logarithm of `pi_b`; -inf where a bigram never occurs."""
        return self.pi_b.log()

    def finite_log_pi_b(self) -> Float[Tensor, "d_vocab d_vocab"]:
        """`log_pi_b`, without any -inf.

        Raises:
            ValueError: if a bigram has probability 0.
        """
        if bool((self.pi_b == 0).any()):
            v, u = (self.pi_b == 0).nonzero()[0].tolist()
            raise ValueError(
                f"language.pi_b holds zeros (first: {self.tokens[u]!r} after {self.tokens[v]!r}), whose logarithm "
                "no memory can hold; use language.floored(1e-6), or smoothing > 0 in from_text"
            )
        return self.log_pi_b

    @cached_property
    def entropy_rate(self) -> float:
        """Nats per token of a long sequence: the lowest loss that a predictor without context can reach."""
        per_token = -torch.special.xlogy(self.pi_b, self.pi_b).sum(-1)
        return float(self.long_run @ per_token)

    @cached_property
    def long_run(self) -> Float[Tensor, "d_vocab"]:
        """How often each token occurs in a long sequence that starts from `pi_u`."""
        return self._long_run(self.pi_u)

    def global_candidate(self, trigger: Token) -> int:
        """The weights' answer after a trigger: the id of its most likely successor other than itself."""
        q = self.index(trigger, "trigger")
        others = self.pi_b[q].clone()
        others[q] = -1.0
        return int(others.argmax())

    def fixed_triggers(self, triggers: Triggers = None, n_triggers: int | None = None) -> Int[Tensor, "trigger"]:
        """Ids of triggers that are the same in every sequence.

        Args:
            triggers: tokens, as `sample` takes them; with `n_triggers`, "frequent" or "rare".
            n_triggers: how many.

        Raises:
            ValueError: for tokens that the language lacks, or more than ever occur.
        """
        if n_triggers is None:
            return self.trigger_ids(triggers)
        check_choice("triggers", triggers, ("frequent", "rare"))
        return ranked_triggers(self.long_run, triggers, n_triggers)

    def sample(
        self,
        n_sequences: int,
        length: int,
        triggers: Token | Sequence[Token] | None = (),
        *,
        n_triggers: int | None = None,
        continuations: Literal["uniform", "bigram"] | Sequence[float] | Float[Tensor, "d_vocab"] = "uniform",
        jump: float = 0.0,
        seed: Seed,
    ) -> SampledSequences:
        """Samples sequences in which each trigger has its own continuation, drawn anew per sequence.

        Sequences follow the chain, except that a trigger is always followed by its continuation
        (Bietti et al. 2023, section 3). Each time step draws the whole batch.

        Args:
            n_sequences: how many sequences.
            length: tokens in each.
            triggers: the triggers, the same in every sequence; `None` means every token, `()` none. With `n_triggers`,
                "frequent" or "rare" (the tokens that occur most or least often), or "random" or `()`.
            n_triggers: how many triggers; "random" ones are distinct and drawn per sequence from `pi_u`.
            continuations: drawn uniformly from the vocabulary, from the trigger's own row of `pi_b`
                ("bigram"), or from a given distribution over the vocabulary.
            jump: how often, where the chain decides the next token, it is one of the sequence's triggers instead, each
                as likely: what could be read from the context comes up more often, and is as certain as before.
            seed: for all random draws.

        Raises:
            ValueError: for an invalid count, trigger or distribution.
        """
        n_sequences = check_count("n_sequences", n_sequences, minimum=1)
        length = check_count("length", length, minimum=1)
        jump = check_fraction("jump", jump)
        per_sequence = 8 * ((6 if jump else 4) * length + 4 * self.d_vocab)
        check_memory(n_sequences * per_sequence + STEP * length, n_sequences=n_sequences, length=length)
        generator = as_generator(seed)
        if drawn_per_sequence(triggers, n_triggers):
            assert n_triggers is not None
            chosen = drawn_triggers(self.pi_u, n_sequences, n_triggers, generator)
        else:
            chosen = self.fixed_triggers(triggers, n_triggers).expand(n_sequences, -1)
        if jump and not chosen.shape[1]:
            raise ValueError(f"jump must be 0 where there are no triggers to jump to, got {shown(jump)}")
        follow = self._draw_continuations(chosen, continuations, generator)

        # What must follow each token in each sequence; -1 where the chain decides.
        forced = torch.full((n_sequences, self.d_vocab), -1).scatter_(1, chosen, follow)
        forced_flat, row_start = forced.flatten(), torch.arange(n_sequences) * self.d_vocab
        uniform = torch.rand(length, n_sequences, generator=generator, dtype=torch.float64)
        uniform[1:].clamp_(max=BELOW_ONE)
        first_cdf = (self.pi_u.cumsum(0) / self.pi_u.sum()).clamp(max=1)
        current = torch.searchsorted(first_cdf, uniform[0], right=True)
        columns = [current]
        jumps = drawn_jumps(jump, chosen, length, generator) if jump else None
        for t in range(1, length):
            must = forced_flat.index_select(0, row_start + current)
            free = self._successors(current, uniform[t])
            if jumps is not None:
                free = torch.where(jumps[t] >= 0, jumps[t], free)
            current = torch.where(must >= 0, must, free)
            columns.append(current)
        tokens = torch.stack(columns, 1)

        position = torch.arange(length).expand(n_sequences, -1)
        first_seen = torch.full_like(forced, length).scatter_reduce_(1, tokens, position, "amin")
        predictable = (forced.gather(1, tokens) >= 0) & (position > first_seen.gather(1, tokens))
        jumped = torch.zeros_like(predictable)
        if jumps is not None:
            jumped[:, :-1] = (jumps[1:].T >= 0) & (forced.gather(1, tokens) < 0)[:, :-1]
        return SampledSequences(tokens, predictable, chosen.clone(), follow, jumped)

    def step(self, tokens: Int[Tensor, "sequence"], uniform: Float[Tensor, "sequence"]) -> Int[Tensor, "sequence"]:
        """One step of the chain: the successor of each token, by inverting its row's distribution at `uniform`."""
        check_tensor("tokens", tokens, "token ids", floating=False)
        check_tensor("uniform", uniform, "numbers from 0 to 1")
        if tokens.ndim != 1 or tokens.shape != uniform.shape:
            raise ValueError(
                f"tokens and uniform must have one shape [sequence], got {list(tokens.shape)} and {list(uniform.shape)}"
            )
        return self._successors(tokens, uniform.clamp(max=BELOW_ONE))

    def _successors(
        self, tokens: Int[Tensor, "sequence"], uniform: Float[Tensor, "sequence"]
    ) -> Int[Tensor, "sequence"]:
        """`step` without its checks, for loops; no number may lie above `BELOW_ONE`."""
        return torch.searchsorted(self._stacked_cdf, tokens + uniform, right=True) - tokens * self.d_vocab

    @cached_property
    def _stacked_cdf(self) -> Float[Tensor, "cells"]:
        # Row v of the cumulative distribution, shifted to (v, v+1]: one sorted array serves every row.
        cdf = self.pi_b.cumsum(-1)
        return (cdf / cdf[:, -1:] + torch.arange(self.d_vocab)[:, None]).flatten()

    def _draw_continuations(
        self, triggers: Int[Tensor, "sequence trigger"], how: object, generator: torch.Generator
    ) -> Int[Tensor, "sequence trigger"]:
        if isinstance(how, str):
            check_choice("continuations", how, ("uniform", "bigram"))
            if how == "uniform":
                return torch.randint(self.d_vocab, triggers.shape, generator=generator)
            uniform = torch.rand(triggers.shape, generator=generator, dtype=torch.float64)
            return self.step(triggers.flatten(), uniform.flatten()).reshape(triggers.shape)
        weights = check_distribution("continuations", how, (self.d_vocab,))
        if triggers.numel() == 0:
            return triggers.clone()
        draws = torch.multinomial(weights, triggers.numel(), replacement=True, generator=generator)
        return draws.reshape(triggers.shape)

    def _long_run(self, start: Float[Tensor, "d_vocab"]) -> Float[Tensor, "d_vocab"]:
        # The lazy chain (P + I) / 2 has P's long-run frequencies and no periods; squaring it converges fast, however
        # slowly the chain forgets where it began. Each squaring of thousands of tokens takes seconds, though.
        if self.d_vocab > _SQUARED and (found := self._by_steps(start)) is not None:
            return found
        chain = (self.pi_b + torch.eye(self.d_vocab, dtype=torch.float64)) / 2
        for _ in range(64):
            squared = chain @ chain
            squared /= squared.sum(-1, keepdim=True)
            if torch.allclose(squared, chain, rtol=0, atol=1e-15):
                break
            chain = squared
        return start @ chain

    def _by_steps(self, start: Float[Tensor, "d_vocab"]) -> Float[Tensor, "d_vocab"] | None:
        """Long-run frequencies by single steps, if these soon shrink to nothing; else `None`."""
        now, before, steady = start, math.inf, 0
        for _ in range(300):
            new = (now @ self.pi_b + now) / 2
            moved = float((new - now).abs().sum())
            steady = steady + 1 if moved <= 0.9 * before else 0
            now, before = new, moved
            if steady >= 3 and moved < 1e-15:  # so all that is still to come is at most nine times as much
                return now / now.sum()
        return None


def default_text() -> str:
    """Real English text that needs no download: the Python documentation that CPython's help() prints.

    Examples:
        >>> text = hl.default_text()
        >>> len(text) > 100_000, "statement" in text
        (True, True)
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions strip pydoc_data
        import builtins
        import inspect

        return "\n\n".join(inspect.getdoc(thing) or "" for _, thing in sorted(vars(builtins).items()))
    return "\n\n".join(topics[name] for name in sorted(topics))
