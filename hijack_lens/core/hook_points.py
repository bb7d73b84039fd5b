"""A model's hook points: which ones exist, which can be edited, and where a component's slice is."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)

from hijack_lens.core.checks import check_choice, shown
from hijack_lens.core.circuit import ROLE_NAMES, Component

NEEDS_FLAG = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Hook points that fire only where a setting asks for them."""
# Bridges compute these kinds of attention step by step; for all others, the wrapped model computes everything.
_REBUILT_ATTENTION = (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
_FORKED_INPUTS = ("ln1.hook_in", "ln1.hook_out", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_in")


def check_model(model: Any) -> None:
    """Checks that `model` is a TransformerLens model with hook points."""
    # Do not read a bridge's hook_dict here: each access rebuilds it.
    try:
        fits = isinstance(model, TransformerBridge) or hasattr(model, "hook_dict")
    except Exception:  # raised by an object's own __getattr__
        fits = False
    if not fits:
        raise TypeError(f"model must be a HookedTransformer or TransformerBridge, got {shown(model)}")


def is_deep(model: Any) -> bool:
    """Whether a model has so many layers that later ones rely on what earlier ones write whatever the prompt.

    Zeros in place of an MLP's output break such a model; and its heads look at the first token where they look for
    nothing.
    """
    return bool(model.cfg.n_layers > 2)


SINK = 0.5
"""Attention, beyond which a first token is taken for such a one."""


_known: ContextVar[dict[int, Mapping[str, Any]] | None] = ContextVar(
    "hook points of models under analysis", default=None
)


def points_of(model: Any) -> Mapping[str, Any]:
    """A model's hook points by name. A bridge builds them anew each time; an analysis asks once."""
    known = _known.get()
    if known is None:
        return model.hook_dict
    if id(model) not in known:
        known[id(model)] = model.hook_dict
    return known[id(model)]


def forget_points() -> None:
    """Ends `points_kept`, even where a Ctrl-C broke into its own end."""
    _known.set(None)


@contextmanager
def points_kept() -> Iterator[None]:
    """Keeps what `points_of` found, as long as the context lasts."""
    token = _known.set({} if _known.get() is None else _known.get())
    try:
        yield
    finally:
        _known.reset(token)


def honours_edits(model: Any, name: str) -> bool:
    """Whether edits at one of the model's hook points take effect."""
    return not isinstance(model, TransformerBridge) or _why_ignored(model, name) is None


def check_hook_points(model: Any, names: Iterable[str], argument: str = "components", edits: bool = True) -> None:
    """Checks that the model has these hook points, that they fire, and that `edits` there would take effect."""
    check_model(model)
    listed = list(names)
    known = points_of(model) if listed else {}
    for name in listed:
        try:
            _check_hook_point(model, known, name, edits)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error


def _check_hook_point(model: Any, known: Mapping[str, Any], name: str, edits: bool) -> None:
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name)[:200], [*known, *ROLE_NAMES], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"{shown(name)} is not a hook point of this {type(model).__name__}{hint}")
    leaf = name.rsplit(".", 1)[-1]
    flag = NEEDS_FLAG.get(leaf)
    if flag is not None and not getattr(model.cfg, flag):
        raise ValueError(f"{name!r} never fires while cfg.{flag} is False; call model.set_{flag}(True) first")
    if leaf in ("hook_mlp_out", "hook_resid_mid") and getattr(model.cfg, "attn_only", False):
        raise ValueError(f"{name!r} never fires: this model's blocks have no MLPs")
    if not isinstance(model, TransformerBridge):
        return
    if leaf == "hook_pos_embed" and model.cfg.positional_embedding_type == "rotary":
        raise ValueError(f"{name!r} never fires: this model's positions are rotary, and not added to the stream")
    reason = _why_ignored(model, name) if edits else None
    if reason is not None:
        raise ValueError(f"this TransformerBridge does not honour edits at {name!r}: {reason}")


def _why_ignored(model: TransformerBridge, name: str) -> str | None:
    """Why an edit at a bridge's hook point would have no effect, or less than expected; `None` if it works."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("hook_pattern", "hook_attn_scores"):
        attn = model.blocks[int(name.split(".")[1])].attn
        # TransformerLens 4's own attention hands its pattern, not its scores, to the bridge.
        handed = leaf == "hook_pattern" and getattr(attn.original_component, "accepts_pattern_fn", False)
        return None if handed or type(attn) in _REBUILT_ATTENTION else "it computes the head's output without them"
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
    """All modules; a bridge's `modules()` omits parts of the wrapped model (for example, the embeddings' dropout)."""
    wrapped = getattr(model, "original_model", None)
    return {*model.modules(), *(wrapped.modules() if isinstance(wrapped, nn.Module) else ())}


def is_hooked(model: Any) -> bool:
    """Whether running part of the model by itself would run any of the user's hooks."""
    if any(point.fwd_hooks for point in points_of(model).values()):
        return True
    # A bridge's modules carry hooks of TransformerLens and of transformers, which are not the user's.
    of_torch = [
        hook for m in every_module(model) for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("transformer_lens.", "transformers.")) for hook in of_torch
    )


