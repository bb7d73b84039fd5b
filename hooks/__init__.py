"""Interventions: ablate, patch and path-patch the components of any TransformerLens model."""

from hijack_lens.hooks.ablate_and_patch import ablate, patch
from hijack_lens.hooks.edge_sweeps import edge_attribution, path_sweep
from hijack_lens.hooks.edges import Edge, patch_path
from hijack_lens.hooks.intervention import Intervention
from hijack_lens.hooks.scaling import scale, steer
from hijack_lens.hooks.sweep_results import Comparison, EdgeScreen, PathSweep, Sweep
from hijack_lens.hooks.sweeps import ablate_sweep, attribution_patch, patch_sweep

__all__ = [
    "Comparison",
    "Edge",
    "EdgeScreen",
    "Intervention",
    "PathSweep",
    "Sweep",
    "ablate",
    "ablate_sweep",
    "attribution_patch",
    "edge_attribution",
    "patch",
    "patch_path",
    "patch_sweep",
    "path_sweep",
    "scale",
    "steer",
]
