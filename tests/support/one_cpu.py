"""A process that keeps to one CPU: the jobs of its pools have as many threads as itself then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mlx_slim import blas


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Let this thread, and every process that is started inside, use one CPU; on Linux alone."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with blas.single_threaded():
            yield
    finally:
        os.sched_setaffinity(0, before)
