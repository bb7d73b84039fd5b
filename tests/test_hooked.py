"""A HookedTransformer beyond the two-layer model, whichever TransformerLens it is of: padding, long prompts, text."""

import tempfile

import pytest
import torch
from bridges_for_tests import D_VOCAB, word_tokenizer
from models_for_tests import OURS, close, hooked, perturbed, prompts
from transformers import AutoTokenizer

import hijack_lens as hl

TEXTS = ["one two three one two", "four"]


def with_words(padding_side=None, **options):
    """Random weights, and a tokenizer of words that brings no begin token of its own."""
    model = hooked("LN", "relu", d_vocab=D_VOCAB, **options).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer().save_pretrained(folder)
        model.set_tokenizer(AutoTokenizer.from_pretrained(folder), padding_side)
    model.cfg.default_prepend_bos = False
    return model


@pytest.mark.parametrize(
    "positions", [{}, {"positional_embedding_type": "rotary", "rotary_dim": 4}], ids=["", "rotary"]
)
@pytest.mark.parametrize("asked", ["at construction", "in the call"])
def test_a_text_padded_on_the_left_is_read_as_it_is_alone(asked, positions):
    model = with_words("left" if asked == "at construction" else "right", **positions)
    options = {} if asked == "at construction" else {"padding_side": "left"}
    together = model(TEXTS, **options)
    assert model.tokenizer.padding_side == ("left" if asked == "at construction" else "right")
    for row, text in enumerate(TEXTS):
        alone = model(text)[0]
        close(together[row, -len(alone) :], alone, atol=1e-9)


@pytest.mark.parametrize("cached", [True, False])
def test_texts_of_unequal_length_go_on_as_each_does_alone(cached):
    model = with_words("right")
    greedy = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    greedy |= {"use_past_kv_cache": cached, "return_type": "tokens"}
    together = model.generate(TEXTS, **greedy)
    for row, text in enumerate(TEXTS):
        assert together[row, -5:].tolist() == model.generate(text, **greedy)[0, -5:].tolist()


def test_masked_tokens_are_as_if_they_were_not_there():
    model, tokens = with_words(), prompts(1, 6, d_vocab=D_VOCAB)
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    close(model(tokens, attention_mask=mask)[:, 2:], model(tokens[:, 2:]), atol=1e-9)


def test_a_begin_token_is_prepended_once_if_asked_for():
    model = with_words()
    plain, begun = model.to_tokens("one two"), model.to_tokens("one two", prepend_bos=True)
    assert begun.tolist() == [[model.tokenizer.bos_token_id, *plain[0].tolist()]]
    assert model.to_single_token("two") == model.to_tokens("two").item()
    assert model.get_token_position("two", "one two two", mode="last") == 2


def test_rotary_angles_go_as_far_as_prompts_do():
    language = hl.BigramLanguage.dirichlet(5, seed=0)
    model = hl.trainable_transformer(language, "rotary", d_model=8, n_ctx=3000, dtype=torch.float64)
    long = prompts(1, 2500, d_vocab=5)
    with torch.no_grad():
        logits = model(long)
        cache = model.run_with_cache(long)[1]
    # By hand: what turns the last query's score on a key depends on how far apart they are, and on nothing else.
    attn = model.blocks[0].attn
    q, k = (cache[f"blocks.0.attn.hook_{name}"][0, :, 0] for name in "qk")
    half = torch.arange(attn.cfg.rotary_dim // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), 2300 / 10000 ** (half / len(half)))
    as_complex = [torch.complex(*x.chunk(2)) for x in (q[-1], k[2499 - 2300])]
    expected = (as_complex[0] * turn * as_complex[1].conj()).real.sum() / attn.attn_scale
    scores = cache["blocks.0.attn.hook_attn_scores"][0, 0, -1]
    assert float(scores[2499 - 2300]) == pytest.approx(float(expected), abs=1e-9)
    assert logits.shape == (1, 2500, 5)


def test_a_prompt_without_a_batch_axis_is_cached_like_one_with():
    model, tokens = perturbed(), prompts(1, 6)
    for squeezed in (False, True):
        ours = model.run_with_cache(tokens[0], remove_batch_dim=squeezed)[1]
        theirs = model.run_with_cache(tokens, remove_batch_dim=squeezed)[1]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


REFUSED = {
    "attention_mask must have the tokens' shape": lambda m, t: m(t, attention_mask=torch.ones(1, 6).int()),
    "eos_token_id must be given with stop_at_eos": lambda m, t: m.generate(t, 1, verbose=False),
    "input must be token ids, since the model has no tokenizer": lambda m, t: m("one"),
    "return_type must be": lambda m, t: m(t, return_type="probabilities"),
    "return_type must be 'input'": lambda m, t: m.generate(t, 1, return_type="embeds"),
    "layer must be from 0 to 1, got 2": lambda m, t: m.accumulated_bias(2, mlp_input=True),
    "mode must be 'Q', 'K' or 'V'": lambda m, t: m.all_composition_scores("O"),
    "never fires unless cfg.use_attn_result": lambda m, t: m.add_hook("blocks.0.attn.hook_result", lambda x, hook: x),
    "tokens must be given for a loss": lambda m, t: m(m(t, stop_at_layer=1), return_type="loss", start_at_layer=1),
    "past_kv_cache must be of 2 prompts, got one of 3": lambda m, t: m.get_pos_offset(of_three(m), 2),
}


def of_three(model):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)


@pytest.mark.skipif(not OURS, reason="TransformerLens has a HookedTransformer of its own, with checks of its own")
@pytest.mark.parametrize("message", REFUSED)
def test_ours_refuses_what_makes_no_sense(message, unchecked):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](hooked("LN", "relu"), prompts(2, 6))


@pytest.mark.skipif(not OURS, reason="TransformerLens has a HookedTransformer of its own")
@pytest.mark.parametrize(
    "options",
    [{"n_key_value_heads": 1}, {"gated_mlp": True}, {"num_experts": 2}, {"normalization_type": "LNPre"}],
    ids=str,
)
def test_ours_is_no_kind_that_it_cannot_be(options):
    from hijack_lens.hooked import HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 4, "n_ctx": 4, "d_head": 2, "d_vocab": 3}
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
        HookedTransformerConfig(**sizes, **options)
