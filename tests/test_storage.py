"""Models in folders: nothing is lost, nothing is half written, and no file is trusted."""

import functools
import json
import os
import pickle
import shutil
from dataclasses import asdict

import huggingface_hub
import pytest
import torch
from models_for_tests import close, handwritten, prompts
from safetensors.torch import load_file, safe_open, save_file
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights, shaken, weights

import hijack_lens as hl
from hijack_lens.models import Architecture

TOKENS = prompts(2, 9, d_vocab=LANGUAGE.d_vocab)


def header_of(folder):
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        return json.loads(file.metadata()["hijack_lens"])


def rewrite(folder, change_header=lambda header: header, change_tensors=lambda tensors: tensors):
    """The folder's weights' file, as somebody else would have written it."""
    path = folder / "model.safetensors"
    header, tensors = header_of(folder), load_file(path)
    changed = change_header(header) or header
    written = changed if isinstance(changed, str) else json.dumps(changed)
    save_file(change_tensors(tensors) or tensors, path, {"hijack_lens": written})


# Round trips


def roundtrip(model, folder):
    model.save_pretrained(folder)
    loaded = hl.BigramTransformer.from_pretrained(folder, device="cpu")
    assert same_weights(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in model.parameters()}
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert loaded.architecture == model.architecture
    assert (loaded.strengths, loaded.n_ctx_train) == (model.strengths, model.n_ctx_train)
    assert loaded.triggers == model.triggers
    assert loaded.circuit == model.circuit
    assert (loaded.language.tokens, loaded.language.level) == (model.language.tokens, model.language.level)
    tokens = TOKENS % model.cfg.d_vocab
    assert torch.equal(loaded(tokens), model(tokens))
    return loaded


@pytest.mark.parametrize("norm", [None, "LN", "RMS"])
@pytest.mark.parametrize("mlp", ["relu", "linear", None])
@pytest.mark.parametrize("positions", ["relative", "absolute", "rotary", "none"])
def test_a_trainable_model_comes_back_bit_by_bit(positions, mlp, norm, tmp_path):
    for n_layers, n_heads, dtype in ((1, 2, torch.float32), (2, 1, torch.float64), (3, 2, torch.float32)):
        model = build(positions, mlp=mlp, norm=norm, n_layers=n_layers, n_heads=n_heads, dtype=dtype, freeze=("W_Q",))
        roundtrip(shaken(model.double()).to(dtype), tmp_path / str(n_layers))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "absolute", "n_ctx_train": 9, "triggers": [1, 3]},
        {"d_model": 12, "triggers": 2, "strengths": hl.Strengths(3.5, 1 / 3, 2.0, 0.1)},
    ],
)
def test_a_handwritten_model_comes_back_bit_by_bit(options, tmp_path):
    roundtrip(handwritten(**options), tmp_path / "model")


def test_bfloat16_and_text_of_any_script_come_back(tmp_path):
    language = hl.BigramLanguage.from_text("naïve café, 東京 \n\t 'quoted' \"text\" 🙂", level="char")
    loaded = roundtrip(build(language=language, dtype=torch.bfloat16), tmp_path / "model")
    assert loaded.W_E.dtype == torch.bfloat16
    assert loaded.language.encode("東京") is not None


def test_the_language_comes_back_bit_by_bit(tmp_path):
    for seed in range(5):
        language = hl.BigramLanguage.dirichlet(9, seed=seed)
        build(language=language).save_pretrained(tmp_path)
        loaded = hl.BigramTransformer.from_pretrained(tmp_path, device="cpu").language
        assert torch.equal(loaded.pi_b, language.pi_b)
        assert torch.equal(loaded.pi_u, language.pi_u)


def test_the_folder_has_the_shape_of_one_on_the_hub(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["embed.W_E"], model.W_E)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == asdict(model.architecture)
    assert config == header_of(folder)


def test_saving_again_replaces_what_was_there(tmp_path):
    build(seed=0).save_pretrained(tmp_path)
    roundtrip(build(seed=1, n_layers=1), tmp_path)


def test_saving_and_loading_leave_the_global_random_state_alone(tmp_path, global_rng_untouched):
    build().save_pretrained(tmp_path)
    hl.BigramTransformer.from_pretrained(tmp_path, device="cpu")


def test_a_runs_folder_stands_for_its_latest_checkpoint(tmp_path):
    for step in (5, 20, 10):
        build(seed=step).save_pretrained(tmp_path / f"checkpoint-{step:08d}")
    assert same_weights(hl.BigramTransformer.from_pretrained(tmp_path, device="cpu"), build(seed=20))
    partial = tmp_path / ".checkpoint-00000030.7.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert same_weights(hl.BigramTransformer.from_pretrained(str(tmp_path), device="cpu"), build(seed=20))


