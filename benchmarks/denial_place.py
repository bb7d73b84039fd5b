"""Does it matter where a fact is denied? Before, amid or after other statements; far from the question or near it.

The others are true statements of the same relation, of other subjects and with other answers. All prompts of a fact
with so many others hold the same statements in the same order; only the denial's place differs. Draws
docs/denial_place.png.
"""

from pathlib import Path

import torch
from common import mean_of, share_of, write
from facts import usable

from hijack_lens.language import RELATIONS, Fact
from hijack_lens.language.facts import fact_prompts
from hijack_lens.models import load_model
from hijack_lens.show.style import BLUE, GREEN, ORANGE, PLAIN, Picture, frameless

FACTS, SEED, DENIED = 10, 21, (1, 2, 3)
BEFORE = {
    0: (0,),
    2: (0, 2),
    6: (0, 3, 6),
}  # by the number of other statements, how many of them stand before the denial
FIRST, LAST = "before 6", "after 6"
NAMES = {(0, 0): "alone", (2, 0): "before 2", (2, 2): "after 2", (6, 0): FIRST, (6, 3): "amid 6", (6, 6): LAST}


def others(relation, fact, generator):
    """True statements that hold neither of the fact's subject and answers."""
    held = {fact.subject, fact.context, fact.weights}
    free = [pair for pair in relation.answers if not held & set(pair)]
    drawn = torch.randperm(len(free), generator=generator)[: max(BEFORE)].tolist()
    return [Fact(free[i][0], free[i][1], fact.context, relation.template).statement(free[i][1]) for i in drawn]


def asked(model, fact, stated):
    """Margins and distances from the denial's answer to the end, by (others, before, times denied)."""
    one, rows = fact_prompts(model, fact, 1), {}
    for total, places in BEFORE.items():
        some = stated[:total]
        for times in (0, *DENIED):
            denial = [fact.statement(fact.context)] * times
            texts = {
                before: " ".join([*some[:before], *denial, *some[before:], fact.query])
                for before in (places if times else places[:1])
            }
            tokens = torch.cat([model.to_tokens(text) for text in texts.values()])
            said = tokens == one.context
            if not bool((said.sum(1) == times).all()) or one.weights in tokens:
                raise ValueError(f"fact {fact.name!r}: the other statements hold a token of an answer")
            logits = model(tokens)[:, -1]
            margins = (logits[:, one.context] - logits[:, one.weights]).tolist()
            for before, margin, at in zip(texts, margins, said, strict=True):
                away = tokens.shape[1] - 1 - int(at.nonzero().max()) if times else None
                rows[total, before, times] = margin, away
    return rows


def told(facts):
    """The table of several facts' rows, with 95% intervals; and the denial first less last of six, fact by fact."""
    table = {}
    for place, name in NAMES.items():
        for times in DENIED:
            margins, away = zip(*(rows[(*place, times)] for rows in facts), strict=True)
            follows = share_of([margin > 0 for margin in margins])
            row = {
                "tokens_to_the_end": round(sum(away) / len(away), 1),
                "margin": mean_of(margins, 2),
                "follows": follows,
            }
            flipped = [any(rows[(*place, n)][0] > 0 for n in range(1, times + 1)) for rows in facts]
            table[f"{name}, denied {times}x"] = row | {"flipped_by_then": share_of(flipped)}
    moved = [[rows[6, 0, times][0] - rows[6, 6, times][0] for rows in facts] for times in DENIED]
    undenied = {f"{total} others": mean_of([rows[total, 0, 0][0] for rows in facts], 2) for total in BEFORE}
    return {
        "facts": len(facts),
        "margin_undenied": undenied,
        "places": table,
        "margin_first_less_last_of_6": {
            f"denied {times}x": mean_of(values, 2) for times, values in zip(DENIED, moved, strict=True)
        },
    }


def draw(result):
    """How often the denial is followed by place, and by relation how much its place matters."""
    picture = Picture(9.0, 4.2)
    left, right = picture.figure.subplots(1, 2)
    lines = (("alone", PLAIN), (FIRST, ORANGE), ("amid 6", GREEN), (LAST, BLUE))
    for shift, (name, colour) in zip((-0.06, -0.02, 0.02, 0.06), lines, strict=True):
        rows = [result["all"]["places"][f"{name}, denied {times}x"]["follows"] for times in DENIED]
        shares = [row["share"] for row in rows]
        reach = [[abs(row["share"] - row["interval"][side]) for row in rows] for side in (0, 1)]
        left.errorbar(
            [times + shift for times in DENIED],
            shares,
            reach,
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    left.set_xticks(DENIED)
    left.set_ylim(0, 1)
    left.set_xlabel("times denied")
    left.set_ylabel("share of facts that follow the denial")
    left.legend(title="the denial's place", fontsize=8, title_fontsize=8, loc="upper left")
    of = {"all": result["all"], **result["relations"]}
    for shift, times, colour in ((-0.2, 1, PLAIN), (0.0, 2, GREEN), (0.2, 3, BLUE)):
        moved = [row["margin_first_less_last_of_6"][f"denied {times}x"] for row in of.values()]
        at = [place + shift for place in range(len(of))]
        means, reach = ([row[key] for row in moved] for key in ("mean", "interval"))
        right.errorbar(means, at, xerr=reach, color=colour, marker="o", markersize=4, linestyle="", label=f"{times}x")
    right.set_yticks(range(len(of)), list(of))
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("margin with the denial before 6 others,\nless with it after them, in logits")
    right.legend(title="denied", fontsize=8, title_fontsize=8, loc="upper left")
    for ax in (left, right):
        frameless(ax)
    picture.save(Path(__file__).parents[1] / "docs" / "denial_place.png")


def main():
    torch.set_grad_enabled(False)
    model, generator, found = load_model("smollm2-135m"), torch.Generator().manual_seed(SEED), {}
    for name, relation in RELATIONS.items():
        facts = usable(model, relation.facts(SEED))
        found[name] = []
        for i in torch.randperm(len(facts), generator=generator).tolist():
            try:
                rows = asked(model, facts[i], others(relation, facts[i], generator))
            except ValueError as error:
                print("left out:", error)
                continue
            if rows[0, 0, 0][0] < 0:  # the model knows the fact
                found[name].append(rows)
            if len(found[name]) == FACTS:
                break
        print(name, told(found[name])["margin_first_less_last_of_6"], flush=True)
        result = {
            "model": "SmolLM2-135M-Instruct",
            "all": told([rows for some in found.values() for rows in some]),
            "relations": {name: told(some) for name, some in found.items()},
        }
        write("denial_place", result)
    draw(result)


if __name__ == "__main__":
    main()
