"""The cores of a worker, divided among the jobs that it runs at a time.

Two processes that each start a thread for every core take more than twice as long as one after the
other: the threads of a BLAS wait busily for those that have no core. Invariant: of the jobs that
run at a time no two have a core in common while there are cores enough, and none has more than its
part, so a job's threads, and its last digits, do not depend on what runs beside it. Nothing but on
Linux: a Mac's jobs share its GPU. Try it: ``mlx-slim compare matrix-tiny --workers 2``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from mlx_slim.blas import cpus_by_core


class Cores:
    """Who has which cores, in a process that runs jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[int] = set()

    @contextlib.contextmanager
    def reserved(self, jobs: int) -> Iterator[set[int]]:
        """Yield the CPUs of one of ``jobs`` jobs; empty where it may have all of them."""
        with self._lock:
            place = next(place for place in range(jobs + 1) if place not in self._taken)
            self._taken.add(place)
        try:
            yield _cpus_of(place, jobs)
        finally:
            with self._lock:
                self._taken.discard(place)


def _cpus_of(place: int, jobs: int) -> set[int]:
    cores = cpus_by_core()
    if jobs == 1 or not cores:
        return set()
    count = len(cores)
    begin = place * count // jobs % count
    end = max(begin + 1, (place + 1) * count // jobs)
    return {cpu for core in cores[begin:end] for cpu in core}


def keep_to(process: int, cpus: set[int]) -> None:
    """Let a process that was just started, and all its threads, use ``cpus`` alone."""
    if cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # it has ended, or may not be bound here
            os.sched_setaffinity(process, cpus)
