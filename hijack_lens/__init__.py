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

from hijack_lens import hooks, theory, training, visual
from hijack_lens.attribution import LogitAttribution, Path, attribute
from hijack_lens.circuit import Circuit, Component
from hijack_lens.explain import Explanation, explain
from hijack_lens.language import BigramLanguage, SampledSequences, default_text
from hijack_lens.models import TwoLayerTransformer, associative_transformer, two_layer_transformer
from hijack_lens.prompts import HijackPrompt, hijack_prompt
from hijack_lens.theory import Margin, Strengths
from hijack_lens.training import TrainConfig, TrainingRun, fit_strengths, train
from hijack_lens.visual import report

__version__ = "0.1.0"

__all__ = [
    "BigramLanguage",
    "Circuit",
    "Component",
    "Explanation",
    "HijackPrompt",
    "LogitAttribution",
    "Margin",
    "Path",
    "SampledSequences",
    "Strengths",
    "TrainConfig",
    "TrainingRun",
    "TwoLayerTransformer",
    "associative_transformer",
    "attribute",
    "default_text",
    "explain",
    "fit_strengths",
    "hijack_prompt",
    "hooks",
    "report",
    "theory",
    "train",
    "training",
    "two_layer_transformer",
    "visual",
]
