"""What surrounds every analysis of a model: it runs as written, without dropout, and is left as it was."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hijack_lens.core.hook_points import check_model, every_module, forget_points, points_kept
from hijack_lens.core.texts import begins, texts_begin

Given = ParamSpec("Given")
Found = TypeVar("Found")


class _UnderWay(NamedTuple):
    """What an analysis under way has checked, and what must not be left when it ends."""

    models: tuple[int, ...]
    pending: dict[int, Callable[[], None]]


_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""By model, what an analysis of it holds: it changes flags and adds hooks, which others would see."""

_under_way: ContextVar[_UnderWay | None] = ContextVar("the analysis under way", default=None)


def analysis(analyse: Callable[Concatenate[Any, Given], Found]) -> Callable[Concatenate[Any, Given], Found]:
    """Has a function of a model, its first argument, see the model in one state, whatever state the user's is in.

    While it runs, dropout and `torch.autocast` are off, compiled graphs are not used, and no gradients are recorded;
    and texts that it reads begin as its `prepend_bos`, if it takes one, says. Afterwards every training flag is as it
    was, even if Ctrl-C breaks into the restoring itself. Threads that analyse one model do so in turn, and hooks of an
    analysis act on its own thread's runs alone.

    Raises:
        TypeError, ValueError: for what is no model, and for a model with weights that are not finite.
    """

    @functools.wraps(analyse)
    def analyse_as_written(model: Any, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        model = as_written(model)
        check_model(model)
        with _locks.setdefault(model, threading.RLock()):
            prepend_bos: Any = kwargs.get("prepend_bos")
            outer = _under_way.get()
            checked = () if outer is None else outer.models
            if id(model) not in checked:
                check_finite_weights(model)
            # Hold what must be restored before anything is changed.
            flagged = [module for module in every_module(model) if module.training]
            ours = _UnderWay((*checked, id(model)), {})
            casting = [kind for kind in _CASTING if torch.is_autocast_enabled(kind)]
            restore = functools.partial(_restore, flagged, casting, ours, outer, torch.is_grad_enabled(), begins.get())
            try:
                try:
                    _under_way.set(ours)
                    hold_eager(ours)
                    for module in flagged:
                        module.training = False
                    for kind in casting:
                        torch.set_autocast_enabled(kind, False)
                    with torch.inference_mode(False), torch.no_grad(), points_kept(), texts_begin(prepend_bos):
                        return analyse(model, *args, **kwargs)
                finally:
                    restore()
            finally:
                restore()  # once more, in case a Ctrl-C interrupted the first

    return analyse_as_written


_CASTING = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices whose products `torch.autocast` may take in half precision."""


def _restore(
    flagged: Sequence[nn.Module],
    casting: Sequence[str],
    ours: _UnderWay,
    outer: _UnderWay | None,
    gradients: bool,
    begin: bool | None,
) -> None:
    for module in flagged:
        module.training = True
    for kind in casting:
        torch.set_autocast_enabled(kind, True)
    # A Ctrl-C between the last line of a `with` and its `__exit__` leaves an intervention entered.
    for undo in tuple(ours.pending.values()):
        undo()
    torch.set_grad_enabled(gradients)
    begins.set(begin)
    _under_way.set(outer)
    if outer is None:
        forget_points()
    release_eager(ours)


@contextmanager
def without_autocast() -> Iterator[None]:
    """No product is taken in half precision because of the user's `torch.autocast`, as long as the context lasts."""
    with ExitStack() as off:
        for kind in _CASTING:
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        yield


def analysing_thread() -> int | None:
    """The thread of the analysis under way, if there is one: the only one whose runs its hooks may act on."""
    return None if _under_way.get() is None else threading.get_ident()


def as_written(model: Any) -> Any:
    """The model that `torch.compile` has wrapped; any other as it is."""
    return model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else model


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `module.compile` has wrapped a module."""
    return module._compiled_call_impl is not None or as_written(module) is not module


_holders: dict[int, object] = {}
_stances: list[Any] = []


def hold_eager(holder: object, undo: Callable[[], None] | None = None) -> None:
    """From now on compiled models run as written: graphs that were traced without a hook would skip it.

    If the analysis under way ends before `release_eager` is called, it calls `undo`.
    """
    if undo is not None and (analysis_under_way := _under_way.get()) is not None:
        analysis_under_way.pending[id(holder)] = undo
    _holders[id(holder)] = holder
    if not _stances:
        _stances.append(torch.compiler.set_stance("force_eager"))


def release_eager(holder: object) -> None:
    """The reverse, once nobody holds it any more; may be called again."""
    if (analysis_under_way := _under_way.get()) is not None:
        analysis_under_way.pending.pop(id(holder), None)
    _holders.pop(id(holder), None)
    if _stances and not _holders:
        _stances[0].__exit__(None, None, None)
        _stances.clear()


def check_finite_weights(model: Any) -> None:
    """No parameter holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        # A sum is faster than a look at every number, and finite only where all of them are.
        if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
            bad = weight[~weight.isfinite()].flatten()[0].item()
            raise ValueError(f"model's weights must be finite, got {bad} in {name.replace('_original_component.', '')}")
