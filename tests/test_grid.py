"""Grids: every executor gives the same table, and a file survives whatever stops its run."""

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from hijack_lens.grid import run_grid


def noisy(x, y, seed):
    """Results that depend on the point and its seed."""
    return {"sum": x + y, "noise": float(np.random.default_rng(seed).normal()), "label": f"{x}/{y}"}


def logged(x, log, pause=0.0):
    """Leaves a line at each call."""
    with open(log, "a") as file:
        file.write(f"{x}\n")
    time.sleep(pause)
    return {"square": x * x}


def brittle(x, mend):
    """Fails at 1, until a file is there."""
    if x == 1 and not os.path.exists(mend):
        raise KeyError(f"no luck at {x}")
    return {"double": 2 * x}


def lethal(x, mark, seed):
    """Kills its process at 5, once."""
    time.sleep(0.05)
    if x == 5 and not os.path.exists(mark):
        Path(mark).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": x + seed}


def suicidal(x):
    if x in (2, 3, 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x2": x * 2}


def interrupted(x, log):
    logged(x, log)
    if x == 2:
        raise KeyboardInterrupt
    return {"square": x * x}


def mixed(x):
    return {"a": "one" if x == 1 else x}


GRID = {"x": [1, 2, 3], "y": [0.5, 0.25]}


def found(table):
    """A table without what differs from run to run."""
    return table.drop(columns=["seconds", "traceback"])


def calls(log):
    return [int(line) for line in Path(log).read_text().split()]


def test_a_row_per_point_in_the_order_of_the_grid():
    table = run_grid(noisy, GRID)
    assert list(table.columns) == ["x", "y", "seed", "sum", "noise", "label", "seconds", "error", "traceback"]
    assert table[["x", "y"]].values.tolist() == [[x, y] for x in GRID["x"] for y in GRID["y"]]
    for row in table.itertuples():
        assert row.sum == row.x + row.y
        assert row.noise == np.random.default_rng(row.seed).normal()
    assert table["error"].isna().all()
    assert (table["seconds"] >= 0).all()


def test_seeds_depend_on_the_grids_seed_and_the_point_alone():
    table = run_grid(noisy, GRID)
    assert table["seed"].nunique() == len(table)
    alone = run_grid(noisy, [{"y": 0.25, "x": 2}])
    assert alone["seed"].tolist() == table.query("x == 2 and y == 0.25")["seed"].tolist()
    assert not set(run_grid(noisy, GRID, seed=1)["seed"]) & set(table["seed"])
    assert run_grid(noisy, {**GRID, "seed": [7]})["seed"].unique().tolist() == [7]


def test_the_global_random_state_is_left_alone(global_rng_untouched):
    run_grid(noisy, GRID)


@pytest.mark.parametrize("in_flight", [1, 2, 256])
def test_threads_give_the_same_table(in_flight):
    with ThreadPoolExecutor(3) as executor:
        table = run_grid(noisy, GRID, executor, in_flight=in_flight)
    pd.testing.assert_frame_equal(found(table), found(run_grid(noisy, GRID)))


def test_a_process_pool_gives_the_same_table_and_its_loss_keeps_what_has_finished(tmp_path):
    with ProcessPoolExecutor(2) as executor:
        table = run_grid(noisy, GRID, executor)
    pd.testing.assert_frame_equal(found(table), found(run_grid(noisy, GRID)))

    out = tmp_path / "lost.jsonl"
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(RuntimeError, match=r"executor broke .* while {'x': 2}.* with it"),
    ):
        run_grid(suicidal, {"x": [0, 1, 2, 4]}, executor, out, in_flight=2)
    assert sorted(json.loads(line)["result"]["x2"] for line in out.read_text().splitlines()[1:]) == [0, 2]


def test_points_that_kill_their_process_fail_alone_where_pools_can_be_made(tmp_path):
    out, grid, made = tmp_path / "out.jsonl", {"x": range(10)}, []

    def make():
        made.append(ProcessPoolExecutor(2))
        return made[-1]

    table = run_grid(suicidal, grid, make, out)
    assert table["x2"].fillna(-1).tolist() == [0, 2, -1, -1, 8, 10, 12, 14, 16, -1]
    assert table["error"].notna().tolist() == [x in (2, 3, 9) for x in grid["x"]]
    assert table["error"].dropna().str.startswith("BrokenProcessPool: ").all()
    for pool in made:  # each was shut down
        with pytest.raises(RuntimeError):
            pool.submit(int)
    made.clear()
    pd.testing.assert_frame_equal(run_grid(suicidal, grid, make, out), table)
    assert made == []


