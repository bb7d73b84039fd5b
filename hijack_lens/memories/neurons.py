"""An MLP read as a key-value memory, and views of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijack_lens.attribution.direct import check_additive
from hijack_lens.attribution.scores import tolerance
from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_count, check_fields, check_list, check_shapes
from hijack_lens.core.circuit import Component
from hijack_lens.core.files import Saved
from hijack_lens.core.inputs import Components, Tokens, components_of, token_ids
from hijack_lens.core.tables import Drawn
from hijack_lens.core.texts import n_outputs, outputs_are_tokens, texts_of
from hijack_lens.memories.token_tables import NamedTokens, centred, check_logits, context_free
from hijack_lens.models.linear_maps import linear_norm

_BY_KEY = ("key_tokens", "pre", "post")
_BY_VALUE = ("promoted", "promoted_logits", "suppressed", "suppressed_logits")


@dataclass(frozen=True, repr=False)
class MemoryNeurons(NamedTokens, Saved, Drawn):
    """Neurons as key-value pairs; activations and logits in float64, all on the CPU.

    Attributes:
        component: the MLP.
        neurons: their indices in it.
        key_tokens: ids of the tokens that make each write most (|post|), strongest first; where too few do, then of
            those that come closest to turning it on.
        pre: the neuron's value for these tokens before its activation; in a gated MLP, that of its gate.
        post: the value that W_out is multiplied by, after the activation.
        n_keys: how many tokens were tried as keys.
        on: the fraction of them whose `pre` is positive.
        promoted: ids of the outputs whose logits the neuron raises most.
        promoted_logits: how much it adds to them, per unit of `post`, relative to the mean over all outputs.
        suppressed: ids of the outputs whose logits it lowers most.
        suppressed_logits: how much it adds to them, likewise.
        spread: root mean square over all outputs of what it adds.

    Examples:
        >>> neurons = hl.memory_neurons(model, k=2)
        >>> strongest = int(neurons.strength.argmax())
        >>> language.tokens[neurons.value_tokens[strongest, 0]], neurons.value_logits[strongest, 0]
        ('q', tensor(4.7345, dtype=torch.float64))
    """

    older_names: ClassVar = {"keys": "key_tokens"}

    component: Component
    neurons: Int[Tensor, "neuron"]
    key_tokens: Int[Tensor, "neuron key"]
    pre: Float[Tensor, "neuron key"]
    post: Float[Tensor, "neuron key"]
    n_keys: int
    on: Float[Tensor, "neuron"]
    promoted: Int[Tensor, "neuron value"]
    promoted_logits: Float[Tensor, "neuron value"]
    suppressed: Int[Tensor, "neuron value"]
    suppressed_logits: Float[Tensor, "neuron value"]
    spread: Float[Tensor, "neuron"]

    def __post_init__(self) -> None:
        check_fields(self)
        n = self.neurons.numel()
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_BY_KEY, (n, *self.key_tokens.shape[-1:]))
        shapes |= dict.fromkeys(_BY_VALUE, (n, *self.promoted.shape[-1:])) | dict.fromkeys(
            ("neurons", "on", "spread"), (n,)
        )
        check_shapes(self, shapes)

    @property
    def strength(self) -> Float[Tensor, "neuron"]:
        """Root mean square over the vocabulary of the logits that each neuron writes for its strongest key."""
        return self.post[:, 0].abs() * self.spread

    @property
    def value_tokens(self) -> Int[Tensor, "neuron value"]:
        """Ids of the tokens whose logits each neuron raises most for its strongest key."""
        return torch.where(self.post[:, :1] < 0, self.suppressed, self.promoted)

    @property
    def value_logits(self) -> Float[Tensor, "neuron value"]:
        """How much it adds to them, relative to the mean over the vocabulary; the final norm's scale is taken as 1."""
        strongest = self.post[:, :1]
        return strongest * torch.where(strongest < 0, self.suppressed_logits, self.promoted_logits)

    def strongest(self, most: int) -> list[int]:
        """Rows of the neurons with the largest `strength`, the largest first."""
        return self.strength.argsort(descending=True, stable=True)[: check_count("most", most)].tolist()

    def to_pandas(self) -> pd.DataFrame:
        """A row per neuron and rank: the key of that rank with its `pre` and `post`, and the tokens that it raises and
        lowers, in logits per unit of `post`; missing where one side has fewer ranks."""
        by_rank = []
        for rank in range(max(self.key_tokens.shape[1], self.promoted.shape[1])):
            table = pd.DataFrame({"neuron": self.neurons.numpy(), "rank": rank})
            for names, width in ((_BY_KEY, self.key_tokens.shape[1]), (_BY_VALUE, self.promoted.shape[1])):
                for name in names if rank < width else ():
                    column = getattr(self, name)[:, rank]
                    text = self.token_text if name == "key_tokens" else self.output_text
                    table[name] = column.numpy() if column.is_floating_point() else [text(i) for i in column.tolist()]
            by_rank.append(table)
        frame = pd.concat(by_rank).sort_values(["neuron", "rank"], ignore_index=True)
        return frame.rename(columns={"key_tokens": "key"})


