"""Small models for the tests: every path alive, float64, and seeded without the global random state."""

import warnings

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig

torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for one another

D_VOCAB = 7
SHAPE = {"d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 10, "n_ctx": 12, "d_vocab": D_VOCAB}
HEADS = [hl.Component(layer, "head", head) for layer in (0, 1) for head in (0, 1)]
MLPS = [hl.Component(layer, "mlp") for layer in (0, 1)]
CIRCUIT = hl.Circuit(previous_token=(HEADS[1],), induction=(HEADS[2],), bigram=(MLPS[1],))


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def prompts(n_prompts=2, length=5, seed=0, d_vocab=D_VOCAB):
    return torch.randint(d_vocab, (n_prompts, length), generator=torch.Generator().manual_seed(seed))


def handwritten(d_vocab=D_VOCAB, seed=0, n_ctx=24, dtype=torch.float64, **options):
    """An associative transformer of a random language."""
    language = hl.BigramLanguage.dirichlet(d_vocab, seed=seed)
    return hl.associative_transformer(language, n_ctx=n_ctx, dtype=dtype, device="cpu", **options)


def perturbed(seed=0, scale=0.1, d_vocab=D_VOCAB, n_ctx=12, dtype=torch.float64, **options):
    """The same with noise on every weight and bias, and moderate strengths: no pattern is one-hot."""
    options.setdefault("strengths", hl.Strengths(previous_token=2.0, match=2.0, copy=3.0, bigram=1.0))
    model = handwritten(d_vocab, seed, n_ctx, dtype, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


OURS = not HookedTransformer.__module__.startswith("transformer_lens")
"""Whether TransformerLens has no HookedTransformer, and hijack-lens brings one that can be less."""


def lens_model(seed=None, **options):
    """A HookedTransformer; with a seed, with TransformerLens's random weights, or such as it would draw."""
    drawn = {} if OURS or seed is None else {"seed": seed}  # which seeds the global random state, too
    try:
        cfg = HookedTransformerConfig(device="cpu", **options, **drawn)
    except (TypeError, ValueError) as error:
        if not OURS:
            raise
        pytest.skip(f"TransformerLens has no HookedTransformer any more, and ours is none of this kind: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg).eval()
    if OURS and seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.rsplit(".", 1)[-1].startswith("W_"):
                    parameter.normal_(0, 0.8 / cfg.d_model**0.5, generator=generator)
    return model


def hooked(norm=None, act="gelu", n_layers=2, seed=0, dtype=torch.float64, **config):
    """A HookedTransformer with random weights and biases throughout, and a circuit given by hand."""
    options = {**SHAPE, "n_layers": n_layers, "act_fn": act, "normalization_type": norm, **config}
    model = lens_model(**options, dtype=dtype, init_weights=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith(".w"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith((".b", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise if name.startswith(("embed", "pos_embed")) else 0.4 * noise)
    roles = (CIRCUIT.previous_token, CIRCUIT.induction, CIRCUIT.bigram)
    model.circuit = hl.Circuit(*(tuple(part for part in role if part.layer < model.cfg.n_layers) for role in roles))
    return model


def with_sink(n_layers=3):
    """The same, with an embedding of the first position that its last block's heads all look for."""
    model = hooked(n_layers=n_layers)
    attn = model.blocks[n_layers - 1].attn
    with torch.no_grad():
        attn.b_Q.fill_(0.0)
        attn.b_Q[:, 0] = 6.0
        model.W_pos[0] = 0.0
        model.W_pos[0, 0] = 20.0
        attn.W_K[:, 0] = 0.0
        attn.W_K[:, 0, 0] = 1.0
    return model


def with_factor(factor=2.0, **options):
    """The same, its logits multiplied after the unembedding, as in Cohere's and Granite's models."""
    model = hooked("LN", **options)
    model.unembed.register_forward_hook(lambda module, arguments, logits: factor * logits)
    return model


def native(norm=None, act="gelu", seed=0, **config):
    """A TransformerBridge around TransformerLens's native model, and a HookedTransformer with its weights."""
    twin = hooked(norm, act, seed=seed)
    options = {**SHAPE, "n_layers": 2, "act_fn": act, "normalization_type": norm, "seed": 0, **config}
    bridge = TransformerBridge.boot_native(options, device="cpu", dtype=torch.float64)
    theirs = {name.replace("_original_component.", ""): value for name, value in bridge.named_parameters()}
    d_model = SHAPE["d_model"]
    with torch.no_grad():
        theirs.pop("tok_embed.weight").copy_(twin.W_E)
        theirs.pop("pos.weight").copy_(twin.W_pos)
        theirs.pop("head.weight").copy_(twin.W_U.T)
        theirs.pop("head.bias", None)  # a parameter or a buffer, by version
        bridge.unembed.original_component.bias.copy_(twin.b_U)
        for layer, block in enumerate(twin.blocks):
            attn, mlp, at = block.attn, block.mlp, f"layers.{layer}"
            for name in "qkv":
                weight, bias = getattr(attn, f"W_{name.upper()}"), getattr(attn, f"b_{name.upper()}")
                theirs.pop(f"{at}.attn.{name}.weight").copy_(weight.transpose(1, 2).reshape(-1, d_model))
                theirs.pop(f"{at}.attn.{name}.bias").copy_(bias.flatten())
            theirs.pop(f"{at}.attn.o.weight").copy_(attn.W_O.reshape(-1, d_model).T)
            theirs.pop(f"{at}.attn.o.bias").copy_(attn.b_O)
            for name, weight, bias in (("fc_in", mlp.W_in, mlp.b_in), ("fc_out", mlp.W_out, mlp.b_out)):
                theirs.pop(f"{at}.mlp.{name}.weight").copy_(weight.T)
                theirs.pop(f"{at}.mlp.{name}.bias").copy_(bias)
        norms = {f"layers.{layer}.{n}": getattr(twin.blocks[layer], n) for layer in (0, 1) for n in ("ln1", "ln2")}
        for name, module in {**norms, "ln_out": getattr(twin, "ln_final", None)}.items():
            for theirs_name, ours in (("weight", "w"), ("bias", "b")):
                if f"{name}.{theirs_name}" in theirs:
                    theirs.pop(f"{name}.{theirs_name}").copy_(getattr(module, ours))
    assert not theirs, f"not copied: {sorted(theirs)}"
    return bridge.eval(), twin
