"""Dropout masks that a recomputed block can draw again.

Invariant: inside ``dropout_from`` masks follow from its key alone, so a block that is computed
twice (gradient checkpointing) sees the same masks; outside they come from the global random state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx

_keys: list[mx.array] = []


def draw_key() -> mx.array:
    """Return a fresh random key (2,) from the global state."""
    return mx.stop_gradient(mx.random.randint(0, 2**31 - 1, (2,), dtype=mx.uint32))


@contextlib.contextmanager
def dropout_from(key: mx.array) -> Iterator[None]:
    """Draw dropout masks from ``key`` inside the context instead of from the global state.

    A block that is recomputed in the backward pass must see the masks of its forward pass, or the
    gradient is that of another function: draw a key outside, pass it in as an argument.
    """
    _keys.append(mx.stop_gradient(key))
    try:
        yield
    finally:
        _keys.pop()


def dropout_mask(keep: float, shape: tuple[int, ...]) -> mx.array:
    """Return booleans of ``shape``, true with probability ``keep``."""
    key = None
    if _keys:
        key, _keys[-1] = mx.random.split(_keys[-1])
    return mx.random.bernoulli(keep, shape, key=key)
