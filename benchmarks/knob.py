"""Turning what carriers read, on a real language model: found on one relation, tried on others, beside other knobs.

Every knob's strength is chosen on the capitals alone, by the same rule: the largest that makes nearly the largest share
of prompts say the context's answer. Then all are tried on 30 facts of each relation, denied by other words than those.
Turned off ("off"), the answers should be those that the model gives where nothing is said; and what it writes with the
knob turned ("fluency") should be as good text as what it writes without, judged by the model as it is. Parts may be
named; the others' results are kept.

    python benchmarks/knob.py off fluency
"""

import contextlib
import itertools
import sys
import time
from dataclasses import dataclass

import torch
from common import by_parts, mean_of, share_of, write

from hijack_lens import Component, Fact, find_carriers, hooks
from hijack_lens.language import RELATIONS
from hijack_lens.language.facts import fact_prompts

STRENGTHS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
TRIED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
N_FACTS, N_CONTINUED, N_WRITTEN = 30, 6, 16


def turned(model, heads, case, strength):
    with hooks.scale(model, heads, strength, source=case.fact.context):
        return model(case.said)[0, -1]


def whole_heads(model, heads, case, strength):
    with hooks.scale(model, heads, strength):
        return model(case.said)[0, -1]


def contrast(model, heads, case, strength):
    """Logits with the context, less those without it (Shi et al. 2024, context-aware decoding)."""
    return strength * model(case.said)[0, -1] - (strength - 1) * model(case.alone)[0, -1]


def run_twice(model, heads, case, strength):
    """What the heads wrote in a first run is added to what they write in a second (arXiv 2503.10996)."""
    names = sorted({f"blocks.{head.layer}.attn.hook_z" for head in heads})
    _, first = model.run_with_cache(case.said, names_filter=lambda name: name in names)

    def add(name):
        def hook_fn(z, hook):
            changed = z.clone()
            for head in heads:
                if f"blocks.{head.layer}." in name:
                    added = first["z", head.layer][:, -1].view(*z.shape[:1], *z.shape[2:])
                    changed[:, -1, head.head] += (strength - 1) * added[:, head.head]
            return changed

        return hook_fn

    with hooks.Intervention(model, edit=[(name, add(name)) for name in names]):
        return model(case.said)[0, -1]


@dataclass(frozen=True)
class Case:
    """A fact's prompts, with and without the denial, and the answers' first tokens."""

    fact: Fact
    said: torch.Tensor
    alone: torch.Tensor
    pair: tuple[int, int]


KNOBS = {"carriers": turned, "whole heads": whole_heads, "contrast": contrast, "run twice": run_twice}


def measured(model, heads, cases, knob, strength):
    margins, context, weights = [], 0, 0
    for case in cases:
        logits = knob(model, heads, case, strength)
        c, g = case.pair
        margins.append(float(logits[c] - logits[g]))
        best = int(logits.argmax())
        context, weights = context + (best == c), weights + (best == g)
    margin = torch.tensor(margins)
    n = len(cases)
    return {
        "margin": round(float(margin.mean()), 3),
        "margin_interval": round(1.96 * float(margin.std()) / n**0.5, 3),
        "follows": round(float((margin > 0).double().mean()), 3),
        "says_context": round(context / n, 3),
        "says_weights": round(weights / n, 3),
        "facts": n,
    }


def prepared(model, facts):
    found = []
    for fact in facts:
        try:
            one = fact_prompts(model, fact, repeats=3)
            found.append(Case(fact, one.tokens(1)[None], one.tokens(0)[None], (one.context, one.weights)))
        except ValueError as error:
            print("left out:", error)
    return found


