"""Finding circuits: against models whose circuit is known, random ones that have none, and plain loops."""

import functools
import math
import pickle
from dataclasses import replace

import matplotlib
import pytest
import torch
from models_for_tests import close, handwritten, hooked, lens_model, native
from refusals import refused
from trainable_for_tests import LANGUAGE, TRIGGERS, build
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.circuits.bigram_memory import Scrambles, moved, ratio_of_means, told
from hijack_lens.circuits.evidence import MIN_ATTENTION
from hijack_lens.circuits.heads import ablation_effects, draw_repeats, head_scores
from hijack_lens.core.statistics import chance

NOTHING = hl.Circuit()
TWO_LAYERS = hl.Circuit(*((hl.Component(*part),) for part in ((0, "head", 0), (1, "head", 0), (1, "mlp"))))


def head(layer, index):
    return hl.Component(layer, "head", index)


def planted(previous=(1,), induction=(2,), bigram=True, n_layers=4, n_heads=3, noise=0.05, seed=0):
    """A model with the handwritten weights in blocks 1 and 3, shared among heads, and small noise in all others."""
    language = hl.BigramLanguage.dirichlet(20, 0.5, seed=seed)
    source = hl.associative_transformer(language, positions="absolute", n_ctx=45, device="cpu")
    sizes = {name: getattr(source.cfg, name) for name in ("d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")}
    model = lens_model(
        n_layers=n_layers, n_heads=n_heads, act_fn="relu", normalization_type=None, use_attn_scale=False,
        init_weights=False, **sizes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = noise / math.sqrt(parameter.shape[-2]) if parameter.ndim > 1 else noise
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
                parameter.copy_(theirs[name])
        for into, out_of, heads in ((1, 0, previous), (3, 1, induction)):
            for index in heads:
                for name in ("W_Q", "W_K", "W_V", "W_O"):
                    share = len(heads) if name == "W_O" else 1
                    getattr(model.blocks[into].attn, name)[index] = theirs[f"blocks.{out_of}.attn.{name}"][0] / share
        if bigram:
            for name in ("W_in", "W_out"):
                getattr(model.blocks[3].mlp, name).copy_(theirs[f"blocks.1.mlp.{name}"])
    return model


def random_model(seed, positions="standard", **options):
    sizes = {"d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 50, "d_vocab": 40, "n_layers": 3}
    rotary = {"rotary_dim": 8} if positions == "rotary" else {}
    return lens_model(seed, act_fn="gelu", positional_embedding_type=positions, **rotary, **{**sizes, **options})


@pytest.fixture(scope="module")
def found():
    """A model of four layers, and the circuit found in it."""
    model = planted(previous=(0, 2), induction=(0, 1, 2))
    return model, hl.find_circuit(model)


def drawn(vocabulary=20, triggers=None, first=None, n_prompts=40, period=6, seed=0):
    asked = None if triggers is None else torch.tensor(triggers)
    return draw_repeats(torch.arange(vocabulary), asked, first, n_prompts, period, torch.Generator().manual_seed(seed))


# Prompts


def test_a_prompt_repeats_and_its_twin_has_the_first_time_in_another_order():
    prompts = drawn()
    starts = set()
    for tokens, twin in zip(prompts.tokens.tolist(), prompts.twins.tolist(), strict=True):
        first, second = tokens[1:7], tokens[7:]
        assert len(set(tokens[:7])) == 7
        start = first.index(second[0])
        starts.add(start)
        assert second == first[start:] + first[:start]
        assert twin[0] == tokens[0]
        assert twin[7:] == second
        assert sorted(twin[1:7]) == sorted(first)
        assert twin[1:7] != first
    assert starts == set(range(6))


def test_queries_targets_and_answers_are_where_they_say():
    prompts = drawn()
    for i, tokens in enumerate(prompts.tokens.tolist()):
        for query, target, answer in zip(prompts.query[i], prompts.target[i], prompts.answer[i], strict=True):
            assert query > 6 >= target
            assert tokens[target - 1] == tokens[query]
            assert tokens[target] == answer
        assert len(set(prompts.query[i].tolist())) == 5


@pytest.mark.parametrize("triggers", [[3], [3, 5, 7], list(range(12)), list(range(19)), list(range(20))])
def test_only_triggers_are_scored_and_every_prompt_has_some(triggers):
    prompts = drawn(triggers=triggers)
    for i, tokens in enumerate(prompts.tokens.tolist()):
        asked = [tokens[query] for query in prompts.query[i]]
        assert prompts.scored[i].tolist() == [token in triggers for token in asked]
        assert int(prompts.scored[i].sum()) == min(len(triggers), 5)
    values = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    expected = [values[i][prompts.scored[i]].mean() for i in range(40)]
    close(prompts.mean(values), torch.stack(expected), atol=1e-6)


def test_the_first_token_may_be_given():
    assert set(drawn(first=19, vocabulary=10).tokens[:, 0].tolist()) == {19}


# Statistics


@torch.no_grad()
def test_attention_is_read_as_a_plain_loop_reads_it():
    model = hooked(d_vocab=20, n_ctx=20)
    prompts = drawn(triggers=[1, 2, 3, 4], n_prompts=5)
    scores = head_scores(model, prompts, lambda: None)
    caches = [model.run_with_cache(tokens) for tokens in (prompts.tokens, prompts.twins)]
    log_probs = [logits.detach().log_softmax(-1) for logits, _ in caches]
    patterns = [cache["pattern", 1][:, 1].detach() for _, cache in caches]
    elsewhere = []
    for i in range(5):
        pairs = [k for k in range(5) if prompts.scored[i, k]]
        target = gain = 0.0
        for k in pairs:
            at = (i, int(prompts.query[i, k]))
            target += float(patterns[0][at][prompts.target[i, k]] - patterns[1][at][prompts.target[i, k]]) / len(pairs)
            answer = prompts.answer[i, k]
            gain += float(log_probs[0][at][answer] - log_probs[1][at][answer]) / len(pairs)
        assert float(scores.target[i, 1, 1]) == pytest.approx(target, abs=1e-6)
        assert float(scores.gain[i]) == pytest.approx(gain, abs=1e-9)
        targets = [int(prompts.target[i, k]) for k in pairs]
        by_distance = [
            sum(float(patterns[0][i, t, t - d]) for t in targets if t >= d) / len(pairs) for d in range(1, 7)
        ]
        assert float(scores.previous[i, 1, 1]) == pytest.approx(by_distance[0], abs=1e-6)
        elsewhere.append(torch.tensor(by_distance[1:]))
    assert float(scores.elsewhere[1, 1]) == pytest.approx(float(torch.stack(elsewhere).mean(0).max()), abs=1e-6)


@torch.no_grad()
def test_effects_are_those_of_patching_from_the_twin():
    model = hooked(d_vocab=20, n_ctx=20)
    prompts = drawn(n_prompts=5)
    heads = [head(0, 1), head(1, 0), head(1, 1)]
    found = ablation_effects(model, prompts, heads, lambda: None)
    rows = torch.arange(5)[:, None]

    def log_prob(off):
        with hooks.patch(model, off, prompts.twins) if off else hooks.patch(model, heads, prompts.tokens):
            return model(prompts.tokens).log_softmax(-1)[rows, prompts.query, prompts.answer].mean(1)

    intact, none = log_prob([]), log_prob(heads)
    close(found.lost_together, intact - none)
    for i, part in enumerate(heads):
        close(found.lost[:, i], intact - log_prob([part]))
        close(found.regained[:, i], log_prob([other for other in heads if other != part]) - none)


def test_runs_in_parts_give_the_same(monkeypatch):
    model = hooked(d_vocab=20, n_ctx=20)
    whole = hl.find_circuit(model).evidence
    monkeypatch.setattr("hijack_lens.core.hook_points._CELLS", 1300)  # three prompts of 21 tokens
    parts = hl.find_circuit(model).evidence
    for role in ("previous_token", "induction"):
        close(getattr(parts, role).score, getattr(whole, role).score, atol=1e-6)
    close(parts.bigram.share, whole.bigram.share, atol=1e-9)
    assert parts.gain == pytest.approx(whole.gain, abs=1e-9)


@pytest.mark.parametrize("norm", [None, "LN"])
def test_whole_runs_of_a_model_with_hooks_give_the_same(norm):
    """Without hooks, runs with parts switched off go on from one recorded run."""
    model = hooked(norm, n_layers=3, d_vocab=20, n_ctx=20)
    ours = hl.find_circuit(model).evidence
    model.add_hook("hook_embed", lambda activation, hook: None)
    whole = hl.find_circuit(model).evidence
    assert ours.circuit == whole.circuit
    assert ours.bigram.draws.tolist() == whole.bigram.draws.tolist()
    for name in ("share", "effect", "null"):
        close(getattr(ours.bigram, name).nan_to_num(), getattr(whole.bigram, name).nan_to_num(), atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    prompts = draw_repeats(torch.arange(20), None, None, 5, 6, generator)
    every = [head(layer, index) for layer in range(3) for index in (0, 1)]
    found = ablation_effects(model, prompts, every, lambda: None, [head(0, 1), head(2, 0)])
    model.reset_hooks()
    again = ablation_effects(model, prompts, every, lambda: None)
    for part in ("lost", "regained"):
        close(getattr(found, part), getattr(again, part)[:, [1, 4]])
    close(found.lost_together, again.lost_together)


def test_drawing_stops_where_more_would_change_nothing():
    circuit = hl.find_circuit(handwritten(20, n_ctx=32))
    strong = circuit.evidence.bigram
    assert circuit == TWO_LAYERS
    assert 20 <= int(strong.draws[1]) < 499
    assert float(strong.effect[1]) > float(strong.null[1]) > 0
    assert not strong.draws[strong.effect.isnan()].any()
    random = hl.find_circuit(hooked(None, n_layers=3)).evidence.bigram
    assert bool((random.null >= random.effect).all())
    assert bool((random.draws < 20).all())


def test_heads_near_what_their_effect_must_exceed_are_called_undecided(found):
    evidence = found[1].evidence
    heads = evidence.induction
    assert heads.undecided == []
    assert "undecided" not in evidence.verdict("induction")
    effect = torch.maximum(heads.lost, heads.regained)
    near = replace(heads, effect_null=float(effect[3, 0]) + 0.4 * float(heads.error[3, 0]))
    assert head(3, 0) in near.undecided
    assert all(abs(float(effect[3, h.head]) - near.effect_null) < float(heads.error[3, h.head]) for h in near.undecided)
    said = replace(evidence, induction=near).verdict("induction")
    interval = f"L3H0 ({float(effect[3, 0]):.2f} ± {float(heads.error[3, 0]):.2f} nats; null {near.effect_null:.2f})"
    assert said.startswith("induction head: L3H0")
    assert interval in said.split("; undecided: ")[1]


def test_what_predictions_tell_is_mutual_information_and_never_more_for_other_predictions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (3 * torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)).log_softmax(-1)
        joint = p.exp() / 6
        mutual = (joint * (joint.log() - joint.sum(0).log() - joint.sum(1, keepdim=True).log())).sum()
        assert told(p, p) == pytest.approx(float(mutual), abs=1e-12)
        assert told(p, q) <= told(p, p)
    same = p[:1].expand(6, -1)
    assert told(p, same) == pytest.approx(0, abs=1e-12)
    assert moved(p, p + 3 + p[:1] - torch.arange(6.0)[:, None]) == pytest.approx(0, abs=1e-12)


def test_intervals_of_shares_hold_what_all_tokens_would_give():
    generator = torch.Generator().manual_seed(1)
    whole = torch.rand(4000, generator=generator, dtype=torch.float64) + 0.1
    part = whole * (0.4 + 0.3 * torch.randn(4000, generator=generator, dtype=torch.float64))
    held = []
    for _ in range(1000):
        drawn = torch.randint(4000, (32,), generator=generator)
        ratio, error = ratio_of_means(part[drawn], whole[drawn])
        held.append(abs(ratio - float(part.mean() / whole.mean())) < error)
    assert 0.92 < sum(held) / 1000 < 0.98


def test_verdicts_give_a_shares_interval_and_say_which_mlps_are_undecided(found):
    evidence = found[1].evidence
    share, error = (values.clone() for values in (evidence.bigram.share, evidence.bigram.error))
    assert bool((error[3] >= 0) & (error[3] < 0.2))
    share[2:], error[2:] = torch.tensor([0.12, 0.63]), torch.tensor([0.05, 0.2])
    said = replace(evidence, bigram=replace(evidence.bigram, share=share, error=error)).verdict("bigram")
    assert said.startswith("bigram memory: L3MLP (63% ± 20% of the context-free prediction)")
    assert "undecided: " in said
    assert "L2MLP (12% ± 5%; 10% needed)" in said.split("undecided: ")[1]


def test_verdicts_say_how_far_an_mlps_effect_lies_from_what_random_directions_reach(found):
    evidence = found[1].evidence
    excess, reach = torch.full((4,), torch.nan).double(), torch.full((4,), torch.nan).double()
    excess[2], reach[2] = 3.5, 0.9
    bigram = replace(evidence.bigram, excess=excess, excess_error=reach)
    assert hl.Component(2, "mlp") in bigram.undecided
    said = replace(evidence, bigram=bigram).verdict("bigram").split("undecided: ")[1]
    assert "L2MLP (moves logits 3.5 ± 0.9 standard deviations more than in random directions; 2.9 needed)" in said
    plain = replace(bigram, excess_error=reach / 2)
    assert hl.Component(2, "mlp") not in plain.undecided


def test_an_effect_that_many_scrambles_leave_open_is_no_longer_drawn_for():
    generator = torch.Generator().manual_seed(0)

    def drawn(excess, count):
        logs = 0.1 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        levels = (2 * (logs - logs.mean()) / logs.std() * 0.1).exp().expand(-1, 32)
        largest = float(levels.max())
        own = max(math.exp(0.2 * excess), largest * 1.0001) * torch.ones(32, dtype=torch.float64)
        return Scrambles(own, levels)

    for excess, count, settled in ((2.9, 63, False), (2.9, 64, True), (9.0, 20, True), (9.0, 19, False)):
        found = drawn(excess, count)
        assert found.settled == settled
        z, error = found.excess
        assert math.isnan(z) == (count < 64)
        assert math.isnan(error) or error > 0
    near = drawn(2.9, 64)
    assert near.null > float(near.drawn.mean(1).sqrt().max())  # others would be larger
    assert drawn(9.0, 64).null == pytest.approx(float(drawn(9.0, 64).drawn.mean(1).sqrt().max()), rel=1)


def test_verdicts_say_why_a_head_that_looks_there_was_not_named(found):
    evidence = found[1].evidence
    heads = evidence.induction
    loud = replace(heads, lost=heads.lost.clone(), regained=heads.regained.clone(), error=heads.error.clone())
    loud.lost[2, 0], loud.regained[2, 0], loud.error[2, 0] = 0.0, 0.0, 0.001
    said = replace(evidence, induction=loud).verdict("induction")
    assert f"; not L2H0 (attention {float(heads.score[2, 0]):.2f}; 0% of the in-context gain lost without it" in said
    assert "; not " not in evidence.verdict("induction")


def test_chance_is_exceeded_once_in_a_hundred_and_does_not_grow_with_what_is_there():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 32, 10, generator=generator, dtype=torch.float64)
    exceeded = [float(part.mean(0).max()) > chance(part, generator) for part in noise]
    assert sum(exceeded) <= 12
    strong = noise[0].clone()
    strong[:, 0] += 100
    again = [chance(part, torch.Generator().manual_seed(1)) for part in (noise[0], strong)]
    assert again[0] == pytest.approx(again[1])


# Models whose circuit is known


@pytest.mark.parametrize("triggers", [None, [3], [0, 4, 5]])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_handwritten_circuit_is_found(positions, triggers):
    model = handwritten(12, positions=positions, triggers=triggers, n_ctx=32)
    circuit = hl.find_circuit(model)
    assert circuit == TWO_LAYERS == model.circuit
    evidence = circuit.evidence
    assert evidence.period == 11
    assert float(evidence.previous_token.score[0, 0]) > 0.99
    assert float(evidence.bigram.share[1]) > 0.5
    assert evidence.bigram.direct_share < 0.05


def test_a_model_that_knows_few_positions_is_asked_within_them():
    model = handwritten(12, positions="absolute", n_ctx=60, n_ctx_train=11)
    circuit = hl.find_circuit(model)
    assert circuit == TWO_LAYERS
    assert circuit.evidence.period == 5


@pytest.mark.parametrize(
    ("memory", "role"), [("previous_token", "previous_token"), ("match", "induction"), ("copy", "induction")]
)
def test_a_circuit_that_misses_a_link_is_none(memory, role):
    strengths = {"previous_token": 20.0, "match": 6.0, "copy": 10.0, memory: 0.0}
    circuit = hl.find_circuit(handwritten(12, strengths=hl.Strengths(**strengths), n_ctx=32))
    assert circuit == hl.Circuit(bigram=TWO_LAYERS.bigram)
    assert circuit.evidence.verdict(role).startswith(f"no {role.replace('previous_token', 'previous-token')} head: ")


def test_a_handwritten_model_without_bigrams_has_no_bigram_memory():
    circuit = hl.find_circuit(handwritten(12, strengths=hl.Strengths(bigram=0.0), n_ctx=32))
    assert circuit == hl.Circuit(TWO_LAYERS.previous_token, TWO_LAYERS.induction)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", [{"n_heads": 2}, {"positions": "absolute"}])
def test_a_trained_circuit_is_found(options):
    model = build(**options)
    hl.train(
        model,
        LANGUAGE,
        hl.TrainConfig(TRIGGERS, length=20, seed=0, steps=500, lr=1e-2, batch_size=32, evaluate_every=500),
    )
    circuit = hl.find_circuit(model)
    assert circuit.induction
    assert circuit.previous_token
    assert {part.layer for part in circuit.previous_token} == {0}
    assert {part.layer for part in circuit.induction} == {1}
    assert circuit.bigram == TWO_LAYERS.bigram


@functools.cache
def trained_on_repeats():
    """Two layers of attention alone, of one head, trained on [begin, x, x] for x of 4 to 8 tokens."""
    options = {"d_model": 64, "d_head": 64, "n_heads": 1, "n_layers": 2, "n_ctx": 17, "d_vocab": 33}
    model = lens_model(0, attn_only=True, normalization_type=None, **options)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        loss = loss_on_repeats(model, int(torch.randint(4, 9, (), generator=generator)), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def repeated(length, generator, n_prompts=64):
    x = 1 + torch.rand(n_prompts, 32, generator=generator).argsort(1)[:, :length]
    return torch.cat([torch.zeros(n_prompts, 1, dtype=torch.long), x, x], 1)


def loss_on_repeats(model, length, generator):
    tokens = repeated(length, generator)
    log_probs = model(tokens)[:, length + 1 : -1].log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, length + 2 :, None]).mean()


