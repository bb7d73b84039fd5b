"""Claim: of two continuations in one context, the logits follow the counts, and alternate with them."""

import math
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.circuit import Strengths
from hijack_lens.language.prompts import hijack_prompt
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import (
    FIRST_TRIGGER,
    GLOBAL,
    IN_CONTEXT,
    Finding,
    Make,
    Recipe,
    Result,
    Train,
    conflict_language,
    hijack_margins,
    neutral_then_pairs,
    over_seeds,
    trained,
)
from hijack_lens.show.style import COLOURS, Picture
from hijack_lens.training.forward import PlainForward

STATEMENT = (
    "Where two continuations compete in one context, the logits follow their counts, in whatever order; as they "
    "alternate, the winner alternates with the parity of the prompt, until the better-known one wins for good."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: two in-context continuations of one trigger"

TOLERANCE = 1e-9
"""Of margins, in logits; predicted margins smaller than this are ties, which rounding decides."""
SMALL = Recipe(0)
"""How the models are trained, but for the seed."""
FOLLOWED = 0.95
"""Fraction of the pairs that a trained model's margin must follow."""


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        strengths: of the hand-written models; the first is drawn.
        ahead: by how many nats the weights prefer g, for each model.
        lead: neutral tokens, or in trained models tokens of the language, before the pairs.
        pairs: of the trigger and its continuations, at most.
        n_orders: random orders of the continuations.
        recipe: of the trained models.
        seeds: of these, and of orders and prompts.
        n_prompts: per trained model.
        trained_pairs: at most, in their prompts.
    """

    strengths: tuple[Strengths, ...] = (
        Strengths(40.0, 6.0, 10.0, 1.0),
        Strengths(40.0, 2.0, 10.0, 1.0),
        Strengths(40.0, 6.0, 30.0, 2.0),
        Strengths(40.0, 40.0, 10.0, 1.0),
    )
    ahead: float = 0.7
    lead: int = 10
    pairs: int = 60
    n_orders: int = 200
    recipe: Recipe = SMALL
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_prompts: int = 100
    trained_pairs: int = 16


QUICK = Settings(pairs=40, n_orders=50, seeds=(0, 1, 2), n_prompts=50)


def competing_continuations(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """Two continuations of one trigger in one context: counts, and parity.

    Wang & Sato (arXiv 2412.11459). In hand-written float64 models with a sharp previous-token head, after N neutral
    tokens and k pairs of the trigger with c (n_c times) or g (n_g times), the margin of c over g is

        b3 e^b2 (n_c - n_g) / ((e^b2 + 1) k + N + 1)  -  g log(pi_b(g|q) / pi_b(c|q))

    (1) whatever the order, to `TOLERANCE`. (2) Where c and g alternate, c wins after an odd number of pairs, up to the
    last one at which the first term exceeds the second, and g all others: at every k, ties left out.

    (3) In trained models, every further pair moves the margin towards its continuation: at `FOLLOWED` of the pairs or
    more, by the 95% interval over seeds.
    """
    counted, alternating = [], []
    for strengths in tqdm(settings.strengths, disable=None, unit="model"):
        counts, turns = _ask_hand_written(strengths, settings, make)
        counted.append(counts)
        alternating.append(turns)
    counts, turns = pd.concat(counted), pd.concat(alternating)
    by_seed = []
    for seed in tqdm(settings.seeds, desc="trained models", disable=None, unit="seed"):
        margins = _ask_trained(train(replace(settings.recipe, seed=seed)).model, settings, seed)
        towards = 1 - 2 * (torch.arange(settings.trained_pairs) % 2)  # c comes first
        by_seed.append(float((margins.diff(dim=1) * towards > 0).double().mean()))

    worst = float(torch.tensor((counts["measured"] - counts["predicted"]).to_numpy()).abs().max())
    clear = turns[turns["predicted"].abs() > TOLERANCE]
    right = int((clear["predicted"] * clear["measured"] > 0).sum())
    followed = over_seeds(by_seed)
    models = f"{len(settings.strengths)} hand-written models"
    findings = (
        Finding(
            f"{models}, {settings.n_orders} random orders of up to {settings.pairs} pairs",
            f"the margin follows n_c - n_g, whatever the order, to {TOLERANCE:g} logits",
            f"largest error {worst:.1e}",
            worst <= TOLERANCE,
        ),
        Finding(
            f"{models}, c and g alternating, 0 to {settings.pairs} pairs",
            "c wins after odd numbers of pairs up to the predicted last one, g else; ties left out",
            f"{right} of {len(clear)} winners; {len(turns) - len(clear)} ties",
            0 < right == len(clear),
        ),
        Finding(
            f"{len(by_seed)} trained models, {settings.n_prompts} prompts each, 1 to {settings.trained_pairs} pairs",
            f"at least {FOLLOWED:.0%} of the pairs move the margin towards their continuation",
            f"{followed:.1%}",
            followed.low >= FOLLOWED,
        ),
    )
    table = pd.concat(
        [
            turns.assign(part="alternating"),
            pd.DataFrame({"part": "trained", "seed": list(settings.seeds), "measured": by_seed}),
        ],
        ignore_index=True,
    )
    return Result(findings, table, _picture(counted[0], alternating[0], settings))


def _predicted(
    strengths: Strengths, excess: Float[Tensor, "*row"], pairs: Float[Tensor, "*row"], settings: Settings
) -> Float[Tensor, "*row"]:
    """The margin, from n_c - n_g and k."""
    # e^b2 cancelled, lest it overflow.
    rest = math.exp(-strengths.match) * (pairs + settings.lead + 1)
    return strengths.copy * excess / (pairs + rest) - strengths.bigram * settings.ahead


def _ask_hand_written(strengths: Strengths, settings: Settings, make: Make) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A model's margins at every number of pairs: in random orders, and alternating."""
    generator = torch.Generator().manual_seed(settings.seeds[0])
    orders = torch.randint(2, (settings.n_orders, settings.pairs), generator=generator)
    follow = torch.cat([torch.arange(settings.pairs)[None] % 2, orders])  # 0 for c, which comes first, 1 for g
    tokens = torch.stack(
        [
            neutral_then_pairs(FIRST_TRIGGER, [(IN_CONTEXT, GLOBAL)[which] for which in row], lead=settings.lead)
            for row in follow.tolist()
        ]
    )
    model = make(conflict_language([settings.ahead]), strengths=strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
    # A causal model's margins on every shorter prompt are those at the longest one's positions.
    measured = hijack_margins(model, tokens)[:, settings.lead :: 2].cpu()
    pairs = torch.arange(settings.pairs + 1).double().expand_as(measured)
    excess = torch.nn.functional.pad(1 - 2 * follow, (1, 0)).cumsum(1).double()
    predicted = _predicted(strengths, excess, pairs, settings)
    alternating, random = (
        pd.DataFrame(
            {
                **vars(strengths),
                "pairs": pairs[rows].flatten().long(),
                "excess": excess[rows].flatten().long(),
                "predicted": predicted[rows].flatten(),
                "measured": measured[rows].flatten(),
            }
        )
        for rows in (slice(0, 1), slice(1, None))
    )
    return random, alternating


@torch.no_grad()
def _ask_trained(model: BigramTransformer, settings: Settings, seed: int) -> Float[Tensor, "prompt pairs"]:
    """Margins of c over g after 0, 1, 2, ... pairs, c and g alternating, for random triggers and continuations."""
    language, generator = model.language, torch.Generator().manual_seed(seed)
    triggers = language.trigger_ids(model.triggers)
    rows: list[Tensor] = []
    asked: list[tuple[int, int]] = []
    while len(rows) < settings.n_prompts:
        q = int(triggers[torch.randint(len(triggers), (), generator=generator)])
        c, g = torch.randint(language.d_vocab, (2,), generator=generator).tolist()
        if len({q, c, g}) == 3:
            lead = hijack_prompt(
                language, q, c, 0, settings.lead + 1, filler="avoid", global_candidate=g, seed=generator
            )
            pairs = [token for k in range(settings.trained_pairs) for token in ((c, g)[k % 2], q)]
            rows.append(torch.cat([lead.tokens, torch.tensor(pairs)]))
            asked.append((c, g))
    logits = PlainForward(model)(torch.stack(rows).to(model.W_E.device))[:, settings.lead :: 2].cpu()
    c, g = torch.tensor(asked).T[..., None, None].expand(-1, -1, logits.shape[1], 1)
    return (logits.gather(2, c) - logits.gather(2, g)).squeeze(-1)


def _picture(counts: pd.DataFrame, turns: pd.DataFrame, settings: Settings) -> Picture:
    """Margins of the first model: by counts, and by pairs, c and g alternating."""
    picture = Picture(13.0, 4.8)
    left, right = picture.figure.subplots(1, 2, width_ratios=[1, 1.6])
    last = counts[counts["pairs"] == settings.pairs].sort_values("excess")
    left.plot(last["excess"], last["predicted"], "k-", label="theory")
    left.plot(last["excess"], last["measured"], "o", color=COLOURS["context"], markersize=5, label="model")
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xlabel(f"count of c − count of g, in {settings.pairs} pairs")
    left.set_ylabel("logit c − logit g")
    left.set_title("in random orders: the counts alone", fontsize=11)
    colours = (COLOURS["context"], COLOURS["weights"])
    right.plot(turns["pairs"], turns["predicted"], "k-", linewidth=1, label="theory")
    for parity, colour in zip((1, 0), colours, strict=True):
        dots = turns[turns["pairs"] % 2 == parity]
        name = "odd (c came last)" if parity else "even (g came last)"
        right.plot(dots["pairs"], dots["measured"], "o", color=colour, markersize=5, label=f"model, {name}")
    right.axhline(0, color="black", linewidth=0.8)
    won = turns.loc[turns["measured"] > 0, "pairs"]
    if len(won) and won.max() < settings.pairs - 1:
        right.axvline(won.max() + 1, color="#999999", linestyle="--")
        right.annotate(
            "g wins for good", (won.max() + 1, turns["measured"].max()), xytext=(6, -4), textcoords="offset points"
        )
    right.set_xlabel("pairs: q c, q g, q c, ...")
    right.set_title("alternating: the parity, until the better-known one wins", fontsize=11)
    for ax in (left, right):
        ax.legend(frameon=False, loc="upper left" if ax is left else "upper right")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return picture