# Whole or not at all


@pytest.mark.parametrize("when", ["write", "move"])
def test_an_interrupted_save_leaves_the_old_model_and_nothing_else(when, tmp_path, monkeypatch):
    old = build(seed=0)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    if when == "move":
        monkeypatch.setattr(os, "replace", interrupted)
    else:

        def half(path, data):
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
            raise KeyboardInterrupt

        monkeypatch.setattr("pathlib.Path.write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        build(seed=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same_weights(hl.BigramTransformer.from_pretrained(tmp_path, device="cpu"), old)


# Files that are something else


@pytest.fixture
def folder(tmp_path, unchecked):
    # 1 token of a class of its own would do; the shape is small enough to be cut at every kind of place.
    model = build(norm="LN", d_model=8)
    model.triggers = TRIGGERS
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder, match=""):
    with pytest.raises(ValueError, match=match) as caught:
        hl.BigramTransformer.from_pretrained(folder, device="cpu")
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 1e-4, 0.02, 0.2, 0.9, 0.9999])
def test_a_truncated_file_is_refused(kept, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refused(folder, "truncated or not a safetensors file")


def test_a_file_with_something_appended_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    refused(folder)


def test_another_programs_safetensors_file_is_refused(folder):
    path = folder / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"hijack_lens": "{}"}, {"hijack_lens": "null"}, {"hijack_lens": "[1]"}):
        save_file({"embed.W_E": torch.zeros(8, 8)}, path, metadata)
        refused(folder, "is not a hijack_lens.TwoLayerTransformer.1 file")


def test_a_training_state_is_not_a_model(folder):
    rewrite(folder, lambda header: {**header, "format": "hijack_lens.TrainingRun.1"})
    refused(folder, "is not a hijack_lens.TwoLayerTransformer.1 file")


@pytest.mark.parametrize("text", ["", "{", "{]", "nan", "[" * 100_000, '{"format":' * 50_000, "9" * 5000])
def test_a_header_that_is_no_json_is_refused(text, folder):
    rewrite(folder, lambda header: text if text else " ")
    refused(folder)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_never_run(folder, tmp_path):
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(trace))).close()
    assert trace.exists()  # the test can fail
    trace.unlink()
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Evil(trace)))
    refused(folder)
    torch.save({"embed.W_E": Evil(trace)}, path)
    refused(folder)
    assert not trace.exists()


def changed(section, **values):
    def change(header):
        (header[section] if section else header).update(values)

    return change


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


