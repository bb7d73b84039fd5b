"""Path patching sweeps against the network in plain torch, edge by edge."""

import contextlib
import math
from functools import partial

import pandas as pd
import plain_network
import pytest
import torch
from bridges_for_tests import gpt2_like, hooked_twin, llama_like, neox_like
from models_for_tests import CIRCUIT, HEADS, MLPS, close, hooked, native, perturbed, prompts
from refusals import refused

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.hooks import Edge, path_sweep

METRIC = hl.logit_diff(1, 2)
CLEAN, CORRUPTED = prompts(2, 6), prompts(2, 6, seed=5)

MODELS = {
    "handwritten": lambda: perturbed(),
    "LayerNorm": lambda: hooked("LN"),
    "no norm": lambda: hooked(None, "relu"),
}


@pytest.fixture(params=MODELS)
def model(request, unchecked):
    return MODELS[request.param]()


def truth(model, edge, base, source, metric=METRIC):
    """The metric where one edge's message is what it is in the source run."""
    sent = plain_network.run(model, source).sent

    def changed(sender, receiver, via, message):
        return sent[sender] if (sender, receiver, via) == (edge.sender, edge.receiver, edge.via) else message

    return float(metric(plain_network.run(model, base, changed).logits))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_edge_of_the_two_layer_model_is_what_plain_torch_says(model, direction):
    sweep = path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", direction)
    base, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    expected = [truth(model, edge, base, source) for edge in sweep.edges]
    close(sweep.values, torch.tensor(expected, dtype=torch.float64))
    assert sweep.effect.abs().max() > 0.1
    close(sweep.clean, float(METRIC(model(CLEAN).detach())))
    close(sweep.corrupted, float(METRIC(model(CORRUPTED).detach())))
    assert sweep.base == (sweep.corrupted if direction == "denoise" else sweep.clean)
    close(sweep.effect, sweep.values - sweep.base)
    close(sweep.normalised, (sweep.values - sweep.corrupted) / (sweep.clean - sweep.corrupted))


def test_all_means_every_edge_once(unchecked):
    edges = path_sweep(hooked(), CLEAN, CORRUPTED, METRIC, "all").edges
    senders = ["embed", "pos_embed", *HEADS[:2], MLPS[0], *HEADS[2:], MLPS[1]]
    vias = {"head": "qkv", "mlp": ["mlp_in"]}
    place = dict.fromkeys(senders[:2], 0) | {c: 1 + 2 * c.layer + (c.kind == "mlp") for c in senders[2:]}
    expected = [
        Edge(sender, receiver, via)
        for sender in senders
        for receiver in (*senders[2:], "unembed")
        if receiver == "unembed" or place[sender] < place[receiver]
        for via in (["unembed"] if receiver == "unembed" else vias[receiver.kind])
    ]
    assert list(edges) == expected
    assert len(edges) == 61


def test_the_circuit_is_the_models_own_unless_another_is_given(unchecked):
    model = hooked("LN")
    full = dict(zip(*_pair(path_sweep(model, CLEAN, CORRUPTED, METRIC, "all")), strict=True))
    own = path_sweep(model, CLEAN, CORRUPTED, METRIC)
    assert {end for edge in own.edges for end in (edge.sender, edge.receiver)} == {
        "embed",
        "pos_embed",
        "unembed",
        *(member for _, member in CIRCUIT),
    }
    for circuit in (CIRCUIT, [member for _, member in CIRCUIT], (MLPS[1], HEADS[2], HEADS[1], HEADS[2])):
        assert path_sweep(model, CLEAN, CORRUPTED, METRIC, circuit).edges == own.edges
    alone = path_sweep(model, CLEAN, CORRUPTED, METRIC, MLPS[0])
    assert {edge.receiver for edge in alone.edges} == {MLPS[0], "unembed"}
    for sweep in (own, alone):
        for edge, value in zip(*_pair(sweep), strict=True):
            close(value, full[edge], atol=1e-12)  # in a batch of other size
    some = path_sweep(model, CLEAN, CORRUPTED, METRIC, via=("k", "unembed"))
    assert some.edges == tuple(edge for edge in own.edges if edge.via in ("k", "unembed"))
    assert {edge.via for edge in path_sweep(model, CLEAN, CORRUPTED, METRIC, via="v").edges} == {"v"}


