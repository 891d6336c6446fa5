"""Processes of this program that work in one folder at a time, and end with this one.

Invariant: each holds the folder's lock too, so a folder is in use as long as one of them lives; a
signal to this process reaches all of them, once, and it waits until their state is saved; when this
process is killed, their standard input closes and they end. Used by ``cluster/pool.py``. Try it:
``mlx-slim compare matrix-tiny -o runs/tiny``, then Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from mlx_slim.errors import Interrupted
from mlx_slim.interrupts import ENDS_WITH_INPUT, SignalFlag

MEMORY_VARIABLE = "MLX_SLIM_MEMORY"  # bytes that a process may use, whatever its recipe says
_POLL = 0.05  # seconds between polls


class Children:
    """Child processes by name, in a ``with`` block; leaving it ends those that are left.

    A signal inside the block is noted and acted on in ``wait``; a second one is raised.

    Args:
        descriptor: Of the folder's lock, which they inherit.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stop = SignalFlag()

    def __enter__(self) -> Children:
        """Listen for signals."""
        self._stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and wait for it."""
        try:
            self._terminate()
            for process in self._running.values():
                process.wait()
        finally:
            self._stop.__exit__()

    def __len__(self) -> int:
        """Return how many have not been waited for."""
        return len(self._running)

    def start(self, name: str, command: Sequence[str], memory: int = 0) -> None:
        """Start a process that may use ``memory`` bytes; 0 is not limited."""
        self._running[name] = subprocess.Popen(
            [*command],
            pass_fds=[self._descriptor],
            stdin=subprocess.PIPE,
            env=child_environment(memory),
        )

    def wait(self) -> tuple[str, int]:
        """Return the name and the exit code (negative: killed by that signal) of one that ended.

        Raises:
            Interrupted: A signal came, here or in a child; all have saved their state and ended.
            KeyboardInterrupt: A second signal came.
        """
        told = False
        while True:
            ended = self._ended()
            if ended is not None and ended[1] == Interrupted.exit_code:
                self._stop.requested = True  # Ctrl-C reaches all processes of a terminal
            elif ended is not None and not self._stop.requested:
                return ended
            if self._stop.requested:
                if not told:
                    self._terminate()
                    told = True
                if not self._running:
                    raise Interrupted("stopped; what is complete is kept")
            if ended is None:
                time.sleep(_POLL)

    def _ended(self) -> tuple[str, int] | None:
        """Return a process that has ended, which is forgotten, and its exit code."""
        for name, process in self._running.items():
            if (code := process.poll()) is not None:
                del self._running[name]
                if process.stdin is not None:
                    process.stdin.close()
                return name, code
        return None

    def _terminate(self) -> None:
        for process in self._running.values():
            process.terminate()


def child_environment(memory: int = 0) -> dict[str, str]:
    """Return the environment of a process that ends with this one and may use ``memory`` bytes."""
    limit = {MEMORY_VARIABLE: str(memory)} if memory else {}
    return {**os.environ, ENDS_WITH_INPUT: "1", **limit}


def exit_reason(code: int) -> str:
    """Return why a process ended that left no message, from its exit code."""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            return f"killed by {name}{memory}"
    return f"ended with exit code {code}"