def test_a_previous_token_head_is_judged_where_induction_looks_for_it():
    """It attends to the previous token at the first occurrence alone: at the second, nothing needs it."""
    model = trained_on_repeats()
    pattern = model.run_with_cache(repeated(8, torch.Generator().manual_seed(1)))[1]["pattern", 0][:, 0].detach()
    by_query = pattern.diagonal(-1, 1, 2).mean(0)  # from query 1 on
    assert float(by_query[2:8].mean()) > 0.4
    assert float(by_query[9:].mean()) < 0.2
    with torch.no_grad():
        intact = float(loss_on_repeats(model, 8, torch.Generator().manual_seed(1)))
        with hooks.ablate(model, "L0H0"):
            assert float(loss_on_repeats(model, 8, torch.Generator().manual_seed(1))) > 1 + intact

    options = {"d_model": 64, "d_head": 64, "n_heads": 1, "n_layers": 2, "n_ctx": 17, "d_vocab": 33, "attn_only": True}
    bridge = TransformerBridge.boot_native(
        {**options, "act_fn": "relu", "normalization_type": None, "seed": 0}, device="cpu", dtype=torch.float32
    ).eval()
    weights = {"tok_embed": model.W_E, "pos": model.W_pos, "head": model.W_U.T, "head.bias": model.b_U}
    for layer, block in enumerate(model.blocks):
        for name in "qkv":
            weights[f"layers.{layer}.attn.{name}"] = getattr(block.attn, f"W_{name.upper()}")[0].T
            weights[f"layers.{layer}.attn.{name}.bias"] = getattr(block.attn, f"b_{name.upper()}")[0]
        weights[f"layers.{layer}.attn.o"] = block.attn.W_O[0].T
        weights[f"layers.{layer}.attn.o.bias"] = block.attn.b_O
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            parameter.copy_(weights[name.replace("_original_component.", "").removesuffix(".weight")])
    for one in (model, bridge):
        for seed in range(3):
            circuit = hl.find_circuit(one, seed=seed)
            assert circuit == hl.Circuit((head(0, 0),), (head(1, 0),))
            assert circuit.evidence.by_effect == ()
            assert bool(circuit.evidence.others.isnan().all())


