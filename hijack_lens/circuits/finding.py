"""Finding the two memories' components in any model, with the evidence for each."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.circuits.bigram_memory import bigram_evidence
from hijack_lens.circuits.evidence import (
    MIN_ATTENTION,
    MIN_EFFECT,
    MIN_GAIN,
    N_SCREENED,
    CircuitEvidence,
    HeadEvidence,
    MLPEvidence,
)
from hijack_lens.circuits.heads import (
    Repeats,
    ablation_effects,
    draw_repeats,
    head_scores,
    lost_alone,
)
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import Seed, as_generator, check_count, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.inputs import token_ids
from hijack_lens.core.memory import check_memory
from hijack_lens.core.statistics import chance, student_quantile
from hijack_lens.core.texts import n_outputs, outputs_are_tokens, tokenizer_of

_MIN_PERIOD = 3


@analysis
def find_circuit(
    model: Any, *, triggers: Any = None, vocabulary: Any = None, n_prompts: int = 32, period: int = 24, seed: Seed = 0
) -> Circuit:
    """Finds previous-token heads, induction heads and the bigram memory, as far as there are any.

    The model reads `period` random tokens twice, the second time from another starting point. In the prompt's twin,
    the first half has the same tokens in another order. So any difference between the two comes from the order of
    the context, which is all that induction can use. A head is named if both hold:

    - Attention. An induction head attends to what followed the current token's previous occurrence, more than to
      the same positions in the twin, and by more than the best of all heads reaches by chance. A previous-token head
      attends to the previous position, more than to any other distance, from the positions that induction looks for.
      Both by at least `evidence.MIN_ATTENTION`, the latter above what attending to all positions alike would give.
    - Effect, on other prompts than those scored: the right next token becomes less likely if the head's output is
      taken from the twin, or more likely if all the role's candidates are off and this one is switched on again (which
      also finds heads that back one another up). A previous-token head comes before an induction head.

    Heads with such an effect, but not such attention, have no role; `evidence.by_effect` names them.

    An MLP is a bigram memory if two things hold. With its output the same for all tokens, the prediction for a token
    in random contexts loses a share of what it tells about the token. And its output moves the logits by more than it
    would in random directions of the residual stream. The predictions need not be *true*: they are compared with the
    model's own. So a random model with confident predictions differs only in its directions from one that has learned
    a random language; it is named in 1 of 500 cases per MLP.

    The model and the global random state are left as they were; hooks on the model act as usual.

    Args:
        model: a HookedTransformer or TransformerBridge.
        triggers: tokens whose successor is tested, as ids or texts; by default the model's own (`model.triggers`
            of a two-layer model), else all.
        vocabulary: tokens to draw prompts from; by default all but the tokenizer's special ones.
        n_prompts: how many prompts are scored; as many others are used for ablation where the first 8 of them leave
            it open whether a head's effect is large enough.
        period: how many tokens are repeated; fewer if the vocabulary or the model's context is too small.
        seed: for the prompts.

    Returns:
        The circuit, with its `evidence`.

    Raises:
        TypeError, ValueError: for tokens that the model lacks, a model whose outputs are not its tokens, or a
            vocabulary or context too small to repeat three tokens.

    Examples:
        >>> circuit = hl.find_circuit(model)
        >>> print(circuit)
        previous-token head: L0H0; induction head: L1H0; bigram memory: L1MLP
        >>> circuit == model.circuit
        True
    """
    n_prompts = check_count("n_prompts", n_prompts, minimum=N_SCREENED)
    check_memory(8 * n_prompts * model.cfg.d_vocab, n_prompts=n_prompts)
    period = check_count("period", period, minimum=_MIN_PERIOD)
    if not outputs_are_tokens(model):
        raise ValueError(
            "find_circuit scores how likely the next token is, so model must have an output per token; got "
            f"{n_outputs(model)} outputs for {model.cfg.d_vocab} tokens: name the components in a Circuit"
        )
    generator = as_generator(seed)
    drawn_from = _vocabulary(model) if vocabulary is None else token_ids(model, "vocabulary", vocabulary)
    triggers = getattr(model, "triggers", None) if triggers is None else triggers
    asked = None if triggers is None else token_ids(model, "triggers", triggers)
    if asked is not None and not bool(torch.isin(asked, drawn_from).any()):
        raise ValueError(f"triggers must be among the vocabulary's tokens, got {shown(triggers)}")
    first = _first_token(model)
    # A previous-token head works only as far as the model's learned absolute positions.
    longest = min(model.cfg.n_ctx, getattr(model, "n_ctx_train", None) or model.cfg.n_ctx)
    period = min(period, len(drawn_from) - 1, (longest - 1) // 2)
    if period < _MIN_PERIOD:
        raise ValueError(
            f"find_circuit repeats at least {_MIN_PERIOD} distinct tokens, for which a model needs a vocabulary of "
            f"{_MIN_PERIOD + 1} and a context of {2 * _MIN_PERIOD + 1}; got {len(drawn_from)} and {longest}"
        )

    def draw() -> Repeats:
        drawn = draw_repeats(drawn_from, asked, first, n_prompts, period, generator)
        return drawn.to(model.cfg.device)

    with tqdm(desc="find_circuit", unit="run", disable=None) as bar:
        scored, held_out = draw(), draw()
        scores = head_scores(model, scored, bar.update)
        gain = float(scores.gain.mean())
        gain_null = max(MIN_GAIN, chance(scores.gain[:, None], generator))
        target_null = max(MIN_ATTENTION, chance(scores.target.flatten(1), generator))
        previous, target = scores.previous.mean(0), scores.target.mean(0)
        evenly = float(scored.mean(1 / (scored.target.double() + 1)).mean())  # by a head that attends to all alike
        nulls = {
            "previous_token": scores.elsewhere.clamp_min(MIN_ATTENTION + evenly),
            "induction": torch.full_like(target, target_null),
        }
        # A head has one role: the one with the larger score.
        fits = {
            "previous_token": (previous > nulls["previous_token"]) & (previous >= target),
            "induction": (target > nulls["induction"]) & (target > previous),
        }
        looks_elsewhere = ~(fits["previous_token"] | fits["induction"])
        if gain <= gain_null:
            fits = {role: torch.zeros_like(fit) for role, fit in fits.items()}

        def judge(role: str, score: Tensor) -> tuple[HeadEvidence, tuple[Component, ...]]:
            candidates = [Component(layer, "head", head) for layer, head in fits[role].nonzero().tolist()]
            return _judged(model, score, nulls[role], candidates, held_out, gain, generator, bar.update)

        induction, induction_heads = judge("induction", target)
        last = max((head.layer for head in induction_heads), default=0)
        fits["previous_token"][last:] = False
        before, previous_heads = judge("previous_token", previous)
        bigram = bigram_evidence(model, drawn_from, first, longest, generator, bar.update)
        unmeasured = torch.full_like(target, torch.nan)
        others = unmeasured, unmeasured, torch.nan
        if gain > gain_null:
            some = held_out[:N_SCREENED]
            others = _others(model, some, looks_elsewhere, gain, generator, bar.update)
    roles = (previous_heads, induction_heads, _named_mlps(bigram))
    evidence = CircuitEvidence(Circuit(*roles), before, induction, bigram, gain, gain_null, *others, n_prompts, period)
    return Circuit(*roles, evidence=evidence)


def _others(
    model: Any,
    prompts: Repeats,
    looks_elsewhere: Bool[Tensor, "layer head"],
    gain: float,
    generator: torch.Generator,
    tick: Callable[[], object],
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"], float]:
    """What is lost without each of these heads, half its interval, and what it must exceed.

    Layer by layer first, which is cheap.
    """
    heads = [Component(layer, "head", head) for layer, head in looks_elsewhere.nonzero().tolist()]
    layers = [tuple(group) for _, group in itertools.groupby(heads, lambda head: head.layer)]

    def without(groups: Sequence[tuple[Component, ...]]) -> tuple[list[float], list[float], float]:
        if not groups:
            return [], [], math.nan
        found = lost_alone(model, prompts, groups, tick)
        return found.mean(0).tolist(), _reach(found).tolist(), max(MIN_EFFECT * gain, chance(found, generator))

    together, _, null = without(layers)
    alone = [(head,) for layer, mean in zip(layers, together, strict=True) if mean > null for head in layer]
    each, reach, null = without(alone)
    lost, errors = (torch.full(looks_elsewhere.shape, torch.nan, dtype=torch.float64) for _ in range(2))
    for (head,), mean, error in zip(alone, each, reach, strict=True):
        lost[head.layer, head.head], errors[head.layer, head.head] = mean, error
    return lost, errors, null


def _judged(
    model: Any,
    score: Float[Tensor, "layer head"],
    null: Float[Tensor, "layer head"],
    candidates: list[Component],
    prompts: Repeats,
    gain: float,
    generator: torch.Generator,
    tick: Callable[[], object],
) -> tuple[HeadEvidence, tuple[Component, ...]]:
    """The evidence for a role, and the heads it names."""
    lost, regained, error = (torch.full_like(score, torch.nan) for _ in range(3))
    if not candidates:
        return HeadEvidence(score, null, lost, regained, error, torch.nan, torch.nan), ()
    found = ablation_effects(model, prompts[:N_SCREENED], candidates, tick)
    effects = dict(zip(candidates, torch.stack([found.lost, found.regained], -1).unbind(1), strict=True))
    together = found.lost_together

    def level(heads: Iterable[Component]) -> float:
        statistics = torch.stack([effects[head] for head in heads], 1).flatten(1)
        return max(MIN_EFFECT * gain, chance(statistics, generator))

    effect_null = level(candidates)
    left, more = (
        [head for head in candidates if _open(effects[head], MIN_EFFECT * gain, effect_null)],
        prompts[N_SCREENED:],
    )
    if left and len(more.tokens):
        rest = ablation_effects(model, more, candidates, tick, left)
        for head, *pair in zip(left, rest.lost.T, rest.regained.T, strict=True):
            effects[head] = torch.cat([effects[head], torch.stack(pair, -1)])
        together = torch.cat([together, rest.lost_together])
        effect_null = level(left)
    named = []
    for head, effect in effects.items():
        (alone, back), at = effect.mean(0).tolist(), (head.layer, head.head)
        lost[at], regained[at] = alone, back
        error[at] = _reach(effect)[int(back > alone)]
        if max(alone, back) > effect_null:
            named.append(head)
    evidence = HeadEvidence(score, null, lost, regained, error, effect_null, float(together.mean()))
    return evidence, tuple(named)


def _open(effect: Float[Tensor, "prompt statistic"], low: float, high: float) -> bool:
    """Whether a head's effects may lie on either side of what one of them must exceed, which lies in between."""
    mean, reach = effect.mean(0), _reach(effect)
    return not (bool((mean - reach > high).any()) or bool((mean + reach < low).all()))


def _reach(effect: Float[Tensor, "prompt statistic"]) -> Float[Tensor, "statistic"]:
    """Half the 95% intervals of means over prompts."""
    return student_quantile(len(effect) - 1) * effect.std(0) / len(effect) ** 0.5


def _named_mlps(bigram: MLPEvidence) -> tuple[Component, ...]:
    # An effect that was not measured is NaN, which exceeds nothing.
    return tuple(Component(layer, "mlp") for layer in (bigram.effect > bigram.null).nonzero()[:, 0].tolist())


def _vocabulary(model: Any) -> Tensor:
    """All of the model's tokens but the tokenizer's special ones."""
    ids = torch.arange(model.cfg.d_vocab)
    tokenizer = tokenizer_of(model)
    special = torch.tensor(getattr(tokenizer, "all_special_ids", None) or [], dtype=torch.long)
    return ids[~torch.isin(ids, special)]


def _first_token(model: Any) -> int | None:
    """The id of the token that begins a text, if the model's prompts have one."""
    tokenizer = tokenizer_of(model)
    wanted = tokenizer is not None and bool(getattr(model.cfg, "default_prepend_bos", False))
    return getattr(tokenizer, "bos_token_id", None) if wanted else None