def _pair(sweep):
    return sweep.edges, sweep.values.tolist()


def patched_together(model, edges, source, tokens):
    """Logits with several edges patched at once."""
    _, cache = model.run_with_cache(source)
    with contextlib.ExitStack() as stack:
        for edge in edges:
            stack.enter_context(hooks.patch_path(model, edge.sender, edge.receiver, edge.via, cache))
        return model(tokens)


def test_all_edges_of_a_sender_at_once_patch_its_output(model):
    sweep = path_sweep(model, CLEAN, CORRUPTED, METRIC, "all")
    for sender in dict.fromkeys(edge.sender for edge in sweep.edges):
        mine = [edge for edge in sweep.edges if edge.sender == sender]
        with hooks.patch(model, f"hook_{sender}" if isinstance(sender, str) else sender, CLEAN):
            close(patched_together(model, mine, CLEAN, CORRUPTED), model(CORRUPTED))


def test_all_edges_out_of_the_embedding_or_into_the_unembedding_restore_the_clean_run(model):
    sweep = path_sweep(model, CLEAN, CORRUPTED, METRIC, "all")
    for side in ([e for e in sweep.edges if e.sender == "embed"], [e for e in sweep.edges if e.via == "unembed"]):
        restored = patched_together(model, side, CLEAN, CORRUPTED)
        close(restored, model(CLEAN), atol=1e-9)
        close(float(METRIC(restored.detach())), sweep.clean, atol=1e-9)


def test_the_same_prompt_changes_nothing_and_has_no_scale():
    sweep = path_sweep(hooked("LN"), CLEAN, CLEAN, METRIC)
    assert not sweep.effect.any()
    with pytest.raises(ValueError, match=r"'logit 1 − logit 2' is .* on the clean and on the corrupted run alike"):
        sweep.normalised
    assert "normalised" not in sweep.to_pandas()
    assert "None of the 24 edges has an effect." in str(sweep)


def test_a_metric_of_the_unpatched_runs_and_a_function_will_do(unchecked):
    model = hooked("LN")
    by_kl = path_sweep(model, CLEAN, CORRUPTED, hl.metrics.kl("clean"))
    assert by_kl.clean == pytest.approx(0, abs=1e-12)
    expected = hl.metrics.kl("clean").on(model, clean=model(CLEAN))
    for edge, value in zip(*_pair(by_kl), strict=True):
        close(value, truth(model, edge, CORRUPTED, CLEAN, expected))

    def mean_logit(logits):
        return logits[:, :, 3].mean().item()

    by_function = path_sweep(model, CLEAN, CORRUPTED, mean_logit)
    assert by_function.metric == "mean_logit"
    for edge, value in zip(*_pair(by_function), strict=True):
        close(value, truth(model, edge, CORRUPTED, CLEAN, mean_logit))


def test_it_sweeps_bridges(unchecked):
    gpt2 = gpt2_like()
    some = [hl.Component(0, "head", 1), hl.Component(1, "head", 2), hl.Component(1, "mlp")]
    sweep = path_sweep(gpt2, CLEAN, CORRUPTED, METRIC, some)
    for edge, value in zip(*_pair(sweep), strict=True):
        with hooks.patch_path(gpt2, edge.sender, edge.receiver, edge.via, CLEAN):
            close(value, float(METRIC(gpt2(CORRUPTED).detach())))
    llama = llama_like()
    with pytest.raises(ValueError, match=r"grouped-query.*patch other inputs"):
        path_sweep(llama, CLEAN, CORRUPTED, METRIC, some, method="forward")
    sweep = path_sweep(llama, CLEAN, CORRUPTED, METRIC, some, via=("q", "mlp_in", "unembed"), method="forward")
    assert {edge.via for edge in sweep.edges} == {"q", "mlp_in", "unembed"}
    assert "pos_embed" not in {edge.sender for edge in sweep.edges}  # turned, not added