def test_a_head_that_only_its_effect_gives_away_is_named_as_such():
    """With attention so blurred that most of it goes elsewhere, of which an induction head makes enough."""
    model = handwritten(12, strengths=hl.Strengths(previous_token=0.5, match=60.0), n_ctx=32)
    circuit = hl.find_circuit(model)
    evidence = circuit.evidence
    assert (circuit.previous_token, circuit.induction) == ((), TWO_LAYERS.induction)
    assert evidence.by_effect == TWO_LAYERS.previous_token
    share = float(evidence.others[0, 0]) / evidence.gain
    assert share > 0.5
    error = float(evidence.others_error[0, 0]) / evidence.gain
    said = f"L0H0 ({share:.0%} ± {error:.0%} of the in-context gain lost without it)"
    assert evidence.verdicts.splitlines()[3:] == [f"by effect alone, with attention of neither role: {said}"]
    near = replace(evidence, others_null=(share + 0.5 * error) * evidence.gain)
    needed = f"where {share + 0.5 * error:.0%} of the in-context gain must be lost: L0H0 ({share:.0%} ± {error:.0%})"
    assert near.verdicts.splitlines()[3:] == [f"undecided by effect alone, {needed}"]
    assert evidence.verdict("previous_token").startswith("no previous-token head: the best score 0.")


