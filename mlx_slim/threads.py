"""Work side by side on the cores of a CPU, each thread with MLX streams of its own.

Invariant: results come back in the order of the work, whatever thread computed them; where one
fails, or Ctrl-C comes, no thread begins anything else, and what asks ``check_awaited`` in between
ends there. On a GPU there is one thread. Try it: ``python -m pytest tests/test_threads.py``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any

import mlx.core as mx

from mlx_slim.runtime import return_free_memory

_thread = threading.local()  # ``stopped``: the event that ends the work of a thread


def run_in_threads(function: Callable, work: Sequence[tuple], threads: int) -> list:
    """Return ``function(*arguments)`` for each of ``work``, in order, computed by ``threads``.

    An MLX stream belongs to its thread, and a thread that ends with a stream open aborts the
    process (mlx 0.32.4): the threads live for one call and close theirs.
    """
    waiting: queue.SimpleQueue[tuple[int, tuple]] = queue.SimpleQueue()
    stopped = threading.Event()
    for item in enumerate(work):
        waiting.put(item)

    def drain() -> dict[int, Any]:
        done: dict[int, Any] = {}
        _thread.stopped = stopped
        try:
            with contextlib.suppress(queue.Empty):
                while True:
                    index, arguments = waiting.get_nowait()
                    done[index] = function(*arguments)
                    return_free_memory()
            return done
        finally:
            mx.clear_streams()

    # As many tasks as threads, and each waits for work that others leave: one task a thread.
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(lambda: (barrier.wait(), drain())[1]) for _ in range(threads)]
        try:
            results = {
                i: value for part in as_completed(futures) for i, value in part.result().items()
            }
        except BaseException:  # Ctrl-C, or one that failed: nobody waits for the others
            stopped.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            raise
    return [results[index] for index in range(len(work))]


def check_awaited() -> None:
    """End the work of a thread of ``run_in_threads`` whose result nobody waits for any more.

    For work that takes seconds, between its steps: Ctrl-C ends a command when its threads have.

    Raises:
        CancelledError: In such a thread.
    """
    stopped: threading.Event | None = getattr(_thread, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise CancelledError