@torch.no_grad()
def test_heads_that_share_keys_and_values_are_patched_one_by_one(unchecked):
    """As in the model that gives every head its own, run whole with hooks."""
    llama, own = llama_like(), hooked_twin(llama_like())
    own.set_ungroup_grouped_query_attention(True)
    metrics = METRIC, hl.logit_diff(3, 4, position=2), of_all_positions
    for metric in metrics[1:]:
        sweep = path_sweep(hooked_twin(llama), CLEAN, CORRUPTED, metric, "all")
        assert sweep.method == "incremental"
        close(sweep.values, path_sweep(own, CLEAN, CORRUPTED, metric, "all", method="forward").values)
    sweep = path_sweep(llama, CLEAN, CORRUPTED, METRIC, "all")
    assert {edge.via for edge in sweep.edges} == {"q", "k", "v", "mlp_in", "unembed"}
    expected = []
    for edge in sweep.edges:
        with hooks.patch_path(own, edge.sender, edge.receiver, edge.via, CLEAN):
            expected.append(float(METRIC(own(CORRUPTED))))
    close(sweep.values, torch.tensor(expected, dtype=torch.float64), atol=2e-6)  # the bridge rounds to float32 halfway
    assert all(any(abs(x) > 0.01 for x in _effects(sweep, via)) for via in "qkv")


def test_gradients_choose_which_edges_are_run_and_a_sample_bounds_what_was_missed(unchecked):
    model = hooked("LN", n_layers=3)
    every = path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", via=("q", "k", "unembed"))
    chosen = path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", via=("q", "k", "unembed"), exact=10, sample=15, seed=3)
    estimate = hooks.edge_attribution(model, CLEAN, CORRUPTED, METRIC, "all", via=("q", "k", "unembed"))
    largest = set(estimate.effect.abs().argsort(descending=True)[:10].tolist())
    exact, estimated = (dict(zip(one.edges, one.values.tolist(), strict=True)) for one in (every, estimate))
    assert chosen.edges == tuple(edge for place, edge in enumerate(every.edges) if place in largest)
    screen = chosen.screen
    assert screen.n_edges == len(every.edges)
    assert len(set(screen.drawn)) == 15
    assert not set(screen.drawn) & set(chosen.edges)
    for edges, values, truth_of in (
        (chosen.edges, chosen.values, exact),
        (screen.drawn, screen.values, exact),
        (chosen.edges, screen.estimates, estimated),
    ):
        close(values, torch.tensor([truth_of[edge] for edge in edges], dtype=torch.float64))
    again, other = (
        path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", via=("q", "k", "unembed"), exact=10, sample=15, seed=seed)
        for seed in (3, 4)
    )
    assert again.screen.drawn == screen.drawn != other.screen.drawn

    size = float((screen.values - chosen.base).abs().median())
    left = [abs(exact[edge] - every.base) > size for edge in every.edges if edge not in chosen.edges]
    seen = sum(abs(value - chosen.base) > size for value in screen.values.tolist())
    assert sum(left) <= chosen.missed(size) == brute_bound(seen, 15, len(left))
    assert chosen.missed(float(every.effect.abs().max())) == brute_bound(0, 15, len(left)) > 0
    assert every.missed(0) == path_sweep(model, CLEAN, CORRUPTED, METRIC, "all", exact=1000).missed(0.0) == 0
    assert f"Of the {len(left)} others, 15 drawn at random have effects of at most" in str(chosen)


def brute_bound(seen, drawn, population):
    """By counting draws: the most of a kind with which so few of it are drawn in 5% of draws or more."""
    fits = []
    for kind in range(population + 1):
        few = sum(math.comb(kind, k) * math.comb(population - kind, drawn - k) for k in range(seen + 1))
        fits.append(few / math.comb(population, drawn) >= 0.05)
    return max(kind for kind, fit in enumerate(fits) if fit)


def test_a_sweep_of_chosen_edges_is_saved_with_what_is_known_of_the_others(tmp_path, unchecked):
    sweep = path_sweep(hooked("LN"), CLEAN, CORRUPTED, METRIC, "all", exact=5, sample=200)
    assert len(sweep.screen.drawn) == 61 - 5
    sweep.save(tmp_path / "s.safetensors")
    loaded = hooks.PathSweep.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.screen.values, sweep.screen.values)
    assert torch.equal(loaded.screen.estimates, sweep.screen.estimates)
    assert (loaded.screen.drawn, loaded.screen.n_edges) == (sweep.screen.drawn, 61)
    assert loaded.missed(0.1) == int(((sweep.screen.values - sweep.base).abs() > 0.1).sum())


