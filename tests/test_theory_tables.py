"""Tables of a two-layer model: all of them are the model, and a model written by hand needs four numbers alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import close, hooked
from refusals import refused
from strategies import worlds

import hijack_lens as hl
from hijack_lens import theory
from hijack_lens.theory.tables import TERMS
from hijack_lens.training import behaviour, read_tables

LANGUAGE = hl.BigramLanguage.dirichlet(7, 0.4, seed=1)
Q, C, G = 0, 3, 5


def learned(positions="relative", mlp="relu", seed=0, dtype=torch.float64):
    """A model with noise on all that training may change, so that no table is simple and no bias is 0."""
    model = hl.trainable_transformer(
        LANGUAGE, positions, d_model=12, mlp=mlp, n_ctx=40, n_offsets=3, seed=seed, dtype=dtype, device="cpu"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(dtype))
    return model


def tokens(length=30, batch=2, seed=0):
    return torch.randint(7, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mlp", ["relu", "linear", None])
@pytest.mark.parametrize("positions", ["relative", "absolute", "none"])
def test_all_tables_together_are_the_model(positions, mlp):
    model = learned(positions, mlp)
    tables, prompts = read_tables(model), tokens()
    logits, cache = model.run_with_cache(prompts)
    close(theory.logits(prompts, LANGUAGE, tables), logits, atol=1e-10)
    for layer, pattern in enumerate(theory.attention(prompts, LANGUAGE, tables)):
        close(pattern, cache["pattern", layer][:, 0], atol=1e-12)
    split = theory.margin(prompts, LANGUAGE, tables, in_context=C, global_candidate=G)
    close(split.total, logits[:, -1, C] - logits[:, -1, G], atol=1e-10)
    assert float(split.context.abs().min()) > 1e-3
    assert float(split.rest.abs().min()) > 1e-3


def test_in_float32_they_are_the_model_to_its_rounding():
    model, prompts = learned(dtype=torch.float32), tokens()
    found = theory.logits(prompts, LANGUAGE, read_tables(model))
    assert found.dtype == torch.float64
    close(found.float(), model(prompts).detach(), atol=1e-4)


@settings(max_examples=40)
@given(worlds(max_vocab=9, max_length=25))
def test_written_by_hand_they_reduce_to_the_four_strengths(world):
    model = hl.associative_transformer(world.language, **vars(world.setting), n_ctx=30, dtype=torch.float64)
    tables = read_tables(model)
    close(
        theory.logits(world.tokens, world.language, tables),
        theory.logits(world.tokens, world.language, world.setting),
        atol=1e-10,
    )
    ours, theirs = (theory.attention(world.tokens, world.language, one) for one in (tables, world.setting))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, atol=1e-12)
    bare = tables.without(*TERMS)
    if world.setting.positions == "relative":  # absolute positions are rows, whose content is what matters
        close(theory.logits(world.tokens, world.language, bare), theory.logits(world.tokens, world.language, tables))


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize(
    "layout", [{"length": 33}, {"lead": 4}, {"length": 30, "global_count": 3}, {"lead": 9, "global_count": 2}], ids=str
)
def test_flips_and_boundaries_written_by_hand_are_those_of_the_strengths(positions, layout):
    strengths = hl.Strengths(2.5, 5.0, 7.0, 1.3)
    model = hl.associative_transformer(
        LANGUAGE, strengths=strengths, positions=positions, n_ctx=80, dtype=torch.float64
    )
    tables, setting = read_tables(model), theory.Setting.of(model)
    repeats = torch.arange(8)
    ours = theory.phase_boundary(
        repeats, tables, **layout, language=LANGUAGE, trigger=Q, in_context=C, global_candidate=G
    )
    close(ours, theory.phase_boundary(repeats, setting, **layout), atol=1e-10)
    for c, g in itertools.permutations((1, 2, 3, 4), 2):
        ours, theirs = (theory.min_repeats(LANGUAGE, Q, c, g, one, **layout) for one in (tables, setting))
        assert ours.repeats == theirs.repeats
        assert ours.repeats is None or str(ours) == str(theirs)


@pytest.mark.parametrize("layout", [{"length": 33}, {"lead": 6}])
def test_a_learned_flip_is_where_the_models_own_margin_turns(layout):
    found = []
    for seed, (c, g) in itertools.product(range(4), itertools.permutations((1, 2, 3), 2)):
        model = learned(seed=seed)
        frequent = [i for i in LANGUAGE.long_run.argsort(descending=True).tolist() if i not in (Q, c, g)]
        margins = []
        for n in range(17):
            lead = layout.get("lead", layout.get("length", 0) - 1 - 2 * n)
            if lead < 0 or lead + 2 * n + 1 > 40:
                break
            filler = [frequent[i % len(frequent)] for i in range(lead)]
            logits = model(torch.tensor([[*filler, *[Q, c] * n, Q]]))[0, -1].detach()
            margins.append(float(logits[c] - logits[g]))
        by_hand = next((n for n, margin in enumerate(margins) if margin > 0), None)
        flip = theory.min_repeats(LANGUAGE, Q, c, g, read_tables(model), **layout, max_repeats=len(margins) - 1)
        assert flip.repeats == by_hand
        found.append(by_hand)
    assert None in found
    assert any(n is not None and n > 0 for n in found)


@given(st.sets(st.sampled_from(TERMS)))
@settings(max_examples=20)
def test_what_is_left_out_is_zero_and_all_else_stays(terms):
    tables = read_tables(learned())
    left = tables.without(*terms)
    for name, value in vars(tables).items():
        if name in terms:
            assert not left.__dict__[name].any()
        else:
            assert left.__dict__[name] is value
    assert repr(left).count("without") == bool(terms)


def test_each_term_is_one_way_through_the_model():
    """Zeroing weights on the way takes the term with it."""
    model, prompts = learned(), tokens()
    with torch.no_grad():
        model.blocks[0].attn.W_K.zero_()
    tables = read_tables(model)
    close(theory.logits(prompts, LANGUAGE, tables), model(prompts).detach(), atol=1e-10)
    assert not tables.content.any()
    assert float(tables.offset.abs().max()) > 0.1  # keys of offsets are not the tokens'
    with torch.no_grad():
        model.blocks[0].attn.W_V.zero_()
        model.blocks[0].attn.b_V.zero_()
    tables = read_tables(model)
    for name in ("match", "remembered_match", "remembered_own", "remembered_copy", "remembered"):
        assert not getattr(tables, name).any()
    assert float(tables.own.abs().max()) > 0.1


def test_the_previous_token_head_by_query_is_b1():
    """By hand: the score of the offset 1 less that of all others, the query bias and the token's own part together."""
    model = learned()
    attn = model.blocks[0].attn
    for q in range(7):
        query = model.W_E[q] @ attn.W_Q[0] + attn.b_Q[0]
        by_hand = query @ attn.W_R[0, 1] / math.sqrt(12)
        close(read_tables(model).offset[q, 1], by_hand.detach(), atol=1e-12)


