"""What a circuit makes of a prompt: the verdict, attribution to its paths, ablations and the theory's prediction."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens import hooks, theory
from hijack_lens.attribution.direct import NotAdditiveError
from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.attribution.logits import attribute
from hijack_lens.core.checks import check_fields, shown
from hijack_lens.core.circuit import ROLE_NAMES, Circuit, Margin
from hijack_lens.core.inputs import circuit_of, model_tokens, prompt_texts
from hijack_lens.core.spans import joiner
from hijack_lens.core.tables import Drawn, widened
from hijack_lens.core.texts import outputs_are_tokens
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.language.prompts import HijackPrompt
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.theory.flips import Flip
from hijack_lens.training.tables import read_tables


@dataclass(frozen=True, repr=False)
class Explanation(Drawn):
    """Which memory wrote the last position's logits, and the evidence for it.

    All margins are `logit[in_context] - logit[global_candidate]` at the last position, in logits. For prompts other
    than a `HijackPrompt`, they are `logit[answer] - logit[foil]`, where the answer is what the context says.

    Attributes:
        model: the model that was explained.
        prompt: the prompt; token ids if it was not a `HijackPrompt`.
        attribution: the attribution of the last position's logits; `None` where they are no sum over paths.
        circuit: the roles of the model's components.
        ablated: the margin with each role of the circuit zero-ablated, by the role's label.
        total: the margin.
        names: the texts of the two candidates, with white space made visible.
        texts: those of the prompt's tokens.
        first: that of the token with the largest logit.
        not_split: why there is no attribution; `None` where there is one.
        theory: the margin by theory: in closed form if the model was written by hand, with positions; by tables, which
            `training.read_tables` reads off its weights, if it was trained; `None` where these cannot be had.
        flip: the smallest number of repeats at which the context wins at the prompt's length; `None` likewise.

    Examples:
        >>> explanation = hl.explain(model, prompt)
        >>> explanation.verdict
        "The context hijacks the weights: after 'q' the model prefers 'e' to 'u', by 3.27 logits."
        >>> explanation.winner, explanation.ablated["induction head"]
        ('context', -6.580639136955142)
        >>> print(explanation.margin)
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
    """

    model: Any
    prompt: HijackPrompt | Int[Tensor, "pos"]
    attribution: LogitAttribution | None
    circuit: Circuit
    ablated: dict[str, float]
    total: float
    names: tuple[str, str]
    texts: tuple[str, ...]
    first: str
    not_split: str | None = None
    theory: Margin | None = None
    flip: Flip | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.prompt.tokens if isinstance(self.prompt, HijackPrompt) else self.prompt).ndim != 1:
            raise ValueError(f"prompt must be a single prompt of shape [pos], got {shown(self.prompt)}")

    @property
    def margin(self) -> Margin:
        """The model's own margin, split by memory.

        Raises:
            ValueError: where there is no attribution.
        """
        if self.attribution is None:
            raise ValueError(f"the margin, {self.total:+.4f}, is not split by memory: {self.not_split}")
        return self.attribution.margin()

    def theory_beside_model(self) -> dict[str, tuple[float, float]]:
        """The margin and its parts, as (theory, model); empty if `theory` is `None`."""
        if self.theory is None:
            return {}
        found = self.margin.parts
        return {part: (float(predicted), float(found[part])) for part, predicted in self.theory.parts.items()}

    @property
    def winner(self) -> str:
        """ "context" or "weights", whichever candidate has the larger logit; "neither" on a tie."""
        return "neither" if self.total == 0 else "context" if self.total > 0 else "weights"

    @property
    def verdict(self) -> str:
        """The answer in a sentence or two."""
        (c, g), q, total = map(repr, self.names), repr(self.texts[-1]), self.total
        aside = "" if self.first in self.names else f" (Its first choice is neither, but {self.first!r}.)"
        if total == 0:
            return f"Neither memory wins: after {q}, {c} and {g} have the same logit.{aside}"
        preferred, other = (c, g) if total > 0 else (g, c)
        if self.attribution is None:
            sentence = f"After {q} the model prefers {preferred} to {other}, by {abs(total):.2f} logits"
            return f"{sentence}; which memory wrote that is not split: {self.not_split}.{aside}"
        context, weights, rest, _ = map(float, self.margin.parts.values())
        if rest * total > 0 and abs(rest) >= abs(context + weights):
            said = "Neither memory decides, but the rest of the model"
        elif context * total > 0 and weights * total > 0:
            said = "Both memories agree"
        elif not self.circuit.induction:
            said = "The weights decide"
        elif total > 0:
            said = "The context hijacks the weights" if context > 0 else "The weights speak for the context's candidate"
        else:
            said = "The weights overrule the context" if weights < 0 else "The context speaks against its own candidate"
        return f"{said}: after {q} the model prefers {preferred} to {other}, by {abs(total):.2f} logits.{aside}"


def explained(
    model: Any, prompt: Any, ids: Int[Tensor, "pos"], pair: list[int], circuit: Circuit, **theory_says: Any
) -> Explanation:
    """The explanation of one prompt, with the answers `pair`."""
    logits = widened(logits_of(model, ids[None])[0, -1])
    first = int(logits.argmax())
    attribution, not_split = None, None
    try:
        if isinstance(prompt, HijackPrompt):
            attribution = attribute(model, prompt, circuit=circuit)
        else:
            found = attribute(model, ids, circuit=circuit, answers=list(dict.fromkeys([*pair, first])))
            attribution = replace(found, candidates=(pair[0], pair[1]), joiner=joiner(model, ids))
    except NotAdditiveError as error:
        not_split = str(error)
    said = torch.tensor([*pair, first])
    c, g, best = prompt_texts(model, said) if outputs_are_tokens(model) else map(str, said.tolist())
    return Explanation(
        model,
        prompt,
        attribution,
        circuit,
        ablated=_ablated(model, ids[None], circuit, pair),
        total=float(logits[pair[0]] - logits[pair[1]]),
        names=(c, g),
        texts=prompt_texts(model, ids),
        first=best,
        not_split=not_split,
        **theory_says,
    )


def of_hijack_prompt(model: Any, prompt: HijackPrompt, circuit: Circuit | None) -> Explanation:
    """The explanation of a prompt that `hijack_prompt` made."""
    if not isinstance(model, BigramTransformer):
        raise TypeError(f"model must be a BigramTransformer, got {type(model).__name__}")
    if prompt.language.tokens != model.language.tokens:
        raise ValueError("prompt must be of the model's language, got one with other tokens")
    circuit, ids = circuit_of(model, circuit), model_tokens(model, prompt)[0]
    predicted = flip = None
    setting = _setting(model)
    if setting is not None:
        predicted = theory.margin(prompt, model.language, setting)
        flip = theory.min_repeats(
            model.language, prompt.trigger, prompt.in_context, prompt.global_candidate, setting, length=len(prompt)
        )
    pair = [prompt.in_context, prompt.global_candidate]
    return explained(model, prompt, ids, pair, circuit, theory=predicted, flip=flip)


def _setting(model: BigramTransformer) -> theory.Setting | theory.Tables | None:
    """What theory needs to know of a model: the strengths that it was written with, or tables of what it learned."""
    if model.strengths is not None:
        return None if model.positions == "none" else theory.Setting.of(model)  # the closed form needs positions
    try:
        return read_tables(model)
    except ValueError:  # no sum of tables, as with norms, or not what the weights say
        return None


def _ablated(model: Any, tokens: Int[Tensor, "1 pos"], circuit: Circuit, pair: list[int]) -> dict[str, float]:
    """The margin with each role ablated in turn, for the roles that have components."""
    found = {}
    for role in ROLE_NAMES:
        if components := getattr(circuit, role):
            with hooks.ablate(model, components):
                logits = logits_of(model, tokens)[0, -1]
            found[circuit.role_label(role)] = float(logits[pair[0]]) - float(logits[pair[1]])
    return found
