"""hijack-lens: which memory wrote each output logit, the context or the weights?

A model that has seen "q c" in its context and "q g" all through its training must choose at the next "q". The
context speaks through the induction circuit, the weights through the bigram memory; this package attributes
every logit to them, switches either off, and predicts which one hijacks the other.
"""

try:
    from transformer_lens import HookedTransformer as _HookedTransformer  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "hijack-lens needs transformer-lens >=3.9,<4: its models are HookedTransformers, which 4.0 removed. "
        "Install it with: pip install 'transformer-lens>=3.9,<4'"
    ) from _error

from hijack_lens import grid, hooks, memories, metrics, probing, reproduction, show, theory, training
from hijack_lens.attribution import (
    LogitAttribution,
    LogOdds,
    Path,
    ScoreAttribution,
    ShapleyValues,
    attribute,
    attribute_scores,
    shapley,
)
from hijack_lens.circuits import CircuitEvidence, find_circuit
from hijack_lens.core.circuit import Circuit, Component, Strengths
from hijack_lens.explanation import Explanation, explain
from hijack_lens.language import (
    Bigram,
    BigramLanguage,
    Fact,
    HijackPrompt,
    SampledSequences,
    default_text,
    hijack_prompt,
)
from hijack_lens.memories import (
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
from hijack_lens.metrics import Metric, logit_diff
from hijack_lens.models import BigramTransformer, associative_transformer, trainable_transformer
from hijack_lens.probing import DoseResponse, dose_response
from hijack_lens.show import write_report
from hijack_lens.theory import Margin
from hijack_lens.training import TrainConfig, TrainingRun, fit_strengths, train

__version__ = "0.1.0"

__all__ = [
    "Bigram",
    "BigramLanguage",
    "BigramTransformer",
    "Circuit",
    "CircuitEvidence",
    "Component",
    "ContextMemory",
    "DoseResponse",
    "Explanation",
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
    "SampledSequences",
    "ScoreAttribution",
    "ShapleyValues",
    "Strengths",
    "TrainConfig",
    "TrainingRun",
    "associative_transformer",
    "attribute",
    "attribute_scores",
    "context_memory",
    "default_text",
    "dose_response",
    "explain",
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
    "theory",
    "train",
    "trainable_transformer",
    "training",
    "write_report",
]
