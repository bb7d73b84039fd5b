"""Path patching of every edge among some components, by actual runs or estimated from derivatives."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import Seed, as_generator, check_choice, check_count, check_list, shown
from hijack_lens.core.circuit import Circuit
from hijack_lens.core.inputs import Components, circuit_of, components_of
from hijack_lens.core.memory import memory_budget
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import widened
from hijack_lens.hooks.edge_runs import EdgeRuns
from hijack_lens.hooks.edges import (
    VIAS,
    Edge,
    Receiver,
    Sender,
    Via,
    check_receiver,
    check_sender,
    edges_among,
    into_stream,
    patch_path,
    read_stream,
    read_weights,
    reads_shared,
    sender_site,
)
from hijack_lens.hooks.incremental_runs import IncrementalRuns, Method, checked_runs, open_for, taken_apart
from hijack_lens.hooks.intervention import logits_of, record
from hijack_lens.hooks.patched_runs import Direction, GradientRuns, MetricLike, PromptPair, check_steps
from hijack_lens.hooks.recorded_run import RecordedRun
from hijack_lens.hooks.sweep_plan import hook_name
from hijack_lens.hooks.sweep_results import EdgeScreen, PathSweep
from hijack_lens.models.linear_maps import normed
from hijack_lens.models.opened import Block


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
    exact: int | None = None,
    sample: int = 100,
    seed: Seed = 0,
    method: Method = "auto",
    memory_gb: float = 0.25,
    prepend_bos: bool | None = None,
) -> PathSweep:
    """Path patching of every edge among some components, one at a time: from embeddings, heads and MLPs to each input
    of every later head and MLP, and to the unembedding.

    The message along the patched edge is the other run's; everything else that reads the sender sees its output in the
    run itself.

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
        exact: how many edges to run, where there are more: those with the largest effects by `edge_attribution` (one
            step). Gradients screen edges well, and are poor judges: the numbers are those of actual runs, and a random
            sample of the other edges bounds what was missed; see `PathSweep.missed`. By default, every edge is run.
        sample: how many of the other edges to draw.
        seed: the seed of the draw.
        method: "incremental" computes the receivers and what comes after them, many edges at a time, on models whose
            parts are known (it is first checked against a run of the model); "forward" runs the whole model once per
            edge. "auto" takes "incremental" where it works and the model has no hooks, else "forward".
        memory_gb: roughly how much memory the patched runs may take at a time.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for components that the model lacks, prompts that do not match, and a metric that gives
            no number; for edges that no hook point reaches alone, where whole runs are needed; with
            method="incremental", for a model that cannot be run this way; with `exact`, for a metric without a
            derivative.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> sweep = hl.hooks.path_sweep(model, prompt.clean, prompt.corrupted, margin)
        >>> sweep.to_pandas().nlargest(2, "effect")[["sender", "receiver", "via", "effect"]]
                    sender        receiver      via     effect
        5            embed  induction head        v  19.658894
        22  induction head         unembed  unembed  19.658894
    """
    memory, generator = memory_budget(memory_gb), as_generator(seed)
    exact = None if exact is None else check_count("exact", exact, minimum=1)
    sample = check_count("sample", sample, minimum=1)
    pair = PromptPair.of(model, clean, corrupted, metric, direction)
    opened, why_not = open_for(model, method)
    edges, names = _edges(model, components, circuit, via, from_parts=opened is not None)
    n_edges, chosen, estimates = len(edges), len(edges), None
    if exact is not None and exact < n_edges:
        estimate = edge_attribution(model, clean, corrupted, metric, components, direction, circuit=circuit, via=via)
        order = estimate.effect.abs().argsort(descending=True, stable=True).cpu()
        first, others = order[:exact].sort().values, order[exact:]
        others = others[torch.randperm(len(others), generator=generator)[:sample]].sort().values
        edges, chosen, estimates = tuple(edges[i] for i in (*first, *others)), exact, estimate.values[first]
    sites = {sender: sender_site(model, sender) for sender in dict.fromkeys(edge.sender for edge in edges)}
    points = list(dict.fromkeys(site.name for site in sites.values()))
    source_logits, source = record(model, pair.source, points)
    of_parts = [] if opened is None else IncrementalRuns.names(opened)
    base_logits, run = record(model, pair.base, list(dict.fromkeys([*points, *of_parts])))
    reader = pair.reader(model, base_logits, source_logits)
    base = reader(base_logits)
    runs = checked_runs(model, method, opened, why_not, run, base_logits, reader)

    def message(sender: Sender) -> Tensor:
        at = sites[sender]
        return into_stream(model, sender, at.read(source[at.name]) - at.read(run[at.name]))

    values = widened(base_logits.new_empty(())).new_full((len(edges),), base)
    with progress(len(edges), "edge", "path_sweep") as advance:
        if runs is not None:
            for places, found in EdgeRuns(runs, message).values(edges, memory):
                values[places] = found
                advance(len(places))
        else:
            _check_ends(model, edges)  # again, since hook points must reach them now
            for place, edge in enumerate(edges):
                with patch_path(model, edge.sender, edge.receiver, edge.via, source):
                    values[place] = reader(logits_of(model, pair.base))
                advance(1)
    of_source = reader(source_logits)
    by: Literal["incremental", "forward"] = "forward" if runs is None else "incremental"
    screen = None if estimates is None else EdgeScreen(n_edges, estimates, edges[chosen:], values[chosen:])
    return PathSweep(values[:chosen], edges[:chosen], reader.name, base, of_source, direction, by, names, screen)


def _edges(model: Any, components: Any, circuit: Any, via: Any, from_parts: bool) -> tuple[tuple[Edge, ...], Circuit]:
    """The edges that a user's arguments name, checked to be patchable; and the circuit that names their ends."""
    names = circuit_of(model, components if circuit is None and isinstance(components, Circuit) else circuit)
    expected = f"one or several of {', '.join(map(repr, VIAS))}"
    inputs = (via,) if isinstance(via, str) else tuple(check_list("via", via, expected))
    for name in inputs:
        check_choice("via", name, VIAS)
    edges = edges_among(model, components_of(model, components, names), inputs)
    if not edges:
        raise ValueError(f"via={shown(via)}: the components have no such inputs")
    _check_ends(model, edges, from_parts)
    return edges, names


