"""Claim: three layers without positional encoding can run the induction mechanism; derived in docs/no_positions.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from hijack_lens.circuits import find_circuit
from hijack_lens.core.circuit import Strengths
from hijack_lens.hooks import ablate
from hijack_lens.hooks.intervention import record
from hijack_lens.language import BigramLanguage
from hijack_lens.models import BigramTransformer
from hijack_lens.models.associative import previous_token_scale, unpositioned_transformer, with_beginning_prepended
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training import behaviour

STATEMENT = "No positions: a transformer of three layers without positional encoding can run the induction mechanism."
SOURCE = "Wang & Sato, arXiv 2412.11459v2: three-layer transformer without positional encoding"

TOLERANCE = 1e-7  # logits by which formula and model may differ in float64: scores cancel to about reach^3 eps b1
LOST = 0.1  # the most in-context accuracy that the hand-written model may keep without one of its heads
SHARE = 0.5  # the least fraction of its in-context gain that a trained model must lose without either role's candidates

_ROLES = ("previous_token", "induction")
_RARE = 1e-6  # probability, in training sequences, of what their bigrams rule out


@dataclass(frozen=True)
class BegunRecipe(Recipe):
    """A `Recipe` for models without positions, whose sequences begin with a special token to count from.

    Elsewhere that token is rare, but it may be drawn as a trigger's continuation: in about every fifth sequence.
    """

    positions: Literal["relative", "absolute", "none"] = "none"
    d_vocab: int = 12
    triggers: int = 3
    n_layers: int = 3
    length: int = 32
    steps: int = 1000
    evaluate_every: int = 1000

    @property
    def plain(self) -> BigramLanguage:
        """The language of the sequences, without the token that begins them."""
        return super().language

    @property
    def language(self) -> BigramLanguage:
        """The language of the sequences."""
        return with_beginning(self.plain, _RARE)

    def untrained(self) -> BigramTransformer:
        """The model before its first step."""
        return with_beginning_prepended(super().untrained())


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    # Of the trained models, of three layers and of two; the hand-written one has its plain language and triggers.
    recipe: BegunRecipe = BegunRecipe(0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models
    reach: int = 64  # length up to which the hand-written previous-token head is as strong as it is meant to be
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the reach: lengths of its prompts
    repeats: int = 3  # of the evidence
    candidates: int = 4  # per trigger, tokens that follow it in context
    n_prompts: int = 4  # per trigger and candidate; a trained model is asked a hundred times as many sequences
    strengths: Strengths = Strengths()  # of the hand-written model
    floor: float = 1e-3  # least probability in its bigram memory


QUICK = Settings(
    recipe=BegunRecipe(0, steps=500, evaluate_every=500), seeds=(0, 1, 2), reach=32, multiples=(0.5, 1.0, 2.0, 4.0)
)


def with_beginning(language: BigramLanguage, floor: float) -> BigramLanguage:
    """The language with one more token, the last, which begins every text and occurs nowhere else."""
    size = language.d_vocab
    rows = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    rows[:size, :size], rows[size, :size] = language.pi_b, language.pi_u
    # No memory can hold log 0.
    pi_b = rows * (1 - (size + 1) * floor) + floor
    return BigramLanguage(pi_b, one_hot(torch.tensor(size), size + 1).double(), [*language.tokens, "<begin>"])


def previous_token_scores(length: int, scale: float) -> Float[Tensor, "query key"]:
    """-scale * (t - 1 - s)^2 / ((s + 1)(s + 2) t (t + 1)), positions from 1: largest, and 0, at s = t - 1."""
    key = torch.arange(1, length + 1, dtype=torch.float64)
    query = key[:, None]
    return -scale * (query - 1 - key) ** 2 / ((key + 1) * (key + 2) * query * (query + 1))


def unpositioned_logits(
    tokens: Int[Tensor, "prompt pos"],
    language: BigramLanguage,
    triggers: Sequence[int],
    strengths: Strengths,
    reach: int,
) -> Float[Tensor, "prompt pos d_vocab"]:
    """The logits of `unpositioned_transformer` by formula, without weights: `theory.logits`, for its positions."""
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = previous_token_scores(length, previous_token_scale(strengths.previous_token, reach))
    seen = one_hot(tokens, language.d_vocab).double()
    remembered = scores.masked_fill(future, -torch.inf).softmax(-1) @ seen
    matches = seen * torch.isin(tokens, language.trigger_ids(triggers))[..., None]
    attended = (strengths.match * matches @ remembered.mT).masked_fill(future, -torch.inf).softmax(-1)
    return strengths.copy * attended @ seen + strengths.bigram * language.finite_log_pi_b()[tokens]


def no_positions(
    settings: Settings = Settings(), make: Make = unpositioned_transformer, train: Train = trained
) -> Result:
    """Three layers without positional encoding can run the induction mechanism.

    Wang & Sato (arXiv 2412.11459v2). The hand-written model (docs/no_positions.md) has a first layer that tells
    positions apart by what share of the attention the first token gets, then a previous-token head, then the induction
    head. It is compared with its formula, and asked conflict prompts with and without its heads: without them on the
    longest prompts within the reach, since in shorter ones c is so frequent that counting tokens often gives it away.
    In-context accuracy is how often c is the likeliest token.

    Trained models have three layers or two, and sequences that begin with a special token, as the construction
    requires. `find_circuit` names their heads, and ablates them on prompts of its own by resampling; the in-context
    gain is what the order of the context's tokens is worth, in nats.
    """
    language = with_beginning(settings.recipe.plain, settings.floor)
    triggers, lengths = range(settings.recipe.triggers), [int(m * settings.reach) for m in settings.multiples]
    model = make(language, triggers, settings.strengths, reach=settings.reach, n_ctx=max(lengths))
    written = pd.DataFrame(_ask_hand_written(model, settings, length) for length in lengths)
    own = pd.DataFrame(
        _ask_trained(run.model, settings, seed)
        for recipe in (replace(settings.recipe, n_layers=n_layers) for n_layers in (3, 2))
        for seed, run in experiment.replicates(train, recipe, settings.seeds, f"{recipe.n_layers} layers")
    )
    findings = (*_by_construction(written, model, settings), *_in_training(own, settings))
    return Result(findings, pd.concat([written, own]), _picture(written, own, settings), _note(own))


def _accuracy(logits: Float[Tensor, "prompt pos d_vocab"], answers: Int[Tensor, "prompt"]) -> float:
    return float((logits[:, -1].argmax(-1) == answers).double().mean())


@torch.no_grad()
def _ask_hand_written(model: BigramTransformer, settings: Settings, length: int) -> dict[str, object]:
    """How often the model gives the context's answer, and how far its logits are from the formula's."""
    generator = torch.Generator().manual_seed(0)
    conflicts = experiment.conflicts_by_trigger(settings.recipe.plain, settings, length - 1, generator)
    plain = torch.cat([prompt.tokens for prompt in conflicts])
    tokens = torch.nn.functional.pad(plain, (1, 0), value=model.language.d_vocab - 1)
    candidates = torch.tensor([prompt.in_context for prompt in conflicts])
    answers = repeat(candidates, "batch -> (batch prompt)", prompt=settings.n_prompts)
    pattern = "blocks.1.attn.hook_pattern"
    logits, run = record(model, tokens, [pattern])
    triggers = range(settings.recipe.triggers)
    expected = unpositioned_logits(tokens, model.language, triggers, settings.strengths, settings.reach)
    row: dict[str, object] = {
        "model": "hand-written",
        "n_layers": 3,
        "length": length,
        "formula_error": float((logits - expected).abs().max()),
        "in_context_accuracy": _accuracy(logits, answers),
        "previous_token_attention": float(run[pattern][:, 0, -1, -2].mean()),
    }
    for role in _ROLES:
        with ablate(model, getattr(model.circuit, role)):
            row[f"accuracy_without_{role}"] = _accuracy(model(tokens), answers)
    return row


def _ask_trained(model: BigramTransformer, settings: Settings, seed: int) -> dict[str, object]:
    """The model's in-context accuracy, and its circuit with what the circuit is worth."""
    recipe = settings.recipe
    n, triggers = 100 * settings.n_prompts, range(recipe.triggers)
    # Sequences that the run has not seen: those of training are drawn from other seeds.
    sequences = model.language.sample(n, recipe.length, triggers, seed=1_000_000 + seed)
    circuit = find_circuit(model)
    evidence, last = circuit.evidence, model.cfg.n_layers - 1
    row: dict[str, object] = {
        "model": "trained",
        "n_layers": model.cfg.n_layers,
        "seed": seed,
        "length": recipe.length,
        "in_context_accuracy": behaviour(model, sequences)["in_context_accuracy"],
        # The induction head is the last layer's, and reads what a previous-token head below it has written.
        "previous_token_heads": sum(head.layer < last for head in circuit.previous_token),
        "induction_heads": sum(head.layer == last for head in circuit.induction),
        "previous_token_attention": float(evidence.previous_token.score[:last].max()),
        "induction_attention": float(evidence.induction.score[last].max()),
    }
    for role in _ROLES:
        lost = getattr(evidence, role).lost_together
        # Without candidates for the role, or without a gain, there is nothing to lose.
        row[f"gain_lost_without_{role}"] = 0.0 if math.isnan(lost) or evidence.gain <= 0 else lost / evidence.gain
    return row


