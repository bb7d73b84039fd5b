"""A training step, beside the same model's step through HookedTransformer's own forward and loss."""

import statistics
import time

import torch
import torch.nn.functional as F
from common import english, most_frequent, write

import hijack_lens as hl
from hijack_lens.training.forward import PlainForward

BATCH = 64


def timed(step, tokens):
    started = time.perf_counter()
    loss = step(tokens)
    return time.perf_counter() - started, loss


results = {}
language = english()
triggers = most_frequent(language, 5)
for length in (64, 128, 256):
    model = hl.trainable_transformer(language, seed=0)
    forward = PlainForward(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

    def update(loss, optimizer=optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def plain(tokens, forward=forward, update=update):
        return update(F.cross_entropy(forward(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    def hooked(tokens, model=model, update=update):
        return update(model(tokens, return_type="loss"))

    times = {plain: [], hooked: []}
    worst = 0.0
    for repeat in range(12):
        tokens = language.sample(BATCH, length, triggers, seed=repeat).tokens
        losses = []
        for step in (plain, hooked):
            seconds, loss = timed(step, tokens)
            losses.append(loss)
            if repeat >= 2:
                times[step].append(seconds)
        worst = max(worst, abs(losses[0] - losses[1]))
    fast, slow = (statistics.median(times[step]) for step in (plain, hooked))
    results[f"length {length}"] = {
        "milliseconds": {"hijack_lens": round(1000 * fast, 1), "HookedTransformer": round(1000 * slow, 1)},
        "ratio": round(slow / fast, 2),
        "largest_loss_difference": worst,
    }
write("training_step", {"setting": {"batch": BATCH, "d_model": 128, "d_vocab": language.d_vocab}, **results})
