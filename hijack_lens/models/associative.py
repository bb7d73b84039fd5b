"""Associative-memory transformers: every weight matrix written down as a sum of outer products."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import Seed, as_generator, check_choice, check_count, check_type, shown
from hijack_lens.core.circuit import Circuit, Component, Positions, Strengths
from hijack_lens.language import BigramLanguage, Triggers
from hijack_lens.models.architecture import Architecture
from hijack_lens.models.transformer import BigramTransformer


def associative_transformer(
    language: BigramLanguage,
    triggers: Triggers = None,
    positions: Positions = "relative",
    strengths: Strengths = Strengths(),
    *,
    n_ctx: int = 256,
    n_ctx_train: int | None = None,
    d_model: int | None = None,
    seed: Seed = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> BigramTransformer:
    """A two-layer HookedTransformer whose context memory and weight memory are known exactly.

    The construction is that of Wang & Sato (arXiv 2412.11459), after Bietti et al. 2023 (arXiv 2306.00802). With
    directions E(v), Phi(v), U(v) (token v; v was the previous token; v in the logits), p_t (position t), and
    unit vectors e_i of head space:

        block 0, head 0   W_R[1] = b1 * sum_v e_v, W_Q = sum_v E(v) e_v^T                  relative positions
                          W_Q = sum_t p_t e_t^T, W_K = b1 * sum_t p_{t-1} e_t^T            absolute, t <= n_ctx_train
                          W_V = sum_v E(v) e_v^T, W_O = sum_v e_v Phi(v)^T
        block 1, head 0   W_Q = sum_k E(k) e_k^T, W_K = b2 * sum_k Phi(k) e_k^T            k over the triggers
                          W_V = sum_v E(v) e_v^T, W_O = b3 * sum_v e_v U(v)^T
        block 1, MLP      W_in = sum_v E(v) e_v^T, W_out = g * sum_v,u log pi_b(u|v) e_v U(u)^T

    Block 0's MLP and all biases are 0. (With nearly orthogonal directions, see `d_model`, W_in is doubled, b_in is -1,
    and W_out holds log pi_b relative to each row's mean.) Weights take memory of order d_vocab^2: keep word-level
    vocabularies to a few thousand. Predictions follow `theory.logits` to float precision.

    Args:
        language: the global bigrams; none may have probability 0.
        triggers: tokens the induction head matches; `None` means all.
        positions: how the previous-token head finds the previous position: by a key per offset, at any
            length, or by pairs of absolute positions, up to `n_ctx_train`.
        strengths: the memories' strengths.
        n_ctx: the longest prompt.
        n_ctx_train: with absolute positions, the last position with a learned pair; by default `n_ctx`.
        d_model: by default, just enough for orthonormal directions: the residual stream's axes. With fewer dimensions,
            the directions come from a random subspace and are only nearly orthogonal (superposition). Logits are then
            approximate: relative to their mean, with noise from every stored pair. The 103 characters of English text
            need 309; the likeliest token stays the same at 98% of positions with 308, at 78% with 256, 35% with 128.
        seed: for the random directions.
        dtype: the weights' dtype.
        device: by default TransformerLens's choice.

    Raises:
        TypeError, ValueError: for an invalid argument.

    Examples:
        >>> model = hl.associative_transformer(language, triggers="q")
        >>> print(model.circuit)
        previous-token head: L0H0; induction head: L1H0; bigram memory: L1MLP
        >>> model.to_string(model("queen q")[0, -1].argmax())
        'u'
    """
    check_type("language", language, BigramLanguage)
    check_type("strengths", strengths, Strengths)
    check_choice("positions", positions, ("relative", "absolute"))
    if positions == "relative" and n_ctx_train is not None:
        raise ValueError(f"n_ctx_train is for absolute positions; relative ones have no end, got {shown(n_ctx_train)}")
    if strengths.previous_token == float("inf"):
        raise ValueError("strengths.previous_token must be finite in a model, got inf")
    log_pi_b = language.finite_log_pi_b()
    trigger_ids = language.trigger_ids(triggers)
    size = language.d_vocab
    n_ctx = check_count("n_ctx", n_ctx, minimum=1)
    n_pos = learned = 0
    if positions == "absolute":
        n_pos = n_ctx
        learned = n_ctx if n_ctx_train is None else check_count("n_ctx_train", n_ctx_train, minimum=1)
        if learned > n_ctx:
            raise ValueError(f"n_ctx_train must be at most n_ctx={n_ctx}, got {n_ctx_train}")
    orthonormal = 3 * size + n_pos
    d_model = orthonormal if d_model is None else check_count("d_model", d_model, minimum=1)

    architecture = Architecture(
        d_model=d_model, d_head=max(size, learned), d_mlp=size, n_ctx=n_ctx, positions=positions, scale_attention=False
    )
    architecture.check_memory(size, 4 + 8)  # the weights, and what they are written from, in float64
    model = BigramTransformer(
        architecture,
        language,
        strengths=strengths,
        triggers=trigger_ids.tolist(),
        n_ctx_train=learned or None,
        dtype=dtype,
        device=device,
    )
    directions = _directions(orthonormal, d_model, as_generator(seed))
    embed, previous, unembed, pos = directions.split([size, size, size, n_pos])
    d_head = model.cfg.d_head

    def heads(rows: Float[Tensor, "keys d_model"]) -> Float[Tensor, "1 d_model d_head"]:
        """sum_i rows(i) e_i^T, as a head's input matrix."""
        return torch.nn.functional.pad(rows.T, (0, d_head - len(rows)))[None]

    matched = torch.zeros(size, 1, dtype=torch.float64)
    matched[trigger_ids] = 1.0
    weights = {
        "embed.W_E": embed,
        "unembed.W_U": unembed.T,
        "blocks.0.attn.W_V": heads(embed),
        "blocks.0.attn.W_O": heads(previous).mT,
        "blocks.1.attn.W_Q": heads(matched * embed),
        "blocks.1.attn.W_K": heads(strengths.match * matched * previous),
        "blocks.1.attn.W_V": heads(embed),
        "blocks.1.attn.W_O": heads(strengths.copy * unembed).mT,
        "blocks.1.mlp.W_in": embed.T,
        "blocks.1.mlp.W_out": strengths.bigram * log_pi_b @ unembed,
    }
    if d_model < orthonormal:
        # Crosstalk turns on neurons that should be off, and each stored value adds noise. So a neuron fires only where
        # at least half its key is present, and values are relative to their mean, which no prediction depends on.
        centred = log_pi_b - log_pi_b.mean(-1, keepdim=True)
        weights |= {
            "blocks.1.mlp.W_in": 2 * embed.T,
            "blocks.1.mlp.b_in": torch.tensor(-1.0),
            "blocks.1.mlp.W_out": strengths.bigram * centred @ unembed,
        }
    if positions == "relative":
        offset_keys = torch.zeros(1, 2, d_head, dtype=torch.float64)
        offset_keys[0, 1, :size] = strengths.previous_token
        weights |= {"blocks.0.attn.W_Q": heads(embed), "blocks.0.attn.W_R": offset_keys}
    else:
        weights |= {
            "pos_embed.W_pos": pos,
            "blocks.0.attn.W_Q": heads(pos[1:learned]),
            "blocks.0.attn.W_K": heads(strengths.previous_token * pos[: learned - 1]),
        }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name, torch.zeros(())))
            if not parameter.isfinite().all():
                raise ValueError(f"strengths must be numbers that {dtype} can hold in {name}, got {strengths}")
    assert not weights, f"no parameter took {sorted(weights)}"
    return model


