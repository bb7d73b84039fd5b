"""A head's memory as a linear model that the context has trained: softmax attention in random features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import (
    Seed,
    check_count,
    check_fields,
    check_list,
    check_position,
    check_shapes,
    fixed_seed,
)
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.files import Saved
from hijack_lens.core.inputs import Tokens, circuit_of, one_head, single_prompt
from hijack_lens.core.memory import check_memory
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.memories.context import products_of, run_with
from hijack_lens.memories.token_tables import replaced, token_tables


@dataclass(frozen=True, repr=False)
class DualModel(Saved, Drawn):
    """How well a linear model of so many features, trained by the context, is a softmax attention head.

    All numbers are norms of differences from what the head computes (`hook_z`), over all query tokens, relative to the
    norm of that.

    Attributes:
        features: the sizes that were tried.
        error: the linear model's, by draw of the features and their number.
        exact_error: that of the softmax kernel itself, which has infinitely many features: rounding.
        exact_updates: with that kernel, after each update of the linear model: one per position, the query's own last.
        updates: the same with the most features, the first draw of them.
        head: the head whose dual this is.
        circuit: the roles by which components are named.

    Examples:
        >>> dual = hl.memories.dual_model(model, prompt, "L1H0", features=[16, 256])
        >>> dual.error.shape, len(dual.updates), bool(dual.exact_error < 1e-5)
        (torch.Size([8, 2]), 24, True)
    """

    features: tuple[int, ...]
    error: Float[Tensor, "draw size"]
    exact_error: float
    exact_updates: Float[Tensor, "update"]
    updates: Float[Tensor, "update"]
    head: Component
    circuit: Circuit = Circuit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, {"error": (len(self.error), len(self.features)), "updates": tuple(self.exact_updates.shape)})

    def to_pandas(self) -> pd.DataFrame:
        """A row per draw and number of features, with the error."""
        return tidy({"draw": range(len(self.error)), "features": self.features}, error=self.error)


@analysis
def dual_model(
    model: Any,
    prompt: object,
    head: Component | str | tuple[Component, ...] | None = None,
    position: int = -1,
    *,
    query_tokens: Tokens = None,
    features: Sequence[int] = (16, 64, 256, 1024, 4096),
    draws: int = 8,
    seed: Seed = 0,
    circuit: Circuit | None = None,
    prepend_bos: bool | None = None,
) -> DualModel:
    """A softmax head as the linear model that its context trains, and how many features that takes.

    If exp(q . k) = phi(q) . phi(k), a head computes W phi(q) with W = sum over s of value_s phi(key_s)^T / D(q): the
    context's positions are updates of a linear model, each a step of gradient descent on -value_s . W phi(key_s) (Ren &
    Liu 2023, arXiv 2310.13220, section 3), with D(q) the softmax's sum. `fast_weights` of `context_memory` are those of
    the linear kernel. Here phi are positive orthogonal random features (FAVOR+; Choromanski et al. 2021, arXiv
    2009.14794): phi_i(x) = exp(omega_i . x - |x|^2 / 2) / sqrt(m), in the form of least variance (Likhosherstov et al.
    2022, arXiv 2205.15317): times exp(a |omega_i|^2) and with sqrt(1 - 4 a) omega_i, for the best a <= 0.

    Their variance grows exponentially with |q + k|^2, so both are first moved and scaled in ways that leave attention
    as it is: keys less their mean; queries less theirs, with exp(mean query . key_s) as a weight on update s; and
    queries times a matrix, keys times its inverse, that give both the same mean squares.

    The paper's modified attentions (regularised, augmented, with negative samples) are not here.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        prompt: a single prompt: text, tokens or a `HijackPrompt`. What comes after the position does not matter.
        head: the head to read: a `Component`, its place ("L1H0"), or a role that just one head plays; by default the
            circuit's induction head.
        position: where it is read; negative ones count from the end.
        query_tokens: tokens to put there, by id or text; by default all that the prompt holds up to there.
        features: numbers of features to try; the fewer are the first of the more.
        draws: how often features are drawn.
        seed: of the features.
        circuit: the roles of the components; by default `model.circuit`, if there is one.
        prepend_bos: whether texts begin with the tokenizer's begin token; by default as the model's `to_tokens` does.

    Raises:
        TypeError, ValueError: for prompts, heads, positions and tokens that the model does not have; for numbers that
            are not positive; and for heads whose attention is not the softmax of products of queries and keys, or whose
            output is zero.

    Examples:
        >>> hl.memories.dual_model(model, prompt, features=[16, 64], draws=2).to_pandas().columns.tolist()
        ['draw', 'features', 'error']
    """
    sizes = [check_count("features", m, minimum=1) for m in check_list("features", features, "numbers of features")]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"features must be different numbers in rising order, at least one, got {sizes!s:.60}")
    draws, seed = check_count("draws", draws, minimum=1), fixed_seed(seed)
    ids = single_prompt(model, prompt)
    at = check_position("position", position, ids.shape[1], ids.shape[1] - 1)
    if query_tokens is None:
        query_tokens = ids[0, : at + 1].unique()
    tables = token_tables(model, ids, at, query_tokens, [0])
    circuit = circuit_of(model, circuit)
    chosen = one_head(model, head, circuit)
    n_queries = len(tables.query_tokens)
    check_memory(8 * draws * len(sizes), draws=draws)
    check_memory(24 * (n_queries + at + 1) * sizes[-1], features=sizes[-1])

    run = run_with(model, chosen, replaced(tables.tokens, tables.query_tokens), ids.new_zeros(1))
    products = products_of(model, chosen, run)
    if products is None:
        raise ValueError(f"head {chosen} must attend by a softmax of products of queries and keys, which it does not")
    q, k, own = (x.double() for x in products)
    v, own_v, z = run["v"][:at].double(), run["own_v"].double(), run["z"].double()
    if not bool(z.any()):
        raise ValueError(f"head {chosen} must write something to be approximated, but its output is zero")

    def answers(weights: Float[Tensor, "query source"]) -> Float[Tensor, "query d_head"]:
        return weights[:, :-1] @ v + weights[:, -1:] * own_v

    def off(mixed: Float[Tensor, "query d_head"]) -> Float[Tensor, ""]:
        return (mixed - z).norm() / z.norm()

    def after_updates(weights: Float[Tensor, "query source"]) -> Float[Tensor, "update"]:
        written, found = torch.zeros_like(z), []
        for source in range(at + 1):
            value = v[source] if source < at else own_v
            written = written + weights[:, source, None] * value
            found.append(off(written))
        return torch.stack(found)

    exact = torch.cat([q @ k.T, (q * own).sum(1, keepdim=True)], 1).softmax(-1)
    q, k, own, bias, own_bias = _recentred(q, k, own)
    stretch = _stretch(q, torch.cat([k, own]))
    generator = torch.Generator(q.device).manual_seed(seed)
    errors, updates = [], None
    for _ in tqdm(range(draws), disable=None, delay=1, unit="draw", desc="dual_model"):
        omega = _orthogonal(sizes[-1], q.shape[1], generator)
        damped = (1 - stretch) / 8 * omega.square().sum(1)
        stretched = ((1 + stretch) / 2) ** 0.5 * omega
        log_q, log_k, log_own = (damped + x @ stretched.T - x.square().sum(1, keepdim=True) / 2 for x in (q, k, own))
        log_k, log_own = log_k + bias[:, None], log_own + own_bias[:, None]
        # What the features of one query, or those of all keys, share as a factor cancels.
        top = torch.cat([log_k, log_own]).max()
        phi_q, phi_k, phi_own = (log_q - log_q.amax(1, keepdim=True)).exp(), (log_k - top).exp(), (log_own - top).exp()
        by_size = []
        for m in sizes:
            context = einsum(phi_q[:, :m], phi_k[:, :m], "query feature, source feature -> query source")
            itself = (phi_q[:, :m] * phi_own[:, :m]).sum(1, keepdim=True)
            kernel = torch.cat([context, itself], 1)
            weights = kernel / kernel.sum(1, keepdim=True).clamp_min(torch.finfo(kernel.dtype).tiny)
            by_size.append(off(answers(weights)))
        updates = after_updates(weights) if updates is None else updates
        errors.append(torch.stack(by_size))
    assert updates is not None
    return DualModel(
        features=tuple(sizes),
        error=torch.stack(errors),
        exact_error=float(off(answers(exact))),
        exact_updates=after_updates(exact),
        updates=updates,
        head=chosen,
        circuit=circuit,
    )


def _recentred(
    q: Float[Tensor, "query d_head"], k: Float[Tensor, "context d_head"], own: Float[Tensor, "query d_head"]
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "context"], Float[Tensor, "query"]]:
    """Queries and keys of the same attention but smaller, and what is added to each key's scores."""
    middle = torch.cat([k, own]).mean(0)
    k, own = k - middle, own - middle
    mean = q.mean(0)
    bias, own_bias = k @ mean, own @ mean
    q = q - mean
    keys = torch.cat([k, own])
    # M with M C_q M = C_k, for the mean squares C: then sqrt(M) q and M^-1/2 k have the same, and the least trace.
    root, inverse = _power(_squares(q), 0.5), _power(_squares(q), -0.5)
    balance = _power(inverse @ _power(root @ _squares(keys) @ root, 0.5) @ inverse, 0.5)
    unbalance = torch.linalg.inv(balance)
    return q @ balance, k @ unbalance, own @ unbalance, bias, own_bias


