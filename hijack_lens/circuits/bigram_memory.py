"""How much of a model's context-free prediction each MLP carries."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.circuits.evidence import (
    MIN_INFORMATION,
    MIN_SHARE,
    SCRAMBLES_ABOVE,
    MLPEvidence,
    needed_excess,
)
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.statistics import student_quantile
from hijack_lens.core.tables import widened
from hijack_lens.hooks.incremental_runs import taken_apart
from hijack_lens.hooks.intervention import Intervention, logits_of, record
from hijack_lens.hooks.recorded_run import Changed

_N_TOKENS = 32
_N_CONTEXTS = 8
_N_SCRAMBLES = 499
"""So many that a random model's MLP exceeds all of them in 1 of 500 cases."""

_FEW, _ENOUGH, _MANY = 3, 20, 64
"""Scrambles after which they say how effects spread; after which those to come are predicted; and after which an effect
that may lie on either side of what is needed is left undecided, where few fit into memory at once."""

_CONFIDENCE = 1 - 4e-4
"""An effect needs no more scrambles if it lies above what these let expect of others in all but 1 of 5000 cases."""

_MOST_AT_ONCE = 32
"""Scrambles per run: most models without a bigram memory are recognised after the first few."""

_MEMORY = 2**26
"""Bytes for the scrambles that are computed at once."""

Edit = Callable[[Tensor], Tensor]


def bigram_evidence(
    model: Any,
    vocabulary: Int[Tensor, "token"],
    first: int | None,
    max_length: int,
    generator: torch.Generator,
    tick: Callable[[], object],
) -> MLPEvidence:
    """Measures every MLP's share, and scrambles those whose share is large enough; calls `tick` after every run."""
    n_layers = model.cfg.n_layers
    contexts = _Contexts(model, vocabulary, first, max_length, generator, tick)
    with_mlp = [] if getattr(model.cfg, "attn_only", False) else range(n_layers)
    mlps = {layer: f"blocks.{layer}.hook_mlp_out" for layer in with_mlp}
    heads = [f"blocks.{layer}.hook_attn_out" for layer in range(n_layers)]
    means = contexts.means([*mlps.values(), *heads])

    intact = contexts.predict({})
    by_token = told_by_token(intact, intact)
    information = float(by_token.mean())
    off = {name: _constant(mean) for name, mean in means.items()}
    direct = contexts.predict(off)
    share, error, effect, null, excess, excess_error = (
        torch.full((n_layers,), torch.nan, dtype=torch.float64) for _ in range(6)
    )
    draws = torch.zeros(n_layers, dtype=torch.long)
    for layer, name in mlps.items():
        without = contexts.without(layer, means[name])
        lost = by_token - told_by_token(intact, without)
        share[layer], error[layer] = ratio_of_means(lost, by_token) if information > 0 else (0.0, 0.0)
        if information >= MIN_INFORMATION and share[layer] >= MIN_SHARE:
            own, drawn = moved_by_token(intact, without), []
            many = _MANY if contexts.at_once() < _MOST_AT_ONCE else _N_SCRAMBLES
            for scrambled in contexts.scrambled(layer, means[name]):
                drawn.append(moved_by_token(scrambled, without))
                found = Scrambles(own, torch.stack(drawn), many)
                if found.settled:
                    break
            effect[layer], null[layer], draws[layer] = found.effect, found.null, len(drawn)
            excess[layer], excess_error[layer] = found.excess
    left = told(intact, direct) / information if information > 0 else 0.0
    direct_share = min(max(left, 0.0), 1.0)
    return MLPEvidence(information, share, error, direct_share, effect, null, draws, excess, excess_error)


