"""An intervention: hooks that are added and removed together, and that raise an error if they never fired."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from hijack_lens.core.analysis import analysing_thread, as_written, hold_eager, is_compiled, release_eager
from hijack_lens.core.checks import check_choice, check_list, shown
from hijack_lens.core.hook_points import check_hook_points, points_of
from hijack_lens.core.inputs import model_tokens
from hijack_lens.core.tables import Shown

HookFunction = Callable[..., Tensor | None]
"""TransformerLens's `fn(activation, hook) -> activation | None`."""


class Intervention(Shown):
    """Hooks on a model that are there while the context lasts and gone afterwards, whatever happens inside.

    Use it as a context manager, or hand its `fwd_hooks` to TransformerLens:

        with ablate(model, model.circuit.induction):
            model(tokens)
        model.run_with_hooks(tokens, fwd_hooks=ablate(model, model.circuit.induction).fwd_hooks)

    Interventions nest, and may be entered again while they are active; at one hook point they act in the order in
    which they were entered, so enter ablations before what builds on them. The user's own hooks are never touched.
    While one is active, models compiled by `torch.compile` run as written, since their graphs know nothing of it.

    Args:
        model: a HookedTransformer or TransformerBridge.
        edit: (hook point name, function) pairs, whose functions return a changed activation. Hook points
            where the model would ignore the change are refused.
        look: pairs whose functions only look, and return `None`. They run first at a hook point that has both.

    Raises:
        ValueError: for a hook point that the model lacks or that would do nothing.
        RuntimeError: on leaving the context, if a hook did not fire though its part of the model ran, or was removed
            inside, by `reset_hooks()` for example.

    Examples:
        >>> ablation = hl.hooks.ablate(model, "induction")
        >>> [name for name, function in ablation.fwd_hooks]
        ['blocks.1.attn.hook_z']
        >>> logits = model.run_with_hooks(prompt.tokens, fwd_hooks=ablation.fwd_hooks)
        >>> language.tokens[logits[0, -1].argmax()]
        'u'
    """

    def __init__(
        self, model: Any, edit: Sequence[tuple[str, HookFunction]] = (), look: Sequence[tuple[str, HookFunction]] = ()
    ):
        model = as_written(model)
        look, edit = _pairs("look", look), _pairs("edit", edit)
        check_hook_points(model, (name for name, _ in look), "look", edits=False)
        check_hook_points(model, (name for name, _ in edit), "edit")
        self.model = model
        self._hooks: list[tuple[str, HookFunction]] = [
            (name, functools.partial(_checked, name, fn)) for name, fn in (*look, *edit)
        ]
        self._entries: list[tuple[int, list[_Entry]]] = []  # by the thread that entered them
        self._n_looks = len(look)

    def __repr__(self) -> str:
        points = ", ".join(dict.fromkeys(name for name, _ in self._hooks))
        state = "active" if self._entries else "not active"
        return f"Intervention on {type(self.model).__name__} at {points:.400}: {state}"

    def to_pandas(self) -> pd.DataFrame:
        """A row per hook: its hook point, and whether it only looks there."""
        points = [name for name, _ in self._hooks]
        return pd.DataFrame({"hook_point": points, "looks": [i < self._n_looks for i in range(len(points))]})

    @property
    def fwd_hooks(self) -> list[tuple[str, HookFunction]]:
        """The hooks, for `run_with_hooks`.

        Raises:
            ValueError: if parts of the model are compiled, which would skip them.
        """
        if any(is_compiled(module) for module in self.model.modules() if module is not self.model):
            raise ValueError(
                "model has compiled parts, which ignore fwd_hooks: use the intervention as a context manager"
            )
        return self._hooks

    def __enter__(self) -> "Intervention":
        points = points_of(self.model)
        entries = [_Entry(name, points[name], fn) for name, fn in self._hooks]
        witnesses = dict.fromkeys([*(_witness(name) for name, _ in self._hooks), self._end])
        entries += [_Entry(name, points[name]) for name in witnesses]
        try:
            hold_eager(entries, functools.partial(self._remove, entries))
            for entry in entries:
                entry.point.add_hook(entry)
            self._entries.append((threading.get_ident(), entries))
            return self
        except BaseException:
            self._remove(entries)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            entries = self._entered[1]
            lost = _lost(entries)
            self._remove(entries)
        finally:
            entered = self._entered
            self._entries.remove(entered)
            entries = entered[1]
            self._remove(entries)  # once more, in case a Ctrl-C interrupted the first
        if kind is None:
            if lost:
                raise RuntimeError(
                    f"hooks at {', '.join(dict.fromkeys(lost))} were removed inside the context, perhaps by "
                    "reset_hooks(): what ran after that was not intervened upon"
                )
            ran = {entry.name for entry in entries if entry.fn is None and entry.fired}
            silent = [e.name for e in entries if e.fn and not e.fired and ran & {_witness(e.name), self._end}]
            if silent:
                raise RuntimeError(f"the model ran, but these hook points never fired: {', '.join(silent)}")

    @property
    def _entered(self) -> "tuple[int, list[_Entry]]":
        """What this thread entered last; or, where a context is left in another thread, what any did."""
        thread, listed = threading.get_ident(), tuple(self._entries)
        return next((entered for entered in reversed(listed) if entered[0] == thread), listed[-1])

    @property
    def _end(self) -> str:
        """The hook point that fires whenever a run goes through to the end."""
        return f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"

    def _remove(self, entries: "list[_Entry]") -> None:
        # Without locks, which a Ctrl-C could leave locked: other threads cannot interrupt `tuple(list)` or the removal
        # of what is found by identity, and the loop searches again for what they make it miss.
        for entry in entries:
            while ours := entry.handles:
                for handle in ours:
                    handle.hook.remove()
                    with contextlib.suppress(ValueError):
                        entry.point.fwd_hooks.remove(handle)
            # A Ctrl-C after PyTorch registers the hook, but before TransformerLens lists it, leaves PyTorch's behind.
            held = entry.point._forward_hooks
            for key, fn in tuple(held.items()):
                if getattr(fn, "__name__", None) == repr(entry):
                    held.pop(key, None)
        release_eager(entries)


