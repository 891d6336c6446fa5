"""What the tests of ``data/workers.py`` let other processes do: quick to import there."""

from __future__ import annotations

import os
import signal
import sys
import time

from mlx_slim.errors import SlimError


def double(task: int) -> int:
    return 2 * task


def process(task: int) -> int:
    return os.getpid()


def slow_at_first(task: int) -> int:
    """The later the task, the sooner its answer."""
    time.sleep(max(0, 4 - task) * 0.05)
    return task


def noisy(task: int) -> int:
    print("a line of a library")
    os.write(1, b"another, from C\n")
    return task


def refuse_three(task: int) -> int:
    if task == 3:
        raise SlimError("row 3 is wrong", "fix row 3", ["a detail"])
    return task


def broken(task: int) -> int:
    raise KeyError("a fault of ours")


def die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def heavy_modules(task: list[str]) -> list[str]:
    for name in task:
        __import__(name)
    return [name for name in ("mlx.core", "mlx_lm", "torch") if name in sys.modules]
