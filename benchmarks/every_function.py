"""Every public function that takes any model, on SmolLM2-135M with its default settings: how long, how much memory?

Each runs in a process of its own, on one thread, and is stopped after 300 CPU seconds or at 6 GiB. A function that is
public and not in the table below fails the run. Names of functions may be given; the others' results are kept.

    python benchmarks/every_function.py hooks.path_sweep hl.find_circuit
"""

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
sys.path.append(str(Path(__file__).parents[1]))

import torch
from common import RESULTS, write

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.core.circuit import Circuit
from hijack_lens.language import RELATIONS
from hijack_lens.models import load_model

SECONDS, GIBIBYTES = 300, 6
SAID = "The capital of France is London. The capital of France is"
CORRUPTED = SAID.replace("France", "Italy")
PAIR = SAID, CORRUPTED
ANSWERS = " London", " Paris"
MARGIN = hl.logit_diff(*ANSWERS)
HEAD, MLP = "L17H4", "L0MLP"
CIRCUIT = Circuit(
    previous_token=(hl.Component(16, "head", 0),),
    induction=(hl.Component(17, "head", 4),),
    bigram=(hl.Component(0, "mlp"),),
)


def facts() -> list[hl.Fact]:
    return RELATIONS["capital"].facts(seed=0)


def run_with(intervention: Callable[[Any], Any]) -> Callable[[Any], object]:
    """The model's run with an intervention."""

    def call(model: Any) -> object:
        with intervention(model):
            return model(SAID)

    return call


def steered(model: Any) -> hooks.Intervention:
    heads = (hl.Component(23, "head", 0), hl.Component(23, "head", 5))
    carriers = dataclasses.replace(hl.find_carriers(model, facts()), heads=heads)
    return hooks.steer(model, carriers, "London")


def doubled(z: torch.Tensor, hook: object) -> torch.Tensor:
    return 2 * z


CALLS: dict[str, dict[str, Callable[[Any], object]]] = {
    "hl.Metric.on": {"": lambda model: MARGIN.on(model)(model(SAID))},
    "hl.attribute": {
        "": lambda model: hl.attribute(model, SAID),
        "two answers": lambda model: hl.attribute(model, SAID, answers=ANSWERS),
    },
    "hl.attribute_scores": {"": lambda model: hl.attribute_scores(model, SAID, HEAD)},
    "hl.attribute_sources": {
        "": lambda model: hl.attribute_sources(model, SAID),
        "two answers, six carriers": lambda model: hl.attribute_sources(model, SAID, ANSWERS, carriers=6),
    },
    "hl.context_memory": {"": lambda model: hl.context_memory(model, SAID, HEAD)},
    "hl.dose_response": {"40 facts": lambda model: hl.dose_response(model, facts())},
    "hl.explain": {
        "": lambda model: hl.explain(model, SAID),
        "two answers": lambda model: hl.explain(model, SAID, *ANSWERS),
    },
    "hl.explore_runs": {"": lambda model: hl.explore_runs(model, *PAIR)},
    "hl.find_carriers": {"40 facts": lambda model: hl.find_carriers(model, facts())},
    "hl.find_circuit": {"": hl.find_circuit},
    "hl.memory_conflict": {"": lambda model: hl.memory_conflict(model, SAID, circuit=CIRCUIT)},
    "hl.memory_matrix": {
        "": lambda model: hl.memory_matrix(model, MLP),
        "the prompt's tokens": lambda model: hl.memory_matrix(
            model, "all", key_tokens=model.to_tokens(SAID)[0].unique(), value_tokens=model.to_tokens(SAID)[0].unique()
        ),
    },
    "hl.memory_neurons": {
        "": lambda model: hl.memory_neurons(model, MLP),
        "the last MLP": lambda model: hl.memory_neurons(model, "L29MLP"),
    },
    "hl.shapley": {
        "a circuit": lambda model: hl.shapley(model, SAID, MARGIN, CIRCUIT),
        "sixteen MLPs": lambda model: hl.shapley(model, SAID, MARGIN, [f"L{layer}MLP" for layer in range(16)]),
        "all components": lambda model: hl.shapley(model, SAID, MARGIN, "all"),
    },
    "hooks.Intervention": {
        "": run_with(lambda model: hooks.Intervention(model, [("blocks.0.attn.hook_z", doubled)])),
    },
    "hooks.ablate": {"": run_with(lambda model: hooks.ablate(model, HEAD))},
    "hooks.ablate_sweep": {
        "": lambda model: hooks.ablate_sweep(model, SAID, MARGIN),
        "every head": lambda model: hooks.ablate_sweep(model, SAID, MARGIN, "z"),
        "every neuron of an MLP": lambda model: hooks.ablate_sweep(model, SAID, MARGIN, "post", layers=20),
    },
    "hooks.attribution_patch": {"": lambda model: hooks.attribution_patch(model, *PAIR, MARGIN)},
    "hooks.edge_attribution": {"all edges": lambda model: hooks.edge_attribution(model, *PAIR, MARGIN, "all")},
    "hooks.patch": {"": run_with(lambda model: hooks.patch(model, HEAD, CORRUPTED))},
    "hooks.patch_path": {"": run_with(lambda model: hooks.patch_path(model, "L16H0", HEAD, "q", CORRUPTED))},
    "hooks.patch_sweep": {
        "": lambda model: hooks.patch_sweep(model, *PAIR, MARGIN),
        "every head": lambda model: hooks.patch_sweep(model, *PAIR, MARGIN, "z"),
    },
    "hooks.path_sweep": {
        "a circuit": lambda model: hooks.path_sweep(model, *PAIR, MARGIN, CIRCUIT),
        "200 of all edges": lambda model: hooks.path_sweep(model, *PAIR, MARGIN, "all", exact=200),
        "all edges": lambda model: hooks.path_sweep(model, *PAIR, MARGIN, "all"),
    },
    "hooks.scale": {"": run_with(lambda model: hooks.scale(model, HEAD, 2.0, source="London"))},
    "hooks.steer": {"with find_carriers": run_with(steered)},
    "memories.dual_model": {"": lambda model: hl.memories.dual_model(model, SAID, HEAD)},
    "probing.fact_prompts": {"": lambda model: hl.probing.fact_prompts(model, facts()[0])},
    "show.attention": {"": lambda model: hl.show.attention(model, SAID, HEAD)},
    "theory.Setting.of": {"": hl.theory.Setting.of},
}


