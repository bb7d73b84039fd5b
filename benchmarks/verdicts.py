"""Are the verdicts of `find_circuit` on SmolLM2-135M the same at five seeds, which draw other tokens, or undecided?

A verdict flips if a component is named at one seed and, with nothing said about doubt at either, not at another.
"""

import json
import time

import torch
from common import RESULTS, write

from hijack_lens import find_circuit
from hijack_lens.models import load_model

SEEDS, N_PROMPTS = 5, 8
ROLES = ("previous_token", "induction", "bigram")


def verdicts(evidence):
    """By role, what is said of each component that is named or undecided."""
    told = {}
    for role in ROLES:
        named, undecided = getattr(evidence.circuit, role), getattr(evidence, role).undecided
        said = {str(part): "undecided" for part in undecided}
        told[role] = {str(part): said.get(str(part), "named") for part in named} | said
    return told


def flips(rows):
    """Components that are named at one seed and plainly not at another."""
    found = {}
    for role in ROLES:
        told = [row["verdicts"][role] for row in rows]
        parts = sorted({part for one in told for part, said in one.items() if said == "named"})
        found[role] = [part for part in parts if not all(part in one for one in told)]
    return found


def main():
    torch.set_grad_enabled(False)
    file = RESULTS / "verdicts.json"
    rows = json.loads(file.read_text())["seeds"] if file.exists() else {}
    model = load_model("smollm2-135m")
    for seed in range(SEEDS):
        if str(seed) in rows:
            continue
        started = time.process_time()
        evidence = find_circuit(model, n_prompts=N_PROMPTS, seed=seed).evidence
        seconds = round(time.process_time() - started, 1)
        said = [evidence.verdict(role) for role in ROLES]
        rows[str(seed)] = {"cpu_seconds": seconds, "verdicts": verdicts(evidence), "said": said}
        rows[str(seed)]["mlp_draws"] = int(evidence.bigram.draws.sum())
        result = {"model": "SmolLM2-135M-Instruct", "n_prompts": N_PROMPTS, "seeds": rows}
        write("verdicts", result | {"flips": flips(list(rows.values()))})


if __name__ == "__main__":
    main()
