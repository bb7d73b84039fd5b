"""Other in-context learners under the same lens: tasks whose exact answers are known, and models trained on them.

In each, the context and the weights may disagree; which decides is one number for all, `context_share`.
"""

from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.affine_recurrence import AffineRecurrence
from hijack_lens.tasks.algorithm_selection import AlgorithmSelection
from hijack_lens.tasks.bigram_memories import BigramMemories
from hijack_lens.tasks.compressed_digits import CompressedDigits
from hijack_lens.tasks.conflicts import ContextShare, context_share
from hijack_lens.tasks.kinds import LinearPrompts, LogisticPrompts
from hijack_lens.tasks.latent_concepts import LatentConcepts
from hijack_lens.tasks.probes import Moved, decodability, move_latent
from hijack_lens.tasks.relevant_patterns import RelevantPatterns
from hijack_lens.tasks.representations import Representations
from hijack_lens.tasks.task import Bar, Batch, Schedule, Task, shortened
from hijack_lens.tasks.training import TaskRun, train

__all__ = [
    "AffineRecurrence",
    "AlgorithmSelection",
    "Bar",
    "Batch",
    "BigramMemories",
    "CompressedDigits",
    "ContextShare",
    "LatentConcepts",
    "LinearPrompts",
    "LogisticPrompts",
    "Moved",
    "RealTransformer",
    "RelevantPatterns",
    "Representations",
    "Schedule",
    "Task",
    "TaskRun",
    "context_share",
    "decodability",
    "move_latent",
    "shortened",
    "train",
]