def test_a_circuit_among_other_heads_and_layers_is_found():
    assert hl.find_circuit(planted()) == hl.Circuit((head(1, 1),), (head(3, 2),), (hl.Component(3, "mlp"),))
    assert hl.find_circuit(planted(induction=(), bigram=False)) == NOTHING


def test_heads_that_share_a_role_are_all_named_though_each_may_be_spared(found):
    circuit = found[1]
    expected = hl.Circuit((head(1, 0), head(1, 2)), (head(3, 0), head(3, 1), head(3, 2)), (hl.Component(3, "mlp"),))
    assert circuit == expected
    evidence = circuit.evidence.induction
    assert evidence.candidates == list(expected.induction)
    assert bool((evidence.regained[3] > 3 * evidence.lost[3]).all())
    assert evidence.lost_together > 0.9 * circuit.evidence.gain


def test_a_bridge_gives_what_its_twin_gives():
    bridge, twin = native(seed=3)
    theirs, ours = hl.find_circuit(bridge), hl.find_circuit(twin)
    assert theirs == ours
    for role in ("previous_token", "induction"):
        close(getattr(theirs.evidence, role).score, getattr(ours.evidence, role).score, atol=1e-6)
    close(theirs.evidence.bigram.share, ours.evidence.bigram.share, atol=1e-6)


