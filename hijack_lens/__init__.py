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

from hijack_lens import experiments, hooks, memories, metrics, probing, theory, training, visual
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
from hijack_lens.circuit import Circuit, Component
from hijack_lens.evidence import CircuitEvidence
from hijack_lens.explain import Explanation, explain
from hijack_lens.find_circuit import find_circuit
from hijack_lens.language import BigramLanguage, SampledSequences, default_text
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
from hijack_lens.models import TwoLayerTransformer, associative_transformer, two_layer_transformer
from hijack_lens.probing import Bigram, DoseResponse, Fact, dose_response
from hijack_lens.prompts import HijackPrompt, hijack_prompt
from hijack_lens.theory import Margin, Strengths
from hijack_lens.training import TrainConfig, TrainingRun, fit_strengths, train
from hijack_lens.visual import report

__version__ = "0.1.0"

__all__ = [
    "Bigram",
    "BigramLanguage",
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
    "TwoLayerTransformer",
    "associative_transformer",
    "attribute",
    "attribute_scores",
    "context_memory",
    "default_text",
    "dose_response",
    "experiments",
    "explain",
    "find_circuit",
    "fit_strengths",
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
    "report",
    "shapley",
    "theory",
    "train",
    "training",
    "two_layer_transformer",
    "visual",
]