@contextmanager
def without_hooks(model: Any) -> Iterator[None]:
    """The model as if nobody had hooks at its hook points: for a look at the model that is no run of the user's."""
    kept = [(point, point._forward_hooks) for point in points_of(model).values()]

    def restore() -> None:
        for point, hooks in kept:
            point._forward_hooks = hooks

    try:
        try:
            for point, hooks in kept:
                point._forward_hooks = type(hooks)()
            yield
        finally:
            restore()
    finally:
        restore()  # once more, in case a Ctrl-C interrupted the first


def check_unhooked(model: Any) -> None:
    """Checks that nobody's hooks change what the model's weights say; for what is read off the weights alone."""
    if is_hooked(model):
        raise ValueError(
            "model must have no hooks, which change its runs, but not the weights that are read here: remove them, or "
            "leave the intervention's context first"
        )


Part = Literal["output", "pattern"]


@dataclass(frozen=True)
class Site:
    """A hook point, and the slice of it that belongs to one component.

    Attributes:
        name: the hook point's name.
        head: index on the head axis, if the component is a head.
        head_dim: the head axis.
        pos_dim: the axis of (query) positions, once the head is selected.
    """

    name: str
    head: int | None = None
    head_dim: int = 2
    pos_dim: int = 1

    def read(self, activation: Tensor) -> Tensor:
        """The component's slice of the activation."""
        return activation if self.head is None else activation.select(self.head_dim, self.head)

    def write(self, activation: Tensor, value: Tensor, positions: Sequence[int] | None) -> Tensor:
        """A copy of the activation with the component's slice replaced, at some or all positions."""
        edited = activation.clone()
        view = self.read(edited)
        if value.shape[1:] != view.shape[1:] or value.shape[0] not in (1, view.shape[0]):
            raise ValueError(
                f"the source or reference for {self.name!r} has shape {tuple(value.shape)}, the run "
                f"{tuple(view.shape)}: prompts must be equally long, and of one batch size unless it is one prompt"
            )
        value = value.to(view).expand_as(view)
        if positions is None:
            view.copy_(value)
        else:
            index = position_index(positions, view.shape[self.pos_dim]).to(view.device)
            view.index_copy_(self.pos_dim, index, value.index_select(self.pos_dim, index))
        return edited


def position_index(positions: Sequence[int], length: int) -> Tensor:
    """Positions counted from the front; negative ones count from the end."""
    for position in positions:
        if not -length <= position < length:
            raise ValueError(f"positions holds {shown(position)}; the run has {length} tokens")
    return torch.tensor([position % length for position in positions], dtype=torch.long)


def all_components(model: Any) -> tuple[Component, ...]:
    """Every head and MLP of a model."""
    check_model(model)
    known, cfg = points_of(model), model.cfg
    found: list[Component] = []
    for layer in range(cfg.n_layers):
        if f"blocks.{layer}.attn.hook_z" in known:
            found += [Component(layer, "head", head) for head in range(cfg.n_heads)]
        # A HookedTransformer without MLPs keeps their hook points.
        if f"blocks.{layer}.hook_mlp_out" in known and not getattr(cfg, "attn_only", False):
            found.append(Component(layer, "mlp"))
    return tuple(found)


def sites(model: Any, parts: Iterable[Component | str], part: Part = "output", name: str = "components") -> list[Site]:
    """Sites of the outputs or attention patterns of components and hook points; `name` is the argument's name."""
    check_model(model)
    check_choice("part", part, ("output", "pattern"))
    return [_site(model, one, part, name) for one in parts]


def _site(model: Any, component: Component | str, part: str, name: str) -> Site:
    if part == "pattern" and (isinstance(component, str) or component.kind == "mlp"):
        raise ValueError(f"part={part!r} goes with a head, got {shown(str(component))}")
    if isinstance(component, str):
        over_keys = component.endswith(("hook_pattern", "hook_attn_scores", "hook_rel_scores"))
        return Site(component, pos_dim=2 if over_keys else 1)
    cfg, block = model.cfg, f"blocks.{component.layer}"
    if component.layer >= cfg.n_layers:
        raise ValueError(f"{name}: {component} is in layer {component.layer}; the model has {cfg.n_layers}")
    if component.head is None:
        return Site(f"{block}.hook_mlp_out")
    if component.head >= cfg.n_heads:
        raise ValueError(f"{name}: {component} is head {component.head}; the model has {cfg.n_heads} per layer")
    if part == "pattern":
        return Site(f"{block}.attn.hook_pattern", component.head, head_dim=1)
    return Site(f"{block}.attn.hook_z", component.head)


_CELLS = 2**25
"""Logits per run: 128 MiB in float32."""


def rows_at_once(model: Any, length: int) -> int:
    """How many prompts to run in one batch."""
    return max(1, _CELLS // (length * max(model.cfg.d_vocab, model.cfg.n_heads * length)))
