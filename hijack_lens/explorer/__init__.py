"""Explorers: pages with sliders, in a notebook, exported, or saved, that need neither kernel nor network."""

from hijack_lens.explorer.in_theory import Explorer, explore

__all__ = ["Explorer", "explore"]