def margins(model, result):
    """Finds the carriers, and tries all knobs."""
    started = time.perf_counter()
    carriers = find_carriers(model, RELATIONS["capital"].facts(seed=0))
    seconds, heads = time.perf_counter() - started, carriers.heads
    print(carriers)
    chosen_on = prepared(model, RELATIONS["capital"].facts(seed=0))
    strengths = {"carriers": carriers.strength}
    for name, knob in KNOBS.items():
        if name != "carriers":
            shares = [measured(model, heads, chosen_on, knob, at)["says_context"] for at in TRIED]
            strengths[name] = max(at for at, share in zip(TRIED, shares, strict=True) if share >= 0.95 * max(shares))
            print(name, dict(zip(TRIED, shares, strict=True)), "->", strengths[name], flush=True)
    result["heads"] = [str(head) for head in heads]
    result |= {"strength": carriers.strength, "seconds_to_find": round(seconds, 1), "relations": {}}
    for relation, cases in held_out(model):
        row = {f"{at:g}": measured(model, heads, cases, turned, at) for at in STRENGTHS}
        row |= {
            f"{name} at {strengths[name]:g}": measured(model, heads, cases, knob, strengths[name])
            for name, knob in KNOBS.items()
            if name != "carriers"
        }
        result["relations"][relation] = row
        print(
            relation,
            {name: (one["margin"], one["follows"], one["says_context"]) for name, one in row.items()},
            flush=True,
        )
        write("knob", result)


def off(model, result):
    """How often the context is followed with the knob at 0 and 1, of facts that the model knows when nothing is said.

    Apart from these, those whose denial says what the weights hold for second best of the relation's answers.
    """
    heads, found = heads_of(result), {}
    for relation, cases in held_out(model):
        answers = torch.tensor(sorted({token for case in cases for token in case.pair}))
        found[relation] = []
        for case in cases:
            alone, off, on = model(case.alone)[0, -1], *(turned(model, heads, case, at) for at in (0.0, 1.0))
            c, g = case.pair
            if alone[c] < alone[g]:
                second = int((alone[answers] > alone[c]).sum()) == 1
                found[relation].append((second, bool(off[c] > off[g]), bool(on[c] > on[g])))
        print(relation, counted(found[relation]), flush=True)
    every = [row for rows in found.values() for row in rows]
    result["off"] = {relation: counted(rows) for relation, rows in found.items()} | {
        "all": counted(every),
        "all, the denial is the weights' second": counted([row for row in every if row[0]]),
        "all, it is not": counted([row for row in every if not row[0]]),
    }


def counted(rows):
    columns = {"follows at 0": 1, "follows at 1": 2}
    return {"known_facts": len(rows)} | {name: share_of([row[i] for row in rows]) for name, i in columns.items()}


def fluency(model, result):
    """Greedy continuations with each knob at the recommended strength: how likely the model as it is finds them, how
    often they repeat a pair of tokens; without their first token, the answer, which the knob is to change."""
    heads, strength = heads_of(result), result["strength"]
    knobs = {
        "as it is": lambda case: contextlib.nullcontext(),
        "carriers": lambda case: hooks.scale(model, heads, strength, source=case.fact.context),
        "whole heads": lambda case: hooks.scale(model, heads, strength),
    }
    rows, texts = {name: [] for name in knobs}, {}
    for relation, cases in held_out(model):
        for case in cases[:N_CONTINUED]:
            for name, knob in knobs.items():
                with knob(case):
                    written = model.generate(
                        case.said, max_new_tokens=N_WRITTEN, do_sample=False, return_type="tokens", verbose=False
                    )
                start = case.said.shape[1]
                told = written[0, start + 1 :].tolist()
                likely = model(written)[0, start:-1].log_softmax(-1)
                log_prob = float(likely[range(len(told)), told].mean())
                pairs = list(itertools.pairwise(told))
                rows[name].append((log_prob, 1 - len(set(pairs)) / len(pairs)))
                texts.setdefault(relation, {})[name] = model.tokenizer.decode(written[0])  # the last case's
        print(relation, texts[relation], flush=True)
    as_it_is = torch.tensor(rows["as it is"])
    result["fluency"] = {
        name: {
            "log_prob_per_token": mean_of(found[:, 0], 3),
            "less_than_as_it_is": mean_of((as_it_is - found)[:, 0], 3),
            "repeated_pairs": mean_of(found[:, 1], 3),
        }
        for name, found in ((name, torch.tensor(values)) for name, values in rows.items())
    } | {"continuations": len(as_it_is), "tokens": N_WRITTEN, "examples": texts}


def held_out(model):
    """Facts that no choice was made on, by relation."""
    for relation, listed in RELATIONS.items():
        yield relation, prepared(model, listed.facts(seed=1)[:N_FACTS])


def heads_of(result):
    return tuple(Component.of(name) for name in result["heads"])


PARTS = {"margins": margins, "off": off, "fluency": fluency}


if __name__ == "__main__":
    by_parts("knob", PARTS, sys.argv[1:])