def _squares(x: Float[Tensor, "row d_head"]) -> Float[Tensor, "d_head d_head"]:
    """Mean squares, with a little in directions that no row has, which keeps the matrix invertible."""
    squares = x.T @ x / len(x)
    least = (_LEAST * squares.trace() / len(squares)).clamp_min(torch.finfo(x.dtype).tiny ** 0.25)
    return squares + least * torch.eye(len(squares)).to(squares)


_LEAST = 1e-3
"""Of the mean square per direction."""


def _power(matrix: Float[Tensor, "d d"], exponent: float) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(torch.finfo(values.dtype).tiny).pow(exponent)) @ vectors.T


def _stretch(q: Float[Tensor, "query d_head"], k: Float[Tensor, "key d_head"]) -> Float[Tensor, ""]:
    """u = 1 - 8 a >= 1, for the a whose features of d numbers have the least variance, given z = mean of |q + k|^2.

    The log of their second moment is d log((1 + u) / 2) - d/2 log(u) + z (1 + u) / u, up to what holds no u, and
    least where d u^2 - (d + 2 z) u - 2 z = 0.
    """
    d = q.shape[1]
    z = q.square().sum(1).mean() + k.square().sum(1).mean() + 2 * q.mean(0) @ k.mean(0)
    b = d + 2 * z
    return (b + (b**2 + 8 * d * z).sqrt()) / (2 * d)


def _orthogonal(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Vectors, each by itself normally distributed; each `d` of them in turn are orthogonal."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    blocks = torch.randn(-(-n // d), d, d, **options)
    q, r = torch.linalg.qr(blocks)
    directions = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]  # uniformly distributed (Mezzadri 2007)
    lengths = torch.randn(n, d, **options).norm(dim=1, keepdim=True)
    return directions.mT.reshape(-1, d)[:n] * lengths
