"""A HookedTransformer's weights, stacked over layers, and what is read off them."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.matrix import composition_scores

from hijack_lens.hooked.config import HookedTransformerConfig


class HeadCircuits:
    """The two circuits of heads whose weights lie along the first axes of `W_Q`, `W_K`, `W_V` and `W_O`."""

    W_Q: Any
    W_K: Any
    W_V: Any
    W_O: Any

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head."""
        return FactoredMatrix(self.W_V, self.W_O)


class StackedWeights(HeadCircuits, HookedRootModule):
    """The weights of `embed`, `blocks` and `unembed` by TransformerLens's names."""

    cfg: HookedTransformerConfig
    embed: Any
    pos_embed: Any
    blocks: Any  # of TransformerBlock
    unembed: Any

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Embeddings of absolute positions; rotary models have none."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """All that the residual stream can start from."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab_out"]:
        """Unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab_out"]:
        """Bias of the logits."""
        return self.unembed.b_U

    def _stacked(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_Q(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Query weights."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Key weights."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Value weights."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "n_layers n_heads d_head d_model"]:
        """Output weights."""
        return self._stacked("attn", "W_O")

    @property
    def W_in(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """The MLPs' input weights."""
        return self._stacked("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "n_layers d_mlp d_model"]:
        """The MLPs' output weights."""
        return self._stacked("mlp", "W_out")

    @property
    def W_gate(self) -> None:
        """No MLP here is gated."""
        return None

    @property
    def b_Q(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Query biases."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Key biases."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Value biases."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "n_layers d_model"]:
        """Attention's output biases."""
        return self._stacked("attn", "b_O")

    @property
    def b_in(self) -> Float[Tensor, "n_layers d_mlp"]:
        """The MLPs' input biases."""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_layers d_model"]:
        """The MLPs' output biases."""
        return self._stacked("mlp", "b_out")

    @property
    def n_params_total(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """The biases that the blocks before `layer` add to the residual stream.

        Args:
            layer: from 0 to n_layers.
            mlp_input: whether to add what attention of `layer` itself adds.
            include_mlp_biases: whether to count those of MLPs.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        if not 0 <= layer <= self.cfg.n_layers - mlp_input:
            raise ValueError(f"layer must be from 0 to {self.cfg.n_layers - mlp_input}, got {layer}")
        biases = [block.attn.b_O for block in self.blocks[: layer + mlp_input]]
        if include_mlp_biases and not self.cfg.attn_only:
            biases += [block.mlp.b_out for block in self.blocks[:layer]]
        return torch.stack([self.b_U.new_zeros(self.cfg.d_model), *biases]).sum(0)

    def all_composition_scores(
        self, mode: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "n_layers n_heads n_layers n_heads"]:
        """How much each later head reads what each earlier head writes, by query, key or value (Elhage et al. 2021)."""
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
        reads = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        layers = torch.arange(self.cfg.n_layers, device=self.W_E.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        scores = composition_scores(self.OV, reads, broadcast_dims=True)
        return torch.where(later, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """L0H0, L0H1, ..."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]
