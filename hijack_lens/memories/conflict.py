"""The two memories set side by side: tables that sum to the logits, and which memory wins where."""

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.attribution.direct import direct_memories
from hijack_lens.attribution.logits import attribute, beyond_whole_paths
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_fields, check_shapes
from hijack_lens.core.circuit import Circuit, Margin
from hijack_lens.core.files import Saved
from hijack_lens.core.hook_points import all_components
from hijack_lens.core.inputs import Tokens, circuit_of
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import Drawn, widened
from hijack_lens.memories.token_tables import TokenTables, replaced, token_tables

Winner = Literal["context", "weights", "both", "neither"]


@dataclass(frozen=True, repr=False)
class MemoryConflict(TokenTables, Saved, Drawn):
    """What each memory adds to the logits, for every token that may stand last.

    Candidates and winners are found among the `answers` alone.

    Attributes:
        context: what is written through the induction heads, in logits.
        weights: what the bigram memory, the direct path and the biases write.
        rest: what is written in any other way.
        logits: the model's logits, the sum of the three.

    Examples:
        >>> conflict = hl.memory_conflict(model, prompt, query_tokens=["q", "e"])
        >>> [language.tokens[c] for c in conflict.in_context], [language.tokens[g] for g in conflict.global_candidate]
        (['e', 'e'], ['u', ' '])
        >>> print(conflict.margin)
        Margin(context=[9.8538, 0.0141], weights=[-6.5806, -1.0913], rest=[0.0, 0.0], total=[3.2732, -1.0772])
        >>> conflict.winners, conflict.conflicts
        (('context', 'weights'), tensor([True, True]))
        >>> conflict.query_texts, conflict.answer_texts[:3], conflict.position
        (('q', 'e'), ('␣', '.', ';'), 23)
        >>> conflict.occurs, len(conflict.source_texts), conflict.completeness_error < 1e-4
        (tensor([True, True]), 24, True)
    """

    context: Float[Tensor, "query answer"]
    weights: Float[Tensor, "query answer"]
    rest: Float[Tensor, "query answer"]
    logits: Float[Tensor, "query answer"]

    def __post_init__(self) -> None:
        check_fields(self)
        shape = (len(self.query_tokens), len(self.answers))
        check_shapes(self, dict.fromkeys(("context", "weights", "rest", "logits"), shape))

    @property
    def completeness_error(self) -> float:
        """The largest |context + weights + rest - logit|; only rounding error, for an unmodified model."""
        return float((self.context + self.weights + self.rest - self.logits).abs().max())

    @property
    def in_context(self) -> Int[Tensor, "query"]:
        """The context's candidate for each query token: the index among the answers at which its row is largest."""
        return self.context.argmax(1)

    @property
    def global_candidate(self) -> Int[Tensor, "query"]:
        """The weights' candidate, likewise."""
        return self.weights.argmax(1)

    @property
    def conflicts(self) -> Bool[Tensor, "query"]:
        """Where the two differ. Of query tokens that do not occur in it, the context knows nothing in particular."""
        return self.in_context != self.global_candidate

    @property
    def margin(self) -> Margin:
        """logit[in-context candidate] - logit[global candidate] of each query token, split by memory."""

        def difference(table: Float[Tensor, "query answer"]) -> Float[Tensor, "query"]:
            a, b = (table.gather(1, candidate[:, None])[:, 0] for candidate in (self.in_context, self.global_candidate))
            return a - b

        return Margin(*map(difference, (self.context, self.weights, self.rest)))

    @property
    def winners(self) -> tuple[Winner, ...]:
        """Whose candidate has the largest logit: "both" where they agree, "neither" if a third answer has it."""
        top, c, g = (x.tolist() for x in (self.logits.argmax(1), self.in_context, self.global_candidate))
        return tuple(map(_winner, top, c, g))

    def to_pandas(self) -> pd.DataFrame:
        """A row per query token.

        Its text, whether it `occurs` in the context, the candidates `in_context` and `global`, whether they `conflict`,
        the parts of the margin and their sum, the `winner`, and the answer with the largest logit, `predicted`.
        """
        texts = self.answer_texts
        frame = pd.DataFrame({"query": self.query_texts, "occurs": self.occurs.numpy()})
        frame["in_context"] = [texts[i] for i in self.in_context.tolist()]
        frame["global"] = [texts[i] for i in self.global_candidate.tolist()]
        frame["conflict"] = self.conflicts.cpu().numpy()
        for name, value in self.margin.parts.items():
            frame["margin" if name == "total" else name] = value.detach().cpu().double().numpy()
        frame["winner"] = self.winners
        frame["predicted"] = [texts[i] for i in self.logits.argmax(1).tolist()]
        return frame


