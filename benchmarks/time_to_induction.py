"""Seconds until in-context accuracy 0.9, at the sizes for which the public code of Bietti et al. was timed."""

import time

from common import english, most_frequent, write

import hijack_lens as hl

REFERENCE = {64: 13.0, 128: 33.0}
"""Seconds that the public code takes on a machine of 2 cores: SGD, batch 64, d_model 128, 150 to 170 steps."""

language = english()
triggers = most_frequent(language, 5)
results = {}
for length, reference in REFERENCE.items():
    runs = []
    for seed in range(5):
        model = hl.trainable_transformer(language, seed=seed)
        config = hl.TrainConfig(
            triggers=triggers,
            length=length,
            seed=seed,
            steps=200,
            lr=1e-2,
            eval_lengths=(1,),
            eval_sequences=32,
            evaluate_every=10,
        )
        started = time.perf_counter()
        run = hl.train(model, language, config)
        total = time.perf_counter() - started
        accuracy = run.probe("in_context_accuracy")
        seconds = run.table.drop_duplicates("step").set_index("step")["seconds"]
        reached = accuracy[accuracy >= 0.9].index
        runs.append(
            {
                "seed": seed,
                "seconds_to_0.9": round(float(seconds[reached[0]]), 1) if len(reached) else None,
                "steps_to_0.9": int(reached[0]) if len(reached) else None,
                "seconds_in_all": round(total, 1),
                "curve": {int(step): round(float(value), 3) for step, value in accuracy.items()},
            }
        )
    slowest = max(run["seconds_to_0.9"] or float("inf") for run in runs)
    results[f"length {length}"] = {
        "reference_seconds": reference,
        "slowest_of_5_seeds": slowest,
        "ratio": round(reference / slowest, 2),
        "runs": runs,
    }
write("time_to_induction", results)