def _check_ends(model: Any, edges: Sequence[Edge], from_parts: bool = False) -> None:
    """Checks senders and receivers, those that a block computes alike only once."""

    def alike(end: Sender | Receiver) -> object:
        return end if isinstance(end, str) else (end.layer, end.kind)

    senders: dict[object, Sender] = {}
    receivers: dict[object, Edge] = {}
    for edge in edges:
        senders.setdefault(alike(edge.sender), edge.sender)
        receivers.setdefault((alike(edge.receiver), edge.via), edge)
    for sender in senders.values():
        check_sender(model, sender)
    for edge in receivers.values():
        check_receiver(model, edge.receiver, edge.via, from_parts)


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
    prepend_bos: bool | None = None,
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
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

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
    opened, _ = open_for(model, "auto")
    edges, circuit = _edges(model, components, circuit, via, from_parts=opened is not None)
    parts = None
    if any(reads_shared(model, edge.via) for edge in edges):
        parts = taken_apart(model, pair.base)
        if parts is None:
            _check_ends(model, edges)  # again, since hook points must reach them now
    sites = {edge.sender: sender_site(model, edge.sender) for edge in edges}
    runs = GradientRuns(model, pair, [site.name for site in sites.values()])
    changes = torch.stack(
        [
            widened(into_stream(model, sender, site.read(runs.source[site.name] - runs.base[site.name])))
            for sender, site in sites.items()
        ]
    )
    inputs = dict.fromkeys((edge.receiver, edge.via) for edge in edges)
    reads = [_InputGradient.of(model, *one, parts) for one in inputs]
    effects = changes.new_zeros(len(inputs), len(sites))
    axes = "input batch pos d_model, sender batch pos d_model -> input sender"
    for step in range(steps):
        for group, derivative in _derivatives(runs, step / steps, reads, parts):
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
        shared: the layer, where heads share the hook point: the derivatives with respect to each head's own keys and
            values, which are then asked for under its name, follow from those with respect to what heads write.
    """

    stream: str
    norm: nn.Module | None
    weights: dict[str, Tensor]
    head: int | None = None
    shared: int | None = None

    @classmethod
    def of(cls, model: Any, receiver: Receiver, via: Via, parts: RecordedRun | None) -> "_InputGradient":
        if isinstance(receiver, str):
            return cls(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", None, {})
        stream, norm = read_stream(model, receiver)
        if parts is None or not reads_shared(model, via):
            return cls(stream, norm, read_weights(model, receiver, via), receiver.head)
        assert receiver.head is not None
        one = parts.layers[receiver.layer].block.one(receiver.head)
        weights = {hook_name(via, receiver.layer): (one.W_K if via == "k" else one.W_V).T}
        return cls(stream, norm, weights, receiver.head, receiver.layer)

    @property
    def points(self) -> tuple[str, ...]:
        """The hook points at which the metric's derivative is needed."""
        if self.shared is not None:
            return (hook_name("z", self.shared),)
        return tuple(self.weights) or (self.stream,)

    def by_normed(self, gradients: dict[str, Tensor]) -> Float[Tensor, "batch pos d_model"]:
        """The derivative with respect to the norm's output, from those at `points`."""
        if not self.weights:
            return gradients[self.stream]
        at_points = ((gradients[name], weight) for name, weight in self.weights.items())
        parts = [(at if self.head is None else at[:, :, self.head]) @ weight.T for at, weight in at_points]
        return torch.stack(parts).sum(0)


