"""A matrix on a real scheduler with two real workers: the same bytes, and kills of both sides."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")

from distributed import Client, LocalCluster

from mlx_slim.artifacts import read_json
from mlx_slim.cli.main import run as command
from mlx_slim.cluster import inputs, worker
from mlx_slim.cluster.archive import pack, unpack
from mlx_slim.cluster.dask_pool import DaskPool, cluster_pool
from mlx_slim.cluster.inputs import data_inputs
from mlx_slim.cluster.jobs import Ended, Job, Outcome
from mlx_slim.cluster.worker import sees_output
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from tests.support.matrix_run import write_files, write_yaml
from tests.support.stored import files_of, until
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        resources={"MEMORY": 8 * 10**9},
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    ) as started:
        yield started


def connected(cluster: Any) -> Any:
    """Return a client; its methods are typed as values or coroutines."""
    return Client(cluster)


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A matrix of three cells over a model that is named by its folder."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tmp_path / "models" / "toy", "llama")
    write_files(tmp_path, model)
    write_yaml(
        tmp_path,
        model,
        models={"toy": {"source": "models/toy"}},
        methods={
            "base": {"kind": "base"},
            "lora": {"recipe": {"method": "lora"}, "learning_rates": [1e-4, 1e-2]},
            "lora-fused": {"kind": "fused", "of": "lora"},
        },
    )
    return tmp_path


def far_away(folder: str | None) -> None:
    """Let a worker see nothing of the coordinator's folder but what its own folders hold."""
    names = (inputs.MODELS_VARIABLE, "MLX_SLIM_DATA", "MLX_SLIM_CACHE")
    for name, where in zip(names, ("models", "rows", f"cache-{os.getpid()}"), strict=True):
        if folder is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = f"{folder}/{where}"
    worker.sees_output = (lambda request: False) if folder else sees_output
    worker.find = inputs.find if folder is None else _find_far


def _find_far(one: inputs.Input, origin: Path) -> Path:
    return inputs.find(one, Path("/nowhere"))


def rows_far_away(matrix: Path) -> Path:
    """Return a folder that has the rows, and is to have the models."""
    far = matrix / "far"
    (far / "rows").mkdir(parents=True)
    for name in ("rows.jsonl", "toy.jsonl", "toytask.yaml"):
        (far / "rows" / name).write_bytes((matrix / name).read_bytes())
    return far


