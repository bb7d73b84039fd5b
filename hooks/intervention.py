"""An intervention: hooks that come and go together, and that say so when they do nothing."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import ActivationCache

from hijack_lens.core.checks import check_choice, check_list, shown
from hijack_lens.core.hook_points import check_hook_points
from hijack_lens.core.inputs import model_tokens

HookFunction = Callable[..., Tensor | None]
"""TransformerLens's `fn(activation, hook) -> activation | None`."""


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
        self, model: Any, edit: Sequence[tuple[str, HookFunction]] = (), look: Sequence[tuple[str, HookFunction]] = ()
    ):
        look, edit = _pairs("look", look), _pairs("edit", edit)
        check_hook_points(model, (name for name, _ in look), "look", edits=False)
        check_hook_points(model, (name for name, _ in edit), "edit")
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


def _pairs(argument: str, given: object) -> list[tuple[str, HookFunction]]:
    pairs = check_list(argument, given, "(hook point name, function) pairs")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not callable(pair[1]):
            raise TypeError(f"{argument} must be (hook point name, function) pairs, got {shown(pair)} in it")
    return pairs


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
    with torch.no_grad(), Intervention(model, look=keeping(stored, names)):
        logits = model(tokens)
    return logits, stored


def keeping(stored: dict[str, Tensor], names: Iterable[str]) -> list[tuple[str, HookFunction]]:
    """Hooks that keep copies of activations, by the names of their hook points."""

    def keep(name: str, activation: Tensor, hook: Any) -> None:
        stored[name] = activation.detach().clone()

    return [(name, functools.partial(keep, name)) for name in names]


def read_source(model: Any, source: object, names: Sequence[str], argument: str) -> dict[str, Tensor]:
    """Activations at hook points from a cache, or from a run on a prompt."""
    if isinstance(source, ActivationCache):
        stored = read_source(model, source.cache_dict, names, argument)
        return stored if source.has_batch_dim else {name: value[None] for name, value in stored.items()}
    if isinstance(source, Mapping):
        missing = [name for name in names if name not in source]
        if missing:
            raise ValueError(f"{argument} is a cache without {', '.join(missing)}")
        return {name: source[name] for name in names}
    return record(model, model_tokens(model, source, argument), names)[1]


def check_reference(how: object, reference: object, ways: Sequence[str] = ("zero", "mean", "resample")) -> None:
    """`how` is one of the `ways` to ablate, and the reference is there where it needs one, and only there."""
    check_choice("how", how, ways)
    if (reference is None) != (how == "zero"):
        need = "takes no reference" if how == "zero" else "needs reference="
        raise ValueError(f"how={how!r} {need}, got reference={reference!r:.60}")


def draw_rows(how: str, n_reference: int, n_prompts: int, generator: torch.Generator) -> Int[Tensor, "prompt"] | None:
    """Which reference prompt each prompt is given, where these are drawn."""
    return torch.randint(n_reference, (n_prompts,), generator=generator) if how == "resample" else None


def stand_in(how: str, reference: Tensor, rows: Int[Tensor, "prompt"] | None) -> Tensor:
    """What is written in an ablated output's place: the reference's mean, or its `rows`, or itself; prompts first."""
    if how == "mean":
        return reference.mean(0, keepdim=True)
    return reference if rows is None else reference[rows.to(reference.device)]
