"""The whole analysis in one call: the verdict on a prompt, its attribution, ablations and the theory's prediction."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hijack_lens import hooks, theory
from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.attribution.logits import attribute
from hijack_lens.circuits.finding import find_circuit
from hijack_lens.core.checks import shown
from hijack_lens.core.circuit import ROLE_NAMES, Circuit, Margin
from hijack_lens.core.hook_points import check_model, evaluating
from hijack_lens.core.inputs import circuit_of, single_prompt, text_tokens, token_ids
from hijack_lens.core.tables import Drawn
from hijack_lens.language.prompts import HijackPrompt
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.theory.flips import Flip


@dataclass(frozen=True, repr=False)
class Explanation(Drawn):
    """Which memory wrote the last position's logits, and the evidence for it.

    All margins are `logit[in_context] - logit[global_candidate]` at the last position, in logits. For prompts other
    than a `HijackPrompt`, they are `logit[answer] - logit[foil]`, where the answer is what the context says.

    Attributes:
        model: the model that was explained.
        prompt: the prompt; token ids if it was not a `HijackPrompt`.
        attribution: the attribution of the last position's logits.
        circuit: the roles of the model's components.
        ablated: the margin with each role of the circuit zero-ablated, by the role's label.
        theory: the closed form's margin, if the model was written by hand, with positions; else `None`.
        flip: the smallest number of repeats at which the context wins at the prompt's length; `None` likewise.
    """

    model: Any
    prompt: HijackPrompt | Int[Tensor, "pos"]
    attribution: LogitAttribution
    circuit: Circuit
    ablated: dict[str, float]
    theory: Margin | None = None
    flip: Flip | None = None

    @property
    def margin(self) -> Margin:
        """The model's own margin, split by memory."""
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
        total = float(self.margin.total)
        return "neither" if total == 0 else "context" if total > 0 else "weights"

    @property
    def names(self) -> tuple[str, str]:
        """The texts of the two candidates, with white space made visible."""
        first, second = (self.attribution.token_text(index) for index in self.attribution.pair())
        return first, second

    @property
    def verdict(self) -> str:
        """The answer in a sentence or two."""
        (c, g), q = map(repr, self.names), repr(self.attribution.source_texts()[-1])
        context, weights, rest, total = map(float, self.margin.parts.values())
        if total == 0:
            return f"Neither memory wins: after {q}, {c} and {g} have the same logit."
        preferred, other = (c, g) if total > 0 else (g, c)
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
        sentence = f"{said}: after {q} the model prefers {preferred} to {other}, by {abs(total):.2f} logits."
        first = int(self.attribution.logits.argmax())
        if first not in self.attribution.pair():
            sentence += f" (Its first choice is neither, but {self.attribution.token_text(first)!r}.)"
        return sentence


def explain(
    model: Any,
    prompt: object,
    answer: str | int | None = None,
    foil: str | int | None = None,
    *,
    circuit: Circuit | None = None,
) -> Explanation:
    """Explains what a model predicts at the end of a prompt that puts its two memories in conflict.

    Args:
        model: a `BigramTransformer`; for prompts other than a `HijackPrompt`, any HookedTransformer or
            TransformerBridge.
        prompt: one `HijackPrompt` in the model's language; or a text or tokens.
        answer: with a text or tokens, the token that the context suggests, as text or id.
        foil: with a text or tokens, the token that the weights suggest, as text or id.
        circuit: the roles of the components; by default the model's own circuit, else what `find_circuit` finds.

    Raises:
        TypeError, ValueError: for other models and prompts, for batches of prompts, and for answers that are not
            single tokens.
    """
    if isinstance(prompt, HijackPrompt):
        if answer is not None or foil is not None:
            raise ValueError(
                f"answer and foil come with a HijackPrompt, got answer={shown(answer)}, foil={shown(foil)}"
            )
        return _of_hijack_prompt(model, prompt, circuit)
    if answer is None or foil is None:
        raise TypeError(f"prompt must be a HijackPrompt, got {type(prompt).__name__}; others need answer= and foil=")
    check_model(model)
    tokens = text_tokens(model, prompt, "prompt")[None] if isinstance(prompt, str) else single_prompt(model, prompt)
    pair = token_ids(model, "answer and foil", [answer, foil]).tolist()
    with evaluating(model):
        circuit = circuit_of(model, circuit, lambda: find_circuit(model))
        first = int(model(tokens)[0, -1].argmax())
        attribution = attribute(model, tokens[0], circuit=circuit, answers=list(dict.fromkeys([*pair, first])))
        ablated = _ablated(model, tokens, circuit, pair)
    attribution = replace(attribution, candidates=(pair[0], pair[1]), joiner=_joiner(model, tokens[0]))
    return Explanation(model, tokens[0], attribution, circuit, ablated)


def _of_hijack_prompt(model: Any, prompt: HijackPrompt, circuit: Circuit | None) -> Explanation:
    if not isinstance(model, BigramTransformer):
        raise TypeError(f"model must be a BigramTransformer, got {type(model).__name__}")
    if prompt.tokens.ndim != 1:
        raise ValueError(f"prompt must be a single prompt, got a batch of {len(prompt.tokens)}")
    if prompt.language.tokens != model.language.tokens:
        raise ValueError("prompt must be of the model's language, got one with other tokens")
    circuit = circuit_of(model, circuit)
    attribution = attribute(model, prompt, circuit=circuit)
    ablated = _ablated(model, prompt.tokens[None], circuit, [prompt.in_context, prompt.global_candidate])
    predicted = flip = None
    if model.strengths is not None and model.positions != "none":  # the closed form needs positions
        setting = theory.Setting.of(model)
        predicted = theory.margin(prompt, model.language, setting)
        flip = theory.min_repeats(
            model.language, prompt.trigger, prompt.in_context, prompt.global_candidate, setting, length=len(prompt)
        )
    return Explanation(model, prompt, attribution, circuit, ablated, predicted, flip)


def _joiner(model: Any, tokens: Int[Tensor, "pos"]) -> str:
    """What to show between tokens: nothing if they contain their own spaces."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return " "
    ids = tokens.tolist()
    return "" if "".join(tokenizer.decode([i]) for i in ids) == tokenizer.decode(ids) else " "


def _ablated(model: Any, tokens: Int[Tensor, "1 pos"], circuit: Circuit, pair: list[int]) -> dict[str, float]:
    """The margin with each role ablated in turn, for the roles that have components."""
    found = {}
    for role in ROLE_NAMES:
        if components := getattr(circuit, role):
            with hooks.ablate(model, components), torch.no_grad():
                logits = model(tokens)[0, -1]
            found[circuit.role_label(role)] = float(logits[pair[0]] - logits[pair[1]])
    return found
