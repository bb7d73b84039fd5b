"""What experiments share: small trained models, prompts that set memories against each other, and plots."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.language import BigramLanguage, HijackPrompt, hijack_prompt, shortcut_accuracy
from hijack_lens.models import BigramTransformer, trainable_transformer
from hijack_lens.reproduction.findings import Estimate
from hijack_lens.show.style import frameless
from hijack_lens.training import TrainConfig, TrainingRun, read_tables, train
from hijack_lens.training.forward import PlainForward


def winners_named(answers: pd.DataFrame, tie: float) -> tuple[int, int]:
    """How many of the winners by "measured" margins the "predicted" ones name, and how many there are; without ties."""
    clear = answers[answers["predicted"].abs() > tie]
    return int((clear["predicted"] * clear["measured"] > 0).sum()), len(clear)


Make = Callable[..., BigramTransformer]
"""Makes an experiment's hand-written models: `associative_transformer`, or, in a test, something else."""

IN_CONTEXT, GLOBAL, NEUTRAL, FIRST_TRIGGER = range(4)
"""c, g, a token that is neither, and the first of the triggers q, in a `conflict_language`."""


def conflict_language(log_ratios: Sequence[float]) -> BigramLanguage:
    """A language in which trigger i has log(pi_b(g|q_i) / pi_b(c|q_i)) = log_ratios[i], and all else is uniform.

    The tokens are "c", "g", "x" (the neutral one), and the triggers "q0", "q1", ...
    """
    size = FIRST_TRIGGER + len(log_ratios)
    log_pi_b = torch.zeros(size, size, dtype=torch.float64)
    ratios = torch.tensor(list(log_ratios), dtype=torch.float64)
    log_pi_b[FIRST_TRIGGER:, GLOBAL], log_pi_b[FIRST_TRIGGER:, IN_CONTEXT] = ratios / 2, -ratios / 2
    names = ["c", "g", "x", *(f"q{i}" for i in range(len(log_ratios)))]
    return BigramLanguage(log_pi_b.softmax(-1), torch.full((size,), 1 / size), names)


def neutral_then_pairs(
    trigger: int, continuations: Sequence[int], *, length: int | None = None, lead: int | None = None
) -> Int[Tensor, "pos"]:
    """Neutral tokens (`lead`, or as many as fill the `length`), the trigger with each continuation, and the trigger."""
    pairs = [token for continuation in continuations for token in (trigger, continuation)]
    neutral = lead if lead is not None else (length or 0) - len(pairs) - 1
    if neutral < 0:
        raise ValueError(f"length must be at least {len(pairs) + 1} for {len(continuations)} pairs, got {length}")
    return torch.tensor([NEUTRAL] * neutral + pairs + [trigger])


