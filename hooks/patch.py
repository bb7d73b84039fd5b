"""Replace what components compute by what they compute on another prompt."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hijack_lens.hooks.intervention import HookFunction, Intervention, check_hook_points
from hijack_lens.hooks.site import Components, Part, Site, as_positions, read_source, some_sites


def patch(
    model: Any,
    component: Components,
    source: object,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
) -> Intervention:
    """Activation patching: a context manager, whose `fwd_hooks` also fit `run_with_hooks`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        component: a `Component`, several (a role of a `Circuit`), or names of hook points.
        source: where the activations come from: a cache, or prompts to run once, now (with whatever hooks are
            active). As long as the run's prompts; as many, or one.
        positions: which positions to patch; by default all. Negative ones count from the end. They count
            the tokens of one forward pass: with a key-value cache, the new ones alone.
        part: "output", or a head's attention "pattern".

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore, and for a
            cache that lacks them.
    """
    where = as_positions(positions)
    found = some_sites(model, component, part)
    check_hook_points(model, (site.name for site in found))
    stored = read_source(model, source, [site.name for site in found], "source")

    def hook_fn(site: Site) -> HookFunction:
        def replace(activation: Tensor, hook: Any) -> Tensor:
            return site.write(activation, site.read(stored[site.name]), where)

        return replace

    return Intervention(model, [(site.name, hook_fn(site)) for site in found])
