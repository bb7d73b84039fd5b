"""Path patching: change what one component sends into another, and nothing else it sends."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hijack_lens._checks import check_choice
from hijack_lens.circuit import Component
from hijack_lens.hooks.intervention import HookFunction, Intervention
from hijack_lens.hooks.site import Site, as_positions, position_index, read_source, sites
from hijack_lens.norm import linear_norm

Via = Literal["q", "k", "v", "mlp_in", "unembed"]


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
        via: the receiver's input: "q", "k" or "v" of a head, "mlp_in" of an MLP, or "unembed".
        source: where the sender's output comes from: a cache, or prompts to run once, now; `None` cuts the
            edge, as if the sender wrote zeros there.
        positions: which positions of the receiver's input change; by default all.

    Raises:
        TypeError, ValueError: for an edge that the model does not have.
    """
    check_choice("via", via, ("q", "k", "v", "mlp_in", "unembed"))
    source_of, target_of = _only("sender", sender), _only("receiver", receiver)
    _check_edge(model, source_of, target_of, via)
    where = as_positions(positions)
    site = Site(f"hook_{source_of}") if isinstance(source_of, str) else sites(model, source_of)[0]
    stored = None if source is None else read_source(model, source, [site.name], "source")[site.name]
    # What the run has computed so far, for the hook that comes later: the message's change, the stream.
    run: dict[str, Tensor] = {}

    def watch_sender(activation: Tensor, hook: Any) -> None:
        current = site.read(activation)
        wanted = (
            torch.zeros_like(current) if stored is None else site.read(site.write(activation, site.read(stored), None))
        )
        change = _into_stream(model, source_of, wanted - current)
        if where is not None:
            index = position_index(where, change.shape[1]).to(change.device)
            kept = torch.zeros_like(change)
            change = kept.index_copy(1, index, change.index_select(1, index))
        run["change"] = change

    def watch_stream(activation: Tensor, hook: Any) -> None:
        run["stream"] = activation
        # Messages of all path patches into one input add up before the norm: kept with the stream they change.
        activation.hijack_lens_messages = {}  # type: ignore[attr-defined]

    if isinstance(target_of, str):
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

        def change_stream(activation: Tensor, hook: Any) -> Tensor:
            return activation + run.pop("change") if "change" in run else activation

        return Intervention(model, edit=[(last, change_stream)], look=[(site.name, watch_sender)])

    block = model.blocks[target_of.layer]
    prefix = f"blocks.{target_of.layer}"
    head = target_of.head
    if via == "mlp_in":
        stream, target, norm = f"{prefix}.hook_resid_mid", f"{prefix}.mlp.hook_pre", "ln2"
        weight = block.mlp.W_in
    else:
        stream, target, norm = f"{prefix}.hook_resid_pre", f"{prefix}.attn.hook_{via}", "ln1"
        weight = getattr(block.attn, f"W_{via.upper()}")[head]

    module = getattr(block, norm, None)
    linear_norm(module, torch.zeros(1, model.cfg.d_model))  # refuses a norm of an unknown kind before the run does

    def change_input(activation: Tensor, hook: Any) -> Tensor:
        if "change" not in run:  # entered twice, and done already
            return activation
        current = run.pop("stream")
        messages = current.hijack_lens_messages  # type: ignore[attr-defined]
        before = current + messages.get((target, head), 0.0)
        after = before + run.pop("change")
        messages[target, head] = after - current
        change = (linear_norm(module, after)(after) - linear_norm(module, before)(before)) @ weight
        if head is None:
            return activation + change
        edited = activation.clone()
        edited[:, :, head] += change
        return edited

    # Reading resid_mid is fine also where editing it is not.
    look: list[tuple[str, HookFunction]] = [(site.name, watch_sender), (stream, watch_stream)]
    return Intervention(model, edit=[(target, change_input)], look=look)


def _only(name: str, component: Any) -> Any:
    """The one component of a role; what is no role, as it is."""
    if not isinstance(component, tuple):
        return component
    if len(component) != 1:
        raise ValueError(f"{name} must be one component, got {len(component)}: {', '.join(map(str, component))}")
    return component[0]


def _check_edge(model: Any, sender: object, receiver: object, via: str) -> None:
    if isinstance(sender, str):
        check_choice("sender", sender, ("embed", "pos_embed"))
    elif not isinstance(sender, Component):
        raise TypeError(f"sender must be a Component, 'embed' or 'pos_embed', got {sender!r}")
    if isinstance(receiver, str):
        check_choice("receiver", receiver, ("unembed",))
        fitting: tuple[str, ...] = ("unembed",)
    elif isinstance(receiver, Component):
        sites(model, receiver)  # refuses what the model lacks
        fitting = ("mlp_in",) if receiver.kind == "mlp" else ("q", "k", "v")
    else:
        raise TypeError(f"receiver must be a Component or 'unembed', got {receiver!r}")
    if via not in fitting:
        raise ValueError(f"via must be one of {fitting} for receiver {receiver}, got {via!r}")
    if isinstance(sender, Component) and isinstance(receiver, Component):
        same_block = sender.layer == receiver.layer and (sender.kind, receiver.kind) == ("head", "mlp")
        parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
        if not (sender.layer < receiver.layer or (same_block and not parallel)):
            raise ValueError(f"sender {sender} must come before receiver {receiver}")
    cfg = model.cfg
    if via in ("k", "v") and getattr(cfg, "n_key_value_heads", None) not in (None, cfg.n_heads):
        raise ValueError(f"via={via!r}: this model's heads share keys and values (grouped-query attention)")
    if via == "mlp_in" and getattr(cfg, "gated_mlp", False):
        raise ValueError("via='mlp_in': this model's MLPs are gated, with two inputs")


def _into_stream(model: Any, sender: object, output: Tensor) -> Tensor:
    """What a sender's output adds to the residual stream."""
    if isinstance(sender, Component) and sender.kind == "head":
        return output @ model.blocks[sender.layer].attn.W_O[sender.head]
    return output
