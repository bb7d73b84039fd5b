"""Switch components off, or replace what they compute by what they compute on another prompt."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens.core.checks import as_generator, check_choice, check_count
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import Components, Part, Site, check_hook_points, position_index, some_sites
from hijack_lens.core.inputs import as_positions
from hijack_lens.hooks.edges import Via, check_edge, into_stream, read_stream, read_weights, sender_site
from hijack_lens.hooks.intervention import HookFunction, Intervention, read_source
from hijack_lens.models.linear_maps import normed


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


def patch_path(
    model: Any,
    sender: Component | tuple[Component] | Literal["embed", "pos_embed"],
    receiver: Component | tuple[Component] | Literal["unembed"],
    via: Via,
    source: object = None,
    positions: int | Iterable[int] | None = None,
) -> Intervention:
    """Replaces what `sender` writes into one input of `receiver`, along the residual stream alone.

    Everything else that reads the sender sees what it computes in the run itself; what the receiver then
    computes flows on to all that follows. Norms are computed anew for the changed input.

    Args:
        model: a HookedTransformer or TransformerBridge.
        sender: a head or MLP (or a role of a `Circuit` that has just one), "embed" or "pos_embed".
        receiver: a head or MLP after the sender (likewise), or "unembed".
        via: the receiver's input: "q", "k" or "v" of a head, "mlp_in" of an MLP (of a gated one, gate included), or
            "unembed".
        source: where the sender's output comes from: a cache, or prompts to run once, now; `None` cuts the
            edge, as if the sender wrote zeros there.
        positions: which positions of the receiver's input change; by default all.

    Raises:
        TypeError, ValueError: for an edge that the model does not have, or that no hook point reaches alone.
    """
    source_of, target_of = _only("sender", sender), _only("receiver", receiver)
    check_edge(model, source_of, target_of, via)
    where = as_positions(positions)
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


def _only(name: str, component: Any) -> Any:
    """The one component of a role; what is no role, as it is."""
    if not isinstance(component, tuple):
        return component
    if len(component) != 1:
        raise ValueError(f"{name} must be one component, got {len(component)}: {', '.join(map(str, component))}")
    return component[0]
