"""The cores of a worker, divided among its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_slim.cluster import cores
from mlx_slim.cluster.cores import Cores, keep_to


def test_jobs_share_no_core_while_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpus_by_core", lambda: [[0, 4], [1, 5], [2, 6], [3, 7]])
    both = Cores()
    with both.reserved(2) as one, both.reserved(2) as two:
        assert (one, two) == ({0, 4, 1, 5}, {2, 6, 3, 7})
    with both.reserved(3) as one, both.reserved(3) as two, both.reserved(3) as three:
        assert sorted(map(len, (one, two, three))) == [2, 2, 4]
        assert one | two | three == set(range(8))
    with both.reserved(1) as alone:
        assert alone == set()  # all


def test_more_jobs_than_cores_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpus_by_core", lambda: [[0], [1]])
    many = Cores()
    with many.reserved(3) as one, many.reserved(3) as two, many.reserved(3) as three:
        assert [len(one_of) for one_of in (one, two, three)] == [1, 1, 1]
        assert one | two | three == {0, 1}


def test_cores_are_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpus_by_core", lambda: [[0], [1]])
    several = Cores()
    with several.reserved(2) as one:
        with several.reserved(2) as two:
            assert not one & two
        with several.reserved(2) as again:
            assert again == two


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone binds processes")
def test_the_threads_of_a_process_keep_to_its_cores(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    script = (
        "import sys; sys.stdin.readline()\n"
        "from mlx_slim import blas; from mlx_slim.cluster.machines import machine\n"
        "print(blas.physical_cores(), ', 1 CPU core,' in machine()['machine'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    keep_to(process.pid, {cpu})
    assert process.communicate("go\n")[0].split() == ["1", "True"]
    keep_to(process.pid, {cpu})  # it has ended: nothing happens
