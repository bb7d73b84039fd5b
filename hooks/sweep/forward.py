"""Patched runs as whole forward passes, many in a batch: for every model, and with the user's hooks in place."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.hooks.intervention import Intervention
from hijack_lens.hooks.sweep.points import Patches, hook_name
from hijack_lens.hooks.sweep.reader import Reader


class ForwardRuns:
    """Patched runs through the model itself.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: of the unpatched run.
        reader: of the metric.
        together: whether patches may share a forward pass. Hooks of the user's must not see a batch other than theirs.
    """

    name: Literal["forward"] = "forward"

    def __init__(self, model: Any, tokens: Int[Tensor, "batch pos"], reader: Reader, together: bool):
        self.model = model
        self.tokens = tokens
        self.reader = reader
        self.together = together

    def reaches(self, component: str, layer: int, patches: Patches) -> Tensor:
        """Which patches can change the metric; whole runs need no such knowledge."""
        return torch.ones(len(patches), dtype=torch.bool)

    def chunks(self, component: str, layer: int, patches: Patches, memory: float) -> list[Int[Tensor, "chunk"]]:
        """Indices of patches, in groups that fit into `memory` bytes."""
        if not len(patches):
            return []
        size = runs_at_once(self.model, self.tokens, memory) if self.together else 1
        return list(torch.arange(len(patches)).split(size))

    def values(
        self, component: str, layer: int, patches: Patches, source: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "patch"]:
        """The metric under each patch.

        Args:
            component: whose activation is patched.
            layer: of the model.
            patches: where.
            source: the activation to patch in, positions second (of patterns: the query's).
        """
        count = len(patches)

        def write(activation: Tensor, hook: Any) -> Tensor:
            edited = activation.clone()
            runs = by_position(component, edited).unflatten(0, (count, -1))
            for row, positions in enumerate(patches.positions):
                if patches.units is None:
                    runs[row, :, positions] = source[:, positions].to(runs)
                else:
                    unit = patches.units[row]
                    runs[row, :, positions, unit] = source[:, positions, unit].to(runs)
            return edited

        with Intervention(self.model, edit=[(hook_name(component, layer), write)]):
            logits = self.model(self.tokens.repeat(count, 1))
        return self.reader.each(logits.unflatten(0, (count, -1)))


def by_position(component: str, activation: Tensor) -> Float[Tensor, "batch pos ..."]:
    """A view of an activation with positions second, then heads or neurons."""
    return activation.transpose(1, 2) if component == "pattern" else activation


def runs_at_once(model: Any, tokens: Int[Tensor, "batch pos"], memory: float) -> int:
    """How many runs on `tokens` fit into `memory` bytes, roughly; at least one."""
    cfg, (batch, length) = model.cfg, tokens.shape
    wide = cfg.d_vocab * 2 + cfg.d_model * 8 + (cfg.d_mlp or 0) * 3 + cfg.n_heads * length * 3
    return max(1, int(memory // (batch * length * wide * torch.finfo(cfg.dtype).bits // 8)))
