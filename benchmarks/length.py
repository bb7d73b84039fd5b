"""Beyond the training length: evidence that lies within it, against evidence that lies wholly beyond it."""

import torch
from common import english, most_frequent, write

import hijack_lens as hl
from hijack_lens.training import behaviour

LENGTH = 128
language = english()
triggers = most_frequent(language, 5)


def without_triggers():
    """The language, triggers kept out: for the part of a sequence that holds no evidence."""
    allowed = torch.ones(language.d_vocab, dtype=torch.float64)
    allowed[language.trigger_ids(triggers)] = 0
    start = language.pi_u * allowed
    rows = language.pi_b * allowed
    return hl.BigramLanguage(rows / rows.sum(-1, keepdim=True), start / start.sum())


def late_evidence(seed=1):
    """Sequences of 4 T whose triggers first occur after position T."""
    quiet = without_triggers().sample(64, LENGTH, seed=seed).tokens
    rest = language.sample(64, 3 * LENGTH, triggers, seed=seed)
    tokens = torch.cat([quiet, rest.tokens], 1)
    predictable = torch.cat([torch.zeros_like(quiet, dtype=torch.bool), rest.predictable], 1)
    return hl.SampledSequences(tokens, predictable, rest.triggers, rest.continuations)


results = {}
for positions in ("relative", "absolute"):
    model = hl.trainable_transformer(language, positions, seed=0)
    run = hl.train(model, language, hl.TrainConfig(triggers=triggers, length=LENGTH, seed=0, steps=300, lr=1e-2))
    late = behaviour(model, late_evidence())
    results[positions] = {
        "at T": round(float(run.probe("in_context_accuracy").iloc[-1]), 4),
        "at 4 T": round(float(run.probe("in_context_accuracy", length=4 * LENGTH).iloc[-1]), 4),
        "at 4 T, all evidence after T": round(late["in_context_accuracy"], 4),
        "previous_token_attention at T": round(float(run.probe("previous_token_attention").iloc[-1]), 4),
        "previous_token_attention at 4 T": round(
            float(run.probe("previous_token_attention", length=4 * LENGTH).iloc[-1]), 4
        ),
    }
write("length", {"setting": {"length": LENGTH, "triggers": triggers, "seed": 0}, **results})
