"""The edges of a model (one component's output into one input of another), and path patching along an edge."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from hijack_lens.core.analysis import as_written
from hijack_lens.core.checks import check_choice, check_type, shown
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import Site, check_hook_points, points_of, position_index, sites, without_hooks
from hijack_lens.core.inputs import indices, one_component
from hijack_lens.core.texts import texts_begin
from hijack_lens.hooked import HookedTransformer
from hijack_lens.hooks.intervention import HookFunction, Intervention, read_source
from hijack_lens.models.linear_maps import normed, rounding
from hijack_lens.models.readable import check_readable

Sender = Component | Literal["embed", "pos_embed"]
Receiver = Component | Literal["unembed"]
Via = Literal["q", "k", "v", "mlp_in", "unembed"]
VIAS: tuple[Via, ...] = ("q", "k", "v", "mlp_in", "unembed")


@dataclass(frozen=True)
class Edge:
    """What one component sends into one input of another, along the residual stream alone.

    Attributes:
        sender: a head, an MLP, "embed" or "pos_embed".
        receiver: a head, an MLP, or "unembed".
        via: the receiver's input: "q", "k" or "v" of a head, "mlp_in" of an MLP, or "unembed".

    Examples:
        >>> edge = hl.hooks.Edge(hl.Component.of("L0H0"), hl.Component.of("L1H0"), "k")
        >>> print(edge)
        L0H0 → L1H0 k
        >>> edge.label(model.circuit)
        'previous-token head → induction head k'
    """

    sender: Sender
    receiver: Receiver
    via: Via

    def __str__(self) -> str:
        return self.label(Circuit())

    def label(self, circuit: Circuit) -> str:
        """The edge in words, with components named by their roles in the circuit."""
        check_type("circuit", circuit, Circuit)
        arrives = "" if self.via == "unembed" else f" {self.via}"
        return f"{name_of(self.sender, circuit)} → {name_of(self.receiver, circuit)}{arrives}"


def name_of(end: Sender | Receiver, circuit: Circuit) -> str:
    """The name of an edge's end: for a component, its role, if it has one to itself."""
    return end if isinstance(end, str) else circuit.label(end)


def edges_among(model: Any, components: Iterable[Component], via: Iterable[Via] = VIAS) -> tuple[Edge, ...]:
    """Every edge among some components, from the embeddings and to the unembedding, in the model's order."""
    listed = sorted(set(components))
    receivers: tuple[Receiver, ...] = (*listed, "unembed")
    chosen = tuple(via)
    return tuple(
        Edge(sender, receiver, into)
        for sender in (*embeddings(model), *listed)
        for receiver in receivers
        if precedes(model, sender, receiver)
        for into in inputs_of(receiver)
        if into in chosen
    )


def embeddings(model: Any) -> tuple[Sender, ...]:
    """What the residual stream starts from."""
    # In a bridge, hook_pos_embed can also be the module that computes rotary angles.
    learned = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in points_of(model)
    return ("embed", "pos_embed") if learned else ("embed",)


def inputs_of(receiver: Receiver) -> tuple[Via, ...]:
    """The inputs that a receiver has."""
    if isinstance(receiver, str):
        return ("unembed",)
    return ("mlp_in",) if receiver.kind == "mlp" else ("q", "k", "v")


def precedes(model: Any, sender: Sender, receiver: Receiver) -> bool:
    """Whether the receiver reads what the sender writes."""
    if isinstance(sender, str) or isinstance(receiver, str):
        return True
    same_block = sender.layer == receiver.layer and (sender.kind, receiver.kind) == ("head", "mlp")
    return sender.layer < receiver.layer or (same_block and not _is_parallel(model))


def check_edge(model: Any, sender: Sender, receiver: Receiver, via: Via) -> None:
    """Checks that the model has this edge, and hook points that reach it alone."""
    check_sender(model, sender)
    if via not in inputs_of(receiver):
        raise ValueError(f"via must be one of {inputs_of(receiver)} for receiver {receiver}, got {shown(via)}")
    if not precedes(model, sender, receiver):
        raise ValueError(f"sender {sender} must come before receiver {receiver}")
    check_receiver(model, receiver, via)


def check_receiver(model: Any, receiver: Receiver, via: Via, from_parts: bool = False) -> None:
    """Checks that hook points reach this input of a receiver alone, and that its weights can be read.

    Computed `from_parts`, it needs no hook points of its own, which keys and values that heads share do not have.
    """
    if isinstance(receiver, str):
        return
    if _norms_after_only(model, receiver.layer):
        raise ValueError(f"receiver {receiver}: this model's blocks norm what they write, not what they read")
    if not (from_parts and reads_shared(model, via)):
        if via in ("k", "v"):
            _check_own_keys(model, via)
        read_weights(model, receiver, via)
    check_readable(model, receiver.layer, *(f"{part}.{weight}" for part, weight in _leaves(model, via).values()))


