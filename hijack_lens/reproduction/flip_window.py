"""Claim: a previous-token head of finite strength leaves a window of repeats, and favours the front of the prompt."""

import copy
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result, over_seeds
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "A previous-token head of finite strength blurs as the context grows: a hijack that repeats have won is lost again "
    "as they pile up, and a bigram hijacks from the front of a longer prompt than from its end. Trained models lose "
    "none, since their head is strong; weakened, they lose those that theory names."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: logits at finite strengths; window and primacy follow from `theory`"

TIE = 1e-9  # predicted margins closer to 0, in logits, are ties: rounding decides them
FARTHER = 2.0  # the least ratio of the longest prompt hijacked from the front to the longest hijacked from the end

PREFERRING = Recipe(0, which="random")
"""Of the trained models: whose weights prefer g after any token, since any may be a trigger."""

# Of trained models:
AS_TRAINED = 0.05  # fraction of the hijacks won that are lost again, at most, as they were trained
WEAKENED = 0.10  # the same, at least, once the previous-token head is weak
NAMED = 0.75  # balanced accuracy of the hijacks that theory says are lost: one half by chance
CORRELATION = 0.9  # over prompts, of theory's and the model's falls from the peak, and of what the front is worth
FRONT = 0.05  # what a bigram at the front pulls more than one at the end, at least: a fraction of the pull at its peak


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    focuses: tuple[float, ...] = (1.0, 2.0, 3.0, 20.0)  # b1 of the hand-written models
    match: float = 6.0  # their b2
    copy: float = 5.0  # their b3
    ahead: float = 3.0  # how many logits the weights prefer g by
    lead: int = 10  # tokens before the repeats, also for trained models
    max_repeats: int = 500  # for hand-written models
    primacy_focus: float = 3.0  # b1 where front and end are compared
    primacy_lengths: tuple[int, ...] = tuple(range(4, 201, 4))  # of the prompts where they are compared
    recipe: Recipe = PREFERRING  # of the trained models
    strengths: tuple[float, ...] = (1.0, 0.7, 0.5)  # of their previous-token heads, from as trained to weak
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models and of their prompts
    n_prompts: int = 200  # per trained model


QUICK = Settings(max_repeats=200, recipe=experiment.quicker(PREFERRING), seeds=(0, 1, 2), n_prompts=100)


def flip_window(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """What a previous-token head of finite strength b1 does to hijacks, and whether trained models show it.

    Logits at finite strengths (Wang & Sato, arXiv 2412.11459). Hand-written float64 models are compared with
    `theory.phase_boundary`, for repeats after neutral tokens, and with `theory.margin`, for a single bigram at the
    front of a prompt or at its end.

    Trained models read up to four times their training length, as trained and with their previous-token head weakened:
    its scores times a fraction. Of the hijacks that repeats win there, which are lost again at the most repeats?
    `read_tables` reads theory's tables off the weakened model; theory goes without the one that belongs to neither
    memory, as where it names winners. It says which hijacks are lost, how far each margin falls from its peak, and what
    a bigram is worth at the front more than at the end. To name those lost without theory, one would take the prompts
    whose weights lead by most; that baseline is even told how many are lost.
    """
    window = pd.concat([_window(focus, settings, make) for focus in settings.focuses], ignore_index=True)
    primacy = _primacy(settings, make)
    rows = [
        {"seed": seed, "strength": strength, **_ask_trained(_weakened(run.model, strength), settings, seed)}
        for seed, run in experiment.replicates(train, settings.recipe, settings.seeds, "trained models")
        for strength in settings.strengths
    ]
    own = pd.DataFrame(rows)
    findings = (*_by_hand(window, primacy, settings), *_in_training(own, settings))
    parts = {"window": window, "primacy": primacy, "trained": own}
    table = pd.concat([part.assign(part=name) for name, part in parts.items()], ignore_index=True)
    return Result(findings, table, _picture(window, primacy, own))


_PLACES = ("front", "end")


def _by_hand(window: pd.DataFrame, primacy: pd.DataFrame, settings: Settings) -> list[Finding]:
    focuses = settings.focuses
    models = f"{len(focuses)} hand-written models, b1 from {min(focuses):g} to {max(focuses):g}"
    right, clear = experiment.winners_named(window, TIE)
    closed = [
        f"b1 = {focus:g}: {wins.min()} to {wins.max()}"
        for focus, wins in window[window["measured"] > 0].groupby("b1")["repeats"]
        if wins.max() < settings.max_repeats
    ]
    right_there, clear_there = experiment.winners_named(primacy, TIE)
    won_there = primacy[primacy["measured"] > 0].groupby("place")["length"].max()
    front, end = (int(won_there.get(place, 0)) for place in _PLACES)
    return [
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
            f"{right_there} of {clear_there} winners; up to {front} tokens from the front, {end} from the end",
            0 < right_there == clear_there and front >= FARTHER * end > 0,
        ),
    ]