def _effects(sweep, via):
    return [value for edge, value in zip(sweep.edges, sweep.effect.tolist(), strict=True) if edge.via == via]


def of_all_positions(logits):
    return logits[:, :, 3].mean() - logits[:, 1, 2].mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda: hooked("LN", n_layers=3),
        lambda: hooked("LN", parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4),
        lambda: hooked(attn_only=True),
        lambda: perturbed(),
        neox_like,
        lambda: native("LN")[0],
    ],
    ids=["three layers", "parallel, rotary", "no MLPs", "relative positions", "GPT-NeoX", "native bridge"],
)
def test_what_is_computed_from_parts_is_what_whole_runs_give(build, unchecked):
    model, same_start = build(), torch.cat([CORRUPTED[:, :2], CLEAN[:, 2:]], 1)
    for metric, memory in ((METRIC, 0.25), (hl.logit_diff(1, 2, position=3), 1e-9), (of_all_positions, 1e-5)):
        ours = path_sweep(model, same_start, CORRUPTED, metric, "all", memory_gb=memory)
        whole = path_sweep(model, same_start, CORRUPTED, metric, "all", method="forward")
        assert (ours.method, whole.method) == ("incremental", "forward")
        close(ours.values, whole.values, atol=1e-9)
        assert float(whole.effect.abs().max()) > 0.01


def test_an_mlp_less_model_has_no_mlp_edges(unchecked):
    sweep = path_sweep(hooked(attn_only=True), CLEAN, CORRUPTED, METRIC, "all")
    assert {edge.via for edge in sweep.edges} == {"q", "k", "v", "unembed"}


def n_hooks(model):
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


def test_hooks_of_the_users_take_part_and_stay(unchecked):
    model, seen = hooked("LN"), []
    model.add_hook("blocks.0.hook_resid_pre", lambda activation, hook: seen.append(1))
    with hooks.ablate(model, HEADS[0]):
        before = n_hooks(model)
        sweep = path_sweep(model, CLEAN, CORRUPTED, METRIC)
        assert n_hooks(model) == before
        for edge, value in zip(*_pair(sweep), strict=True):
            with hooks.patch_path(model, edge.sender, edge.receiver, edge.via, CLEAN):
                close(value, float(METRIC(model(CORRUPTED).detach())))
    assert len(seen) > len(sweep.edges)
    assert n_hooks(model) == 1
    assert not torch.equal(path_sweep(model, CLEAN, CORRUPTED, METRIC).values, sweep.values)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_no_hook_behind(error, unchecked):
    model, calls = hooked("LN"), []

    def metric(logits):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return logits.sum()

    with pytest.raises(error):
        path_sweep(model, CLEAN, CORRUPTED, metric)
    assert n_hooks(model) == 0
    assert torch.is_grad_enabled()


def test_it_keeps_no_gradients_and_the_models_dtype():
    sweep = path_sweep(hooked("LN", dtype=torch.float32), CLEAN, CORRUPTED, METRIC)
    assert sweep.values.dtype == torch.float32
    assert not sweep.values.requires_grad


def test_edges_are_named_by_role_where_a_component_has_one_to_itself():
    edge = Edge(HEADS[1], HEADS[2], "k")
    assert str(edge) == "L0H1 → L1H0 k"
    assert edge.label(CIRCUIT) == "previous-token head → induction head k"
    assert str(Edge("embed", "unembed", "unembed")) == "embed → unembed"
    assert Edge(MLPS[1], "unembed", "unembed").label(CIRCUIT) == "bigram memory → unembed"
    shared = hl.Circuit(induction=(HEADS[2], HEADS[3]))
    assert Edge(HEADS[2], "unembed", "unembed").label(shared) == "L1H0 → unembed"


@pytest.fixture
def sweep():
    return path_sweep(hooked("LN"), CLEAN, CORRUPTED, METRIC, "all")


def test_a_table_has_a_row_per_edge(sweep):
    frame = sweep.to_pandas()
    assert list(frame) == ["sender", "receiver", "via", "value", "effect", "normalised"]
    at = sweep.edges.index(Edge(HEADS[1], HEADS[2], "k"))
    assert frame.loc[at, ["sender", "receiver", "via"]].tolist() == ["previous-token head", "induction head", "k"]
    close(torch.tensor(frame["value"].to_numpy()), sweep.values)
    close(torch.tensor(frame["effect"].to_numpy()), sweep.effect)
    close(torch.tensor(frame["normalised"].to_numpy()), sweep.normalised)


