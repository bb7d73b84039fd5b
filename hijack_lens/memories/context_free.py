"""What a model makes of each token by itself: by its embedding and MLPs, with attention and positions off."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens._repeats import token_ids
from hijack_lens._runs import evaluating, rows_at_once
from hijack_lens.attribution.direct import check_unembedded
from hijack_lens.circuit import Circuit, Component
from hijack_lens.hooks.edges import embeddings
from hijack_lens.hooks.intervention import Intervention, record
from hijack_lens.hooks.site import sites
from hijack_lens.language import visible

_CELLS = 2**25
"""Activations at once: 128 MiB in float32."""

_CHECKED = 1000
"""Logits."""

Tokens = Iterable[int | str] | None
"""Tokens by id or text; `None` means the whole vocabulary."""


@dataclass(frozen=True, repr=False)
class NamedTokens:
    """A result about tokens, which knows their texts.

    Attributes:
        vocab: texts of the tokens that occur in it, by id; `None` where the model has no tokenizer.
    """

    vocab: Mapping[int, str] | None

    def token_text(self, token: int) -> str:
        """A token's text with white space visible; its id where there is no tokenizer."""
        return str(token) if self.vocab is None else visible(self.vocab[token])


def chosen_tokens(model: Any, name: str, tokens: Tokens) -> Int[Tensor, "token"]:
    """Distinct token ids, on the CPU.

    Raises:
        TypeError, ValueError: for none, and for what is no token of the model's.
    """
    if tokens is None:
        return torch.arange(model.cfg.d_vocab)
    return token_ids(model, name, tokens).cpu()


def memory_mlps(model: Any, components: Any) -> tuple[Component, ...]:
    """MLPs of the model's; by default its circuit's bigram memory.

    Raises:
        TypeError, ValueError: for what is no MLP of the model's, and where there is no default.
    """
    if components is None:
        circuit = getattr(model, "circuit", None)
        if not isinstance(circuit, Circuit) or not circuit.bigram:
            raise ValueError(
                "component must name an MLP, since this model has no circuit with a bigram memory: "
                "Component(layer, 'mlp'), or one that find_circuit(model) has found"
            )
        components = circuit.bigram
    sites(model, components)  # refuses what the model lacks
    named = (components,) if isinstance(components, (Component, str)) else tuple(components)
    if not named or len(set(named)) < len(named):
        raise ValueError(f"component must be one or several different MLPs, got {components!r}")
    for component in named:
        if not isinstance(component, Component) or component.kind != "mlp":
            raise ValueError(f"component must be an MLP, got {component}")
        if getattr(model.cfg, "attn_only", False):
            raise ValueError(f"component {component}: this model's blocks have no MLPs")
    return named


def check_logits(model: Any, token: int) -> None:
    """The logits after a lone token are a sum over what is in the last residual stream.

    Raises:
        ValueError: where they are not, as where a model multiplies its logits.
    """
    stream, answers = (
        f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        torch.arange(min(_CHECKED, model.W_U.shape[1])),
    )
    with evaluating(model):
        logits, run = record(model, torch.tensor([[token]], device=model.cfg.device), [stream])
    check_unembedded(model, run[stream][:, -1], logits[:, -1, answers], answers)


def context_free(
    model: Any, tokens: Int[Tensor, "token"], names: Iterable[str], stop_at_layer: int | None = None
) -> Iterator[dict[str, Float[Tensor, "rows features"]]]:
    """Activations of each token's own run, in parts that fit into memory.

    Each token is a prompt. What attention writes, biases included, and learned positions are zero.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: to run.
        names: of the hook points to read, which have one value per position.
        stop_at_layer: the first layer that need not be run.
    """
    n_layers = model.cfg.n_layers
    off = [f"blocks.{layer}.hook_attn_out" for layer in range(n_layers if stop_at_layer is None else stop_at_layer)]
    if "pos_embed" in embeddings(model):
        off.append("hook_pos_embed")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            found[name] = activation[:, -1].detach().clone()

        return read

    edit = [(name, lambda activation, hook: torch.zeros_like(activation)) for name in off]
    look = [(name, keep(name)) for name in names]
    at_once = min(rows_at_once(model, 1), _CELLS // (model.cfg.d_mlp or model.cfg.d_model))
    with tqdm(total=len(tokens), disable=None, unit="token", desc="context-free") as bar:
        for rows in tokens.split(max(1, at_once)):
            with evaluating(model), Intervention(model, edit=edit, look=look):
                model(rows[:, None].to(model.cfg.device), stop_at_layer=stop_at_layer)
            yield dict(found)
            bar.update(len(rows))
