"""Which memory wrote an answer of a language model: by source tokens, checked by interventions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens import hooks
from hijack_lens.attribution.frozen import FrozenModel
from hijack_lens.attribution.source_attribution import SourceAttribution
from hijack_lens.attribution.sources import attribution_of_runs, check_linear, parts_of
from hijack_lens.core.checks import check_fields, shown
from hijack_lens.core.circuit import Component, Margin, heads_at
from hijack_lens.core.hook_points import all_components, honours_edits, sites
from hijack_lens.core.inputs import prompt_texts
from hijack_lens.core.spans import Span, joiner
from hijack_lens.core.tables import Drawn, tidy, widened
from hijack_lens.core.texts import decoded, known_ids, n_outputs, outputs_are_tokens, token_id, tokenizer_of
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.metrics import logit_diff

_NAMED, _CUT, _OTHERS, _CARRIERS = 2, 1, 2, 4
_PARTS_BY = 0.5
"""A share and a measured change part if they differ by more than this, in logits, and than this fraction of either."""


@dataclass(frozen=True)
class Check:
    """What attribution gives to a part of the model, beside what the margin loses when that part is changed.

    Attributes:
        what: the intervention, in words.
        attributed: in logits; with patterns, scales and gates held as they were.
        measured: the margin of the run less that of the run with the intervention, all else following.

    Examples:
        >>> from hijack_lens.explanation import Check
        >>> Check("the context left out", attributed=0.75, measured=1.9).parts
        True
        >>> Check("the context left out", attributed=0.75, measured=0.8).parts
        False
    """

    what: str
    attributed: float
    measured: float

    @property
    def parts(self) -> bool:
        """Whether the two differ by so much that one does not stand for the other."""
        gap = abs(self.attributed - self.measured)
        return gap > _PARTS_BY and gap > _PARTS_BY * max(abs(self.attributed), abs(self.measured))


@dataclass(frozen=True)
class Contrast:
    """A second prompt, and what the margin of the first has over its own.

    Attributes:
        prompt: its tokens, as many as the first prompt's.
        total: its margin.
        margin: the first prompt's margin less its own, by memory: the difference of two exact attributions, each with
            its own run's patterns, scales and gates.
        carriers: heads that carry the difference to the last position: to first order there ("attributed"), beside what
            the margin loses when the head has the second prompt's output there ("measured").
    """

    prompt: Int[Tensor, "pos"]
    total: float
    margin: Margin
    carriers: tuple[Check, ...]


@dataclass(frozen=True, repr=False)
class AnswerExplanation(Drawn):
    """Which memory wrote a language model's preference for one answer over another, and the evidence for it.

    All margins are `logit[answer] - logit[foil]` at the last position, in logits; the context suggests the answer, the
    weights the foil.

    Attributes:
        model: the model that was explained.
        prompt: the tokens that were run.
        attribution: of the last position's logits, by source token: of answer and foil, and of other candidates after
            these, if any were asked for.
        checks: attributed shares beside the effects of interventions.
        doses: the margin with the context left out (0), as it is (1), and said twice (2); empty without a context.
        names: the texts of the first tokens of answer and foil, with white space made visible.
        whole: the texts of the whole answers, where one has several tokens, each with its log-probability.
        texts: those of the prompt's tokens.
        first: that of the token with the largest logit.
        contrast: how it differs from a second prompt, if one was given.

    Examples:
        >>> smollm2 = hl.models.load_model("smollm2-135m")
        >>> told = "The capital of France is London. The capital of France is"
        >>> explanation = hl.explain(smollm2, told, "London", "Paris")
        >>> explanation.winner, explanation.total
        ('weights', -1.745697021484375)
        >>> print(explanation.margin)
        Margin(context=+0.5569, weights=-2.3026, rest=+0.0000, total=-1.7457)
        >>> explanation.verdict[:44]
        "The weights win: '␣Paris' over '␣London' by "
    """

    model: Any
    prompt: Int[Tensor, "pos"]
    attribution: SourceAttribution
    checks: tuple[Check, ...]
    doses: dict[int, float]
    names: tuple[str, str]
    whole: dict[str, float]
    texts: tuple[str, ...]
    first: str
    contrast: Contrast | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def margin(self) -> Margin:
        """The model's own margin, split by memory; nothing is left over."""
        return self.attribution.margin()

    @property
    def total(self) -> float:
        """The margin of the model's own logits."""
        return _margin_of(self.attribution)

    def to_pandas(self) -> pd.DataFrame:
        """A row per source token: position, token, what it is part of, and what it wrote into the margin."""
        a, b = self.attribution.pair()
        wrote = self.attribution.by_token().double()
        parts = ("context", "first token", "query", "after the query")
        frame = tidy({"position": range(len(self.prompt))}, margin=wrote[:, a] - wrote[:, b])
        frame.insert(1, "token", self.attribution.source_texts())
        frame.insert(2, "part", [parts[i] for i in self.attribution.parts.tolist()])
        return frame

    @property
    def winner(self) -> str:
        """ "context" or "weights", whichever answer has the larger logit; "neither" on a tie."""
        return "neither" if self.total == 0 else "context" if self.total > 0 else "weights"

    @property
    def verdict(self) -> str:
        """The answer in a few sentences."""
        (c, g), total = map(repr, self.names), self.total
        context, weights, _, _ = map(float, self.margin.parts.values())
        if total == 0:
            said = f"Neither memory wins: {c} and {g} have the same logit"
        else:
            preferred, other = (c, g) if total > 0 else (g, c)
            if context * total > 0 and weights * total > 0:
                wins = "Both memories agree"
            elif total > 0:
                wins = "The context wins" if context > 0 else "The weights speak for the context's answer"
            else:
                wins = "The weights win" if weights < 0 else "The context speaks against its own answer"
            said = f"{wins}: {preferred} over {other} by {abs(total):.2f} logits"
        gave = f"the context gave {context:+.2f}, the weights {weights:+.2f}"
        heads = self.attribution.by_head(_NAMED)
        if self.doses and len(heads):
            through = ", ".join(f"{row.head} ({row.margin:+.2f})" for row in heads.itertuples())
            gave += f"; most was brought by {through}"
        sentences = [f"{said}; {gave}."]
        if 2 in self.doses:
            without, twice = self.doses[0], self.doses[2]
            wins = "it wins" if twice > 0 else "it loses"
            sentences.append(f"Without the context the margin is {without:+.2f}; said twice, {wins} ({twice:+.2f}).")
        if self.contrast is not None:
            theirs, difference = self.contrast, self.contrast.margin
            largest = sorted(theirs.carriers, key=lambda check: -abs(check.measured))[:_NAMED]
            carried = ", ".join(f"{check.what} ({check.measured:+.2f})" for check in largest)
            sentences.append(
                f"The contrast's margin is {theirs.total:+.2f}; the difference, {self.total - theirs.total:+.2f}, is "
                f"{difference.context:+.2f} by the context and {difference.weights:+.2f} by the weights; most is "
                f"carried by {carried}."
            )
        apart = [check.what for check in self.checks if check.parts]
        if apart:
            sentences.append(
                f"Attribution and intervention part on {'; '.join(apart)}: there, patterns, scales and gates change as "
                "well."
            )
        if self.first not in self.names:
            sentences.append(f"(Its first choice is neither, but {self.first!r}.)")
        return " ".join(sentences)


