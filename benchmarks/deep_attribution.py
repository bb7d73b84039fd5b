"""Attribution in a model of GPT-2 small's shape, beside TransformerLens's own direct attribution, which does less.

TransformerLens decomposes the residual stream into embeddings, MLPs and heads, and projects each onto the answers'
directions; `hl.attribute` does that for every source position of each head, and follows two-hop paths besides. Peak
memory is measured in a process of its own for each.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from common import gpt2_small_shape, write

import hijack_lens as hl

N_ANSWERS = 100


def example(length):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (length,), generator=generator)
    answers = torch.randperm(50257, generator=generator)[:N_ANSWERS]
    heads = [hl.Component(layer, "head", head) for layer in (4, 5) for head in (1, 7)]
    return tokens, answers, hl.Circuit(tuple(heads[:2]), tuple(heads[2:]), (hl.Component(0, "mlp"),))


def ours(model, tokens, answers, circuit):
    return hl.attribute(model, tokens, circuit=circuit, answers=answers)


def theirs(model, tokens, answers, circuit):
    """Embeddings, MLPs and heads, by answer; biases aside."""
    _, cache = model.run_with_cache(tokens[None])
    parts = cache.decompose_resid(mode="mlp", pos_slice=-1, apply_ln=True)
    heads = cache.stack_head_results(pos_slice=-1, apply_ln=True)
    return torch.cat([parts, heads])[:, 0] @ model.W_U[:, answers]


def cached_forward(model, tokens, answers, circuit):
    return model.run_with_cache(tokens[None])[0]


METHODS = {"hijack_lens": ours, "TransformerLens": theirs, "one cached forward": cached_forward}


def alone(name, length):
    """For a process of its own: peak memory in MB, before and after one call."""

    def peak():
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    model, arguments = gpt2_small_shape(), example(length)
    before = peak()
    METHODS[name](model, *arguments)
    print(json.dumps({"model": before, "peak": peak()}))


def memory(length):
    peaks = {}
    for name in METHODS:
        command = [sys.executable, __file__, name, str(length)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def times(model, length, repeats=5):
    arguments = example(length)
    taken = {name: [] for name in METHODS}
    for _ in range(repeats + 1):
        for name, method in METHODS.items():
            started = time.perf_counter()
            method(model, *arguments)
            taken[name].append(time.perf_counter() - started)
    # The first round warms up.
    seconds = {name: statistics.median(runs[1:]) for name, runs in taken.items()}
    forward = seconds["one cached forward"]
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "in cached forwards": {
            name: round(value / forward, 2) for name, value in seconds.items() if name != "one cached forward"
        },
    }


def agreement(model, length):
    """How far our paths, summed over source positions, are from TransformerLens's parts; relative to the largest."""
    arguments = example(length)
    result, parts = ours(model, *arguments), theirs(model, *arguments)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    labels = [("embed", None), ("pos_embed", None)]
    labels += [(layer, None) for layer in range(n_layers)]
    labels += [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    summed = torch.zeros_like(parts)
    for path, value in zip(result.paths, result.by_path(), strict=True):
        if path.source != "biases":
            writer = path.through[-1] if path.through else None
            summed[labels.index((writer.layer, writer.head) if writer else (path.source, None))] += value
    # TransformerLens leaves the values' biases with the heads, as we do.
    return {
        "paths": len(result.paths),
        "completeness_error": result.completeness_error,
        "largest_relative_difference": float((summed - parts).abs().max() / parts.abs().max()),
    }


def main():
    # First, for on Linux a process starts with its parent's peak.
    peaks = memory(512)
    model = gpt2_small_shape()
    with torch.no_grad():
        write(
            "deep_attribution",
            {
                f"GPT-2 small's shape, random weights, {N_ANSWERS} answers": {
                    **{f"length {length}": times(model, length) for length in (256, 512)},
                    "against TransformerLens, length 256": agreement(model, 256),
                    "peak MB, length 512": peaks,
                }
            },
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with torch.no_grad():
            alone(sys.argv[1], int(sys.argv[2]))
    else:
        main()
