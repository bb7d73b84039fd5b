"""Interventions: ablate, patch and path-patch the components of any TransformerLens model."""

from hijack_lens.hooks.ablate import ablate
from hijack_lens.hooks.edge_attribution import edge_attribution
from hijack_lens.hooks.edges import Edge
from hijack_lens.hooks.intervention import Intervention
from hijack_lens.hooks.patch import patch
from hijack_lens.hooks.path import patch_path
from hijack_lens.hooks.path_result import PathSweep
from hijack_lens.hooks.path_sweep import path_sweep
from hijack_lens.hooks.sweep import Comparison, Sweep, ablate_sweep, attribution_patch, patch_sweep

__all__ = [
    "Comparison",
    "Edge",
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
]