def test_in_a_terminal_it_shows_the_largest_effects_first(sweep):
    text = str(sweep)
    frame = sweep.to_pandas()
    first = frame.loc[frame["effect"].abs().idxmax()]
    row = next(line for line in text.splitlines() if line.startswith("│"))
    assert [first["sender"], first["receiver"], first["via"]] == [cell.strip() for cell in row.split("│")[1:4]]
    assert f"{first['effect']:+.4g}" in row
    assert text.startswith(f"PathSweep(edge=61); logit 1 − logit 2: {sweep.clean:+.4g} clean, {sweep.corrupted:+.4g}")
    shown = [line for line in text.splitlines() if line.startswith("│")]
    rest = frame["effect"].abs().sort_values(ascending=False).iloc[len(shown) :]
    assert f"{61 - len(shown)} more edges, with effects of at most {rest.max():.2g}." in text
    assert "\x1b" not in text


def test_in_a_notebook_it_shows_map_and_table(sweep):
    page = sweep._repr_html_()
    assert page.count('role="img"') == 1
    assert "style='text-align:left'>previous-token head</td>" in page
    assert page.count("<tr>") == 1 + sum(line.startswith("│") for line in str(sweep).splitlines())


def test_names_are_no_markup(unchecked):
    def metric(logits):
        return logits[:, -1, 1].mean()

    metric.__name__ = "<b>[red]x"
    sweep = path_sweep(hooked(), CLEAN, CORRUPTED, metric)
    assert "&lt;b&gt;[red]x" in sweep._repr_html_()
    assert "<b>[red]x, edge by edge" in str(sweep)


def test_the_map_shows_effects_and_leaves_what_is_no_edge_blank(sweep):
    picture = sweep.picture()
    ax, bar = picture.figure.axes
    image = ax.images[0].get_array()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    assert columns[:3] == ["embed", "pos_embed", "L0H0"]
    assert rows[-1] == "unembed"
    assert (~image.mask).sum() == len(sweep.edges)
    for edge, effect in zip(sweep.edges, sweep.effect.tolist(), strict=True):
        sender, _, receiver = edge.label(CIRCUIT).partition(" → ")
        assert image[rows.index(receiver), columns.index(sender)] == effect
    low, high = ax.images[0].get_clim()
    assert -low == high == pytest.approx(float(sweep.effect.abs().max()))
    assert ax.get_xlabel() == "sender (grey: no such edge)"
    assert ax.get_ylabel() == "receiver and its input"
    assert bar.get_ylabel() == "change of logit 1 − logit 2"
    assert len(ax.texts) == len(sweep.edges)
    assert picture.png().startswith(b"\x89PNG")


def test_what_was_not_scored_is_blank_in_the_map_and_last_in_the_table(sweep):
    values = sweep.values.clone()
    values[int(sweep.effect.abs().argmax())] = torch.nan
    partial_sweep = hooks.PathSweep(values, sweep.edges, "m", sweep.base, sweep.source, "denoise", "gradient", CIRCUIT)
    assert (~partial_sweep.picture().figure.axes[0].images[0].get_array().mask).sum() == 60
    assert "nan" not in str(partial_sweep)


def test_saved_and_loaded_it_is_the_same(sweep, tmp_path, unchecked):
    sweep.save(tmp_path / "s.safetensors")
    loaded = hooks.PathSweep.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.values, sweep.values)
    assert (loaded.edges, loaded.circuit, loaded.metric) == (sweep.edges, sweep.circuit, sweep.metric)
    assert loaded.method == sweep.method == "incremental"
    assert (loaded.base, loaded.source, loaded.direction) == (sweep.base, sweep.source, sweep.direction)
    pd.testing.assert_frame_equal(loaded.to_pandas(), sweep.to_pandas())
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        hooks.PathSweep.load(tmp_path / "t.safetensors")


