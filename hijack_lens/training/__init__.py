"""Training a two-layer model, and measuring what it memorises."""

from hijack_lens.training.config import TrainConfig
from hijack_lens.training.fit import FittedStrengths, TheoryAgreement, fit_strengths, theory_agreement
from hijack_lens.training.loop import train
from hijack_lens.training.one_step import gradient_steps
from hijack_lens.training.recall import behaviour, memory_recall
from hijack_lens.training.run import TrainingRun
from hijack_lens.training.tables import read_tables

__all__ = [
    "FittedStrengths",
    "TheoryAgreement",
    "TrainConfig",
    "TrainingRun",
    "behaviour",
    "fit_strengths",
    "gradient_steps",
    "memory_recall",
    "read_tables",
    "theory_agreement",
    "train",
]
