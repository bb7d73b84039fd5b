"""Train a two-layer model, and watch what it memorises."""

from hijack_lens.training.config import TrainConfig
from hijack_lens.training.loop import train
from hijack_lens.training.run import TrainingRun

__all__ = ["TrainConfig", "TrainingRun", "train"]
