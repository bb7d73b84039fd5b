"""Path patching of every edge among some components, by actual runs or estimated from derivatives."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_choice, check_list, shown
from hijack_lens.core.circuit import Circuit
from hijack_lens.core.inputs import Components, circuit_of, components_of
from hijack_lens.core.tables import widened
from hijack_lens.hooks.edges import (
    VIAS,
    Edge,
    Receiver,
    Via,
    check_receiver,
    check_sender,
    edges_among,
    into_stream,
    patch_path,
    read_stream,
    read_weights,
    sender_site,
)
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.hooks.patched_runs import Direction, GradientRuns, MetricLike, PromptPair, check_steps
from hijack_lens.hooks.sweep_results import PathSweep
from hijack_lens.models.linear_maps import normed


@analysis
def path_sweep(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    components: Components | None = None,
    direction: Direction = "denoise",
    *,
    circuit: Circuit | None = None,
    via: Via | Iterable[Via] = VIAS,
) -> PathSweep:
    """Path patching of every edge among some components, one at a time: from embeddings, heads and MLPs to each input
    of every later head and MLP, and to the unembedding.

    The message along the patched edge is the other run's; everything else that reads the sender sees its output in the
    run itself. Each edge costs one forward pass.

    Args:
        model: a HookedTransformer or TransformerBridge. Hooks on it take part in all runs.
        clean: prompts: text, tokens, or a `HijackPrompt`.
        corrupted: as many prompts, of the same length.
        metric: one of `hijack_lens.metrics`; or a function from the logits [batch, pos, d_vocab] to a number.
        components: a `Component`, its place ("L0H1", "L2MLP") or a role of the circuit ("induction"); several of these,
            or a mapping to them; a `Circuit`; or "all" heads and MLPs of the model. By default the circuit.
        direction: "denoise" runs the corrupted prompts, and sends the clean run's messages; "noise" does the reverse.
        circuit: the roles that name the components; by default those of a `Circuit` given as `components`, else
            `model.circuit`, if there is one.
        via: which inputs of receivers to patch; by default all.

    Raises:
        TypeError, ValueError: for components that the model lacks, edges that no hook point reaches alone, prompts
            that do not match, and a metric that gives no number.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.path_sweep(model, prompt.clean, prompt.corrupted, margin)
        >>> sweep.to_pandas().nlargest(2, "effect")[["sender", "receiver", "via", "effect"]]
                    sender        receiver      via     effect
        5            embed  induction head        v  19.658894
        22  induction head         unembed  unembed  19.658894
    """
    pair = PromptPair.of(model, clean, corrupted, metric, direction)
    edges, circuit = _edges(model, components, circuit, via)
    names = dict.fromkeys(sender_site(model, edge.sender).name for edge in edges)
    source_logits, source = record(model, pair.source, list(names))
    base_logits = logits_of(model, pair.base)
    reader = pair.reader(model, base_logits, source_logits)
    base = reader(base_logits)
    values = []
    for edge in tqdm(edges, disable=None, unit="edge"):
        with patch_path(model, edge.sender, edge.receiver, edge.via, source):
            values.append(reader(logits_of(model, pair.base)))
    return PathSweep(
        widened(base_logits.new_empty(())).new_tensor(values),
        edges,
        reader.name,
        base,
        reader(source_logits),
        direction,
        "forward",
        circuit,
    )


def _edges(model: Any, components: Any, circuit: Any, via: Any) -> tuple[tuple[Edge, ...], Circuit]:
    """The edges that a user's arguments name, checked to be patchable; and the circuit that names their ends."""
    names = circuit_of(model, components if circuit is None and isinstance(components, Circuit) else circuit)
    expected = f"one or several of {', '.join(map(repr, VIAS))}"
    inputs = (via,) if isinstance(via, str) else tuple(check_list("via", via, expected))
    for name in inputs:
        check_choice("via", name, VIAS)
    edges = edges_among(model, components_of(model, components, names), inputs)
    if not edges:
        raise ValueError(f"via={shown(via)}: the components have no such inputs")
    # Each end once: a deep model has far more edges than ends.
    for sender in dict.fromkeys(edge.sender for edge in edges):
        check_sender(model, sender)
    for receiver, into in dict.fromkeys((edge.receiver, edge.via) for edge in edges):
        check_receiver(model, receiver, into)
    return edges, names


