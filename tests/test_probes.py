"""The probes and the fit: against models whose memories are known, and against loops that are slow and plain."""

import math
import signal
from dataclasses import fields

import pytest
import torch
from models_for_tests import close, perturbed, prompts
from trainable_for_tests import LANGUAGE, TRIGGERS, build, shaken

import hijack_lens as hl
from hijack_lens import theory
from hijack_lens.training import FittedStrengths, behaviour, memory_recall, theory_agreement
from hijack_lens.training.forward import PlainForward

ENTROPY_RATE = LANGUAGE.entropy_rate
STRENGTHS = hl.Strengths(previous_token=11.0, match=5.0, copy=7.0, bigram=1.0)
NORMS = [None, "LN", "RMS"]


@pytest.fixture(autouse=True)
def _each_test_has_the_language_to_itself():
    before = LANGUAGE.long_run.clone()
    yield
    LANGUAGE.long_run.copy_(before)


def handwritten(language=LANGUAGE, strengths=STRENGTHS, n_ctx=40, **options):
    return hl.associative_transformer(
        language, strengths=strengths, n_ctx=n_ctx, dtype=torch.float64, device="cpu", **options
    )


def sequences(n=6, length=14, seed=0, triggers=TRIGGERS, language=LANGUAGE, **options):
    return language.sample(n, length, triggers, seed=seed, **options)


# Memory recall


@pytest.mark.parametrize("triggers", [None, TRIGGERS])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_handwritten_model_recalls_everything_by_as_much_as_was_written(positions, triggers):
    model = handwritten(positions=positions, triggers=triggers)
    scores = memory_recall(model, 20, triggers)
    for memory, strength in (("previous_token", 11), ("match", 5), ("copy", 7)):
        assert scores[f"{memory}_recall"] == 1
        assert scores[f"{memory}_margin"] == pytest.approx(strength, abs=1e-9)
    if triggers:
        assert scores["bigram_kl"] == pytest.approx(0, abs=1e-12)


def test_a_bigram_memory_that_is_twice_as_strong_is_off_by_a_known_divergence():
    model = handwritten(strengths=hl.Strengths(11.0, 5.0, 7.0, 2.0))
    expected = 0.0
    for v, row in enumerate(LANGUAGE.pi_b.tolist()):
        total = sum(p**2 for p in row)
        expected += float(LANGUAGE.long_run[v]) * sum(p * math.log(p / (p**2 / total)) for p in row)
    assert memory_recall(model, 10)["bigram_kl"] == pytest.approx(expected, abs=1e-10)
    others = [v for v in range(8) if v not in TRIGGERS]
    kl = {v: sum(p * math.log(sum(r**2 for r in row) / p) for p in row) for v, row in enumerate(LANGUAGE.pi_b.tolist())}
    weight = {v: float(LANGUAGE.long_run[v]) for v in others}
    expected = sum(weight[v] * kl[v] for v in others) / sum(weight.values())
    assert memory_recall(model, 10, TRIGGERS)["bigram_kl"] == pytest.approx(expected, abs=1e-10)


def test_only_keys_that_were_written_are_recalled():
    model = handwritten(triggers=TRIGGERS)
    assert memory_recall(model, 20, TRIGGERS)["match_recall"] == 1
    others = [token for token in range(8) if token not in TRIGGERS]
    assert memory_recall(model, 20, others)["match_recall"] == 0
    assert memory_recall(model, 20)["match_recall"] == pytest.approx(len(TRIGGERS) / 8)
    absolute = handwritten(positions="absolute", n_ctx_train=11)
    assert memory_recall(absolute, 11)["previous_token_recall"] == 1
    assert memory_recall(absolute, 21)["previous_token_recall"] == pytest.approx(10 / 20)


def test_asking_changes_neither_the_model_nor_its_language():
    model = handwritten()
    before = LANGUAGE.long_run.clone(), ENTROPY_RATE
    memory_recall(model, 10, TRIGGERS)
    assert torch.equal(model.language.long_run, before[0])
    fresh = hl.BigramLanguage(LANGUAGE.pi_b, LANGUAGE.pi_u)
    memory_recall(handwritten(fresh), 10, TRIGGERS)
    assert fresh.entropy_rate == pytest.approx(before[1], abs=1e-9)


