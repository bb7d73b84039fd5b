"""Attention patterns, logits and margins, from counts and strengths."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from hijack_lens.core.checks import check_tokens, check_type, shown
from hijack_lens.core.circuit import Margin
from hijack_lens.language import BigramLanguage, HijackPrompt, Token
from hijack_lens.theory.setting import Setting
from hijack_lens.theory.tables import Tables, Written


def attention(
    prompt: Any, language: BigramLanguage, setting: Setting | Tables = Setting()
) -> tuple[Float[Tensor, "*batch query key"], Float[Tensor, "*batch query key"]]:
    """Attention patterns of the previous-token head and of the induction head, in float64.

    Args:
        prompt: token ids [pos] or [batch, pos], or a `HijackPrompt`.
        language: the language whose vocabulary the tokens are from.
        setting: the model's setting; or its tables, which say the same of a trained model token by token.

    Raises:
        TypeError, ValueError: for tokens and triggers outside the vocabulary, and if `setting` is neither a `Setting`
            nor `Tables` of the language's tokens.

    Examples:
        >>> previous_token, induction = hl.theory.attention(prompt, language)
        >>> induction[-1].topk(3).values, induction.shape
        (tensor([0.3276, 0.3276, 0.3276], dtype=torch.float64), torch.Size([24, 24]))
    """
    check_type("language", language, BigramLanguage)
    check_setting(setting, language)
    tokens = _tokens(prompt, language)
    if isinstance(setting, Tables):
        return setting.attention(tokens)
    leak = math.exp(-setting.strengths.previous_token)
    pos = torch.arange(1, tokens.shape[-1] + 1, dtype=torch.float64, device=tokens.device)
    causal = pos[:, None] >= pos

    previous = (pos[:, None] - 1 == pos).double()
    # Position 1 has nothing before it and attends to itself.
    focused = torch.where(pos[:, None] > 1, previous + leak * (1 - previous), 1.0) * causal
    blurred = causal.double()
    previous_token = torch.where((pos <= (setting.n_ctx_train or math.inf))[:, None], focused, blurred)
    previous_token = previous_token / previous_token.sum(-1, keepdim=True)

    same = (tokens[..., :, None] == tokens[..., None, :]).double()  # [query, key]
    before = same.roll(1, -1)  # wraps around at position 1, which `pos` sets apart
    memory = previous_token_memory(same.cumsum(-1), before, pos, setting)
    is_trigger = torch.zeros(language.d_vocab, dtype=torch.bool, device=tokens.device)
    is_trigger[language.trigger_ids(setting.triggers).to(tokens.device)] = True
    scores = setting.strengths.match * (is_trigger[tokens][..., None] * memory)
    induction = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return previous_token.expand_as(induction), induction


def logits(
    prompt: Any, language: BigramLanguage, setting: Setting | Tables = Setting()
) -> Float[Tensor, "*batch pos d_vocab"]:
    """Next-token logits at every position, in float64. Arguments and errors are those of `attention`.

    Raises:
        ValueError: also if `language` has bigrams of probability 0, unless tables say what the weights hold.

    Examples:
        >>> logits = hl.theory.logits(prompt, language)
        >>> logits.shape, language.tokens[logits[-1].argmax()]
        (torch.Size([24, 18]), 'e')
    """
    return _written(prompt, language, setting).total


def margin(
    prompt: HijackPrompt | Tensor,
    language: BigramLanguage,
    setting: Setting | Tables = Setting(),
    *,
    in_context: Token | None = None,
    global_candidate: Token | None = None,
) -> Margin:
    """The hijack margin at the last position, `logit[in_context] - logit[global_candidate]`, split by memory.

    Args:
        prompt: a `HijackPrompt`, which brings its two candidates, or tokens.
        language: the language of the vocabulary and of the weights' bigrams.
        setting: the model's setting, or its tables.
        in_context: what the context says. Required if `prompt` is tokens.
        global_candidate: what the weights say. Required if `prompt` is tokens.

    Raises:
        TypeError: if `prompt` is tokens and a candidate is missing.

    Examples:
        >>> print(hl.theory.margin(prompt, language))
        Margin(context=+9.8538, weights=-6.5806, rest=+0.0000, total=+3.2732)
    """
    check_type("language", language, BigramLanguage)
    if isinstance(prompt, HijackPrompt):
        in_context = prompt.in_context if in_context is None else in_context
        global_candidate = prompt.global_candidate if global_candidate is None else global_candidate
    if in_context is None or global_candidate is None:
        raise TypeError("margin needs in_context= and global_candidate= where prompt is not a HijackPrompt")
    a, b = language.index(in_context, "in_context"), language.index(global_candidate, "global_candidate")
    everywhere = _written(prompt, language, setting, last=True).margin(a, b)
    return Margin(everywhere.context[..., -1], everywhere.weights[..., -1], everywhere.rest[..., -1])


def check_setting(setting: Any, language: BigramLanguage | None = None) -> None:
    """`setting` is a model's setting, or tables: of the language's tokens, if there is one."""
    if not isinstance(setting, (Setting, Tables)):
        raise TypeError(f"setting must be a Setting or Tables, got {shown(setting)}")
    if isinstance(setting, Tables) and language is not None and setting.d_vocab != language.d_vocab:
        raise ValueError(
            f"setting must be tables of the language's {language.d_vocab} tokens, got those of {setting.d_vocab}"
        )


def previous_token_memory(
    count: Float[Tensor, "*batch pos"],
    before: Float[Tensor, "*#batch pos"],
    pos: Float[Tensor, "*#batch pos"],
    setting: Setting,
) -> Float[Tensor, "*batch pos"]:
    """m_s(q), how strongly position s remembers q as the token before it.

    Args:
        count: occurrences of q up to and including s.
        before: 1 where q stands at s-1, else 0.
        pos: s, counted from 1.
        setting: the model's setting.
    """
    leak = math.exp(-setting.strengths.previous_token)
    focused = (leak * count + (1 - leak) * before) / (1 + leak * (pos - 1))
    return torch.where((pos > 1) & (pos <= (setting.n_ctx_train or math.inf)), focused, count / pos)


def _tokens(prompt: Any, language: BigramLanguage) -> Int[Tensor, "*batch pos"]:
    return check_tokens("prompt", prompt.tokens if isinstance(prompt, HijackPrompt) else prompt, language.d_vocab)


def _written(prompt: Any, language: BigramLanguage, setting: Setting | Tables, last: bool = False) -> Written:
    """What each memory adds to every logit; `last` says that those at the last position are enough."""
    check_type("language", language, BigramLanguage)
    if isinstance(setting, Tables):
        check_setting(setting, language)
        return setting.written(_tokens(prompt, language), last)
    log_pi_b = language.finite_log_pi_b()
    _, induction = attention(prompt, language, setting)
    tokens = _tokens(prompt, language)
    context = setting.strengths.copy * (induction @ one_hot(tokens, language.d_vocab).double())
    weights = setting.strengths.bigram * log_pi_b.to(tokens.device)[tokens]
    if not (context + weights).isfinite().all():
        raise ValueError(f"strengths must be numbers whose logits float64 can hold, got {setting.strengths}")
    return Written(context, weights, torch.zeros_like(context))
