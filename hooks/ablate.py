"""Switch components off."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens._checks import as_generator, check_choice, check_count
from hijack_lens.hooks.intervention import HookFunction, Intervention, check_hook_points
from hijack_lens.hooks.site import Components, Part, Site, as_positions, read_source, some_sites


def ablate(
    model: Any,
    component: Components,
    how: Literal["zero", "mean", "resample"] = "zero",
    reference: object = None,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
    seed: int = 0,
) -> Intervention:
    """Switches components off: a context manager, whose `fwd_hooks` also fit `run_with_hooks`.

    A head's output is its `z`, so that the layer's bias `b_O` stays; an MLP's is its whole `mlp_out`, bias
    included.

    Args:
        model: a HookedTransformer or TransformerBridge.
        component: a `Component`, several (a role of a `Circuit`), or names of hook points.
        how: "zero" writes zeros; "mean" the mean over the reference prompts, position by position;
            "resample" what a reference prompt drawn for each prompt of the run has there, the same
            draw for all components.
        reference: prompts or a cache, as long as the run's prompts; for "mean" and "resample".
        positions: where to; by default everywhere. Negative ones count from the end. They count the tokens of one
            forward pass: with a key-value cache, the new ones alone.
        part: "output", or a head's attention "pattern".
        seed: of the draws for "resample".

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore, and where
            `reference` is missing or unused.
    """
    check_choice("how", how, ("zero", "mean", "resample"))
    if (reference is None) != (how == "zero"):
        need = "takes no reference" if how == "zero" else "needs reference="
        raise ValueError(f"how={how!r} {need}, got reference={reference!r:.60}")
    check_count("seed", seed)
    where = as_positions(positions)
    found = some_sites(model, component, part)
    check_hook_points(model, (site.name for site in found))
    stored = {} if how == "zero" else read_source(model, reference, [site.name for site in found], "reference")

    def hook_fn(site: Site) -> HookFunction:
        def switch_off(activation: Tensor, hook: Any) -> Tensor:
            current = site.read(activation)
            if how == "zero":
                value = torch.zeros_like(current)
            else:
                values = site.read(stored[site.name])
                if how == "mean":
                    value = values.mean(0, keepdim=True)
                else:
                    drawn = torch.randint(len(values), (len(current),), generator=as_generator(seed))
                    value = values[drawn.to(values.device)]
            return site.write(activation, value, where)

        return switch_off

    return Intervention(model, [(site.name, hook_fn(site)) for site in found])