def scaleless(norm, x):
    """A norm without its scale and bias."""
    if norm is None or not hasattr(norm, "w"):
        return x
    return (x - x.mean() if hasattr(norm, "b") else x) * norm.w


def recall_by_hand(rows):
    """From (own score, others' scores): recall and mean margin."""
    margins = [own - max(others) for own, others in rows]
    return sum(m > 0 for m in margins) / len(margins), sum(margins) / len(margins)


def memories_by_hand(model, head, length, triggers):
    """Recall and margin of each memory through the one head of each layer, token by token."""
    first, last = model.blocks[0], model.blocks[-1]
    attn, late = first.attn, last.attn
    found = {}

    def query(x):
        return scaleless(first.ln1, x) @ attn.W_Q[head] + attn.b_Q[head]

    rows = []
    if model.positions == "relative":
        for e in model.W_E:
            scores = [float(query(e) @ r) / attn.attn_scale for r in attn.W_R[head]] + [0.0]
            rows.append((scores[1], scores[:1] + scores[2:]))
    elif model.positions == "absolute":
        for t in range(1, length):
            keys = [scaleless(first.ln1, model.W_pos[s]) @ attn.W_K[head] for s in range(t + 1)]
            scores = [float(query(model.W_pos[t]) @ key) / attn.attn_scale for key in keys]
            rows.append((scores[t - 1], scores[: t - 1] + scores[t:]))
    found["previous_token"] = recall_by_hand(rows) if rows else (math.nan, math.nan)

    rows = []
    remembered = [scaleless(first.ln1, e) @ attn.W_V[head] @ attn.W_O[head] for e in model.W_E]
    for k in triggers:
        q = scaleless(last.ln1, model.W_E[k]) @ late.W_Q[head] + late.b_Q[head]
        scores = [float(q @ (scaleless(last.ln1, r) @ late.W_K[head])) / late.attn_scale for r in remembered]
        rows.append((scores[k], scores[:k] + scores[k + 1 :]))
    found["match"] = recall_by_hand(rows)

    rows = []
    for k, e in enumerate(model.W_E):
        written = scaleless(last.ln1, e) @ late.W_V[head] @ late.W_O[head]
        logits = (scaleless(getattr(model, "ln_final", None), written) @ model.W_U).tolist()
        rows.append((logits[k], logits[:k] + logits[k + 1 :]))
    found["copy"] = recall_by_hand(rows)
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["relative", "absolute", "rotary", "none"])
def test_memories_of_a_random_model_are_those_of_a_slow_loop(positions, norm):
    model = shaken(build(positions, norm=norm), 0.5)
    scores = memory_recall(model, 9, TRIGGERS)
    for memory, (recall, margin) in memories_by_hand(model, 0, 9, TRIGGERS).items():
        assert scores[f"{memory}_recall"] == pytest.approx(recall, abs=1e-12, nan_ok=True), memory
        assert scores[f"{memory}_margin"] == pytest.approx(margin, abs=1e-9, nan_ok=True), memory


def test_of_several_heads_the_best_one_counts():
    model = shaken(build(n_heads=2), 0.5)
    scores = memory_recall(model, 9, TRIGGERS)
    each = [memories_by_hand(model, head, 9, TRIGGERS) for head in (0, 1)]
    for memory in ("previous_token", "copy"):
        assert (scores[f"{memory}_recall"], scores[f"{memory}_margin"]) == pytest.approx(max(e[memory] for e in each))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mlp", ["relu", "linear", None])
def test_the_bigram_memory_is_the_model_without_attention(norm, mlp):
    model = shaken(build(mlp=mlp, norm=norm), 0.3)
    off = [(f"blocks.{layer}.hook_attn_out", lambda out, hook: out * 0) for layer in (0, 1)]
    logits = model.run_with_hooks(torch.arange(8)[:, None], fwd_hooks=off)[:, 0]
    weight, expected = 0.0, 0.0
    for v in range(8):
        if v not in TRIGGERS:
            weight += float(LANGUAGE.long_run[v])
            difference = LANGUAGE.pi_b[v].log() - logits[v].log_softmax(-1)
            expected += float(LANGUAGE.long_run[v] * (LANGUAGE.pi_b[v] * difference).sum())
    assert memory_recall(model, 9, TRIGGERS)["bigram_kl"] == pytest.approx(expected / weight, abs=1e-10)


