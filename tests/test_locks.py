"""Locks that die with their process, the temporaries of the dead, and those of the living."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_slim import locks
from mlx_slim.artifacts import atomic_file, atomic_folder, write_json
from mlx_slim.claims import makes_folder
from mlx_slim.errors import Complete, SlimError
from mlx_slim.run_dir import LOCK_FILE, RunDir, RunKind
from tests.support.kills import contents

ROOT = Path(__file__).parents[1]
RUN = RunKind("try", "run", "state.json", ("tokens", "part_*"))


def test_every_file_operation_of_the_primitives_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.primitives", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MLX_SLIM_BLAS": "off", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *tried = done.stdout.splitlines()
    assert first == "heavy []"
    moments = dict(line.split() for line in tried)
    assert len(moments) == 8 and all(int(count) > 5 for count in moments.values()), moments


LIVING = """
import sys, time
from pathlib import Path
from mlx_slim.artifacts import atomic_file, atomic_folder
from mlx_slim.run_dir import RunDir
from tests.test_locks import RUN
out = Path(sys.argv[1])
what = {"folder": lambda: atomic_folder(out), "file": lambda: atomic_file(out),
        "run": lambda: RunDir(out, RUN).claim(resume=False)}[sys.argv[2]]
with what() as inside:
    if sys.argv[2] == "run":
        (out / "tokens").mkdir()
        inside = atomic_file(out / "tokens" / "a").__enter__()
    print(inside, flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "file":
        inside.write_text("written by the other")
"""


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Any]:
    """Start a process that holds an output; it goes on when a line is written to it."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path, what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LIVING, str(out), what],
            cwd=ROOT,
            env={**os.environ, "MLX_SLIM_BLAS": "off", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_that_a_living_process_makes_is_refused_and_left_alone(
    living: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = living(out, "folder")
    before = contents(tmp_path)
    with pytest.raises(SlimError, match="another process is writing"), atomic_folder(out):
        pass
    with (
        pytest.raises(SlimError, match="another process is writing"),
        RunDir(out, RUN).claim(resume=True),
    ):
        pass
    locks.remove_dead(tmp_path)
    assert contents(tmp_path) == before
    process.communicate("\n")
    assert process.returncode == 0
    assert contents(tmp_path) == {"out": None}


def test_two_living_processes_write_one_file_one_after_the_other(
    living: Any, tmp_path: Path
) -> None:
    out = tmp_path / "cache" / "a.json"
    process = living(out, "file")
    write_json(out, "ours")
    assert len(contents(tmp_path)) == 3  # theirs is still there
    process.communicate("\n")
    assert process.returncode == 0
    assert contents(tmp_path) == {"cache": None, "cache/a.json": b"written by the other"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_a_living_process_is_refused_and_of_a_killed_one_begun_anew(
    living: Any, tmp_path: Path, resume: bool
) -> None:
    out = tmp_path / "out"
    process = living(out, "run")
    before = contents(tmp_path)
    with (
        pytest.raises(SlimError, match="another process is writing"),
        RunDir(out, RUN).claim(resume=resume),
    ):
        pass
    assert contents(tmp_path) == before
    process.kill()
    process.wait()
    with RunDir(out, RUN).claim(resume=resume) as claim:
        assert not claim.started
        assert ("to resume: starting" in claim.note) == resume
        assert list(contents(out)) == [LOCK_FILE]


def test_a_lock_does_not_outlive_its_process_in_a_forked_or_started_one(tmp_path: Path) -> None:
    script = f"""
import os, subprocess, sys, time
from pathlib import Path
from mlx_slim.artifacts import atomic_folder
with atomic_folder(Path({str(tmp_path / "out")!r})):
    worker = os.fork()
    if not worker:
        time.sleep(60)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(worker, other.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "MLX_SLIM_BLAS": "off", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    orphans = [int(pid) for pid in done.stdout.readline().split()]
    done.wait()
    try:
        deadline = time.monotonic() + 10  # the fork closes what it inherited when it first runs
        while True:
            try:
                with atomic_folder(tmp_path / "out"):
                    break
            except SlimError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        for pid in orphans:
            os.kill(pid, 9)
    done.stdout.close()
    assert contents(tmp_path) == {"out": None}


def test_other_files_are_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for mine in ("notes.txt", "tokens", ".hidden"):
        (out / mine).write_text("keep")
        for resume in (False, True):
            with (
                pytest.raises(SlimError, match="not empty and holds no run"),
                RunDir(out, RUN).claim(resume=resume),
            ):
                pass
        assert contents(out) == {mine: b"keep"}
        (out / mine).unlink()
    # Beside the start of a killed run: it is refused as it stands.
    (out / LOCK_FILE).write_text('{"command": "try", "before": ["tokens", "part_*"]}')
    for name in ("tokens", "part_1", "notes.txt"):
        (out / name).write_text("keep")
    before = contents(out)
    with pytest.raises(SlimError, match="not empty"), RunDir(out, RUN).claim(resume=True):
        pass
    assert contents(out) == before
    (out / "notes.txt").unlink()
    (out / ".DS_Store").write_text("")
    with RunDir(out, RUN).claim(resume=False):
        assert sorted(contents(out)) == [".DS_Store", LOCK_FILE]


def test_a_run_that_is_there_needs_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunDir(out, RUN).claim(resume=False):
        write_json(out / "state.json", {})
    with pytest.raises(SlimError, match="--resume"), RunDir(out, RUN).claim(resume=False):
        pass
    with RunDir(out, RUN).claim(resume=True) as claim:
        assert claim.started and not claim.note
    assert list(contents(out)) == ["state.json"]


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SlimError, match="created it meanwhile"), atomic_folder(out) as temporary:
        (temporary / "ours").touch()
        out.mkdir()
        (out / "theirs").write_text("keep")
    assert contents(tmp_path) == {"out": None, "out/theirs": b"keep"}


def test_complete_is_what_the_same_command_made_of_the_same_contents(tmp_path: Path) -> None:
    calls = []

    @makes_folder("try", "speed")
    def work(source: Path, out: Path, bits: int = 4, speed: int = 1) -> None:
        calls.append(bits)
        with atomic_folder(out) as temporary:
            (temporary / "model.safetensors").write_text("w")
            (temporary / "config.json").write_text("{}")

    source, out = tmp_path / "source", tmp_path / "source" / "out"
    source.mkdir()
    (source / "model.safetensors").write_bytes(bytes(5 << 20))
    work(source, out)
    with pytest.raises(Complete, match="complete: nothing to do"):
        work(source, out, speed=2)
    source.rename(tmp_path / "moved")
    source, out = tmp_path / "moved", tmp_path / "moved" / "out"
    with pytest.raises(Complete):
        work(source, out)
    refused = pytest.raises(SlimError, match="exists already")
    with refused as caught:
        work(source, out, bits=3)
    assert caught.value.exit_code == 2
    weights = source / "model.safetensors"
    before = weights.stat()
    for place in (0, 70_000):  # in a block that is read, and between two
        with weights.open("r+b") as handle:
            handle.seek(place)
            handle.write(b"other")
        with pytest.raises(SlimError, match="exists already"):
            work(source, out)
        weights.write_bytes(bytes(5 << 20))
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Complete):
        work(source, out)
    (out / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(SlimError, match=r"exists already: config\.json was removed"):
        work(source, out)
    (tmp_path / "config.json").rename(out / "config.json")
    (out / "model.safetensors").write_text("")
    with pytest.raises(SlimError, match="weights are not those that were written"):
        work(source, out)
    assert calls == [4]
    created = [f"out/{name}" for name in (".mlx-slim.json", "config.json", "model.safetensors")]
    assert sorted(contents(source)) == ["model.safetensors", "out", *created]


def test_names_that_cannot_be_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @makes_folder("try")
    def work(out: Path) -> None:
        raise AssertionError("nothing is computed for an output that cannot be written")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in (".", "/", "", "dangling"):
        with pytest.raises(SlimError, match="exists already"):
            work(Path(name))
    for length in (250, 300):  # the output could be made and its temporary not; neither could
        with pytest.raises(SlimError, match="File name too long"):
            work(Path("n" * length))
        with (
            pytest.raises(SlimError, match="File name too long"),
            RunDir(Path("n" * length), RUN).claim(resume=False),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with RunDir(Path(), RUN).claim(resume=False):
        assert list(contents(Path())) == [LOCK_FILE]


def test_without_locks_one_line_says_so_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    out = tmp_path / "out"
    with RunDir(out, RUN).claim(resume=False):
        (out / "tokens").mkdir()
        left = contents(out)
        monkeypatch.setattr(fcntl, "flock", no_locks)
        monkeypatch.setattr(locks, "_warned", False)
        with caplog.at_level(logging.WARNING, "mlx_slim"):
            for _ in range(2):
                with atomic_file(tmp_path / "a.json") as temporary:
                    temporary.write_text("a")
        assert [record.getMessage().count("has no locks") for record in caplog.records] == [1]
        other = tmp_path / "other"
        other.mkdir()
        for name, content in left.items():
            if content is None:
                (other / name).mkdir()
            else:
                (other / name).write_bytes(content)
        with (
            pytest.raises(SlimError, match="may still be writing it"),
            RunDir(other, RUN).claim(resume=True),
        ):
            pass
        assert (other / "tokens").is_dir()
        (tmp_path / ".b.mlx-slim-tmp" / "new").mkdir(parents=True)
        with (
            pytest.raises(SlimError, match="may still be writing it"),
            atomic_folder(tmp_path / "b"),
        ):
            pass
        locks.remove_dead(tmp_path)
        assert (tmp_path / ".b.mlx-slim-tmp" / "new").is_dir()