def _lost(entries: "list[_Entry]") -> list[str]:
    """The names of hooks that are there no more.

    A function of its own, since on Python 3.12 and 3.13 a Ctrl-C at the end of an inlined comprehension's turn passes
    by any `finally` around it.
    """
    return [entry.name for entry in entries if not entry.handles]


class _Entry:
    """A hook function added once to a model; its identity distinguishes it from every other hook there."""

    def __init__(self, name: str, point: Any, fn: HookFunction | None = None):
        self.name = name
        self.point = point
        self.fn = fn
        self.fired = False
        self.thread = analysing_thread()

    @property
    def handles(self) -> list[Any]:
        """Those by which its hook point lists it."""
        return [handle for handle in tuple(self.point.fwd_hooks) if handle.user_hook is self]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor | None:
        if self.thread not in (None, threading.get_ident()):
            return None  # a run that is none of the analysis's
        self.fired = True
        return None if self.fn is None else self.fn(activation, hook=hook)


def _witness(name: str) -> str:
    """A hook point that fires whenever the part of the model that has `name` runs."""
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
    """What the hook function returns, checked to fit the activation."""
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


def logits_of(model: Any, tokens: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a run on `tokens`.

    Raises:
        ValueError: if one is not finite, naming the first layer that is not.
    """
    logits = model(tokens)
    if bool(logits.detach().isfinite().all()):
        return logits
    wrong: list[str] = []

    def find(name: str, activation: Tensor, hook: Any) -> None:
        if not activation.isfinite().all():
            wrong.append(name)

    last = model.cfg.n_layers - 1
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)), f"blocks.{last}.hook_resid_post"]
    with torch.no_grad(), Intervention(model, look=[(name, functools.partial(find, name)) for name in names]):
        model(tokens)
    first = wrong[0] if wrong else "its unembedding"
    raise ValueError(f"model's logits must be finite, got a NaN or an infinity, first at {first}")


def record(model: Any, tokens: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a run on `tokens`, and its activations at the hook points `names`; without gradients.

    Unlike TransformerLens's cache, they are keyed by the names asked for, even where those are aliases.
    """
    stored: dict[str, Tensor] = {}
    with torch.no_grad(), Intervention(model, look=keeping(stored, names)):
        logits = logits_of(model, tokens)
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
    if isinstance(source, Mapping) and "input_ids" not in source:  # no tokenizer's output
        missing = [name for name in names if name not in source]
        if missing:
            raise ValueError(f"{argument} is a cache without {', '.join(missing)}")
        return {name: source[name] for name in names}
    return record(model, model_tokens(model, source, argument), names)[1]


def check_reference(how: object, reference: object, ways: Sequence[str] = ("zero", "mean", "resample")) -> None:
    """Checks that `how` is one of the `ways` to ablate, and that a reference is given if, and only if, it needs one."""
    check_choice("how", how, ways)
    if (reference is None) != (how == "zero"):
        need = "takes no reference" if how == "zero" else "needs reference="
        raise ValueError(f"how={how!r} {need}, got reference={shown(reference)}")


def draw_rows(how: str, n_reference: int, n_prompts: int, generator: torch.Generator) -> Int[Tensor, "prompt"] | None:
    """Which reference prompt each prompt is given, if these are drawn; else `None`."""
    return torch.randint(n_reference, (n_prompts,), generator=generator) if how == "resample" else None


def stand_in(how: str, reference: Tensor, rows: Int[Tensor, "prompt"] | None) -> Tensor:
    """What replaces an ablated output: the reference's mean, its `rows`, or all of it; prompts along the first axis."""
    if how == "mean":
        return reference.mean(0, keepdim=True)
    return reference if rows is None else reference[rows.to(reference.device)]
