"""The served page: it follows the run, listens here alone, and ends with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from mlx_slim.artifacts import write_json
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run_dir import state_record
from mlx_slim.finetuning.watch import HOST, server
from tests.support.runs import recipe


def add_step(run: Path, number: int, loss: float) -> None:
    """Append a step to the metrics of a run."""
    record = {
        **{"event": "step", "step": number, "epoch": number / 10, "loss": loss, "tokens": 10},
        **{"tokens_per_second": 5.0, "learning_rate": 1e-3, "grad_norm": 1.0},
        **{"active_memory_bytes": 10**6, "peak_memory_bytes": 2 * 10**6},
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run that has started: its recipe and a step."""
    folder = tmp_path / "run"
    resolved = recipe(tmp_path / "model", tmp_path / "rows.jsonl")
    write_json(folder / "recipe.json", state_record(resolved, None))
    add_step(folder, 1, 3.0)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with server(folder) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{serving.server_address[1]}"
        finally:
            serving.shutdown()
            thread.join()


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


def test_fetched_twice_it_has_followed_the_run(run: Path) -> None:
    with served(run) as address:
        before, version = fetch(address), fetch(f"{address}/version")
        assert fetch(f"{address}/version") == version
        assert "1 steps" in before or "step</dt><dd>1" in before
        add_step(run, 2, 2.0)
        assert fetch(f"{address}/version") != version
        assert "step</dt><dd>2" in fetch(address)
    assert not (run / "report.html").exists()


def test_its_script_knows_the_version_and_may_run_alone(run: Path) -> None:
    with served(run) as address, urllib.request.urlopen(address, timeout=20) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
        nonce = re.search(r"'nonce-([^']+)'", policy)
        assert nonce and f'<script nonce="{nonce[1]}">' in page
        assert f"let seen = '{fetch(address + '/version')}'" in page
        assert page.count("<script") == 1 and "default-src 'none'" in policy


def test_another_host_name_and_another_path_get_nothing(run: Path) -> None:
    with served(run) as address:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(f"{address}/recipe.json")
        connection = HTTPConnection(HOST, int(address.rpartition(":")[2]), timeout=20)
        connection.request("GET", "/", headers={"Host": "evil.example:80"})
        assert connection.getresponse().status == 403
        connection.close()


def test_a_browser_leaves_port_80_out(run: Path) -> None:
    with served(run) as address:
        connection = HTTPConnection(HOST, int(address.rpartition(":")[2]), timeout=20)
        connection.request("GET", "/version", headers={"Host": HOST})
        assert connection.getresponse().status == 200
        connection.close()


def test_a_folder_that_vanishes_and_who_leaves_are_no_traceback(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(run) as address:
        run.rename(run.with_name("elsewhere"))
        assert fetch(f"{address}/version")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            fetch(address)
        for _ in range(3):  # a reset in place of reading the answer
            probe = socket.create_connection((HOST, int(address.rpartition(":")[2])))
            probe.sendall(b"GET / HTTP/1.0\r\n")
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            probe.close()
        assert fetch(f"{address}/version")
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_one_line(run: Path) -> None:
    with server(run) as serving, pytest.raises(SlimError, match="cannot be listened on"):
        server(run, int(serving.server_address[1]))


def test_ctrl_c_ends_the_command(run: Path) -> None:
    command = [sys.executable, "-m", "mlx_slim", "report", str(run), "--watch"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    address = re.search(r"http://\S+", process.stdout.readline())
    assert address and "mlx-slim run" in fetch(address[0])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
