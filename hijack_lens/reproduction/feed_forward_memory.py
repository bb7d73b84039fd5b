"""Claim: the feed-forward memory holds the bigrams; where there is none, the induction head's values take them up."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.language import BigramLanguage
from hijack_lens.models import BigramTransformer, trainable_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import TrainModel
from hijack_lens.reproduction.findings import Estimate, Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training import TrainConfig, train
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.recall import copy_scores

STATEMENT = (
    "The feed-forward memory learns the bigrams, by a single gradient step already; without it, a loss on all tokens "
    "makes the induction head's values a bigram memory, and they copy fewer tokens."
)
SOURCE = "Bietti et al., arXiv 2306.00802: W_F by one gradient step, and W_F and the second W_O competing for bigrams"

ONE_STEP = 0.9  # least correlation of what one gradient step writes with what it should
HELD = 0.6  # least correlation of the feed-forward memory's table with the bigrams, after training
COPIES = 0.9  # fraction of tokens that the induction head's values copy where they hold no bigrams

_W_F = "blocks.1.mlp.W_out"
_LEARNED = ("blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_V")
_KINDS = list(product(("with W_F", "without"), ("all", "predictable")))


@dataclass(frozen=True)
class Settings:
    """Models and sequences in the simplified setting of Bietti et al. 2023; `step_` marks those of the single step."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of languages, weights and sequences
    d_vocab: int = 12
    concentration: float = 0.5  # of the Dirichlet distribution that the language's rows are drawn from
    d_model: int = 128
    length: int = 16
    n_triggers: int = 2  # per sequence, drawn anew
    steps: int = 600  # of SGD with momentum
    lr: float = 0.5  # with four times as much, a loss on all tokens diverges
    step_d_model: int = 512
    step_sequences: int = 8192  # to average the gradient over


QUICK = Settings((0, 1, 2), d_model=96, steps=300, step_d_model=384, step_sequences=4096)


def feed_forward_memory(settings: Settings = Settings(), train: TrainModel = train) -> Result:
    """Where the bigrams are learned: in the feed-forward memory W_F, or in the induction head's values.

    Bietti et al. 2023 (arXiv 2306.00802), in a small version of their simplified setting: embeddings, unembedding,
    positions and layer-0 values random and frozen; W_Q and W_O the identity; keys, layer-1 values and the linear W_F
    start at 0. One gradient step on W_F, of the loss on all tokens of sequences without triggers, should write

        w_E(i) W_F w_U(j)  proportional to  pi(i) (pi_b(j|i) - 1 / d_vocab),

    where pi is how often i comes, since before it all tokens seem about equally likely. A memory that knew only how
    often tokens come would write pi(i) (pi(j) - 1 / d_vocab).

    Then models are trained with and without W_F, with the loss on all tokens or on predictable ones alone. A table
    (token to logits) is as good a bigram memory as it correlates with log pi_b over pairs of different tokens, rows
    less their means; the induction head's values copy where each token's own logit is the largest.
    """
    steps = pd.DataFrame({"seed": seed, **_one_step(settings, seed)} for seed in settings.seeds)
    cases = [(*kind, seed) for kind in _KINDS for seed in settings.seeds]
    trained = pd.DataFrame(_trained(settings, *case, train) for case in tqdm(cases, disable=None, unit="model"))
    table = pd.concat([steps.assign(measured="one step"), trained.assign(measured="training")], ignore_index=True)
    findings = (_by_one_step(steps, settings), *_in_training(trained, settings))
    return Result(findings, table, _picture(steps, trained))


def _untrained(settings: Settings, has_W_F: bool, d_model: int, seed: int) -> BigramTransformer:
    """The model before its first step; W_F and what else is learned may change, all else is frozen."""
    language = BigramLanguage.dirichlet(settings.d_vocab, settings.concentration, seed=seed)
    init: dict[str, Any] = {"W_Q": "identity", "W_O": "identity", "W_K": "zeros", "blocks.1.attn.W_V": "zeros"}
    options: dict[str, Any] = {"mlp": None}
    if has_W_F:
        init |= {"blocks.1.mlp.W_in": "identity", _W_F: "zeros"}
        options = {"mlp": "linear", "d_mlp": d_model}
    size: dict[str, Any] = {"d_model": d_model, "n_ctx": settings.length, "device": "cpu"}
    model = trainable_transformer(language, "absolute", seed=seed, init=init, **options, **size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in (*_LEARNED, _W_F))
    return model


