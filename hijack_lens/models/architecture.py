"""The shape of a two-layer model."""

from dataclasses import dataclass
from typing import Literal

from hijack_lens._checks import check_choice, check_count
from hijack_lens.circuit import Circuit, Component


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, in TransformerLens's terms; together with a language it determines every parameter's.

    Attributes:
        positions: "relative" (layer 0 is a `RelativeAttention`), "absolute" (learned `W_pos`), "rotary" or "none".
        n_layers: of attention, each with `n_heads` heads of size `d_head`.
        mlp: the last block's MLP: "relu", "linear" or `None`. Earlier blocks' MLPs are zero.
        norm: `None`, "LN" or "RMS", before each head and MLP and before the unembedding.
        n_ctx: the longest prompt.
        n_offsets: with relative positions, how many offsets have a key.
        scale_attention: whether scores are divided by sqrt(d_head).
    """

    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    positions: Literal["relative", "absolute", "rotary", "none"] = "relative"
    n_layers: int = 2
    n_heads: int = 1
    mlp: Literal["relu", "linear"] | None = "relu"
    norm: Literal["LN", "RMS"] | None = None
    n_offsets: int = 2
    scale_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "d_head", "d_mlp", "n_ctx", "n_layers", "n_heads", "n_offsets"):
            check_count(name, getattr(self, name), minimum=1)
        check_choice("positions", self.positions, ("relative", "absolute", "rotary", "none"))
        if self.mlp is not None:
            check_choice("mlp", self.mlp, ("relu", "linear"))
        if self.norm is not None:
            check_choice("norm", self.norm, ("LN", "RMS"))
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"d_head must be even with rotary positions, got {self.d_head}")

    @property
    def circuit(self) -> Circuit:
        """The roles that the layers are meant for: first layer, last layer, last MLP."""
        heads = range(self.n_heads)
        last = self.n_layers - 1
        return Circuit(
            previous_token=tuple(Component(0, "head", head) for head in heads) if last else (),
            induction=tuple(Component(last, "head", head) for head in heads),
            bigram=() if self.mlp is None else (Component(last, "mlp"),),
        )