def test_one_layer_has_no_previous_token_memory_to_ask():
    scores = memory_recall(shaken(build(n_layers=1)), 9, TRIGGERS)
    for name in ("previous_token_recall", "previous_token_margin", "match_recall", "match_margin"):
        assert math.isnan(scores[name]), name
    assert not math.isnan(scores["copy_recall"])


def test_asking_beyond_the_positions_that_there_are_is_refused(unchecked):
    with pytest.raises(ValueError, match="length"):
        memory_recall(build("absolute"), 33)


def test_triggers_outside_the_vocabulary_are_refused(unchecked):
    for bad in ([8], [-1]):
        with pytest.raises(ValueError, match="trigger"):
            memory_recall(build(), 9, bad)


# Behaviour


def behaviour_by_hand(model, data):
    """Each number by a loop over sequences and positions; of attentions, each head's."""
    logits, cache = model.run_with_cache(data.tokens)
    log_probs = logits.detach().log_softmax(-1)
    last, n_heads = model.cfg.n_layers - 1, model.cfg.n_heads
    lists = {name: [] for name in ("accuracy", "loss", "bigram", "excess")}
    previous, induction, correct = ([[] for _ in range(n_heads)] for _ in range(3))
    for b, row in enumerate(data.tokens.tolist()):
        triggers = data.triggers[b].tolist()
        for t, token in enumerate(row):
            for head in range(n_heads):
                if t > 0:
                    previous[head].append(float(cache["pattern", 0][b, head, t, t - 1]))
            if t + 1 == len(row):
                continue
            loss = -float(log_probs[b, t, row[t + 1]])
            if token not in triggers:
                lists["bigram"].append(loss)
                lists["excess"].append(loss + math.log(float(model.language.pi_b[token, row[t + 1]])))
            elif token in row[:t]:
                lists["accuracy"].append(int(log_probs[b, t].argmax()) == row[t + 1])
                lists["loss"].append(loss)
                for head in range(n_heads):
                    pattern = cache["pattern", last][b, head, t].tolist()
                    induction[head].append(sum(pattern[s] for s in range(1, t + 1) if row[s - 1] == token))
                    correct[head].append(row[pattern.index(max(pattern))] == row[t + 1])

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    return {
        "in_context_accuracy": mean(lists["accuracy"]),
        "in_context_loss": mean(lists["loss"]),
        "bigram_loss": mean(lists["bigram"]),
        "bigram_excess": mean(lists["excess"]),
        "previous_token_attention": max(map(mean, previous)) if last else math.nan,
        "induction_attention": max(map(mean, induction)),
        "attended_correct": max(map(mean, correct)),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"n_layers": 1}, {"n_layers": 3, "positions": "none"}, {"n_heads": 2}])
def test_behaviour_is_that_of_a_slow_loop(options, norm):
    model = shaken(build(norm=norm, **options), 0.5)
    for data in (sequences(), sequences(triggers=(), n_triggers=3), sequences(continuations="bigram", seed=4)):
        found = behaviour(model, data)
        expected = behaviour_by_hand(model, data)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-10, nan_ok=True), name


def test_behaviour_of_a_model_with_noise_everywhere_is_that_of_a_slow_loop():
    model = perturbed(d_vocab=8, n_ctx=20)
    data = sequences(language=model.language)
    expected = behaviour_by_hand(model, data)
    assert behaviour(model, data) == pytest.approx(expected, abs=1e-10)


def test_a_handwritten_model_answers_everything_that_the_context_says():
    model = handwritten(strengths=hl.Strengths(30.0, 20.0, 40.0, 1.0), triggers=TRIGGERS)
    data = sequences(n=20, length=30)
    # The first position remembers itself as its own previous token: leave out the triggers that stand there.
    usual = ~torch.isin(data.tokens[:, 0], torch.tensor(TRIGGERS))
    assert int(usual.sum()) > 5
    scores = behaviour(model, hl.SampledSequences(*(getattr(data, field.name)[usual] for field in fields(data))))
    assert scores["in_context_accuracy"] == 1
    assert scores["in_context_loss"] < 1e-6
    assert scores["attended_correct"] == 1
    assert scores["induction_attention"] == pytest.approx(1, abs=1e-6)
    assert scores["previous_token_attention"] == pytest.approx(1, abs=1e-6)


