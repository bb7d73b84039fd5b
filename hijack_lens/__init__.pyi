"""The public names, each imported when it is first used; see `__init__.py`."""

from . import grid, hooks, memories, metrics, probing, reproduction, show, tasks, theory, training
from .attribution import (
    LogitAttribution,
    LogOdds,
    Path,
    ScoreAttribution,
    ShapleyValues,
    SourceAttribution,
    attribute,
    attribute_scores,
    attribute_sources,
    find_carriers,
    shapley,
)
from .circuits import CircuitEvidence, find_circuit
from .core.carriers import Carriers
from .core.circuit import Circuit, Component, Strengths
from .explanation import AnswerExplanation, Explanation, explain
from .explorer import Explorer, RunExplorer, explore, explore_runs
from .language import Bigram, BigramLanguage, Fact, HijackPrompt, SampledSequences, default_text, hijack_prompt
from .memories import (
    ContextMemory,
    MemoryCapacity,
    MemoryConflict,
    MemoryMatrix,
    MemoryNeurons,
    context_memory,
    memory_capacity,
    memory_conflict,
    memory_matrix,
    memory_neurons,
)
from .metrics import Metric, logit_diff
from .models import BigramTransformer, associative_transformer, trainable_transformer
from .probing import DoseResponse, dose_response
from .show import write_report
from .theory import Margin
from .training import TrainConfig, TrainingRun, fit_strengths, train

__version__: str

__all__ = [
    "AnswerExplanation",
    "Bigram",
    "BigramLanguage",
    "BigramTransformer",
    "Carriers",
    "Circuit",
    "CircuitEvidence",
    "Component",
    "ContextMemory",
    "DoseResponse",
    "Explanation",
    "Explorer",
    "Fact",
    "HijackPrompt",
    "LogOdds",
    "LogitAttribution",
    "Margin",
    "MemoryCapacity",
    "MemoryConflict",
    "MemoryMatrix",
    "MemoryNeurons",
    "Metric",
    "Path",
    "RunExplorer",
    "SampledSequences",
    "ScoreAttribution",
    "ShapleyValues",
    "SourceAttribution",
    "Strengths",
    "TrainConfig",
    "TrainingRun",
    "associative_transformer",
    "attribute",
    "attribute_scores",
    "attribute_sources",
    "context_memory",
    "default_text",
    "dose_response",
    "explain",
    "explore",
    "explore_runs",
    "find_carriers",
    "find_circuit",
    "fit_strengths",
    "grid",
    "hijack_prompt",
    "hooks",
    "logit_diff",
    "memories",
    "memory_capacity",
    "memory_conflict",
    "memory_matrix",
    "memory_neurons",
    "metrics",
    "probing",
    "reproduction",
    "shapley",
    "show",
    "tasks",
    "theory",
    "train",
    "trainable_transformer",
    "training",
    "write_report",
]