def _fed_forward(model: BigramTransformer) -> Float[Tensor, "token d_vocab"]:
    """The logits that W_F writes for each token."""
    mlp = model.blocks[1].mlp
    return (model.W_E @ mlp.W_in @ mlp.W_out @ model.W_U).detach().double()


def _one_step(settings: Settings, seed: int) -> dict[str, float]:
    """How well W_F's table, after one gradient step, is what it should be; and what frequencies alone would make it."""
    model = _untrained(settings, True, settings.step_d_model, seed)
    language, weight = model.language, model.get_parameter(_W_F)
    tokens = language.sample(settings.step_sequences, settings.length, (), n_triggers=0, seed=seed).tokens
    logits = PlainForward(model)(tokens[:, :-1])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), weight)
    with torch.no_grad():
        weight -= gradient
    written, frequency, uniform = _fed_forward(model), language.long_run, 1 / language.d_vocab
    known = written.argmax(-1) == language.pi_b.argmax(-1)
    return {
        "correlation": experiment.correlation(written, frequency[:, None] * (language.pi_b - uniform)),
        "by_frequency": experiment.correlation(written, frequency[:, None] * (frequency - uniform)),
        "likeliest_known": float(known.double().mean()),
    }


def _trained(settings: Settings, kind: str, loss: Any, seed: int, train: TrainModel) -> dict[str, Any]:
    """How good a bigram memory W_F and the induction head's values are after training; what these copy."""
    model = _untrained(settings, kind == _KINDS[0][0], settings.d_model, seed)
    config = TrainConfig(
        triggers=(),
        n_triggers=settings.n_triggers,
        length=settings.length,
        seed=seed,
        steps=settings.steps,
        loss=loss,
        optimizer="sgd",
        lr=settings.lr,
        final_lr=1.0,
        evaluate_every=settings.steps,
        eval_lengths=(1,),
    )
    run = train(model, model.language, config)
    (head,) = model.circuit.induction
    values = copy_scores(run.model, head).detach().double()
    return {
        "memory": kind,
        "loss": loss,
        "seed": seed,
        "bigrams_in_W_F": _bigrams_in(_fed_forward(run.model), model.language) if model.circuit.bigram else math.nan,
        "bigrams_in_values": _bigrams_in(values, model.language),
        "copied": float((values.argmax(-1) == torch.arange(len(values))).double().mean()),
        "in_context_accuracy": float(run.probe("in_context_accuracy").iloc[-1]),
    }


def _bigrams_in(table: Float[Tensor, "token d_vocab"], language: BigramLanguage) -> float:
    """How well a table correlates with log pi_b, over pairs of different tokens, rows less their means."""
    different = ~torch.eye(len(table), dtype=torch.bool)
    log_pi_b = language.pi_b.clamp_min(1e-9).log()  # a rare zero would outweigh all else
    tables = (x - x.mean(-1, keepdim=True) for x in (table, log_pi_b))
    return experiment.correlation(*(x[different] for x in tables))


def _by_one_step(steps: pd.DataFrame, settings: Settings) -> Finding:
    found = over_seeds(steps["correlation"])
    ahead = over_seeds(steps["correlation"] - steps["by_frequency"])
    return Finding.judged(
        f"one gradient step: {len(steps)} models, d_model {settings.step_d_model}, {settings.step_sequences} sequences",
        f"W_F's table correlates with pi(i) (pi_b(j|i) - 1 / d_vocab) at {ONE_STEP} or more, and better than with "
        "what the tokens' frequencies alone would write",
        f"{found:.3f}, better by {ahead:.3f}; it knows the likeliest next token of "
        f"{over_seeds(steps['likeliest_known']):.0%} of the tokens",
        found.at_least(ONE_STEP),
        ahead.above(0.0),
    )