def test_a_point_whose_process_was_killed_once_is_run_again(tmp_path):
    grid = {"x": range(8), "mark": [str(tmp_path / "killed")]}
    table = run_grid(lethal, grid, lambda: ProcessPoolExecutor(2))
    assert (tmp_path / "killed").exists()
    pd.testing.assert_frame_equal(found(table), found(run_grid(lethal, grid)))


def test_made_executors_that_cannot_run_anything_fail_no_points(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="executor broke before it had any point"):
        run_grid(noisy, GRID, lambda: ProcessPoolExecutor(1, initializer=os._exit, initargs=(1,)), out)
    with pytest.raises(TypeError, match=r"executor must make a concurrent\.futures\.Executor, got 3"):
        run_grid(noisy, GRID, lambda: 3, out)
    pd.testing.assert_frame_equal(found(run_grid(noisy, GRID, ThreadPoolExecutor, out)), found(run_grid(noisy, GRID)))


def test_no_job_of_a_broken_pool_is_cancelled_before_it_has_shut_down_nor_waited_for():
    class Breaking(Executor):
        """As a process pool that breaks while points are handed to it: it fails one job, and forgets the other."""

        def submit(self, *arguments):
            jobs.append(Future())
            if len(jobs) == 1:
                jobs[0].set_exception(BrokenExecutor("gone"))
            return jobs[-1]

        def shutdown(self, **options):
            assert not any(job.cancelled() for job in jobs)
            jobs.append("shut down")

    jobs = []
    with pytest.raises(RuntimeError, match=r"executor broke \(BrokenExecutor: gone\) while {'x': 0}, {'x': 1} were"):
        run_grid(suicidal, {"x": [0, 1]}, Breaking())
    assert jobs[1].cancelled()
    assert jobs[2] == "shut down"


def test_no_more_points_are_in_flight_than_allowed():
    class Counting(ThreadPoolExecutor):
        most = submitted = 0

        def submit(self, *arguments):
            self.submitted += 1
            future = super().submit(*arguments)
            jobs.append(future)
            self.most = max(self.most, sum(not job.done() for job in jobs))
            return future

    jobs = []
    with Counting(2) as executor:
        run_grid(logged, {"x": range(30), "log": [os.devnull], "pause": [0.002]}, executor, in_flight=4)
    assert executor.submitted == 30
    assert 2 <= executor.most <= 4


def test_jobs_that_are_no_futures():
    """As submitit's, which know submit, done, result and little else."""

    class Job:
        def __init__(self, call):
            self.call, self.looked = call, 0

        def done(self):
            self.looked += 1
            return self.looked > 2

        def result(self):
            return self.call()

    class Cluster:
        def submit(self, function, *arguments):
            return Job(functools.partial(function, *arguments))

    pd.testing.assert_frame_equal(found(run_grid(noisy, GRID, Cluster())), found(run_grid(noisy, GRID)))


def test_submitit_whose_jobs_are_processes(tmp_path):
    """As on Slurm, but for the queue."""
    submitit = pytest.importorskip("submitit")

    def function(x, seed):  # the jobs know nothing of this module
        if x == 1:
            raise KeyError(f"no luck at {x}")
        return {"process": os.getpid(), "value": x + seed}

    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    table = run_grid(function, {"x": [0, 1]}, executor, tmp_path / "out.jsonl")
    here = run_grid(function, {"x": [0, 1]})
    assert table["process"][0] != os.getpid()
    pd.testing.assert_frame_equal(found(table).drop(columns="process"), found(here).drop(columns="process"))
    assert table["error"][1] == "KeyError: 'no luck at 1'"
    pd.testing.assert_frame_equal(run_grid(function, {"x": [0, 1]}, out=tmp_path / "out.jsonl"), table)


def test_a_dask_cluster_one_of_whose_workers_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    mark = tmp_path / "killed"
    grid = {"x": range(16), "mark": [str(mark)]}
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = set(client.run(os.getpid).values())
        table = run_grid(lethal, grid, client.get_executor(), tmp_path / "dask.jsonl")
    assert len(workers) == 2
    assert int(mark.read_text()) in workers
    pd.testing.assert_frame_equal(found(table), found(run_grid(lethal, grid)))
    assert table["error"].isna().all()


