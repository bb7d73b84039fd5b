"""The game behind the Shapley values: what coalitions are worth, and how the worth is divided among players."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import comb
from typing import Any, Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.core.checks import check_type, shown
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import Site, check_hook_points, points_of, sites
from hijack_lens.core.inputs import Player
from hijack_lens.core.memory import check_memory
from hijack_lens.core.progress import progress
from hijack_lens.hooks.edges import Sender, changes_attn_out, check_sender, into_stream, precedes, sender_site
from hijack_lens.hooks.intervention import HookFunction, Intervention, draw_rows, logits_of, read_source, stand_in
from hijack_lens.hooks.patched_runs import BoundMetric, runs_at_once

How = Literal["zero", "mean", "resample", "patch"]
Outputs = Mapping[Site, Tensor | None]
"""What is written in place of an absent component, [batch or 1, pos, ...]; `None` for zeros."""


def sites_of(model: Any, players: Sequence[Player]) -> list[list[Site]]:
    """The sites of each player's outputs."""
    found = [sites(model, player.parts) for player in players]
    named = list(zip((part for player in players for part in player.parts), chain.from_iterable(found), strict=True))
    check_hook_points(model, (site.name for _, site in named))
    points = points_of(model)
    for (first, at), (second, there) in combinations(named, 2):
        # Compare the points themselves, since a bridge has several names for one point.
        same_point = points[at.name] is points[there.name]
        if same_point and (at.head is None or there.head is None or at.head == there.head):
            raise ValueError(f"components must not overlap, got {first} and {second}")
    return found


def outputs_when_absent(
    model: Any, present: Mapping[Site, Tensor], how: How, reference: object, generator: torch.Generator
) -> Outputs:
    """What replaces the components' outputs when they are absent, given their outputs in the run itself."""
    if how == "zero":
        return dict.fromkeys(present)
    stored = read_source(model, reference, list(dict.fromkeys(site.name for site in present)), "reference")
    n_prompts, n_reference = len(next(iter(present.values()))), len(next(iter(stored.values())))
    rows = draw_rows(how, n_reference, n_prompts, generator)  # the same for all components and coalitions
    outputs = {}
    for site, current in present.items():
        values = site.read(stored[site.name])
        if values.shape[1:] != current.shape[1:]:
            raise ValueError(
                f"reference must be as long as the prompt: at {site.name!r} it has shape {tuple(values.shape)}, "
                f"the prompt's run {tuple(current.shape)}"
            )
        if how == "patch" and len(values) not in (1, len(current)):
            raise ValueError(
                f"reference must hold one prompt, or one for each of the {len(current)}, got {len(values)}"
            )
        outputs[site] = stand_in(how, values, rows)
    return outputs


@dataclass(frozen=True)
class Overwritten:
    """What absent players write is overwritten; components later in the model see the change.

    Attributes:
        players: the sites of each player's outputs.
        outputs: what is written there instead.
        n_prompts: in each run.
    """

    players: Sequence[Sequence[Site]]
    outputs: Outputs
    n_prompts: int

    def edits(self, coalitions: Bool[Tensor, "coalition player"]) -> list[tuple[str, HookFunction]]:
        """A hook at each point where an absent player writes."""
        absent: dict[str, list[tuple[Site, Tensor]]] = {}
        for outputs, present in zip(self.players, coalitions.T, strict=True):
            for site in outputs:
                if not bool(present.all()):
                    absent.setdefault(site.name, []).append((site, ~present))
        return [(name, self._overwrite(at, len(coalitions))) for name, at in absent.items()]

    def _overwrite(self, absent: list[tuple[Site, Tensor]], count: int) -> HookFunction:
        n_rows = count * self.n_prompts

        def overwrite(activation: Tensor, hook: Any) -> Tensor:
            edited = activation.clone()
            for site, runs in absent:
                # Rotary angles, for example: all prompts share one copy, so it cannot be absent from some of them.
                if len(edited) != n_rows:
                    raise ValueError(
                        f"components must have an output for each prompt; {site.name!r} has {len(edited)} for {n_rows}"
                    )
                view, value = site.read(edited).unflatten(0, (count, -1)), self.outputs[site]
                view[runs.to(view.device)] = 0 if value is None else value.to(view)
            return edited

        return overwrite


