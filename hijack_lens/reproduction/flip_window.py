"""Claim: a previous-token head of finite strength leaves a window of repeats, and favours the front of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens import theory
from hijack_lens.core.circuit import Strengths
from hijack_lens.models import BigramTransformer, associative_transformer
from hijack_lens.reproduction import experiment
from hijack_lens.reproduction.experiment import Make, Recipe, Train, trained
from hijack_lens.reproduction.findings import Finding, Result
from hijack_lens.show.style import COLOURS, Picture

STATEMENT = (
    "A previous-token head of finite strength blurs as the context grows: a hijack that repeats have won is lost again "
    "as they pile up, and a bigram hijacks from the front of a longer prompt than from its end."
)
SOURCE = "Wang & Sato, arXiv 2412.11459: logits at finite strengths; window and primacy follow from `theory`"

TIE = 1e-9  # predicted margins closer to 0, in logits, are ties: rounding decides them
LONG = Recipe(0, steps=400, evaluate_every=400)  # of the trained models, apart from the seed
LEAST = 0.05  # the least effect in trained models: a fraction of the context's pull at its peak, or of the hijacks won
FARTHER = 2.0  # the least ratio of the longest prompt hijacked from the front to the longest hijacked from the end


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
    recipe: Recipe = LONG
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the trained models and of their prompts
    n_prompts: int = 200  # per trained model


QUICK = Settings(recipe=Recipe(0), seeds=(0, 1, 2), n_prompts=60)


def flip_window(
    settings: Settings = Settings(), make: Make = associative_transformer, train: Train = trained
) -> Result:
    """What a previous-token head of finite strength b1 does to hijacks, and whether trained models show it.

    Logits at finite strengths (Wang & Sato, arXiv 2412.11459). Hand-written float64 models are compared with
    `theory.phase_boundary`, for repeats after neutral tokens, and with `theory.margin`, for a single bigram at the
    front of a prompt or at its end.

    Trained models read up to four times their training length, where they show (1) how far the context's pull (what
    repeats add to the margin) falls from its peak to the most repeats: the peak is chosen on one half of the prompts
    and the fall measured on the other; (2) the fraction of hijacks won that are lost again by then; (3) the margin with
    the bigram at the front, less that with it at the end. (1) and (3) are fractions of the pull at its peak.
    """
    window = pd.concat([_window(focus, settings, make) for focus in settings.focuses], ignore_index=True)
    primacy = _primacy(settings, make)
    rows, pulls = [], []
    for seed, run in experiment.replicates(train, settings.recipe, settings.seeds, "trained models"):
        row, pull = _ask_trained(run.model, settings, seed)
        rows.append({"part": "trained", "seed": seed, **row})
        pulls.append(pull)
    by_seed = pd.DataFrame(rows)
    longest = 4 * settings.recipe.length
    setting = f"{len(by_seed)} trained models, {settings.n_prompts} prompts each, of {longest} tokens"
    in_training = [
        Finding.at_least(setting, f"{predicted}: {LEAST:.0%} or more", by_seed[column], LEAST)
        for column, predicted in _IN_TRAINED.items()
    ]
    findings = (*_by_hand(window, primacy, settings), *in_training)
    table = pd.concat([window.assign(part="window"), primacy.assign(part="primacy"), by_seed], ignore_index=True)
    return Result(findings, table, _picture(window, primacy, pulls, settings))


_PLACES = ("front", "end")
_IN_TRAINED = {
    "fall": "the context's pull falls from its peak, by a fraction of it",
    "lost": "of the hijacks won, a fraction is lost again",
    "front_less_end": "a bigram at the front pulls more than one at the end, by a fraction of the pull at its peak",
}


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


def _ask_trained(
    model: BigramTransformer, settings: Settings, seed: int
) -> tuple[dict[str, float | int], Float[Tensor, "repeats"]]:
    """How strong the effects are in a trained model, and the context's pull by repeats, averaged over prompts."""
    lead, asked = experiment.random_conflicts(model, settings.n_prompts, settings.lead + 1, seed)
    repeats = (4 * settings.recipe.length - settings.lead - 1) // 2
    evidence = repeat(asked[:, [1, 0]], "prompt cq -> prompt (repeats cq)", repeats=repeats)
    tokens = torch.cat([lead, evidence], 1)
    margins = experiment.margins_of(model, tokens, asked)[:, settings.lead :: 2]
    pull = margins - margins[:, :1]
    peak = int(pull[::2].mean(0).argmax())
    fall = float((pull[1::2, peak] - pull[1::2, -1]).mean())
    won = (margins[:, 0] < 0) & (margins > 0).any(1)
    lost = float((won & (margins[:, -1] < 0)).sum() / won.sum().clamp_min(1))
    at_peak = float(pull[:, peak].mean())
    effects = (0.0, 0.0, 0.0)  # a context that never pulls towards c has nothing to lose
    if at_peak > 0:
        effects = (fall / at_peak, lost, _trained_primacy(model, settings, seed) / at_peak)
    return {"peak": peak, "pull_at_peak": at_peak, **dict(zip(_IN_TRAINED, effects, strict=True))}, pull.mean(0)


def _trained_primacy(model: BigramTransformer, settings: Settings, seed: int) -> float:
    """A trained model's margin with the bigram at the front of the longest prompt, less that with it at the end."""
    filler, asked = experiment.random_conflicts(model, settings.n_prompts, 4 * settings.recipe.length - 2, seed)
    tokens = _with_pair(filler, asked[:, :2])
    front, end = experiment.margins_of(model, tokens, asked.repeat(2, 1))[:, -1].chunk(2)
    return float((front - end).mean())


def _picture(window: pd.DataFrame, primacy: pd.DataFrame, pulls: Sequence[Tensor], settings: Settings) -> Picture:
    """Theory as lines, models as dots: margins by repeats, by length; and trained models' pull by repeats."""
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
    middle.set_xlabel("length of the prompt (tokens)")
    middle.set_title(f"primacy (written by hand, b1 = {settings.primacy_focus:g})")
    for number, pull in enumerate(pulls):
        colour = colours[number % len(colours)]
        right.plot(range(1, len(pull)), pull[1:], "-", color=colour, label=f"seed {settings.seeds[number]}")
    trained_to = (settings.recipe.length - settings.lead - 1) / 2
    right.axvline(trained_to, color="#999999", linestyle="--")
    right.annotate("training length", (trained_to, 0), xytext=(4, 4), textcoords="offset points")
    right.set(xscale="log", xlabel="repeats of (q, c)", ylabel="the context's pull: change of logit c − logit g")
    right.set(title="trained models", ylim=(min(0.0, *(float(pull.min()) for pull in pulls)), None))
    for ax in (left, middle, right):
        ax.axhline(0, color="black", linewidth=0.8)
        ax.legend(frameon=False)
    experiment.finish((left, middle, right), title=11)
    return picture
