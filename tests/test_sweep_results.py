"""What a sweep returns: labels that fit, numbers on the right scale, tables, files and heat maps."""

import json
import math
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
from bridges_for_tests import gpt2_like
from models_for_tests import close, hooked, prompts
from refusals import refused
from safetensors.torch import load_file, safe_open, save_file

import hijack_lens as hl
from hijack_lens.hooks import Sweep, ablate_sweep, patch_sweep

CLEAN, CORRUPTED = prompts(2, 4, seed=3), prompts(2, 4, seed=4)
METRIC = hl.logit_diff(1, 2)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model():
    return hooked("LN", n_layers=3)


@pytest.fixture(scope="module")
def sweeps(model):
    """One of each kind."""
    texts = "one two three", "one five three"
    return {
        "denoise": patch_sweep(model, CLEAN, CORRUPTED, METRIC),
        "noise": patch_sweep(model, CLEAN, CORRUPTED, METRIC, direction="noise"),
        "heads": patch_sweep(model, CLEAN, CORRUPTED, METRIC, ("z", "pattern"), [3, 0], layers=(2, 0), units=1),
        "neurons": patch_sweep(model, CLEAN, CORRUPTED, METRIC, "post", units=(4, 7, 9), direction="noise"),
        "all": patch_sweep(model, CLEAN, CORRUPTED, METRIC, ("q", "k", "v"), "all"),
        "ablate": ablate_sweep(model, CLEAN, METRIC, "z"),
        "text": patch_sweep(gpt2_like(), *texts, hl.logit_diff("one", "two"), positions=[2, 0]),
        "single precision": patch_sweep(hooked(dtype=torch.float32), CLEAN, CORRUPTED, METRIC),
    }  # fmt: skip


KINDS = ("denoise", "noise", "heads", "neurons", "all", "ablate", "text", "single precision")


@pytest.fixture(params=KINDS)
def sweep(sweeps, request):
    return sweeps[request.param]


def unit_labels(sweep):
    return sweep.units if sweep.unit else (None,)


def test_the_axes_are_activations_layers_positions_and_units(sweeps):
    axes = ("activation", "layer", "position")
    expected = {
        "denoise": (axes, ("resid_pre", "attn_out", "mlp_out"), (0, 1, 2), (0, 1, 2, 3), None, ()),
        "heads": ((*axes, "head"), ("z", "pattern"), (2, 0), (3, 0), "head", (1,)),
        "neurons": ((*axes, "neuron"), ("post",), (0, 1, 2), (0, 1, 2, 3), "neuron", (4, 7, 9)),
        "all": ((*axes, "head"), ("q", "k", "v"), (0, 1, 2), (None,), "head", (0, 1)),
        "text": (axes, ("resid_pre", "attn_out", "mlp_out"), (0, 1), (2, 0), None, ()),
    }
    for kind, labels in expected.items():
        sweep = sweeps[kind]
        assert (sweep.axes, sweep.activations, sweep.layers, sweep.positions, sweep.unit, sweep.units) == labels
        sizes = [len(one) for one in labels[1:4]] + ([len(labels[5])] if labels[4] else [])
        assert list(sweep.values.shape) == sizes
    assert sweeps["denoise"].values.dtype == torch.float64
    assert sweeps["single precision"].values.dtype == torch.float32
    assert sweeps["text"].texts == ("five", "<end>")
    assert sweeps["denoise"].texts is None
    assert {kind: sweeps[kind].direction for kind in ("denoise", "noise", "ablate")} == {
        kind: kind for kind in ("denoise", "noise", "ablate")
    }
    assert sweeps["denoise"].metric == METRIC.name


def test_a_function_gives_the_sweep_its_name(model):
    def surprise(logits):
        return logits[0, -1, 0]

    assert patch_sweep(model, CLEAN, CORRUPTED, surprise, "attn_out", 0).metric == "surprise"


def test_effects_are_from_the_unpatched_run(sweep):
    close(sweep.effect, sweep.values - sweep.base)
    assert sweep.effect.abs().max() > 0.01


