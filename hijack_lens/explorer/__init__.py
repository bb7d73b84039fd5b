"""Explorers: pages with sliders, in a notebook, exported, or saved, that need neither kernel nor network."""

from hijack_lens.explorer.in_runs import RunExplorer, explore_runs
from hijack_lens.explorer.in_theory import Explorer, explore

__all__ = ["Explorer", "RunExplorer", "explore", "explore_runs"]
