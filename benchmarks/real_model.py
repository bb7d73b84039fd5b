"""What sweeps and searches cost on SmolLM2-135M, in forward passes of the same prompt, and whether they are right.

Times are CPU seconds, so that other work on the machine does not count. The prompt has 13 tokens; the 16 components are
drawn by a seed. Exact sweeps are compared with whole runs of the model, edge by edge, on a sample of their edges.
"""

import statistics
import time

import torch
from common import write

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.models import load_model

COMPONENTS, COMPARED, EXACT = 16, 20, 200


def timed(function):
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def some_components(model, count, generator):
    per_layer = model.cfg.n_heads + 1
    chosen = torch.randperm(model.cfg.n_layers * per_layer, generator=generator)[:count].tolist()
    places = [divmod(index, per_layer) for index in chosen]
    return [
        hl.Component(layer, "mlp") if head == model.cfg.n_heads else hl.Component(layer, "head", head)
        for layer, head in places
    ]


def difference(model, sweep, clean, corrupted, metric, generator):
    """The largest difference from whole runs, over edges that hook points reach, and the largest effect among them."""
    reached = [index for index, edge in enumerate(sweep.edges) if edge.via not in ("k", "v")]
    chosen = [reached[i] for i in torch.randperm(len(reached), generator=generator)[:COMPARED].tolist()]
    bound = metric.on(model)
    errors = []
    for index in chosen:
        edge = sweep.edges[index]
        with hooks.patch_path(model, edge.sender, edge.receiver, edge.via, clean):
            errors.append(abs(float(bound(model(corrupted))) - float(sweep.values[index])))
    return {"largest_difference": max(errors), "largest_effect": float(sweep.effect[chosen].abs().max())}


def main():
    model, generator = load_model("smollm2-135m"), torch.Generator().manual_seed(0)
    clean, corrupted = (
        model.to_tokens(f"The capital of {country} is London. The capital of {country} is", prepend_bos=True)
        for country in ("France", "Italy")
    )
    metric = hl.logit_diff(" London", " Paris")
    model(clean)
    forward = statistics.median(timed(lambda: model(clean))[0] for _ in range(15))

    def cost(seconds):
        return {"seconds": round(seconds, 2), "forward passes": round(seconds / forward, 1)}

    pair, some = (model, clean, corrupted, metric), some_components(model, COMPONENTS, generator)
    rows = {"one forward": {"seconds": round(forward, 3)}}
    fewer = ("q", "mlp_in", "unembed")
    for name, via in (("q, mlp_in, unembed", fewer), ("all inputs", hooks.edges.VIAS)):
        seconds, sweep = timed(lambda via=via: hooks.path_sweep(*pair, some, via=via))
        row = cost(seconds) | difference(model, sweep, clean, corrupted, metric, generator)
        rows[f"path_sweep, {len(sweep.edges)} edges of {COMPONENTS} components, {name}"] = row
        seconds, sweep = timed(lambda via=via: hooks.edge_attribution(*pair, "all", via=via))
        rows[f"edge_attribution, all {len(sweep.edges)} edges, {name}"] = cost(seconds)
    seconds, sweep = timed(lambda: hooks.path_sweep(*pair, "all", exact=EXACT))
    largest = float((sweep.screen.values - sweep.base).abs().max())
    rows[f"path_sweep, {EXACT} of all {sweep.screen.n_edges} edges, and 100 of the others"] = cost(seconds) | {
        "largest effect of the first": float(sweep.effect.abs().max()),
        "of the others": largest,
        "others beyond that, at most": sweep.missed(largest),
    }
    seconds, sweep = timed(lambda: hooks.patch_sweep(*pair))
    rows[f"patch_sweep, {' x '.join(map(str, sweep.values.shape))}"] = cost(seconds)
    seconds, _ = timed(lambda: hl.memory_neurons(model, "L0MLP"))
    rows["memory_neurons, all of L0MLP, all tokens as keys"] = cost(seconds)
    for n_prompts in (8, 32):
        seconds, circuit = timed(lambda n_prompts=n_prompts: hl.find_circuit(model, n_prompts=n_prompts))
        rows[f"find_circuit, {n_prompts} prompts"] = {
            "seconds": round(seconds, 1),
            "found": {role: [str(part) for part in getattr(circuit, role)] for role in hl.circuits.evidence.ROLE_NAMES},
        }
    write("real_model", {"SmolLM2-135M, a prompt of 13 tokens": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
