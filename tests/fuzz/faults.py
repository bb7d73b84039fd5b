"""Faults at random lines of every analysis: an exception or a Ctrl-C anywhere leaves nothing of the user's changed.

    python tests/fuzz/faults.py 2000

A third of the faults strike in any line of Python that runs (PyTorch's and TransformerLens's too), a third in the
library's, a third in the code that restores. The first line of an `__exit__` cannot be guarded by Python code; nor are
faults let loose inside the `__exit__` of PyTorch's own contexts.
"""

import argparse
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults_for_tests import OURS, Fault, FaultError
from test_states import ANALYSES, CLEAN, hooked, with_dropout

PLACES = {
    "anywhere": ("",),
    "library": OURS,
    "restoring": ("core/analysis.py", "core/hook_points.py", "core/texts.py", "hooks/intervention.py"),
}


def state(model):
    """All that is the user's, by name."""
    wrapped = getattr(model, "original_model", model)
    modules = list(dict.fromkeys((*model.modules(), *wrapped.modules())))
    return {
        "hooks": [[id(hook) for hook in m._forward_hooks.values()] for m in modules],
        "listed hooks": [[id(h.user_hook) for h in point.fwd_hooks] for point in model.hook_dict.values()],
        "flags": [m.training for m in modules],
        "weights": [float(p.detach().sum()) for p in model.parameters()],
        "gradients": [(p.requires_grad, None if p.grad is None else float(p.grad.sum())) for p in model.parameters()],
        "config": str(sorted((k, repr(v)) for k, v in vars(model.cfg).items())),
        "seeds": (torch.get_rng_state().sum().item(), hash(random.getstate()), np.random.get_state()[1].sum()),  # noqa: NPY002
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._dynamo.eval_frame._stance.stance),
    }


def models():
    """Two models as they might be found: with a hook of the user's and gradients, one of them training."""
    training = with_dropout().train()
    training.blocks[1].mlp.eval()
    for model in (plain := hooked("LN"), training):
        model.hook_dict["blocks.0.attn.hook_z"].add_hook(lambda z, hook: z)
        model(CLEAN).sum().backward()
    return plain, training


def strike(model, name, place, error, generator):
    """One fault in one analysis: where it struck, and what was not as before."""
    before = state(model)
    with Fault(PLACES[place]) as counted:
        try:
            ANALYSES[name](model)
        except RuntimeError as found:  # transformers may keep what a fault in the midst of it has left
            return "the fault before", [f"the model's own library: {found!r:.120}"]
    fault = Fault(PLACES[place], generator.randint(1, counted.lines), error)
    try:
        with fault:
            ANALYSES[name](model)
    except BaseException as found:
        # `from None` may hide it behind an error of the library's; any other is a finding.
        if not isinstance(found, (error, ValueError, TypeError)):
            return fault.where, [f"raised {found!r:.80}"]
    after = state(model)
    return fault.where, [key for key in before if before[key] != after[key]]


def run(count, seed=0, progress=True):
    """Strikes `count` times; the findings, by what was left changed."""
    generator, kept = random.Random(seed), models()
    findings = []
    for n in tqdm(range(count), unit="fault", disable=not progress):
        index, name = generator.randrange(len(kept)), generator.choice(list(ANALYSES))
        place, error = generator.choice(list(PLACES)), generator.choice([KeyboardInterrupt, FaultError])
        where, changed = strike(kept[index], name, place, error, generator)
        if changed:
            findings.append((n, name, error.__name__, where, changed))
            kept = models()
    return findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = run(given.count, given.seed)
    for one in found:
        print(*one)
    print(f"{given.count} faults, {len(found)} left something changed: {dict(Counter(k for f in found for k in f[4]))}")
    sys.exit(bool(found))