_DIRECTIONS = 8
"""Along how many directions an MLP's output is checked."""

_CELLS = 2**24
"""The most logits at once: 128 MiB in float64."""


@analysis
def memory_neurons(
    model: Any,
    components: Components | None = None,
    *,
    key_tokens: Tokens = None,
    neurons: Iterable[int] | None = None,
    k: int = 8,
) -> MemoryNeurons:
    """An MLP's neurons as pairs of a key and a value (Geva et al. 2021, arXiv 2012.14913).

    The key side is what each token does to a neuron by itself, read off its own run with attention and positions off:
    its embedding, through the norms and the earlier MLPs, before the activation (`pre`) and after it (`post`). A gated
    MLP's neuron is on if its gate is, and `post` is the product that it passes on. The value side is what one unit of
    `post` writes straight into the logits: the neuron's row of W_out through the final norm's weights (its scale is
    taken to be 1) and W_U, relative to its mean over the vocabulary, which no prediction depends on.

    Tokens and neurons are taken some at a time, so that memory use is bounded whatever the vocabulary's size.

    Args:
        model: a HookedTransformer or TransformerBridge of any depth.
        components: an MLP, named as for `memory_matrix`; by default the bigram memory of `model.circuit`.
        key_tokens: tokens to try as keys, by id or text; by default the whole vocabulary.
        neurons: indices of the neurons; by default all.
        k: how many tokens to keep on either side.

    Raises:
        TypeError, ValueError: for MLPs, neurons and tokens that the model does not have; for MLPs without weights of
            their own, such as mixtures of experts; and for models whose logits, or MLPs whose outputs, are not sums of
            what neurons write.

    Examples:
        >>> neurons = hl.memory_neurons(model, k=1)
        >>> best = neurons.to_pandas().nlargest(1, "post")
        >>> best.columns.tolist()
        ['neuron', 'rank', 'key', 'pre', 'post', 'promoted', 'promoted_logits', 'suppressed', 'suppressed_logits']
    """
    named = components_of(model, components, kind="mlp")
    if len(named) > 1:
        raise ValueError(f"components must be one MLP, got {', '.join(map(str, named))}")
    check_additive(model)
    W_out = getattr(model.blocks[named[0].layer].mlp, "W_out", None)
    if not isinstance(W_out, Tensor):
        raise ValueError(f"components: {named[0]} has no W_out of its own, as in mixtures of experts")
    asked = _neuron_ids(neurons, len(W_out))
    ids = token_ids(model, "key_tokens", key_tokens)
    k = check_count("k", k, minimum=1)
    check_logits(model, int(ids[0]))

    found = _keys(model, named[0], ids, asked.to(W_out.device), k)
    found |= _values(model, W_out, asked.to(W_out.device), k)
    on = found.pop("n_on").cpu().double() / len(ids)
    tensors: dict[str, Any] = {
        name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in found.items()
    }
    as_tokens = outputs_are_tokens(model)
    named_by_text = ("key_tokens", *(("promoted", "suppressed") if as_tokens else ()))
    vocab = texts_of(model, torch.cat([tensors[name].flatten() for name in named_by_text]))
    counted: dict[str, Any] = {"n_keys": len(ids), "on": on, "outputs_are_tokens": as_tokens}
    return MemoryNeurons(vocab, component=named[0], neurons=asked, **counted, **tensors)