@dataclass(frozen=True)
class Scrambles:
    """How an MLP's output changes predictions, beside what it does in random directions.

    Attributes:
        own: mean square change of each token's predictions.
        drawn: the same of each scramble.
        many: after how many of them what they leave open is left undecided.
    """

    own: Float[Tensor, "token"]
    drawn: Float[Tensor, "draw token"]
    many: int = _MANY

    @property
    def effect(self) -> float:
        """The root mean square change."""
        return float(self.own.mean().sqrt())

    @property
    def null(self) -> float:
        """What the effect must exceed: all scrambles; where these leave it open, also what they let expect."""
        largest = float(self._effects.max())
        return max(largest, math.exp(self._expected(1 - 2 * SCRAMBLES_ABOVE))) if self._open else largest

    @property
    def excess(self) -> tuple[float, float]:
        """How many standard deviations the effect's logarithm lies above the scrambles' mean; half its 95% interval.

        To first order; over the tokens that were drawn as well as the scrambles. NaN where the scrambles decide.
        """
        exceeded = bool((self._effects >= self.effect).any())
        if self._logs is None or not (exceeded or self._open):
            return math.nan, math.nan
        z, of_draws = self._of_draws
        each = (self.own / self.own.mean() - (self.drawn / self.drawn.mean(1, keepdim=True)).mean(0)) / 2
        of_tokens = student_quantile(len(each) - 1) * float(each.std() / self._logs.std()) / math.sqrt(len(each))
        return z, math.hypot(of_draws, of_tokens)

    @property
    def settled(self) -> bool:
        """Whether more scrambles would not change what these say."""
        if float(self._effects[-1]) >= self.effect:
            return True
        if len(self.drawn) < _ENOUGH or self._logs is None:
            return False
        return self._open or math.log(self.effect) > self._expected(_CONFIDENCE)

    @property
    def _open(self) -> bool:
        """Whether the effect is not plainly on either side after many scrambles, none of them as large."""
        if (
            not self.many <= len(self.drawn) < _N_SCRAMBLES
            or self._logs is None
            or bool((self._effects >= self.effect).any())
        ):
            return False
        excess, reach = self._of_draws
        return abs(excess - needed_excess()) < reach

    @property
    def _of_draws(self) -> tuple[float, float]:
        """The excess, and half its 95% interval over draws alone."""
        assert self._logs is not None
        count = len(self._logs)
        z = (math.log(self.effect) - float(self._logs.mean())) / float(self._logs.std())
        return z, student_quantile(count - 1) * math.sqrt(1 / count + z**2 / (2 * count))

    @property
    def _effects(self) -> Float[Tensor, "draw"]:
        return self.drawn.mean(1).sqrt()

    @property
    def _logs(self) -> Float[Tensor, "draw"] | None:
        """Logarithms of the scrambles' effects, closer to a normal variable; `None` where they say too little."""
        logs = self._effects.log()
        return logs if len(logs) > _FEW and float(logs.std()) > 0 and bool(logs.isfinite().all()) else None

    def _expected(self, confidence: float) -> float:
        """The upper end of the interval of another scramble's logarithm."""
        assert self._logs is not None
        count = len(self._logs)
        reach = student_quantile(count - 1, confidence) * math.sqrt(1 + 1 / count)
        return float(self._logs.mean()) + reach * float(self._logs.std())


def ratio_of_means(part: Float[Tensor, "token"], whole: Float[Tensor, "token"]) -> tuple[float, float]:
    """The ratio of two means over the tokens drawn, from 0 to 1; and half its 95% interval.

    Student's, to first order in the means; or, where that is more, what a single token makes of the ratio.
    """
    ratio, count = float(part.mean() / whole.mean()), len(part)
    spread = float((part - ratio * whole).std() / whole.mean())
    without = (part.sum() - part) / (whole.sum() - whole)
    reach = max(student_quantile(count - 1) * spread / math.sqrt(count), float((without - ratio).abs().max()))
    return min(max(ratio, 0.0), 1.0), reach


