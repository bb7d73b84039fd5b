"""Claim: a previous-token head of finite strength leaves a window of repeats, and favours the front of the prompt."""

from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.language.prompts import hijack_prompt
from hijack_lens.models.associative import associative_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.reproduction.experiment import (
    FIRST_TRIGGER,
    GLOBAL,
    IN_CONTEXT,
    NEUTRAL,
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
    "A previous-token head of finite strength blurs as the context grows: a hijack that repeats have won is lost again "
    "as they pile up, and a bigram hijacks from the front of a longer prompt than from its end."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: logits at finite strengths; window and primacy follow from `theory`"

TIE = 1e-9
"""Predicted margins closer to 0, in logits, are ties: rounding decides them."""
LONG = Recipe(0, steps=400, evaluate_every=400)
"""How the models of the full run are trained, but for the seed."""
LEAST = 0.05
"""Of an effect in trained models: as a fraction of the context's pull at its peak, or of the hijacks won."""
FARTHER = 2.0
"""How many times as long the longest prompt hijacked from the front must be."""


@dataclass(frozen=True)
class Settings:
    """What is measured at.

    Attributes:
        focuses: b1 of the hand-written models.
        match, copy: their b2 and b3.
        ahead: by how many logits the weights prefer g.
        lead: tokens before the repeats, also in trained models.
        max_repeats: in hand-written models.
        primacy_focus: b1 where front and end are compared.
        primacy_lengths: of the prompts there.
        recipe: of the trained models, which read prompts of four times their training length.
        seeds: of these, and of their prompts.
        n_prompts: per trained model.
    """

    focuses: tuple[float, ...] = (1.0, 2.0, 3.0, 20.0)
    match: float = 6.0
    copy: float = 5.0
    ahead: float = 3.0
    lead: int = 10
    max_repeats: int = 500
    primacy_focus: float = 3.0
    primacy_lengths: tuple[int, ...] = tuple(range(4, 201, 4))
    recipe: Recipe = LONG
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_prompts: int = 200


QUICK = Settings(recipe=Recipe(0), seeds=(0, 1, 2), n_prompts=60)


def flip_window(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """What a previous-token head of finite strength b1 does to hijacks, and whether trained models show it.

    Logits at finite strengths (Wang & Sato, arXiv 2412.11459). In hand-written float64 models:

    (1) after neutral tokens, the context wins with just the numbers of repeats that `theory.phase_boundary` says;
    (2) in at least one model it wins, and then loses for good as the repeats go on; (3) a single bigram wins from the
    front of a prompt, and from its end, at just the lengths that `theory.margin` says, and the longest prompt it
    wins from the front is at least `FARTHER` times the longest that it wins from the end.

    In trained models, at up to four times the training length, by the 95% interval over seeds these are `LEAST` or
    more: (4) how far the context's pull falls from its peak to the most repeats, the peak chosen on one half of the
    prompts and the fall measured on the other; (5) the fraction of hijacks won that are lost again by then; (6) the
    margin with the bigram at the front, less that with it at the end, at the greatest length. (4) and (6) are fractions
    of the pull at its peak: of what the repeats add to the margin there.
    """
    window = pd.concat([_window(focus, settings, make) for focus in settings.focuses], ignore_index=True)
    primacy = _primacy(settings, make)
    rows, pulls = [], []
    for seed in tqdm(settings.seeds, desc="trained models", disable=None, unit="seed"):
        model = train(replace(settings.recipe, seed=seed)).model
        margins = _trained_window(model, settings, seed)
        pull = margins - margins[:, :1]
        peak = int(pull[::2].mean(0).argmax())
        fall = float((pull[1::2, peak] - pull[1::2, -1]).mean())
        won = (margins[:, 0] < 0) & (margins > 0).any(1)
        lost = float((won & (margins[:, -1] < 0)).sum() / won.sum().clamp_min(1))
        primacy_of = _trained_primacy(model, settings, seed)
        at_peak = float(pull[:, peak].mean())
        # A model whose context never pulls towards c has nothing to lose.
        shown = (fall / at_peak, lost, primacy_of / at_peak) if at_peak > 0 else (0.0, 0.0, 0.0)
        rows.append((seed, peak, at_peak, *shown))
        pulls.append(pull.mean(0))
    columns = ["seed", "peak", "pull_at_peak", "fall", "lost", "front_less_end"]
    by_seed = pd.DataFrame(rows, columns=columns).assign(part="trained")

    models = (
        f"{len(settings.focuses)} hand-written models, b1 from {min(settings.focuses):g} to {max(settings.focuses):g}"
    )
    right, clear = _agreement(window)
    closed = [
        f"b1 = {focus:g}: {wins.min()} to {wins.max()}"
        for focus, part in window.groupby("b1")
        if len(wins := part.loc[part["measured"] > 0, "repeats"]) and wins.max() < settings.max_repeats
    ]
    right_there, clear_there = _agreement(primacy)
    won_there = primacy[primacy["measured"] > 0].groupby("place")["length"].max()
    longest = {place: int(won_there.get(place, 0)) for place in _PLACES}
    greatest = 4 * settings.recipe.length
    findings = (
        Finding(
            f"{models}, 0 to {settings.max_repeats} repeats after {settings.lead} neutral tokens",
            "the context wins where theory says; ties left out",
            f"{right} of {clear} winners",
            0 < right == clear,
        ),
        Finding(
            models,
            "a window: at some b1 a hijack won is lost again as repeats pile up",
            f"wins with {'; '.join(closed)} repeats" if closed else "no window",
            bool(closed),
        ),
        Finding(
            f"a model with b1 = {settings.primacy_focus:g}, prompts of up to {settings.primacy_lengths[-1]} tokens",
            f"winners as theory says, and hijacks from the front at {FARTHER:g} times the length or more",
            f"{right_there} of {clear_there} winners; up to {longest['front']} tokens from the front, "
            f"{longest['end']} from the end",
            0 < right_there == clear_there and longest["front"] >= FARTHER * longest["end"] > 0,
        ),
        *(
            Finding(
                f"{len(by_seed)} trained models, {settings.n_prompts} prompts each, of {greatest} tokens",
                f"{predicted}: {LEAST:.0%} or more",
                f"{found:.1%}",
                found.low >= LEAST,
            )
            for column, predicted in _IN_TRAINED.items()
            for found in (over_seeds(by_seed[column]),)
        ),
    )
    table = pd.concat([window.assign(part="window"), primacy.assign(part="primacy"), by_seed], ignore_index=True)
    return Result(findings, table, _picture(window, primacy, pulls, settings))


_PLACES = ("front", "end")
_IN_TRAINED = {
    "fall": "the context's pull falls from its peak, by a fraction of it",
    "lost": "of the hijacks won, a fraction is lost again",
    "front_less_end": "a bigram at the front pulls more than one at the end, by a fraction of the pull at its peak",
}


def _agreement(answers: pd.DataFrame) -> tuple[int, int]:
    """Winners that theory names, of all but ties."""
    clear = answers[answers["predicted"].abs() > TIE]
    return int((clear["predicted"] * clear["measured"] > 0).sum()), len(clear)


def _window(focus: float, settings: Settings, make: Make) -> pd.DataFrame:
    """A hand-written model's margin after each number of repeats, and theory's."""
    strengths = Strengths(focus, settings.match, settings.copy, 1.0)
    tokens = neutral_then_pairs(FIRST_TRIGGER, [IN_CONTEXT] * settings.max_repeats, lead=settings.lead)[None]
    model = make(conflict_language([settings.ahead]), strengths=strengths, n_ctx=tokens.shape[1], dtype=torch.float64)
    repeats = torch.arange(settings.max_repeats + 1)
    # A causal model's margins on every shorter prompt are those at the longest one's positions.
    measured = hijack_margins(model, tokens)[0, settings.lead :: 2].cpu()
    predicted = theory.phase_boundary(repeats, theory.Setting(strengths), lead=settings.lead) - settings.ahead
    return pd.DataFrame({"b1": focus, "repeats": repeats, "predicted": predicted, "measured": measured})


def _primacy(settings: Settings, make: Make) -> pd.DataFrame:
    """A hand-written model's margin with one bigram at the front, after a neutral token, or at the end."""
    setting = theory.Setting(Strengths(settings.primacy_focus, settings.match, settings.copy, 1.0))
    language = conflict_language([settings.ahead])
    model = make(language, strengths=setting.strengths, n_ctx=settings.primacy_lengths[-1], dtype=torch.float64)
    rows = []
    for length in settings.primacy_lengths:
        filler = torch.full((1, length - 2), NEUTRAL)
        filler[:, -1] = FIRST_TRIGGER
        tokens = _with_pair(filler, torch.tensor([[FIRST_TRIGGER, IN_CONTEXT]]))
        predicted = theory.margin(tokens, language, setting, in_context=IN_CONTEXT, global_candidate=GLOBAL).total
        measured = hijack_margins(model, tokens)[:, -1]
        for place, *margins in zip(_PLACES, predicted.tolist(), measured.tolist(), strict=True):
            rows.append((settings.primacy_focus, place, length, *margins))
    return pd.DataFrame(rows, columns=["b1", "place", "length", "predicted", "measured"])


def _with_pair(filler: Int[Tensor, "prompt short"], pair: Int[Tensor, "prompt 2"]) -> Int[Tensor, "both pos"]:
    """Each prompt with the pair after its first token, then each with it before its last."""
    front = torch.cat([filler[:, :1], pair, filler[:, 1:]], 1)
    end = torch.cat([filler[:, :-1], pair, filler[:, -1:]], 1)
    return torch.cat([front, end])


def _conflicts(
    model: BigramTransformer, length: int, settings: Settings, seed: int
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt 3"]]:
    """Prompts that end with a trigger for the first time, and q, c and g of each, at random."""
    language, generator = model.language, torch.Generator().manual_seed(seed)
    triggers = language.trigger_ids(model.triggers)
    prompts: list[Tensor] = []
    asked: list[tuple[int, int, int]] = []
    while len(prompts) < settings.n_prompts:
        q = int(triggers[torch.randint(len(triggers), (), generator=generator)])
        c, g = int(torch.randint(language.d_vocab, (), generator=generator)), language.global_candidate(q)
        if c not in (q, g):
            prompts.append(hijack_prompt(language, q, c, 0, length, filler="avoid", seed=generator).tokens)
            asked.append((q, c, g))
    return torch.stack(prompts), torch.tensor(asked)


def _margins(
    model: BigramTransformer, tokens: Int[Tensor, "prompt pos"], asked: Int[Tensor, "prompt 3"]
) -> Float[Tensor, "prompt pos"]:
    """logit[c] - logit[g] of a trained model, at every position."""
    with torch.no_grad():
        logits = PlainForward(model)(tokens.to(model.W_E.device)).cpu()
    prompt = torch.arange(len(tokens))
    return logits[prompt, :, asked[:, 1]] - logits[prompt, :, asked[:, 2]]


def _trained_window(model: BigramTransformer, settings: Settings, seed: int) -> Float[Tensor, "prompt repeats"]:
    """A trained model's margin after 0, 1, 2, ... repeats, as many as four times the training length holds."""
    filler, asked = _conflicts(model, settings.lead + 1, settings, seed)
    repeats = (4 * settings.recipe.length - settings.lead - 1) // 2
    tokens = torch.cat([filler, asked[:, [1, 0]].repeat(1, repeats)], 1)
    return _margins(model, tokens, asked)[:, settings.lead :: 2]


def _trained_primacy(model: BigramTransformer, settings: Settings, seed: int) -> float:
    """A trained model's margin with the bigram at the front of the longest prompt, less that with it at the end."""
    filler, asked = _conflicts(model, 4 * settings.recipe.length - 2, settings, seed)
    front, end = _margins(model, _with_pair(filler, asked[:, :2]), asked.repeat(2, 1))[:, -1].chunk(2)
    return float((front - end).mean())


def _picture(window: pd.DataFrame, primacy: pd.DataFrame, pulls: list[Tensor], settings: Settings) -> Picture:
    """Theory as lines, models as dots: margins by repeats, by length; and trained models' pull by repeats."""
    picture = Picture(16.0, 4.8)
    left, middle, right = picture.figure.subplots(1, 3)
    colours = ("#CC79A7", COLOURS["weights"], COLOURS["context"], "#009E73", "#E69F00")  # Okabe & Ito's
    for number, (focus, part) in enumerate(window.groupby("b1")):
        part, colour = part[part["repeats"] > 0], colours[number % len(colours)]
        dots = part.iloc[(1.3 ** torch.arange(24)).long().clamp(max=len(part)).unique() - 1]
        left.plot(part["repeats"], part["predicted"], "-", color=colour)
        left.plot(dots["repeats"], dots["measured"], "o", color=colour, markersize=5, label=f"b1 = {focus:g}")
    left.set_xscale("log")
    left.set_xlabel("repeats of (q, c)")
    left.set_ylabel("logit c − logit g")
    left.set_title("the flip window (written by hand)", fontsize=11)
    for place, colour in zip(_PLACES, (COLOURS["context"], COLOURS["weights"]), strict=True):
        part = primacy[primacy["place"] == place]
        middle.plot(part["length"], part["predicted"], "-", color=colour)
        middle.plot(part["length"], part["measured"], "o", color=colour, markersize=4, label=f"bigram at the {place}")
    middle.set_xlabel("length of the prompt (tokens)")
    middle.set_title(f"primacy (written by hand, b1 = {settings.primacy_focus:g})", fontsize=11)
    for number, pull in enumerate(pulls):
        colour = colours[number % len(colours)]
        right.plot(range(1, len(pull)), pull[1:], "-", color=colour, label=f"seed {settings.seeds[number]}")
    right.axvline((settings.recipe.length - settings.lead - 1) / 2, color="#999999", linestyle="--")
    right.annotate(
        "training length",
        ((settings.recipe.length - settings.lead - 1) / 2, 0),
        xytext=(4, 4),
        textcoords="offset points",
    )
    right.set_xscale("log")
    right.set_ylim(bottom=min(0.0, *(float(pull.min()) for pull in pulls)))
    right.set_xlabel("repeats of (q, c)")
    right.set_ylabel("the context's pull: change of logit c − logit g")
    right.set_title("trained models", fontsize=11)
    for ax in (left, middle, right):
        ax.axhline(0, color="black", linewidth=0.8)
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return picture