def _keys(
    model: Any, mlp: Component, tokens: Int[Tensor, "token"], neurons: Int[Tensor, "neuron"], k: int
) -> dict[str, Tensor]:
    """The k tokens that each neuron responds to most, and how many turn it on, a part of the vocabulary at a time."""
    names = [f"blocks.{mlp.layer}.{leaf}" for leaf in ("mlp.hook_pre", "mlp.hook_post", "hook_mlp_out")]
    best: tuple[Tensor, ...] = ()
    n_on, done = torch.zeros_like(neurons), 0
    every = len(neurons) == len(model.blocks[mlp.layer].mlp.W_out)
    for run in context_free(model, tokens, names, mlp.layer + 1):
        pre, post, out = (run[name] for name in names)
        _check_written(model, mlp, post, out)
        pre, post = (x.T if every else x[:, neurons].T for x in (pre, post))
        n_on += (pre > 0).sum(1)
        ids = tokens[done : done + pre.shape[1]].to(neurons.device).expand(len(neurons), -1)
        done += pre.shape[1]
        # Those that make it write most; after them, those that come closest to turning it on.
        score = torch.where(post == 0, pre.clamp(max=0), post.abs())
        new = _largest((score, ids, pre, post), k)
        best = _largest([torch.cat(pair, 1) for pair in zip(best, new, strict=True)], k) if best else new
    return {"key_tokens": best[1], "pre": best[2], "post": best[3], "n_on": n_on}


def _largest(columns: Sequence[Tensor], k: int) -> tuple[Tensor, ...]:
    """The k places of each row that are largest in the first of these tables, in all of them."""
    top = columns[0].topk(min(k, columns[0].shape[1]), dim=1).indices
    return tuple(x.gather(1, top) for x in columns)


def _check_written(
    model: Any, mlp: Component, post: Float[Tensor, "token d_mlp"], out: Float[Tensor, "token d_model"]
) -> None:
    module = model.blocks[mlp.layer].mlp
    # Along a few random directions, which no other output would agree in.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(out.shape[-1], _DIRECTIONS, generator=generator, dtype=torch.float64).to(out)
    of_neurons, seen = module.W_out @ directions, out @ directions
    written = post @ of_neurons
    if getattr(module, "b_out", None) is not None:
        written = written + module.b_out @ directions
    # Relative to a bound on the terms, since their sum may cancel.
    scale = (post.abs() @ of_neurons.abs() + out.abs() @ directions.abs()).max()
    if not bool((written - seen).abs().max() <= tolerance(out.dtype) * scale):
        raise ValueError(
            f"what {mlp} writes is not the sum of its neurons: hooks on the model change it, or it has parts that are "
            "not known here"
        )


def _values(model: Any, W_out: Float[Tensor, "d_mlp d_model"], neurons: Tensor, k: int) -> dict[str, Tensor]:
    """The k tokens whose logits each neuron raises and lowers most, some neurons at a time."""
    k = min(k, n_outputs(model))
    parts: dict[str, list[Tensor]] = {}
    for some in neurons.split(max(1, _CELLS // n_outputs(model))):
        rows = W_out[some]
        norm = linear_norm(getattr(model, "ln_final", None), rows)
        logits = centred(norm.linear(rows, rows.new_ones(1, 1)) @ model.W_U)
        parts.setdefault("spread", []).append(logits.square().mean(1).sqrt())
        for name, largest in (("promoted", True), ("suppressed", False)):
            top = logits.topk(k, largest=largest)
            parts.setdefault(name, []).append(top.indices)
            parts.setdefault(f"{name}_logits", []).append(top.values)
    return {name: torch.cat(part) for name, part in parts.items()}


def _neuron_ids(neurons: Any, d_mlp: int) -> Int[Tensor, "neuron"]:
    if neurons is None:
        return torch.arange(d_mlp)
    ids = [check_count("neurons", neuron) for neuron in check_list("neurons", neurons, "several ints")]
    if not ids or len(set(ids)) < len(ids) or max(ids) >= d_mlp:
        raise ValueError(f"neurons must be one or several different ints below d_mlp={d_mlp}, got {ids}")
    return torch.tensor(ids)