def public() -> list[str]:
    """The public functions that take any model; results that hold one are none."""
    from tests.fuzz.surface import targets

    return [
        one.name
        for one in targets()
        if not dataclasses.is_dataclass(one.function)
        and any(parameter.name == "model" and parameter.annotation is Any for parameter in one.parameters)
    ]


def alone(model: Any, function: str, variant: str, said: str, send: Any) -> None:
    """In a process of its own: what one call takes. Its peak memory includes the model."""
    os.dup2(os.open(said, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES * 2**30, resource.RLIM_INFINITY))
    row: dict[str, Any] = {}
    try:
        with torch.no_grad():
            CALLS[function][variant](model)
    except (ValueError, TypeError) as error:
        row["refused"] = str(error)
    row["cpu_seconds"] = round(time.process_time(), 1)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    send.send(row)


def measured(model: Any, function: str, variant: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # so that each has the model at once
    receive, send = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r") as said:
        process = context.Process(target=alone, args=(model, function, variant, said.name, send))
        process.start()
        send.close()
        try:
            row = receive.recv()
        except EOFError:  # it was stopped, or has failed
            row = {"stopped": f"{SECONDS} CPU seconds or {GIBIBYTES} GiB were not enough, or it failed"}
        process.join()
        lines = [line for line in re.split(r"[\r\n]+", said.read()) if line.strip()]
    return row | ({"it said": lines[-1]} if lines else {})


def main(asked: list[str]) -> None:
    missing = sorted(set(public()) ^ set(CALLS))
    if missing:
        sys.exit(f"public and not in the table, or the reverse: {', '.join(missing)}")
    file = RESULTS / "every_function.json"
    rows = json.loads(file.read_text())["SmolLM2-135M"] if file.exists() else {}
    model = load_model("smollm2-135m")
    for function in asked or CALLS:
        for variant in CALLS[function]:
            name = f"{function}, {variant}" if variant else function
            rows[name] = measured(model, function, variant)
            print(name, rows[name], flush=True)
            write("every_function", {"SmolLM2-135M": {key: rows[key] for key in sorted(rows)}})


if __name__ == "__main__":
    main(sys.argv[1:])
