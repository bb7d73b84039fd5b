"""The two memories opened: what the context and what the weights hold, as tables from token to token."""

from hijack_lens.memories.capacity import MemoryCapacity, memory_capacity
from hijack_lens.memories.conflict import MemoryConflict, memory_conflict
from hijack_lens.memories.context import ContextMemory, context_memory
from hijack_lens.memories.dual import DualModel, dual_model
from hijack_lens.memories.matrix import MemoryMatrix, memory_matrix
from hijack_lens.memories.neurons import MemoryNeurons, memory_neurons

__all__ = [
    "ContextMemory",
    "DualModel",
    "MemoryCapacity",
    "MemoryConflict",
    "MemoryMatrix",
    "MemoryNeurons",
    "context_memory",
    "dual_model",
    "memory_capacity",
    "memory_conflict",
    "memory_matrix",
    "memory_neurons",
]
