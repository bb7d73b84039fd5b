"""What one TransformerLens wrote, another reads: the same logits to the bit, and a training goes on to the bit.

python tests/across_versions.py write FOLDER    # in one environment
python tests/across_versions.py read FOLDER     # in another, on the same machine
"""

import itertools
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import hijack_lens as hl

LANGUAGE = hl.BigramLanguage.dirichlet(9, 0.4, seed=0)
TOKENS = LANGUAGE.sample(3, 20, seed=1).tokens
TRAINABLE = {
    "relative": {},
    "absolute": {"positions": "absolute", "norm": "LN"},
    "rotary": {"positions": "rotary", "norm": "RMS", "n_heads": 2},
    "none": {"positions": "none", "n_layers": 3, "mlp": "linear"},
    "attention alone": {"mlp": None, "dtype": torch.float32},
}


def models():
    """A model of each kind, with no weight at 0."""
    for positions in ("relative", "absolute"):
        for dtype in (torch.float32, torch.float64):
            yield hl.associative_transformer(LANGUAGE, positions=positions, n_ctx=24, dtype=dtype)
    for options in TRAINABLE.values():
        sizes = {"d_model": 16, "n_ctx": 24, "dtype": torch.float64}
        model = hl.trainable_transformer(LANGUAGE, **{**sizes, **options})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
        yield model


def training(out, stop_after=None):
    """A training, from the start or from where Ctrl-C stopped it."""
    model = hl.trainable_transformer(LANGUAGE, d_model=16, n_ctx=32)
    config = hl.TrainConfig(triggers=(0, 1), length=16, seed=0, steps=30, batch_size=8, eval_sequences=4)
    steps = itertools.count(1)
    hook = register_optimizer_step_post_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if next(steps) == stop_after else None
    )
    try:
        return hl.train(model, LANGUAGE, config, out=out)
    finally:
        hook.remove()


def facts(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    return {"logits": logits, **{name: activation.contiguous() for name, activation in cache.items()}}


def write(folder):
    for index, model in enumerate(models()):
        model.save_pretrained(folder / f"model-{index}")
        save_file({k: v.clone() for k, v in facts(model).items()}, folder / f"facts-{index}.safetensors")
        torch.save(model.state_dict(), folder / f"state-{index}.pt")
    assert training(folder / "stopped", stop_after=10).step == 10
    training(folder / "whole")


def read(folder):
    for index, fresh in enumerate(models()):
        expected = load_file(folder / f"facts-{index}.safetensors")
        loaded = hl.BigramTransformer.from_pretrained(folder / f"model-{index}")
        state = torch.load(folder / f"state-{index}.pt")
        drawn = fresh.state_dict()
        assert list(drawn) == list(state), "parameters have other names or another order"
        assert all(torch.equal(drawn[name], value) for name, value in state.items()), "a seed gives another model"
        fresh.load_state_dict(state)
        for model in (loaded, fresh):
            found = facts(model)
            assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
            different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
            assert not different, f"model {index} differs at {different}"
    resumed, whole = (dict(training(folder / name).model.named_parameters()) for name in ("stopped", "whole"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items()), "the resumed training differs"


if __name__ == "__main__":
    what, where = sys.argv[1:]
    {"write": write, "read": read}[what](Path(where))
    print(f"{what}: done with transformer-lens {version('transformer-lens')}")
