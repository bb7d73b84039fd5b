"""TransformerBridges booted from Hugging Face models saved on disk: small, float64, random, and nothing downloaded.

They are built once and shared: treat them as read-only.
"""

import functools
import tempfile
import warnings

import torch
import transformers
from models_for_tests import hooked
from plain_families import PLAIN, plain_of_hugging_face
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hijack_lens.hooked import HookedTransformer

WORDS = ["<end>", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "a", "b"]
D_VOCAB, D_MODEL, N_HEADS, D_HEAD, N_LAYERS, D_MLP, N_CTX = len(WORDS), 16, 4, 4, 2, 20, 24


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )


def scattered(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights and biases throughout, of a size that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = any(part in name for part in ("ln_", "norm"))
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise if is_norm and name.endswith("weight") else 0.3 * noise)
            else:
                parameter.copy_(noise if any(at in name for at in ("wte", "wpe", "embed")) else 0.4 * noise)
    return model


def booted(model: torch.nn.Module) -> TransformerBridge:
    """The bridge that TransformerLens makes of a model's folder.

    `plain` is the same network in plain torch, and `hugging_face[0]` the model itself.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float64)
    assert {parameter.dtype for parameter in bridge.parameters()} == {torch.float64}
    bridge.plain = plain_of_hugging_face(model) if model.config.model_type in PLAIN else None
    bridge.hugging_face = [model]  # in a list, so that it does not become a part
    return bridge.eval()


@functools.cache
def gpt2_like(seed: int = 0) -> TransformerBridge:
    """LayerNorm, GELU, learned positions; one matrix for queries, keys and values."""
    config = GPT2Config(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_inner=D_MLP,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return booted(scattered(GPT2LMHeadModel(config), seed))


@functools.cache
def neox_like(seed: int = 0) -> TransformerBridge:
    """Rotary positions on half of each head, and attention and MLP side by side."""
    config = GPTNeoXConfig(
        vocab_size=D_VOCAB,
        max_position_embeddings=N_CTX,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        intermediate_size=D_MLP,
        rotary_pct=0.5,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return booted(scattered(GPTNeoXForCausalLM(config), seed))


@functools.cache
def llama_like(seed: int = 0) -> TransformerBridge:
    """RMSNorm, gated MLPs, rotary positions, and two heads to each pair of keys and values."""
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        max_position_embeddings=N_CTX,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        intermediate_size=D_MLP,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return booted(scattered(LlamaForCausalLM(config), seed))


@functools.cache
def modern(name: str, seed: int = 0, **options) -> TransformerBridge:
    """Qwen 3, Gemma 2 or 3, OLMo 2 or Mistral: norms of queries and keys, norms after heads, windows, logit caps.

    Or Phi 3, whose prompts of more than four tokens turn all positions by other angles.
    """
    sizes = {
        "vocab_size": D_VOCAB,
        "max_position_embeddings": N_CTX,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": D_MLP,
        "head_dim": D_HEAD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    windows = {"sliding_window": 4, "query_pre_attn_scalar": 9, "layer_types": ["sliding_attention", "full_attention"]}
    rope = {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [3.0, 7.0]}
    own = {
        "Qwen3": ("Qwen3Config", {}),
        "Gemma2": ("Gemma2Config", windows),
        "Gemma3": ("Gemma3TextConfig", windows),
        "Olmo2": ("Olmo2Config", {}),
        "Mistral": ("MistralConfig", {"sliding_window": 4}),
        "Phi3": ("Phi3Config", {"original_max_position_embeddings": 4, "rope_scaling": rope, "sliding_window": None}),
    }
    config, extra = own[name]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes, **extra, **options))
    return booted(scattered(model, seed))


BOOTED = {"GPT-2": gpt2_like, "GPT-NeoX": neox_like, "Llama": llama_like}


def hooked_twin(bridge: TransformerBridge) -> HookedTransformer:
    """A HookedTransformer with a booted bridge's weights; all of it in float64, unlike Llama and rotary angles."""
    plain = bridge.plain
    first = plain.layers[0]
    config = {
        "parallel_attn_mlp": plain.parallel,
        "gated_mlp": "mlp.W_gate" in first,
        "n_key_value_heads": len(first["attn.W_K"]) if len(first["attn.W_K"]) < N_HEADS else None,
        "positional_embedding_type": "rotary" if plain.rotary_dim else "standard",
        "rotary_dim": plain.rotary_dim or None,
        "eps": plain.eps,
    }
    sizes = {"d_model": D_MODEL, "n_heads": N_HEADS, "d_head": D_HEAD, "d_mlp": D_MLP, "n_ctx": N_CTX}
    twin = hooked(plain.norm_type, plain.act, N_LAYERS, d_vocab=D_VOCAB, **sizes, **config)
    theirs = {f"blocks.{layer}.{name}": value for layer, w in enumerate(plain.layers) for name, value in w.items()}
    theirs |= plain.ends
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            value = theirs.pop(name.replace("._", "."), torch.zeros_like(parameter))
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
    assert not theirs, f"not copied: {sorted(theirs)}"
    return twin
