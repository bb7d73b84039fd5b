"""Training until formed: steps and seconds to in-context accuracy 0.97, and where each memory ends.

The language on which the counted steps fail at every seed; then others, one seed each: sharper and flatter, smaller and
larger, with one trigger, and with other positions. Names of cells may be given, to run only those.
"""

import sys
import time

from common import write

import hijack_lens as hl

LENGTH = 128


def case(d_vocab=50, concentration=0.3, n_triggers=5, positions="relative", seed=0):
    return {"d_vocab": d_vocab, "concentration": concentration, "n_triggers": n_triggers, "positions": positions,
            "seed": seed}  # fmt: skip


CASES = {
    **{f"V50 .3 seed {seed}": case(seed=seed) for seed in range(3)},
    "V20 .05": case(20, 0.05),
    "V50 .3 K1": case(n_triggers=1),
    "V100 1": case(100, 1.0),
    "V50 .3 rotary": case(positions="rotary"),
    "V50 .3 absolute": case(positions="absolute"),
}


def formed(d_vocab, concentration, n_triggers, positions, seed):
    language = hl.BigramLanguage.dirichlet(d_vocab, concentration, seed=99)
    model = hl.trainable_transformer(language, positions, seed=seed, n_ctx=LENGTH)
    config = hl.TrainConfig("frequent", LENGTH, seed, n_triggers=n_triggers, eval_lengths=(1,))
    started = time.perf_counter()
    run = hl.train(model, language, config)
    total = time.perf_counter() - started
    accuracy = run.probe("in_context_accuracy")
    seconds = run.table.drop_duplicates("step").set_index("step")["seconds"]
    reached = accuracy[accuracy >= 0.97].index
    return {
        "steps_to_0.97": int(reached[0]) if len(reached) else None,
        "seconds_to_0.97": round(float(seconds[reached[0]]), 1) if len(reached) else None,
        "forming_steps": run.forming_steps,
        "steps": run.step,
        "seconds": round(total, 1),
        "in_context_accuracy": round(float(accuracy.iloc[-1]), 4),
        "bigram_excess_nats": round(float(run.probe("bigram_excess").iloc[-1]), 4),
    }


results = {}
for name in sys.argv[1:] or CASES:
    results[name] = {**CASES[name], **formed(**CASES[name])}
    print(name, results[name], flush=True)
write("forming", {"setting": {"language": "dirichlet, seed 99", "length": LENGTH}, "runs": results})
