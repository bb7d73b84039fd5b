"""A Hugging Face tokenizer for a bigram language, so that TransformerLens takes strings."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hijack_lens.language import UNKNOWN, BigramLanguage

END = "<|endoftext|>"


def hf_tokenizer(language: BigramLanguage) -> PreTrainedTokenizerFast:
    """A tokenizer with the language's token ids.

    TransformerLens wants an end-of-text and a padding token; they get the id d_vocab, just outside the
    vocabulary, so that no real token is ever taken for one of them.
    """
    vocabulary = {token: index for index, token in enumerate(language.tokens)}
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in vocabulary else {}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, **unknown))
    if language.level == "char":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        # Without a decoder, tokens are joined by spaces.
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        **unknown,
    )