def _window(focus: float, settings: Settings, make: Make) -> pd.DataFrame:
    """A hand-written model's margin after each number of repeats, and theory's."""
    strengths = Strengths(focus, settings.match, settings.copy, 1.0)
    repeats = torch.arange(settings.max_repeats + 1)
    evidence = [[experiment.IN_CONTEXT] * settings.max_repeats]
    (measured,) = experiment.margins_by_pairs(make, strengths, settings.ahead, evidence, settings.lead)
    predicted = theory.phase_boundary(repeats, theory.Setting(strengths), lead=settings.lead) - settings.ahead
    return pd.DataFrame({"b1": focus, "repeats": repeats, "predicted": predicted, "measured": measured})


def _primacy(settings: Settings, make: Make) -> pd.DataFrame:
    """A hand-written model's margin with one bigram at the front, after a neutral token, or at the end."""
    strengths = Strengths(settings.primacy_focus, settings.match, settings.copy, 1.0)
    language = experiment.conflict_language([settings.ahead])
    c, g, q = experiment.IN_CONTEXT, experiment.GLOBAL, experiment.FIRST_TRIGGER
    model = make(language, strengths=strengths, n_ctx=settings.primacy_lengths[-1], dtype=torch.float64)
    tables = []
    for length in settings.primacy_lengths:
        filler = experiment.neutral_then_pairs(q, [], length=length - 2)[None]
        tokens = _with_pair(filler, torch.tensor([[q, c]]))
        predicted = theory.margin(tokens, language, theory.Setting(strengths), in_context=c, global_candidate=g).total
        measured = experiment.hijack_margins(model, tokens)[:, -1]
        columns = {"place": _PLACES, "length": length, "predicted": predicted, "measured": measured}
        tables.append(pd.DataFrame({"b1": settings.primacy_focus, **columns}))
    return pd.concat(tables, ignore_index=True)


def _with_pair(filler: Int[Tensor, "prompt short"], pair: Int[Tensor, "prompt 2"]) -> Int[Tensor, "both pos"]:
    """Each prompt with the pair after its first token, then each with it before its last."""
    front = torch.cat([filler[:, :1], pair, filler[:, 1:]], 1)
    end = torch.cat([filler[:, :-1], pair, filler[:, -1:]], 1)
    return torch.cat([front, end])


def _weakened(model: BigramTransformer, strength: float) -> BigramTransformer:
    """A copy, whose previous-token heads' scores are this fraction of the model's."""
    weak = copy.deepcopy(model)
    with torch.no_grad():
        for head in weak.circuit.previous_token:
            attn: Any = weak.blocks[head.layer].attn
            attn.W_Q[head.head] *= strength
            attn.b_Q[head.head] *= strength
    return weak


def _ask_trained(model: BigramTransformer, settings: Settings, seed: int) -> dict[str, float | int]:
    """Which hijacks are won and lost again, and what theory at the model's tables says of it."""
    lead, asked = experiment.random_conflicts(model, settings.n_prompts, settings.lead + 1, seed)
    repeats = (4 * settings.recipe.length - settings.lead - 1) // 2
    evidence = repeat(asked[:, [1, 0]], "prompt cq -> prompt (repeats cq)", repeats=repeats)
    measured, predicted = (
        margins[:, settings.lead :: 2]
        for margins in experiment.both_margins(model, torch.cat([lead, evidence], 1), asked)
    )
    pull = (measured - measured[:, :1]).mean(0)
    won = (measured[:, 0] < 0) & (measured > 0).any(1)
    lost, said = (margins[won, -1] < 0 for margins in (measured, predicted))
    by_lead = torch.zeros_like(lost)
    by_lead[measured[won, 0].argsort()[: int(lost.sum())]] = True
    fall, falls = (margins.max(1).values - margins[:, -1] for margins in (measured, predicted))

    filler, asked = experiment.random_conflicts(model, settings.n_prompts, 4 * settings.recipe.length - 2, seed)
    both = experiment.both_margins(model, _with_pair(filler, asked[:, :2]), asked.repeat(2, 1))
    more, mores = (front - end for front, end in (margins[:, -1].chunk(2) for margins in both))
    at_peak = float(pull.max())
    return {
        "won": int(won.sum()),
        "lost": float(lost.double().mean()) if bool(won.any()) else 0.0,
        "said_lost": float(said.double().mean()) if bool(won.any()) else 0.0,
        "named": _balanced(said, lost),
        "named_by_lead": _balanced(by_lead, lost),
        "pull_at_peak": at_peak,
        "fall": float(fall.mean()),
        "fall_correlation": experiment.correlation(fall, falls),
        "front_less_end": float(more.mean()) / at_peak if at_peak > 0 else 0.0,
        "front_correlation": experiment.correlation(more, mores),
    }


def _balanced(said: Bool[Tensor, "prompt"], true: Bool[Tensor, "prompt"]) -> float:
    """The mean of the fractions of the true and of the others that are said to be so; one half if all are of a kind."""
    if not bool(true.any()) or bool(true.all()):
        return 0.5
    return float((said[true].double().mean() + (~said[~true]).double().mean()) / 2)


