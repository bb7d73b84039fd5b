"""What training reaches by default on bigram languages of many kinds: steps, seconds, and where each memory ends.

Each row differs from the first in what its name says. Names of rows may be given, to run only those; results are kept
row by row, so that a run that was stopped goes on.
"""

import json
import sys
import time

from common import RESULTS, english, write

import hijack_lens as hl

SEEDS = 10  # of the language on which counted steps at a rate of 1e-2 fail

ROWS = {
    **{f"V 50, Dirichlet .3, 5 frequent, length 128, relative: seed {seed}": {"seed": seed} for seed in range(SEEDS)},
    "Dirichlet .05": {"concentration": 0.05},
    "Dirichlet 1": {"concentration": 1.0},
    "Dirichlet 10": {"concentration": 10.0},
    "V 20": {"d_vocab": 20},
    "V 20, Dirichlet .05": {"d_vocab": 20, "concentration": 0.05},
    "V 100": {"d_vocab": 100},
    "V 100, Dirichlet 1": {"d_vocab": 100, "concentration": 1.0},
    "V 100, Dirichlet 10": {"d_vocab": 100, "concentration": 10.0},
    "V 200": {"d_vocab": 200},
    "V 200, Dirichlet 10": {"d_vocab": 200, "concentration": 10.0},
    "1 frequent": {"n_triggers": 1},
    "V 100, 1 frequent": {"d_vocab": 100, "n_triggers": 1},
    "5 rare": {"triggers": "rare"},
    "V 100, 5 rare": {"d_vocab": 100, "triggers": "rare"},
    "length 64": {"length": 64},
    "length 256": {"length": 256},
    "rotary": {"positions": "rotary"},
    "absolute": {"positions": "absolute"},
    "English, characters": {"level": "char"},
    "English, 500 words": {"level": "word"},
    "5 random": {"triggers": "random"},
    "V 20, 5 random": {"d_vocab": 20, "triggers": "random"},
}


def trained(
    d_vocab=50,
    concentration=0.3,
    triggers="frequent",
    n_triggers=5,
    length=128,
    positions="relative",
    level=None,
    seed=0,
):
    language = hl.BigramLanguage.dirichlet(d_vocab, concentration, seed=99)
    if level == "char":
        language = english()
    elif level == "word":
        language = hl.BigramLanguage.from_text(hl.default_text(), level="word", max_vocab=500)
    model = hl.trainable_transformer(language, positions, seed=seed, n_ctx=length)
    config = hl.TrainConfig(triggers, length, seed, n_triggers=n_triggers, eval_lengths=(1,))
    started = time.perf_counter()
    run = hl.train(model, language, config)
    total = time.perf_counter() - started
    accuracy, formed = run.probe("formed_accuracy"), run.formed
    seconds = run.table.drop_duplicates("step").set_index("step")["seconds"]
    reached = accuracy[accuracy >= 0.97 * formed.best].index
    return {
        "formed": bool(formed),
        "in_context_accuracy": round(formed.accuracy, 4),
        "best_possible": round(formed.best, 4),
        "without_order": round(formed.shortcut, 4),
        "nats_lost_without_previous_token_head": round(formed.order, 3),
        "bigram_excess_nats": round(formed.excess, 4),
        "steps_to_0.97_of_best": int(reached[0]) if len(reached) else None,
        "seconds_to_0.97_of_best": round(float(seconds[reached[0]]), 1) if len(reached) else None,
        "forming_steps": run.forming_steps,
        "steps": run.step,
        "seconds": round(total, 1),
        "cause": formed.cause,
    }


stored = RESULTS / "forming.json"
rows = json.loads(stored.read_text())["rows"] if stored.exists() else {}
for name in sys.argv[1:] or ROWS:
    if name not in rows or sys.argv[1:]:
        rows[name] = trained(**ROWS[name])
        write("forming", {"languages": "dirichlet, seed 99", "rows": {row: rows[row] for row in ROWS if row in rows}})
