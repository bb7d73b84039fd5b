"""What a sweep can patch: which activations, and one entry per what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijack_lens.core.checks import as_int
from hijack_lens.core.hook_points import check_hook_points, position_index
from hijack_lens.core.inputs import as_positions

Unit = Literal["head", "neuron"]

HOOKS: dict[str, tuple[str, Unit | None]] = {
    "resid_pre": ("hook_resid_pre", None),
    "resid_mid": ("hook_resid_mid", None),
    "resid_post": ("hook_resid_post", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "z": ("attn.hook_z", "head"),
    "q": ("attn.hook_q", "head"),
    "k": ("attn.hook_k", "head"),
    "v": ("attn.hook_v", "head"),
    "pattern": ("attn.hook_pattern", "head"),
    "post": ("mlp.hook_post", "neuron"),
}
"""TransformerLens's short names of activations: the hook point in a block, and what has an entry of its own there."""


def hook_name(component: str, layer: int) -> str:
    """The full name of an activation's hook point."""
    return f"blocks.{layer}.{HOOKS[component][0]}"


@dataclass(frozen=True)
class Plan:
    """Everything a sweep patches: each component x layer x position x unit.

    Attributes:
        components: names of activations, all with the same kind of unit.
        layers: of the model.
        positions: from the front; `None` patches all positions at once.
        unit: what the last axis counts, if there is one.
        units: heads or neurons.
    """

    components: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    unit: Unit | None
    units: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sweep's result."""
        n_positions = 1 if self.positions is None else len(self.positions)
        units = () if self.unit is None else (len(self.units),)
        return (len(self.components), len(self.layers), n_positions, *units)

    @property
    def points(self) -> list[tuple[str, int]]:
        """(component, layer) pairs, in the order of the result's first two axes."""
        return [(component, layer) for component in self.components for layer in self.layers]

    def patches(self, length: int) -> "Patches":
        """Every position with every unit, in the order of the result's last axes."""
        positions = [range(length)] if self.positions is None else [[position] for position in self.positions]
        units = self.units if self.unit else (None,)
        return Patches(
            torch.tensor([list(where) for where in positions for _ in units]),
            torch.tensor([list(units)] * len(positions)).flatten() if self.unit else None,
        )


@dataclass(frozen=True)
class Patches:
    """Patches at one hook point, each at one or all positions.

    Attributes:
        positions: of each patch.
        units: the head or neuron of each patch; `None` where the whole vector is patched.
    """

    positions: Int[Tensor, "patch position"]
    units: Int[Tensor, "patch"] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def pick(self, differs: Bool[Tensor, "pos *rest"]) -> Bool[Tensor, "patch"]:
        """Whether anything differs at any of a patch's positions, in its unit."""
        if self.units is None:
            return differs.flatten(1).any(-1)[self.positions].any(1)
        return differs.reshape(*differs.shape[:2], -1).any(-1)[self.positions, self.units[:, None]].any(1)

    def __getitem__(self, index: Any) -> "Patches":
        return Patches(self.positions[index], None if self.units is None else self.units[index])

    def to(self, device: torch.device) -> "Patches":
        """The same on another device."""
        return Patches(self.positions.to(device), None if self.units is None else self.units.to(device))


def make_plan(
    model: Any, components: str | Sequence[str], positions: Any, layers: Any, units: Any, length: int
) -> Plan:
    """The plan that a user's arguments describe.

    Raises:
        TypeError, ValueError: for what the model or the prompts lack, or a mixture that has no common axes.
    """
    named = [components] if isinstance(components, str) else components
    if not isinstance(named, Sequence) or not named or not all(isinstance(name, str) for name in named):
        raise TypeError(f"components must be one or several of {', '.join(HOOKS)}, got {components!r}")
    for name in named:
        if name not in HOOKS:
            raise ValueError(f"components must be among {', '.join(map(repr, HOOKS))}, got {name!r}")
    kinds = {HOOKS[name][1] for name in named}
    if len(kinds) > 1:
        raise ValueError(
            f"components must all have heads, all have neurons, or neither: sweep {', '.join(named)} one kind at a time"
        )
    unit = kinds.pop()
    chosen = _chosen("layers", layers, model.cfg.n_layers)
    check_hook_points(model, (hook_name(name, layer) for name in named for layer in chosen))
    sizes = {name: _n_units(model, name) for name in named}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"components must have equally many heads; in this model {counts}: sweep them one at a time")
    if unit is None and units is not None:
        raise ValueError(f"units must be None for {', '.join(named)}, which have neither heads nor neurons")
    size = sizes[named[0]]
    every = () if size is None else _chosen("units", units, size)
    where: tuple[int, ...] | None
    if isinstance(positions, str) and positions == "all":
        where = None
    else:
        listed = as_positions(positions)
        where = tuple(range(length) if listed is None else position_index(listed, length).tolist())
    return Plan(tuple(named), chosen, where, unit, every)


def _chosen(name: str, values: Any, size: int) -> tuple[int, ...]:
    if values is None:
        return tuple(range(size))
    single = as_int(values)
    listed = [single] if single is not None else list(values) if isinstance(values, Iterable) else [values]
    numbers = []
    for value in listed:
        number = as_int(value)
        if number is None:
            raise TypeError(f"{name} must be ints, got {value!r}")
        if not -size <= number < size:
            raise ValueError(f"{name} holds {number}; the model has {size}")
        numbers.append(number % size)
    if not numbers:
        raise ValueError(f"{name} must hold at least one, got none; None means all")
    return tuple(numbers)


def _n_units(model: Any, component: str) -> int | None:
    cfg = model.cfg
    if HOOKS[component][1] == "neuron":
        return int(cfg.d_mlp)
    if HOOKS[component][1] is None:
        return None
    shared = getattr(cfg, "n_key_value_heads", None)
    if component in ("k", "v") and shared is not None and not getattr(cfg, "ungroup_grouped_query_attention", False):
        return int(shared)
    return int(cfg.n_heads)
