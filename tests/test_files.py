"""Files that are written whole wherever they lie, and that show when they have changed."""

import os
import random
import socket
import stat
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from models_for_tests import handwritten
from trainable_for_tests import LANGUAGE, TRIGGERS, build, same_weights

import hijack_lens as hl
from hijack_lens.core.files import write_atomically
from hijack_lens.grid import run_grid
from hijack_lens.show.style import Picture

RESULT = hl.MemoryMatrix.load(Path(__file__).parent / "saved" / "MemoryMatrix.safetensors")


@pytest.fixture(scope="module")
def explanation():
    model = handwritten()
    return hl.explain(model, hl.hijack_prompt(model.language, 0, 1, 2, 12, global_candidate=2, seed=0))


@pytest.fixture
def writers(explanation):
    """By the name of the file that each writes: all that the library writes."""
    run = hl.train(build(), LANGUAGE, hl.TrainConfig(TRIGGERS, 8, 0, steps=1, batch_size=2, eval_sequences=2))
    return {
        "result.safetensors": RESULT.save,
        "report.html": lambda path: hl.write_report(explanation, path),
        "picture.png": lambda path: Picture(1.0, 1.0).save(path),
        "picture.svg": lambda path: Picture(1.0, 1.0).save(str(path)),
        "model.safetensors": lambda path: build().save_pretrained(path.parent),
        "config.json": lambda path: build().save_pretrained(path.parent),
        "probes.csv": lambda path: run.save(path.parent),
        "grid.parquet": lambda path: run_grid(double, {"x": [1]}, out=path),
    }


def double(x):
    return {"twice": 2 * x}


def test_links_are_followed_modes_are_kept_and_nothing_is_left_over(writers, tmp_path):
    for name, write in writers.items():
        if name == "grid.parquet":
            pytest.importorskip("pyarrow")
        home, away = tmp_path / name / "home", tmp_path / name / "away"
        home.mkdir(parents=True)
        away.mkdir()
        real = away / "real"
        real.write_bytes(b"old")
        real.chmod(0o640)
        (away / "link").symlink_to("real")  # a link to a link, the second relative to its own folder
        (home / name).symlink_to(away / "link")
        if name == "grid.parquet":
            (home / f"{name}.jsonl").touch()
        write(home / name)
        assert (home / name).is_symlink(), name
        assert (away / "link").is_symlink(), name
        assert not real.is_symlink(), name
        assert real.read_bytes() != b"old", name
        assert stat.S_IMODE(real.stat().st_mode) == 0o640, name
        assert sorted(os.listdir(away)) == ["link", "real"]
        assert not [left for left in os.listdir(home) if left.startswith(".")]
        # A link to nothing yet: the file that it names is made, with the mode that any new file has.
        real.unlink()
        write(home / name)
        (home / "new").touch()
        assert real.stat().st_mode == (home / "new").stat().st_mode, name


def test_four_threads_that_write_one_file_never_tear_it(tmp_path):
    path, torn, done = tmp_path / "file", [], threading.Event()
    path.write_bytes(b"0" * 300_000)

    def write(letter):
        for _ in range(40):
            write_atomically(path, letter * 300_000)

    def read():
        while not done.is_set():
            data = path.read_bytes()
            if len(data) != 300_000 or len(set(data)) != 1:
                torn.append(data)

    reader = threading.Thread(target=read)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not torn
    assert os.listdir(tmp_path) == ["file"]


def test_data_are_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    path, events, sync, replace = tmp_path / "file", [], os.fsync, os.replace

    def fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def move(source, target):
        assert Path(source).parent == Path(target).parent
        events.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    RESULT.save(path)
    assert events == ["file", "move", "folder"]