def _in_training(trained: pd.DataFrame, settings: Settings) -> list[Finding]:
    by_kind = trained.set_index(["memory", "loss", "seed"])
    (here, everywhere), (_, predictable), (nowhere, _), _ = _KINDS

    def over(column: str, memory: str, loss: str) -> Estimate:
        return over_seeds(by_kind.loc[(memory, loss), column])

    def less(column: str) -> Estimate:
        """By how much it is less without W_F than with it, with the loss on all tokens."""
        return over_seeds(by_kind.loc[(here, everywhere), column] - by_kind.loc[(nowhere, everywhere), column])

    setting = f"{len(settings.seeds)} models, d_model {settings.d_model}, {settings.steps} steps"
    held, copied, taken = (
        over("bigrams_in_W_F", here, everywhere),
        over("copied", here, everywhere),
        less("bigrams_in_values"),
    )
    uncopied, accuracy = less("copied"), less("in_context_accuracy")
    own = [over("bigrams_in_values", memory, predictable) for memory in (here, nowhere)]
    kept = [over("copied", memory, predictable) for memory in (here, nowhere)]
    return [
        Finding.judged(
            f"loss on all tokens, with W_F: {setting}",
            f"W_F's table correlates with the bigrams at {HELD} or more, and the values copy {COPIES:.0%} of the "
            "tokens or more",
            f"{held:.2f}; {copied:.0%}",
            held.at_least(HELD),
            copied.at_least(COPIES),
        ),
        Finding.judged(
            f"loss on all tokens, without W_F: {setting}",
            "the induction head's values are a better bigram memory than they are beside W_F, and copy fewer tokens",
            f"they correlate with the bigrams at {over('bigrams_in_values', nowhere, everywhere):.2f}, "
            f"{-taken.mean:.2f} more than beside W_F; they copy {uncopied:.0%} fewer; in-context accuracy is lower by "
            f"{accuracy:.2f}",
            taken.below(0.0),
            uncopied.above(0.0),
        ),
        Finding.judged(
            f"loss on predictable tokens, with and without W_F: {setting}",
            f"the values hold no bigrams (they correlate at most at 0), and copy {COPIES:.0%} of the tokens or more",
            f"{own[0]:.2f} and {own[1]:.2f}; {kept[0]:.0%} and {kept[1]:.0%}",
            *(one.at_most(0.0) for one in own),
            *(one.at_least(COPIES) for one in kept),
        ),
    ]


def _picture(steps: pd.DataFrame, trained: pd.DataFrame) -> Picture:
    """What one step writes; and bigrams in either memory and what is copied, by kind; with 95% intervals."""
    picture = Picture(13.0, 4.8)
    left, right = picture.figure.subplots(1, 2, width_ratios=(1, 2.6))
    columns = {"correlation": "the bigrams", "by_frequency": "frequencies\nalone"}
    experiment.bars(
        left, [0.0, 1.0], [over_seeds(steps[column]) for column in columns], 0.6, color=[COLOURS["weights"], "#999999"]
    )
    left.axhline(ONE_STEP, color="black", linestyle="--", linewidth=1)
    left.set_title("one gradient step on W_F")
    left.set_ylabel("correlation of its table with ...")
    bars = {
        "bigrams_in_W_F": ("bigrams in W_F (correlation)", COLOURS["weights"]),
        "bigrams_in_values": ("bigrams in the induction head's values (correlation)", "#E69F00"),
        "copied": ("tokens that these values copy (fraction)", COLOURS["context"]),
        "in_context_accuracy": ("in-context accuracy", COLOURS["rest"]),
    }
    for number, (column, (label, colour)) in enumerate(bars.items()):
        found = [over_seeds(_of_kind(trained, kind)[column]) for kind in _KINDS]
        at = [place + 0.2 * (number - 1.5) for place in range(len(_KINDS))]
        experiment.bars(right, at, found, 0.19, color=colour, label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title("trained")
    picture.figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    experiment.finish((left, right), grid=False)
    left.set_xticks(range(len(columns)), list(columns.values()))
    right.set_xticks(range(len(_KINDS)), [f"{memory}\nloss: {loss}" for memory, loss in _KINDS])
    return picture


def _of_kind(trained: pd.DataFrame, kind: tuple[str, str]) -> pd.DataFrame:
    return trained[(trained["memory"] == kind[0]) & (trained["loss"] == kind[1])]
