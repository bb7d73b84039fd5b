"""Hugging Face models to be booted from disk. One has its memories written by hand: the associative-memory transformer
behind LayerNorms.

Every vector x of that transformer stands as (x, -x) there, whose mean is 0, beside two coordinates +C and -C that every
position holds, so large that a LayerNorm's scale is the same everywhere; its weight undoes that scale.
"""

import torch
from bridges_for_tests import scattered
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hijack_lens as hl

WORDS = ["<end>", "France", "Spain", "Norway", "Paris", "Rome", "Oslo", "is", "of", "we", "say", "."]
STRENGTHS = hl.Strengths(previous_token=25.0, match=3.0, copy=6.0, bigram=1.0)
_LARGE = 1e4


def words_language():
    """After "is", the weights say Paris; other words are followed by anything."""
    pi_b = hl.BigramLanguage.dirichlet(len(WORDS), seed=4).floored(0.01).pi_b.clone()
    said = {"Paris": 0.8, "Rome": 0.05, "Oslo": 0.01}
    row = torch.full((len(WORDS),), (1 - sum(said.values())) / (len(WORDS) - len(said)), dtype=torch.float64)
    row[[WORDS.index(word) for word in said]] = torch.tensor(list(said.values()), dtype=torch.float64)
    pi_b[WORDS.index("is")] = row
    return hl.BigramLanguage(pi_b, tokens=WORDS, level="word")


def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )


def save_handmade(folder, n_ctx=64):
    """Writes the model and its tokenizer; returns the associative-memory transformer that it computes."""
    model = hl.associative_transformer(
        words_language(), positions="absolute", strengths=STRENGTHS, n_ctx=n_ctx, dtype=torch.float64, device="cpu"
    )
    size, n_mlp = 2 * model.cfg.d_model + 2, model.cfg.d_mlp

    def written(x):
        return torch.cat([x, -x, torch.zeros(*x.shape[:-1], 2, dtype=x.dtype)], -1)

    def read(weight):
        return torch.cat([weight / 2, -weight / 2, torch.zeros(2, *weight.shape[1:], dtype=weight.dtype)])

    def square(weight):
        return torch.nn.functional.pad(weight, (0, size - weight.shape[1], 0, size - weight.shape[0]))

    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=n_ctx,
        n_embd=size,
        n_layer=2,
        n_head=1,
        n_inner=n_mlp,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    twin = GPT2LMHeadModel(config).double()
    state = {name: torch.zeros_like(value) for name, value in twin.state_dict().items()}
    state["transformer.wte.weight"] = written(model.W_E)
    state["transformer.wpe.weight"] = written(model.W_pos)
    state["transformer.wpe.weight"][:, -2:] = torch.tensor([_LARGE, -_LARGE])
    state["lm_head.weight"] = read(model.W_U).T
    for name in [name for name in state if ".ln_" in name and name.endswith("weight")]:
        state[name] += _LARGE * (2 / size) ** 0.5
    for layer, block in enumerate(model.blocks):
        at, attn = f"transformer.h.{layer}", block.attn
        queries = square(read(attn.W_Q[0])) * size**0.5  # GPT-2 divides scores by that
        state[f"{at}.attn.c_attn.weight"] = torch.cat([queries, *(square(read(w[0])) for w in (attn.W_K, attn.W_V))], 1)
        state[f"{at}.attn.c_proj.weight"] = square(written(attn.W_O[0]))
        state[f"{at}.mlp.c_fc.weight"] = read(block.mlp.W_in)
        state[f"{at}.mlp.c_proj.weight"] = written(block.mlp.W_out)
    twin.load_state_dict(state)
    twin.float().save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return model


def save_with_bpe(folder, n_layers=3):
    """Writes a random GPT-2 whose tokens bring their own spaces and cut rare words."""
    text = ["France's capital is Paris. Spain's capital is Madrid. Italy's capital is Rome, and Rome is old."] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=340, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<end>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=96,
        n_embd=16,
        n_layer=n_layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    scattered(GPT2LMHeadModel(config)).save_pretrained(folder)
    fast.save_pretrained(folder)