def test_pipes_and_devices_are_written_into_and_stay_what_they_are(explanation, tmp_path):
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()), daemon=True)
    reader.start()
    for _ in range(1000):  # until the reader has opened it
        try:
            hl.write_report(explanation, pipe)
            break
        except OSError:
            reader.join(0.01)
    reader.join(30)
    page = heard[0].decode()
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OSError, match="pipe"):  # nobody reads: no waiting for ever
        RESULT.save(pipe)

    null = Path("/dev/null")
    if os.geteuid() == 0:  # who could destroy the machine's own
        null = tmp_path / "null"
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for write in (RESULT.save, Picture(1.0, 1.0).save, lambda path: hl.write_report(explanation, path)):
        write(null)
        assert stat.S_ISCHR(null.stat().st_mode)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match=r"path must be a file, a pipe or a character device, got "):
            RESULT.save(tmp_path / "socket")
    assert sorted({"pipe", "socket"} | ({"null"} if null.parent == tmp_path else set())) == sorted(os.listdir(tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child whose standard output is a file")
def test_standard_output_is_written_into_also_where_it_is_a_file(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(out.fileno(), 1)
                os.write(1, b"before\n")
                RESULT.save("/dev/stdout")
                os.write(1, b"after\n")
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    RESULT.save(tmp_path / "alone")
    assert (tmp_path / "out").read_bytes() == b"before\n" + (tmp_path / "alone").read_bytes() + b"after\n"


def test_what_cannot_be_written_is_refused_by_name(explanation, tmp_path, monkeypatch, unchecked):
    (tmp_path / "file").write_text("kept")
    picture = Picture(1.0, 1.0)
    writes = (RESULT.save, picture.save, lambda path: hl.write_report(explanation, path))
    for write in writes:
        for path in (tmp_path, tmp_path / "none" / "file.png", tmp_path / "file" / "file.png"):
            with pytest.raises(ValueError, match="path must be a file in an existing folder, got"):
                write(path)
        with pytest.raises(TypeError, match="path must be a path, as text or a Path, got 5"):
            write(5)
    with pytest.raises(ValueError, match=r"path must end in one of .*png.*, got .*x\.tokens"):
        picture.save(tmp_path / "x.tokens")
    for make in (
        lambda: build().save_pretrained(tmp_path / "file"),
        lambda: build().save_pretrained(tmp_path / "file" / "below"),
    ):
        with pytest.raises(ValueError, match="folder must be a folder"):
            make()
    with pytest.raises(ValueError, match="out must be a folder"):
        run_grid(double, {"x": [1]}, out=tmp_path / "file" / "x.jsonl")
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(ValueError, match="out must be a file"):
        run_grid(double, {"x": [1]}, out=tmp_path / "x.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for write in writes:
        with pytest.raises(ValueError, match=r"path must be a file that may be written, got .*read-only"):
            write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "x.jsonl"]


def test_a_second_run_into_one_grids_file_is_refused_by_whatever_path(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    out = tmp_path / "out.jsonl"
    table = run_grid(nested, {"x": [1], "out": [str(out), str(tmp_path / "link.jsonl")]}, out=out)
    assert table["said"].str.contains("out must be written to by one run at a time").all()
    assert run_grid(double, {"x": [1, 2]}, out=tmp_path / "other.jsonl")["twice"].tolist() == [2, 4]
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl", "other.jsonl", "out.jsonl"]


def nested(x, out):
    try:
        run_grid(nested, {"x": [x], "out": [out]}, out=out)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


# Checksums


def same_run(a, b):
    pd.testing.assert_frame_equal(a.table, b.table)
    return same_weights(a.model, b.model) and (a.config, a.step) == (b.config, b.step)


@pytest.fixture
def kept(tmp_path):
    """Files with how each is read, and how two readings are compared."""
    out = tmp_path / "run"
    config = hl.TrainConfig(TRIGGERS, 8, 0, steps=2, batch_size=2, eval_sequences=2)
    hl.train(build(d_model=8), LANGUAGE, config, out)
    build(d_model=8, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    RESULT.save(tmp_path / "result")
    checkpoint = out / "checkpoint-00000002"
    return {
        tmp_path / "model" / "model.safetensors": (
            lambda: hl.BigramTransformer.from_pretrained(tmp_path / "model", device="cpu"),
            lambda a, b: same_weights(a, b) and a.architecture == b.architecture,
        ),
        checkpoint / "model.safetensors": (lambda: hl.TrainingRun.load(out), same_run),
        checkpoint / "training.safetensors": (lambda: hl.TrainingRun.load(out), same_run),
        tmp_path / "result": (
            lambda: hl.MemoryMatrix.load(tmp_path / "result"),
            lambda a, b: torch.equal(a.values, b.values) and repr(a) == repr(b),
        ),
    }


def outcome(read):
    try:
        return read()
    except ValueError as error:
        return error


def test_a_flipped_bit_is_noticed(kept):
    draw = random.Random(0)
    for path, (read, same) in kept.items():
        data, true = path.read_bytes(), read()
        begin = 8 + int.from_bytes(data[:8], "little")  # where the tensors lie
        places = [begin, len(data) - 1, *(draw.randrange(begin, len(data)) for _ in range(12))]
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"is damaged: [\w.]+ not as written, by the checksums") as refused:
                read()
            assert path.name in str(refused.value)
        # In the header, what is not refused must have changed nothing.
        refusals = 0
        for _ in range(40):
            flipped = bytearray(data)
            flipped[draw.randrange(begin)] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            found = outcome(read)
            refusals += isinstance(found, ValueError)
            assert path.name in str(found) if isinstance(found, ValueError) else same(found, true)
        assert refusals > 30
        path.write_bytes(data)
        assert same(read(), true)
