"""Switch components off, or replace their activations with those from another prompt."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens.core.analysis import as_written
from hijack_lens.core.checks import Seed, as_generator, fixed_seed
from hijack_lens.core.hook_points import Part, Site, check_hook_points, sites
from hijack_lens.core.inputs import Components, components_of, indices
from hijack_lens.core.texts import texts_begin
from hijack_lens.hooks.intervention import HookFunction, Intervention, check_reference, draw_rows, read_source, stand_in


def ablate(
    model: Any,
    components: Components,
    how: Literal["zero", "mean", "resample"] = "zero",
    reference: object = None,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
    seed: Seed = 0,
    *,
    prepend_bos: bool | None = None,
) -> Intervention:
    """Switches components off: a context manager, whose `fwd_hooks` can also be given to `run_with_hooks`.

    A head's output is its `z`, so that the layer's bias `b_O` stays; an MLP's is its whole `mlp_out`, bias
    included.

    Args:
        model: a HookedTransformer or TransformerBridge.
        components: a `Component`, its place ("L0H1", "L2MLP"), a role of `model.circuit` ("induction"), or the name of
            a hook point; several of these, or a mapping to them; a `Circuit`; or "all" heads and MLPs.
        how: "zero" writes zeros; "mean" writes the mean over the reference prompts, position by position;
            "resample" writes what a reference prompt has there, drawn for each prompt of the run, with the
            same draw for all components.
        reference: prompts or a cache, as long as the run's prompts; for "mean" and "resample".
        positions: which to ablate; by default all. Negative ones count from the end. They refer to the tokens of one
            forward pass: with a key-value cache, only the new ones.
        part: "output", or a head's attention "pattern".
        seed: the seed of the draws for "resample".
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore, and where
            `reference` is missing or unused.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> with hl.hooks.ablate(model, "induction"):
        ...     print(f"{margin(model(prompt.tokens[None])):.2f}")
        -6.58
        >>> print(f"{margin(model(prompt.tokens[None])):.2f}")
        3.27
    """
    model = as_written(model)
    check_reference(how, reference)
    of_every_run = fixed_seed(seed)

    def value(current: Tensor, stored: Tensor) -> Tensor:
        return stand_in(how, stored, draw_rows(how, len(stored), len(current), as_generator(of_every_run)))

    source = None if how == "zero" else ("reference", reference)
    with texts_begin(prepend_bos):
        return _overwriting(model, components, part, positions, source, value)


def patch(
    model: Any,
    components: Components,
    source: object,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
    *,
    prepend_bos: bool | None = None,
) -> Intervention:
    """Activation patching: a context manager, whose `fwd_hooks` can also be given to `run_with_hooks`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        components: as for `ablate`.
        source: where the activations come from: a cache, or prompts to run once, now (with whatever hooks are
            active). Its prompts are as long as the run's, and as many, or just one.
        positions: which positions to patch; by default all. Negative ones count from the end. They refer to
            the tokens of one forward pass: with a key-value cache, only the new ones.
        part: "output", or a head's attention "pattern".
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore, and for a
            cache that lacks them.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> with hl.hooks.patch(model, "induction", source=prompt.corrupted):
        ...     print(f"{margin(model(prompt.clean[None])):.2f}")
        -16.39
    """
    with texts_begin(prepend_bos):
        return _overwriting(
            as_written(model), components, part, positions, ("source", source), lambda current, stored: stored
        )


def _overwriting(
    model: Any,
    components: Any,
    part: Part,
    positions: Any,
    source: tuple[str, object] | None,
    value: Callable[[Tensor, Tensor], Tensor],
) -> Intervention:
    """Overwrites components with `value` of their current and `source` activations; without a source, with zeros."""
    where = None if positions is None else indices("positions", positions)
    if components is None:
        raise TypeError("components must be given, got None")
    found = sites(model, components_of(model, components, points=True), part)
    names = [site.name for site in found]
    check_hook_points(model, names)
    stored = None if source is None else read_source(model, source[1], names, source[0])

    def hook_fn(site: Site) -> HookFunction:
        def overwrite(activation: Tensor, hook: Any) -> Tensor:
            current = site.read(activation)
            written = torch.zeros_like(current) if stored is None else value(current, site.read(stored[site.name]))
            return site.write(activation, written, where)

        return overwrite

    return Intervention(model, [(site.name, hook_fn(site)) for site in found])
