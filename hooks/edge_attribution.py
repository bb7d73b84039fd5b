"""Edge attribution patching: a path patching sweep estimated from derivatives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hijack_lens._checks import check_count
from hijack_lens.circuit import Circuit, Component
from hijack_lens.hooks.edges import VIAS, Receiver, Via, into_stream, read_stream, read_weights, sender_site
from hijack_lens.hooks.path_result import PathSweep
from hijack_lens.hooks.path_sweep import chosen_edges, path_sweep
from hijack_lens.hooks.sweep.api import check_metric
from hijack_lens.hooks.sweep.comparison import Comparison
from hijack_lens.hooks.sweep.gradient_runs import GradientRuns
from hijack_lens.hooks.sweep.pair import Direction, PromptPair
from hijack_lens.metrics import Metric
from hijack_lens.norm import normed

CircuitLike = Circuit | Component | Iterable[Component] | Literal["all"] | None
MetricLike = Metric | Callable[[Tensor], Any]


@overload
def edge_attribution(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    circuit: CircuitLike = ...,
    direction: Direction = ...,
    *,
    via: Via | Iterable[Via] = ...,
    steps: int = ...,
    compare: Literal[False] = ...,
) -> PathSweep: ...
@overload
def edge_attribution(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    circuit: CircuitLike = ...,
    direction: Direction = ...,
    *,
    via: Via | Iterable[Via] = ...,
    steps: int = ...,
    compare: Literal[True],
) -> Comparison[PathSweep]: ...
@torch.no_grad()
def edge_attribution(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    circuit: CircuitLike = None,
    direction: Direction = "denoise",
    *,
    via: Via | Iterable[Via] = VIAS,
    steps: int = 5,
    compare: bool = False,
) -> PathSweep | Comparison[PathSweep]:
    """`path_sweep` to first order, of every edge at once: edge attribution patching, with integrated gradients.

    An edge's effect is estimated as (the sender's message in the source run − in the base run) · ∂metric/∂(the
    receiver's input), summed over prompts and positions. With `steps=1` the derivative is the base run's (EAP, arXiv
    2310.10348); with more it is the mean of those in runs k = 0 ... steps − 1, whose embeddings lie k / steps of the
    way from the base run's to the source run's (EAP-IG, arXiv 2403.17806, which counts from 1), so that saturated parts
    of the model and a metric that is flat at the base run do not hide an edge. More steps need not come nearer to the
    exact sweep, whose runs are the base run but for one edge: `compare` tells.

    It costs two forward passes, and one with its backward pass per step, however many edges there are. With
    `circuit="all"` the edges out of the embeddings sum to the metric's difference between the runs, ever better with
    more steps; and the edges out of a component to what `attribution_patch` gives for it.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many, as long.
        metric: one of `hijack_lens.metrics`, or a function from the logits [batch, pos, d_vocab] to a tensor of one
            number, which torch can differentiate.
        circuit: a `Circuit`, components, or "all" heads and MLPs of the model; by default the model's own circuit.
        direction: "denoise" runs the corrupted prompts, and sends the clean run's messages; "noise" the reverse.
        via: the inputs of receivers to score; by default all.
        steps: how many runs the derivative is the mean of.
        compare: whether to run the exact sweep as well, and to return both.

    Raises:
        TypeError, ValueError: as for `path_sweep`, and for a metric without a derivative.
    """
    check_count("steps", steps, 1)
    pair = PromptPair.of(model, clean, corrupted, direction)
    check_metric(metric, pair.base.shape[1])
    edges = chosen_edges(model, circuit, via)
    sites = {edge.sender: sender_site(model, edge.sender) for edge in edges}
    runs = GradientRuns(model, pair, metric, [site.name for site in sites.values()])
    changes = torch.stack(
        [
            into_stream(model, sender, site.read(runs.source[site.name] - runs.base[site.name]))
            for sender, site in sites.items()
        ]
    )
    inputs = dict.fromkeys((edge.receiver, edge.via) for edge in edges)
    reads = [_Read.of(model, *one) for one in inputs]
    effects = changes.new_zeros(len(inputs), len(sites))
    for step in range(steps):
        for group, derivative in _derivatives(runs, step / steps, reads):
            effects[group] += torch.einsum("ibpm,sbpm->is", derivative, changes) / steps
    row = {one: index for index, one in enumerate(inputs)}
    column = {sender: index for index, sender in enumerate(sites)}
    scored = [row[edge.receiver, edge.via] for edge in edges], [column[edge.sender] for edge in edges]
    estimate = PathSweep(
        values=runs.base_value + effects[scored],
        edges=edges,
        metric=runs.reader.name,
        base=runs.base_value,
        source=runs.source_value,
        direction=direction,
        method="gradient",
        circuit=circuit if isinstance(circuit, Circuit) else getattr(model, "circuit", None) or Circuit(),
    )
    if not compare:
        return estimate
    return Comparison(estimate, path_sweep(model, clean, corrupted, metric, circuit, direction, via=via))


@dataclass(frozen=True)
class _Read:
    """How one input of a receiver reads the residual stream.

    Attributes:
        stream: the hook point of the residual stream.
        norm: through which it is read; `None` also for the unembedding's, which the model itself differentiates.
        weights: by the hook point where they take the normed stream; none for the unembedding.
        head: which, of those at the hook point.
    """

    stream: str
    norm: nn.Module | None
    weights: dict[str, Tensor]
    head: int | None = None

    @classmethod
    def of(cls, model: Any, receiver: Receiver, via: Via) -> "_Read":
        if isinstance(receiver, str):
            return cls(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", None, {})
        return cls(*read_stream(model, receiver), read_weights(model, receiver, via), receiver.head)

    @property
    def points(self) -> tuple[str, ...]:
        """The hook points by whose activations to differentiate."""
        return tuple(self.weights) or (self.stream,)

    def by_normed(self, gradients: dict[str, Tensor]) -> Float[Tensor, "batch pos d_model"]:
        """The derivative by what leaves the norm, from those at `points`."""
        if not self.weights:
            return gradients[self.stream]
        at_points = ((gradients[name], weight) for name, weight in self.weights.items())
        parts = [(at if self.head is None else at[:, :, self.head]) @ weight.T for at, weight in at_points]
        return torch.stack(parts).sum(0)


def _derivatives(
    runs: GradientRuns, fraction: float, reads: Sequence[_Read]
) -> Iterator[tuple[list[int], Float[Tensor, "input batch pos d_model"]]]:
    """The metric's derivative in one run by what each input reads: indices of some `reads`, and theirs.

    Together those that read one stream through one norm, which is as much as should be in memory at a time.
    """
    alike: dict[tuple[str, nn.Module | None], list[int]] = {}
    for index, read in enumerate(reads):
        alike.setdefault((read.stream, read.norm), []).append(index)
    by = dict.fromkeys(point for read in reads for point in read.points)
    gradients, streams = runs.at(fraction, list(by), look=list(dict.fromkeys(stream for stream, _ in alike)))
    for (stream, norm), group in alike.items():
        derivative = torch.stack([reads[index].by_normed(gradients) for index in group])
        if norm is not None:
            with torch.enable_grad():
                x = streams[stream].expand_as(derivative).requires_grad_()
                (derivative,) = torch.autograd.grad(normed(norm, x), x, derivative)
        yield group, derivative