def test_a_bigram_memory_alone_has_no_excess_loss():
    model = handwritten(strengths=hl.Strengths(30.0, 20.0, 0.0, 1.0))
    scores = behaviour(model, sequences(n=200, length=40, triggers=()))
    assert scores["bigram_excess"] == pytest.approx(0, abs=1e-10)
    assert scores["bigram_loss"] == pytest.approx(ENTROPY_RATE, abs=0.05)


def test_what_there_is_nothing_of_is_not_scored_rather_than_0():
    model = shaken(build())
    scores = behaviour(model, sequences(triggers=()))
    asked = ("in_context_accuracy", "in_context_loss", "induction_attention", "attended_correct")
    assert all(math.isnan(scores[name]) for name in asked)
    assert not math.isnan(scores["bigram_loss"])
    scores = behaviour(model, sequences(triggers=None))
    assert math.isnan(scores["bigram_loss"])
    assert math.isnan(scores["bigram_excess"])


def test_sequences_that_do_not_fit_the_model_are_refused(unchecked):
    with pytest.raises(ValueError, match="33 tokens"):
        behaviour(build(), sequences(length=33))
    with pytest.raises(ValueError, match="token id"):
        behaviour(build(), sequences(language=hl.BigramLanguage.dirichlet(30, seed=0), length=20))


# The fit


@pytest.mark.parametrize("triggers", [None, TRIGGERS, TRIGGERS[:1]])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize(
    "strengths", [STRENGTHS, hl.Strengths(), hl.Strengths(2.0, 0.5, 1.5, 0.3), hl.Strengths(40.0, 25.0, 60.0, 3.0)]
)
def test_a_handwritten_model_is_read_back(strengths, positions, triggers):
    model = handwritten(strengths=strengths, positions=positions, triggers=triggers)
    fit = hl.fit_strengths(model)
    assert fit.setting.triggers == tuple(model.triggers)
    for name in ("previous_token", "match", "copy", "bigram"):
        assert getattr(fit.strengths, name) == pytest.approx(getattr(strengths, name), abs=1e-4), name
        assert fit.purity[name] == pytest.approx(1, abs=1e-9), name


def test_up_to_where_absolute_positions_were_learned():
    fit = hl.fit_strengths(handwritten(positions="absolute", n_ctx_train=15))
    assert fit.strengths.previous_token == pytest.approx(11, abs=1e-6)
    assert (fit.setting.positions, fit.setting.n_ctx_train) == ("absolute", 15)
    assert fit.purity["previous_token"] == pytest.approx(1, abs=1e-9)


def test_asked_about_tokens_that_are_no_keys_the_match_is_0():
    model = handwritten(triggers=TRIGGERS)
    others = [token for token in range(8) if token not in TRIGGERS]
    fit = hl.fit_strengths(model, others)
    assert fit.strengths.match == pytest.approx(0, abs=1e-9)
    assert fit.setting.triggers == tuple(others)
    assert hl.fit_strengths(model, TRIGGERS).strengths.match == pytest.approx(5, abs=1e-9)


def test_memories_that_were_not_written_are_read_as_0_and_no_purity_is_beyond_1():
    fit = hl.fit_strengths(handwritten(strengths=hl.Strengths(0.0, 0.0, 0.0, 0.0)))
    assert fit.strengths == hl.Strengths(0.0, 0.0, 0.0, 1.0)
    close(fit.language.pi_b, torch.full((8, 8), 1 / 8, dtype=torch.float64))
    # Nothing was stored, so there is nothing of which a fraction is pure: 1 or NaN, but the same for each.
    values = list(fit.purity.values())
    assert all(math.isnan(value) for value in values) or values == [1.0] * 4


def test_a_random_model_is_not_pure():
    for seed in range(3):
        fit = hl.fit_strengths(shaken(build(seed=seed, d_model=32), 0.2, seed), TRIGGERS)
        for name in ("previous_token", "match", "copy", "bigram"):
            assert fit.purity[name] < (0.9 if name == "previous_token" else 0.5), name  # of offsets there are few
        assert set(fit.purity) == {"previous_token", "match", "copy", "bigram"}