Answer = tuple[int, ...]


def spelled_ways(model: Any, name: str, given: Any) -> tuple[Answer, ...]:
    """The token ids that an answer may stand for: a text as it is written, or with a space before it.

    Raises:
        TypeError, ValueError: for what is neither text nor an id, and for words that the tokenizer lacks.
    """
    if isinstance(given, str) and tokenizer_of(model) is not None and outputs_are_tokens(model):
        ways = [given] if given.startswith(" ") or not given.strip() else [given, f" {given}"]
        known = [tuple(ids) for way in ways if (ids := known_ids(model, way))]
        # A space by itself is no way in which a text goes on.
        found = [ids for ids in known if len(ids) == 1 or decoded(model.tokenizer, ids[:1])[0].strip()]
        return tuple(dict.fromkeys(found)) or ((token_id(model, name, given, output=True),),)
    one = token_id(model, name, given, output=True)
    if not 0 <= one < n_outputs(model):
        raise ValueError(f"{name} must be an output from 0 to {n_outputs(model) - 1}, got {shown(given)}")
    return ((one,),)


def explain_answer(
    model: Any,
    ids: Int[Tensor, "pos"],
    answer: tuple[Answer, ...],
    foil: tuple[Answer, ...],
    context: Span,
    contrast: Int[Tensor, "pos"] | None = None,
    candidates: Sequence[tuple[Answer, ...]] = (),
) -> AnswerExplanation:
    """The explanation of one prompt; of the ways to spell an answer, the one that the model finds likelier there."""
    check_linear(model)
    if contrast is not None and len(contrast) != len(ids):
        raise ValueError(f"contrast must have as many tokens as its prompt, {len(ids)}, got {len(contrast)}")
    parts = parts_of(model, ids, len(ids) - 1, context)[None]
    run = FrozenModel.of(model, ids[None])
    logits = widened(run.logits[0])
    answers = _likeliest(answer, logits), _likeliest(foil, logits)
    pair = answers[0][0], answers[1][0]
    if pair[0] == pair[1]:
        raise ValueError(f"answer and foil must begin with different tokens, got {answers[0]} and {answers[1]}")
    others = [_likeliest(ways, logits)[0] for ways in candidates]
    if len({*pair, *others}) < 2 + len(others):
        raise ValueError(f"candidates must begin with tokens other than answer and foil, each its own, got {others}")
    chosen = torch.tensor([*pair, *others], device=ids.device)
    attribution = replace(attribution_of_runs(model, ids[None], [run], chosen, parts)[0], joiner=joiner(model, ids))
    first = int(logits.argmax())
    said = torch.tensor([*pair, first])
    c, g, best = prompt_texts(model, said) if outputs_are_tokens(model) else tuple(map(str, said.tolist()))
    asked = _Asked(model, ids, answers, attribution.context, attribution, _margin_of(attribution))
    return AnswerExplanation(
        model,
        ids,
        attribution,
        checks=(*asked.swapped(logits), *asked.subject(), *asked.cut()),
        doses=asked.doses(),
        names=(c, g),
        whole=asked.whole() if max(map(len, answers)) > 1 else {},
        texts=prompt_texts(model, ids),
        first=best,
        contrast=None if contrast is None else asked.against(contrast, parts),
    )


