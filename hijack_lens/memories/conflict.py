"""The context's memory and the weights' memory as two tables, and where they contradict each other."""

from typing import Any

import torch
from tqdm.auto import tqdm

from hijack_lens.attribution.logits import attribute
from hijack_lens.circuit import Circuit
from hijack_lens.memories.conflict_result import MemoryConflict
from hijack_lens.memories.context_tables import Tokens, replaced, token_tables

_CELLS = 2**24
"""Numbers per attribution: 128 MiB in float64."""


def memory_conflict(
    model: Any,
    tokens: object,
    position: int = -1,
    *,
    queries: Tokens = None,
    answers: Tokens = None,
    circuit: Circuit | None = None,
) -> MemoryConflict:
    """What the context and what the weights would say at a position, whatever token stood there; and who would win.

    Row q of each table is what `attribute` gives for the prompt with q in the position's place: the context (all paths
    through the circuit's induction heads), the weights (the bigram memory, the direct path and biases) and the rest,
    which sum to the model's logits. Beside `context_memory`, which is what one head writes straight into the logits,
    the context here includes what later MLPs make of that; and in models of two layers not the head's value bias, which
    is the same in all contexts.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        tokens: one prompt: text, tokens or a `HijackPrompt`. What comes after the position does not matter.
        position: where the token is replaced; negative ones count from the end.
        queries: tokens to put there, by id or text; by default the whole vocabulary.
        answers: tokens whose logits to give, at least two; likewise.
        circuit: the roles of the components; by default `model.circuit`.

    Returns:
        A `MemoryConflict`.

    Raises:
        TypeError, ValueError: as for `attribute`, for a circuit without induction heads, and for tables of more than
            2^27 numbers, with a large vocabulary.
    """
    tables = token_tables(model, tokens, position, queries, answers)
    circuit = getattr(model, "circuit", None) if circuit is None else circuit
    if isinstance(circuit, Circuit) and not circuit.induction:
        raise ValueError(f"circuit must name an induction head, through which the context speaks; got {circuit}")
    prompts, parts = replaced(tables.tokens, tables.queries), []
    done, rows_at_once = 0, 1
    with tqdm(total=len(prompts), disable=None, delay=1, unit="query", desc="memory_conflict") as bar:
        while done < len(prompts):
            rows = prompts[done : done + rows_at_once]
            result = attribute(model, rows, circuit=circuit, answers=tables.answers)
            parts.append(torch.stack([*result.by_memory().values(), result.logits]))
            rows_at_once = max(1, _CELLS * len(rows) // result.values.numel())
            done += len(rows)
            bar.update(len(rows))
    context, weights, rest, logits = torch.cat(parts, 1)
    return MemoryConflict(
        tokens=tables.tokens,
        queries=tables.queries,
        answers=tables.answers,
        vocab=tables.vocab,
        context=context,
        weights=weights,
        rest=rest,
        logits=logits,
    )
