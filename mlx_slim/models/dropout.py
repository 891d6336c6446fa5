"""Dropout masks that a recomputed block, or another rank, can draw again.

Invariant: inside ``dropout_from`` masks follow from its key alone, so a block that is computed
twice (gradient checkpointing) sees the same masks; outside they come from the global random state.
Inside ``drawn_for`` some rows of a micro-batch see the masks that they have in the whole of it.
Legend: B sequences, T positions. Try it: ``python -m pytest tests/models/test_dropout.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import mlx.core as mx

_keys: list[mx.array] = []
_again: list[tuple[list[mx.array], Iterator[mx.array] | None]] = []
_rows: list[tuple[mx.array, int, int]] = []


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


@contextlib.contextmanager
def dropout_again(keys: list[mx.array]) -> Iterator[None]:
    """Draw masks from the global state the first time, with the same ``keys`` the same ones again.

    Args:
        keys: Empty the first time; filled with what the masks were drawn from. Masks beyond those
            are drawn and added.
    """
    _again.append((keys, iter(list(keys)) if keys else None))
    try:
        yield
    finally:
        _again.pop()


def _drawn_key() -> mx.array | None:
    """Return the key of the next mask; None draws it from the global state."""
    if _keys:
        key, _keys[-1] = mx.random.split(_keys[-1])
        return key
    if not _again:
        return None
    keys, replayed = _again[-1]
    if replayed is not None and (key := next(replayed, None)) is not None:
        return key
    state = cast(Sequence[mx.array], mx.random.state)[0]
    keys.append(mx.stop_gradient(mx.random.split(state)[1]))  # which MLX takes now
    return None


def dropout_mask(keep: float, shape: tuple[int, ...]) -> mx.array:
    """Return booleans of ``shape``, true with probability ``keep``."""
    key = _drawn_key()
    return drawn(lambda shape: mx.random.bernoulli(keep, shape, key=key), shape)


@contextlib.contextmanager
def drawn_for(rows_B: mx.array, batch: int, width: int) -> Iterator[None]:
    """Draw for the rows ``rows_B`` (int32) of a micro-batch of ``batch`` rows, ``width`` wide."""
    _rows.append((rows_B, batch, width))
    try:
        yield
    finally:
        _rows.pop()


def drawn(draw: Callable[[tuple[int, ...]], mx.array], shape: tuple[int, ...]) -> mx.array:
    """Return ``draw(shape)``; inside ``drawn_for`` what it draws for these rows of the whole.

    Args:
        draw: Draws an array of a shape.
        shape: (B, T, ...) of the rows that are computed.
    """
    if not _rows:
        return draw(shape)
    rows_B, batch, width = _rows[-1]
    if shape[0] != rows_B.size or shape[1] > width:
        raise AssertionError(f"{shape} are no {rows_B.size} rows of {batch}, {width} wide")
    return mx.take(draw((batch, width, *shape[2:]))[:, : shape[1]], rows_B, axis=0)
