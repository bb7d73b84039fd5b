"""A run's logits as one number: the metrics of activation patching."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.core.checks import as_int, check_choice, check_count, check_tensor, check_tokens, shown
from hijack_lens.core.hook_points import check_model
from hijack_lens.core.tables import Shown, visible, widened
from hijack_lens.core.texts import decoded, listed_ids, n_outputs
from hijack_lens.language.prompts import HijackPrompt

if TYPE_CHECKING:
    import pandas as pd

Answer = int | str | Sequence[int] | Sequence[str] | Int[Tensor, "batch"]
"""A token, by id or text; or one token per prompt."""

Logits = Float[Tensor, "batch pos d_vocab"]
_Run = Literal["clean", "corrupted"]


@dataclass(frozen=True, repr=False)
class Metric(Shown):
    """A number per prompt, read from the logits at one position; `metric(logits)` is its mean over a batch.

    It works wherever a function of the logits does, including TransformerLens's own `patching`. `hooks.patch_sweep` is
    fast because it reads a single position; so wrap your own function in the same way:

        hl.Metric("entropy", lambda logits: torch.distributions.Categorical(logits=logits).entropy())

    Attributes:
        name: for tables and axes.
        of_logits: from the position's logits, [..., batch, d_vocab], to a number per prompt, [..., batch]. No row's
            number may depend on another row. It is given float32 for logits in half precision.
        position: where logits are read; negative values count from the end.
        resolve: for metrics that need a model or the unpatched runs: from (model, clean logits, corrupted logits),
            both [batch, pos, d_vocab] or `None`, to `of_logits`.

    Examples:
        >>> import torch
        >>> entropy = hl.Metric("entropy", lambda logits: torch.distributions.Categorical(logits=logits).entropy())
        >>> print(f"{entropy(model(prompt.tokens[None])):.3f}")
        0.165
    """

    name: str
    of_logits: Callable[[Float[Tensor, "*rows d_vocab"]], Float[Tensor, "*rows"]] | None = None
    position: int = -1
    resolve: Callable[[Any, Logits | None, Logits | None], Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {shown(self.name)}")
        if not callable(self.of_logits) and not callable(self.resolve):
            raise TypeError(f"of_logits must be a function of logits, got {shown(self.of_logits)}")
        position = as_int(self.position)
        if position is None:
            raise TypeError(f"position must be an int, got {shown(self.position)}")
        object.__setattr__(self, "position", position)

    def __repr__(self) -> str:
        return f"Metric({self.name!r}, position={self.position})"

    def to_pandas(self) -> "pd.DataFrame":
        """A row: its name, the position that it reads, and whether it is to be given to a model first."""
        import pandas as pd

        return pd.DataFrame({"metric": [self.name], "position": [self.position], "open": [self.of_logits is None]})

    def __call__(self, logits: Logits) -> Float[Tensor, ""]:
        """The mean over prompts.

        Raises:
            ValueError: for logits of another shape or too short, or if the metric needs `on` first.
        """
        return self.per_prompt(logits).mean()

    def per_prompt(self, logits: Logits) -> Float[Tensor, "batch"]:
        """The number of each prompt; raises as a call does."""
        _check_logits("logits", logits)
        return self.of_rows(logits[:, self.index(logits.shape[1])])

    def of_rows(self, logits: Float[Tensor, "*runs batch d_vocab"]) -> Float[Tensor, "*runs batch"]:
        """The number of each row of the position's logits.

        Raises:
            TypeError, ValueError: for what are no rows of logits, and if `of_logits` returns anything else.
        """
        check_tensor("logits", logits, "logits")
        if logits.ndim < 2:
            raise ValueError(f"logits must be [..., batch, d_vocab], got shape {tuple(logits.shape)}")
        if self.of_logits is None:
            raise ValueError(
                f"metric {self.name!r} needs a model or its unpatched runs for any logits: give it to .on(model) first"
            )
        numbers = self.of_logits(widened(logits))
        if not isinstance(numbers, Tensor) or numbers.shape != logits.shape[:-1]:
            got = f"shape {tuple(numbers.shape)}" if isinstance(numbers, Tensor) else f"{numbers!r:.40}"
            raise TypeError(
                f"of_logits of metric {self.name!r} must give one number per prompt, {tuple(logits.shape[:-1])} of "
                f"logits {tuple(logits.shape)}, got {got}"
            )
        return numbers

    def index(self, n_positions: int) -> int:
        """The position, counted from the start of prompts that are `n_positions` long.

        Raises:
            ValueError: if they are too short.
        """
        n_positions = check_count("n_positions", n_positions, minimum=1)
        if not -n_positions <= self.position < n_positions:
            raise ValueError(
                f"metric {self.name!r} reads position {shown(self.position)}; the prompts have {n_positions}"
            )
        return self.position % n_positions

    def on(self, model: Any, clean: Logits | None = None, corrupted: Logits | None = None) -> "Metric":
        """The metric with its tokens looked up in the model's tokenizer and its reference taken from the runs."""
        for name, logits in (("clean", clean), ("corrupted", corrupted)):
            if logits is not None:
                _check_logits(name, logits)
        return self if self.resolve is None else replace(self, of_logits=self.resolve(model, clean, corrupted))

    def normalised(self, clean: Logits, corrupted: Logits) -> "Metric":
        """The metric shifted and scaled: 0 on the corrupted run, 1 on the clean one (each the mean over prompts).

        Args:
            clean: the clean run's logits.
            corrupted: the corrupted run's.

        Raises:
            ValueError: if both give the same number.
        """
        _check_logits("clean", clean)
        _check_logits("corrupted", corrupted)
        low, high = self(corrupted).detach(), self(clean).detach()
        if bool(low == high):
            raise ValueError(f"metric {self.name!r} is {float(low):g} on the clean and on the corrupted run alike")

        def shifted(logits: Tensor) -> Tensor:
            return (self.of_rows(logits) - low) / (high - low)

        return Metric(f"{self.name}, normalised", shifted, self.position)