@torch.no_grad()
def hijack_margins(model: BigramTransformer, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos"]:
    """logit[c] - logit[g] of a model of `conflict_language`, at every position."""
    logits = model(tokens).cpu()
    return logits[..., IN_CONTEXT] - logits[..., GLOBAL]


def margins_by_pairs(
    make: Make, strengths: Strengths, ahead: float, continuations: Sequence[Sequence[int]], lead: int
) -> Float[Tensor, "prompt pairs"]:
    """A hand-written float64 model's margin of c over g after 0, 1, 2, ... pairs of the trigger and a continuation.

    Each prompt has `lead` neutral tokens, then its continuations, all c or g; the weights prefer g by `ahead` nats.
    """
    tokens = torch.stack([neutral_then_pairs(FIRST_TRIGGER, row, lead=lead) for row in continuations])
    model = make(conflict_language([ahead]), strengths=strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
    # A causal model's margins on every shorter prompt are those at the longest one's positions.
    return hijack_margins(model, tokens)[:, lead::2]


RecipeT = TypeVar("RecipeT", bound="Recipe")

COUNTED_LR = 3e-3
"""Peak rate where it is asked how soon memories are learned: then sequences are natural from the start, not boosted."""


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained on a random bigram language with triggers; each seed is a replicate of all of it.

    Examples:
        >>> recipe = hl.reproduction.Recipe(seed=0, d_vocab=12, triggers=3)
        >>> recipe.fixed_triggers, recipe.config.length
        (range(0, 3), 48)
        >>> recipe.language.d_vocab, recipe.untrained().cfg.n_layers
        (12, 2)
    """

    seed: int  # of the language, the weights and the sequences
    positions: Literal["relative", "absolute", "none"] = "relative"
    d_vocab: int = 24  # tokens in the language
    concentration: float = 0.3  # of the Dirichlet distribution that its rows are drawn from; less is sharper
    triggers: int = 5  # how many
    which: Literal["frequent", "rare", "random"] = "frequent"  # the same in all sequences, or drawn for each
    continuations: Literal["uniform", "bigram"] = "uniform"  # of the triggers; "bigram": from the language's rows
    d_model: int = 64
    n_layers: int = 2
    length: int = 48  # tokens per sequence
    steps: int | Literal["until formed"] = "until formed"
    finish_steps: int = 150  # after the circuit has formed
    lr: float = 6e-3  # the peak rate of these, or of counted steps
    tokens_per_step: int = 4096  # where steps are not counted
    evaluate_every: int = 20  # steps between probes

    @property
    def language(self) -> BigramLanguage:
        """The language of the sequences; the most frequent tokens come first."""
        language = BigramLanguage.dirichlet(self.d_vocab, self.concentration, seed=self.seed)
        order = language.long_run.argsort(descending=True, stable=True)
        return BigramLanguage(language.pi_b[order][:, order], language.pi_u[order])

    @property
    def fixed_triggers(self) -> range:
        """The triggers that are the same in all sequences; none if they are drawn for each."""
        ids = range(self.d_vocab)  # the most frequent first
        return {"frequent": ids[: self.triggers], "rare": ids[-self.triggers :], "random": ids[:0]}[self.which]

    @property
    def config(self) -> TrainConfig:
        """The configuration for `hijack_lens.train`."""
        return TrainConfig(
            triggers=tuple(self.fixed_triggers),
            n_triggers=None if self.fixed_triggers else self.triggers,
            continuations=self.continuations,
            length=self.length,
            seed=self.seed,
            steps=self.steps,
            lr=self.lr,
            finish_steps=self.finish_steps,
            tokens_per_step=self.tokens_per_step,
            evaluate_every=self.evaluate_every,
            eval_lengths=(1,),
        )

    def untrained(self) -> BigramTransformer:
        """The model before its first step, able to read prompts of four times the training length."""
        return trainable_transformer(
            self.language,
            self.positions,
            d_model=self.d_model,
            n_layers=self.n_layers,
            seed=self.seed,
            n_ctx=4 * self.length,
            device="cpu",
        )


def quicker(recipe: RecipeT) -> RecipeT:
    """The recipe with fewer steps and fewer tokens in each, for a first look."""
    return replace(recipe, finish_steps=60, tokens_per_step=2048)


RANDOM_TRIGGERS = Recipe(0, which="random", triggers=4, d_vocab=16, length=32)
"""With this recipe, either memory may win after any token."""

TrainModel = Callable[[BigramTransformer, BigramLanguage, TrainConfig], TrainingRun]
"""Trains a model that an experiment has made: `hijack_lens.train`, or, in a test, something else."""

Train = Callable[[Recipe], TrainingRun]
"""Trains an experiment's models: `trained`, or, in a test, something that violates the claim."""


@functools.lru_cache(maxsize=64)
def trained(recipe: Recipe) -> TrainingRun:
    """The recipe's run; the same object for the same recipe, to be treated as read-only.

    Examples:
        >>> recipe = hl.reproduction.Recipe(seed=0, d_vocab=8, triggers=2, d_model=16, length=16, steps=2)
        >>> hl.reproduction.trained(recipe).finished
        True
    """
    return train(recipe.untrained(), recipe.language, recipe.config)


def replicates(
    train: Train, recipe: Recipe, seeds: Sequence[int], desc: str | None = None
) -> Iterator[tuple[int, TrainingRun]]:
    """Each seed and its run of the recipe, with a progress bar."""
    for seed in tqdm(seeds, desc=desc, disable=None, unit="seed"):
        yield seed, train(replace(recipe, seed=seed))


def without_order(recipe: Recipe) -> float:
    """In-context accuracy without a circuit, on sequences like the recipe's: of guessing what has come up too often."""
    config = recipe.config
    sequences = recipe.language.sample(
        256,
        config.length,
        config.triggers,
        n_triggers=config.n_triggers,
        continuations=config.continuations,
        seed=1_000_000 + recipe.seed,
    )
    return shortcut_accuracy(recipe.language, sequences)


def conflicts_by_trigger(
    language: BigramLanguage, settings: Any, length: int, generator: torch.Generator
) -> list[HijackPrompt]:
    """A batch of prompts for each trigger (the first tokens) and each of several random in-context candidates.

    Neither candidate occurs outside the evidence. The settings say how many `recipe.triggers` and `candidates` there
    are, how many prompts (`n_prompts`) for each pair of them, and how often the evidence `repeats`.
    """
    prompts = []
    for q in range(settings.recipe.triggers):
        g = language.global_candidate(q)
        order = torch.randperm(language.d_vocab, generator=generator).tolist()
        for c in [token for token in order if token not in (q, g)][: settings.candidates]:
            options: dict[str, Any] = {"filler": "avoid", "n_prompts": settings.n_prompts, "seed": generator}
            prompts.append(hijack_prompt(language, q, c, settings.repeats, length, **options))
    return prompts


def random_conflicts(
    model: BigramTransformer, n_prompts: int, length: int, seed: int, *, draw_global: bool = False
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt 3"]]:
    """Prompts without evidence, which end with a trigger's first occurrence; and q, c and g of each, drawn at random.

    By default g is what the weights say; with `draw_global` it is drawn as well. Neither c nor g is in the prompt.
    """
    language, generator = model.language, torch.Generator().manual_seed(seed)
    triggers = language.trigger_ids(model.triggers)

    def drawn(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    prompts, asked = list[Tensor](), list[tuple[int, int, int]]()
    while len(prompts) < n_prompts:
        q, c = int(triggers[drawn(len(triggers))]), drawn(language.d_vocab)
        g = drawn(language.d_vocab) if draw_global else language.global_candidate(q)
        if len({q, c, g}) == 3:
            prompts.append(
                hijack_prompt(language, q, c, 0, length, filler="avoid", global_candidate=g, seed=generator).tokens
            )
            asked.append((q, c, g))
    return torch.stack(prompts), torch.tensor(asked)


PAST_THE_CIRCUIT = "remembered"
"""The one table that belongs to neither memory: what the previous-token head writes at the query itself."""


def theory_of(model: BigramTransformer) -> theory.Tables:
    """Theory for a trained model: the memories' tables, as they are read off its weights."""
    return read_tables(model).without(PAST_THE_CIRCUIT)


def predicted_margins(prompts: Sequence[HijackPrompt], tables: theory.Tables) -> Float[Tensor, "prompt"]:
    """Theory's margin of c over g at the end of each prompt."""
    logits = tables.written(torch.stack([prompt.tokens for prompt in prompts]), last=True).total[:, -1]
    pairs = torch.tensor([(prompt.in_context, prompt.global_candidate) for prompt in prompts])
    of_c, of_g = logits.gather(1, pairs).T
    return of_c - of_g


@torch.no_grad()
def margins_of(
    model: BigramTransformer, tokens: Int[Tensor, "prompt pos"], asked: Int[Tensor, "prompt 3"]
) -> Float[Tensor, "prompt pos"]:
    """A trained model's logit[c] - logit[g] at every position, with q, c and g of each prompt."""
    return _c_over_g(PlainForward(model)(tokens.to(model.W_E.device)).cpu(), asked)


def _c_over_g(
    logits: Float[Tensor, "prompt pos d_vocab"], asked: Int[Tensor, "prompt 3"]
) -> Float[Tensor, "prompt pos"]:
    prompt, (_, c, g) = torch.arange(len(logits)), asked.T
    return logits[prompt, :, c] - logits[prompt, :, g]


def both_margins(
    model: BigramTransformer, tokens: Int[Tensor, "prompt pos"], asked: Int[Tensor, "prompt 3"]
) -> tuple[Float[Tensor, "prompt pos"], Float[Tensor, "prompt pos"]]:
    """A trained model's margins of c over g at every position, and theory's."""
    return margins_of(model, tokens, asked).double(), _c_over_g(theory_of(model).written(tokens).total, asked)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 0 where either is the same throughout."""
    found = float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1])
    return 0.0 if math.isnan(found) else found


def finish(axes: Iterable[Any], *, grid: bool = True, title: int = 12, label: int = 10, tick: int = 10) -> None:
    """Removes the upper and right sides of the frames, draws a faint grid, and sets the text sizes in points."""
    for ax in axes:
        frameless(ax)
        ax.title.set_fontsize(title)
        ax.xaxis.label.set_fontsize(label)
        ax.yaxis.label.set_fontsize(label)
        ax.tick_params(labelsize=tick)
        if grid:
            ax.grid(alpha=0.3)


def bars(ax: Any, at: Sequence[float], found: Sequence[Estimate], width: float, **options: Any) -> None:
    """Bars with their 95% intervals, where there are any."""
    reach = [0.0 if math.isnan(one.reach) else one.reach for one in found]
    ax.bar(at, [one.mean for one in found], width, yerr=reach, capsize=3, **options)


def draw_by_seed(ax: Any, table: pd.DataFrame, x: str, y: str, thin: dict[str, Any], **thick: Any) -> None:
    """A line for each seed, with the options `thin` as well, and a line for their mean."""
    for _, one in table.groupby("seed"):
        ax.plot(one[x], one[y], **{**thick, "label": None, "marker": None, **thin})
    mean = table.groupby(x)[y].mean()
    ax.plot(mean.index, mean, **thick)
