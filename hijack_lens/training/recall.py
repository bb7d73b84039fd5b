"""What a two-layer model has memorised, read off its weights, its attention and its predictions.

The memory recalls are those of Bietti et al. 2023 (arXiv 2306.00802, section 4). The directions are W_E(v), the
previous-token head's output Phi(v), and the unembedding; each associative memory should map its key to its value.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.analysis import analysis
from hijack_lens.core.checks import check_count, check_type
from hijack_lens.core.circuit import Component
from hijack_lens.core.hook_points import check_unhooked
from hijack_lens.core.tables import widened
from hijack_lens.hooks.intervention import record
from hijack_lens.language import SampledSequences, Token
from hijack_lens.models.architecture import RelativeAttention
from hijack_lens.models.linear_maps import LinearNorm, linear_norm
from hijack_lens.models.readable import check_readable
from hijack_lens.models.transformer import BigramTransformer

Scores = dict[str, float]


@analysis
def memory_recall(model: BigramTransformer, length: int, triggers: Sequence[Token] | None = None) -> Scores:
    """How well each associative memory recalls: the fraction of keys whose right value scores highest, and by how much.

    Norms act through their weights only. If a role has several heads, the best one counts.

    Args:
        model: a model with a circuit.
        length: how many positions the previous-token memory is tested on.
        triggers: keys of the match memory; by default every token.

    Returns:
        "previous_token_recall", "match_recall" and "copy_recall", fractions in [0, 1], each with its "..._margin",
        the mean of (right score - best other) in units of attention score or logit; and "bigram_kl", the mean KL
        divergence in nats of the token's own prediction (no attention) from pi_b, over tokens other than `triggers`.
        NaN if the model lacks the memory: no head in that role, or no positions.

    Examples:
        >>> found = hl.training.memory_recall(model, length=32)
        >>> found["previous_token_recall"], found["match_recall"], found["copy_recall"]
        (1.0, 1.0, 1.0)
    """
    check_type("model", model, BigramTransformer)
    check_weights_alone(model)
    length = check_count("length", length, minimum=2)
    if model.positions == "absolute" and length > model.cfg.n_ctx:
        raise ValueError(f"length must be at most the model's n_ctx={model.cfg.n_ctx}, got {length}")
    scores: Scores = {}
    previous = [previous_token_scores(model, head, length) for head in model.circuit.previous_token]
    scores |= _best("previous_token", [table for table in previous if table is not None])
    chosen = model.language.trigger_ids(triggers)
    match = [match_scores(model, head)[chosen.to(model.W_E.device)] for head in model.circuit.induction]
    scores |= _best("match", [(table, chosen.to(table.device)) for table in match if model.circuit.previous_token])
    everything = torch.arange(model.cfg.d_vocab, device=model.W_E.device)
    scores |= _best("copy", [(copy_scores(model, head), everything) for head in model.circuit.induction])
    log_pi_b = model.language.pi_b.clamp_min(1e-12).log().to(model.W_E)
    predicted = context_free_logits(model).log_softmax(-1)
    kl = (log_pi_b.exp() * (log_pi_b - predicted)).sum(-1)
    weight = model.language.long_run.to(kl).clone()
    if triggers is not None:
        weight[chosen.to(weight.device)] = 0.0
    scores["bigram_kl"] = float((weight * kl).sum() / weight.sum())
    return scores


def check_weights_alone(model: BigramTransformer) -> None:
    """Checks that the weights tell all that the model computes: for what is read off them without a run."""
    check_unhooked(model)
    for layer, block in enumerate(model.blocks):
        check_readable(model, layer, "attn.W_O", *(["mlp.W_out"] if hasattr(block, "mlp") else []))


def match_scores(model: BigramTransformer, head: Component) -> Float[Tensor, "query_token key_token"]:
    """The head's attention score from token k to a position that remembers k', through all previous-token heads."""
    attn = model.blocks[head.layer].attn
    norm = _norm_weights(model.blocks[head.layer].ln1)
    queries = norm.linear(model.W_E) @ attn.W_Q[head.head] + attn.b_Q[head.head]
    remembered = sum(
        (
            _norm_weights(model.blocks[sender.layer].ln1).linear(model.W_E)
            @ model.blocks[sender.layer].attn.W_V[sender.head]
            @ model.blocks[sender.layer].attn.W_O[sender.head]
            for sender in model.circuit.previous_token
        ),
        torch.zeros_like(model.W_E),
    )
    return queries @ (norm.linear(remembered) @ attn.W_K[head.head]).T / attn.attn_scale


def copy_scores(model: BigramTransformer, head: Component) -> Float[Tensor, "token d_vocab"]:
    """The logits that a head writes for each token that it attends to fully."""
    attn = model.blocks[head.layer].attn
    read = _norm_weights(model.blocks[head.layer].ln1).linear(model.W_E)
    written = read @ attn.W_V[head.head] @ attn.W_O[head.head]
    return _norm_weights(getattr(model, "ln_final", None)).linear(written) @ model.W_U


def context_free_logits(
    model: BigramTransformer, added: Float[Tensor, "... d_model"] | None = None
) -> Float[Tensor, "... token d_vocab"]:
    """What the model predicts after each token by its embedding and MLPs alone, all attention off.

    `added` is what the last block's heads write into the residual stream, if given.
    """
    x = model.W_E
    for layer, block in enumerate(model.blocks):
        if added is not None and layer == len(model.blocks) - 1:
            x = x + added[..., None, :]
        if hasattr(block, "mlp"):
            x = x + block.mlp.act_fn(linear_norm(block.ln2, x)(x) @ block.mlp.W_in + block.mlp.b_in) @ block.mlp.W_out
            x = x + block.mlp.b_out
    final = getattr(model, "ln_final", None)
    return linear_norm(final, x)(x) @ model.W_U + model.b_U


def effective_copy_scores(
    model: BigramTransformer, head: Component, weight: Float[Tensor, "token"]
) -> Float[Tensor, "token d_vocab"]:
    """What full attention to each token adds to the logits (also through the MLP), averaged over current tokens."""
    attn = model.blocks[head.layer].attn
    read = _norm_weights(model.blocks[head.layer].ln1).linear(model.W_E)
    written = read @ attn.W_V[head.head] @ attn.W_O[head.head]
    alone = context_free_logits(model)
    rows = [weight @ widened(context_free_logits(model, row) - alone) for row in written]
    return torch.stack(rows)


@analysis
def behaviour(model: BigramTransformer, sequences: SampledSequences) -> Scores:
    """What the model attends to and predicts on sequences with triggers.

    Returns:
        "in_context_accuracy" and "in_context_loss" (nats) where the next token follows from the context;
        "bigram_loss" and "bigram_excess" (nats), the loss after tokens that are not triggers, and how far it lies
        above the true bigrams' loss on the same tokens; "previous_token_attention", the mean attention to the previous
        position; "induction_attention", the induction heads' attention, where the next token is predictable, to
        positions whose previous token is the current one; "attended_correct", how often the position they attend to
        most holds the right answer. If a role has several heads, the best one's. NaN if there is nothing to score.

    Examples:
        >>> found = hl.training.behaviour(model, language.sample(8, 32, triggers="q", seed=0))
        >>> f"{found['in_context_accuracy']:.3f} right, {found['induction_attention']:.3f} attention"
        '0.923 right, 0.893 attention'
    """
    check_type("model", model, BigramTransformer)
    check_type("sequences", sequences, SampledSequences)
    device = model.W_E.device
    tokens, predictable = sequences.tokens.to(device), sequences.predictable.to(device)
    heads = [*model.circuit.previous_token, *model.circuit.induction]
    names = {f"blocks.{head.layer}.attn.hook_pattern" for head in heads}
    logits, run = record(model, tokens, sorted(names))
    log_probs = widened(logits).log_softmax(-1)
    known = predictable[:, :-1]  # at the last position there is no next token to compare with
    answers = tokens[:, 1:]
    loss = -log_probs[:, :-1].gather(-1, answers[..., None])[..., 0]
    right = log_probs[:, :-1].argmax(-1) == answers
    is_trigger = (tokens[:, :, None] == sequences.triggers.to(device)[:, None, :]).any(-1)[:, :-1]
    true_loss = -model.language.log_pi_b.to(loss)[tokens[:, :-1], answers]
    scores = {
        "in_context_accuracy": _mean(right[known]),
        "in_context_loss": _mean(loss[known]),
        "bigram_loss": _mean(loss[~is_trigger]),
        "bigram_excess": _mean((loss - true_loss)[~is_trigger]),
    }

    def pattern(head: Component) -> Float[Tensor, "sequence query key"]:
        return run[f"blocks.{head.layer}.attn.hook_pattern"][:, head.head]

    remembers = torch.zeros_like(pattern(heads[0]), dtype=torch.bool)
    remembers[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    previous = [_mean(pattern(head).diagonal(-1, 1, 2)) for head in model.circuit.previous_token]
    induction = [_mean((pattern(head) * remembers).sum(-1)[:, :-1][known]) for head in model.circuit.induction]
    attended = [tokens.gather(1, pattern(head).argmax(-1))[:, :-1] == answers for head in model.circuit.induction]
    scores["previous_token_attention"] = max(previous, default=torch.nan)
    scores["induction_attention"] = max(induction, default=torch.nan)
    scores["attended_correct"] = max((_mean(right_place[known]) for right_place in attended), default=torch.nan)
    return scores


def previous_token_scores(
    model: BigramTransformer, head: Component, length: int
) -> tuple[Float[Tensor, "query key"], Tensor] | None:
    """The positional part of the head's scores, by position (or offset) as key, and which key is right."""
    attn = model.blocks[head.layer].attn
    norm = _norm_weights(model.blocks[head.layer].ln1)
    if isinstance(attn, RelativeAttention):
        # For each query token, the scores of the offsets that have a key, then 0 for all others.
        queries = norm.linear(model.W_E) @ attn.W_Q[head.head] + attn.b_Q[head.head]
        by_offset = F.pad(queries @ attn.W_R[head.head].T / attn.attn_scale, (0, 1))
        return by_offset, torch.ones(len(by_offset), dtype=torch.long, device=by_offset.device)
    if model.positions != "absolute":
        return None
    positions = norm.linear(model.W_pos[:length])
    queries = positions @ attn.W_Q[head.head] + attn.b_Q[head.head]
    scores = queries @ (positions @ attn.W_K[head.head]).T / attn.attn_scale
    # Only keys at or before the query can be attended to; position 0 has none before it.
    causal = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)[1:]
    return causal, torch.arange(length - 1, device=scores.device)


def _best(name: str, tables: Sequence[tuple[Tensor, Tensor]]) -> Scores:
    """Recall and margin of the head that recalls best."""
    found = [(torch.nan, torch.nan)]
    for scores, right in tables:
        own = scores.gather(1, right[:, None])[:, 0]
        others = scores.scatter(1, right[:, None], -torch.inf).max(-1).values
        found.append((_mean(own > others), _mean(own - others)))
    recall, margin = max(found[1:], default=found[0])
    return {f"{name}_recall": recall, f"{name}_margin": margin}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else torch.nan


def _norm_weights(norm: torch.nn.Module | None) -> LinearNorm:
    """A norm with its scale set to 1."""
    known = linear_norm(norm, torch.ones(1, 1))
    ones = torch.ones(1) if known.w is None else known.w.new_ones(1)
    return LinearNorm(known.centred, None if known.scale is None else ones, known.w, None)
