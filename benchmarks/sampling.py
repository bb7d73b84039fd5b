"""Tokens sampled per second, beside a Python sampler of the same process that works one sequence at a time."""

import statistics
import time

import numpy as np
from common import english, most_frequent, write

LENGTH, TRIGGERS, BATCH = 256, 5, 1024


def one_by_one(pi_b, pi_u, triggers, length, n_sequences, rng):
    """The process, written the obvious way: a loop over sequences and tokens."""
    d_vocab = len(pi_u)
    sequences = []
    for _ in range(n_sequences):
        follows = {trigger: int(rng.integers(d_vocab)) for trigger in triggers}
        sequence = [int(rng.choice(d_vocab, p=pi_u))]
        while len(sequence) < length:
            last = sequence[-1]
            sequence.append(follows[last] if last in follows else int(rng.choice(d_vocab, p=pi_b[last])))
        sequences.append(sequence)
    return sequences


language = english()
triggers = most_frequent(language, TRIGGERS)
ids = language.trigger_ids(triggers).tolist()
pi_b, pi_u = language.pi_b.numpy(), language.pi_u.numpy()
rng = np.random.default_rng(0)
language.sample(8, LENGTH, triggers, seed=0)  # builds the table that later calls reuse
ours, theirs = [], []
for repeat in range(5):
    started = time.perf_counter()
    language.sample(BATCH, LENGTH, triggers, seed=repeat)
    ours.append(BATCH * LENGTH / (time.perf_counter() - started))
    started = time.perf_counter()
    one_by_one(pi_b, pi_u, ids, LENGTH, 8, rng)
    theirs.append(8 * LENGTH / (time.perf_counter() - started))
fast, slow = statistics.median(ours), statistics.median(theirs)
write(
    "sampling",
    {
        "setting": {"d_vocab": language.d_vocab, "length": LENGTH, "triggers": TRIGGERS, "batch": BATCH},
        "tokens_per_second": {"hijack_lens": round(fast), "one_sequence_at_a_time": round(slow)},
        "ratio": round(fast / slow, 1),
    },
)
