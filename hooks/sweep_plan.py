"""What a sweep can patch: the activations, and whether heads or neurons are patched one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.checks import shown
from hijack_lens.core.hook_points import all_components, check_hook_points
from hijack_lens.core.inputs import indices

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
"""By TransformerLens's short name of an activation: its hook point in a block, and the unit of its entries, if any."""


STREAM = ("resid_pre", "attn_out", "mlp_out")
"""What to sweep by default: what blocks read, and what they write."""

_WRITTEN_BY = {"attn_out": "head", "mlp_out": "mlp"}


def hook_name(activation: str, layer: int) -> str:
    """The full name of an activation's hook point."""
    return f"blocks.{layer}.{HOOKS[activation][0]}"


@dataclass(frozen=True)
class Plan:
    """Everything a sweep patches: each activation x layer x position x unit.

    Attributes:
        activations: their names, all with the same kind of unit.
        layers: the layers of the model.
        positions: counted from the front; `None` patches all positions at once.
        unit: what the last axis counts, if there is one.
        units: the heads or neurons.
        sizes: how many of them each activation has; where heads share keys and values, those have fewer.
    """

    activations: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    unit: Unit | None
    units: tuple[int, ...]
    sizes: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the sweep's result."""
        n_positions = 1 if self.positions is None else len(self.positions)
        units = () if self.unit is None else (len(self.units),)
        return (len(self.activations), len(self.layers), n_positions, *units)

    @property
    def points(self) -> list[tuple[str, int]]:
        """(activation, layer) pairs, in the order of the result's first two axes."""
        return [(activation, layer) for activation in self.activations for layer in self.layers]

    def there(self, activation: str) -> Bool[Tensor, "unit"]:
        """Which of the units an activation has."""
        size = self.sizes[self.activations.index(activation)]
        return torch.tensor([size is None or unit < size for unit in self.units or (0,)])

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
        positions: the positions of each patch.
        units: the head or neuron of each patch; `None` where the whole vector is patched.
    """

    positions: Int[Tensor, "patch position"]
    units: Int[Tensor, "patch"] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def pick(self, differs: Bool[Tensor, "pos *rest"]) -> Bool[Tensor, "patch"]:
        """Whether anything differs at any of a patch's positions, in its unit."""
        if self.units is None:
            return reduce(differs, "pos ... -> pos", "any")[self.positions].any(1)
        return reduce(differs, "pos unit ... -> pos unit", "any")[self.positions, self.units[:, None]].any(1)

    def __getitem__(self, index: Any) -> "Patches":
        return Patches(self.positions[index], None if self.units is None else self.units[index])

    def to(self, device: torch.device) -> "Patches":
        """The same patches on another device."""
        return Patches(self.positions.to(device), None if self.units is None else self.units.to(device))


@dataclass(frozen=True)
class Job:
    """Patches at one hook point that can change the metric.

    Attributes:
        activation: what is patched.
        layer: in which block.
        patches: where.
        source: what is written there.
        places: where each patch's value belongs, among those of all jobs.
    """

    activation: str
    layer: int
    patches: Patches
    source: Float[Tensor, "batch pos ..."]
    places: Int[Tensor, "patch"]

    def __getitem__(self, rows: Int[Tensor, "row"]) -> "Job":
        return Job(self.activation, self.layer, self.patches[rows], self.source, self.places[rows])


def make_plan(
    model: Any,
    activations: str | Sequence[str] | None,
    positions: Any,
    layers: Any,
    units: Any,
    length: int,
    default: Sequence[str] = STREAM,
) -> Plan:
    """The plan that a user's arguments describe; no activations are those of the `default` that the model has."""
    if activations is None:
        kinds_there = {component.kind for component in all_components(model)}
        activations = [name for name in default if _WRITTEN_BY.get(name) in (None, *kinds_there)]
    named = [activations] if isinstance(activations, str) else activations
    if not isinstance(named, Sequence) or not named or not all(isinstance(name, str) for name in named):
        raise TypeError(f"activations must be one or several of {', '.join(HOOKS)}, got {shown(activations)}")
    for name in named:
        if name not in HOOKS:
            raise ValueError(f"activations must be among {', '.join(map(repr, HOOKS))}, got {shown(name)}")
    kinds = {HOOKS[name][1] for name in named}
    if len(kinds) > 1:
        raise ValueError(
            "activations must all have heads, all have neurons, or neither: sweep "
            f"{', '.join(named)} one kind at a time"
        )
    unit = kinds.pop()
    chosen = indices("layers", layers, model.cfg.n_layers)
    check_hook_points(model, (hook_name(name, layer) for name in named for layer in chosen), "activations")
    sizes = [_n_units(model, name) for name in named]
    if unit is None and units is not None:
        raise ValueError(f"units must be None for {', '.join(named)}, which have neither heads nor neurons")
    largest = max((size for size in sizes if size is not None), default=None)
    every = () if largest is None else indices("units", units, largest)
    where = None
    if not isinstance(positions, str) or positions != "all":
        where = tuple(indices("positions", positions, length, f"the run has {length} tokens"))
    return Plan(tuple(named), tuple(chosen), where, unit, tuple(every), tuple(sizes))


def _n_units(model: Any, activation: str) -> int | None:
    cfg = model.cfg
    if HOOKS[activation][1] == "neuron":
        return int(cfg.d_mlp)
    if HOOKS[activation][1] is None:
        return None
    shared = getattr(cfg, "n_key_value_heads", None)
    if activation in ("k", "v") and shared is not None and not getattr(cfg, "ungroup_grouped_query_attention", False):
        return int(shared)
    return int(cfg.n_heads)