def test_zero_is_the_corrupted_run_and_one_the_clean_one(model, sweeps):
    with torch.no_grad():
        clean, corrupted = (float((run[:, -1, 1] - run[:, -1, 2]).mean()) for run in map(model, (CLEAN, CORRUPTED)))
    for direction in ("denoise", "noise"):
        sweep = sweeps[direction]
        close(sweep.clean, clean)
        close(sweep.corrupted, corrupted)
        close(sweep.base, corrupted if direction == "denoise" else clean)
        close(sweep.source, clean if direction == "denoise" else corrupted)
        close(sweep.normalised, (sweep.values - corrupted) / (clean - corrupted))
        # Patching all of the stream makes it the other run.
        whole = patch_sweep(model, CLEAN, CORRUPTED, METRIC, "resid_pre", "all", direction).normalised
        close(whole, torch.full_like(whole, float(direction == "denoise")))
        # And what can change nothing stays what it was.
        same = patch_sweep(model, CLEAN, CORRUPTED, hl.logit_diff(1, 2, position=0), "z", 3, direction).normalised
        close(same, torch.full_like(same, float(direction == "noise")), atol=0)


def test_there_is_no_such_scale_for_ablations_nor_where_both_runs_score_alike(model, sweeps):
    ablated = sweeps["ablate"]
    assert ablated.clean == ablated.base
    for get in (lambda: ablated.corrupted, lambda: ablated.normalised, lambda: ablated.picture(normalised=True)):
        with pytest.raises(ValueError, match="ablations have no corrupted run"):
            get()
    alike = patch_sweep(model, CLEAN, CLEAN, METRIC)
    for get in (lambda: alike.normalised, lambda: alike.picture(normalised=True)):
        with pytest.raises(ValueError, match=r"metric 'logit 1 − logit 2' is .* on the clean and on the corrupted run"):
            get()
    assert alike.picture().png().startswith(PNG)


def test_a_component_alone_is_a_sweep(sweeps):
    for at, component in enumerate(("q", "k", "v")):
        one = sweeps["all"][component]
        assert one.activations == (component,)
        assert torch.equal(one.values, sweeps["all"].values[at : at + 1])
        assert (one.layers, one.positions, one.units, one.base) == ((0, 1, 2), (None,), (0, 1), sweeps["all"].base)
        assert one.axes == sweeps["all"].axes
    with pytest.raises(KeyError, match="'z' was not swept; there are q, k, v"):
        sweeps["all"]["z"]


def test_the_table_has_a_row_per_patch(sweep):
    frame = sweep.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == sweep.values.numel()
    expected = [*sweep.axes, "value", "effect"]
    expected[3:3] = ["token"] if sweep.texts else []
    assert list(frame.columns) == expected
    rows = iter(frame.itertuples(index=False))
    for c, component in enumerate(sweep.activations):
        for i, layer in enumerate(sweep.layers):
            for p, position in enumerate(sweep.positions):
                for u, unit in enumerate(unit_labels(sweep)):
                    row, value = next(rows), float(sweep.values[c, i, p] if unit is None else sweep.values[c, i, p, u])
                    assert (row.activation, row.layer, row.value) == (component, layer, value)
                    assert row.position == position or (position is None and pd.isna(row.position))
                    assert row.effect == pytest.approx(value - sweep.base, abs=1e-6)
                    assert unit is None or getattr(row, sweep.unit) == unit
                    assert sweep.texts is None or row.token == sweep.texts[p]


def test_half_precision_has_a_table_too():
    sweep = patch_sweep(hooked("LN", dtype=torch.bfloat16), CLEAN, CORRUPTED, METRIC, "resid_pre")
    assert sweep.values.dtype == torch.float32
    assert sweep.picture().png().startswith(PNG)
    assert sweep.to_pandas()["value"].tolist() == sweep.values.flatten().tolist()


def test_its_repr_names_the_largest_effects(sweeps):
    text = repr(sweeps["heads"]).splitlines()
    assert text[0].startswith("Sweep(activation=2, layer=2, position=2, head=1) of logit 1 − logit 2, denoise, by ")
    assert f"unpatched: {sweeps['heads'].base:.4g}, source run: {sweeps['heads'].source:.4g}" in text[0]
    assert len(text) == 6
    frame = sweeps["heads"].to_pandas()
    frame = frame.iloc[frame["effect"].abs().sort_values(ascending=False, kind="stable").index]
    for line, row in zip(text[1:], frame.itertuples(), strict=False):
        place = f"  {row.activation} layer {row.layer} head {row.head}, position {row.position}: "
        assert line == f"{place}{row.value:.4g} ({row.effect:+.4g})"
    assert "source run" not in repr(sweeps["ablate"])
    assert "ablate" in repr(sweeps["ablate"])
    assert ", all positions: " in repr(sweeps["all"])
    assert "position 2 'five': " in repr(sweeps["text"])
    assert " neuron " in repr(sweeps["neurons"])
    with_gaps = replace(sweeps["ablate"], values=torch.full_like(sweeps["ablate"].values, math.nan))
    assert "nan" in repr(with_gaps)