BOTH = "model must be a sum of tables over tokens, which it is not with "
test_other_models_are_refused = refused(
    ValueError,
    {
        BOTH + "norm='RMS'": lambda: read_tables(hl.trainable_transformer(LANGUAGE, d_model=8, norm="RMS")),
        BOTH + "positions='rotary'": lambda: read_tables(hl.trainable_transformer(LANGUAGE, "rotary", d_model=8)),
        "two layers of one head, got 2 of 2": lambda: read_tables(
            hl.trainable_transformer(LANGUAGE, d_model=8, n_heads=2)
        ),
        "two layers of one head, got 3 of 1": lambda: read_tables(
            hl.trainable_transformer(LANGUAGE, d_model=8, n_layers=3)
        ),
        "got one that writes in block 0": lambda: read_tables(writes_early()),
        "prompt's tokens are 41; the tables have 40 positions": lambda: theory.logits(
            tokens(41), LANGUAGE, read_tables(learned("absolute"))
        ),
        "prompt's tokens are 41; the tables have 40": lambda: theory.min_repeats(
            LANGUAGE, Q, C, G, read_tables(learned("absolute")), lead=40
        ),
        "tables of the language's 4 tokens, got those of 7": lambda: theory.attention(
            [0, 1], hl.BigramLanguage.dirichlet(4, seed=0), read_tables(learned())
        ),
        "terms must be one of 'content', .*, got 'match'": lambda: read_tables(learned()).without("match"),
        "tokens holds token id 9; the vocabulary has ids 0 to 6": lambda: read_tables(learned()).attention([9]),
        r"match must have shape \(7, 7\), got \(7, 6\)": lambda: changed(match=torch.zeros(7, 6)),
        "bigram must be a finite number > 0, got 0": lambda: changed(bigram=0.0),
        "repeats=1000000000, .* would take .* of memory": lambda: theory.phase_boundary(
            [10**9], read_tables(learned()), lead=1, language=LANGUAGE, trigger=Q, in_context=C, global_candidate=G
        ),
        "language must have tokens beside the trigger and its candidates": lambda: theory.min_repeats(
            THREE, 0, 1, 2, read_tables(hl.associative_transformer(THREE)), lead=2
        ),
    },
)
test_what_is_missing_is_named = refused(
    TypeError,
    {
        "model must be a BigramTransformer, got HookedTransformer": lambda: read_tables(hooked()),
        r"offset must be a Tensor \[row offset\], got tensor\(\[0": lambda: changed(offset=torch.zeros(7)),
        "activation must be a 'relu' or 'linear', got 'gelu'": lambda: changed(activation="gelu"),
        "phase_boundary needs language=, trigger= and in_context=": lambda: theory.phase_boundary(
            [1], read_tables(learned()), lead=1
        ),
        "last must be a bool, got 'yes'": lambda: read_tables(learned()).written([0], "yes"),
        "tokens must be a tensor of token ids, got int": lambda: read_tables(learned()).written(0),
        "setting must be a Setting or Tables, got 3": lambda: theory.logits([0], LANGUAGE, 3),
    },
)
THREE = hl.BigramLanguage.dirichlet(3, seed=0)


def changed(**values):
    return theory.Tables(**{**vars(read_tables(learned())), **values})


def writes_early():
    model = learned()
    with torch.no_grad():
        model.blocks[0].mlp.b_out.fill_(1.0)
    return model


def test_the_model_is_left_as_it_was():
    model, sequences = learned().train(), LANGUAGE.sample(4, 20, [0, 1], seed=0)
    before = behaviour(model, sequences)
    read_tables(model)
    assert model.training
    assert behaviour(model, sequences) == before