def _in_training(own: pd.DataFrame, settings: Settings) -> list[Finding]:
    whole, weak = (own[own["strength"] == strength] for strength in (settings.strengths[0], settings.strengths[-1]))
    setting = (
        f"{len(settings.seeds)} trained models, {settings.n_prompts} prompts each, of {4 * settings.recipe.length} "
    )
    weakly = f"{setting}tokens; previous-token scores times {settings.strengths[-1]:g}"
    named, ahead = over_seeds(weak["named"]), over_seeds(weak["named"] - weak["named_by_lead"])
    fall, front = over_seeds(weak["fall_correlation"]), over_seeds(weak["front_less_end"])
    by_place = over_seeds(weak["front_correlation"])
    lost = over_seeds(whole["lost"])
    return [
        Finding.judged(
            f"{setting}tokens",
            f"as trained, at most {AS_TRAINED:.0%} of the hijacks won are lost again",
            f"{lost:.1%} of {whole['won'].sum()}",
            lost.at_most(AS_TRAINED),
        ),
        Finding.at_least(weakly, f"{WEAKENED:.0%} of them or more are lost again", weak["lost"], WEAKENED),
        Finding.judged(
            weakly,
            f"theory says who loses: balanced accuracy of {NAMED} or more, and better than naming those whose weights "
            "lead by most",
            f"{named:.2f}, better by {ahead:.2f}; it says that {over_seeds(weak['said_lost']):.1%} are lost, and "
            f"{over_seeds(weak['lost']):.1%} are",
            named.at_least(NAMED),
            ahead.above(0.0),
        ),
        Finding.judged(
            weakly,
            f"theory says how far each margin falls from its peak: correlation of {CORRELATION:g} or more",
            f"{fall:.3f}; the falls are {over_seeds(weak['fall']):.2f} logits on average",
            fall.at_least(CORRELATION),
        ),
        Finding.judged(
            weakly,
            f"a bigram at the front pulls more than one at the end, by {FRONT:.0%} or more of the pull at its peak; "
            f"theory's differences and the model's correlate at {CORRELATION:g} or more",
            f"by {front:.1%}; {by_place:.3f}",
            front.at_least(FRONT),
            by_place.at_least(CORRELATION),
        ),
    ]


def _picture(window: pd.DataFrame, primacy: pd.DataFrame, own: pd.DataFrame) -> Picture:
    """Theory as lines, models as dots: margins by repeats, by length; and what weakened trained models lose."""
    picture = Picture(16.0, 4.8)
    left, middle, right = picture.figure.subplots(1, 3)
    colours = ("#CC79A7", COLOURS["weights"], COLOURS["context"], "#009E73", "#E69F00")  # Okabe & Ito's
    for number, (focus, part) in enumerate(window.groupby("b1")):
        part, colour = part[part["repeats"] > 0], colours[number % len(colours)]
        dots = part.iloc[(1.3 ** torch.arange(24)).long().clamp(max=len(part)).unique() - 1]
        left.plot(part["repeats"], part["predicted"], "-", color=colour)
        left.plot(dots["repeats"], dots["measured"], "o", color=colour, markersize=5, label=f"b1 = {focus:g}")
    left.set(xscale="log", xlabel="repeats of (q, c)", ylabel="logit c − logit g")
    left.set_title("the flip window (written by hand)")
    for place, colour in zip(_PLACES, (COLOURS["context"], COLOURS["weights"]), strict=True):
        part = primacy[primacy["place"] == place]
        middle.plot(part["length"], part["predicted"], "-", color=colour)
        middle.plot(part["length"], part["measured"], "o", color=colour, markersize=4, label=f"bigram at the {place}")
    middle.set(xlabel="length of the prompt (tokens)", ylabel="logit c − logit g")
    middle.set_title(f"primacy (written by hand, b1 = {primacy['b1'].iloc[0]:g})")
    strengths = sorted(own["strength"].unique(), reverse=True)
    for shift, (column, label, colour) in enumerate(
        (("lost", "model", COLOURS["context"]), ("said_lost", "theory, by tables", COLOURS["rest"]))
    ):
        found = [over_seeds(own.loc[own["strength"] == strength, column]) for strength in strengths]
        at = [place + 0.4 * shift - 0.2 for place in range(len(strengths))]
        experiment.bars(right, at, found, 0.38, color=colour, label=label)
    right.set(xlabel="strength of the previous-token head (1: as trained)", ylabel="hijacks won that are lost again")
    right.set_ylim(0, None)
    right.set_title(f"trained models, {own['seed'].nunique()} seeds")
    for ax in (left, middle):
        ax.axhline(0, color="black", linewidth=0.8)
    for ax in (left, middle, right):
        ax.legend(frameon=False)
    experiment.finish((left, middle, right), title=11)
    right.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    return picture