def test_noise_lowers_the_purity_and_hardly_the_strengths():
    model = handwritten()
    shaken(model, 0.03)
    fit = hl.fit_strengths(model)
    assert fit.strengths.match == pytest.approx(5, rel=0.15)
    assert fit.strengths.copy == pytest.approx(7, rel=0.15)
    assert all(0.5 < value < 1 - 1e-6 for value in fit.purity.values())


def test_strength_and_purity_by_hand():
    model = shaken(handwritten(), 0.1)
    with torch.no_grad():
        model.W_pos.zero_()
    fit = hl.fit_strengths(model)
    attn = model.blocks[1].attn
    long_run = LANGUAGE.long_run / LANGUAGE.long_run.sum()

    def logits(written):
        """Of every token alone, with this from the last head and nothing from the first."""
        hooks = [("blocks.0.hook_attn_out", lambda out, hook: out * 0)]
        hooks.append(("blocks.1.hook_attn_out", lambda out, hook: out * 0 + written))
        return model.run_with_hooks(torch.arange(8)[:, None], fwd_hooks=hooks)[:, 0].detach()

    weight = long_run.tolist()
    strength, spread, error = 0.0, 0.0, 0.0
    table = [(long_run @ (logits(e @ attn.W_V[0] @ attn.W_O[0]) - logits(0.0))).tolist() for e in model.W_E]
    rest = [(sum(row) - row[k]) / 7 for k, row in enumerate(table)]
    strength = sum(weight[k] * (table[k][k] - rest[k]) for k in range(8))
    for k, row in enumerate(table):
        for u, score in enumerate(row):
            spread += weight[k] * (score - rest[k]) ** 2
            error += weight[k] * (score - rest[k] - (strength if u == k else 0)) ** 2
    assert fit.strengths.copy == pytest.approx(strength, abs=1e-9)
    assert fit.purity["copy"] == pytest.approx(1 - error / spread, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "rotary"}, "relative or absolute positions, got 'rotary'"),
        ({"positions": "none"}, "relative or absolute positions, got 'none'"),
        ({"n_heads": 2}, "one previous-token and one induction head"),
        ({"n_layers": 1}, "one previous-token and one induction head"),
    ],
)
def test_models_of_another_kind_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        hl.fit_strengths(build(**options))


def test_keys_that_are_none_are_refused(unchecked):
    for bad, message in (([99], "99"), (["no such"], "no such"), ([1, 1], "distinct"), ([], "trigger")):
        with pytest.raises(ValueError, match=message):
            hl.fit_strengths(build(), bad)


# Theory and model


@pytest.mark.parametrize("triggers", [None, TRIGGERS])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_the_theory_agrees_with_a_handwritten_model(positions, triggers):
    model = handwritten(positions=positions, triggers=triggers)
    agreement = theory_agreement(model, hl.fit_strengths(model), n_prompts=40, length=30)
    assert agreement.r2 == pytest.approx(1, abs=1e-9)
    assert agreement.winners == 1
    table = agreement.table
    assert list(table.columns) == ["trigger", "in_context", "global", "repeats", "theory_margin", "model_margin"]
    assert len(table) == 40
    assert list(table["theory_margin"]) == pytest.approx(list(table["model_margin"]), abs=1e-6)
    assert set(table["repeats"]) <= set(range(7))
    assert table["repeats"].nunique() > 3
    assert set(table["trigger"]) <= {LANGUAGE.tokens[i] for i in model.triggers}
    assert (table["trigger"] != table["in_context"]).all()
    assert (table["in_context"] != table["global"]).all()
    for _, row in table.iterrows():
        assert LANGUAGE.global_candidate(row["trigger"]) == LANGUAGE.index(row["global"])


def test_r2_of_logits_that_are_wrong_in_a_known_way():
    model = handwritten()
    for factor, expected in ((1.0, 1.0), (0.0, 0.0), (2.0, 0.0), (0.5, 0.75), (3.0, -3.0)):
        wrong = hl.Strengths(11.0, 5.0, 7.0 * factor, factor)  # logits are linear in these two
        fit = FittedStrengths(theory.Setting(wrong, model.triggers), LANGUAGE, {})
        agreement = theory_agreement(model, fit, n_prompts=20, length=20)
        assert agreement.r2 == pytest.approx(expected, abs=1e-9)
        if factor:
            assert agreement.winners == 1


