"""Learning by one large gradient step per memory."""

import torch
import torch.nn.functional as F
from tqdm.auto import trange

from hijack_lens.core.analysis import without_autocast
from hijack_lens.core.checks import Seed, check_count, check_list, check_number, check_type, fixed_seed, shown
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.trainable import trainable_transformer
from hijack_lens.models.transformer import BigramTransformer
from hijack_lens.training.forward import PlainForward
from hijack_lens.training.recall import Scores, memory_recall

STEPS = {"copy": "blocks.1.attn.W_V", "match": "blocks.1.attn.W_K", "previous_token": "blocks.0.attn.W_K"}
"""Which matrix each step learns: the induction head's W_OV, its keys, and the previous-token head's keys."""

_MOST_TOKENS = 2**30
"""Of one step, which can be neither resumed nor saved in between: hours."""


@torch.inference_mode(False)
@without_autocast()
def gradient_steps(
    language: BigramLanguage,
    d_model: int = 384,
    length: int = 24,
    n_sequences: int = 6144,
    n_triggers: int = 3,
    step_norms: tuple[float, float, float] = (10.0, 300.0, 1000.0),
    batch_size: int = 512,
    seed: Seed = 0,
) -> tuple[BigramTransformer, dict[str, Scores]]:
    """Learns the three associative memories by one gradient step each, in turn.

    The setting of Bietti et al. 2023 (arXiv 2306.00802, section 5 and its appendix): embeddings, unembedding,
    positions and layer-0 values are random, nearly orthogonal and frozen; W_Q and W_O are the identity; there is no
    MLP; keys, and the last layer's values, start from 0. The population gradient of the loss on predictable tokens
    is averaged over `n_sequences`.

    Args:
        language: whose sequences; works best where tokens follow one another almost at random.
        d_model: large against the vocabulary, so that random directions are nearly orthogonal.
        length: tokens per sequence.
        n_sequences: to average each gradient over.
        n_triggers: per sequence, drawn anew.
        step_norms: Frobenius norm of each step. A first step that saturates the softmax leaves the later ones
            little to learn from.
        batch_size: sequences at a time.
        seed: of weights and sequences.

    Returns:
        The model, and its `memory_recall` before ("start") and after each step, by the memory that the step learns.
        The previous-token memory is asked up to three quarters of `length`: what stands later is hardly ever read.

    Raises:
        TypeError, ValueError: for counts that are none.

    Examples:
        >>> random = hl.BigramLanguage.dirichlet(8, concentration=5.0, seed=0)
        >>> trained, recall = hl.training.gradient_steps(random, d_model=96, n_sequences=1024, seed=0)
        >>> [(step, found["copy_recall"]) for step, found in recall.items()]
        [('start', 0.0), ('copy', 1.0), ('match', 1.0), ('previous_token', 1.0)]
    """
    check_type("language", language, BigramLanguage)
    counts = {"length": length, "d_model": d_model, "n_sequences": n_sequences, "batch_size": batch_size}
    for name, value in {**counts, "n_triggers": n_triggers}.items():
        check_count(name, value, minimum=4 if name == "length" else 1)
    norms = [check_number("step_norms", norm) for norm in check_list("step_norms", step_norms, "three numbers")]
    if len(norms) != len(STEPS):
        raise ValueError(f"step_norms must be three numbers, got {shown(step_norms)}")
    if n_sequences * length > _MOST_TOKENS:
        raise ValueError(
            f"n_sequences must be fewer: {shown(n_sequences)} of length {length} are over {_MOST_TOKENS:,} tokens"
        )
    seed = fixed_seed(seed)
    model = trainable_transformer(
        language,
        "absolute",
        d_model=d_model,
        mlp=None,
        init={"W_Q": "identity", "W_O": "identity", "W_K": "zeros", "blocks.1.attn.W_V": "zeros"},
        seed=seed,
        n_ctx=length,
    )
    forward = PlainForward(model)
    asked = 3 * length // 4
    recalls = {"start": memory_recall(model, asked)}
    generator = torch.Generator().manual_seed(seed)
    for (memory, name), norm in zip(STEPS.items(), norms, strict=True):
        for other, parameter in model.named_parameters():
            parameter.requires_grad_(other == name)
        weight = model.get_parameter(name)
        gradient = torch.zeros_like(weight)
        for first in trange(0, n_sequences, batch_size, desc=f"gradient step: {memory}", delay=1, disable=None):
            count = min(batch_size, n_sequences - first)
            sequences = language.sample(count, length, n_triggers=n_triggers, seed=generator)
            known = sequences.predictable.clone()
            known[:, -1] = False  # its answer lies beyond the sequence
            if not known.any():
                continue  # nothing to learn from
            logits = forward(sequences.tokens.to(weight.device))[known.to(weight.device)]
            loss = F.cross_entropy(logits, sequences.tokens.roll(-1, 1)[known].to(weight.device))
            gradient += torch.autograd.grad(loss, weight)[0] * (count / n_sequences)
        # A memory whose predecessor was left out (a step of norm 0) may have no gradient at all.
        if gradient.any():
            with torch.no_grad():
                weight -= gradient * (norm / gradient.norm())
        recalls[memory] = memory_recall(model, asked)
    return model.requires_grad_(False), recalls
