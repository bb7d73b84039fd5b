"""Attribution of every logit at one position of the two-layer model, beside TransformerLens's own, which does less.

TransformerLens decomposes the residual stream into embeddings, MLPs and heads, and projects each onto the whole
vocabulary; `hl.attribute` splits each of these further, by path and by source position.
"""

import statistics
import time

import torch
from common import english, write

import hijack_lens as hl

LENGTH, D_MODEL = 256, 256


def ours(model, tokens):
    return hl.attribute(model, tokens)


def theirs(model, tokens):
    """Embeddings, MLPs and heads, onto the vocabulary; biases aside."""
    _, cache = model.run_with_cache(tokens[None])
    parts = cache.decompose_resid(mode="mlp", pos_slice=-1, apply_ln=True)
    heads = cache.stack_head_results(pos_slice=-1, apply_ln=True)
    return torch.cat([parts, heads])[:, 0] @ model.W_U


def cached_forward(model, tokens):
    return model.run_with_cache(tokens[None])[0]


METHODS = {"hijack_lens": ours, "TransformerLens": theirs, "one cached forward": cached_forward}


def times(model, tokens, repeats=25):
    """Medians of runs that take turns, so that whatever else the machine does meets all methods alike."""
    taken = {name: [] for name in METHODS}
    for _ in range(repeats + 2):
        for name, method in METHODS.items():
            started = time.perf_counter()
            method(model, tokens)
            taken[name].append(time.perf_counter() - started)
    # The first rounds warm up.
    seconds = {name: statistics.median(runs[2:]) for name, runs in taken.items()}
    forward = seconds.pop("one cached forward")
    return {
        "ms": {name: round(1e3 * value, 2) for name, value in {**seconds, "one cached forward": forward}.items()},
        "in cached forwards": {name: round(value / forward, 2) for name, value in seconds.items()},
    }


def main():
    language = english()
    models = {
        "to be trained, relative positions": hl.trainable_transformer(language, d_model=D_MODEL, n_ctx=LENGTH, seed=0),
        "to be trained, absolute positions": hl.trainable_transformer(
            language, "absolute", d_model=D_MODEL, n_ctx=LENGTH, seed=0
        ),
        "written by hand": hl.associative_transformer(language, d_model=D_MODEL, n_ctx=LENGTH),
    }
    tokens = language.sample(1, LENGTH, seed=0).tokens[0]
    result = {}
    for name, model in models.items():
        attribution = ours(model, tokens)
        result[name] = {
            **times(model, tokens),
            "paths": len(attribution.paths),
            "completeness_error": attribution.completeness_error,
        }
    write("attribution", {f"length {LENGTH}, d_model {D_MODEL}, {language.d_vocab} logits": result})


if __name__ == "__main__":
    with torch.no_grad():
        main()