# Files


def same(one, other):
    assert torch.equal(one.values, other.values)
    assert one.values.dtype == other.values.dtype
    for field in fields(Sweep):
        if field.name != "values":
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            assert (mine, type(mine)) == (theirs, type(theirs)), field.name


def test_a_sweep_comes_back_bit_by_bit(sweep, tmp_path):
    path = tmp_path / "some sweep.safetensors"
    sweep.save(path)
    loaded = Sweep.load(path)
    same(loaded, sweep)
    assert repr(loaded) == repr(sweep)
    pd.testing.assert_frame_equal(loaded.to_pandas(), sweep.to_pandas())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded["attn_out" if "attn_out" in sweep.activations else sweep.activations[0]].save(str(path))  # over itself
    assert len(Sweep.load(str(path)).activations) == 1


def rewritten(path, change_header=lambda header: None, change_tensors=lambda tensors: None):
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["hijack_lens"])
    tensors = load_file(path)
    change_header(header)
    change_tensors(tensors)
    save_file(tensors, path, {"hijack_lens": json.dumps(header)})


DAMAGE = {
    "no such file": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("component,layer,value\n"),
    "no header": lambda path: save_file(load_file(path), path),
    "another kind of file": lambda path: rewritten(path, lambda header: header.update(format="hijack_lens.Other.1")),
    "no format": lambda path: rewritten(path, lambda header: header.pop("format")),
    "a field too few": lambda path: rewritten(path, lambda header: header.pop("base")),
    "a field too many": lambda path: rewritten(path, lambda header: header.update(colour="red")),
    "no values": lambda path: rewritten(path, change_tensors=lambda tensors: tensors.update(x=tensors.pop("values"))),
    "more tensors": lambda path: rewritten(path, change_tensors=lambda tensors: tensors.update(other=torch.zeros(1))),
    "a layer too few": lambda path: rewritten(path, lambda header: header["layers"].pop()),
    "another shape": lambda path: rewritten(
        path, change_tensors=lambda tensors: tensors.update(values=tensors["values"].flatten())
    ),
    "a unit too many": lambda path: rewritten(path, lambda header: header.update(unit="head", units=[0])),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused(kind, sweeps, tmp_path, unchecked):
    path = tmp_path / "sweep.safetensors"
    sweeps["denoise"].save(path)
    DAMAGE[kind](path)
    with pytest.raises(ValueError, match=r"sweep\.safetensors|values must have shape"):
        Sweep.load(path)


def test_saving_fails_whole_or_not_at_all(sweeps, tmp_path, monkeypatch):
    path = tmp_path / "sweep.safetensors"
    sweeps["denoise"].save(path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        sweeps["noise"].save(path)
    monkeypatch.undo()
    same(Sweep.load(path), sweeps["denoise"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# Heat maps


def maps_of(sweep, normalised=None):
    """The axes with a heat map, and what each shows, by title."""
    figure = sweep.picture(normalised).figure
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert all(len(ax.images) == 1 for ax in axes)
    return figure, {ax.get_title(): ax for ax in axes}


@pytest.mark.parametrize("kind", ["denoise", "noise", "heads", "neurons", "all", "ablate"])
def test_what_is_drawn_are_the_values(kind, sweeps):
    sweep = sweeps[kind]
    ways = [(None, sweep.effect)] if kind == "ablate" else [(None, sweep.normalised), (False, sweep.effect)]
    for normalised, shown in ways:
        _, maps = maps_of(sweep, normalised)
        assert tuple(maps) == sweep.activations
        # "No effect" is the middle of the colours.
        nothing = 1.0 if kind in ("noise", "neurons") and normalised is None else 0.0
        reach = float((shown - nothing).abs().max())
        for at, component in enumerate(sweep.activations):
            image = maps[component].images[0]
            rows = [
                shown[at, i, :, u] if sweep.unit else shown[at, i]
                for i in range(len(sweep.layers))
                for u in range(len(unit_labels(sweep)))
            ]
            close(torch.as_tensor(image.get_array().filled()), torch.stack(rows), atol=0)
            assert image.get_clim() == pytest.approx((nothing - reach, nothing + reach))


def test_the_axes_are_labelled(sweeps):
    def labels(kind, component):
        _, maps = maps_of(sweeps[kind])
        left, ax = next(iter(maps.values())), maps[component]  # those of layers are at the left only
        return [tick.get_text() for tick in left.get_yticklabels()], [tick.get_text() for tick in ax.get_xticklabels()]

    assert labels("denoise", "mlp_out") == (["L0", "L1", "L2"], ["0", "1", "2", "3"])
    assert labels("heads", "z") == (["L2H1", "L0H1"], ["3", "0"])
    assert labels("all", "k") == (["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"], ["all"])
    assert labels("neurons", "post")[0] == [f"L{layer}N{unit}" for layer in range(3) for unit in (4, 7, 9)]
    assert labels("text", "attn_out")[1] == ["five 2", "<end> 0"]
    for kind, y_label, scale, said in (
        ("denoise", "layer", "0 = corrupted, 1 = clean", "clean patched into corrupted"),
        ("noise", "layer", "0 = corrupted, 1 = clean", "corrupted patched into clean"),
        ("neurons", "layer and neuron", "0 = corrupted, 1 = clean", "corrupted patched into clean"),
        ("ablate", "layer and head", "change from the unpatched run", "ablated"),
    ):
        figure, maps = maps_of(sweeps[kind])
        first = next(iter(maps.values()))
        assert first.get_ylabel() == y_label
        assert first.get_xlabel() == "position"
        (bar,) = [ax for ax in figure.axes if not ax.get_title()]
        assert bar.get_ylabel() == f"{METRIC.name}\n{scale}"
        assert figure.get_suptitle() == said


@pytest.mark.parametrize("kind", ["denoise", "heads", "ablate", "text"])
def test_it_shows_itself_in_a_notebook(kind, sweeps, tmp_path):
    drawn = sweeps[kind].picture()._repr_png_()
    assert drawn.startswith(PNG)
    assert len(drawn) > 3000
    assert "<svg" in sweeps[kind]._repr_html_()
    sweeps[kind].picture().save(tmp_path / "map.svg")
    assert "<svg" in (tmp_path / "map.svg").read_text()


def made(n_components, n_layers, n_positions, **options):
    return Sweep(
        **{
            "values": torch.rand(n_components, n_layers, n_positions, generator=torch.Generator().manual_seed(0)),
            "activations": tuple(f"part {i}" for i in range(n_components)),
            "layers": tuple(range(n_layers)),
            "positions": tuple(range(n_positions)),
            "unit": None,
            "units": (),
            "metric": "metric",
            "base": 0.5,
            "source": 0.25,
            "direction": "denoise",
            "method": "forward",
            **options,
        }
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 60, 100), (3, 2, 200), (5, 4, 7), (4, 2, 30)])
def test_any_shape_can_be_drawn(shape):
    sweep = made(*shape)
    _, maps = maps_of(sweep)
    assert len(maps) == shape[0]
    for at, component in enumerate(sweep.activations):
        close(torch.as_tensor(maps[component].images[0].get_array().filled()), sweep.normalised[at].double(), atol=1e-6)
    ticks = maps[sweep.activations[0]].get_yticklabels()
    assert 0 < len(ticks) <= 60
    assert all(tick.get_text() == f"L{round(tick.get_position()[1])}" for tick in ticks)
    lowest = maps[sweep.activations[-1]]
    assert 0 < len(lowest.get_xticklabels()) <= 60
    assert lowest.get_xlabel() == "position"
    assert all(tick.get_text() == str(round(tick.get_position()[0])) for tick in lowest.get_xticklabels())


def test_nothing_but_zeros_or_gaps_can_be_drawn():
    for value in (0.5, math.nan):
        values = torch.full((2, 3, 4), value)
        assert made(2, 3, 4, values=values, source=None, direction="ablate").picture().png().startswith(PNG)
    gaps = made(1, 2, 2, values=torch.tensor([[[0.1, math.nan], [0.9, 0.3]]]), source=None, direction="ablate")
    _, maps = maps_of(gaps)
    low, high = maps["part 0"].images[0].get_clim()
    assert (low, high) == pytest.approx((-0.4, 0.4))


test_labels_that_do_not_fit_are_refused = refused(
    ValueError,
    {
        r"values must have shape \(2, 3, 4\), got \(2, 3, 5\)": lambda: made(2, 3, 4, values=torch.zeros(2, 3, 5)),
        r"values must have shape \(1, 3, 4\), got \(2, 3, 4\)": lambda: made(2, 3, 4, activations=("z",)),
        r"values must have shape \(2, 3, 4, 2\), got \(2, 3, 4\)": lambda: made(2, 3, 4, unit="head", units=(0, 1)),
        r"values must have shape \(2, 3, 1\), got \(2, 3, 4\)": lambda: made(2, 3, 4, positions=(None,)),
    },
)