def test_values_must_fit_the_edges(unchecked):
    with pytest.raises(ValueError, match=r"values must have shape \(1,\), got \(2,\)"):
        hooks.PathSweep(torch.zeros(2), (Edge("embed", "unembed", "unembed"),), "m", 0.0, 1.0, "noise", "forward")


def without_circuit():
    model = hooked()
    del model.circuit
    return model


def with_hook():
    model = hooked()
    model.add_hook("hook_embed", lambda activation, hook: None)
    return model


sweep_of = partial(path_sweep, metric=METRIC)

test_wrong_types = refused(
    TypeError,
    {
        "metric must be a hijack_lens Metric or a function of logits, got 3": lambda: path_sweep(
            hooked(), CLEAN, CORRUPTED, 3
        ),
        r"metric must give one number per run, got a tensor of shape \(2, 6, 7\)": lambda: path_sweep(
            hooked(), CLEAN, CORRUPTED, lambda logits: logits
        ),
        "metric must give one number per run, got 'x'": lambda: path_sweep(hooked(), CLEAN, CORRUPTED, lambda _: "x"),
        "model must be a HookedTransformer or TransformerBridge, got 1": lambda: sweep_of(1, CLEAN, CORRUPTED),
        'components must be a Component, .* a Circuit, .* or "all"; got 7': lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components=7
        ),
        r"components must be a Component, .* got \(0, 1\)": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components=[(0, 1)]
        ),
        "circuit must be a Circuit, got 'L0H1'": lambda: sweep_of(hooked(), CLEAN, CORRUPTED, circuit="L0H1"),
        "via must be one or several of 'q', .*, got 2": lambda: sweep_of(hooked(), CLEAN, CORRUPTED, via=2),
    },
)

test_wrong_values = refused(
    ValueError,
    {
        r"clean and corrupted must have one shape \[batch, pos\], got \(2, 6\) and \(2, 5\)": lambda: sweep_of(
            hooked(), CLEAN, prompts(2, 5)
        ),
        "direction must be one of 'denoise', 'noise', got 'up'": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, direction="up"
        ),
        "components must be given, since the model has no circuit": lambda: sweep_of(
            without_circuit(), CLEAN, CORRUPTED
        ),
        "components must be a Component, .* got 'both'": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components="both"
        ),
        "components must name at least one, got none": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components=hl.Circuit()
        ),
        "components: L2H0 is in layer 2; the model has 2": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components=hl.Component(2, "head", 0)
        ),
        "via must be one of 'q', .*, got 'z'": lambda: sweep_of(hooked(), CLEAN, CORRUPTED, via=("q", "z")),
        "via='mlp_in': the components have no such inputs": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, components=HEADS, via="mlp_in"
        ),
        "metric 'logit 1 − logit 2' reads position 9; the prompts have 6": lambda: path_sweep(
            hooked(), CLEAN, CORRUPTED, hl.logit_diff(1, 2, position=9)
        ),
        "grouped-query.*set_ungroup_grouped_query_attention": lambda: sweep_of(
            hooked(n_key_value_heads=1), CLEAN, CORRUPTED, method="forward"
        ),
        "method='incremental' cannot run this HookedTransformer: there are hooks on the model": lambda: sweep_of(
            with_hook(), CLEAN, CORRUPTED, method="incremental"
        ),
        "exact must be at least 1, got 0": lambda: sweep_of(hooked(), CLEAN, CORRUPTED, exact=0),
        "sample must be at least 1, got 0": lambda: sweep_of(hooked(), CLEAN, CORRUPTED, exact=1, sample=0),
        "size must be a finite number >= 0, got -1": lambda: sweep_of(hooked(), CLEAN, CORRUPTED).missed(-1),
        "method must be one of 'auto', 'incremental', 'forward', got 'fast'": lambda: sweep_of(
            hooked(), CLEAN, CORRUPTED, method="fast"
        ),
    },
)


def test_bad_arguments_are_refused_before_the_model_runs(unchecked):
    model, runs = hooked(), []
    model.add_hook("hook_embed", lambda activation, hook: runs.append(1))
    for arguments in ({"metric": 3}, {"circuit": "both"}, {"via": "z"}, {"circuit": hl.Component(2, "mlp")}):
        with pytest.raises((TypeError, ValueError)):
            path_sweep(model, CLEAN, CORRUPTED, **{"metric": METRIC, **arguments})
    assert not runs