def told_by_token(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> Float[Tensor, "token"]:
    """What predictions q tell about each token, in nats, if the truth is p; both are log-probabilities."""
    mean = q.logsumexp(0) - math.log(len(q))
    return (p.exp() * (q - mean)).sum(-1)


def told(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> float:
    """What they tell about the current token: at most told(p, p), since KL divergence is convex."""
    return float(told_by_token(p, q).mean())


def moved(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> float:
    """Root mean square of p - q, without its parts that are the same for all tokens or for all predictions."""
    return float(moved_by_token(p, q).mean().sqrt())


def moved_by_token(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> Float[Tensor, "token"]:
    """Its square for each token, before the mean over tokens."""
    change = p - q
    change = change - change.mean(-1, keepdim=True)
    return (change - change.mean(0)).square().mean(-1).double().cpu()


def _constant(value: Tensor) -> Edit:
    return lambda activation: value.expand_as(activation)


class _Contexts:
    """The same tokens in several random orders: each occurs once in every prompt, in different contexts."""

    def __init__(
        self,
        model: Any,
        vocabulary: Tensor,
        first: int | None,
        max_length: int,
        generator: torch.Generator,
        tick: Callable[[], object],
    ):
        self.model, self.generator, self.tick = model, generator, tick
        n_tokens = min(_N_TOKENS, len(vocabulary) - 1, max_length - 1)
        drawn = vocabulary[torch.randperm(len(vocabulary), generator=generator)[: n_tokens + 1]]
        opening = torch.full((_N_CONTEXTS, 1), int(drawn[-1]) if first is None else first)
        order = torch.rand(_N_CONTEXTS, n_tokens, generator=generator).argsort(1)
        self.prompts = torch.cat([opening, drawn[order]], 1).to(model.cfg.device)
        self.order = order.to(model.cfg.device)
        self.run = taken_apart(model, self.prompts)

    def means(self, names: list[str]) -> dict[str, Float[Tensor, "d_model"]]:
        """The mean output over tokens and contexts."""
        _, found = record(self.model, self.prompts, names)
        self.tick()
        return {name: activation[:, 1:].float().mean((0, 1)) for name, activation in found.items()}

    def predict(self, edits: Mapping[str, Edit]) -> Float[Tensor, "token d_vocab"]:
        """Log-probabilities after each token, averaged over contexts, with some outputs edited."""
        return self._run(self.prompts, edits)[0]

    def without(self, layer: int, mean: Float[Tensor, "d_model"]) -> Float[Tensor, "token d_vocab"]:
        """Predictions with an MLP's output the same for all tokens."""
        return self._with_mlp(layer, 1, _constant(mean))[0]

    def at_once(self) -> int:
        """How many scrambles are run at once."""
        length = self.prompts.shape[1]
        fit = (
            rows_at_once(self.model, length) // _N_CONTEXTS
            if self.run is None
            else _MEMORY // self.run.bytes_of(length)
        )
        return max(1, min(fit, _MOST_AT_ONCE))

    def scrambled(self, layer: int, mean: Float[Tensor, "d_model"]) -> Iterator[Float[Tensor, "token d_vocab"]]:
        """Predictions with the token-specific part of an output turned in random directions of the residual stream."""
        d_model, device, at_once = len(mean), mean.device, self.at_once()
        for done in range(0, _N_SCRAMBLES, at_once):
            count = min(at_once, _N_SCRAMBLES - done)
            shuffle = torch.rand(count, d_model, generator=self.generator).argsort(1).to(device)
            sign = (torch.randint(2, (count, d_model), generator=self.generator) * 2 - 1).to(device)
            rows = torch.arange(count, device=device).repeat_interleave(_N_CONTEXTS)
            at, flip = shuffle[rows, None], sign[rows, None]

            def turn(activation: Tensor, at: Tensor = at, flip: Tensor = flip) -> Tensor:
                specific = activation - mean
                return mean + flip * specific.gather(-1, at.expand_as(specific))

            yield from self._with_mlp(layer, count, turn)

    def _with_mlp(self, layer: int, count: int, edit: Edit) -> list[Float[Tensor, "token d_vocab"]]:
        """Predictions of `count` runs with an MLP's output edited, of which only what comes after it is computed."""
        if self.run is None:
            return self._run(self.prompts.repeat(count, 1), {f"blocks.{layer}.hook_mlp_out": edit})
        here = self.run.layers[layer]
        edited = edit(here.mlp_out.repeat(count, 1, 1)).to(here.mlp_out).unflatten(0, (count, -1))
        final = self.run.finals([Changed(layer + 1, here.resid_mid + edited)], 0, last_only=False)
        self.tick()
        # The mean over contexts may be taken before the unembedding, which is affine.
        normed = self._by_token(self.run.opened.normed(final[:, :, 1:])).mean(1)
        return list(widened(self.run.opened.unembedded(normed)).log_softmax(-1))

    def _run(self, prompts: Tensor, edits: Mapping[str, Edit]) -> list[Float[Tensor, "token d_vocab"]]:
        def hook_fn(edit: Edit) -> Callable[..., Tensor]:
            return lambda activation, hook: edit(activation)

        with Intervention(self.model, edit=[(name, hook_fn(edit)) for name, edit in edits.items()]):
            logits = logits_of(self.model, prompts)[:, 1:]
        self.tick()
        grouped = widened(logits).log_softmax(-1).unflatten(0, (-1, _N_CONTEXTS))
        return list(self._by_token(grouped).mean(1).log_softmax(-1))

    def _by_token(
        self, values: Float[Tensor, "run context place features"]
    ) -> Float[Tensor, "run context token features"]:
        """Values in the tokens' own order, from each context's."""
        where = self.order.argsort(1)[None, :, :, None].expand(len(values), -1, -1, values.shape[-1])
        return values.gather(2, where)
