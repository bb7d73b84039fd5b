"""The two-layer model as a HookedTransformer, and a Hugging Face tokenizer for its bigram language."""

import inspect
import os
import tempfile
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hijack_lens.core.checks import check_device, check_dtype, check_path, check_tokens, check_type, shown
from hijack_lens.core.circuit import Strengths
from hijack_lens.hooked import HookedTransformer, HookedTransformerConfig
from hijack_lens.language import UNKNOWN, BigramLanguage, Token
from hijack_lens.models.architecture import Architecture, RelativeAttention
from hijack_lens.models.formed import Formed
from hijack_lens.models.storage import find_model, read_model, write_model

END = "<|endoftext|>"


def hf_tokenizer(language: BigramLanguage) -> PreTrainedTokenizerFast:
    """A tokenizer with the language's token ids.

    TransformerLens wants an end-of-text and a padding token. Both get the id d_vocab, just outside the
    vocabulary, so that no real token is taken for one of them.
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
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False, **unknown
    )


class BigramTransformer(HookedTransformer):
    """A HookedTransformer (of two layers, unless asked otherwise) over the vocabulary of a bigram language.

    All of TransformerLens works on it. In addition, it refuses text that the language cannot encode, and prompts
    longer than `n_ctx`, which TransformerLens would truncate.

    Weights are uninitialised: build it with `associative_transformer` or `trainable_transformer`.

    Attributes:
        architecture: its shape.
        language: its vocabulary, and the bigrams it was written or trained for.
        circuit: the components that carry the two memories.
        strengths: its memories' strengths, for a model written by hand; else `None`.
        triggers: token ids that its induction head was written or trained to match, if known.
        n_ctx_train: with absolute positions, the last position whose predecessor it knows, if known.
        formed: for a model that was trained, whether both memories formed.

    Examples:
        >>> model.positions, model.strengths.match
        ('relative', 6.0)
        >>> model.save_pretrained("model")
        >>> again = hl.BigramTransformer.from_pretrained("model")
        >>> bool((again(prompt.tokens) == model(prompt.tokens)).all())
        True
    """

    @torch.inference_mode(False)  # under which it could never be trained
    def __init__(
        self,
        architecture: Architecture,
        language: BigramLanguage,
        *,
        strengths: Strengths | None = None,
        triggers: list[Token] | None = None,
        n_ctx_train: int | None = None,
        formed: Formed | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ):
        if not isinstance(language, BigramLanguage):
            raise TypeError(f"language must be a BigramLanguage, got {type(language).__name__}")
        check_type("architecture", architecture, Architecture)
        check_dtype("dtype", dtype)
        check_device("device", device)
        architecture.check_memory(language.d_vocab, dtype.itemsize)
        cfg = HookedTransformerConfig(
            n_layers=architecture.n_layers,
            d_model=architecture.d_model,
            n_heads=architecture.n_heads,
            d_head=architecture.d_head,
            d_mlp=architecture.d_mlp,
            attn_only=architecture.mlp is None,
            act_fn="relu",
            normalization_type=architecture.norm,
            n_ctx=architecture.n_ctx,
            d_vocab=language.d_vocab,
            positional_embedding_type="rotary" if architecture.positions == "rotary" else "standard",
            rotary_dim=architecture.d_head if architecture.positions == "rotary" else None,
            use_attn_scale=architecture.scale_attention,
            default_prepend_bos=False,
            init_weights=False,
            dtype=dtype,
            device=None if device is None else str(torch.device(device)),
        )
        with warnings.catch_warnings():
            # TransformerLens 3.9 says so of every model; a user cannot act on it.
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            super().__init__(cfg, tokenizer=hf_tokenizer(language), default_padding_side="right")
        self.architecture = architecture
        self.language = language
        self.circuit = architecture.circuit
        self.strengths = strengths
        self.triggers = triggers
        self.n_ctx_train = n_ctx_train
        self.formed = formed
        if architecture.positions == "relative":
            self.blocks[0].attn = RelativeAttention(self.cfg, architecture.n_offsets, layer_id=0).to(self.cfg.device)
            self.setup()  # without it the new attention's hook points never fire
        for block in self.blocks:
            block.attn.attn_scale = float(block.attn.attn_scale)  # NumPy's own type, which torch.compile stumbles over
        if architecture.mlp == "linear":
            self.blocks[-1].mlp.act_fn = nn.Identity()
        self.eval()  # it has nothing to switch off

    @property
    def positions(self) -> Literal["relative", "absolute", "rotary", "none"]:
        """How positions enter the model."""
        return self.architecture.positions

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` and `config.json` into a folder, each whole or not at all."""
        write_model(self, check_path("folder", folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, revision: str | None = None, device: str | torch.device | None = None
    ) -> "BigramTransformer":
        """Reads a model that `save_pretrained` wrote.

        Args:
            folder: the model's folder, or a training run's, which stands for its latest checkpoint. Any other name
                is looked up on the Hugging Face Hub.
            revision: which revision, for a model on the Hub.
            device: by default TransformerLens's choice.

        Raises:
            ValueError: for files that are truncated or hold something else. Nothing in them is ever executed.
        """
        return read_model(cls, find_model(folder, revision), device)

    def push_to_hub(self, repo_id: str, **upload: Any) -> str:
        """Uploads the model to the Hugging Face Hub; `upload` goes to huggingface_hub's `upload_folder`."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: Any = None,
        padding_side: Any = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """TransformerLens's `to_tokens`; it refuses text that would be truncated, padded or given a begin token.

        Raises:
            ValueError: for text outside the vocabulary, longer than `n_ctx`, or of several lengths.
        """
        if prepend_bos is True:
            raise ValueError("prepend_bos must not be True: the language has no token that begins a text")
        rows = [self.language.encode(text) for text in ([input] if isinstance(input, str) else input)]
        lengths = sorted({len(row) for row in rows})
        if not lengths or lengths[0] == 0:
            raise ValueError(f"input must hold at least one token, got {shown(input)}")
        if len(lengths) > 1:
            raise ValueError(f"input texts must be equally long, got {lengths} tokens: the vocabulary has no padding")
        self._check_length(lengths[0])
        tokens = torch.stack(rows)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def input_to_embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The first residual stream. Refuses token ids outside the vocabulary; PyTorch would accept -1."""
        if isinstance(input, Tensor):
            check_tokens("input", input, self.cfg.d_vocab, self.cfg.n_ctx)
        return super().input_to_embed(input, *args, **kwargs)

    def get_residual(self, embed: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The residual stream of embeddings. Refuses to go beyond `n_ctx`, also while generating."""
        given = inspect.signature(super().get_residual).bind(embed, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        # With a key-value cache, only the mask is sure to cover what came before.
        self._check_length((embed if mask is None else mask).shape[1])
        return super().get_residual(embed, *args, **kwargs)

    def _check_length(self, length: int) -> None:
        if length > self.cfg.n_ctx:
            raise ValueError(f"input is {length} tokens long; the model takes at most n_ctx={self.cfg.n_ctx}")
