"""An MLP as a key-value memory: which tokens turn each neuron on, and what it then writes."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens._checks import check_count
from hijack_lens.attribution.answers import texts_of
from hijack_lens.attribution.direct import check_additive
from hijack_lens.attribution.score_terms import tolerance
from hijack_lens.circuit import Component
from hijack_lens.memories.context_free import Tokens, check_logits, chosen_tokens, context_free, memory_mlps
from hijack_lens.memories.neurons_result import MemoryNeurons
from hijack_lens.norm import linear_norm

_CELLS = 2**24
"""Logits at once: 128 MiB in float64."""


@torch.no_grad()
def memory_neurons(
    model: Any,
    component: Component | None = None,
    *,
    keys: Tokens = None,
    neurons: Iterable[int] | None = None,
    k: int = 8,
) -> MemoryNeurons:
    """An MLP's neurons as pairs of a key and a value (Geva et al. 2021, arXiv 2012.14913).

    The key side is what each token does to a neuron by itself, read off its own run with attention and positions off:
    its embedding, through the norms and the earlier MLPs, before the activation (`pre`) and after it (`post`). A gated
    MLP's neuron is on by its gate, and `post` is the product that it passes on. The value side is what one unit of
    `post` writes straight into the logits: the neuron's row of W_out through the final norm's weights (its scale is
    taken to be 1) and W_U, relative to its mean over the vocabulary, which no prediction depends on.

    Tokens and neurons are taken some at a time, so that memory is bounded whatever the vocabulary.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        component: an MLP; by default the circuit's bigram memory.
        keys: tokens to try as keys, by id or text; by default the whole vocabulary.
        neurons: by default all.
        k: how many tokens to keep on either side.

    Raises:
        TypeError, ValueError: for MLPs, neurons and tokens that the model does not have; for MLPs without weights of
            their own, as mixtures of experts; and for models whose logits, or MLPs whose outputs, are no sum over what
            neurons write.
    """
    named = memory_mlps(model, component)
    if len(named) > 1:
        raise ValueError(f"component must be one MLP, got {', '.join(map(str, named))}")
    check_additive(model)
    W_out = getattr(model.blocks[named[0].layer].mlp, "W_out", None)
    if not isinstance(W_out, Tensor):
        raise ValueError(f"component {named[0]} has no W_out of its own, as with mixtures of experts")
    asked = _neuron_ids(neurons, len(W_out))
    ids = chosen_tokens(model, "keys", keys)
    k = check_count("k", k, minimum=1)
    check_logits(model, int(ids[0]))

    found = _keys(model, named[0], ids, asked.to(W_out.device), k)
    found |= _values(model, W_out, asked.to(W_out.device), k)
    on = found.pop("n_on").cpu().double() / len(ids)
    tensors = {name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in found.items()}
    shown = torch.cat([tensors[name].flatten() for name in ("keys", "promoted", "suppressed")])
    return MemoryNeurons(texts_of(model, shown), component=named[0], neurons=asked, n_keys=len(ids), on=on, **tensors)


def _keys(
    model: Any, mlp: Component, tokens: Int[Tensor, "token"], neurons: Int[Tensor, "neuron"], k: int
) -> dict[str, Tensor]:
    """The k tokens that each neuron responds to most, and how many turn it on, a part of the vocabulary at a time."""
    names = [f"blocks.{mlp.layer}.{leaf}" for leaf in ("mlp.hook_pre", "mlp.hook_post", "hook_mlp_out")]
    best: tuple[Tensor, ...] = ()
    n_on, done = torch.zeros_like(neurons), 0
    for run in context_free(model, tokens, names, mlp.layer + 1):
        pre, post, out = (run[name] for name in names)
        _check_written(model, mlp, post, out)
        pre, post = pre[:, neurons].T, post[:, neurons].T
        n_on += (pre > 0).sum(1)
        ids = tokens[done : done + pre.shape[1]].to(neurons.device).expand(len(neurons), -1)
        done += pre.shape[1]
        # Those that make it write most; after them, those that come closest to turning it on.
        score = torch.where(post == 0, pre.clamp(max=0), post.abs())
        new = (score, ids, pre, post)
        joined = [torch.cat(pair, 1) for pair in zip(best, new, strict=True)] if best else list(new)
        top = joined[0].topk(min(k, joined[0].shape[1]), dim=1).indices
        best = tuple(x.gather(1, top) for x in joined)
    return {"keys": best[1], "pre": best[2], "post": best[3], "n_on": n_on}


def _check_written(
    model: Any, mlp: Component, post: Float[Tensor, "token d_mlp"], out: Float[Tensor, "token d_model"]
) -> None:
    module = model.blocks[mlp.layer].mlp
    written = post @ module.W_out
    if getattr(module, "b_out", None) is not None:
        written = written + module.b_out
    # Against a bound on all that was added up, which may cancel.
    scale = (post.abs() @ module.W_out.abs() + out.abs()).max()
    if not bool((written - out).abs().max() <= tolerance(out.dtype) * scale):
        raise ValueError(
            f"what {mlp} writes is not the sum of its neurons: hooks on the model change it, or it has parts that are "
            "not known here"
        )


def _values(model: Any, W_out: Float[Tensor, "d_mlp d_model"], neurons: Tensor, k: int) -> dict[str, Tensor]:
    """The k tokens whose logits each neuron raises and lowers most, some neurons at a time."""
    k = min(k, model.cfg.d_vocab)
    parts: dict[str, list[Tensor]] = {}
    for some in neurons.split(max(1, _CELLS // model.cfg.d_vocab)):
        rows = W_out[some]
        norm = linear_norm(getattr(model, "ln_final", None), rows)
        logits = norm.linear(rows, rows.new_ones(1, 1)) @ model.W_U
        logits = logits - logits.mean(1, keepdim=True)
        parts.setdefault("spread", []).append(logits.square().mean(1).sqrt())
        for name, largest in (("promoted", True), ("suppressed", False)):
            top = logits.topk(k, largest=largest)
            parts.setdefault(name, []).append(top.indices)
            parts.setdefault(f"{name}_logits", []).append(top.values)
    return {name: torch.cat(part) for name, part in parts.items()}


def _neuron_ids(neurons: Any, d_mlp: int) -> Int[Tensor, "neuron"]:
    if neurons is None:
        return torch.arange(d_mlp)
    if not isinstance(neurons, Iterable) or isinstance(neurons, str):
        raise TypeError(f"neurons must be several ints, got {neurons!r:.80}")
    ids = [check_count("neurons", neuron) for neuron in neurons]
    if not ids or len(set(ids)) < len(ids) or max(ids) >= d_mlp:
        raise ValueError(f"neurons must be one or several different ints below d_mlp={d_mlp}, got {ids}")
    return torch.tensor(ids)