@dataclass(frozen=True)
class TakenOut:
    """What absent players wrote is taken out of the residual stream at one point; all before it is as it was.

    Attributes:
        at: the hook point.
        changes: what each player's absence changes there.
    """

    at: str
    changes: Float[Tensor, "player prompt pos d_model"]

    @classmethod
    def of(
        cls, model: Any, at: str, players: Sequence[Player], present: Mapping[Site, Tensor], outputs: Outputs
    ) -> "TakenOut":
        """The absence of players with these outputs, replaced by those."""
        changes = []
        for player in players:
            total: Any = 0.0
            for source in sources_of(player):
                site = sender_site(model, source)
                value, wanted = present[site], outputs[site]
                change = -value if wanted is None else (wanted - value)
                total = total + into_stream(model, source, change)
            changes.append(total)
        return cls(at, torch.stack(changes))

    def edits(self, coalitions: Bool[Tensor, "coalition player"]) -> list[tuple[str, HookFunction]]:
        """One hook, in the residual stream."""
        absent = (~coalitions).to(self.changes)

        def take_out(activation: Tensor, hook: Any) -> Tensor:
            gone = einsum(absent, self.changes, "run player, player prompt pos d_model -> run prompt pos d_model")
            return activation + gone.flatten(0, 1).to(activation)

        # An edit of resid_mid reaches only the MLP in a bridge; one of attn_out reaches the stream in every model.
        return [(self.at.replace("hook_resid_mid", "hook_attn_out"), take_out)]


def sources_of(player: Player) -> tuple[Sender, ...]:
    """A player's parts as what the residual stream is a sum of."""
    embedded: dict[Component | str, Sender] = {"hook_embed": "embed", "hook_pos_embed": "pos_embed"}
    found = [part if isinstance(part, Component) else embedded.get(part) for part in player.parts]
    if None in found:
        raise ValueError(
            "components must be heads, MLPs, 'hook_embed' or 'hook_pos_embed' where `at` is given, got "
            f"{player.parts[found.index(None)]!r}"
        )
    return tuple(one for one in found if one is not None)


def check_sources(model: Any, at: str, players: Sequence[Player]) -> None:
    """Checks that `at` is a point of the residual stream, to which the players' outputs are added before it."""
    check_type("at", at, str)
    points = [f"blocks.{i}.hook_resid_{part}" for i in range(model.cfg.n_layers) for part in ("pre", "mid", "post")]
    points = [point for point in points if point in points_of(model)]
    if at not in points:
        raise ValueError(f"at must be a point of the residual stream, {points[0]!r} to {points[-1]!r}, got {shown(at)}")
    layer, part = int(at.split(".")[1]), at.rsplit("_", 1)[-1]
    if part == "mid" and changes_attn_out(model, layer):
        raise ValueError(f"at={at!r}: this model norms or scales what its heads write before it is there")
    for player in players:
        for source in sources_of(player):
            check_sender(model, source)
            if isinstance(source, str) or source.layer < layer:
                continue
            there = source.layer == layer and part != "pre"
            if not there or (part == "mid" and not precedes(model, source, Component(layer, "mlp"))):
                raise ValueError(f"components must write before at={at!r}, got {source}")