def logit_diff(answer: Answer, foil: Answer, position: int = -1) -> Metric:
    """logit[answer] - logit[foil].

    Args:
        answer: token id or text; or one per prompt. A text is read as it stands, if that is a single token; else with a
            leading space. With `on`, the metric's name shows the tokens that were found.
        foil: likewise.
        position: where logits are read.

    Raises:
        TypeError: for anything but tokens.
        ValueError: if they are the same token.

    Examples:
        >>> metric = hl.logit_diff("e", "u").on(model)
        >>> metric.name
        "logit 'e' − logit 'u'"
        >>> print(f"{metric(model(prompt.tokens[None])):.2f}")
        3.27
    """

    def of_logits(logits: Tensor, ids: dict[str, Tensor]) -> Tensor:
        return _pick(logits, ids, "answer") - _pick(logits, ids, "foil")

    return _of_tokens("logit {answer} − logit {foil}", {"answer": answer, "foil": foil}, of_logits, position)


def margin(prompt: HijackPrompt, position: int = -1) -> Metric:
    """The hijack margin of a prompt, logit[c] - logit[g]: positive where the context wins.

    Raises:
        TypeError: for anything but a `HijackPrompt`; use `logit_diff` with other prompts.

    Examples:
        >>> metric = hl.metrics.margin(prompt)
        >>> metric.name
        "margin of 'e' over 'u'"
        >>> print(f"{metric(model(prompt.tokens[None])):.2f}")
        3.27
    """
    if not isinstance(prompt, HijackPrompt):
        raise TypeError(f"prompt must be a HijackPrompt, got {type(prompt).__name__}; logit_diff takes any two tokens")
    c, g = (prompt.language.display(token) for token in (prompt.in_context, prompt.global_candidate))
    return replace(logit_diff(prompt.in_context, prompt.global_candidate, position), name=f"margin of {c!r} over {g!r}")


def log_prob(answer: Answer, position: int = -1) -> Metric:
    """log P(answer), in nats; arguments as for `logit_diff`.

    Examples:
        >>> metric = hl.metrics.log_prob("e").on(model)
        >>> print(f"{metric(model(prompt.tokens[None])):.3f}")
        -0.038
    """

    def of_logits(logits: Tensor, ids: dict[str, Tensor]) -> Tensor:
        return _pick(logits, ids, "answer") - logits.logsumexp(-1)

    return _of_tokens("log P({answer})", {"answer": answer}, of_logits, position)


def prob(answer: Answer, position: int = -1) -> Metric:
    """P(answer); arguments as for `logit_diff`.

    Examples:
        >>> metric = hl.metrics.prob("e").on(model)
        >>> print(f"{metric(model(prompt.tokens[None])):.3f}")
        0.963
    """

    def of_logits(logits: Tensor, ids: dict[str, Tensor]) -> Tensor:
        return _pick(logits.softmax(-1), ids, "answer")

    return _of_tokens("P({answer})", {"answer": answer}, of_logits, position)


def kl(reference: _Run | Logits = "clean", position: int = -1) -> Metric:
    """KL(reference || run), in nats: how far a run's next-token distribution is from the reference's.

    Args:
        reference: the "clean" or the "corrupted" run of a sweep, or logits.
        position: where logits are read.

    Raises:
        TypeError, ValueError: for any other reference.

    Examples:
        >>> clean, corrupted = model(prompt.clean[None]), model(prompt.corrupted[None])
        >>> print(f"{hl.metrics.kl(clean)(corrupted):.3f}")
        15.623
    """
    if isinstance(reference, str):
        check_choice("reference", reference, ("clean", "corrupted"))
    elif not isinstance(reference, Tensor) or reference.ndim != 3:
        raise TypeError(
            f"reference must be 'clean', 'corrupted' or logits [batch, pos, d_vocab], got {shown(reference)}"
        )
    which = reference if isinstance(reference, str) else "reference"
    name = f"KL from the {which} run"

    def against(logits: Tensor) -> Callable[[Tensor], Tensor]:
        log_p = widened(logits[:, unplaced.index(logits.shape[1])].detach()).log_softmax(-1)

        def divergence(patched: Tensor) -> Tensor:
            if patched.shape[-1] != log_p.shape[-1] or len(log_p) not in (1, patched.shape[-2]):
                shapes = tuple(log_p.shape), tuple(patched.shape[-2:])
                raise ValueError("reference has logits [batch, d_vocab] of shape {}, the run {}".format(*shapes))
            # Where p is 0, p log p is 0.
            return (log_p.exp() * (log_p - patched.log_softmax(-1))).where(log_p > -torch.inf, 0.0).sum(-1)

        return divergence

    def resolve(model: Any, clean: Logits | None, corrupted: Logits | None) -> Callable[[Tensor], Tensor]:
        logits = clean if reference == "clean" else corrupted
        if logits is None:
            raise ValueError(f"metric {name!r} needs that run's logits: .on(model, {reference}=logits)")
        return against(logits)

    unplaced = Metric(name, position=position, resolve=resolve)
    return Metric(name, against(reference), position) if isinstance(reference, Tensor) else unplaced


