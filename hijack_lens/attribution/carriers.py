"""Finding the heads that carry what a context says, by what they bring and by what turning them does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.attribution.frozen import FrozenModel
from hijack_lens.core.analysis import analysis
from hijack_lens.core.carriers import TRIED_AT, Carriers
from hijack_lens.core.checks import Seed, as_generator, check_count, check_list, shown
from hijack_lens.core.circuit import Component, heads_at
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.inputs import model_tokens
from hijack_lens.core.progress import progress
from hijack_lens.core.spans import token_runs
from hijack_lens.core.statistics import chance
from hijack_lens.core.texts import decoded
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.hooks.scaling import scale
from hijack_lens.language.facts import Fact

_COUNTS = (1, 2, 3, 4, 6, 8, 12)
_STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
_FEWEST = 4
_NEARLY = 0.95
"""Of the largest share that any strength reaches, so much is as good."""


@analysis
def find_carriers(
    model: Any,
    prompts: Any,
    context: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
    *,
    repeats: int = 1,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
) -> Carriers:
    """Finds the heads that carry the context's answer to where it is asked for, and how far to turn them.

    In each prompt, what a head brings to the last position from the tokens of the context's answer, of the margin
    logit[context's answer] - logit[weights' answer], is read off one frozen run (see `attribute_sources`): one pass
    back for all heads. Heads whose mean over prompts exceeds what the largest of all heads reaches by chance are
    candidates. How many of them to turn is chosen by turning them, on the same prompts: as many as make the largest
    share of prompts say the context's answer, at `TRIED_AT` times what they read. Then so is the strength: the largest
    that does nearly as well as the best. So try the outcome on other prompts.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: `Fact`s, which bring their answers; or texts that end where the answer is asked for. At least four.
        context: for texts, the answer that each one's context gives, in the words that it has there.
        weights: for texts, the answer that the weights hold for each. Of both answers, the first tokens are compared.
        repeats: how often each fact's context says its answer.
        seed: of the draws by which chance is estimated.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for fewer prompts, prompts without the context's answer, answers that begin with the same
            token, models that `attribute_sources` refuses, and where no head exceeds chance.

    Examples:
        >>> told = [hl.hijack_prompt(language, "q", c, 2, 16, seed=0).text for c in "aeis"]
        >>> carriers = hl.find_carriers(model, told, context=list("aeis"), weights=list("uuuu"))
        >>> print(*carriers.heads)
        L1H0
    """
    cases = _cases(model, prompts, context, weights, repeats)
    generator = as_generator(seed)
    flows = []
    with progress(len(cases) + len(_COUNTS) + len(_STRENGTHS), "step", "find_carriers") as advance:
        for case in cases:
            flows.append(case.flow(model))
            advance(1)
        flow = torch.stack(flows)
        level = chance(flow.flatten(1), generator)
        mean = flow.mean(0)
        order = mean.flatten().argsort(descending=True).tolist()
        above = [i for i in order if float(mean.flatten()[i]) > level]
        if not above:
            raise ValueError(
                f"prompts single out no head: the largest mean flow is {float(mean.max()):.3g}, and chance reaches "
                f"{level:.3g}; give more prompts, or such whose context is followed more often"
            )
        ranked = heads_at(above, mean.shape[1])
        counts = tuple(count for count in _COUNTS if count <= len(ranked))
        groups = _groups(cases)
        by_count = []
        for count in counts:
            by_count.append(_said(model, groups, ranked[:count], TRIED_AT))
            advance(1)
        shares = torch.tensor(by_count)
        heads = tuple(ranked[: counts[int(shares[:, 0].argmax())]])
        by_strength = []
        for strength in _STRENGTHS:
            by_strength.append(_said(model, groups, heads, strength))
            advance(1)
        reached = torch.tensor(by_strength)
    good = (reached[:, 0] >= _NEARLY * reached[:, 0].max()).nonzero().flatten()
    return Carriers(heads, _STRENGTHS[int(good[-1])], flow, level, counts, _STRENGTHS, shares, reached)


@dataclass(frozen=True)
class _Case:
    """A prompt, where in it the context's answer stands, and the first tokens of the two answers."""

    tokens: Int[Tensor, "pos"]
    said: Bool[Tensor, "pos"]
    pair: tuple[int, int]

    def flow(self, model: Any) -> Float[Tensor, "layer head"]:
        """What each head brings from the context's answer."""
        traced = FrozenModel.of(model, self.tokens[None]).back(torch.tensor(self.pair, device=self.tokens.device))
        from_answer = traced.links[0, :, :, self.said].sum(2)
        return (from_answer[..., 0] - from_answer[..., 1]).cpu()


