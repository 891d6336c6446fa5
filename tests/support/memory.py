"""Counters of MLX's memory, for tests of what a piece of work holds at most."""

import gc
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")


def reset_peak() -> int:
    """Begin to count anew, and return the bytes held now: what other tests still hold.

    What is dead but in a cycle goes first: freed later, it would hide as much of the peak.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def peak_of(work: Callable[[], T]) -> tuple[T, int]:
    """Return what ``work`` gives, and the bytes that MLX held at most while it worked."""
    before = reset_peak()
    return work(), mx.get_peak_memory() - before