def _margin_of(attribution: SourceAttribution) -> float:
    first, second = attribution.logits[:2].tolist()
    return first - second


def _likeliest(ways: tuple[Answer, ...], logits: Tensor) -> Answer:
    return max(ways, key=lambda ids: float(logits[ids[0]]))


@dataclass(frozen=True)
class _Asked:
    """A prompt, what is asked of it, and what the interventions are compared with.

    Attributes:
        context: the positions of the context.
        total: the margin.
    """

    model: Any
    ids: Int[Tensor, "pos"]
    answers: tuple[Answer, Answer]
    context: tuple[int, ...]
    attribution: SourceAttribution
    total: float

    @property
    def pair(self) -> tuple[int, int]:
        """The first tokens of answer and foil, which are compared."""
        return self.answers[0][0], self.answers[1][0]

    def swapped(self, logits: Tensor) -> list[Check]:
        """The answer's tokens in the context, exchanged for what else the model thinks likely."""
        answer = self.answers[0]
        inside = [
            range(start, start + len(answer))
            for start in range(len(self.ids) - len(answer))
            if tuple(self.ids[start : start + len(answer)].tolist()) == answer
            and set(range(start, start + len(answer))) <= set(self.context)
        ]
        if not inside or not outputs_are_tokens(self.model):
            return []
        others = _others(self.model, logits, list(self.pair))
        if not others:
            return []
        changed = self.ids.repeat(len(others), 1)
        for row, other in zip(changed, others, strict=True):
            for span in inside:
                row[span.start] = other
        where = torch.tensor([span.start for span in inside])
        shares = self.attribution.by_source()["context"][where].sum(0)
        return [self._exchanged(answer[0], "context", others, changed, shares)]

    def subject(self) -> list[Check]:
        """The query's token that wrote most, most often its subject, exchanged for what else is likely in its place."""
        wrote = self.attribution.by_token()
        last = len(self.ids) - 1
        inside = [at for at in (self.attribution.parts == 2).nonzero()[:, 0].tolist() if 0 < at < last]
        if not inside or not outputs_are_tokens(self.model):
            return []
        at = max(inside, key=lambda at: abs(float(wrote[at, 0] - wrote[at, 1])))
        token = int(self.ids[at])
        others = _others(self.model, widened(logits_of(self.model, self.ids[None, :at])[0, -1]), [token, *self.pair])
        if not others:
            return []
        changed = self.ids.repeat(len(others), 1)
        changed[:, at] = torch.tensor(others)
        return [self._exchanged(token, "query", others, changed, wrote[at])]

    def _exchanged(self, token: int, part: str, others: list[int], changed: Tensor, shares: Tensor) -> Check:
        text, *texts = map(repr, prompt_texts(self.model, torch.tensor([token, *others])))
        lost = self.total - float(self._margins(changed).mean())
        return Check(f"{text} in the {part} exchanged for {', '.join(texts)}", float(shares[0] - shares[1]), lost)

    def cut(self) -> list[Check]:
        """The answer's position kept from attending to the context: all heads at once, and the one that brings most."""
        if not self.context:
            return []
        brought = self.attribution.links[..., 0] - self.attribution.links[..., 1]
        inside = brought[..., list(self.context)].sum(-1)
        best = inside.abs().flatten().topk(min(_CUT, inside.numel())).indices.tolist()
        heads = heads_at(best, inside.shape[1])
        every = [head for head in all_components(self.model) if head.kind == "head"]
        found = [self._without("attention to the context cut, all heads", every, float(inside.sum()))]
        for head in heads:
            share = float(inside[head.layer, head.head])
            found.append(self._without(f"{head}'s attention to the context cut", [head], share))
        return found

    def _without(self, what: str, heads: list[Component], share: float) -> Check:
        with self._attending_elsewhere(heads):
            return Check(what, share, self.total - float(self._margins(self.ids[None])[0]))

    def _attending_elsewhere(self, heads: list[Component]) -> hooks.Intervention:
        """Keeps heads from attending to the context at the last position."""
        if all(honours_edits(self.model, site.name) for site in sites(self.model, heads, "pattern")):
            return hooks.scale(self.model, heads, 0.0, source=list(self.context))
        # A model that shows patterns only after their use is cut at the heads' outputs, from the first layer to the
        # last, since each layer's patterns follow from the cuts before.
        brought: dict[int, Tensor] = {}

        def less(z: Tensor, hook: Any, layer: int) -> Tensor:
            edited = z.clone()
            edited[:, -1] -= brought[layer]
            return edited

        def cut() -> hooks.Intervention:
            return hooks.Intervention(
                self.model, [(f"blocks.{layer}.attn.hook_z", partial(less, layer=layer)) for layer in brought]
            )

        for layer in sorted({head.layer for head in heads}):
            names = [f"blocks.{layer}.attn.{leaf}" for leaf in ("hook_pattern", "hook_v", "hook_z")]
            with cut():
                kept = record(self.model, self.ids[None], names)[1]
            pattern, v, z = (kept[name] for name in names)
            seen = torch.zeros_like(pattern[:, :, -1])  # [batch, head, key]
            for head in heads:
                if head.layer == layer:
                    seen[:, head.head, list(self.context)] = pattern[:, head.head, -1, list(self.context)]
            v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
            brought[layer] = torch.einsum("bhs,bshe->bhe", seen, v)
        return cut()

    def against(self, contrast: Int[Tensor, "pos"], parts: Int[Tensor, "1 source"]) -> Contrast:
        """What sets the prompt apart from another, and the heads that carry it to the answer's position."""
        pair = self.pair
        run = FrozenModel.of(self.model, contrast[None])
        chosen = torch.tensor(pair, device=contrast.device)
        other = attribution_of_runs(self.model, contrast[None], [run], chosen, parts)[0]
        own, theirs = self.attribution.margin(), other.margin()
        screened = hooks.attribution_patch(
            self.model, self.ids, contrast, logit_diff(*pair), "z", positions=-1, direction="noise"
        )
        first_order = -screened.effect[0, :, 0]  # [layer, head]
        best = first_order.abs().flatten().topk(min(_CARRIERS, first_order.numel())).indices.tolist()
        carriers, heads = [], heads_at(best, first_order.shape[1])
        points = dict.fromkeys(site.name for site in sites(self.model, heads))
        _, theirs_at = record(self.model, contrast[None], list(points))
        for head in heads:
            with hooks.patch(self.model, head, theirs_at, positions=-1):
                lost = self.total - float(self._margins(self.ids[None])[0])
            carriers.append(Check(str(head), float(first_order[head.layer, head.head]), lost))
        difference = Margin(own.context - theirs.context, own.weights - theirs.weights, own.rest - theirs.rest)
        return Contrast(contrast, _margin_of(other), difference, tuple(carriers))

    def doses(self) -> dict[int, float]:
        """The margin without the context, with it, and with it said twice, where it is one stretch of the prompt."""
        if not self.context or self.context != tuple(range(self.context[0], self.context[-1] + 1)):
            return {}
        found = {1: self.total}
        for dose in (0, 2):
            tokens = self._said(dose)[None]
            if tokens.shape[1] <= self.model.cfg.n_ctx:
                found[dose] = float(self._margins(tokens)[0])
        return dict(sorted(found.items()))

    def _said(self, dose: int) -> Int[Tensor, "said"]:
        """The prompt with its context said so many times."""
        start, end = self.context[0], self.context[-1] + 1
        tokenizer: Any = tokenizer_of(self.model)
        if start == 1 and tokenizer is not None and int(self.ids[0]) != getattr(tokenizer, "bos_token_id", None):
            # The first token is the sink, but the context's as well: its text is said, spaced as the rest is.
            said, asked = ("".join(decoded(tokenizer, ids.tolist())) for ids in (self.ids[:end], self.ids[end:]))
            rest = asked.lstrip()
            gap = asked[: len(asked) - len(rest)]
            if known_ids(self.model, f"{said}{gap}{rest}") == self.ids.tolist():
                return torch.tensor(known_ids(self.model, gap.join([*[said] * dose, rest])), device=self.ids.device)
        return torch.cat([self.ids[:start], *[self.ids[start:end]] * dose, self.ids[end:]])

    def whole(self) -> dict[str, float]:
        """The log-probability of each whole answer, each token given those before it."""
        found = {}
        for answer in self.answers:
            tokens = torch.cat([self.ids, torch.tensor(answer, device=self.ids.device)])[None]
            log_probs = widened(logits_of(self.model, tokens)[0, len(self.ids) - 1 : -1]).log_softmax(-1)
            text = "".join(decoded(self.model.tokenizer, answer)).strip()
            found[text] = sum(float(row[token]) for row, token in zip(log_probs, answer, strict=True))
        return found

    def _margins(self, tokens: Int[Tensor, "prompt pos"]) -> Tensor:
        logits = widened(logits_of(self.model, tokens)[:, -1])
        first, second = self.pair
        return logits[:, first] - logits[:, second]


def _others(model: Any, logits: Tensor, known: list[int]) -> list[int]:
    """The likeliest other tokens that are words like the answer."""
    ranked = [i for i in logits.topk(min(50, len(logits))).indices.tolist() if i not in known]
    if tokenizer_of(model) is None:
        return ranked[:_OTHERS]
    texts = decoded(model.tokenizer, [*ranked, known[0]])
    spaced = texts[-1].startswith(" ")
    alike = [
        i for i, text in zip(ranked, texts, strict=False) if text.strip().isalpha() and text.startswith(" ") == spaced
    ]
    return (alike or ranked)[:_OTHERS]
