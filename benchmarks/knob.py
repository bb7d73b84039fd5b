"""Turning what carriers read, on a real language model: found on one relation, tried on others, beside other knobs.

Every knob's strength is chosen on the capitals alone, by the same rule: the largest that makes nearly the largest share
of prompts say the context's answer. Then all are tried on 30 facts of each relation, denied by other words than those.
"""

import time
from dataclasses import dataclass

import torch
from common import write

from hijack_lens import Fact, find_carriers, hooks
from hijack_lens.language import RELATIONS
from hijack_lens.language.facts import fact_prompts
from hijack_lens.models import load_model

STRENGTHS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
TRIED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
N_FACTS = 30


def turned(model, carriers, case, strength):
    with hooks.steer(model, carriers, case.fact.context, strength=strength):
        return model(case.said)[0, -1]


def whole_heads(model, carriers, case, strength):
    with hooks.scale(model, carriers.heads, strength):
        return model(case.said)[0, -1]


def contrast(model, carriers, case, strength):
    """Logits with the context, less those without it (Shi et al. 2024, context-aware decoding)."""
    return strength * model(case.said)[0, -1] - (strength - 1) * model(case.alone)[0, -1]


def run_twice(model, carriers, case, strength):
    """What the heads wrote in a first run is added to what they write in a second (arXiv 2503.10996)."""
    names = sorted({f"blocks.{head.layer}.attn.hook_z" for head in carriers.heads})
    _, first = model.run_with_cache(case.said, names_filter=lambda name: name in names)

    def add(name):
        def hook_fn(z, hook):
            changed = z.clone()
            for head in carriers.heads:
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


def measured(model, carriers, cases, knob, strength):
    margins, context, weights = [], 0, 0
    for case in cases:
        logits = knob(model, carriers, case, strength)
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


def main():
    torch.set_grad_enabled(False)
    model = load_model("smollm2-135m")
    facts = RELATIONS["capital"].facts(seed=0)
    started = time.perf_counter()
    carriers = find_carriers(model, facts)
    seconds = time.perf_counter() - started
    print(carriers)
    chosen_on = prepared(model, facts)
    strengths = {"carriers": carriers.strength}
    for name, knob in KNOBS.items():
        if name != "carriers":
            shares = [measured(model, carriers, chosen_on, knob, at)["says_context"] for at in TRIED]
            strengths[name] = max(at for at, share in zip(TRIED, shares, strict=True) if share >= 0.95 * max(shares))
            print(name, dict(zip(TRIED, shares, strict=True)), "->", strengths[name], flush=True)
    rows = {}
    for relation, listed in RELATIONS.items():
        cases = prepared(model, listed.facts(seed=1)[:N_FACTS])
        row = {f"{at:g}": measured(model, carriers, cases, turned, at) for at in STRENGTHS}
        row |= {
            f"{name} at {strengths[name]:g}": measured(model, carriers, cases, knob, strengths[name])
            for name, knob in KNOBS.items()
            if name != "carriers"
        }
        rows[relation] = row
        print(
            relation,
            {name: (one["margin"], one["follows"], one["says_context"]) for name, one in row.items()},
            flush=True,
        )
        write(
            "knob",
            {
                "model": "SmolLM2-135M-Instruct",
                "heads": [str(head) for head in carriers.heads],
                "strength": carriers.strength,
                "seconds_to_find": round(seconds, 1),
                "relations": rows,
            },
        )


if __name__ == "__main__":
    main()
