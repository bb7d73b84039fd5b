"""The default settings at five seeds: how well and how fast they learn, and how far beyond the training length."""

import time
from pathlib import Path

from common import english, most_frequent, write

import hijack_lens as hl

LENGTH = 128
language = english()
triggers = most_frequent(language, 5)


def trained(seed, **model_options):
    model = hl.trainable_transformer(language, seed=seed, **model_options)
    started = time.perf_counter()
    run = hl.train(model, language, hl.TrainConfig(triggers=triggers, length=LENGTH, seed=seed, steps=300, lr=1e-2))
    final = {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "in_context_accuracy": round(float(run.probe("in_context_accuracy").iloc[-1]), 4),
        "bigram_excess_nats": round(float(run.probe("bigram_excess").iloc[-1]), 4),
    }
    for probe in ("in_context_accuracy", "previous_token_attention"):
        lengths = [n for n in (LENGTH, 2 * LENGTH, 4 * LENGTH) if n <= model.cfg.n_ctx]
        final[f"{probe}_by_length"] = {n: round(float(run.probe(probe, length=n).iloc[-1]), 4) for n in lengths}
    final["curve"] = {int(s): round(float(v), 3) for s, v in run.probe("in_context_accuracy").items()}
    return final, run


relative = []
for seed in range(5):
    final, run = trained(seed)
    relative.append(final)
    print(final, flush=True)
    if seed == 0:
        run.picture().save(Path(__file__).parents[1] / "docs" / "birth_of_two_memories.png")
absolute, _ = trained(0, positions="absolute")
one_layer, _ = trained(0, n_layers=1)
write(
    "birth",
    {
        "setting": {"text": "default_text", "length": LENGTH, "triggers": triggers, "config": "TrainConfig defaults"},
        "relative": relative,
        "worst": {
            "in_context_accuracy": min(run["in_context_accuracy"] for run in relative),
            "bigram_excess_nats": max(run["bigram_excess_nats"] for run in relative),
            "seconds": max(run["seconds"] for run in relative),
        },
        "absolute": absolute,
        "one_layer": one_layer,
    },
)
