"""Interventions: ablate, patch and path-patch the components of any TransformerLens model."""

from hijack_lens.hooks.ablate import ablate
from hijack_lens.hooks.intervention import Intervention
from hijack_lens.hooks.patch import patch
from hijack_lens.hooks.path import patch_path

__all__ = ["Intervention", "ablate", "patch", "patch_path"]