def _cases(model: Any, prompts: Any, context: Any, weights: Any, repeats: int) -> list[_Case]:
    if isinstance(prompts, (str, Fact)):
        raise TypeError(f"prompts must be several, got {shown(prompts)}")
    listed = check_list("prompts", prompts, "Facts or texts")
    if len(listed) < _FEWEST:
        raise ValueError(f"prompts must be at least {_FEWEST}, got {len(listed)}")
    of_facts = all(isinstance(one, Fact) for one in listed)
    if of_facts:
        if context is not None or weights is not None:
            raise ValueError("context and weights come with Facts, and must not be given")
        check_count("repeats", repeats, minimum=1)
        rows = [(one.text(repeats), one.context, one.weights) for one in listed]
    else:
        answers = []
        for name, given in (("context", context), ("weights", weights)):
            answers.append(check_list(name, given, "an answer per prompt"))
            if len(answers[-1]) != len(listed):
                raise ValueError(
                    f"{name} must hold an answer for each of {len(listed)} prompts, got {len(answers[-1])}"
                )
        rows = list(zip(listed, *answers, strict=True))
    return [_case(model, *row, f"prompts[{index}]") for index, row in enumerate(rows)]


def _case(model: Any, text: Any, context: Any, weights: Any, name: str) -> _Case:
    tokens = model_tokens(model, text, name)
    if len(tokens) != 1:
        raise ValueError(f"{name} must be a single prompt, got a batch of {len(tokens)}")
    ids = tokens[0].tolist()
    said = torch.zeros(len(ids), dtype=torch.bool)
    last: tuple[int, list[int]] | None = None
    for run in token_runs(model, context, "context"):
        for start in range(1, len(ids) - len(run)):
            if ids[start : start + len(run)] == run:
                said[start : start + len(run)] = True
                last = max((start, run), last or (0, run))
    if last is None:
        raise ValueError(f"{name} must hold the context's answer {shown(context)} before its last token")
    # The weights' answer is spelled as the context's was last, with a space before it or without.
    runs = token_runs(model, weights, "weights")
    alike = [run for run in runs if _is_spaced(model, run) == _is_spaced(model, last[1])]
    pair = last[1][0], (alike or runs)[0][0]
    if pair[0] == pair[1]:
        raise ValueError(f"{name}: the answers {shown(context)} and {shown(weights)} begin with the same token")
    return _Case(tokens[0], said.to(tokens.device), pair)


def _is_spaced(model: Any, run: Sequence[int]) -> bool:
    return decoded(model.tokenizer, run[:1])[0].startswith(" ")


def _groups(cases: Sequence[_Case]) -> list[list[_Case]]:
    """The cases by length, so that they can be run together."""
    by_length: dict[int, list[_Case]] = {}
    for case in cases:
        by_length.setdefault(len(case.tokens), []).append(case)
    return list(by_length.values())


def _said(
    model: Any, groups: Sequence[Sequence[_Case]], heads: Sequence[Component], strength: float
) -> tuple[float, float]:
    """The shares of prompts whose largest logit is the context's answer, and the weights', with heads turned."""
    counts = [0, 0]
    for group in groups:
        size = rows_at_once(model, len(group[0].tokens))
        for start in range(0, len(group), size):
            some = group[start : start + size]
            with scale(model, heads, strength, source=torch.stack([case.said for case in some])):
                logits = logits_of(model, torch.stack([case.tokens for case in some]))[:, -1]
            for best, case in zip(logits.argmax(-1).tolist(), some, strict=True):
                counts = [count + (best == answer) for count, answer in zip(counts, case.pair, strict=True)]
    total = sum(map(len, groups))
    return counts[0] / total, counts[1] / total