def _derivatives(
    runs: GradientRuns, fraction: float, reads: Sequence[_InputGradient], parts: RecordedRun | None
) -> Iterator[tuple[list[int], Float[Tensor, "input batch pos d_model"]]]:
    """The metric's derivatives in one run with respect to what each input reads: indices into `reads`, and derivatives.

    Inputs that read the same stream through the same norm come together, which limits how much is in memory at a time.
    """
    alike: dict[tuple[str, nn.Module | None], list[int]] = {}
    for index, read in enumerate(reads):
        alike.setdefault((read.stream, read.norm), []).append(index)
    by = dict.fromkeys(point for read in reads for point in read.points)
    shared = dict.fromkeys(read.shared for read in reads if read.shared is not None)
    inputs = [hook_name(name, layer) for layer in shared for name in "qkv"]
    gradients, streams = runs.at(fraction, list(by), look=[*dict.fromkeys(stream for stream, _ in alike), *inputs])
    for layer in shared:
        assert parts is not None
        q, k, v = (streams[hook_name(name, layer)] for name in "qkv")
        own = _by_own_keys(parts.layers[layer].block, q, k, v, gradients[hook_name("z", layer)])
        gradients |= {hook_name(name, layer): gradient for name, gradient in zip("kv", own, strict=True)}
    for (stream, norm), group in alike.items():
        derivative = torch.stack([reads[index].by_normed(gradients) for index in group])
        if norm is not None:
            with torch.enable_grad():
                x = streams[stream].expand_as(derivative).requires_grad_()
                (derivative,) = torch.autograd.grad(normed(norm, x), x, derivative)
        yield group, derivative


def _by_own_keys(
    block: Block,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    by_z: Float[Tensor, "batch pos head d_head"],
) -> tuple[Tensor, ...]:
    """Derivatives with respect to each head's own copy of its keys and values, from those with respect to z."""
    positions, every = torch.arange(q.shape[1], device=q.device), block.ungrouped()
    with torch.enable_grad():
        k, v = (x.repeat_interleave(block.n_groups, 2).requires_grad_() for x in (k, v))
        scores = every.scores(every.turned(q, positions), every.turned(k, positions), positions, positions)
        return torch.autograd.grad(every.mixed(every.pattern(scores), v), (k, v), by_z)