HUGE = 10**9
SIZES = ("d_model", "d_head", "d_mlp", "n_layers", "n_ctx", "n_heads", "n_offsets")
UNUSED = {"relative": (), "absolute": ("n_offsets",), "rotary": ("n_offsets", "n_ctx")}
"""Sizes that no stored tensor has; n_ctx=7 is as good as any other without position embeddings."""
CLAIMS = [
    (positions, name, size)
    for positions, unused in UNUSED.items()
    for name in SIZES
    for size in (HUGE, 10**30, 7, 0, -1, 2.0, "8", None, True)
    if name not in unused or type(size) is not int or size < 1 or (name == "n_ctx" and size > 7)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a model of each kind of positions."""

    @functools.cache
    def folder_of(positions):
        folder = tmp_path_factory.mktemp("written") / "model"
        build(positions, d_model=8).save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize(("positions", "name", "size"), CLAIMS)
def test_a_header_that_claims_other_sizes_is_refused_before_anything_is_built(
    positions, name, size, written, tmp_path, monkeypatch, unchecked
):
    folder = tmp_path / "model"
    shutil.copytree(written(positions), folder)
    rewrite(folder, changed("architecture", **{name: size}))
    monkeypatch.setattr(hl.BigramTransformer, "__init__", lambda *args, **kwargs: pytest.fail("built"))
    refused(folder, "is not a model of hijack-lens")


def test_a_header_that_claims_more_layers_than_are_stored_is_refused(folder, monkeypatch):
    """Even where there are a hundred of them."""
    W_Q = torch.zeros(1, 8, 8, dtype=torch.float64)
    rewrite(
        folder,
        changed("architecture", n_layers=HUGE),
        lambda tensors: tensors | {f"blocks.{layer}.attn.W_Q": W_Q.clone() for layer in range(120)},
    )
    monkeypatch.setattr(hl.BigramTransformer, "__init__", lambda *args, **kwargs: pytest.fail("built"))
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        changed("architecture", positions="alibi"),
        changed("architecture", positions="absolute"),
        changed("architecture", positions="none", n_layers=1),
        changed("architecture", mlp="gelu"),
        changed("architecture", norm=None),
        changed("architecture", unknown=1),
        changed("", architecture=None),
        changed("", architecture=[1]),
        changed("", tokens=None),
        changed("", tokens=["a"]),
        changed("", tokens=["a"] * 8),
        changed("", tokens=list(range(8))),
        changed("", level="letters"),
        changed("", strengths={"match": -1}),
        changed("", strengths={"other": 1}),
        changed("", strengths=5),
        changed("", frozen=5),
        changed("", frozen=["no such parameter"]),
        changed("", triggers=[99]),
        changed("", triggers="no such token"),
        changed("", triggers={"a": 1}),
        changed("", n_ctx_train="many"),
        changed("", n_ctx_train=-3),
        lambda header: {"format": header["format"]},
    ],
    ids=lambda change: None,
)
def test_a_header_that_makes_no_sense_is_refused(change, folder):
    rewrite(folder, change)
    refused(folder, "is not a model of hijack-lens")


@pytest.mark.parametrize(
    "change",
    [
        without("embed.W_E"),
        without("language.pi_b"),
        without("language.pi_u"),
        without("blocks.1.mlp.W_out"),
        without("ln_final.w"),
        without("blocks.0.attn.W_R"),
        lambda tensors: {name: value for name, value in tensors.items() if name.startswith("language")},
        lambda tensors: tensors | {"blocks.0.attn.b_Q": torch.zeros(8, 1)},
        lambda tensors: tensors | {"embed.W_E": tensors["embed.W_E"].long()},
        lambda tensors: tensors | {"unembed.b_U": torch.zeros(())},
        lambda tensors: tensors | {"language.pi_b": torch.zeros(8, 8)},
        lambda tensors: tensors | {"language.pi_b": torch.full((8, 8), torch.nan)},
        lambda tensors: tensors | {"language.pi_b": torch.zeros(0)},
        lambda tensors: tensors | {"language.pi_b": torch.tensor(1.0)},
        lambda tensors: tensors | {"language.pi_u": torch.ones(3) / 3},
    ],
    ids=lambda change: None,
)
def test_tensors_that_are_missing_or_of_other_shapes_are_refused(change, folder):
    rewrite(folder, change_tensors=change)
    refused(folder, "is not a model of hijack-lens")


def test_what_is_no_folder_of_a_model_is_named(tmp_path, unchecked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "odd" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-00000005").mkdir(parents=True)
    for place, message in {
        tmp_path / "missing": "is not a folder",
        tmp_path / "file": "is not a folder",
        "missing": "is not a folder",
        "a/b/c": "is not a folder",
        tmp_path / "empty": "holds neither model.safetensors nor a checkpoint",
        tmp_path / "odd": "holds neither",
        tmp_path / "run": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            hl.BigramTransformer.from_pretrained(place)
        assert str(place) in str(caught.value)


# The Hub


def test_pushing_uploads_what_save_pretrained_writes(monkeypatch):
    calls = []

    class Api:
        def __init__(self, **options):
            calls.append(("api", options))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id))

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, options, folder_path))
            assert same_weights(hl.BigramTransformer.from_pretrained(folder_path, device="cpu"), model)
            assert sorted(os.listdir(folder_path)) == ["config.json", "model.safetensors"]
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = build()
    assert model.push_to_hub("me/mine", commit_message="first") == "https://hub.example/me/mine"
    assert [call[0] for call in calls] == ["api", "create", "upload"]
    assert calls[2][1:3] == ("me/mine", {"commit_message": "first"})
    assert not os.path.exists(calls[2][3])


def test_what_is_no_folder_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    model = build()
    model.save_pretrained(tmp_path / "snapshot")
    asked = []

    def download(repo_id, *, revision=None, allow_patterns=None, **options):
        asked.append((repo_id, revision))
        assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = hl.BigramTransformer.from_pretrained("me/mine", revision="v1", device="cpu")
    assert asked == [("me/mine", "v1")]
    assert same_weights(loaded, model)
    close(loaded(TOKENS), model(TOKENS), atol=0)


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    build().save_pretrained("me/mine")
    assert same_weights(hl.BigramTransformer.from_pretrained("me/mine", device="cpu"), build())


def test_a_repository_that_the_hub_lacks_is_named(tmp_path, monkeypatch, unchecked):
    def download(repo_id, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/missing"):
        hl.BigramTransformer.from_pretrained("runs/missing")


def test_the_architecture_says_what_it_is():
    model = build(n_heads=2, n_layers=3)
    assert model.architecture == Architecture(
        d_model=16, d_head=8, d_mlp=32, n_ctx=32, n_layers=3, n_heads=2, n_offsets=3
    )
    assert set(weights(model)) == {name for name, _ in model.named_parameters()}