@dataclass(frozen=True)
class CoalitionRuns:
    """Runs of a model with some of its components absent, many in one forward pass.

    A pass holds as many runs as fit into `memory`, in bytes; with `None`, just one, so that user hooks see their batch.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"]
    players: Sequence[Player]
    absence: Overwritten | TakenOut
    reader: BoundMetric
    memory: float | None

    def worth(self, coalitions: Bool[Tensor, "coalition player"]) -> Float[Tensor, "coalition"]:
        """The metric's mean over prompts with only these players present; in float64, on the CPU."""
        at_once = 1 if self.memory is None else runs_at_once(self.model, self.tokens, self.memory)
        worth = []
        with progress(len(coalitions), "run", "shapley") as advance:
            for chunk in coalitions.split(at_once):
                with Intervention(self.model, edit=self.absence.edits(chunk)):
                    logits = logits_of(self.model, repeat(self.tokens, "batch pos -> (run batch) pos", run=len(chunk)))
                logits = rearrange(logits, "(run batch) pos d_vocab -> run batch pos d_vocab", run=len(chunk))
                worth.append(self.reader.each(logits).double().cpu())
                advance(len(chunk))
        found = torch.cat(worth)
        if not bool(found.isfinite().all()):
            first = int((~found.isfinite()).nonzero()[0])
            here = coalitions[first].tolist()
            absent = [player.label for player, present in zip(self.players, here, strict=True) if not present]
            raise ValueError(
                f"metric must be finite whichever components are absent, got {float(found[first])} without "
                f"{', '.join(absent) or 'any absent'}"
            )
        return found


def all_coalitions(n_players: int) -> Bool[Tensor, "coalition player"]:
    """Every coalition, as who is in it; ordered like a tensor with an axis (absent, present) for each player."""
    axes = [torch.tensor([False, True])] * n_players
    return torch.cartesian_prod(*axes).reshape(-1, n_players)


def shapley_values(worth: Float[Tensor, "coalition"]) -> Float[Tensor, "player"]:
    """Each player's Shapley value (Shapley 1953): what it adds to those who came before it, averaged over all orders.

    value_i = Σ_{S without i}  |S|! (n - |S| - 1)! / n!  ·  ( worth(S + i) - worth(S) )
    """
    n, sizes = _sizes(worth)
    weights = torch.tensor([1 / (n * comb(n - 1, size)) for size in range(n)], dtype=worth.dtype)
    values = []
    for player in range(n):
        without, joined = _split(worth, player).unbind(1)
        values.append((weights[_split(sizes, player)[:, 0]] * (joined - without)).sum())
    return torch.stack(values)


def shapley_interactions(worth: Float[Tensor, "coalition"]) -> Float[Tensor, "player player"]:
    """The Shapley interaction index of each pair (Grabisch & Roubens 1999): what two add together beyond what each
    adds alone, averaged over all orders in which they are adjacent; NaN on the diagonal, where there is no pair.

        I_ij = Σ_{S without i, j}  |S|! (n - |S| - 2)! / (n - 1)!  ·  ( worth(S + i + j) - worth(S + i) - worth(S + j)
                                                                        + worth(S) )
    """
    n, sizes = _sizes(worth)
    weights = torch.tensor([1 / ((n - 1) * comb(n - 2, size)) for size in range(n - 1)], dtype=worth.dtype)
    indices = worth.new_full((n, n), torch.nan)
    for first in range(n):
        # Without the first player's axis, the second player's is one place earlier.
        without, joined = _split(worth, first).unbind(1)
        gain, others = (joined - without).flatten(), _split(sizes, first)[:, 0].flatten()
        for second in range(first + 1, n):
            alone, beside = _split(gain, second - 1).unbind(1)
            index = (weights[_split(others, second - 1)[:, 0]] * (beside - alone)).sum()
            indices[first, second] = indices[second, first] = index
    return indices


def _sizes(worth: Float[Tensor, "coalition"]) -> tuple[int, Int[Tensor, "coalition"]]:
    n = len(worth).bit_length() - 1
    return n, all_coalitions(n).sum(1)


def _split(values: Tensor, player: int) -> Tensor:
    """Values as [players before it, it absent or present, players after it]."""
    return values.reshape(2**player, 2, -1)


MIN_SAMPLES = 10
"""With fewer samples, standard errors are unreliable: confidence intervals would miss the truth too often."""


@dataclass(frozen=True)
class Estimates:
    """The sampled fields of `ShapleyValues`; NaN where there is no pair, or too few samples of it."""

    values: Float[Tensor, "player"]
    stderr: Float[Tensor, "player"]
    interactions: Float[Tensor, "player player"]
    interactions_stderr: Float[Tensor, "player player"]
    pair_samples: Int[Tensor, "player player"]
    full: float
    empty: float
    n_runs: int