def _by_construction(table: pd.DataFrame, model: BigramTransformer, settings: Settings) -> list[Finding]:
    within = table[table["length"] <= settings.reach]
    found = find_circuit(model)
    setting = "hand-written, three layers, float64, prompts of"
    longest = within.sort_values("length").iloc[-1]
    without = longest[["accuracy_without_previous_token", "accuracy_without_induction"]]
    return [
        Finding(
            f"{setting} {table['length'].min()} to {table['length'].max()} tokens, reach {settings.reach}",
            f"logits are the formula's to {TOLERANCE:g}; in-context accuracy is 1 up to the reach",
            f"largest error {table['formula_error'].max():.1e}; accuracy {within['in_context_accuracy'].min():.2f}",
            bool((table["formula_error"] <= TOLERANCE).all() and (within["in_context_accuracy"] == 1).all()),
        ),
        Finding(
            f"{setting} {longest['length']} tokens",
            f"find_circuit names L1H0, L2H0 and L2MLP; without either head in-context accuracy is at most {LOST:g}",
            f"{found}; accuracy {without.iloc[0]:.2f} without L1H0, {without.iloc[1]:.2f} without L2H0",
            bool(found == model.circuit and (without <= LOST).all()),
        ),
    ]


def _in_training(table: pd.DataFrame, settings: Settings) -> list[Finding]:
    three, two = (table[table["n_layers"] == n] for n in (3, 2))
    setting = f"{len(three)} trained models, no positions; {settings.recipe.steps} steps on sequences of "
    setting += f"{settings.recipe.length} tokens, the first of which begins them"
    found, measured = pd.Series(True, three.index), []
    for role in _ROLES:
        named, lost = three[f"{role}_heads"] > 0, three[f"gain_lost_without_{role}"]
        found &= named & (lost >= SHARE)
        measured.append(
            f"{role.replace('_', '-')} heads in {named.sum()} of {len(three)} (attention "
            f"{over_seeds(three[f'{role}_attention']):.2f}), without which {over_seeds(lost):.1%} is lost, at least "
            f"{lost.min():.1%}"
        )
    return [
        Finding(
            f"three layers: {setting}",
            "find_circuit names a previous-token head and, in the last layer, an induction head; without either, "
            f"{SHARE:.0%} or more of the in-context gain is lost; in every seed",
            "; ".join(measured),
            bool(found.all()),
        ),
        Finding(
            f"two layers: {setting}",
            "find_circuit names an induction head, but no previous-token head below; in every seed",
            f"an induction head in {(two['induction_heads'] > 0).sum()} of {len(two)}, a previous-token head in "
            f"{(two['previous_token_heads'] > 0).sum()}; best attention to the position before "
            f"{over_seeds(two['previous_token_attention']):.2f}",
            bool(((two["induction_heads"] > 0) & (two["previous_token_heads"] == 0)).all()),
        ),
    ]