def _winner(top: int, in_context: int, global_candidate: int) -> Winner:
    if in_context == global_candidate:
        return "both" if top == in_context else "neither"
    return "context" if top == in_context else "weights" if top == global_candidate else "neither"


_CELLS = 2**24
"""The most numbers per attribution: 128 MiB in float64."""


@analysis
def memory_conflict(
    model: Any,
    prompt: object,
    position: int = -1,
    *,
    query_tokens: Tokens = None,
    answers: Tokens = None,
    circuit: Circuit | None = None,
    prepend_bos: bool | None = None,
) -> MemoryConflict:
    """What the context and the weights would say at a position, for every token that could stand there; and who wins.

    Row q of each table is what `attribute` gives for the prompt with q in the position's place: the context (all paths
    through the circuit's induction heads), the weights (the bigram memory, the direct path and biases) and the rest,
    which sum to the model's logits. Unlike `context_memory`, which is what one head writes straight into the logits,
    the context here includes what later MLPs make of that; and in models of two layers it excludes the head's value
    bias, which is the same in all contexts.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        prompt: a single prompt: text, tokens or a `HijackPrompt`. What comes after the position does not matter.
        position: where the token is replaced; negative ones count from the end.
        query_tokens: tokens to put there, by id or text; by default the whole vocabulary, or, where that is too large
            for a table, the prompt's own tokens.
        answers: outputs whose logits to give; by default all.
        circuit: the roles of the components; by default `model.circuit`.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: as for `attribute`, for a circuit without induction heads, and for tables of more than
            2^27 numbers, as with a large vocabulary.

    Examples:
        >>> conflict = hl.memory_conflict(model, prompt, query_tokens=["q", "e"])
        >>> conflict.winners
        ('context', 'weights')
    """
    tables = token_tables(model, prompt, position, query_tokens, answers)
    circuit = circuit_of(model, circuit)
    if not circuit.induction:
        raise ValueError(f"circuit must name an induction head, through which the context speaks; got {circuit}")
    prompts, parts = replaced(tables.tokens, tables.query_tokens), []
    answers = torch.tensor(tables.answers, device=prompts.device)
    summed_first = beyond_whole_paths(model) is not None and len(answers) > model.cfg.d_model
    done, rows_at_once = 0, 1
    with progress(len(prompts), "prompt", "memory_conflict") as advance:
        while done < len(prompts):
            rows = prompts[done : done + rows_at_once]
            if summed_first:
                by_memory, logits = direct_memories(model, rows, len(tables.tokens) - 1, circuit, answers)
                n_cells = len(rows) * tables.tokens.numel() * len(all_components(model)) * model.cfg.d_model
            else:
                result = attribute(model, rows, circuit=circuit, answers=tables.answers)
                by_memory, logits, n_cells = result.by_memory(), result.logits, result.values.numel()
            parts.append(widened(torch.stack([*by_memory.values(), logits])))
            rows_at_once = max(1, _CELLS * len(rows) // n_cells)
            done += len(rows)
            advance(len(rows))
    context, weights, rest, logits = torch.cat(parts, 1)
    return MemoryConflict(**vars(tables), context=context, weights=weights, rest=rest, logits=logits)