def sender_site(model: Any, sender: Sender) -> Site:
    """Where a sender's output is read."""
    return Site(f"hook_{sender}") if isinstance(sender, str) else sites(model, [sender])[0]


def into_stream(model: Any, sender: Sender, output: Tensor) -> Tensor:
    """What a sender's output adds to the residual stream."""
    if isinstance(sender, Component) and sender.kind == "head":
        return output @ model.blocks[sender.layer].attn.W_O[sender.head]
    return output


def read_stream(model: Any, receiver: Component) -> tuple[str, nn.Module | None]:
    """The hook point of the residual stream that a head or MLP reads, and the norm through which it reads it."""
    block, at = model.blocks[receiver.layer], f"blocks.{receiver.layer}"
    if receiver.kind == "head":
        return f"{at}.hook_resid_pre", getattr(block, "ln1", None)
    if not _is_parallel(model):
        return f"{at}.hook_resid_mid", getattr(block, "ln2", None)
    # In a bridge around GPT-J, attention and MLP share one norm.
    return f"{at}.hook_resid_pre", getattr(block, "ln2", getattr(block, "ln1", None))


def read_weights(model: Any, receiver: Component, via: str) -> dict[str, Tensor]:
    """The hook points where an input of a head or MLP arrives, with the weights that compute it."""
    leaves = _leaves(model, via)
    check_hook_points(model, (f"blocks.{receiver.layer}.{leaf}" for leaf in leaves))
    weights = {}
    for leaf, (part, attribute) in leaves.items():
        weight = getattr(getattr(model.blocks[receiver.layer], part), attribute)
        weights[f"blocks.{receiver.layer}.{leaf}"] = weight if receiver.head is None else weight[receiver.head]
    return weights


def _leaves(model: Any, via: str) -> dict[str, tuple[str, str]]:
    """The hook points in a block where an input arrives, each with the module and its weight that took it there."""
    if via != "mlp_in":
        return {f"attn.hook_{via}": ("attn", f"W_{via.upper()}")}
    if getattr(model.cfg, "gated_mlp", False):
        return {"mlp.hook_pre": ("mlp", "W_gate"), "mlp.hook_pre_linear": ("mlp", "W_in")}
    return {"mlp.hook_pre": ("mlp", "W_in")}


def patch_path(
    model: Any,
    sender: Component | str | tuple[Component, ...],
    receiver: Component | str | tuple[Component, ...],
    via: Via,
    source: object = None,
    positions: int | Iterable[int] | None = None,
    *,
    prepend_bos: bool | None = None,
) -> Intervention:
    """Replaces what `sender` writes into one input of `receiver`, along the residual stream alone.

    Everything else that reads the sender sees its output in the run itself; what the receiver then computes
    flows on to everything after it. Norms are recomputed for the changed input.

    Args:
        model: a HookedTransformer or TransformerBridge.
        sender: a head or MLP: a `Component`, its place ("L0H1"), or a role that has just one; "embed" or "pos_embed".
        receiver: a head or MLP after the sender, given in the same ways; or "unembed".
        via: the receiver's input: "q", "k" or "v" of a head, "mlp_in" of an MLP (including the gate, if it has one), or
            "unembed".
        source: where the sender's output comes from: a cache, or prompts to run once, now; `None` cuts the
            edge, as if the sender wrote zeros there.
        positions: which positions of the receiver's input change; by default all.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for an edge that the model does not have, or that no hook point reaches alone.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> for via in "qkv":
        ...     with hl.hooks.patch_path(model, "previous_token", "induction", via):
        ...         print(via, f"{margin(model(prompt.tokens[None])):.2f}")
        q 3.27
        k -4.08
        v 3.27
    """
    model = as_written(model)
    check_choice("via", via, VIAS)
    source_of = one_component(model, sender, "sender", ("embed", "pos_embed"))
    target_of = one_component(model, receiver, "receiver", ("unembed",))
    check_edge(model, source_of, target_of, via)
    where = None if positions is None else indices("positions", positions)
    site = sender_site(model, source_of)
    with texts_begin(prepend_bos):
        stored = None if source is None else read_source(model, source, [site.name], "source")[site.name]
    # The message's change on its way: from the sender to the stream, and from there to the receiver's inputs.
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
    inputs = read_weights(model, target_of, via)
    normed(norm, torch.linspace(-1, 2, model.cfg.d_model)[None].to(next(iter(inputs.values()))))  # checks the norm now

    def watch_stream(activation: Tensor, hook: Any) -> None:
        # The messages of all path patches into one input add up before the norm, so they are kept with the stream.
        activation.hijack_lens_messages = {}  # type: ignore[attr-defined]
        if sent:
            change = sent.pop()
            arriving.update(dict.fromkeys(inputs, (activation, change)))

    def change_input(name: str) -> HookFunction:
        def hook_fn(activation: Tensor, hook: Any) -> Tensor:
            if name not in arriving:  # entered twice, and already done
                return activation
            current, change = arriving.pop(name)
            messages = current.hijack_lens_messages  # type: ignore[attr-defined]
            before = current + messages.get((name, head), 0.0)
            after = before + change
            messages[name, head] = after - current
            # Read anew, since the model may have been moved to another dtype or device.
            weight = read_weights(model, target_of, via)[name]
            effect = (normed(norm, after) - normed(norm, before)) @ weight
            if head is None:
                return activation + effect
            edited = activation.clone()
            edited[:, :, head] += effect
            return edited

        return hook_fn

    # Reading resid_mid is fine even where editing it is not.
    look: list[tuple[str, HookFunction]] = [(site.name, watch_sender), (stream, watch_stream)]
    return Intervention(model, edit=[(name, change_input(name)) for name in inputs], look=look)


