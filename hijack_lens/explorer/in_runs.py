"""The explorer of real runs: drag over a token, and see what patching or ablating there does."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_type
from hijack_lens.core.inputs import prompt_texts, single_prompt
from hijack_lens.core.tables import visible
from hijack_lens.explorer.page import Page
from hijack_lens.hooks import Sweep, ablate_sweep, patch_sweep
from hijack_lens.hooks.intervention import record
from hijack_lens.hooks.patched_runs import MetricLike
from hijack_lens.metrics import Metric


class RunExplorer(Page):
    """Two runs of a model, and what one token's activation is worth to the metric; from `explore_runs`.

    Args:
        patched: a `hooks.patch_sweep`, position by position, of one prompt, by whole activations, "denoise".
        ablated: a `hooks.ablate_sweep` of its clean prompt, likewise.

    Attributes:
        patched: the sweep of patches.
        ablated: the sweep of ablations.

    Raises:
        TypeError, ValueError: for other sweeps, and for two that do not go together.

    Examples:
        >>> explorer = hl.explore_runs(model, prompt.clean, prompt.corrupted, hl.metrics.margin(prompt))
        >>> explorer.values["intervention"], explorer.values["activation"], explorer.values["layer"]
        ('patch', 'resid_pre', 0)
        >>> f"{explorer.patched.corrupted:.2f} becomes {explorer.value:.2f}"
        '-16.39 becomes -9.83'
        >>> explorer.save("runs.html").name, type(explorer.widget).__name__
        ('runs.html', 'ExplorerWidget')
    """

    title = "Which token and layer carry the answer?"
    scripts = ("parts.js", "in_runs.js")

    def __init__(self, patched: Sweep, ablated: Sweep):
        for name, sweep, direction in (("patched", patched, "denoise"), ("ablated", ablated, "ablate")):
            check_type(name, sweep, Sweep)
            if sweep.direction != direction:
                raise ValueError(f"{name} must be a sweep of direction {direction!r}, got {sweep.direction!r}")
            if sweep.unit is not None or sweep.texts is None or sweep.positions != tuple(range(len(sweep.texts))):
                raise ValueError(f"{name} must be a sweep of one prompt at each of its positions, by whole activations")
        for name in ("metric", "layers", "positions", "clean"):
            theirs, ours = getattr(ablated, name), getattr(patched, name)
            same = math.isclose(theirs, ours, rel_tol=1e-4, abs_tol=1e-6) if name == "clean" else theirs == ours
            if not same:
                raise ValueError(f"ablated must have the {name} of patched, {ours!s:.80}, got {theirs!s:.80}")
        self.patched, self.ablated = patched, ablated
        self._sweeps = {"patch": patched, "ablate": ablated}
        largest = int(patched.effect[0].nan_to_num().abs().flatten().argmax())
        layer, position = divmod(largest, len(patched.positions))
        runs = {"clean": ablated, "corrupted": patched}
        super().__init__(
            {
                "metric": patched.metric,
                "texts": {name: [visible(text) for text in sweep.texts or ()] for name, sweep in runs.items()},
                "runs": {"clean": patched.clean, "corrupted": patched.corrupted},
                "sweeps": {name: _plain(sweep) for name, sweep in self._sweeps.items()},
            },
            {
                "intervention": "patch",
                "activation": patched.activations[0],
                "layer": patched.layers[layer],
                "position": position,
            },
        )

    @property
    def value(self) -> float:
        """The metric with the intervention that the page is set to."""
        chosen = self.values
        sweep = self._sweeps[chosen["intervention"]]
        activation, layer = sweep.activations.index(chosen["activation"]), sweep.layers.index(chosen["layer"])
        return float(sweep.values[activation, layer, chosen["position"]])

    def __repr__(self) -> str:
        return f"RunExplorer({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"


@analysis
def explore_runs(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike | None = None,
    activations: str | Sequence[str] | None = None,
    *,
    memory_gb: float = 0.25,
    prepend_bos: bool | None = None,
) -> RunExplorer:
    """Two prompts to drag over: at the token pointed at, the clean run's activation in the corrupted run, or none in
    the clean run, and what the metric then is.

    Everything is computed beforehand, by `hooks.patch_sweep` and `hooks.ablate_sweep`, so that the page needs no model,
    no kernel and no network. See `explore` for where it shows.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clean: a prompt: text, tokens, or a `HijackPrompt`.
        corrupted: another one of the same length.
        metric: as for `hooks.patch_sweep`; by default the logit of what the clean run says minus that of what the
            corrupted run says.
        activations: as for `hooks.patch_sweep`, but for those by head or neuron; by default as each sweep does.
        memory_gb: roughly how much memory the patched runs may take at a time.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: as for the two sweeps; for several prompts; and without a metric, where both runs say the
            same.

    Examples:
        >>> explorer = hl.explore_runs(model, prompt.clean, prompt.corrupted)
        >>> explorer.patched.metric, explorer.ablated.values.shape
        ("logit 'e' − logit 'u'", torch.Size([2, 2, 24]))
    """
    tokens = single_prompt(model, clean, "clean"), single_prompt(model, corrupted, "corrupted")
    if metric is None:
        first, second = (_answer(model, one) for one in tokens)
        if first == second:
            raise ValueError("metric must be given where both runs say the same: clean and corrupted do")
        names = prompt_texts(model, torch.tensor([first, second]))
        metric = Metric(
            "logit {!r} − logit {!r}".format(*names), lambda logits: logits[..., first] - logits[..., second]
        )
    patched = patch_sweep(model, *tokens, metric, activations, memory_gb=memory_gb)
    ablated = ablate_sweep(model, tokens[0], metric, activations, memory_gb=memory_gb)
    if ablated.texts is None:  # without a tokenizer, ids
        ablated, patched = (
            replace(sweep, texts=prompt_texts(model, one[0]))
            for sweep, one in zip((ablated, patched), tokens, strict=True)
        )
    return RunExplorer(patched, ablated)


def _answer(model: Any, tokens: Tensor) -> int:
    """The likeliest next token."""
    return int(record(model, tokens, [])[0][0, -1].argmax())


def _plain(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON: numbers by activation, layer and position; what was not scored is `None`."""
    values = [[[x if math.isfinite(x) else None for x in row] for row in table] for table in sweep.values.tolist()]
    return {"activations": list(sweep.activations), "layers": list(sweep.layers), "values": values}
