"""How much of a model's context-free prediction each MLP carries."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.circuits.evidence import MIN_INFORMATION, MIN_SHARE, MLPEvidence
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.tables import widened
from hijack_lens.hooks.intervention import Intervention, logits_of

_N_TOKENS = 32
_N_CONTEXTS = 8
_N_SCRAMBLES = 499
"""So many that a random model's MLP exceeds all of them in 1 of 500 cases."""

_MOST_AT_ONCE = 32
"""Scrambles per run: most models without a bigram memory are recognised after the first few."""

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
    information = told(intact, intact)
    off = {name: _constant(mean) for name, mean in means.items()}
    direct = contexts.predict(off)
    share, effect, null = (torch.full((n_layers,), torch.nan, dtype=torch.float64) for _ in range(3))
    for layer, name in mlps.items():
        without = contexts.predict({name: off[name]})
        lost = 1 - told(intact, without) / information if information > 0 else 0.0
        share[layer] = min(max(lost, 0.0), 1.0)
        if information >= MIN_INFORMATION and share[layer] >= MIN_SHARE:
            effect[layer], null[layer] = moved(intact, without), 0.0
            for scrambled in contexts.scrambled(name, means[name]):
                null[layer] = max(float(null[layer]), moved(scrambled, without))
                if null[layer] >= effect[layer]:
                    break
    left = told(intact, direct) / information if information > 0 else 0.0
    return MLPEvidence(information, share, min(max(left, 0.0), 1.0), effect, null)


def told(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> float:
    """What predictions q tell about the current token, in nats, if the truth is p; both are log-probabilities.

    At most told(p, p), since KL divergence is convex.
    """
    mean = q.logsumexp(0) - math.log(len(q))
    return float((p.exp() * (q - mean)).sum(-1).mean())


def moved(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> float:
    """Root mean square of p - q, without its parts that are the same for all tokens or for all predictions."""
    change = p - q
    change = change - change.mean(-1, keepdim=True)
    return float((change - change.mean(0)).square().mean().sqrt())


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

    def means(self, names: list[str]) -> dict[str, Float[Tensor, "d_model"]]:
        """The mean output over tokens and contexts."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def read(activation: Tensor, hook: Any) -> None:
                found[name] = activation[:, 1:].float().mean((0, 1))

            return read

        with Intervention(self.model, look=[(name, keep(name)) for name in names]):
            self.model(self.prompts)
        self.tick()
        return found

    def predict(self, edits: Mapping[str, Edit]) -> Float[Tensor, "token d_vocab"]:
        """Log-probabilities after each token, averaged over contexts, with some outputs edited."""
        return self._run(self.prompts, edits)[0]

    def scrambled(self, name: str, mean: Float[Tensor, "d_model"]) -> Iterator[Float[Tensor, "token d_vocab"]]:
        """Predictions with the token-specific part of an output turned in random directions of the residual stream."""
        d_model, device = len(mean), mean.device
        at_once = max(1, min(rows_at_once(self.model, self.prompts.shape[1]) // _N_CONTEXTS, _MOST_AT_ONCE))
        for done in range(0, _N_SCRAMBLES, at_once):
            count = min(at_once, _N_SCRAMBLES - done)
            shuffle = torch.rand(count, d_model, generator=self.generator).argsort(1).to(device)
            sign = (torch.randint(2, (count, d_model), generator=self.generator) * 2 - 1).to(device)
            rows = torch.arange(count, device=device).repeat_interleave(_N_CONTEXTS)
            at, flip = shuffle[rows, None], sign[rows, None]

            def turn(activation: Tensor, at: Tensor = at, flip: Tensor = flip) -> Tensor:
                specific = activation - mean
                return mean + flip * specific.gather(-1, at.expand_as(specific))

            yield from self._run(self.prompts.repeat(count, 1), {name: turn})

    def _run(self, prompts: Tensor, edits: Mapping[str, Edit]) -> list[Float[Tensor, "token d_vocab"]]:
        def hook_fn(edit: Edit) -> Callable[..., Tensor]:
            return lambda activation, hook: edit(activation)

        with Intervention(self.model, edit=[(name, hook_fn(edit)) for name, edit in edits.items()]):
            logits = logits_of(self.model, prompts)[:, 1:]
        self.tick()
        log_probs = widened(logits).log_softmax(-1)
        # Back from each context's order to the tokens' own.
        where = self.order.argsort(1)[None, :, :, None].expand(-1, -1, -1, logits.shape[-1])
        grouped = log_probs.unflatten(0, (-1, _N_CONTEXTS))
        return list(grouped.gather(2, where.expand(len(grouped), -1, -1, -1)).mean(1).log_softmax(-1))
