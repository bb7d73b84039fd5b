"""From learned weights back to the theory: the strengths of a trained model's memories."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import Seed, as_generator, check_columns, check_count, check_fields, check_type, shown
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.core.tables import Drawn, widened
from hijack_lens.language import BigramLanguage, Token, Triggers
from hijack_lens.language.prompts import HijackPrompt, hijack_prompt
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.recall import (
    check_weights_alone,
    context_free_logits,
    effective_copy_scores,
    match_scores,
    previous_token_scores,
)


@dataclass(frozen=True, repr=False)
class FittedStrengths(Drawn):
    """Strengths read off a model's weights.

    Attributes:
        setting: for `theory`, with the language below: the strengths, and the token ids that were taken as keys of the
            match memory.
        language: the bigrams that the weights hold: g * log pi_b are the model's own context-free logits, up to a
            constant per token. After a token that was always a trigger in training they need not be the true ones.
        purity: by memory ("previous_token", "match", "copy", "bigram"), the R^2 of the pure associative memory in the
            model's own table of scores: 1 for a model written by hand, less as other structure is added.

    Examples:
        >>> fit = hl.fit_strengths(model)
        >>> print(hl.theory.margin(prompt, language, fit.setting))
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> fit.strengths == fit.setting.strengths
        True
    """

    setting: theory.Setting
    language: BigramLanguage
    purity: dict[str, float]

    @property
    def strengths(self) -> Strengths:
        """Those of the setting."""
        return self.setting.strengths

    def to_pandas(self) -> pd.DataFrame:
        """A row per memory: memory, strength, purity."""
        rows = [(memory, getattr(self.strengths, memory), purity) for memory, purity in self.purity.items()]
        return pd.DataFrame(rows, columns=["memory", "strength", "purity"])


@analysis
def fit_strengths(model: BigramTransformer, triggers: Sequence[Token] | None = None) -> FittedStrengths:
    """Reads effective strengths off a model's weights, without looking at its predictions.

    Each memory is a table of scores, key by value. Its strength is how far the right value's score lies above the mean
    of the others. The previous-token head's table is over offsets (b1); the induction head's match is over remembered
    and current tokens (b2), its copy over attended tokens and logits, including the way through the MLP (b3). The
    bigram memory's strength (g) is the slope of the context-free logits against log pi_b. Tokens are weighted by
    frequency. Negative b1, b2 and b3 become 0, a negative g becomes 1. Norms act through their weights only.

    Args:
        model: one with a single head in each role, and relative or absolute positions.
        triggers: keys of the match memory; by default the model's own, else all tokens.

    Raises:
        ValueError: for other models.

    Examples:
        >>> fit = hl.fit_strengths(model)
        >>> {name: round(value, 3) for name, value in vars(fit.strengths).items()}
        {'previous_token': 20.0, 'match': 6.0, 'copy': 10.0, 'bigram': 1.0}
    """
    check_type("model", model, BigramTransformer)
    check_weights_alone(model)
    circuit = model.circuit
    if len(circuit.previous_token) != 1 or len(circuit.induction) != 1:
        raise ValueError(f"model must have one previous-token and one induction head, got {circuit}")
    length = model.n_ctx_train or min(model.cfg.n_ctx, 128)
    previous = previous_token_scores(model, circuit.previous_token[0], length)
    if previous is None:
        raise ValueError(f"model must have relative or absolute positions, got {shown(model.positions)}")
    keys = triggers if triggers is not None else model.triggers
    ids = model.language.trigger_ids(keys)
    if not len(ids):
        raise ValueError("triggers must name at least one token, got none")
    weight = model.language.long_run.to(widened(model.W_E))
    head = circuit.induction[0]

    scores, right = previous
    by_query = (
        weight if len(scores) == len(weight) and model.positions == "relative" else torch.ones(len(scores)).to(weight)
    )
    focus, focus_purity = _diagonal_strength(scores, right, by_query)
    match = match_scores(model, head)[ids.to(weight.device)]
    matched, match_purity = _diagonal_strength(match, ids.to(weight.device), weight[ids.to(weight.device)])
    asked = torch.zeros_like(weight).index_copy(0, ids.to(weight.device), weight[ids.to(weight.device)])
    copied = effective_copy_scores(model, head, asked / asked.sum())
    copy, copy_purity = _diagonal_strength(copied, torch.arange(len(copied), device=weight.device), weight)

    scale, purity = _bigram_strength(model, ids)
    held = (widened(context_free_logits(model)).double().cpu() / scale).softmax(-1)
    strengths = Strengths(max(focus, 0.0), max(matched, 0.0), max(copy, 0.0), scale)
    positions: Positions = "absolute" if model.positions == "absolute" else "relative"
    return FittedStrengths(
        theory.Setting(strengths, ids.tolist(), positions, model.n_ctx_train),
        BigramLanguage(held, model.language.pi_u, tokens=model.language.tokens, level=model.language.level),
        {"previous_token": focus_purity, "match": match_purity, "copy": copy_purity, "bigram": purity},
    )


_COLUMNS = ["trigger", "in_context", "global", "repeats", "theory_margin", "model_margin"]


@dataclass(frozen=True, repr=False)
class TheoryAgreement(Drawn):
    """How well the theory, at fitted strengths, predicts a model.

    Attributes:
        r2: R^2 of the theory's logits as a prediction of the model's, at every prompt's last position, each relative to
            its mean over the vocabulary; at most 1, and negative if the mean alone would predict better.
        winners: the fraction of prompts on which theory and model agree on the winner.
        table: one row per prompt: trigger, in_context, global, repeats, and the margins of theory and model.

    Examples:
        >>> agreement = hl.training.theory_agreement(model, hl.fit_strengths(model), n_prompts=20, length=32)
        >>> f"R² {agreement.r2:.3f}, {agreement.winners:.0%} of the winners named"
        'R² 1.000, 100% of the winners named'
        >>> len(agreement.table)
        20
    """

    r2: float
    winners: float
    table: pd.DataFrame

    def __post_init__(self) -> None:
        check_fields(self)
        check_columns("table", self.table, _COLUMNS)

    def to_pandas(self) -> pd.DataFrame:
        """A row per prompt: a copy of `table`."""
        return self.table.copy()


def conflict_prompts(
    language: BigramLanguage, triggers: Triggers, n_prompts: int, length: int, seed: Seed
) -> list[HijackPrompt]:
    """Prompts of at least 14 tokens, with random triggers, in-context candidates and numbers of repeats (0 to 6)."""
    n_prompts = check_count("n_prompts", n_prompts, minimum=1)
    length = check_count("length", length, minimum=14)
    if language.d_vocab < 3:
        raise ValueError(f"language has {language.d_vocab} tokens; a conflict needs at least 3")
    ids = language.trigger_ids(triggers).tolist()
    generator = as_generator(seed)
    prompts: list[HijackPrompt] = []
    while len(prompts) < n_prompts:
        q = ids[int(torch.randint(len(ids), (), generator=generator))]
        c = int(torch.randint(language.d_vocab, (), generator=generator))
        g = language.global_candidate(q)
        repeats = int(torch.randint(7, (), generator=generator))
        if len({q, c, g}) == 3:
            prompts.append(hijack_prompt(language, q, c, repeats, length, seed=generator))
    return prompts


def theory_agreement(
    model: BigramTransformer, fit: FittedStrengths, *, n_prompts: int = 300, length: int = 64, seed: Seed = 0
) -> TheoryAgreement:
    """Compares a model with the theory at fitted strengths, on conflict prompts that neither has seen.

    Triggers, in-context candidates and numbers of repeats (0 to 6) are drawn at random.

    Args:
        model: the model to compare.
        fit: its fitted strengths.
        n_prompts: how many prompts.
        length: tokens in each, at least 14.
        seed: for the random draws.

    Examples:
        >>> agreement = hl.training.theory_agreement(model, hl.fit_strengths(model), n_prompts=20, length=32)
        >>> f"{agreement.winners:.0%} of the winners named"
        '100% of the winners named'
    """
    check_type("model", model, BigramTransformer)
    check_type("fit", fit, FittedStrengths)
    n_prompts = check_count("n_prompts", n_prompts, minimum=1)
    if check_count("length", length, minimum=14) > model.cfg.n_ctx:
        raise ValueError(f"length must be at most the model's n_ctx={model.cfg.n_ctx}, got {length}")
    return agreement_on(model, fit, conflict_prompts(model.language, fit.setting.triggers, n_prompts, length, seed))


@analysis
def agreement_on(model: BigramTransformer, fit: FittedStrengths, prompts: Sequence[HijackPrompt]) -> TheoryAgreement:
    """Compares them on given prompts, all equally long."""
    language = model.language
    tokens = torch.stack([prompt.tokens for prompt in prompts])
    found = PlainForward(model)(tokens.to(model.W_E.device))[:, -1].double().cpu()
    predicted = theory.logits(tokens, fit.language, fit.setting)[:, -1]
    rows = []
    for prompt, theirs, ours in zip(prompts, found, predicted, strict=True):
        c, g = prompt.in_context, prompt.global_candidate
        repeats = int((prompt.tokens == prompt.trigger).sum()) - 1  # the last is the question
        names = [language.tokens[i] for i in (prompt.trigger, c, g)]
        rows.append((*names, repeats, float(ours[c] - ours[g]), float(theirs[c] - theirs[g])))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    x, y = (values - values.mean(-1, keepdim=True) for values in (predicted, found))
    return TheoryAgreement(
        r2=float(1 - ((y - x) ** 2).sum() / (y**2).sum()),
        winners=float(((table["theory_margin"] > 0) == (table["model_margin"] > 0)).mean()),
        table=table,
    )


def _diagonal_strength(
    scores: Float[Tensor, "key value"], right: Tensor, weight: Float[Tensor, "key"]
) -> tuple[float, float]:
    """How far the right value's score lies above the others' mean, and how much of the table this explains (R^2)."""
    scores = widened(scores)
    own = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, right[:, None], True)
    usable = scores.isfinite()
    others = usable & ~own
    rest = (scores.masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp_min(1))[:, None]
    weight = weight / weight.sum()
    strength = float(weight @ (scores[own] - rest[:, 0]))
    pure = rest + strength * own
    spread = ((scores - rest).masked_fill(~usable, 0.0) ** 2).sum(1)
    error = ((scores - pure).masked_fill(~usable, 0.0) ** 2).sum(1)
    return strength, 1 - float(weight @ error) / float(weight @ spread) if bool(spread.any()) else torch.nan


def bigram_slope(model: BigramTransformer) -> float:
    """The strength g of the model's bigram memory."""
    return _bigram_strength(model, model.language.trigger_ids(model.triggers))[0]


def _bigram_strength(model: BigramTransformer, triggers: Int[Tensor, "trigger"]) -> tuple[float, float]:
    """The slope of the context-free logits in log pi_b (1 where it is negative), and how much of them it explains."""
    weight = model.language.long_run.to(widened(model.W_E))
    # Leave out the triggers' rows: what follows triggers depends on the context, so no bigram memory should know it.
    rows = torch.ones(len(weight), dtype=torch.bool)
    if len(triggers) < len(weight):
        rows[triggers] = False
    log_pi_b = model.language.pi_b.clamp_min(1e-12).log().to(weight)
    x, y = (_centred(table, log_pi_b.exp())[rows] for table in (log_pi_b, widened(context_free_logits(model))))
    cells = (weight[:, None] * log_pi_b.exp())[rows]
    slope = float((cells * x * y).sum() / (cells * x * x).sum())
    residual = float((cells * (y - slope * x) ** 2).sum() / (cells * y**2).sum())
    return slope if slope > 0 else 1.0, 1 - residual


def _centred(table: Tensor, weight: Tensor) -> Tensor:
    """Each row of logits relative to its mean: a constant per row changes no prediction."""
    return table - (table * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
