"""What the benchmarks share: the language, the machine, and where results go."""

import json
import os
import platform
import warnings
from pathlib import Path

import torch

import hijack_lens as hl
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig

RESULTS = Path(__file__).parent / "results"


def english() -> hl.BigramLanguage:
    return hl.BigramLanguage.from_text(hl.default_text())


def most_frequent(language: hl.BigramLanguage, count: int) -> list[str]:
    return [language.tokens[i] for i in language.pi_u.argsort(descending=True)[:count].tolist()]


def machine() -> dict:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def gpt2_small_shape():
    """A HookedTransformer of GPT-2 small's shape, with random weights."""
    cfg = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_head=64,
        d_mlp=3072,
        d_vocab=50257,
        n_ctx=1024,
        act_fn="gelu_new",
        normalization_type="LN",
        init_weights=False,  # TransformerLens's own takes more memory than what is measured here
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".w"):
            parameter.data.fill_(1.0)
        else:
            # Larger than usual, so that patterns are not uniform.
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return model
