"""What accuracy can be on sequences with triggers: the best possible, and what a shortcut without order reaches."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_choice, check_type
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.language.sequences import SampledSequences

_NODES = 96
"""Of the integral over arrival times; at 96 it is exact to 1e-6 or better."""

_CHUNK = 2**18
"""Numbers of a coefficient that are computed together: questions times nodes."""


def best_accuracy(
    language: BigramLanguage,
    sequences: SampledSequences,
    *,
    random_triggers: bool = False,
    continuations: str = "uniform",
) -> float:
    """The accuracy, on tokens that follow from the context, of the best predictor of all tokens.

    It knows the language and how triggers and continuations are drawn, but not which of the tokens that follow from
    the context do. Where the triggers are the same in every sequence it knows them too, and is always right.

    Args:
        language: the sequences' language.
        sequences: without jumps.
        random_triggers: whether each sequence has triggers of its own, drawn from `pi_u`: then the predictor can only
            judge from what followed a token whether it is one.
        continuations: how the triggers' continuations were drawn.

    Returns:
        NaN if no token follows from the context.

    Examples:
        >>> from hijack_lens.language import best_accuracy
        >>> best_accuracy(language, language.sample(4, 32, triggers="q", seed=0))
        1.0
    """
    check_type("random_triggers", random_triggers, bool)
    if not random_triggers:
        _check(language, sequences)
        return 1.0 if bool(sequences.predictable[:, :-1].any()) else math.nan
    probability = trigger_posterior(language, sequences, continuations)
    row, t = sequences.predictable[:, :-1].nonzero().T
    bigrams, answers = language.pi_b[sequences.tokens[row, t]], sequences.tokens[row, t + 1]
    says = torch.nn.functional.one_hot(answers, language.d_vocab)
    mixture = probability[:, None] * says + (1 - probability[:, None]) * bigrams
    return float((mixture.argmax(-1) == answers).double().mean())


def shortcut_accuracy(language: BigramLanguage, sequences: SampledSequences) -> float:
    """The accuracy, on tokens that follow from the context, of guessing what has come up most beyond its frequency.

    The guess is the token with the highest (count + 1) / (expected count + 1) so far. It needs no order and no
    circuit, and models that fail to learn one do about this.

    Examples:
        >>> from hijack_lens.language import shortcut_accuracy
        >>> round(shortcut_accuracy(language, language.sample(4, 32, triggers="q", seed=0)), 3)
        0.786
    """
    _check(language, sequences)
    right = []
    expected = language.long_run * torch.arange(1, sequences.tokens.shape[1] + 1)[:, None]
    for tokens, known in zip(sequences.tokens, sequences.predictable, strict=True):
        if bool(known[:-1].any()):
            counts = torch.nn.functional.one_hot(tokens, language.d_vocab).cumsum(0)
            guesses = ((counts + 1) / (expected + 1)).argmax(-1)[:-1]
            right.append((guesses == tokens[1:])[known[:-1]])
    return float(torch.cat(right).double().mean()) if right else math.nan


def trigger_posterior(
    language: BigramLanguage, sequences: SampledSequences, continuations: str = "uniform"
) -> Float[Tensor, "question"]:
    """How likely it is, from what came before, that a token is one of its sequence's random triggers.

    Asked of each token that is one and has occurred before, in the order of `predictable[:, :-1].nonzero()`.
    Triggers are drawn from `pi_u` without replacement: they are the K tokens whose exponential clocks ring first. Given
    the time of the last of these, tokens are triggers independently but for their number; so the sum over sets is a
    polynomial's coefficient, and the time is integrated over.

    Examples:
        >>> from hijack_lens.language import trigger_posterior
        >>> sequences = language.sample(4, 16, n_triggers=2, seed=0)
        >>> trigger_posterior(language, sequences)[:3]
        tensor([0.9600, 1.0000, 1.0000], dtype=torch.float64)
    """
    _check(language, sequences)
    check_choice("continuations", continuations, ("uniform", "bigram"))
    row, t = sequences.predictable[:, :-1].nonzero().T
    if not len(row):
        return torch.empty(0, dtype=torch.float64)
    times = _times(language)
    parts = zip(row.split(_CHUNK // len(times)), t.split(_CHUNK // len(times)), strict=True)
    return torch.cat([_posterior(language, sequences, continuations, times, *part) for part in parts])


def _posterior(
    language: BigramLanguage,
    sequences: SampledSequences,
    continuations: str,
    times: Float[Tensor, "node"],
    row: Int[Tensor, "question"],
    t: Int[Tensor, "question"],
) -> Float[Tensor, "question"]:
    n_triggers = sequences.triggers.shape[1]
    asked = sequences.tokens[row, t]
    as_trigger, as_other = _likelihoods(language, sequences, continuations, row, t)
    waits = torch.exp(-times[:, None] * language.pi_u)  # that a token's clock has not rung
    # Coefficients by number of triggers so far, without and with the one whose clock rings last.
    shape = (n_triggers + 1, len(row), len(times))
    before, after = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    before[0] = 1.0

    def weights(u: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a token: no trigger, a trigger whose clock has rung, and the last trigger."""
        question = torch.arange(len(row))
        rest, rate = waits.T[u], language.pi_u[u]
        trigger, other = as_trigger[question, u][:, None], as_other[question, u][:, None]
        return other * rest, trigger * (1 - rest), trigger * rest * (rate[:, None] if rate.ndim else rate)

    for u in range(language.d_vocab):
        out, rung, last = (torch.where((asked == u)[:, None], neutral, one) for neutral, one in
                           zip((1.0, 0.0, 0.0), weights(u), strict=True))  # fmt: skip
        more, more_after = before[:-1] * rung, after[:-1] * rung + before[:-1] * last
        before, after = before * out, after * out
        before[1:] += more
        after[1:] += more_after
    out, rung, last = weights(asked)
    inside = ((after[-2] * rung + before[-2] * last) * times).sum(-1)  # evenly spaced in the logarithm of time
    outside = (after[-1] * out * times).sum(-1)
    return inside / (inside + outside)


