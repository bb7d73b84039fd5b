"""An intervention: hooks that come and go together, and that say so when they do nothing."""

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)

HookFunction = Callable[..., Tensor | None]
"""TransformerLens's `fn(activation, hook) -> activation | None`."""

_NEEDS_FLAG = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
# Bridges with attention of these kinds compute it step by step; others hand it to the wrapped model, patterns and all.
_REBUILT_ATTENTION = (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
_FORKED_INPUTS = ("ln1.hook_in", "ln1.hook_out", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_in")


def check_model(model: Any) -> None:
    """`model` is one of TransformerLens's, with hook points."""
    # A bridge is not asked for them: it would put them together anew.
    if not isinstance(model, TransformerBridge) and not hasattr(model, "hook_dict"):
        raise TypeError(f"model must be a HookedTransformer or TransformerBridge, got {model!r:.80}")


def check_hook_points(model: Any, names: Iterable[str]) -> None:
    """The model has the hook points, they fire, and the model honours edits there.

    Raises:
        TypeError, ValueError: saying what to do instead.
    """
    check_model(model)
    known = model.hook_dict
    for name in names:
        _check_hook_point(model, known, name, edits=True)


def _check_hook_point(model: Any, known: Mapping[str, Any], name: str, edits: bool) -> None:
    """`known` is `model.hook_dict`, read once for many names."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"component {name!r} is not a hook point of this {type(model).__name__}{hint}")
    leaf = name.rsplit(".", 1)[-1]
    flag = _NEEDS_FLAG.get(leaf)
    if flag is not None and not getattr(model.cfg, flag):
        raise ValueError(f"{name!r} never fires while cfg.{flag} is False; call model.set_{flag}(True) first")
    if leaf in ("hook_mlp_out", "hook_resid_mid") and getattr(model.cfg, "attn_only", False):
        raise ValueError(f"component {name!r} never fires: this model's blocks have no MLPs")
    if not isinstance(model, TransformerBridge):
        return
    if leaf == "hook_pos_embed" and model.cfg.positional_embedding_type == "rotary":
        raise ValueError(f"{name!r} never fires: this model's positions are rotary, and not added to the stream")
    reason = _why_ignored(model, name) if edits else None
    if reason is not None:
        raise ValueError(f"this TransformerBridge does not honour edits at {name!r}: {reason}")


def _why_ignored(model: TransformerBridge, name: str) -> str | None:
    """Why an edit at a bridge's hook point would have no effect, or less than one would think."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("hook_pattern", "hook_attn_scores"):
        attn = model.blocks[int(name.split(".")[1])].attn
        return None if type(attn) in _REBUILT_ATTENTION else "it computes the head's output without them"
    if leaf == "hook_resid_mid":
        return "only the MLP would see them, not the residual stream"
    if name == "rotary_emb.hook_in":
        return "the angles depend on positions alone"
    if name.endswith(_FORKED_INPUTS) and (model.cfg.use_split_qkv_input or model.cfg.use_attn_in):
        return "with cfg.use_split_qkv_input or cfg.use_attn_in, queries, keys and values are computed without them"
    if leaf == "hook_attn_in" and getattr(model.cfg, "n_key_value_heads", None) not in (None, model.cfg.n_heads):
        return "heads that share keys and values would not read their own copy"
    return None


def every_module(model: Any) -> set[nn.Module]:
    """The model's modules; a bridge's own leave out parts of the model that it wraps, dropout of embeddings say."""
    wrapped = getattr(model, "original_model", None)
    return {*model.modules(), *(wrapped.modules() if isinstance(wrapped, nn.Module) else ())}


def is_hooked(model: Any) -> bool:
    """Whether running a part of the model alone would run someone's hook."""
    if any(point.fwd_hooks for point in model.hook_dict.values()):
        return True
    # A bridge's modules bear hooks of its own and of transformers', which are not the user's.
    of_torch = [
        hook for m in every_module(model) for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers.")) for hook in of_torch
    )


class Intervention:
    """Hooks on a model, there while the context lasts and gone afterwards, whatever happened inside.

    Use it as a context manager, or hand its `fwd_hooks` to TransformerLens:

        with ablate(model, model.circuit.induction):
            model(tokens)
        model.run_with_hooks(tokens, fwd_hooks=ablate(model, model.circuit.induction).fwd_hooks)

    Interventions nest, and may be entered again while they are active; at one hook point they act in the order in
    which they were entered, so enter ablations before what builds on them. Hooks of the user's are never touched.

    Args:
        model: a HookedTransformer or TransformerBridge.
        edit: (hook point name, function) pairs, whose functions return a changed activation. A hook point
            where the model would ignore that is refused.
        look: pairs whose functions only look, and return `None`. They come first where both are at one point.

    Raises:
        ValueError: for a hook point that the model lacks or that would do nothing.
    """

    def __init__(
        self,
        model: Any,
        edit: Sequence[tuple[str, HookFunction]] = (),
        look: Sequence[tuple[str, HookFunction]] = (),
    ):
        check_model(model)
        known = model.hook_dict
        for name, _ in look:
            _check_hook_point(model, known, name, edits=False)
        for name, _ in edit:
            _check_hook_point(model, known, name, edits=True)
        self.model = model
        self.fwd_hooks: list[tuple[str, HookFunction]] = [
            (name, functools.partial(_checked, name, fn)) for name, fn in (*look, *edit)
        ]
        self._entries: list[list[_Entry]] = []

    def __enter__(self) -> "Intervention":
        points = self.model.hook_dict
        entries = [_Entry(name, points[name], fn) for name, fn in self.fwd_hooks]
        witnesses = dict.fromkeys(_witness(name) for name, _ in self.fwd_hooks)
        entries += [_Entry(name, points[name]) for name in witnesses]
        try:
            for entry in entries:
                entry.point.add_hook(entry)
            self._entries.append(entries)
            return self
        except BaseException:
            self._remove(entries)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._remove(self._entries[-1])
        finally:
            entries = self._entries.pop()
            self._remove(entries)  # all over again, lest a Ctrl-C broke in
        if kind is None:
            ran = {entry.name for entry in entries if entry.fn is None and entry.fired}
            silent = [e.name for e in entries if e.fn is not None and not e.fired and _witness(e.name) in ran]
            if silent:
                raise RuntimeError(f"the model ran, but these hook points never fired: {', '.join(silent)}")

    def _remove(self, entries: "list[_Entry]") -> None:
        # Without locks, which a Ctrl-C could leave locked: `tuple(list)` and removing what is found by identity cannot
        # be broken into by other threads, and what they make the search miss is searched for again.
        for entry in entries:
            listed = entry.point.fwd_hooks
            while ours := [handle for handle in tuple(listed) if handle.user_hook is entry]:
                for handle in ours:
                    handle.hook.remove()
                    with contextlib.suppress(ValueError):
                        listed.remove(handle)
            # A Ctrl-C between PyTorch's taking the hook and TransformerLens's listing it leaves the former.
            held = entry.point._forward_hooks
            for key, fn in tuple(held.items()):
                if getattr(fn, "__name__", None) == repr(entry):
                    held.pop(key, None)


class _Entry:
    """A hook function added once to a model; its own identity tells it from every other hook there."""

    def __init__(self, name: str, point: Any, fn: HookFunction | None = None):
        self.name = name
        self.point = point
        self.fn = fn
        self.fired = False

    def __call__(self, activation: Tensor, hook: Any) -> Tensor | None:
        self.fired = True
        return None if self.fn is None else self.fn(activation, hook=hook)


def _witness(name: str) -> str:
    """A hook point that fires whenever the part of the model with `name` runs."""
    parts = name.split(".")
    layer = parts[1] if parts[0] == "blocks" else "0"
    return f"blocks.{layer}.hook_resid_pre"


def _checked(name: str, fn: HookFunction, activation: Tensor, hook: Any) -> Tensor | None:
    """What the hook function returns, which must fit."""
    changed = fn(activation, hook=hook)
    if changed is None:
        return None
    if not isinstance(changed, Tensor):
        raise TypeError(f"the hook at {name!r} must return a tensor or None, got {type(changed).__name__}")
    # A wrong but broadcastable shape would pass unnoticed through the rest of the model.
    if changed.shape != activation.shape:
        raise ValueError(
            f"the hook at {name!r} must keep the shape {tuple(activation.shape)}, got {tuple(changed.shape)}"
        )
    return changed.to(activation)


def record(model: Any, tokens: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a run on `tokens`, and its activations at the hook points `names`; without gradients.

    Unlike TransformerLens's cache it is keyed by the names asked for, also where those are aliases.
    """
    stored: dict[str, Tensor] = {}

    with torch.no_grad(), Intervention(model, look=[(name, functools.partial(_keep, stored, name)) for name in names]):
        logits = model(tokens)
    return logits, stored


def _keep(stored: dict[str, Tensor], name: str, activation: Tensor, hook: Any) -> None:
    stored[name] = activation.detach().clone()
