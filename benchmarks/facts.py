"""How often a real language model must be told otherwise: facts of six relations, denied 0 to 4 times.

Is a better-known fact harder to deny, as the theory has it? And does the same statement of another subject, which says
nothing of the one that is asked for, hijack the answer?
"""

import torch
from common import write

from hijack_lens import dose_response
from hijack_lens.language import RELATIONS
from hijack_lens.language.facts import fact_prompts
from hijack_lens.models import load_model

REPEATS, SEED, DRAWS = 4, 11, 2000


def rank_correlation(x, y):
    """Spearman's, with the 95% interval of a bootstrap over facts."""
    generator = torch.Generator().manual_seed(0)

    def of(rows):
        ranks = [value[rows].argsort().argsort().double() for value in (x, y)]
        return torch.corrcoef(torch.stack(ranks))[0, 1]

    drawn = torch.stack([of(torch.randint(len(x), (len(x),), generator=generator)) for _ in range(DRAWS)])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return {"correlation": round(float(of(torch.arange(len(x)))), 3), "interval": [round(low, 3), round(high, 3)]}


def usable(model, facts):
    found = []
    for fact in facts:
        try:
            fact_prompts(model, fact, REPEATS)
            found.append(fact)
        except ValueError as error:
            print("left out:", error)
    return found


def distracted(model, facts):
    """How a statement of another subject moves each margin, in logits."""
    moved = []
    for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True):
        one = fact_prompts(model, fact, REPEATS)
        text = f"{fact.template.format(subject=other.subject, answer=fact.context)} {fact.query}"
        pair = one.context, one.weights
        margins = [model(tokens)[0, -1] for tokens in (one.tokens(0)[None], model.to_tokens(text))]
        before, after = (float(logits[pair[0]] - logits[pair[1]]) for logits in margins)
        moved.append((before, after))
    return torch.tensor(moved)


def main():
    torch.set_grad_enabled(False)
    model = load_model("smollm2-135m")
    rows, known, first = {}, [], []
    for name, relation in RELATIONS.items():
        facts = usable(model, relation.facts(SEED))
        margin = dose_response(model, facts, REPEATS).margin.total
        moved = distracted(model, facts)
        knows = margin[:, 0] < 0
        rows[name] = {
            "facts": len(facts),
            "known": round(float(knows.double().mean()), 3),
            "margin": [round(value, 2) for value in margin.mean(0).tolist()],
            "context_wins": [round(value, 3) for value in (margin[knows] > 0).double().mean(0).tolist()],
            "with_another_subjects_statement": {
                "margin": round(float(moved[:, 1].mean()), 2),
                "context_wins": round(float((moved[knows][:, 1] > 0).double().mean()), 3),
            },
            "known_better_against_margin_when_denied_once": rank_correlation(-margin[knows, 0], margin[knows, 1]),
            "known_better_against_rise": rank_correlation(-margin[knows, 0], margin[knows, 1] - margin[knows, 0]),
        }
        known.append(-margin[knows, 0])
        first.append(margin[knows, 1])
        print(name, rows[name], flush=True)
    both = {
        "known_better_against_margin_when_denied_once": rank_correlation(torch.cat(known), torch.cat(first)),
        "known_better_against_rise": rank_correlation(torch.cat(known), torch.cat(first) + torch.cat(known)),
    }
    write("facts", {"model": "SmolLM2-135M-Instruct", "relations": rows, "all": both})


if __name__ == "__main__":
    main()