def _likelihoods(
    language: BigramLanguage,
    sequences: SampledSequences,
    continuations: str,
    row: Int[Tensor, "question"],
    t: Int[Tensor, "question"],
) -> tuple[Float[Tensor, "question token"], Float[Tensor, "question token"]]:
    """How likely what followed each token up to t is, if it is a trigger and if it is none; the larger one is 1."""
    size = language.d_vocab
    as_trigger, as_other = (torch.zeros(len(row), size, dtype=torch.float64) for _ in range(2))
    for sequence in row.unique().tolist():
        tokens = sequences.tokens[sequence]
        before, after = tokens[:-1], tokens[1:]
        where = torch.nn.functional.one_hot(before, size).double()
        chain = (where * language.pi_b[before, after].log().clamp_min(-1e6)[:, None]).cumsum(0)
        seen = where.cumsum(0) > 0
        first = torch.zeros(size, dtype=torch.long)
        for v, u in zip(before.flip(0).tolist(), after.flip(0).tolist(), strict=True):
            first[v] = u  # what followed each token first
        broken = (where * (after != first[before]).double()[:, None]).cumsum(0) > 0
        drawn = language.pi_b[torch.arange(size), first].log() if continuations == "bigram" else -math.log(size)
        trigger = torch.where(seen, torch.as_tensor(drawn, dtype=torch.float64), 0.0)
        trigger = trigger.masked_fill(broken, -torch.inf)
        of_it = row == sequence
        # Up to t, t - 1 tokens have been followed; a token that is asked about has been followed before.
        at = t[of_it] - 1
        highest = torch.maximum(trigger, chain)
        as_trigger[of_it] = (trigger - highest).exp()[at]
        as_other[of_it] = (chain - highest).exp()[at]
    return as_trigger, as_other


def _times(language: BigramLanguage) -> Float[Tensor, "node"]:
    """Times from before any clock rings to after the slowest has, evenly spaced in their logarithms."""
    slowest = float(language.pi_u[language.pi_u > 0].min())
    return torch.linspace(math.log(1e-8), math.log(50 / slowest), _NODES, dtype=torch.float64).exp()


def _check(language: BigramLanguage, sequences: SampledSequences) -> None:
    check_type("language", language, BigramLanguage)
    check_type("sequences", sequences, SampledSequences)
    if int(sequences.tokens.max()) >= language.d_vocab:
        raise ValueError(
            f"sequences must hold tokens of the language, ids 0 to {language.d_vocab - 1}, "
            f"got {int(sequences.tokens.max())}"
        )
