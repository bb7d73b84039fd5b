"""The two memories opened: what the context and what the weights hold, as tables from token to token."""

from hijack_lens.memories.capacity import memory_capacity
from hijack_lens.memories.capacity_result import MemoryCapacity
from hijack_lens.memories.conflict import memory_conflict
from hijack_lens.memories.conflict_result import MemoryConflict
from hijack_lens.memories.context import context_memory
from hijack_lens.memories.context_result import ContextMemory
from hijack_lens.memories.matrix import memory_matrix
from hijack_lens.memories.matrix_result import MemoryMatrix
from hijack_lens.memories.neurons import memory_neurons
from hijack_lens.memories.neurons_result import MemoryNeurons

__all__ = [
    "ContextMemory",
    "MemoryCapacity",
    "MemoryConflict",
    "MemoryMatrix",
    "MemoryNeurons",
    "context_memory",
    "memory_capacity",
    "memory_conflict",
    "memory_matrix",
    "memory_neurons",
]
