"""The whole analysis in one call: which memory wrote a prediction, and the evidence for it."""

from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import as_int, check_list, shown
from hijack_lens.core.circuit import Circuit
from hijack_lens.core.inputs import circuit_of, model_tokens, own_circuit, token_ids
from hijack_lens.core.spans import Span
from hijack_lens.explanation.of_answer import explain_answer, spelled_ways
from hijack_lens.explanation.of_circuit import explained, of_hijack_prompt
from hijack_lens.language.prompts import HijackPrompt


@analysis
def explain(
    model: Any,
    prompt: object,
    answer: Any = None,
    foil: Any = None,
    *,
    circuit: Circuit | None = None,
    context: Span = None,
    contrast: object = None,
    candidates: Any = None,
    prepend_bos: bool | None = None,
) -> Any:
    """Explains what a model predicts at the end of a prompt that puts its two memories in conflict.

    Args:
        model: a `BigramTransformer`; for prompts other than a `HijackPrompt`, any HookedTransformer or
            TransformerBridge.
        prompt: a `HijackPrompt` in the model's language; or a text or tokens; or several of these, a list of texts of
            any lengths or a batch.
        answer: with a text or tokens, what the context suggests, as text or a token id; or one per prompt. Without a
            circuit, a text is read as the model finds it likelier, as it stands or with a space before it; and it may
            have several tokens: the first is compared, and the whole answers' probabilities are given beside it.
        foil: with a text or tokens, what the weights suggest; likewise.
        circuit: the roles of the components. A `BigramTransformer` has its own; other models need none.
        context: without a circuit, which part of the prompt is the context, as for `attribute_sources`.
        contrast: without a circuit, a second prompt of as many tokens (the context's answer exchanged, say), or one for
            each: what sets the margins apart is attributed to memories, and to heads, each confirmed by patching.
        candidates: without a circuit, further answers, as texts or token ids, whose logits are split by memory as well.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Returns:
        For models with a circuit, their own or given, an `Explanation` by its paths; where the logits are no sum over
        paths, as where heads' outputs are normed, it has the verdict and the ablations, and says why no more. For other
        models an `AnswerExplanation`, by source tokens. For several prompts a list of them.

    Raises:
        TypeError, ValueError: for other models and prompts, and for answers that are not tokens.

    Examples:
        >>> hl.explain(model, prompt).verdict
        "The context hijacks the weights: after 'q' the model prefers 'e' to 'u', by 3.27 logits."
        >>> hl.explain(model, prompt.text, "e", "u").winner
        'context'
    """
    without_circuit = (("contrast", contrast), ("candidates", candidates))
    if isinstance(prompt, HijackPrompt):
        for name, given in (("answer", answer), ("foil", foil), ("context", context), *without_circuit):
            if given is not None:
                raise ValueError(f"{name} comes with a HijackPrompt, got {name}={shown(given)}")
        if prompt.tokens.ndim == 1:
            return of_hijack_prompt(model, prompt, circuit)
        pairs = zip(prompt.tokens, prompt.corrupted, strict=True)
        return [of_hijack_prompt(model, replace(prompt, tokens=a, corrupted=b), circuit) for a, b in pairs]
    if answer is None or foil is None:
        raise TypeError(
            f"answer and foil must be given with a {type(prompt).__name__}: only a HijackPrompt has its own"
        )
    texts, prompts = _each(model, prompt, "prompt")
    contrasts: list[Any] = [None] * len(prompts) if contrast is None else _each(model, contrast, "contrast")[1]
    if len(contrasts) != len(prompts):
        raise ValueError(f"contrast must be as many prompts as prompt, {len(prompts)}, got {len(contrasts)}")
    sides = zip(_one_each("answer", answer, len(prompts)), _one_each("foil", foil, len(prompts)), strict=True)
    if circuit is None and own_circuit(model) is None:
        asked = [(spelled_ways(model, "answer", a), spelled_ways(model, "foil", b)) for a, b in sides]
        listed = [] if candidates is None else check_list("candidates", candidates, "a list of answers")
        further = [spelled_ways(model, "candidates", one) for one in listed]
        found: list[Any] = [
            explain_answer(model, ids, *pair, context, other, further)
            for ids, pair, other in zip(prompts, asked, contrasts, strict=True)
        ]
    else:
        for name, given in (("context", context), *without_circuit):
            if given is not None:
                raise ValueError(f"{name} does not go with a circuit, got {shown(given)}")
        pairs_of_ids = [token_ids(model, "answer and foil", list(pair), 2, output=True).tolist() for pair in sides]
        roles = circuit_of(model, circuit)
        found = [explained(model, ids, ids, pair, roles) for ids, pair in zip(prompts, pairs_of_ids, strict=True)]
    # One prompt's tokens often have a batch axis, since that is what models take.
    return found if texts or len(found) > 1 else found[0]


def _each(model: Any, prompt: Any, name: str) -> tuple[list[str], list[Int[Tensor, "pos"]]]:
    """The texts, if it is a list of them, and every prompt's tokens."""
    texts = prompt if isinstance(prompt, list) and all(isinstance(text, str) for text in prompt) else []
    return texts, [row for one in (texts or [prompt]) for row in model_tokens(model, one, name)]


def _one_each(name: str, given: Any, n_prompts: int) -> list[Any]:
    """One answer per prompt, from one for all or a list."""
    if isinstance(given, str) or as_int(given) is not None:
        return [given] * n_prompts
    listed = check_list(name, given, "a token, or one for each prompt")
    if len(listed) != n_prompts:
        raise ValueError(f"{name} must be one token, or one for each of {n_prompts} prompts, got {len(listed)}")
    return listed
