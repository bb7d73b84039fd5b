"""Claim: of two continuations in one context, the logits follow the counts, and alternate with them."""

import math
from dataclasses import dataclass

import pandas as pd
import torch
from einops import repeat
from tqdm.auto import tqdm

from hijack_lens.core.circuit import Strengths
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import GLOBAL, IN_CONTEXT, Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "Where two continuations compete in one context, the logits follow their counts, in whatever order; as they "
    "alternate, the winner alternates with the parity of the prompt, until the better-known one wins for good."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: two in-context continuations of one trigger"

TOLERANCE = 1e-9  # of margins, in logits; predicted margins smaller than this are ties, which rounding decides
KINDS = (Recipe(0), Recipe(0, which="random"))  # of the trained models, apart from the seed
FOLLOWED = 0.95  # fraction of the pairs that a trained model's margin must follow
CORRELATION = 0.9  # over prompts and pairs, of what each pair adds to the margin by theory and in the trained model


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    strengths: tuple[Strengths, ...] = (  # of the hand-written models; the first is plotted
        Strengths(40.0, 6.0, 10.0, 1.0),
        Strengths(40.0, 2.0, 10.0, 1.0),
        Strengths(40.0, 6.0, 30.0, 2.0),
        Strengths(40.0, 40.0, 10.0, 1.0),
    )
    ahead: float = 0.7  # how many nats the weights prefer g by
    lead: int = 10  # tokens before the pairs: neutral ones, or for trained models the language's own
    pairs: int = 60  # of the trigger and a continuation, at most
    n_orders: int = 200  # random orders of the continuations
    recipes: tuple[Recipe, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models, of orders and of prompts
    n_prompts: int = 100  # per trained model
    trained_pairs: int = 16  # in each of their prompts


QUICK = Settings(
    pairs=40,
    n_orders=50,
    recipes=tuple(map(experiment.quicker, KINDS)),
    seeds=(0, 1, 2),
    n_prompts=50,
)


def competing_continuations(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """Two continuations of one trigger in one context: how the counts and their parity decide.

    Wang & Sato (arXiv 2412.11459). In hand-written float64 models with a sharp previous-token head, after N neutral
    tokens and k pairs of the trigger with c (n_c times) or g (n_g times), the margin of c over g is

        b3 e^b2 (n_c - n_g) / ((e^b2 + 1) k + N + 1)  -  g log(pi_b(g|q) / pi_b(c|q))

    whatever the order. So where c and g alternate, c wins after an odd number of pairs, up to the last one at which the
    first term exceeds the second, and g wins after all other numbers.

    In trained models, each further pair should move the margin towards its continuation, by as much as theory says at
    the tables that `read_tables` reads off the weights.
    """
    by_model = [_ask_hand_written(one, settings, make) for one in tqdm(settings.strengths, disable=None, unit="model")]
    counts, turns = (pd.concat(tables) for tables in zip(*by_model, strict=True))
    own = pd.DataFrame(
        {"triggers": recipe.which, "seed": seed, **_followed(run.model, settings, seed)}
        for recipe in settings.recipes
        for seed, run in experiment.replicates(train, recipe, settings.seeds, f"{recipe.which} triggers")
    )

    worst = (counts["measured"] - counts["predicted"]).abs().max(skipna=False)
    right, clear = experiment.winners_named(turns, TOLERANCE)
    models = f"{len(settings.strengths)} hand-written models"
    findings = (
        Finding(
            f"{models}, {settings.n_orders} random orders of up to {settings.pairs} pairs",
            f"the margin follows n_c - n_g, whatever the order, to {TOLERANCE:g} logits",
            f"largest error {worst:.1e}",
            bool(worst <= TOLERANCE),
        ),
        Finding(
            f"{models}, c and g alternating, 0 to {settings.pairs} pairs",
            "c wins after odd numbers of pairs up to the predicted last one, g else; ties left out",
            f"{right} of {clear} winners; {len(turns) - clear} ties",
            0 < right == clear,
        ),
        *(_in_training(which, part, settings) for which, part in own.groupby("triggers", sort=False)),
    )
    table = pd.concat([turns.assign(part="alternating"), own.assign(part="trained")], ignore_index=True)
    return Result(findings, table, _picture(*by_model[0], settings))


def _ask_hand_written(strengths: Strengths, settings: Settings, make: Make) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A model's margins at every number of pairs, in random orders and alternating."""
    generator = torch.Generator().manual_seed(settings.seeds[0])
    orders = torch.randint(2, (settings.n_orders, settings.pairs), generator=generator)
    is_global = torch.cat([torch.arange(settings.pairs)[None] % 2, orders])  # alternating, c comes first
    continuations = torch.where(is_global == 1, GLOBAL, IN_CONTEXT).tolist()
    measured = experiment.margins_by_pairs(make, strengths, settings.ahead, continuations, settings.lead)
    pairs = torch.arange(settings.pairs + 1).expand_as(measured)
    excess = torch.nn.functional.pad(1 - 2 * is_global, (1, 0)).cumsum(1)
    rest = math.exp(-strengths.match) * (pairs.double() + settings.lead + 1)  # e^b2 cancelled, lest it overflow
    predicted = strengths.copy * excess.double() / (pairs + rest) - strengths.bigram * settings.ahead
    columns = {"pairs": pairs, "excess": excess, "predicted": predicted, "measured": measured}
    random, alternating = (
        pd.DataFrame({**vars(strengths), **{name: values[rows].flatten() for name, values in columns.items()}})
        for rows in (slice(1, None), slice(0, 1))
    )
    return random, alternating


def _followed(model: BigramTransformer, settings: Settings, seed: int) -> dict[str, float]:
    """How often a pair moves a trained model's margin its way, as c and g alternate; and how well theory knows it."""
    lead, asked = experiment.random_conflicts(model, settings.n_prompts, settings.lead + 1, seed, draw_global=True)
    n = settings.trained_pairs
    turns = repeat(asked[:, [1, 0, 2, 0]], "prompt cqgq -> prompt (n cqgq)", n=n)[:, : 2 * n]
    measured, predicted = (
        margins[:, settings.lead :: 2].diff(dim=1)
        for margins in experiment.both_margins(model, torch.cat([lead, turns], 1), asked)
    )
    towards = 1 - 2 * (torch.arange(n) % 2)
    return {
        "followed": float((measured * towards > 0).double().mean()),
        "correlation": experiment.correlation(predicted, measured),
    }


def _in_training(which: str, part: pd.DataFrame, settings: Settings) -> Finding:
    followed, correlation = over_seeds(part["followed"]), over_seeds(part["correlation"])
    return Finding.judged(
        f"{len(part)} trained models, {which} triggers; {settings.n_prompts} prompts each, 1 to "
        f"{settings.trained_pairs} pairs",
        f"at least {FOLLOWED:.0%} of the pairs move the margin towards their continuation, and theory's steps "
        f"correlate with the model's at {CORRELATION:g} or more",
        f"{followed:.1%}; {correlation:.3f}",
        followed.at_least(FOLLOWED),
        correlation.at_least(CORRELATION),
    )


def _picture(counts: pd.DataFrame, turns: pd.DataFrame, settings: Settings) -> Picture:
    """Margins of the first model: by counts, and by number of pairs as c and g alternate."""
    picture = Picture(13.0, 4.8)
    left, right = picture.figure.subplots(1, 2, width_ratios=[1, 1.6])
    last = counts[counts["pairs"] == settings.pairs].sort_values("excess")
    left.plot(last["excess"], last["predicted"], "k-", label="theory")
    left.plot(last["excess"], last["measured"], "o", color=COLOURS["context"], markersize=5, label="model")
    left.set(xlabel=f"count of c − count of g, in {settings.pairs} pairs", ylabel="logit c − logit g")
    left.set_title("in random orders: the counts alone")
    right.plot(turns["pairs"], turns["predicted"], "k-", linewidth=1, label="theory")
    kinds = {"odd (c came last)": (1, COLOURS["context"]), "even (g came last)": (0, COLOURS["weights"])}
    for name, (parity, colour) in kinds.items():
        dots = turns[turns["pairs"] % 2 == parity]
        right.plot(dots["pairs"], dots["measured"], "o", color=colour, markersize=5, label=f"model, {name}")
    for ax in (left, right):
        ax.axhline(0, color="black", linewidth=0.8)
    won = turns.loc[turns["measured"] > 0, "pairs"]
    if len(won) and won.max() < settings.pairs - 1:
        right.axvline(won.max() + 1, color="#999999", linestyle="--")
        right.annotate(
            "g wins for good", (won.max() + 1, turns["measured"].max()), xytext=(6, -4), textcoords="offset points"
        )
    right.set_xlabel("pairs: q c, q g, q c, ...")
    right.set_title("alternating: the parity, until the better-known one wins")
    for ax, place in ((left, "upper left"), (right, "upper right")):
        ax.legend(frameon=False, loc=place)
    experiment.finish((left, right), title=11)
    return picture
