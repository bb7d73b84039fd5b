"""The main job in one call: a prompt's verdict, its attribution, its ablations and the theory beside it."""

from dataclasses import dataclass

import torch

from hijack_lens import hooks, theory
from hijack_lens.attribution import LogitAttribution, attribute
from hijack_lens.circuit import ROLE_NAMES
from hijack_lens.models import TwoLayerTransformer
from hijack_lens.prompts import HijackPrompt
from hijack_lens.theory import Flip, Margin
from hijack_lens.theory.closed_form import Positions


@dataclass(frozen=True)
class Explanation:
    """Which memory wrote the last position's logits, and how that is known.

    All margins are `logit[in_context] - logit[global_]` at the last position, in logits.

    Attributes:
        model: that was explained.
        prompt: it was asked.
        attribution: of the last position's logits.
        ablated: the margin with each role of the circuit switched off (zeroed), by what it is called.
        theory: the closed form's margin, where the model was written by hand.
        flip: the least number of repeats that wins at the prompt's length, likewise.
    """

    model: TwoLayerTransformer
    prompt: HijackPrompt
    attribution: LogitAttribution
    ablated: dict[str, float]
    theory: Margin | None
    flip: Flip | None

    @property
    def margin(self) -> Margin:
        """The model's own margin, split by memory."""
        return self.attribution.margin()

    def theory_beside_model(self) -> dict[str, tuple[float, float]]:
        """The margin and its parts, as (theory, model); empty for a model that was not written by hand."""
        if self.theory is None:
            return {}
        parts = ("context", "weights", "rest", "total")
        return {part: (float(getattr(self.theory, part)), float(getattr(self.margin, part))) for part in parts}

    @property
    def winner(self) -> str:
        """ "context" or "weights": whose candidate has the larger logit; "neither" on a tie."""
        total = float(self.margin.total)
        return "neither" if total == 0 else "context" if total > 0 else "weights"

    @property
    def verdict(self) -> str:
        """The answer in a sentence or two."""
        language, total = self.prompt.language, float(self.margin.total)
        context, weights = float(self.margin.context), float(self.margin.weights)
        c, g, q = (
            repr(language.display(token))
            for token in (self.prompt.in_context, self.prompt.global_, self.prompt.trigger)
        )
        if total == 0:
            return f"Neither memory wins: after {q}, {c} and {g} have the same logit."
        preferred, other = (c, g) if total > 0 else (g, c)
        if context * total > 0 and weights * total > 0:
            said = "Both memories agree"
        elif total > 0:
            said = "The context hijacks the weights" if context > 0 else "The weights speak for the context's candidate"
        else:
            said = "The weights overrule the context" if weights < 0 else "The context speaks against its own candidate"
        sentence = f"{said}: after {q} the model prefers {preferred} to {other}, by {abs(total):.2f} logits."
        first = int(self.attribution.logits.argmax())
        if first not in (self.prompt.in_context, self.prompt.global_):
            sentence += f" (Its first choice is neither, but {language.display(first)!r}.)"
        return sentence


def explain(model: TwoLayerTransformer, prompt: HijackPrompt) -> Explanation:
    """Explains what a two-layer model predicts at the end of a prompt that sets its memories against each other.

    Args:
        model: a `TwoLayerTransformer`.
        prompt: one `HijackPrompt`, of the model's language.

    Raises:
        TypeError, ValueError: for other models and prompts, and for batches of prompts.
    """
    if not isinstance(model, TwoLayerTransformer):
        raise TypeError(f"model must be a TwoLayerTransformer, got {type(model).__name__}")
    if not isinstance(prompt, HijackPrompt):
        raise TypeError(f"prompt must be a HijackPrompt, got {type(prompt).__name__}")
    if prompt.tokens.ndim != 1:
        raise ValueError(f"prompt must be a single prompt, got a batch of {len(prompt.tokens)}")
    if prompt.language.tokens != model.language.tokens:
        raise ValueError("prompt must be of the model's language, got one with other tokens")
    attribution = attribute(model, prompt)
    ablated = {}
    for role, name in ROLE_NAMES.items():
        if components := getattr(model.circuit, role):
            with hooks.ablate(model, components), torch.no_grad():
                logits = model(prompt.tokens)[0, -1]
            ablated[name] = float(logits[prompt.in_context] - logits[prompt.global_])
    predicted = flip = None
    if model.strengths is not None:
        positions: Positions = "absolute" if model.positions == "absolute" else "relative"
        setting = (model.strengths, model.triggers, positions, model.n_ctx_train)
        predicted = theory.margin(prompt, model.language, *setting)
        flip = theory.min_repeats(
            model.language, prompt.trigger, prompt.in_context, prompt.global_, *setting, length=len(prompt)
        )
    return Explanation(model, prompt, attribution, ablated, predicted, flip)