def test_a_circuit_in_a_bridge_is_found():
    source = dict(handwritten(8, positions="absolute", n_ctx=24).named_parameters())
    sizes = {"d_model": 48, "n_heads": 2, "d_head": 24, "d_mlp": 8, "n_ctx": 24, "d_vocab": 8, "n_layers": 2, "seed": 0}
    options = {**sizes, "act_fn": "relu", "normalization_type": None}
    bridge = TransformerBridge.boot_native(options, device="cpu", dtype=torch.float64)
    theirs = {name.replace("_original_component.", ""): value for name, value in bridge.named_parameters()}
    written = {"tok_embed": source["embed.W_E"], "pos": source["pos_embed.W_pos"], "head": source["unembed.W_U"].T}
    for layer in (0, 1):
        for name, ours in (("fc_in", "W_in"), ("fc_out", "W_out")):
            written[f"layers.{layer}.mlp.{name}"] = source[f"blocks.{layer}.mlp.{ours}"].T
        other = (1 - layer) * 24  # the head that stays empty: 0 in block 0, 1 in block 1
        for name in "qkvo":
            weight = source[f"blocks.{layer}.attn.W_{name.upper()}"][0]
            weight = weight * 24**0.5 if name == "q" else weight  # which the bridge divides by again
            empty = torch.zeros(24, 48, dtype=torch.float64)
            rows = [weight if name == "o" else weight.T, empty]
            both = torch.cat(rows if other == 0 else rows[::-1])
            written[f"layers.{layer}.attn.{name}"] = both.T if name == "o" else both
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(written.get(name.removesuffix(".weight"), torch.zeros(())))
    assert hl.find_circuit(bridge) == hl.Circuit((head(0, 1),), (head(1, 0),), (hl.Component(1, "mlp"),))