def estimate(
    worth: Callable[[Bool[Tensor, "coalition player"]], Float[Tensor, "coalition"]],
    n_players: int,
    n_samples: int,
    interactions: bool,
    generator: torch.Generator,
) -> Estimates:
    """Unbiased estimates from random orders, each paired with its reverse; `worth` is called once.

    A player that comes early in an order comes late in its reverse, so the errors of the two partly cancel (antithetic
    sampling: Mitchell, Cooper, Frank & Holmes, JMLR 2022, arXiv 2104.12199). In every order the gains telescope, so the
    values sum to full − empty exactly. For interactions, neighbours in an order are also swapped, which doubles the
    runs; without this, what each of two players adds alone would stay in the difference as noise. A pair is adjacent
    in a fraction 2 / n_players of the orders; a pair with too few samples, or none, gets NaN.
    """
    n = n_players
    check_memory(8 * int(n_samples) * n * (n + 1), n_samples=n_samples)  # who has joined, at each place in each order
    ranks = torch.rand(n_samples, n, generator=generator, dtype=torch.float64).argsort(-1)
    # Who has joined after k players, k = 0 ... n; the complement has joined after n - k players in the reverse order.
    come = ranks[:, None] < torch.arange(n + 1)[:, None]
    # With the players at places k and k + 1 swapped: who has joined after the first of the two.
    k = torch.arange(n - 1 if interactions else 0)[:, None]
    swapped = (ranks[:, None] < k) | (ranks[:, None] == k + 1)
    forward = torch.cat([come, swapped], 1)
    visited, where = torch.stack([forward, ~forward]).flatten(0, 2).unique(dim=0, return_inverse=True)
    found = worth(visited)[where].reshape(2, n_samples, -1)
    come_worth, swapped_worth = found[..., : n + 1], found[..., n + 1 :]

    ahead, behind = come_worth.diff(dim=-1)
    gains = ((ahead - behind) / 2).gather(1, ranks)
    stderr = gains.std(0) / math.sqrt(n_samples)
    if interactions and n > 1:
        # An order and its reverse give the same difference of differences.
        beyond = come_worth[..., 2:] - come_worth[..., 1:-1] - swapped_worth + come_worth[..., :-2]
        mean, spread, counts = _by_pair(beyond.mean(0), ranks.argsort(-1).unfold(1, 2, 1), n)
    else:
        mean = spread = gains.new_full((n, n), torch.nan)
        counts = torch.zeros(n, n, dtype=torch.long)
    full, empty = float(come_worth[0, 0, -1]), float(come_worth[0, 0, 0])
    return Estimates(gains.mean(0), stderr, mean, spread, counts, full, empty, len(visited))


def _by_pair(
    samples: Float[Tensor, "sample neighbours"], pairs: Int[Tensor, "sample neighbours 2"], n: int
) -> tuple[Float[Tensor, "player player"], Float[Tensor, "player player"], Int[Tensor, "player player"]]:
    """Mean, standard error and number of each pair's samples."""
    low, high = pairs.amin(-1), pairs.amax(-1)
    cell, flat = (low * n + high).flatten(), samples.flatten()
    counts = torch.bincount(cell, minlength=n * n)
    mean = flat.new_zeros(n * n).index_add_(0, cell, flat) / counts
    squares = flat.new_zeros(n * n).index_add_(0, cell, (flat - mean[cell]).square())
    stderr = (squares / (counts - 1).clamp(min=1) / counts).sqrt()
    too_few = counts < MIN_SAMPLES
    mean, stderr = mean.masked_fill(too_few, torch.nan), stderr.masked_fill(too_few, torch.nan)
    upper = torch.ones(n, n).triu(1).bool()
    mean, stderr, counts = mean.reshape(n, n), stderr.reshape(n, n), counts.reshape(n, n)
    return torch.where(upper, mean, mean.T), torch.where(upper, stderr, stderr.T), counts + counts.T
