"""Shares that attribution gives to source tokens of a real language model, beside what interventions change.

Facts are drawn by a seed of their own. The share of the context's answer is compared with what the margin loses when
that answer is exchanged for other answers of the relation ("exchanged"). How all statements move the margin is compared
with their share of it in `dose_response`, and with what their tokens alone wrote ("stated"; on other facts than those
that the share was developed on; asked of it beforehand: correlation >= .9, slope .7 to 1.3). Parts may be named; the
others' results are kept.

    python benchmarks/agreement.py stated
"""

import sys
import time

import torch
from common import by_parts

from hijack_lens import attribute_sources, dose_response, explain
from hijack_lens.language import RELATIONS
from hijack_lens.language.facts import fact_prompts

FACTS, SEED, OTHERS = 20, 5, 4
STATED, STATED_SEED, DOSES = 3, 31, 8


def correlation(pairs):
    """Correlation, and the slope of shares on effects, with an interval by Fisher's transformation."""
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    r = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    slope = r * float(x.std() / y.std())
    reach = 1.96 / (len(pairs) - 3) ** 0.5
    low, high = (float(torch.atanh(torch.tensor(r)) + side * reach) for side in (-1, 1))
    interval = [round(float(torch.tanh(torch.tensor(end))), 3) for end in (low, high)]
    means = {"mean_share": round(float(x.mean()), 3), "mean_effect": round(float(y.mean()), 3)}
    return {"n": len(pairs), "correlation": round(r, 3), "interval": interval, "slope": round(slope, 3), **means}


def margin(model, tokens, pair):
    logits = model(torch.tensor([tokens]))[0, -1]
    return float(logits[pair[0]] - logits[pair[1]])


def swapped(model, fact, others, repeats):
    """(share, effect) of the context's answer, where it is one token; `None` where it is several."""
    one = fact_prompts(model, fact, 3)
    if not one.whole[0]:
        return None
    tokens, pair = list(one.prompts[repeats]), (one.context, one.weights)
    at = [i for i, token in enumerate(tokens) if token == one.context]
    share = float(attribute_sources(model, torch.tensor(tokens), list(pair), context=at).margin(*pair).context)
    chosen = [other for other in others if other not in pair][:OTHERS]
    changed = [[other if i in at else token for i, token in enumerate(tokens)] for other in chosen]
    return share, margin(model, tokens, pair) - sum(margin(model, one, pair) for one in changed) / len(changed)


def exchanged(model, result):
    """Shares of the context's answer beside what exchanging it changes."""
    once, twice = [], []
    for name, relation in RELATIONS.items():
        words = [model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for _, answer in relation.answers]
        others = list(dict.fromkeys(ids[0] for ids in words if len(ids) == 1))
        for fact in relation.facts(SEED)[-FACTS:]:
            try:
                pairs = [swapped(model, fact, others, n) for n in (1, 2)]
            except ValueError as error:
                print("left out:", error)
                continue
            if pairs[0] is not None:
                once.append(pairs[0])
                twice.append(pairs[1])
        print(name, len(once), flush=True)
    result["answer said once, exchanged"] = correlation(once)
    result["answer said twice, exchanged"] = correlation(twice)


def stated(model, result):
    """Shares of the statements beside how they move the margin, over doses."""
    by_relation, tokens = {}, []
    for name, relation in RELATIONS.items():
        usable = []
        for fact in relation.facts(STATED_SEED)[:-FACTS]:
            try:
                fact_prompts(model, fact, DOSES)
                usable.append(fact)
            except ValueError as error:
                print("left out:", error)
        found = dose_response(model, usable[:STATED], DOSES)
        moved = (found.margin.total - found.margin.total[:, :1])[:, 1:].flatten().tolist()
        by_relation[name] = list(zip(found.statements[:, 1:].flatten().tolist(), moved, strict=True))
        tokens += zip(found.margin.context[:, 1:].flatten().tolist(), moved, strict=True)
        print(name, correlation(by_relation[name]), flush=True)
    result |= {
        f"statements, said 1 to {DOSES} times": correlation([pair for pairs in by_relation.values() for pair in pairs]),
        "the same by relation": {name: correlation(pairs) for name, pairs in by_relation.items()},
        "the statements' tokens alone": correlation(tokens),
    }


def forwards(model, result):
    """What the analyses of one prompt cost, in forward passes of it."""
    prompt = "The capital of France is London. The capital of France is"

    def seconds(run, times):
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) / times

    model(prompt)
    alone = min(seconds(lambda: model(prompt), 3) for _ in range(3))
    told = {
        "attribute_sources, 2 answers": lambda: attribute_sources(model, prompt, [" London", " Paris"]),
        "attribute_sources, 2 answers, 6 carriers": lambda: attribute_sources(
            model, prompt, [" London", " Paris"], carriers=6
        ),
        "explain, with its interventions": lambda: explain(model, prompt, "London", "Paris"),
    }
    result["forward_passes"] = {
        name: round(min(seconds(run, 2) for _ in range(3)) / alone, 1) for name, run in told.items()
    }


PARTS = {"exchanged": exchanged, "stated": stated, "forwards": forwards}


if __name__ == "__main__":
    by_parts("agreement", PARTS, sys.argv[1:])
