"""Ranks started by hand, one process each: a test can kill or stop any of them, and ask each.

``mlx.launch`` returns 0 whatever happened, and waits for a stopped rank without end. Used by
``tests/ranks/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started_ranks(
    folder: Path, count: int, script: str, *words: object
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start ``count`` ranks of a script on the ring; kill what is left of them at the end."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{probe.getsockname()[1]}"] for probe in probes]
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    common = {**os.environ, "MLX_HOSTFILE": str(file), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            cwd=ROOT,
            env={**common, "MLX_RANK": str(rank), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate()


def ended(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, list[str]]:
    """Return a rank's exit code and the errors that it printed, when it has ended."""
    _, errors = process.communicate(timeout=seconds)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    return process.returncode, lines


def wait_for(path: Path, *processes: subprocess.Popen[str], seconds: float = 240) -> None:
    """Return when a file or a folder is there; fail if a process ends before."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
