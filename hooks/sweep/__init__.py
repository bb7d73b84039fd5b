"""Sweeps: the metric under every patch, or every ablation, of component x layer x position."""

from hijack_lens.hooks.sweep.api import ablate_sweep, patch_sweep
from hijack_lens.hooks.sweep.comparison import Comparison
from hijack_lens.hooks.sweep.gradient import attribution_patch
from hijack_lens.hooks.sweep.result import Sweep

__all__ = ["Comparison", "Sweep", "ablate_sweep", "attribution_patch", "patch_sweep"]