def test_the_same_seed_asks_the_same_prompts(global_rng_untouched):
    model = handwritten()
    fit = hl.fit_strengths(model)
    one, same, other = (theory_agreement(model, fit, n_prompts=10, length=20, seed=seed).table for seed in (1, 1, 2))
    assert one.equals(same)
    assert not one.equals(other)


def test_a_model_without_memories_is_far_from_its_theory():
    model = shaken(build(d_model=32))
    agreement = theory_agreement(model, hl.fit_strengths(model, TRIGGERS), n_prompts=40, length=20)
    assert agreement.r2 < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompts": 0}, "n_prompts must be at least 1, got 0"),
        ({"length": 13}, "length must be at least 14, got 13"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"length": 41}, "length|n_ctx"),
    ],
)
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_prompts_that_cannot_be_asked_are_refused(positions, options, message, unchecked):
    model = handwritten(positions=positions)
    with pytest.raises(ValueError, match=message):
        theory_agreement(model, hl.fit_strengths(model), **{"length": 20, "n_prompts": 5, **options})


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm against an endless loop")
def test_a_language_without_any_conflict_is_refused_rather_than_searched_for_ever(unchecked):
    model = handwritten(hl.BigramLanguage([[0.5, 0.5], [0.3, 0.7]]))  # too few tokens for trigger and two candidates
    fit = hl.fit_strengths(model)

    def too_long(number, frame):
        pytest.fail("searched for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(ValueError, match=r"language|token"):
            theory_agreement(model, fit, n_prompts=5, length=20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_probes_take_float32_models_on_their_own_device():
    double, single = (shaken(build(seed=2)) for _ in range(2))
    single = single.float()
    for theirs, ours in (
        (memory_recall(double, 9, TRIGGERS), memory_recall(single, 9, TRIGGERS)),
        (behaviour(double, sequences()), behaviour(single, sequences())),
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
    tokens = prompts(2, 9, d_vocab=8)
    close(PlainForward(single)(tokens), PlainForward(double)(tokens).float(), atol=1e-4)
    assert theory.Strengths is hl.Strengths


@pytest.mark.parametrize("norm", NORMS)
def test_the_bigrams_that_the_weights_hold_are_the_models_own(norm):
    model = shaken(build(norm=norm))
    fit = hl.fit_strengths(model, TRIGGERS)
    off = [(f"blocks.{layer}.hook_attn_out", lambda out, hook: out * 0) for layer in (0, 1)]
    logits = model.run_with_hooks(torch.arange(8)[:, None], fwd_hooks=off)[:, 0].detach()
    assert fit.strengths.bigram > 0
    close((fit.strengths.bigram * fit.language.pi_b.log()).log_softmax(-1), logits.log_softmax(-1))
    assert fit.language.tokens == LANGUAGE.tokens


def test_gradient_steps_learn_each_memory_by_its_own_step(global_rng_untouched):
    language = hl.BigramLanguage.dirichlet(8, 20.0, seed=0)
    model, recalls = hl.training.gradient_steps(language, d_model=256, length=16, n_sequences=1536, n_triggers=2)
    assert list(recalls) == ["start", "copy", "match", "previous_token"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    learned = []
    for step in list(recalls)[1:]:
        learned.append(step)
        for memory in learned:
            enough = 0.3 if memory == "previous_token" else 0.8  # of so few sequences; all start from 0
            assert recalls[step][f"{memory}_recall"] > enough, (step, memory)
    for memory in ("copy", "match", "previous_token"):
        assert recalls["start"][f"{memory}_recall"] < 0.2, memory
    assert recalls["copy"]["match_recall"] < 0.2
    assert recalls["match"]["previous_token_recall"] < 0.2
    with pytest.raises(ValueError, match="n_sequences must be fewer: 1000000000 of length 16 are over 1,073,741,824"):
        hl.training.gradient_steps(language, length=16, n_sequences=10**9)