def _note(table: pd.DataFrame) -> str:
    accuracy = {n: f"{over_seeds(part['in_context_accuracy']):.2f}" for n, part in table.groupby("n_layers")}
    return (
        f"In-context accuracy of trained models: three layers {accuracy[3]}, two layers {accuracy[2]}. What an "
        "induction head can follow without a previous-token head is how often the trigger has occurred so far, a "
        "frequency that is highest just after it (docs/no_positions.md)."
    )


def _picture(written: pd.DataFrame, own: pd.DataFrame, settings: Settings) -> Picture:
    """The hand-written head's attention by length, over the formula; how much of the circuit trained models have."""
    picture = Picture(14.0, 4.6)
    left, right = picture.figure.subplots(1, 2, width_ratios=[1, 1.5])
    blue, orange, grey = COLOURS["context"], COLOURS["weights"], COLOURS["rest"]

    scale = previous_token_scale(settings.strengths.previous_token, settings.reach)
    lengths = range(2, int(written["length"].max()) + 1)
    curve = [float(previous_token_scores(n, scale)[-1].softmax(-1)[-2]) for n in lengths]
    left.plot(lengths, curve, color=blue, label="attention to the position before, formula")
    left.plot(written["length"], written["previous_token_attention"], "o", color=blue, markersize=8, label="measured")
    left.plot(written["length"], written["in_context_accuracy"], "s--", color=orange, label="in-context accuracy")
    left.axvline(settings.reach, color="black", linestyle=":", linewidth=1)
    left.annotate("reach", (settings.reach, 0.02), xytext=(4, 0), textcoords="offset points")
    left.set(xlabel="length of the prompt (tokens)", ylabel="attention, or accuracy", ylim=(-0.03, 1.06))
    left.set_title("hand-written, three layers")
    left.legend(loc="lower left", bbox_to_anchor=(0.0, 0.08), framealpha=1, edgecolor="none")

    bars = {
        "attention to\nthe position before": "previous_token_attention",
        "gain lost without\nprevious-token heads": "gain_lost_without_previous_token",
        "attention to what\nfollowed the token before": "induction_attention",
        "gain lost without\ninduction heads": "gain_lost_without_induction",
    }
    for n_layers, colour, shift in ((3, blue, -0.19), (2, grey, 0.19)):
        part = own[own["n_layers"] == n_layers]
        at = [place + shift for place in range(len(bars))]
        found = [over_seeds(part[column]) for column in bars.values()]
        experiment.bars(right, at, found, 0.36, color=colour, alpha=0.75, label=f"{n_layers} layers")
        for place, column in zip(at, bars.values(), strict=True):
            right.plot([place] * len(part), part[column], "o", color="black", markersize=3)
    right.hlines([SHARE] * 2, [0.6, 2.6], [1.4, 3.4], "black", "--", linewidth=1, label="three layers lose at least")
    right.set(title="trained: best head of each role, a dot per seed", axisbelow=True)
    right.set_ylabel("attention, or fraction of the in-context gain")
    right.set_ylim(top=1.2)
    right.legend(frameon=False, loc="upper left", ncols=3)
    left.set_axisbelow(True)
    experiment.finish((left, right))
    right.set_xticks(range(len(bars)), list(bars), fontsize=9)
    return picture
