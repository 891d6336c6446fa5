"""The command that offers a machine to a scheduler, and what a worker does where it differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run as command
from mlx_slim.interrupts import ENDS_WITH_INPUT


def test_a_process_ends_with_the_parent_that_asks_for_it() -> None:
    code = (
        "import time; from mlx_slim.interrupts import end_with_parent; end_with_parent();"
        "print(flush=True); time.sleep(60)"
    )
    environment = {**os.environ, ENDS_WITH_INPUT: "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() and process.poll() is None
    process.stdin.close()
    assert process.wait(30) == 1
    process.stdout.close()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["studio:8786"], "no address of a Dask scheduler"),
        (["tcp://127.0.0.1:9", "--models", "gone"], "gone is not a folder"),
        (["tcp://127.0.0.1:9", "--memory", "much"], "not a memory size"),
    ],
)
def test_bad_words_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")
    assert command(["worker", *words]) == 2
    assert line in capsys.readouterr().err.splitlines()[0]


def test_the_command_offers_memory_and_leaves_when_told(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")
    from distributed import Client, LocalCluster

    local: Any = LocalCluster
    with (
        local(
            n_workers=0,
            processes=False,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            protocol="tcp",
        ) as cluster,
        Client(cluster) as client,
    ):
        words = ["worker", cluster.scheduler_address, "--memory", "1GB", "--name", "mine"]
        process = subprocess.Popen([sys.executable, "-m", "mlx_slim", *words])
        client.wait_for_workers(1, timeout=90)
        (one,) = client.scheduler_info(n_workers=-1)["workers"].values()
        assert (one["name"], one["resources"], one["nthreads"]) == ("mine", {"MEMORY": 10**9}, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        until = time.monotonic() + 30
        while client.scheduler_info(n_workers=-1)["workers"]:
            assert time.monotonic() < until
            time.sleep(0.1)