def _directions(count: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "count d_model"]:
    if d_model >= count:
        return torch.eye(count, d_model, dtype=torch.float64)
    # The rows of a random subspace's basis: on average, as far apart as random directions can be.
    random = torch.linalg.qr(torch.randn(count, d_model, generator=generator, dtype=torch.float64)).Q
    return random / random.norm(dim=-1, keepdim=True)


_CODES = 3
"""Position codes, each written by a head of the first layer."""


def unpositioned_transformer(
    language: BigramLanguage,
    triggers: Sequence[int],
    strengths: Strengths,
    *,
    reach: int,
    n_ctx: int,
    dtype: torch.dtype = torch.float64,
) -> BigramTransformer:
    """A three-layer associative-memory transformer without positional encoding; derived in docs/no_positions.md.

    Prompts begin with the language's last token, B, and do not hold it again; up to `reach` tokens, the previous-token
    head is at least as strong as `strengths` says. With the directions of `associative_transformer`, three more for
    codes c_0, c_1, c_2, and B:

        block 0, head j   scores log(1 + j) for B, 0 for others; writes c_j / (1 + j) for B: in all, c_j / (t + j)
        block 1, head 0   query (u_1 - 1, u_0 + 1), key scale * (u_1, u_2), with u_j what c_j holds; E(v) -> Phi(v)
        block 2           the second block of `associative_transformer`
    """
    d_model = 3 * language.d_vocab + _CODES
    two = associative_transformer(
        language, triggers, strengths=strengths, n_ctx=n_ctx, d_model=d_model, dtype=dtype, device="cpu"
    )
    architecture = replace(two.architecture, positions="none", n_layers=3, n_heads=_CODES)
    model = BigramTransformer(
        architecture, language, strengths=strengths, triggers=two.triggers, dtype=dtype, device="cpu"
    )
    model.circuit = Circuit((Component(1, "head", 0),), (Component(2, "head", 0),), (Component(2, "mlp"),))
    begin, codes = two.W_E[-1], torch.eye(d_model, dtype=dtype)[-_CODES:]
    scale = previous_token_scale(strengths.previous_token, reach)
    counter, shift, induction = (block.attn for block in model.blocks)
    first, second = (block.attn for block in two.blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for j in range(_CODES):
            counter.b_Q[j, 0] = math.log(1 + j)
            counter.W_K[j, :, 0] = counter.W_V[j, :, 0] = begin
            counter.W_O[j, 0] = codes[j] / (1 + j)
        shift.W_Q[0, :, :2] = torch.stack([codes[1], codes[0]], 1)
        shift.b_Q[0, :2] = torch.tensor([-1.0, 1.0], dtype=dtype)
        shift.W_K[0, :, :2] = scale * torch.stack([codes[1], codes[2]], 1)
        shift.W_V[0], shift.W_O[0] = first.W_V[0], first.W_O[0]
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            getattr(induction, name)[0] = getattr(second, name)[0]
        model.embed.load_state_dict(two.embed.state_dict())
        model.unembed.load_state_dict(two.unembed.state_dict())
        model.blocks[2].mlp.load_state_dict(two.blocks[1].mlp.state_dict())
    return with_beginning_prepended(model)


def previous_token_scale(strength: float, reach: int) -> float:
    """The scale at which the position before leads all others by `strength` or more, at positions up to `reach`."""
    return strength * reach * (reach + 1) ** 2 * (reach + 2)


def with_beginning_prepended(model: BigramTransformer) -> BigramTransformer:
    """The model, whose language's last token now begins the prompts that others make for it, as `find_circuit` does."""
    model.cfg.default_prepend_bos = True
    model.tokenizer.bos_token = model.language.tokens[-1]
    return model