def test_far_workers_leave_the_files_of_one_machine(
    cluster: Any, matrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = rows_far_away(matrix)
    monkeypatch.setenv("MLX_SLIM_DATA", str(far / "rows"))
    assert command(["compare", "toy.yaml", "-o", "out", "--quiet"]) == 0
    (matrix / "out").rename(matrix / "alone")
    (matrix / "models").rename(far / "models")
    # What the coordinator reads itself stays: the plan needs a model's shapes.
    (matrix / "models").symlink_to(far / "models")
    with connected(cluster) as client:
        client.run(far_away, str(far))
        where = ["--cluster", cluster.scheduler_address]
        assert command(["compare", "toy.yaml", "-o", "out", "--quiet", *where]) == 0
        client.run(far_away, None)
    alone, there = (files_of(matrix / name, "cells") for name in ("alone", "out"))
    assert there.keys() == alone.keys()
    assert [name for name in alone if there[name] != alone[name]] == []
    sweep = read_json(matrix / "out/sweeps/toy-lora/sweep.json")
    assert sweep == read_json(matrix / "alone/sweeps/toy-lora/sweep.json")
    assert not any(
        "kinds of machine" in line for line in read_json(matrix / "out/results.json")["notes"]
    )


def test_far_workers_make_the_candidates_of_a_search(
    cluster: Any, matrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models come back in archives; what was chosen is the same."""
    far = rows_far_away(matrix)
    words = ["slim", "models/toy", "--disk", "150KB", "--task", "toytask.yaml"]
    words += ["--data", "rows.jsonl", "--limit", "8"]
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)
    assert command([*words, "-o", "out"]) == 0
    (matrix / "out").rename(matrix / "alone")
    (matrix / "models").rename(far / "models")
    (matrix / "models").symlink_to(far / "models")  # the search reads it, too
    with connected(cluster) as client:
        client.run(far_away, str(far))
        where = ["--cluster", cluster.scheduler_address]
        assert command([*words, "-o", "out", *where]) == 0
        client.run(far_away, None)
    names = ("slim.json", "model", "scores", "claim", "ranked")
    alone, there = (files_of(matrix / name, *names) for name in ("alone", "out"))
    assert there.keys() == alone.keys()
    assert [name for name in alone if there[name] != alone[name]] == []
    files = sorted((matrix / "alone").glob("candidates/*/recover.yaml"))
    for file in files:
        other = matrix / "out" / file.relative_to(matrix / "alone")
        assert load_recipe(str(file)).recipe == load_recipe(str(other)).recipe
    assert files
    assert not list((matrix / "out").glob("candidates/*/model"))
    assert command(["report", "out", "--verify"]) == 0


def events(run: Path, name: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [one for line in lines if (one := json.loads(line))["event"] == name]


def test_a_killed_worker_and_a_killed_coordinator_lose_nothing(cluster: Any, matrix: Path) -> None:
    """A cell goes elsewhere, from its checkpoint; what is complete is not made again."""
    words = ["compare", "toy.yaml", "recipe.train.steps=150", "recipe.train.save_every=5"]
    words += ["methods.lora.learning_rates=[0.001]", "-o", "out"]
    words += ["--cluster", cluster.scheduler_address]
    slow = [*words, "recipe.train.duty=0.05"]
    coordinator = subprocess.Popen([sys.executable, "-m", "mlx_slim", *slow])
    run, base = matrix / "out/cells/toy-lora-s0/run", matrix / "out/cells/toy-base/cell.json"
    with connected(cluster) as client:

        def runs_on() -> str | None:
            running = client.processing()
            return next((w for w, keys in running.items() if "lora" in str(keys)), None)

        try:
            until(base.exists)
            base_time = base.stat().st_mtime_ns
            until(lambda: list(run.glob("checkpoints/step-*")))
            lost = until(runs_on)
            os.kill(client.run(os.getpid, workers=[lost])[lost], signal.SIGKILL)
            until(lambda: events(run, "resumed"))
        finally:
            coordinator.kill()
            coordinator.wait()
        until(lambda: not any(client.processing().values()))
    assert len(events(run, "resumed")) == 1 and not (run / "run.json").exists()
    assert command([*words, "--resume"]) == 0
    assert base.stat().st_mtime_ns == base_time
    assert len(events(run, "resumed")) == 2
    # A step after the last checkpoint is computed again; none is left out.
    assert sorted({one["step"] for one in events(run, "step")}) == list(range(1, 151))


def test_a_worker_that_lacks_an_input_refuses_and_another_one_takes_it(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rows.jsonl").write_text("{}")
    lines: list[str] = []
    with connected(cluster) as client:
        first, second = client.run(os.getpid)
        client.run(far_away, str(tmp_path / "empty"))
        with cluster_pool(Path("out"), cluster.scheduler_address, lines.append) as pool:
            assert not pool.shared
            needs = data_inputs([Path("mine/rows.jsonl")])
            job = Job("needs", ("tasks", "--no-such-option"), 9, tuple(needs))
            pool.start(job)
            ended = pool.wait()
            assert ended.code == 2 and ended.why.startswith("no worker takes it; ")
            assert ended.why.count("mine/rows.jsonl is not here") == 2 == len(lines)
            (tmp_path / "mine").rename(tmp_path / "rows")
            client.run(far_away, str(tmp_path), workers=[second])
            pool.start(job)
            assert pool.wait() == Ended("needs", 2)  # it ran: the words have no such option
            client.run(far_away, None)
            assert pool.shared
    assert len(lines) <= 3 and first != second


def test_an_address_where_nobody_answers_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(SlimError, match="no Dask scheduler answers"),
        cluster_pool(tmp_path, "tcp://127.0.0.1:9", print, patience=0.5),
    ):
        pass


def test_an_address_of_another_program_is_one_line(tmp_path: Path) -> None:
    """What it sends is read as sizes, here of 2⁶⁰ bytes."""

    def answer() -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                with listener.accept()[0] as stream:
                    stream.sendall((1 << 60).to_bytes(8, "little") * 4)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=answer, daemon=True).start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with (
            pytest.raises(SlimError, match="no Dask scheduler answers"),
            cluster_pool(tmp_path, address, print, patience=0.5),
        ):
            pass


def test_results_arrive_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, job = tmp_path / "out", Job("a", (), writes=("cells/a", "sweeps/a"))
    for name in ("far/cells/a/one", "far/cells/a/two", "out/cells/a/old", "out/sweeps/a/old"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    archive, _ = pack(tmp_path / "far", job.writes)
    pool = DaskPool(None, out, print)

    def cut_short(data: bytes, folder: Path, names: Any) -> None:
        unpack(data, folder, names)[-1].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_slim.cluster.dask_pool.unpack", cut_short)
        with pytest.raises(KeyboardInterrupt):
            pool._store(job, Outcome(0, archive=archive), "")
    assert [path.name for path in out.glob("*/a/*")] == ["old", "old"]
    pool._store(job, Outcome(0, archive=archive), "")
    assert sorted(path.name for path in out.glob("*/a/*")) == ["one", "two"]
    assert sorted(path.name for path in out.iterdir()) == ["cells", "sweeps"]


def test_a_job_is_submitted_while_no_worker_is_there(tmp_path: Path) -> None:
    """The last worker may leave between two jobs: the next one waits for another worker."""
    workers: dict[str, Any] = {"a": {"resources": {"MEMORY": 5}, "name": "a", "nthreads": 1}}
    submitted: list[Any] = []

    def submit(_work: Any, request: Any, **_: Any) -> Any:
        submitted.append(request.job)
        return SimpleNamespace(add_done_callback=lambda _: None)

    client = SimpleNamespace(
        scheduler=SimpleNamespace(identity=lambda n_workers: {"workers": dict(workers)}),
        sync=lambda ask, **named: ask(**named),
        submit=submit,
    )
    (tmp_path / "out").mkdir()
    pool = DaskPool(client, tmp_path / "out", print)
    assert pool.budget == 5
    workers.clear()
    pool._submit(Job("a", (), memory=4), {})
    pool._submit(Job("b", (), memory=6), {})
    assert [job.name for job in submitted] == ["a"]
    assert pool.wait().why == "needs 6 B, the largest worker has 5 B"


def test_workers_are_seen_while_the_client_refreshes_what_it_knows(
    cluster: Any, tmp_path: Path
) -> None:
    """Dask's client notes an answer without workers now and then: no job may fail by it."""
    with connected(cluster) as client:
        pool, seen, stop = DaskPool(client, tmp_path, print), [], threading.Event()

        def refresh() -> None:
            while not stop.is_set():
                client.sync(client._update_scheduler_info)

        refreshing = threading.Thread(target=refresh)
        refreshing.start()
        try:
            seen = [len(pool._workers()) for _ in range(200)]
        finally:
            stop.set()
            refreshing.join()
    assert set(seen) == {2}
