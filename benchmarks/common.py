"""What the benchmarks share: the language, the machine, and where results go."""

import json
import os
import platform
import warnings
from pathlib import Path

import torch
from scipy.stats import binomtest

import hijack_lens as hl
from hijack_lens.core.statistics import student_quantile
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig
from hijack_lens.models import load_model

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


def by_parts(name: str, parts: dict, asked: list[str]) -> None:
    """Runs the parts that are asked for, or all, on SmolLM2: each adds to the result, which keeps what others found."""
    torch.set_grad_enabled(False)
    file = RESULTS / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result = {"model": "SmolLM2-135M-Instruct"} | {key: value for key, value in result.items() if key != "machine"}
    model = load_model("smollm2-135m")
    for part in asked or parts:
        parts[part](model, result)
        write(name, result)


def mean_of(values, digits: int) -> dict:
    """A mean, with half its 95% interval (Student's)."""
    x = torch.as_tensor(values, dtype=torch.float64)
    reach = student_quantile(len(x) - 1) * float(x.std()) / len(x) ** 0.5
    return {"mean": round(float(x.mean()), digits), "interval": round(reach, digits)}


def share_of(flags: list[bool]) -> dict:
    """How many of them hold, with Wilson's 95% interval."""
    low, high = binomtest(sum(flags), len(flags)).proportion_ci(method="wilson")
    return {"share": round(sum(flags) / len(flags), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


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
