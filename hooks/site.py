"""Where in a run a component can be read and overwritten."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from hijack_lens._checks import as_int, check_choice
from hijack_lens._inputs import model_tokens
from hijack_lens.circuit import Component
from hijack_lens.hooks.intervention import check_model, record

Part = Literal["output", "pattern"]
Components = Component | str | Sequence[Component | str]
"""One or several heads, MLPs, or names of TransformerLens hook points."""


@dataclass(frozen=True)
class Site:
    """A hook point, and the slice of it that belongs to one component.

    Attributes:
        name: of the hook point.
        head: index on the head axis, where the component is a head.
        head_dim: which axis that is.
        pos_dim: the axis of (query) positions, once the head is picked.
    """

    name: str
    head: int | None = None
    head_dim: int = 2
    pos_dim: int = 1

    def read(self, activation: Tensor) -> Tensor:
        """The component's slice of the activation."""
        return activation if self.head is None else activation.select(self.head_dim, self.head)

    def write(self, activation: Tensor, value: Tensor, positions: Sequence[int] | None) -> Tensor:
        """A copy of the activation with the component's slice replaced, at some or all positions.

        Raises:
            ValueError: where `value` does not fit, or a position lies outside the run.
        """
        edited = activation.clone()
        view = self.read(edited)
        if value.shape[1:] != view.shape[1:] or value.shape[0] not in (1, view.shape[0]):
            raise ValueError(
                f"the source for {self.name!r} has shape {tuple(value.shape)}, the run {tuple(view.shape)}: "
                "their prompts must be equally long, and of one batch size unless the source is one prompt"
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
            raise ValueError(f"positions holds {position}; the run has {length} tokens")
    return torch.tensor([position % length for position in positions], dtype=torch.long)


def as_positions(positions: Any) -> list[int] | None:
    """A list of positions, or `None` for all."""
    if positions is None:
        return None
    single = as_int(positions)
    if single is not None:
        return [single]
    if not isinstance(positions, Iterable) or isinstance(positions, str):
        raise TypeError(f"positions must be an int or several, got {positions!r}")
    listed = []
    for position in positions:
        number = as_int(position)
        if number is None:
            raise TypeError(f"positions must be ints, got {position!r}")
        listed.append(number)
    if not listed:
        raise ValueError("positions must hold at least one position, got none; None means all")
    return listed


def sites(model: Any, components: Components, part: Part = "output") -> list[Site]:
    """Where the components' outputs or attention patterns are.

    Raises:
        TypeError, ValueError: for components that the model lacks, and the pattern of an MLP.
    """
    check_model(model)
    check_choice("part", part, ("output", "pattern"))
    if not isinstance(components, (Component, str, Iterable)):
        raise TypeError(f"component must be a Component, the name of a hook point, or several, got {components!r}")
    listed = [components] if isinstance(components, (Component, str)) else list(components)
    return [_site(model, component, part) for component in listed]


def some_sites(model: Any, components: Components, part: Part) -> list[Site]:
    """The same, of one component at least."""
    found = sites(model, components, part)
    if not found:
        raise ValueError("component must name at least one component, got none")
    return found


def _site(model: Any, component: object, part: str) -> Site:
    if isinstance(component, str):
        if part != "output":
            raise ValueError(f"part={part!r} goes with a head, got the hook point {component!r}")
        over_keys = component.endswith(("hook_pattern", "hook_attn_scores", "hook_rel_scores"))
        return Site(component, pos_dim=2 if over_keys else 1)
    if not isinstance(component, Component):
        raise TypeError(f"component must be a Component or the name of a hook point, got {component!r}")
    if component.layer >= model.cfg.n_layers:
        raise ValueError(f"component {component} is in layer {component.layer}; the model has {model.cfg.n_layers}")
    block = f"blocks.{component.layer}"
    if component.kind == "mlp":
        if part == "pattern":
            raise ValueError(f"part='pattern' goes with a head, got {component}")
        return Site(f"{block}.hook_mlp_out")
    assert component.head is not None
    if component.head >= model.cfg.n_heads:
        raise ValueError(f"component {component} is head {component.head}; the model has {model.cfg.n_heads} per layer")
    if part == "pattern":
        return Site(f"{block}.attn.hook_pattern", component.head, head_dim=1)
    return Site(f"{block}.attn.hook_z", component.head)


def read_source(model: Any, source: object, names: Sequence[str], argument: str) -> dict[str, Tensor]:
    """Activations at hook points from a cache, or from a run on a prompt.

    Raises:
        ValueError: where a cache lacks one of them.
    """
    if isinstance(source, ActivationCache):
        stored = read_source(model, source.cache_dict, names, argument)
        return stored if source.has_batch_dim else {name: value[None] for name, value in stored.items()}
    if isinstance(source, Mapping):
        missing = [name for name in names if name not in source]
        if missing:
            raise ValueError(f"{argument} is a cache without {', '.join(missing)}")
        return {name: source[name] for name in names}
    return record(model, model_tokens(model, source, argument), names)[1]
