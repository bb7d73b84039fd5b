"""How much each head attends where previous-token and induction heads do, and what ablating it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens._repeats import Repeats
from hijack_lens._runs import rows_at_once
from hijack_lens.circuit import Component
from hijack_lens.hooks import Intervention, patch
from hijack_lens.hooks.intervention import record


@dataclass(frozen=True)
class HeadScores:
    """Of each prompt.

    Attributes:
        previous: mean attention to the position before.
        elsewhere: the largest mean attention to any one other distance, of 2 to the period; the mean over prompts.
        target: mean attention to the targets, minus that on the twins.
        gain: mean log-probability of the answers, in nats, minus that on the twins.
    """

    previous: Float[Tensor, "prompt layer head"]
    elsewhere: Float[Tensor, "layer head"]
    target: Float[Tensor, "prompt layer head"]
    gain: Float[Tensor, "prompt"]


def head_scores(model: Any, prompts: Repeats, tick: Callable[[], object]) -> HeadScores:
    """Attention on the prompts and their twins, without keeping any pattern."""
    step = rows_at_once(model, prompts.tokens.shape[1])
    parts = []
    for start in range(0, len(prompts.tokens), step):
        part = prompts[start : start + step]
        said, shuffled = _Reader(model, part), _Reader(model, part)
        answers = said.run(part.tokens)
        tick()
        twins = shuffled.run(part.twins)
        tick()
        distances = torch.stack(said.distances, 2)
        target = torch.stack(said.targets, 1) - torch.stack(shuffled.targets, 1)
        parts.append((distances, target, answers - twins))
    distances, target, gain = (torch.cat(values).double().cpu() for values in zip(*parts, strict=True))
    return HeadScores(
        previous=distances[:, 0],
        elsewhere=distances[:, 1:].mean(0).amax(0),
        target=target,
        gain=gain,
    )


class _Reader:
    """Reads attention while the model runs."""

    def __init__(self, model: Any, prompts: Repeats):
        self.model = model
        self.prompts = prompts
        self.distances: list[Float[Tensor, "prompt distance head"]] = []
        self.targets: list[Float[Tensor, "prompt head"]] = []

    def run(self, tokens: Tensor) -> Float[Tensor, "prompt"]:
        """The mean log-probability of each prompt's answers."""
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.model.cfg.n_layers)]
        with Intervention(self.model, look=[(name, self.read) for name in names]):
            return answer_log_prob(self.model, tokens, self.prompts)

    def read(self, pattern: Tensor, hook: Any) -> None:
        first = 1 + self.prompts.period  # the second half's first position
        late = pattern[:, :, first:].float()
        distances = [late.diagonal(first - distance, 2, 3).mean(-1) for distance in range(1, self.prompts.period + 1)]
        self.distances.append(torch.stack(distances, 1))
        rows = torch.arange(len(pattern), device=pattern.device)[:, None]
        # Indices on both sides of a slice come out first: [prompt, pair, head].
        at_targets = pattern[rows, :, self.prompts.query, self.prompts.target].float()
        self.targets.append(self.prompts.mean(at_targets.movedim(-1, 0)).T)


def answer_log_prob(model: Any, tokens: Tensor, prompts: Repeats) -> Float[Tensor, "prompt"]:
    """The mean log-probability of each prompt's scored answers, in nats."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    logits = model(tokens)[rows, prompts.query]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    picked = logits.gather(-1, prompts.answer[..., None])[..., 0] - logits.logsumexp(-1)
    return prompts.mean(picked)


@dataclass(frozen=True)
class Effects:
    """Nats of log-probability of the right answers, of each prompt.

    Attributes:
        lost: without one candidate.
        regained: with that candidate alone, above having none.
        lost_together: without all candidates.
    """

    lost: Float[Tensor, "prompt candidate"]
    regained: Float[Tensor, "prompt candidate"]
    lost_together: Float[Tensor, "prompt"]


def effects(model: Any, prompts: Repeats, candidates: Sequence[Component], tick: Callable[[], object]) -> Effects:
    """Ablates candidates one by one, and all but one.

    A head that is off writes what it writes on the prompt's twin: the tokens are the same and only their order
    differs, so what is lost is what the head knew of that order, and nothing else (resample ablation).
    """
    names = [f"blocks.{layer}.attn.hook_z" for layer in sorted({head.layer for head in candidates})]
    step = rows_at_once(model, prompts.tokens.shape[1])
    parts = []
    for start in range(0, len(prompts.tokens), step):
        part = prompts[start : start + step]
        _, twins = record(model, part.twins, names)

        def log_prob(off: Sequence[Component], part: Repeats = part, twins: dict[str, Tensor] = twins) -> Tensor:
            tick()
            if not off:
                return answer_log_prob(model, part.tokens, part)
            with patch(model, off, twins):
                return answer_log_prob(model, part.tokens, part)

        intact, none = log_prob([]), log_prob(candidates)
        without = [log_prob([head]) if len(candidates) > 1 else none for head in candidates]
        alone = [
            log_prob([other for other in candidates if other != head]) if len(candidates) > 1 else intact
            for head in candidates
        ]
        lost = intact[:, None] - torch.stack(without, 1)
        parts.append((lost, torch.stack(alone, 1) - none[:, None], intact - none))
    return Effects(*(torch.cat(values).double().cpu() for values in zip(*parts, strict=True)))
