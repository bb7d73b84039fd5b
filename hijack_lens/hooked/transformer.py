"""A HookedTransformer, where TransformerLens has none (4.x): its names, hook points and results, for small models."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.devices import move_to_and_update_config
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformer_lens.utilities.tensors import repeat_along_head_dimension

from hijack_lens.core.hook_points import NEEDS_FLAG
from hijack_lens.hooked.attention import Attention
from hijack_lens.hooked.config import HookedTransformerConfig
from hijack_lens.hooked.generation import Generation
from hijack_lens.hooked.parts import MLP, Embed, LayerNorm, PosEmbed, RMSNorm, Unembed

Stream = Float[Tensor, "batch pos d_model"]

_NORMS: dict[str | None, type[nn.Module]] = {"LN": LayerNorm, "RMS": RMSNorm}


class Output(NamedTuple):
    """What a run with `return_type="both"` returns."""

    logits: Float[Tensor, "batch pos d_vocab_out"]
    loss: Float[Tensor, "..."]


class TransformerBlock(nn.Module):
    """Attention and an MLP, each reading the residual stream through a norm, and adding to it.

    Args:
        cfg: the model's configuration.
        block_index: its layer.
    """

    hook_out_is_single_residual_stream = True
    """TransformerLens 4's `logit_lens` asks for it."""

    def __init__(self, cfg: HookedTransformerConfig, block_index: int):
        super().__init__()
        self.cfg = cfg

        def norm() -> nn.Module:
            return nn.Identity() if cfg.normalization_type is None else _NORMS[cfg.normalization_type](cfg)

        self.ln1 = norm()
        if not cfg.attn_only:
            self.ln2 = norm()
        self.attn = Attention(cfg, "global", block_index)
        if not cfg.attn_only:
            self.mlp = MLP(cfg)
        self.hook_attn_in = HookPoint()
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_pre = HookPoint()
        if not cfg.attn_only:
            self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid_pre: Stream,
        past_kv_cache_entry: TransformerLensKeyValueCacheEntry | None = None,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
    ) -> Stream:
        """The residual stream after the block."""
        cfg, resid_pre = self.cfg, self.hook_resid_pre(resid_pre)

        def copies() -> Float[Tensor, "batch pos head_index d_model"]:
            return repeat_along_head_dimension(resid_pre, n_heads=cfg.n_heads)

        if cfg.use_split_qkv_input:
            reads = [hook(copies()) for hook in (self.hook_q_input, self.hook_k_input, self.hook_v_input)]
        else:
            reads = [self.hook_attn_in(copies()) if cfg.use_attn_in else resid_pre] * 3
        attn_out = self.attn(
            *(self.ln1(read) for read in reads), past_kv_cache_entry=past_kv_cache_entry, attention_mask=attention_mask
        )
        attended = resid_pre + self.hook_attn_out(attn_out)
        if cfg.attn_only:
            return self.hook_resid_post(attended)
        resid_mid = self.hook_resid_mid(attended)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if cfg.use_hook_mlp_in else resid_mid
        return self.hook_resid_post(resid_mid + self.hook_mlp_out(self.mlp(self.ln2(mlp_in))))


