"""What a circuit makes of a prompt: the verdict, attribution to its paths, ablations and the theory's prediction."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import hooks, theory
from hijack_lens.attribution.direct import NotAdditiveError
from hijack_lens.attribution.logit_attribution import LogitAttribution
from hijack_lens.attribution.logits import attribute
from hijack_lens.attribution.sources import attribute_sources
from hijack_lens.core.checks import check_fields, shown
from hijack_lens.core.circuit import ROLE_NAMES, Circuit, Margin
from hijack_lens.core.hook_points import is_deep
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
        ablated: the margin with each role of the circuit ablated, by the role's label: zero-ablated in a
            model of up to two layers; in deeper ones, which zeros would break, set to its mean over the prompt's tokens
            in random orders (the first token stays the first).
        total: the margin.
        names: the texts of the two candidates, with white space made visible.
        texts: those of the prompt's tokens.
        first: that of the token with the largest logit.
        not_split: why there is no attribution; `None` where there is one.
        theory: the margin by theory: in closed form if the model was written by hand, with positions; by tables, which
            `training.read_tables` reads off its weights, if it was trained; `None` where these cannot be had.
        flip: the smallest number of repeats at which the context wins at the prompt's length; `None` likewise.
        by_source: the margin by where its terms entered, as `attribute_sources` has it, where the paths that the
            circuit does not name outweigh those that it names; else `None`.
        broken: the roles without which the model predicts its own intact predictions worse than a uniform guess would:
            their margins in `ablated` say little. Not asked of models of up to two layers.

    Examples:
        >>> explanation = hl.explain(model, prompt)
        >>> explanation.verdict
        "The context hijacks the weights: after 'q' the model prefers 'e' to 'u', by 3.27 logits."
        >>> explanation.winner, explanation.ablated["induction head"]
        ('context', -6.580639136955142)
        >>> print(explanation.margin)
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> explanation.deep
        False
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
    by_source: Margin | None = None
    broken: tuple[str, ...] = ()

    @property
    def deep(self) -> bool:
        """Whether components were ablated by means, not by zeros."""
        return is_deep(self.model)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.prompt, HijackPrompt) and self.prompt.tokens.ndim != 1:
            raise ValueError(f"prompt must be a single prompt, got {shown(self.prompt)}")

    @property
    def margin(self) -> Margin:
        """The model's own margin, split by memory.

        Raises:
            ValueError: where there is no attribution.
        """
        if self.attribution is None:
            raise ValueError(f"the margin, {self.total:+.4f}, is not split by memory: {self.not_split}")
        return self.attribution.margin()

    def to_pandas(self) -> pd.DataFrame:
        """A row per run: the whole model, each role ablated, and theory, where there is any; with the margin's total.

        Its parts by memory are missing (NaN) where the margin is not split.
        """
        parts: dict[str, dict[str, float]] = {"whole model": {"total": self.total}}
        if self.attribution is not None:
            parts["whole model"] = {part: float(value) for part, value in self.margin.parts.items()}
        parts |= {f"without {role}": {"total": value} for role, value in self.ablated.items()}
        if self.theory is not None:
            parts["theory"] = {part: float(value) for part, value in self.theory.parts.items()}
        frame = pd.DataFrame.from_dict(parts, orient="index", columns=["context", "weights", "rest", "total"])
        return frame.rename_axis("run").reset_index()

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
        context, weights, _, _ = map(float, (self.by_source or self.margin).parts.values())
        if self.by_source is not None:
            own = self.margin
            aside = (
                f" By source tokens, the context gave {context:+.2f}, the weights {weights:+.2f}; of this, the "
                f"circuit's own paths carry {own.context:+.2f} and {own.weights:+.2f}.{aside}"
            )
        if context * total > 0 and weights * total > 0:
            said = "Both memories agree"
        elif not self.circuit.induction and self.by_source is None:
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
    ablated, broken = _ablated(model, ids[None], circuit, pair, logits)
    return Explanation(
        model,
        prompt,
        attribution,
        circuit,
        ablated=ablated,
        total=float(logits[pair[0]] - logits[pair[1]]),
        names=(c, g),
        texts=prompt_texts(model, ids),
        first=best,
        not_split=not_split,
        by_source=None if attribution is None else _by_source(model, ids, pair, attribution.margin()),
        broken=broken,
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


def _by_source(model: Any, ids: Int[Tensor, "pos"], pair: list[int], paths: Margin) -> Margin | None:
    """The margin by where its terms entered, where the circuit's paths leave most of it to others."""
    rest, total = float(paths.rest), float(paths.total)
    if rest * total <= 0 or abs(rest) < abs(float(paths.context) + float(paths.weights)):
        return None
    try:
        return attribute_sources(model, ids, pair).margin(*pair)
    except NotAdditiveError:
        return None


_ORDERS = 8


def _ablated(
    model: Any, tokens: Int[Tensor, "1 pos"], circuit: Circuit, pair: list[int], logits: Float[Tensor, "d_vocab"]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The margin with each role that has components ablated in turn; and those without which predictions break down."""
    how: dict[str, Any] = {}
    if deep := is_deep(model):
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(_ORDERS, tokens.shape[1] - 1, generator=generator).argsort(1).to(tokens.device)
        how = {"how": "mean", "reference": torch.cat([tokens[:, :1].expand(_ORDERS, 1), tokens[0, 1:][order]], 1)}
    intact, found, broken = logits.softmax(-1), {}, []
    for role in ROLE_NAMES:
        if components := getattr(circuit, role):
            with hooks.ablate(model, components, **how):
                without = widened(logits_of(model, tokens)[0, -1])
            label = circuit.role_label(role)
            found[label] = float(without[pair[0]]) - float(without[pair[1]])
            if deep and float(-(intact * without.log_softmax(-1)).sum()) > math.log(len(without)):
                broken.append(label)
    return found, tuple(broken)
