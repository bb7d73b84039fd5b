"""Path patching: change what one component sends into another, and nothing else it sends."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens.circuit import Component
from hijack_lens.hooks.edges import Via, check_edge, into_stream, read_stream, read_weights, sender_site
from hijack_lens.hooks.intervention import HookFunction, Intervention
from hijack_lens.hooks.site import as_positions, position_index, read_source
from hijack_lens.norm import normed


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