class HookedTransformer(Generation):
    """A transformer with a hook point at every activation, on TransformerLens's `HookedRootModule`.

    It has the parameter names, hook points and methods of the class of this name in TransformerLens 3.9, as far as
    small models of attention and plain MLPs need them: there is no folding of norms and no loading by name, and text is
    not streamed. Weights are uninitialised.

    Args:
        cfg: its configuration.
        tokenizer: from transformers, if it is to read text.
        move_to_device: whether the weights go to `cfg.device`.
        default_padding_side: "left" or "right", if the tokenizer does not say.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
    ):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer, default_padding_side)
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        if cfg.positional_embedding_type != "rotary":
            self.pos_embed = PosEmbed(cfg)
            self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(TransformerBlock(cfg, layer) for layer in range(cfg.n_layers))
        if cfg.normalization_type is not None:
            self.ln_final = _NORMS[cfg.normalization_type](cfg)
        self.unembed = Unembed(cfg)
        if move_to_device:
            nn.Module.to(self, cfg.device)
        self.setup()
        self.eval()  # it has nothing to switch off, and TransformerLens 4 patches nothing that is training

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] | Int[Tensor, "pos"] | Stream,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: None = None,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> Any:
        """Runs the model.

        Args:
            input: a text, texts, token ids, or, with `start_at_layer`, the residual stream there.
            return_type: "logits"; "loss", the next token's cross-entropy in nats; "both"; or `None` for nothing.
            loss_per_token: whether the loss is [batch, pos - 1], or its mean.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            start_at_layer: the first block to run; negative ones count from the end.
            tokens: with `start_at_layer`, the token ids that the loss is of.
            shortformer_pos_embed: TransformerLens's place for positions of a kind that there is none of here.
            attention_mask: 0 where a token is to be ignored.
            stop_at_layer: the first block not to run; the residual stream there is returned.
            past_kv_cache: keys and values of what came before, to which those of this run are added.

        Raises:
            ValueError: for another return type, or a loss without tokens.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}")
        if start_at_layer is None:
            residual, tokens, _, attention_mask = self.input_to_embed(
                input, prepend_bos, padding_side, attention_mask, past_kv_cache
            )
        elif isinstance(input, Tensor):
            residual = input
        else:
            raise TypeError(f"input must be a residual stream with start_at_layer, got {type(input).__name__}")
        for layer in range(self.cfg.n_layers)[start_at_layer:stop_at_layer]:
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            residual = self.blocks[layer](residual, past_kv_cache_entry=entry, attention_mask=attention_mask)
        if stop_at_layer is not None:
            return residual
        if self.cfg.normalization_type is not None:
            residual = self.ln_final(residual)
        if return_type is None:
            return None
        logits = self.unembed(residual)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("tokens must be given for a loss with start_at_layer")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab_out"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, "..."]:
        """The next token's cross-entropy in nats."""
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> tuple[Stream, Int[Tensor, "batch pos"], None, Int[Tensor, "batch key_pos"] | None]:
        """The first residual stream, the token ids, TransformerLens's place for another kind of positions, the mask."""
        tokens = self.as_tokens(input, prepend_bos, padding_side)
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape:
                expected, given = tuple(tokens.shape), tuple(attention_mask.shape)
                raise ValueError(f"attention_mask must have the tokens' shape {expected}, got {given}")
            attention_mask = attention_mask.to(tokens.device)
        elif past_kv_cache is not None or "left" in (padding_side, getattr(self.tokenizer, "padding_side", None)):
            # Only padding on the right can be left where it is: what comes before it never sees it.
            attention_mask = self.padding_mask(tokens, prepend_bos, padding_side)
        pos_offset = self.get_pos_offset(past_kv_cache, len(tokens))
        if past_kv_cache is not None:
            attention_mask = past_kv_cache.append_attention_mask(attention_mask)
        embed = self.hook_embed(self.embed(tokens))
        residual, _ = self.get_residual(embed, pos_offset, prepend_bos, attention_mask, tokens)
        return residual, tokens, None, attention_mask

    def get_pos_offset(self, past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int) -> int:
        """How many tokens the key-value cache holds."""
        if past_kv_cache is None:
            return 0
        past = past_kv_cache[0].past_keys
        if len(past) != batch_size:
            raise ValueError(f"past_kv_cache must be of {batch_size} prompts, got one of {len(past)}")
        return past.shape[1]

    def get_residual(
        self,
        embed: Stream,
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Int[Tensor, "batch key_pos"] | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        return_shortformer_pos_embed: bool = True,
    ) -> Any:
        """The residual stream of embeddings, with positions; alone, or beside TransformerLens's place for others."""
        residual = embed
        if self.cfg.positional_embedding_type == "standard":
            places = embed[..., 0] if tokens is None else tokens
            residual = embed + self.hook_pos_embed(self.pos_embed(places, pos_offset, attention_mask))
        return (residual, None) if return_shortformer_pos_embed else residual

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """What a run returns, and its activations."""
        if model_args and isinstance(model_args[0], Tensor) and model_args[0].ndim == 1:
            model_args = (model_args[0][None], *model_args[1:])  # else its length is taken for a batch
        out, stored = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        cache = ActivationCache(stored, self, has_batch_dim=not remove_batch_dim) if return_cache_object else stored
        return out, cache

    def check_hooks_to_add(
        self, hook_point: HookPoint, hook_point_name: str, hook: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Refuses a hook where nothing would fire it."""
        flag = NEEDS_FLAG.get(hook_point_name.rsplit(".", 1)[-1])
        if flag is not None and not getattr(self.cfg, flag):
            raise ValueError(f"hook_point_name {hook_point_name!r} never fires unless cfg.{flag} is set")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether each head's output passes through `hook_result`."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether each head's inputs pass through `hook_q_input`, `hook_k_input` and `hook_v_input`."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether each head's input passes through `hook_attn_in`."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether each MLP's input passes through `hook_mlp_in`."""
        if self.cfg.attn_only:
            raise ValueError("use_hook_mlp_in is for models with MLPs, and this one has none")
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def to(self, device_or_dtype: torch.device | str | torch.dtype, print_details: bool = True) -> "HookedTransformer":
        """Moves the model, or changes its dtype, and says so in `cfg`."""
        return move_to_and_update_config(self, device_or_dtype, print_details)

    def cuda(self, device: int | torch.device | None = None) -> "HookedTransformer":
        """Moves the model to a GPU."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def mps(self) -> "HookedTransformer":
        """Moves the model to Apple's GPU."""
        return self.to("mps")

    def cpu(self) -> "HookedTransformer":
        """Moves the model to the CPU."""
        return self.to(torch.device("cpu"))
