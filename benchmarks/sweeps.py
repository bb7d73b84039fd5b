"""A patching sweep, beside TransformerLens's own loop over the same patches.

The loop runs one forward pass per patch. On the two-layer model it is run in full; on the 12-layer model on a random
sample of the patches, its time scaled up to all of them, and the values compared on the sample.
"""

import resource
import statistics
import time

import pandas as pd
import torch
from common import english, gpt2_small_shape, write
from transformer_lens import patching

import hijack_lens as hl
from hijack_lens import hooks


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def lens_loop(model, clean, corrupted, metric, name, setter, index):
    _, cache = model.run_with_cache(clean, names_filter=lambda hook: hook.endswith(f"hook_{name}"))
    return patching.generic_activation_patch(model, corrupted, cache, metric, setter, name, index_df=index)


def relative_error(ours, theirs, base):
    return float((ours - theirs).abs().max() / (theirs - base).abs().max())


def two_layers(length=256, repeats=5):
    model = hl.trainable_transformer(english(), d_model=256, n_ctx=length, seed=0)
    clean, corrupted = (torch.randint(model.cfg.d_vocab, (1, length), generator=generator) for _ in range(2))
    metric = hl.logit_diff(3, 4)
    parts = {"attn_out": (0, 1), "mlp_out": (1,)}

    def ours():
        return {
            name: hooks.patch_sweep(model, clean, corrupted, metric, name, layers=layers)
            for name, layers in parts.items()
        }

    def together():
        return hooks.patch_sweep(model, clean, corrupted, metric, list(parts))

    def theirs():
        return {
            name: lens_loop(
                model,
                clean,
                corrupted,
                metric,
                name,
                patching.layer_pos_patch_setter,
                pd.DataFrame([(layer, pos) for layer in layers for pos in range(length)], columns=["layer", "pos"]),
            )
            for name, layers in parts.items()
        }

    model(corrupted), together()
    forward = statistics.median(timed(lambda: model(corrupted))[0] for _ in range(4 * repeats))
    before = peak_mb()
    loop, by_loop = timed(theirs)
    after_loop = peak_mb()
    sweep = statistics.median(timed(together)[0] for _ in range(repeats))
    after_sweep = peak_mb()
    values = ours()
    return {
        "patches": 3 * length,
        "seconds": {
            "hijack_lens": round(sweep, 4),
            "TransformerLens": round(loop, 2),
            "one forward": round(forward, 4),
        },
        "ratio": round(loop / sweep),
        "sweep in forward passes": round(sweep / forward, 1),
        "largest_relative_difference": max(
            relative_error(values[name].values.flatten(), by_loop[name], values[name].base) for name in parts
        ),
        "peak_mb": {
            "start": round(before),
            "TransformerLens": round(after_loop),
            "then hijack_lens": round(after_sweep),
        },
    }


def twelve_layers(length=64, sample=60):
    model = gpt2_small_shape()
    clean, corrupted = (torch.randint(model.cfg.d_vocab, (1, length), generator=generator) for _ in range(2))
    metric = hl.logit_diff(3, 4)
    # One third of the sample at the last position, where the large effects are.
    at = torch.stack([torch.randint(size, (sample,), generator=generator) for size in (12, length, 12)], 1)
    at[: sample // 3, 1] = length - 1
    index = pd.DataFrame(at.tolist(), columns=["layer", "pos", "head"])
    model(corrupted)
    before = peak_mb()
    loop, by_loop = timed(
        lambda: lens_loop(model, clean, corrupted, metric, "z", patching.layer_pos_head_vector_patch_setter, index)
    )
    after_loop = peak_mb()
    sweep, result = timed(lambda: hooks.patch_sweep(model, clean, corrupted, metric, "z"))
    after_sweep = peak_mb()
    patches = result.values.numel()
    scaled = loop * patches / sample
    layers, positions, heads = at.T
    return {
        "patches": patches,
        "seconds": {
            "hijack_lens": round(sweep, 1),
            f"TransformerLens, {sample} patches": round(loop, 1),
            "TransformerLens, scaled to all": round(scaled),
        },
        "ratio": round(scaled / sweep, 1),
        "largest_relative_difference": relative_error(result.values[0, layers, positions, heads], by_loop, result.base),
        "peak_mb": {
            "start": round(before),
            "TransformerLens": round(after_loop),
            "then hijack_lens": round(after_sweep),
        },
    }


generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    write(
        "sweeps",
        {
            "two layers, d_model 256, length 256: both attn_out, mlp_out": two_layers(),
            "GPT-2 small's shape, random weights, length 64: z of every head": twelve_layers(),
        },
    )