def check_sender(model: Any, sender: Sender) -> None:
    """Checks that the sender's output is added to the residual stream as it is read."""
    if isinstance(sender, str):
        if sender not in embeddings(model):
            raise ValueError(f"sender {sender!r}: this model has no hook_{sender} that adds to its residual stream")
        if isinstance(model, TransformerBridge) and not _starts_from_embeddings(model):
            raise ValueError(f"sender {sender!r}: this model norms or scales its embeddings before the residual stream")
    # An MLP's hook point shows what reaches the stream; a head's comes before any norm or factor after attention.
    elif sender.kind == "head" and changes_attn_out(model, sender.layer):
        raise ValueError(f"sender {sender}: this model norms or scales what its heads write, all together")
    elif sender.kind == "head":
        check_readable(model, sender.layer, "attn.W_O")


def _starts_from_embeddings(model: Any) -> bool:
    """Whether the residual stream starts as the sum of what the embeddings' hook points show, tried on a few tokens."""
    shown: list[Tensor] = []
    look = [(f"hook_{name}", lambda activation, hook: shown.append(activation)) for name in embeddings(model)]
    tokens = torch.arange(min(4, model.cfg.d_vocab, model.cfg.n_ctx), device=model.cfg.device)[None]
    with torch.no_grad(), without_hooks(model), Intervention(model, look=look):
        start = model(tokens, stop_at_layer=0)
    return bool((sum(shown) - start).abs().max() <= rounding(start.dtype) * start.abs().max())


def reads_shared(model: Any, via: str) -> bool:
    """Whether heads share this input's hook point (grouped-query attention)."""
    cfg = model.cfg
    if via not in ("k", "v") or getattr(cfg, "n_key_value_heads", None) in (None, cfg.n_heads):
        return False
    return not (isinstance(model, HookedTransformer) and cfg.ungroup_grouped_query_attention)


def _check_own_keys(model: Any, via: str) -> None:
    """Checks that every head has keys and values of its own."""
    if not reads_shared(model, via):
        return
    shared = f"via={via!r}: this model's heads share keys and values (grouped-query attention)"
    if not isinstance(model, HookedTransformer):
        raise ValueError(
            f"{shared}, and a TransformerBridge has no hook point that holds one head's own: patch other inputs, or "
            "use a HookedTransformer after set_ungroup_grouped_query_attention(True)"
        )
    raise ValueError(f"{shared}; model.set_ungroup_grouped_query_attention(True) gives every head its own")


def _is_parallel(model: Any) -> bool:
    """Whether MLPs read what attention reads, as in GPT-J and GPT-NeoX."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def _norms_after_only(model: Any, layer: int) -> bool:
    """Whether the block's norms come after attention and MLP, not before them, as in OLMo 2."""
    by_name = getattr(model.cfg, "original_architecture", None) in POST_NORM_ARCHITECTURES
    return by_name or getattr(model.blocks[layer], "mlp_reads_resid_directly", False)


def changes_attn_out(model: Any, layer: int) -> bool:
    """Whether a norm or a factor stands between the heads and the residual stream, as in Gemma 2 or Granite."""
    factor = getattr(model.blocks[layer], "residual_contribution_scale", 1.0)
    return norms_of_heads(model, layer)[1] is not None or factor != 1.0


def norms_of_heads(model: Any, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The norm of what a block's heads read, and of what they write together; `None` where there is none."""
    return _norms_around(model, layer, getattr(model.blocks[layer], "ln1", None), "ln1_post")


def norms_of_mlp(model: Any, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The norm of what a block's MLP reads, and of what it writes; `None` where there is none."""
    return _norms_around(model, layer, read_stream(model, Component(layer, "mlp"))[1], "ln2_post")


def _norms_around(
    model: Any, layer: int, first: nn.Module | None, name: str
) -> tuple[nn.Module | None, nn.Module | None]:
    after = getattr(model.blocks[layer], name, None)
    # TransformerLens 3.9 calls a block's only norm before attention ln1, wherever it comes; and likewise ln2.
    return (None, first if after is None else after) if _norms_after_only(model, layer) else (first, after)
