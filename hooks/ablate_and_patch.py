"""Switch components off, or replace what they compute by what they compute on another prompt."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_choice, fixed_seed
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import Part, Site, check_hook_points, position_index, sites
from hijack_lens.core.inputs import Components, components_of, indices, one_component
from hijack_lens.hooks.edges import VIAS, Via, check_edge, into_stream, read_stream, read_weights, sender_site
from hijack_lens.hooks.intervention import (
    HookFunction,
    Intervention,
    check_reference,
    draw_rows,
    read_source,
    stand_in,
)
from hijack_lens.models.linear_maps import normed


def ablate(
    model: Any,
    components: Components,
    how: Literal["zero", "mean", "resample"] = "zero",
    reference: object = None,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
    seed: Seed = 0,
) -> Intervention:
    """Switches components off: a context manager, whose `fwd_hooks` also fit `run_with_hooks`.

    A head's output is its `z`, so that the layer's bias `b_O` stays; an MLP's is its whole `mlp_out`, bias
    included.

    Args:
        model: a HookedTransformer or TransformerBridge.
        components: a `Component`, its place ("L0H1", "L2MLP"), a role of `model.circuit` ("induction"), or the name of
            a hook point; several of these, or a mapping to them; a `Circuit`; or "all" heads and MLPs.
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
    check_reference(how, reference)
    of_every_run = fixed_seed(seed)

    def value(current: Tensor, stored: Tensor) -> Tensor:
        return stand_in(how, stored, draw_rows(how, len(stored), len(current), as_generator(of_every_run)))

    source = None if how == "zero" else ("reference", reference)
    return _overwriting(model, components, part, positions, source, value)


def patch(
    model: Any,
    components: Components,
    source: object,
    positions: int | Iterable[int] | None = None,
    part: Part = "output",
) -> Intervention:
    """Activation patching: a context manager, whose `fwd_hooks` also fit `run_with_hooks`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        components: as for `ablate`.
        source: where the activations come from: a cache, or prompts to run once, now (with whatever hooks are
            active). As long as the run's prompts; as many, or one.
        positions: which positions to patch; by default all. Negative ones count from the end. They count
            the tokens of one forward pass: with a key-value cache, the new ones alone.
        part: "output", or a head's attention "pattern".

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore, and for a
            cache that lacks them.
    """
    return _overwriting(model, components, part, positions, ("source", source), lambda current, stored: stored)


def _overwriting(
    model: Any,
    components: Any,
    part: Part,
    positions: Any,
    source: tuple[str, object] | None,
    value: Callable[[Tensor, Tensor], Tensor],
) -> Intervention:
    """Writes over components, from their current and their `source`'s activation; zeros, without a source."""
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


def patch_path(
    model: Any,
    sender: Component | str | tuple[Component, ...],
    receiver: Component | str | tuple[Component, ...],
    via: Via,
    source: object = None,
    positions: int | Iterable[int] | None = None,
) -> Intervention:
    """Replaces what `sender` writes into one input of `receiver`, along the residual stream alone.

    Everything else that reads the sender sees what it computes in the run itself; what the receiver then
    computes flows on to all that follows. Norms are computed anew for the changed input.

    Args:
        model: a HookedTransformer or TransformerBridge.
        sender: a head or MLP: a `Component`, its place ("L0H1"), or a role that has just one; "embed" or "pos_embed".
        receiver: a head or MLP after the sender, likewise; or "unembed".
        via: the receiver's input: "q", "k" or "v" of a head, "mlp_in" of an MLP (of a gated one, gate included), or
            "unembed".
        source: where the sender's output comes from: a cache, or prompts to run once, now; `None` cuts the
            edge, as if the sender wrote zeros there.
        positions: which positions of the receiver's input change; by default all.

    Raises:
        TypeError, ValueError: for an edge that the model does not have, or that no hook point reaches alone.
    """
    check_choice("via", via, VIAS)
    source_of = one_component(model, sender, "sender", ("embed", "pos_embed"))
    target_of = one_component(model, receiver, "receiver", ("unembed",))
    check_edge(model, source_of, target_of, via)
    where = None if positions is None else indices("positions", positions)
    site = sender_site(model, source_of)
    stored = None if source is None else read_source(model, source, [site.name], "source")[site.name]
    # The message's change on its way: from the sender to the stream, and with the stream to the receiver's inputs.
    sent: list[Tensor] = []
    arriving: dict[str, tuple[Tensor, Tensor]] = {}

    def watch_sender(activation: Tensor, hook: Any) -> None:
        current = site.read(activation)
        wanted = (
            torch.zeros_like(current) if stored is None else site.read(site.write(activation, site.read(stored), None))
        )
        change = into_stream(model, source_of, wanted - current)
        if where is not None:
            index = position_index(where, change.shape[1]).to(change.device)
            kept = torch.zeros_like(change)
            change = kept.index_copy(1, index, change.index_select(1, index))
        sent[:] = [change]

    if isinstance(target_of, str):
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

        def change_stream(activation: Tensor, hook: Any) -> Tensor:
            return activation + sent.pop() if sent else activation

        return Intervention(model, edit=[(last, change_stream)], look=[(site.name, watch_sender)])

    head = target_of.head
    stream, norm = read_stream(model, target_of)
    weights = read_weights(model, target_of, via)
    normed(norm, torch.linspace(-1, 2, model.cfg.d_model)[None].to(next(iter(weights.values()))))  # refuses it now

    def watch_stream(activation: Tensor, hook: Any) -> None:
        # Messages of all path patches into one input add up before the norm: kept with the stream they change.
        activation.hijack_lens_messages = {}  # type: ignore[attr-defined]
        if sent:
            change = sent.pop()
            arriving.update(dict.fromkeys(weights, (activation, change)))

    def change_input(name: str) -> HookFunction:
        def hook_fn(activation: Tensor, hook: Any) -> Tensor:
            if name not in arriving:  # entered twice, and done already
                return activation
            current, change = arriving.pop(name)
            messages = current.hijack_lens_messages  # type: ignore[attr-defined]
            before = current + messages.get((name, head), 0.0)
            after = before + change
            messages[name, head] = after - current
            effect = (normed(norm, after) - normed(norm, before)) @ weights[name]
            if head is None:
                return activation + effect
            edited = activation.clone()
            edited[:, :, head] += effect
            return edited

        return hook_fn

    # Reading resid_mid is fine also where editing it is not.
    look: list[tuple[str, HookFunction]] = [(site.name, watch_sender), (stream, watch_stream)]
    return Intervention(model, edit=[(name, change_input(name)) for name in weights], look=look)
