"""The words for the two memories: what carries each, how strongly it is written, what it adds to a margin."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import check_choice, check_count, check_number, check_type, shown
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, tidy

if TYPE_CHECKING:
    import pandas as pd

_PLACE = re.compile(r"L([0-9]{1,9})(?:H([0-9]{1,9})|MLP)")


@dataclass(frozen=True, order=True)
class Component:
    """An attention head or an MLP.

    Attributes:
        layer: its block, from 0.
        kind: "head" or "mlp".
        head: the head's index in its block; `None` for an MLP.

    Examples:
        >>> head = hl.Component(1, "head", 0)
        >>> print(head)
        L1H0
        >>> hl.Component.of("L1H0") == head
        True
    """

    layer: int
    kind: Literal["head", "mlp"]
    head: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", check_count("layer", self.layer))
        check_choice("kind", self.kind, ("head", "mlp"))
        if self.kind == "head":
            object.__setattr__(self, "head", check_count("head", self.head))
        elif self.head is not None:
            raise ValueError(f"head must be None for an MLP, got {shown(self.head)}")

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}" if self.kind == "head" else f"L{self.layer}MLP"

    @classmethod
    def of(cls, place: str) -> "Component | None":
        """The component at a place ("L0H1", "L2MLP"); `None` for any other text."""
        check_type("place", place, str)
        found = _PLACE.fullmatch(place)
        if found is None:
            return None
        return cls(int(found[1]), "head", int(found[2])) if found[2] else cls(int(found[1]), "mlp")


def heads_at(indices: Iterable[int], n_heads: int) -> list[Component]:
    """The heads that are so far along a flattened table [layer, head]."""
    return [Component(index // n_heads, "head", index % n_heads) for index in indices]


ROLE_NAMES = {"previous_token": "previous-token head", "induction": "induction head", "bigram": "bigram memory"}
"""The name of each role of a `Circuit`, for readers."""

_HEADS = ("head", 'attention heads, each a Component or its place ("L0H1")')


_Role = Component | str | Sequence[Component | str]
"""What a role is given as."""


@dataclass(frozen=True, repr=False, init=False)
class Circuit(Saved, Drawn):
    """The components that carry the two memories; a role may have several or none.

    A role is given as a `Component`, its place ("L0H1", "L2MLP"), or several of these.

    Attributes:
        previous_token: heads that write the previous token into each position.
        induction: heads that attend to what followed the current token before, and copy it.
        bigram: MLPs that hold the global bigrams.
        evidence: the `CircuitEvidence` of a circuit that `find_circuit` found, else `None`; equality ignores it.

    Examples:
        >>> circuit = hl.Circuit(previous_token="L0H0", induction="L1H0", bigram="L1MLP")
        >>> print(circuit)
        previous-token head: L0H0; induction head: L1H0; bigram memory: L1MLP
        >>> circuit.role(hl.Component.of("L1H0"))
        'induction'
        >>> circuit.label(hl.Component.of("L1MLP"))
        'bigram memory'
    """

    previous_token: tuple[Component, ...] = ()
    induction: tuple[Component, ...] = ()
    bigram: tuple[Component, ...] = ()
    evidence: Any = field(default=None, compare=False, repr=False)

    def __init__(
        self, previous_token: _Role = (), induction: _Role = (), bigram: _Role = (), evidence: Any = None
    ) -> None:
        for role, given in zip(ROLE_NAMES, (previous_token, induction, bigram), strict=True):
            object.__setattr__(self, role, _players(role, given))
        object.__setattr__(self, "evidence", evidence)

    def __iter__(self) -> Iterator[tuple[str, Component]]:
        for role in ROLE_NAMES:
            for component in getattr(self, role):
                yield role, component

    def __repr__(self) -> str:
        places = (f"{role}={tuple(map(str, getattr(self, role)))}" for role in ROLE_NAMES)
        return f"Circuit({', '.join(places)})"

    def __str__(self) -> str:
        named = ((name, getattr(self, role)) for role, name in ROLE_NAMES.items())
        return "; ".join(f"{name}: {', '.join(map(str, components)) or 'none'}" for name, components in named)

    def to_pandas(self) -> "pd.DataFrame":
        """A row per component: role, component, layer, and head, which is missing for an MLP."""
        import pandas as pd

        rows = [(role, str(part), part.layer, part.head) for role, part in self]
        frame = pd.DataFrame(rows, columns=["role", "component", "layer", "head"])
        return frame.astype({"layer": int, "head": "Int64"})

    def role(self, component: Component) -> str | None:
        """The role that a component plays, if any."""
        check_type("component", component, Component)
        return next((role for role, member in self if member == component), None)

    def label(self, component: Component) -> str:
        """What to call a component: its role, if no other component has it, else its place."""
        role = self.role(component)
        return ROLE_NAMES[role] if role is not None and len(getattr(self, role)) == 1 else str(component)

    def role_label(self, role: str) -> str:
        """What to call all components of a role together: by its name, and their places where they are several."""
        check_choice("role", role, ROLE_NAMES)
        parts = getattr(self, role)
        return ROLE_NAMES[role] + (f" ({', '.join(map(str, parts))})" if len(parts) > 1 else "")


def _players(role: str, given: Any) -> tuple[Component, ...]:
    """The components that a user gives for a role of a circuit, each once."""
    kind, wanted = ("mlp", 'MLPs, each a Component or its place ("L2MLP")') if role == "bigram" else _HEADS
    listed = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(one, (str, Component)) for one in listed):
        raise TypeError(f"{role} must be {wanted}, got {shown(given)}")
    read = [Component.of(one) if isinstance(one, str) else one for one in listed]
    found = [one for one in read if one is not None and one.kind == kind]
    if len(found) < len(read):
        raise ValueError(f"{role} must be {wanted}, got {shown(given)}")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Strengths:
    """Strengths of the associative-memory transformer's memories; pure numbers, all >= 0.

    Attributes:
        previous_token: b1, the previous-token head's attention score for the token before. Holds over
            contexts of up to about e^b1 tokens. `math.inf` in theory only.
        match: b2, the induction head's score for a position that remembers the current token. One match
            outweighs about e^b2 other positions.
        copy: b3, the logit that the induction head writes for a token it attends to fully.
        bigram: g, the bigram memory's scale: it writes g * log pi_b.

    Examples:
        >>> hl.Strengths(match=4.0)
        Strengths(previous_token=20.0, match=4.0, copy=10.0, bigram=1.0)
        >>> hl.associative_transformer(language, strengths=hl.Strengths(bigram=2.0)).strengths.bigram
        2.0
    """

    previous_token: float = 20.0
    match: float = 6.0
    copy: float = 10.0
    bigram: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "previous_token" and isinstance(value, float) and value == math.inf:
                continue
            object.__setattr__(self, one.name, check_number(one.name, value))


Positions = Literal["relative", "absolute"]

_MARGINS = 8
"""Of a batch, those that its repr shows."""


@dataclass(frozen=True, repr=False)
class Margin(Saved, Drawn):
    """`logit[a] - logit[b]`, split by memory; in logits.

    Attributes:
        context: written through the induction head.
        weights: written by the bigram memory, the direct path and the biases.
        rest: written any other way.

    Examples:
        >>> margin = hl.theory.margin(prompt, language)
        >>> print(margin)
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
        >>> {part: f"{value:.2f}" for part, value in margin.parts.items()}
        {'context': '9.85', 'weights': '-6.58', 'rest': '0.00', 'total': '3.27'}
        >>> float(margin.total) > 0  # the context wins
        True
    """

    context: Float[Tensor, "*batch"]
    weights: Float[Tensor, "*batch"]
    rest: Float[Tensor, "*batch"]

    @property
    def total(self) -> Float[Tensor, "*batch"]:
        """The hijack margin: positive where a wins, negative where b does."""
        return self.context + self.weights + self.rest

    @property
    def parts(self) -> dict[str, Float[Tensor, "*batch"]]:
        """The margin by memory, and in "total"."""
        return {"context": self.context, "weights": self.weights, "rest": self.rest, "total": self.total}

    def to_pandas(self) -> "pd.DataFrame":
        """A row per margin: its place on each axis (none for a single one), context, weights, rest and total."""
        axes = {f"axis_{i}": range(size) for i, size in enumerate(self.total.shape)}
        return tidy(axes, **self.parts) if axes else tidy({"": [0]}, **self.parts).drop(columns="")

    def __repr__(self) -> str:
        def said(value: Tensor) -> str:
            if value.numel() == 1:
                return f"{value.item():+.4f}"
            first = ", ".join(str(round(x, 4)) for x in value.flatten()[:_MARGINS].tolist())
            return f"[{first}{', …' * (value.numel() > _MARGINS)}]"

        return f"Margin({', '.join(f'{name}={said(value)}' for name, value in self.parts.items())})"