# Models without


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
def test_models_with_large_random_weights_have_no_circuit(norm):
    for seed in range(15):
        assert hl.find_circuit(hooked(norm, n_layers=1 + seed % 3, seed=seed), seed=seed) == NOTHING


@pytest.mark.parametrize("positions", ["standard", "rotary", "alibi"])
def test_freshly_initialised_models_have_no_circuit(positions):
    for seed in range(4):
        assert hl.find_circuit(random_model(seed, positions), seed=seed) == NOTHING


def test_random_bridges_have_no_circuit():
    for seed in range(5):
        assert hl.find_circuit(native(seed=seed)[0]) == NOTHING


def test_models_without_mlps_have_no_bigram_memory():
    circuit = hl.find_circuit(random_model(0, attn_only=True))
    assert circuit.evidence.verdict("bigram") == "no bigram memory: the model has no MLP"
    assert bool(circuit.evidence.bigram.share.isnan().all())


def test_a_model_that_predicts_nothing_has_none():
    model = random_model(0)
    with torch.no_grad():
        model.W_U.zero_()
    circuit = hl.find_circuit(model)
    assert circuit == NOTHING
    assert circuit.evidence.gain == 0
    assert "below 0.10" in circuit.evidence.verdict("bigram")


# Manners


def test_the_model_and_the_random_state_stay_as_they_were(global_rng_untouched):
    model = planted()
    model.train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.add_hook("blocks.0.hook_mlp_out", lambda activation, hook: seen.append(1))
    flags = [module.training for module in model.modules()]
    hl.find_circuit(model)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert sum(len(point.fwd_hooks) for point in model.hook_dict.values()) == 1
    assert seen
    assert torch.is_grad_enabled()


