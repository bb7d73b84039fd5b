"""What surrounds every analysis of a model: it runs as written, without dropout, and is left as it was."""

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from hijack_lens.core.hook_points import check_model, every_module

Given = ParamSpec("Given")
Found = TypeVar("Found")

_under_way: ContextVar[tuple[int, ...]] = ContextVar("models that an analysis under way has checked", default=())


def analysis(analyse: Callable[Concatenate[Any, Given], Found]) -> Callable[Concatenate[Any, Given], Found]:
    """Has a function of a model, its first argument, see the model in one state, whatever state the user's is in.

    While it runs, dropout is off, compiled graphs are not used, and no gradients are recorded. Afterwards every
    training flag is as it was, even if Ctrl-C breaks into the restoring itself.

    Raises:
        TypeError, ValueError: for what is no model, and for a model with weights that are not finite.
    """

    @functools.wraps(analyse)
    def analyse_as_written(model: Any, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        model = as_written(model)
        check_model(model)
        if id(model) not in _under_way.get():
            check_finite_weights(model)
        flagged = [module for module in every_module(model) if module.training]
        # Hold what must be restored before anything is changed.
        restore = functools.partial(_restore, flagged, holder := object(), _under_way.get(), torch.is_grad_enabled())
        try:
            try:
                hold_eager(holder)
                for module in flagged:
                    module.training = False
                _under_way.set((*_under_way.get(), id(model)))
                with torch.inference_mode(False), torch.no_grad():
                    return analyse(model, *args, **kwargs)
            finally:
                restore()
        finally:
            restore()  # once more, in case a Ctrl-C interrupted the first

    return analyse_as_written


def _restore(flagged: Sequence[nn.Module], holder: object, before: tuple[int, ...], gradients: bool) -> None:
    for module in flagged:
        module.training = True
    torch.set_grad_enabled(gradients)
    _under_way.set(before)
    release_eager(holder)


def as_written(model: Any) -> Any:
    """The model that `torch.compile` has wrapped; any other as it is."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `module.compile` has wrapped a module."""
    return module._compiled_call_impl is not None or as_written(module) is not module


_holders: dict[int, object] = {}
_stances: list[Any] = []


def hold_eager(holder: object) -> None:
    """From now on compiled models run as written: graphs that were traced without a hook would skip it."""
    _holders[id(holder)] = holder
    if not _stances:
        _stances.append(torch.compiler.set_stance("force_eager"))


def release_eager(holder: object) -> None:
    """The reverse, once nobody holds it any more; may be called again."""
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
