"""Does training by default form both memories on any language? A random sample of a grid of 648 cells, 3 seeds each.

Every combination of 18 languages, 4 kinds of triggers, 3 lengths and 3 kinds of positions; languages, weights and data
come from the seed. The 1,944 points are of four kinds, each with an order of its own; give how many to take of each.
A larger sample holds the smaller ones, and goes on with what the journal has. Draws docs/forming_grid.png.
"""

import argparse
import itertools
import random

import pandas as pd
from common import RESULTS, write
from forming import draw, trained

from hijack_lens.core.statistics import most_in_population
from hijack_lens.grid import run_grid

SEEDS = (1000, 1001, 1002)  # seen by no trial of the recipe
LANGUAGES = [
    *({"d_vocab": v, "concentration": a} for v, a in itertools.product((20, 50, 100, 200), (0.05, 0.3, 1.0, 10.0))),
    {"text": "English", "level": "char"},
    {"text": "English", "level": "word"},
]
TRIGGERS = (("frequent", 1), ("frequent", 5), ("rare", 5), ("random", 5))
ACCURACY = 0.97  # of the best possible, with fixed triggers
EXCESS, EXCESS_OF_MANY = 0.05, 0.1  # nats above the true bigrams' loss, with fixed triggers; of 200 tokens or more
ORDER = 0.1  # nats lost without the previous-token head, with random triggers
JOURNAL = RESULTS / "forming_grid.jsonl"
KINDS = ("up to 103 tokens, fixed", "up to 103 tokens, random", "200 or 500 tokens, fixed", "200 or 500 tokens, random")


def kind_of(point):
    many = point.get("d_vocab") == 200 or point.get("level") == "word"
    return KINDS[2 * many + (point["triggers"] == "random")]


def points():
    """All points of the grid by kind, in the order in which they are drawn."""
    cells = itertools.product(LANGUAGES, TRIGGERS, (64, 128, 256), ("relative", "rotary", "absolute"), SEEDS)
    by_kind = {kind: [] for kind in KINDS}
    for language, (triggers, n_triggers), length, positions, seed in cells:
        point = {**language, "triggers": triggers, "n_triggers": n_triggers, "length": length, "positions": positions}
        by_kind[kind_of(point)].append({**point, "seed": seed})
    for kind, all_of_it in by_kind.items():
        random.Random(kind).shuffle(all_of_it)
    return by_kind


def outcome(seed, **point):
    """What training reaches at a point."""
    found = trained(seed=seed, language_seed=seed, **point)
    return {name: value for name, value in found.items() if name not in ("d_vocab", "seconds")}


def name_of(point):
    if "text" in point:
        language = f"{point['text']}, {point['level']}"
    else:
        language = f"V {point['d_vocab']}, Dirichlet {point['concentration']:g}"
    data = f"{point['n_triggers']} {point['triggers']}, length {point['length']}"
    return f"{language}, {data}, {point['positions']}: seed {point['seed']}"


def meets(point, reached):
    """Whether a point reaches what is asked; drawn triggers' circuit is judged by what its head is worth."""
    if point["triggers"] == "random":
        return reached["nats_lost_without_previous_token_head"] >= ORDER
    most = EXCESS_OF_MANY if kind_of(point) in KINDS[2:] else EXCESS
    return (
        reached["in_context_accuracy"] >= ACCURACY * reached["best_possible"] and reached["bigram_excess_nats"] <= most
    )


def summary(rows, population):
    """Of each kind, how many points were drawn and met it, and what share of all of that kind does at the least."""
    found = {}
    for kind, of_kind in rows.groupby("kind", sort=False):
        drawn, met, every = len(of_kind), int(of_kind["met"].sum()), len(population[kind])
        found[kind] = {
            "points": every,
            "drawn": drawn,
            "met": met,
            "share_at_least": round(1 - most_in_population(drawn - met, drawn, every) / every, 3),
            "said_not_formed": int((~of_kind["formed"]).sum()),
            "cpu_seconds_at_most": of_kind["cpu_seconds"].max(),
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("taken", type=int, nargs=len(KINDS), help=f"how many points of each kind: {'; '.join(KINDS)}")
    population = points()
    taken = dict(zip(KINDS, parser.parse_args().taken, strict=True))
    sample = [point for kind in KINDS for point in population[kind][: taken[kind]]]
    reached = run_grid(outcome, sample, out=JOURNAL).to_dict("records")
    by_name = {
        name_of(point): {**row, "kind": kind_of(point), "met": meets(point, row)}
        for point, row in zip(sample, reached, strict=True)
    }
    missed = [name for name, row in by_name.items() if not row["met"]]
    write("forming_grid", {"summary": summary(pd.DataFrame(by_name.values()), population), "missed": missed})
    draw(by_name, missed.__contains__, "forming_grid.png")