def test_a_seed_gives_the_same_evidence_and_another_seed_other_prompts():
    model = hooked()
    first, again, other = (hl.find_circuit(model, seed=seed).evidence for seed in (1, 1, 2))
    assert first.to_pandas().equals(again.to_pandas())
    assert first.gain == again.gain != other.gain


def test_prompts_hold_no_tokens_but_those_asked_for():
    model = handwritten(12, n_ctx=32)
    seen = []
    model.add_hook("hook_embed", lambda activation, hook: seen.append(activation.argmax(-1)))
    hl.find_circuit(model, vocabulary=[1, 2, 3, 5, 8], triggers="5")
    assert set(torch.cat([tokens.flatten() for tokens in seen]).tolist()) == {1, 2, 3, 5, 8}


def test_texts_begin_with_the_models_first_token_where_it_has_one():
    model = random_model(0)
    seen = []
    model.add_hook("hook_embed", lambda activation, hook: seen.append(activation[:, 0]))

    class Tokenizer:
        bos_token_id, all_special_ids, padding_side = 7, [7], "right"

    model.tokenizer = Tokenizer()
    hl.find_circuit(model)
    assert all(torch.allclose(first, model.W_E[7].expand_as(first)) for first in seen)
    seen.clear()
    model.cfg.default_prepend_bos = False
    hl.find_circuit(model)
    assert not any(torch.allclose(first, model.W_E[7].expand_as(first)) for first in seen)


def test_equality_iteration_and_text_ignore_the_evidence(found):
    circuit = found[1]
    by_hand = hl.Circuit(circuit.previous_token, circuit.induction, circuit.bigram)
    assert by_hand.evidence is None
    assert circuit == by_hand == circuit.evidence.circuit
    assert hash(circuit) == hash(by_hand)
    assert list(circuit) == list(by_hand)
    assert str(circuit) == str(by_hand)
    assert repr(circuit) == repr(by_hand)
    assert circuit.role(head(3, 1)) == "induction"
    assert pickle.loads(pickle.dumps(circuit)) == circuit


# What it shows


def test_verdicts_say_what_was_found_and_how_that_is_known(found):
    said = found[1].evidence.verdicts
    assert said.splitlines()[1].startswith("induction head: L3H0 (attention 0.8")
    assert "back with it alone), L3H1" in said
    assert said.splitlines()[2].startswith("bigram memory: L3MLP (")


