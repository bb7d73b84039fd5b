"""Runs a function at every point of a grid: on one core, a pool, Dask or Slurm."""

from hijack_lens.grid.running import run_grid

__all__ = ["run_grid"]