def test_a_restarted_grid_runs_what_is_missing(tmp_path):
    out, log = tmp_path / "sub" / "out.jsonl", tmp_path / "log"
    first = run_grid(logged, {"x": [3, 1], "log": [str(log)]}, out=out)
    assert calls(log) == [3, 1]
    both = run_grid(logged, {"x": [0, 1, 2, 3], "log": [str(log)]}, out=out)
    assert calls(log) == [3, 1, 0, 2]
    assert both["square"].tolist() == [0, 1, 4, 9]
    again = run_grid(logged, {"x": [3, 1], "log": [str(log)]}, out=out)
    pd.testing.assert_frame_equal(again, first)
    assert len(calls(log)) == 4


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 700))
def test_a_file_cut_anywhere_is_completed(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    out = folder / "out.jsonl"
    whole = run_grid(noisy, GRID, out=out)
    data = out.read_bytes()
    out.write_bytes(data[: max(len(data) - cut, 0)])
    pd.testing.assert_frame_equal(found(run_grid(noisy, GRID, out=out)), found(whole))
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(whole)
    assert {len(json.loads(line)["arguments"]) for line in lines[1:]} == {3}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_killed_driver_is_resumed(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out, log = tmp_path / f"out.{suffix}", tmp_path / "log"
    lines = tmp_path / {"jsonl": "out.jsonl", "parquet": "out.parquet.jsonl"}[suffix]
    grid = {"x": range(12), "log": [str(log)], "pause": [0.1]}
    driver = multiprocessing.Process(target=run_grid, args=(logged, grid), kwargs={"out": out})
    driver.start()
    deadline = time.monotonic() + 120
    while driver.is_alive() and not (lines.exists() and lines.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    kept = lines.read_bytes().count(b"\n") - 1
    assert 3 <= kept < 12
    before = len(calls(log))
    if suffix == "parquet":
        assert not out.exists()
        run_grid(logged, {**grid, "x": range(kept)}, out=out)
        assert len(calls(log)) == before  # with nothing left to run, it is made all the same
        assert pd.read_parquet(out)["square"].tolist() == [x * x for x in range(kept)]
    table = run_grid(logged, grid, out=out)
    assert table["square"].tolist() == [x * x for x in range(12)]
    assert calls(log)[before:] == list(range(kept, 12))


def test_a_failed_point_is_recorded_and_the_rest_run_on(tmp_path):
    out, mend = tmp_path / "out.jsonl", tmp_path / "mended"
    grid = {"x": [0, 1, 2], "mend": [str(mend)]}
    table = run_grid(brittle, grid, out=out)
    assert table["double"].fillna(-1).tolist() == [0, -1, 4]
    assert table["error"][1] == "KeyError: 'no luck at 1'"
    assert 'raise KeyError(f"no luck at {x}")' in table["traceback"][1]
    assert table["error"].isna().tolist() == [True, False, True]

    mend.touch()
    pd.testing.assert_frame_equal(run_grid(brittle, grid, out=out), table)
    mended = run_grid(brittle, grid, out=out, retry_failed=True)
    assert mended["double"].tolist() == [0, 2, 4]
    assert mended["error"].isna().all()
    pd.testing.assert_frame_equal(run_grid(brittle, grid, out=out), mended)


@pytest.mark.parametrize("executor", [None, "threads"])
def test_what_a_function_must_not_do_fails_its_point_alone(executor):
    def function(x):
        if x == "exit":
            sys.exit("done")
        return {"list": [1], "tensor": {"a": torch.ones(2)}, "taken": {"error": 1}, "x": {"x": 1}, "fine": {"a": 1}}[x]

    pool = ThreadPoolExecutor(2)
    with pool:
        table = run_grid(function, {"x": ["list", "tensor", "taken", "x", "exit", "fine"]}, executor and pool)
    assert table["error"].isna().tolist() == [False] * 5 + [True]
    messages = ["must return a dict", "function's 'a' must be a number", "not return 'error'", "not return 'x'", "done"]
    for error, message in zip(table["error"], messages, strict=False):
        assert message in error


def test_an_interrupt_keeps_what_has_finished(tmp_path):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        run_grid(interrupted, {"x": range(9), "log": [str(log)]}, out=out)
    assert calls(log) == [0, 1, 2]
    assert out.read_text().count('"result"') == 2


def test_an_interrupt_cancels_what_is_pending(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out.jsonl"
    started = threading.Event()

    def slow(x):
        if x == 1:
            started.set()
        logged(x, log, 0.1)
        return {"square": x * x}

    def press():
        started.wait()
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=press).start()
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        run_grid(slow, {"x": range(50)}, executor, out)
    # The point under way cannot be cancelled; at most one more had been handed to the thread.
    assert len(calls(log)) <= 3
    assert '"square": 0' in out.read_text()
    assert run_grid(slow, {"x": range(4)}, out=out)["square"].tolist() == [0, 1, 4, 9]


def test_numpy_and_torch_numbers_are_plain_ones_in_grid_and_result():
    def function(x, y):
        assert type(x) is float
        assert type(y) is int
        return {"a": np.float32(0.5), "b": torch.tensor(3), "c": None, "d": True, "e": float("inf"), "f": float("nan")}

    table = run_grid(function, {"x": np.linspace(0, 1, 2), "y": torch.arange(2)})
    assert table["error"].isna().all()
    assert table.iloc[0][["a", "b", "d", "e"]].tolist() == [0.5, 3, True, float("inf")]
    assert table["f"].isna().all()


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    out = tmp_path / "out.parquet"
    table = run_grid(noisy, GRID, out=out)
    pd.testing.assert_frame_equal(pd.read_parquet(out), table, check_dtype=False)
    more = run_grid(noisy, {"x": [9], "y": [0.5]}, out=out)
    assert len(more) == 1
    stored = pd.read_parquet(out)
    assert stored["x"].tolist() == [1, 1, 2, 2, 3, 3, 9]
    assert stored.attrs == {"function": f"{__name__}.noisy", "seed": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "out.parquet.jsonl"]

    (tmp_path / "out.parquet.jsonl").unlink()
    with pytest.raises(ValueError, match=r"exists without the out\.parquet\.jsonl"):
        run_grid(noisy, GRID, out=out)


def test_parquet_is_written_when_a_grid_is_interrupted(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(KeyboardInterrupt):
        run_grid(interrupted, {"x": range(9), "log": [os.devnull]}, out=tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["square"].tolist() == [0, 1]


def test_parquet_with_a_column_of_mixed_types_keeps_the_lines(tmp_path):
    pytest.importorskip("pyarrow")
    out = tmp_path / "out.parquet"
    with pytest.raises(ValueError, match=r"mixes types .* holds all results"):
        run_grid(mixed, {"x": [1, 2]}, out=out)
    assert (tmp_path / "out.parquet.jsonl").read_text().count('"result"') == 2


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hijack-lens\[parquet\]"):
        run_grid(noisy, GRID, out=tmp_path / "out.parquet")


def test_a_file_belongs_to_one_function_and_seed(tmp_path):
    out = tmp_path / "out.jsonl"
    run_grid(noisy, GRID, out=out)
    kept = out.read_bytes()
    with pytest.raises(ValueError, match=r"grid of seed=0, not of seed=1"):
        run_grid(noisy, GRID, out=out, seed=1)
    with pytest.raises(ValueError, match=r"grid of function='.*noisy', not of function='.*suicidal'"):
        run_grid(suicidal, {"x": [0]}, out=out)
    assert out.read_bytes() == kept
    for text in ("notes\n", "notes", '{"format": 3}\n', "[1]\n", "\n"):
        out.write_text(text)
        with pytest.raises(ValueError, match="is not a grid's file"):
            run_grid(noisy, GRID, out=out)
        assert out.read_text() == text
    out.write_bytes(kept.replace(b'"arguments"', b'"x"', 1))
    with pytest.raises(ValueError, match="no outcome of a point in line 2"):
        run_grid(noisy, GRID, out=out)


def refusing(**changed):
    return lambda: run_grid(**{"function": noisy, "grid": GRID} | changed)


test_wrong_types_are_refused = refused(
    TypeError,
    {
        "function must be callable, got 3": refusing(function=3),
        r"executor must be None, have a submit\(.*\) or be a function .* got 3": refusing(executor=3),
        "grid must be a mapping .* got 3": refusing(grid=3),
        "grid's 'x' must be a list of values, got 'abc'": refusing(grid={"x": "abc", "y": [1]}),
        r"grid's 'x' must be a number, .* got \[1\]": refusing(grid={"x": [[1]], "y": [1]}),
        r"grid's 'x' must be a number, .* got tensor\(\[1": refusing(grid={"x": [torch.ones(2)], "y": [1]}),
        "grid must hold mappings of names to values, got 3": refusing(grid=[3]),
        "seed must be an int, got '0'": refusing(seed="0"),
    },
)

test_wrong_values_are_refused = refused(
    ValueError,
    {
        "grid must have at least one point": refusing(grid=[]),
        "at least one point, got none": refusing(grid={"x": [1], "y": []}),
        "grid must name each point once, got {'x': 1, 'y': 1} twice": refusing(grid={"x": [1, 1], "y": [1]}),
        "grid must name the arguments .* missing a required argument: 'y'": refusing(grid={"x": [1]}),
        "unexpected keyword argument 'z'": refusing(grid={"x": [1], "y": [1], "z": [1]}),
        "grid must not name 'error'": refusing(grid={"x": [1], "y": [1], "error": [1]}),
        r"out must end in \.jsonl or \.parquet, got 'out\.csv'": refusing(out="out.csv"),
        "seed must be at least 0, got -1": refusing(seed=-1),
        "in_flight must be at least 1, got 0": refusing(in_flight=0),
        "function must have a name .* got <function": refusing(function=lambda x, y: {}, out="out.jsonl"),
        "function must have a name .* got functools": refusing(function=functools.partial(noisy), out="out.jsonl"),
    },
)


def test_a_partial_needs_no_name_without_a_file():
    table = run_grid(functools.partial(noisy, y=1), {"x": [1, 2]})
    assert table["sum"].tolist() == [2, 3]