def test_verdicts_say_why_nothing_was_found():
    evidence = hl.find_circuit(random_model(0)).evidence
    best = evidence.induction.best
    score = float(evidence.induction.score.max())
    expected = f"no induction head: the best score {score:.2f} ({best}) is below the null's {MIN_ATTENTION:.2f}"
    assert evidence.verdict("induction") == expected
    assert "tell 0.0" in evidence.verdict("bigram")
    silent = hl.find_circuit(handwritten(12, strengths=hl.Strengths(copy=0.0), n_ctx=32)).evidence
    assert "the order of the tokens before changes" in silent.verdict("induction")
    assert "the order of the tokens before changes" in silent.verdict("previous_token")


def test_the_table_has_a_row_for_every_component(found):
    circuit = found[1]
    table = circuit.evidence.to_pandas()
    assert len(table) == 2 * 4 * 3 + 4
    assert set(table[table["named"]]["component"]) == {str(part) for _, part in circuit}
    row = table[(table["role"] == "induction") & (table["component"] == "L3H1")].iloc[0]
    assert row["score"] == float(circuit.evidence.induction.score[3, 1])
    assert row["effect"] == float(circuit.evidence.induction.lost[3, 1])
    assert (row["layer"], row["head"]) == (3, 1)
    assert table[table["role"] == "bigram"]["head"].isna().all()
    assert table[table["named"]]["effect"].notna().all()


def test_evidence_shows_itself_as_text_and_html(found):
    evidence = found[1].evidence
    text, html = str(evidence), evidence._repr_html_()
    assert max(map(len, text.splitlines()[4:-1])) <= 120
    for part in ("L1H0", "L3H2", "L3MLP", "previous-token head"):
        assert part in text
        assert part in html
    assert html.count('role="img"') == 1


def test_the_picture_frames_the_named_heads(found):
    circuit = found[1]
    figure = circuit.evidence.picture().figure
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "head"]
    for ax, role in zip(panels, ("previous_token", "induction"), strict=True):
        frames = [patch for patch in ax.patches if isinstance(patch, matplotlib.patches.Rectangle)]
        corners = {(frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in frames}
        assert corners == {(part.head, part.layer) for part in getattr(circuit, role)}
        assert ax.get_ylabel() == "layer"
        close(torch.as_tensor(ax.images[0].get_array()), getattr(circuit.evidence, role).score)
    bars = next(ax for ax in figure.axes if "share" in ax.get_xlabel())
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx(circuit.evidence.bigram.share.tolist())
    assert circuit.evidence.picture().png()[:4] == b"\x89PNG"


# Refusals

small = hooked()

test_what_is_no_token_is_refused = refused(
    ValueError,
    {
        "vocabulary holds token id 7; the vocabulary has ids 0 to 6": lambda: hl.find_circuit(small, vocabulary=[7]),
        "vocabulary must be one or several different tokens, got .1, 1.": lambda: hl.find_circuit(
            small, vocabulary=[1, 1]
        ),
        "triggers holds token id 9": lambda: hl.find_circuit(small, triggers=9),
        "triggers holds the text 'x', but the model has no tokenizer": lambda: hl.find_circuit(small, triggers="x"),
        "triggers must be among the vocabulary's tokens, got 6": lambda: hl.find_circuit(
            small, triggers=6, vocabulary=[0, 1, 2, 3]
        ),
        "n_prompts must be at least 8, got 7": lambda: hl.find_circuit(small, n_prompts=7),
        "period must be at least 3, got 2": lambda: hl.find_circuit(small, period=2),
        "needs a vocabulary of 4 and a context of 7; got 3 and 12": lambda: hl.find_circuit(
            small, vocabulary=[0, 1, 2]
        ),
        "got 7 and 6": lambda: hl.find_circuit(hooked(n_ctx=6)),
        "role must be one of 'previous_token', 'induction', 'bigram', got 'copy'": lambda: hl.find_circuit(
            small
        ).evidence.verdict("copy"),
    },
)

test_what_is_of_another_type_is_refused = refused(
    TypeError,
    {
        "model must be a HookedTransformer or TransformerBridge, got 3": lambda: hl.find_circuit(3),
        "triggers must be a list of tokens, each a text or an id, got 0.5": lambda: hl.find_circuit(
            small, triggers=0.5
        ),
        "n_prompts must be an int, got 9.5": lambda: hl.find_circuit(small, n_prompts=9.5),
        "period must be an int, got None": lambda: hl.find_circuit(small, period=None),
        "seed must be an int, a torch.Generator or None, got 'a'": lambda: hl.find_circuit(small, seed="a"),
    },
)