@analysis
def edge_attribution(
    model: Any,
    clean: object,
    corrupted: object,
    metric: MetricLike,
    components: Components | None = None,
    direction: Direction = "denoise",
    *,
    circuit: Circuit | None = None,
    via: Via | Iterable[Via] = VIAS,
    steps: int = 1,
) -> PathSweep:
    """`path_sweep` to first order, for every edge at once: edge attribution patching, with integrated gradients.

    An edge's effect is estimated as (the sender's message in the source run − in the base run) · ∂metric/∂(the
    receiver's input), summed over prompts and positions. With `steps=1`, the default here as in `attribution_patch`,
    the derivative is the base run's (EAP, arXiv 2310.10348): the cheapest estimate, exact where the model is linear.
    With more steps, it is the mean of the derivatives in runs k = 0 ... steps − 1, whose embeddings lie k / steps of
    the way from the base run's to the source run's (EAP-IG, arXiv 2403.17806, which counts from 1 and takes 5), so that
    saturated parts of the model or a metric that is flat at the base run do not hide an edge. More steps need not come
    closer to the exact sweep, whose runs differ from the base run in a single edge; `compare` measures the error.

    It costs two forward passes, plus one forward and one backward pass per step, however many edges there are. With
    "all" components, the effects of the edges out of the embeddings sum to the metric's difference between the runs,
    more closely with more steps; those of the edges out of a component sum to what `attribution_patch` gives for it.

    Args:
        model: as for `path_sweep`; so are all details not given here.
        clean: the clean prompts.
        corrupted: as many prompts, of the same length.
        metric: one of `hijack_lens.metrics`, or a function from the logits [batch, pos, d_vocab] to a tensor of one
            number, which torch can differentiate.
        components: the components to score edges among.
        direction: which run's messages are sent.
        circuit: the roles that name the components.
        via: which inputs of receivers to score.
        steps: the number of runs over which the derivative is averaged.

    Raises:
        TypeError, ValueError: as for `path_sweep`, and for a metric without a derivative.

    Examples:
        >>> runs = prompt.clean, prompt.corrupted, hl.metrics.margin(prompt)
        >>> estimate = hl.hooks.edge_attribution(model, *runs)
        >>> estimate.to_pandas().nlargest(2, "effect")[["sender", "receiver", "via", "effect"]]
                    sender        receiver      via     effect
        5            embed  induction head        v  19.658894
        22  induction head         unembed  unembed  19.658894
    """
    check_steps(steps)
    pair = PromptPair.of(model, clean, corrupted, metric, direction)
    edges, circuit = _edges(model, components, circuit, via)
    sites = {edge.sender: sender_site(model, edge.sender) for edge in edges}
    runs = GradientRuns(model, pair, [site.name for site in sites.values()])
    changes = torch.stack(
        [
            widened(into_stream(model, sender, site.read(runs.source[site.name] - runs.base[site.name])))
            for sender, site in sites.items()
        ]
    )
    inputs = dict.fromkeys((edge.receiver, edge.via) for edge in edges)
    reads = [_InputGradient.of(model, *one) for one in inputs]
    effects = changes.new_zeros(len(inputs), len(sites))
    axes = "input batch pos d_model, sender batch pos d_model -> input sender"
    for step in range(steps):
        for group, derivative in _derivatives(runs, step / steps, reads):
            effects[group] += einsum(widened(derivative), changes, axes) / steps
    row = {one: index for index, one in enumerate(inputs)}
    column = {sender: index for index, sender in enumerate(sites)}
    scored = [row[edge.receiver, edge.via] for edge in edges], [column[edge.sender] for edge in edges]
    values = runs.base_value + effects[scored]
    name, base, source = runs.reader.name, runs.base_value, runs.source_value
    return PathSweep(values, edges, name, base, source, direction, "gradient", circuit)


@dataclass(frozen=True)
class _InputGradient:
    """How one input of a receiver reads the residual stream.

    Attributes:
        stream: the hook point of the residual stream.
        norm: the norm it reads through, if any; `None` also for the unembedding, whose norm the model differentiates.
        weights: the weights that read the normed stream, by the hook point of their output; none for the unembedding.
        head: the head's index at the hook point.
    """

    stream: str
    norm: nn.Module | None
    weights: dict[str, Tensor]
    head: int | None = None

    @classmethod
    def of(cls, model: Any, receiver: Receiver, via: Via) -> "_InputGradient":
        if isinstance(receiver, str):
            return cls(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", None, {})
        return cls(*read_stream(model, receiver), read_weights(model, receiver, via), receiver.head)

    @property
    def points(self) -> tuple[str, ...]:
        """The hook points at which the metric's derivative is needed."""
        return tuple(self.weights) or (self.stream,)

    def by_normed(self, gradients: dict[str, Tensor]) -> Float[Tensor, "batch pos d_model"]:
        """The derivative with respect to the norm's output, from those at `points`."""
        if not self.weights:
            return gradients[self.stream]
        at_points = ((gradients[name], weight) for name, weight in self.weights.items())
        parts = [(at if self.head is None else at[:, :, self.head]) @ weight.T for at, weight in at_points]
        return torch.stack(parts).sum(0)


def _derivatives(
    runs: GradientRuns, fraction: float, reads: Sequence[_InputGradient]
) -> Iterator[tuple[list[int], Float[Tensor, "input batch pos d_model"]]]:
    """The metric's derivatives in one run with respect to what each input reads: indices into `reads`, and derivatives.

    Inputs that read the same stream through the same norm come together, which limits how much is in memory at a time.
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
