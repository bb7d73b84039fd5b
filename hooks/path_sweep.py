"""Path patching of every edge of a circuit."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens._checks import check_choice
from hijack_lens.circuit import Circuit, Component
from hijack_lens.hooks.edges import VIAS, Edge, Via, all_components, check_edge, edges_among, sender_site
from hijack_lens.hooks.intervention import record
from hijack_lens.hooks.path import patch_path
from hijack_lens.hooks.path_result import PathSweep
from hijack_lens.hooks.sweep.api import check_metric
from hijack_lens.hooks.sweep.pair import Direction, PromptPair
from hijack_lens.metrics import Metric


@torch.no_grad()
def path_sweep(
    model: Any,
    clean: object,
    corrupted: object,
    metric: Metric | Callable[[Tensor], Any],
    circuit: Circuit | Component | Iterable[Component] | Literal["all"] | None = None,
    direction: Direction = "denoise",
    *,
    via: Via | Iterable[Via] = VIAS,
) -> PathSweep:
    """Path patching of every edge of a circuit, each alone: from embeddings, heads and MLPs to each input of every
    later head and MLP, and to the unembedding.

    The message along one edge is the other run's; everything else that reads the sender sees what it computes in the
    run itself. Each edge costs one forward pass.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many, as long.
        metric: one of `hijack_lens.metrics`; or a function from the logits [batch, pos, d_vocab] to a number.
        circuit: a `Circuit`, components, or "all" heads and MLPs of the model; by default the model's own circuit.
        direction: "denoise" runs the corrupted prompts, and sends the clean run's messages; "noise" the reverse.
        via: the inputs of receivers to patch; by default all.

    Raises:
        TypeError, ValueError: for components that the model lacks, edges that no hook point reaches alone, prompts
            that do not match, and a metric that gives no number.
    """
    pair = PromptPair.of(model, clean, corrupted, direction)
    check_metric(metric, pair.base.shape[1])
    edges = chosen_edges(model, circuit, via)
    names = dict.fromkeys(sender_site(model, edge.sender).name for edge in edges)
    source_logits, source = record(model, pair.source, list(names))
    base_logits = model(pair.base)
    reader = pair.reader(model, metric, base_logits, source_logits)
    base = reader(base_logits)
    values = []
    for edge in tqdm(edges, disable=None, unit="edge"):
        with patch_path(model, edge.sender, edge.receiver, edge.via, source):
            values.append(reader(model(pair.base)))
    return PathSweep(
        values=base_logits.new_tensor(values),
        edges=edges,
        metric=reader.name,
        base=base,
        source=reader(source_logits),
        direction=direction,
        method="forward",
        circuit=circuit if isinstance(circuit, Circuit) else getattr(model, "circuit", None) or Circuit(),
    )


def chosen_edges(model: Any, circuit: Any, via: Any) -> tuple[Edge, ...]:
    """The edges that a user's `circuit` and `via` name, each of them one that can be patched.

    Raises:
        TypeError, ValueError: as for `path_sweep`.
    """
    edges = edges_among(model, _components(model, circuit), _inputs(via))
    if not edges:
        raise ValueError(f"via={via!r}: the circuit's components have no such inputs")
    for edge in edges:
        check_edge(model, edge.sender, edge.receiver, edge.via)
    return edges


def _components(model: Any, circuit: Any) -> tuple[Component, ...]:
    if circuit is None:
        circuit = getattr(model, "circuit", None)
        if circuit is None:
            raise ValueError(
                "circuit must be given, since the model has none of its own: a Circuit, components, or 'all' of them"
            )
    if isinstance(circuit, str):
        check_choice("circuit", circuit, ("all",))
        return all_components(model)
    if isinstance(circuit, Component):
        return (circuit,)
    if not isinstance(circuit, Iterable):
        raise TypeError(f"circuit must be a Circuit, components, or 'all', got {circuit!r:.80}")
    found = tuple(member for _, member in circuit) if isinstance(circuit, Circuit) else tuple(circuit)
    for component in found:
        if not isinstance(component, Component):
            raise TypeError(f"circuit must hold Components, got {component!r:.80}")
    if not found:
        raise ValueError("circuit must hold at least one component, got none")
    return found


def _inputs(via: Any) -> tuple[Via, ...]:
    if not isinstance(via, Iterable):
        raise TypeError(f"via must be one or several of {', '.join(map(repr, VIAS))}, got {via!r:.80}")
    listed = (via,) if isinstance(via, str) else tuple(via)
    for name in listed:
        check_choice("via", name, VIAS)
    return listed