@dataclass(frozen=True, repr=False)
class _OfTokens(Metric):
    """A metric of tokens, whose name shows which they are in a model's tokenizer."""

    words: str = ""
    answers: tuple[tuple[str, Answer], ...] = ()

    def on(self, model: Any, clean: Logits | None = None, corrupted: Logits | None = None) -> Metric:
        found = super().on(model, clean, corrupted)
        if self.name != self.words.format(**{argument: _named(answer) for argument, answer in self.answers}):
            return found  # the user's own name
        named = {argument: _named(answer, model) for argument, answer in self.answers}
        return replace(found, name=self.words.format(**named))


def _check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"{type(logits).__name__} {shown(logits)}"
        raise ValueError(f"{name} must be a tensor [batch, pos, d_vocab], got {got}")
    check_tensor(name, logits, "logits")


def _of_tokens(
    words: str, answers: dict[str, Answer], of_logits: Callable[[Tensor, dict[str, Tensor]], Tensor], position: int
) -> Metric:
    """A metric of tokens; tokens given as text are looked up once there is a model."""

    def resolve(model: Any, clean: Logits | None = None, corrupted: Logits | None = None) -> Callable[[Tensor], Tensor]:
        ids = {argument: _ids(argument, answer, model) for argument, answer in answers.items()}
        if "foil" in ids:
            _check_differ(answers, ids)
        return lambda logits: of_logits(logits, ids)

    texts = any(isinstance(one, str) for answer in answers.values() for one in _listed(answer))
    name = words.format(**{argument: _named(answer) for argument, answer in answers.items()})
    return _OfTokens(name, None if texts else resolve(None), position, resolve, words, tuple(answers.items()))


def _check_differ(answers: dict[str, Answer], ids: dict[str, Tensor]) -> None:
    """Checks that answer and foil are two tokens: else their difference would be 0 in every run."""
    answer, foil = ids["answer"], ids["foil"]
    if answer.ndim == foil.ndim == 1 and len(answer) != len(foil):
        raise ValueError(f"foil must be as many tokens as answer, {len(answer)}, got {len(foil)}")
    if bool((answer == foil).any()):
        raise ValueError(
            f"foil must be another token than answer, {shown(answers['answer'])}, got {shown(answers['foil'])}"
        )


def _is_several(answer: Any) -> bool:
    return isinstance(answer, (list, tuple)) or (isinstance(answer, (Tensor, np.ndarray)) and answer.ndim > 0)


def _listed(answer: Any) -> list[Any]:
    return list(answer) if _is_several(answer) else [answer]


def _ids(argument: str, answer: Answer, model: Any = None) -> Int[Tensor, "..."]:
    """One token id, or one per prompt."""
    if model is not None:
        check_model(model)
    ids = listed_ids(model, argument, _listed(answer), output=True)
    listed = check_tokens(argument, ids, 2**62 if model is None else n_outputs(model))
    return listed if _is_several(answer) else listed[0]


def _pick(
    values: Float[Tensor, "*runs batch d_vocab"], all_ids: dict[str, Tensor], argument: str
) -> Float[Tensor, "*runs batch"]:
    ids = all_ids[argument]
    if values.numel() == 0:
        raise ValueError(f"logits must hold some, got shape {tuple(values.shape)}")
    check_tokens(argument, ids.reshape(-1), values.shape[-1])
    if ids.ndim and len(ids) != values.shape[-2]:
        raise ValueError(f"{argument} has {len(ids)} tokens, one per prompt, for {values.shape[-2]} prompts")
    index = ids.to(values.device).expand(values.shape[:-1]).unsqueeze(-1)
    return values.gather(-1, index).squeeze(-1)


def _named(answer: Answer, model: Any = None) -> str:
    """What to call an answer: as the user wrote it; with a model, a text as the token that it is there."""
    several: list[Any] = _listed(answer)
    if model is not None and all(isinstance(one, str) for one in several):
        several = [visible(text) for text in decoded(model.tokenizer, listed_ids(model, "answer", several))]
    if len(several) == 1:
        return shown(several[0])
    return "of each prompt's answer" + (f" ({', '.join(map(repr, several)):.60})" if model is not None else "")
