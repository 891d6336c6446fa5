"""Candidates in a pool: the search of one worker, whatever ends first, fails ahead or is killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cluster.jobs import Ended, Job
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.locks import is_locked
from mlx_slim.run_dir import LOCK_FILE
from mlx_slim.runtime import memory_budget
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.candidate_job import run_candidate
from mlx_slim.slimming.making import MakesInPool, check_sizes
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.request import space_of
from mlx_slim.slimming.run import slim
from mlx_slim.slimming.verify import verify
from tests.slimming.conftest import Setting
from tests.support.one_cpu import one_cpu
from tests.support.pools import HerePool
from tests.support.runs import Recorder
from tests.support.stored import files_of, until


def pool_here(monkeypatch: pytest.MonkeyPatch, out: Path, most: int) -> list[Job]:
    """Let searches in ``out`` have a pool in this process; return the jobs that it will start."""
    pool = HerePool(lambda name: run(out, name), most, memory_budget("auto"))

    @contextlib.contextmanager
    def pool_of(*_: Any) -> Iterator[HerePool]:
        yield pool

    monkeypatch.setattr("mlx_slim.slimming.search.pool_of", pool_of)
    return pool.started


def run(out: Path, name: str) -> Ended:
    run_candidate(out, name, Recorder())
    return Ended(name, 0)


def results(folder: Path) -> dict[str, Any]:
    """Return the files of a search that say what came out, without what a clock says."""
    stored = files_of(folder, "slim.json", "model", "scores", "claim", "ranked")
    return {
        name: one
        if isinstance(one, bytes)
        else json.loads(json.dumps(one).replace(str(folder), "OUT"))
        for name, one in stored.items()
    }


def test_sizes_begun_ahead_decide_nothing(
    setting: Setting, whole_score: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a budget sizes are decided in order: what was made ahead leaves no score."""
    (model, options), out = setting, tmp_path / "out"
    jobs = pool_here(monkeypatch, out, 3)
    slim(model, out, replace(options, workers=3, disk=None, keep=100.0), Recorder())
    assert results(out)["slim.json"] == results(whole_score)["slim.json"]
    complete = {
        f"candidates/{file.parent.name}" for file in whole_score.glob("candidates/*/size.json")
    }
    ahead = {job.name for job in jobs} - complete
    assert len(ahead) == 1 and len(jobs) == len(complete)  # 8 bits of all layers are no job
    assert all(2**31 < job.memory <= memory_budget("auto") for job in jobs)
    assert not list(out.glob("candidates/*/targets")) and verify(out).numbers > 0


def candidates(setting: Setting, count: int) -> list[Candidate]:
    space = space_of(setting[0], setting[1])
    return [space.candidate(bits, ()) for bits in (8, 6, 5, 4, 3, 2)[:count]]


def test_a_failure_ahead_of_its_turn_is_told_in_its_turn_or_never(setting: Setting) -> None:
    first, second, third, last = candidates(setting, 4)
    done: set[str] = set()
    divisors: list[int] = []

    def launch(name: str) -> Ended:
        if name == second.key:
            return Ended(name, ResourceError.exit_code, "no room")
        done.add(name)
        return Ended(name, 0)

    def job_of(one: Candidate, divisor: int) -> Job:
        divisors.append(divisor)
        if one == third:
            raise SlimError("no such rows")
        return Job(one.key, ())

    pool = HerePool(launch, 2)
    maker = MakesInPool(pool, True, lambda one: one.key in done, job_of)
    maker.ensure(first, [second, third, last], 4)
    assert done == {first.key, last.key}
    assert divisors == [2, 2, 2, 1]  # four on two machines; the last one has what is left
    with pytest.raises(ResourceError, match=rf"{second.key}: no room"):
        maker.ensure(second, [third, last], 3)
    with pytest.raises(SlimError, match="no such rows"):
        maker.ensure(third, [last], 2)
    maker.ensure(last, [], 1)
    assert [job.name for job in pool.started] == [first.key, second.key, last.key]


def test_weights_that_did_not_come_back_are_one_line(setting: Setting, tmp_path: Path) -> None:
    (one,) = candidates(setting, 1)
    pool = HerePool(lambda name: Ended(name, 0))
    maker = MakesInPool(pool, False, lambda _: False, lambda *_: Job(one.key, ()))
    with pytest.raises(SlimError, match="its weights stay on its worker"):
        maker.ensure(one, [], 1)
    large = replace(one, cost=replace(one.cost, disk_bytes=250 * 10**6))
    check_sizes([large], pool, tmp_path)
    pool.shared = False
    check_sizes([one], pool, tmp_path)
    with pytest.raises(SlimError, match=r"up to 250 MB, a worker sends 256 MB at most") as no:
        check_sizes([one, large], pool, tmp_path)
    assert "-o DIR" in no.value.hint


def words_of(model: Path, options: SlimOptions, out: Path) -> list[str]:
    words = ["slim", str(model), "--disk", str(options.disk), "--task", options.tasks[0]]
    words += ["--data", str(options.data), "--limit", str(options.limit)]
    return [*words, "--workers", "2", "-o", str(out)]


@pytest.fixture
def on_one_cpu() -> Iterator[None]:
    """Two jobs at a time share the cores: with one core they round as one job does."""
    with one_cpu():
        yield


@pytest.mark.usefixtures("on_one_cpu")
def test_a_killed_coordinator_resumes_to_the_same_files(setting: Setting, tmp_path: Path) -> None:
    """Killed while a process recovers a candidate: it ends, and one worker goes further."""
    pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")
    (model, options), out, undisturbed = setting, tmp_path / "out", tmp_path / "undisturbed"
    slim(model, undisturbed, options, Recorder())
    coordinator = subprocess.Popen(
        [sys.executable, "-m", "mlx_slim", *words_of(model, options, out)]
    )
    try:
        until(lambda: list(out.glob("candidates/*/recover/recipe.json")), 120)
    finally:
        coordinator.kill()
        coordinator.wait()
    until(lambda: not is_locked(out / LOCK_FILE), 60)  # the candidate's process holds it, too
    assert not (out / "slim.json").exists()
    scores = {file: file.stat().st_mtime_ns for file in out.glob("scores/*/*/results.json")}
    slim(model, out, options, Recorder(), resume=True)
    assert results(out) == results(undisturbed)
    assert len(scores) >= 3 and all(file.stat().st_mtime_ns == scores[file] for file in scores)
