"""Text that a HookedTransformer continues."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.utilities.logits_utils import sample_logits

from hijack_lens.hooked.text import TextAndTokens


class Generation(TextAndTokens):
    """`generate`, with TransformerLens's arguments."""

    @torch.no_grad()
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"] = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
    ) -> Any:
        """Prompts, continued token by token.

        Args:
            input: a text, texts, or token ids.
            max_new_tokens: how many tokens to add.
            stop_at_eos: whether to stop where all prompts have ended; one that ends sooner is filled up.
            eos_token_id: the id, or ids, that end a text; by default the tokenizer's.
            do_sample: whether to draw from the model's distribution, or take the likeliest token.
            top_k: how many of the likeliest tokens to draw from.
            top_p: how much of the probability to draw from.
            temperature: divides the logits before drawing.
            freq_penalty: how much a token's logit falls with each time it was said.
            use_past_kv_cache: whether to keep keys and values instead of computing them again.
            prepend_bos: as in `to_tokens`.
            padding_side: as in `to_tokens`.
            return_type: "str", "tokens", or "input" for what came in.
            verbose: whether to show a progress bar.

        Returns:
            The prompts with what was added: a text, a list of texts, or ids, [batch, pos].

        Hooks fire at every step, those on `hook_embed` too.

        Raises:
            ValueError: for another return type, or if there is no tokenizer to say what ends a text.
        """
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type must be 'input', 'str' or 'tokens', got {return_type!r}")
        as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
        ends = getattr(self.tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        if stop_at_eos and ends is None:
            raise ValueError("eos_token_id must be given with stop_at_eos, since no tokenizer says what ends a text")
        side = "left" if isinstance(input, list) else padding_side  # what is said last must stand last
        tokens = self.as_tokens(input, prepend_bos, side)
        mask = self.padding_mask(tokens, prepend_bos, side)
        stops = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()), device=tokens.device)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        cache = (
            TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens))
            if use_past_kv_cache
            else None
        )
        new = tokens
        for _ in tqdm(range(max_new_tokens), disable=not verbose):
            seen = new if cache else tokens
            logits = self(seen, attention_mask=mask[:, -seen.shape[1] :], past_kv_cache=cache)[:, -1]
            if do_sample:
                drawn = sample_logits(logits, top_k, top_p, temperature, freq_penalty, tokens=tokens)
            else:
                drawn = logits.argmax(-1)
            if stop_at_eos:
                drawn = torch.where(finished, stops[0], drawn)
                finished |= torch.isin(drawn, stops)
            new = drawn[:, None]
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            if stop_at_eos and bool(finished.all()):
                break
        if not as_text:
            return tokens
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return texts[0] if len(texts) == 1 else texts
