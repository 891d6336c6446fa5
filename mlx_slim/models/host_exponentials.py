"""Exponentials by NumPy, where a CPU computes a model without its gradient.

MLX takes 10 to 19 ns for an exponential on x86, NumPy 1: of softmax, SwiGLU and log-sum-exp, a
third of a forward pass. Inside ``host_exponentials`` these three evaluate what they are given and
answer with new arrays; everything else stays a graph. Invariant: the values of MLX's own operations
to float32 rounding, and of many numbers those of a row do not depend on the rows beside it; few
numbers, other dtypes, attention sinks, and a GPU are MLX's. Not inside a gradient, where what is
evaluated stays in memory: training computes blocks (``training/blockwise.py``) and losses
(``in_losses``) outside of one. Try it: ``mlx-slim bench eval MODEL``.

Legend: B rows, H heads, K heads of keys, G = H / K, T queries, S keys, D width of a head.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.models.replacement import Replacement
from mlx_slim.runtime import on_gpu

BLOCK = 1 << 15  # numbers at a time: what a core's cache holds besides their inputs
FEW = 1 << 13  # numbers: for fewer, evaluating them takes longer than MLX's exponentials
_losses = threading.local()


@contextlib.contextmanager
def host_exponentials() -> Iterator[None]:
    """Let models that are computed inside, in any thread, take NumPy's; contexts may nest."""
    with contextlib.nullcontext() if on_gpu() else _replaced():
        yield


def in_use(*arrays: mx.array) -> bool:
    """Return whether the exponentials of ``arrays`` are NumPy's here: of many numbers."""
    many = _replaced.contexts > 0 and arrays[0].size >= FEW
    return many and all(array.dtype == mx.float32 for array in arrays)


@contextlib.contextmanager
def in_losses() -> Iterator[None]:
    """Let losses that this thread computes inside, not in a gradient, take NumPy's."""
    _losses.inside = True
    try:
        yield
    finally:
        _losses.inside = False


def in_losses_here(logits: mx.array) -> bool:
    """Return whether a loss of ``logits`` takes NumPy's here."""
    return getattr(_losses, "inside", False) and logits.dtype == mx.float32


def exponentials(logits_NV: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return exp(logits − peak) of each row (N, V), their sums and the peaks (N, 1), float32."""
    mx.eval(logits_NV)
    logits = np.asarray(logits_NV)
    exps = np.empty(logits.shape, np.float32)
    totals, peaks = (np.empty((len(logits), 1), np.float32) for _ in range(2))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
        for row, out, total, peak in zip(logits, exps, totals, peaks, strict=True):
            peak[0] = row.max()
            np.subtract(row, peak[0], out=out)
            np.exp(out, out=out)
            total[0] = out.sum()
    return mx.array(exps), mx.array(totals), mx.array(peaks)


def _numbers(x: mx.array) -> np.ndarray:
    """Return the numbers of an evaluated array, rows contiguous; not to be written to."""
    return np.ascontiguousarray(np.asarray(x))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gate · sigmoid(gate) · up of float32 arrays of one shape."""
    mx.eval(gate, up)
    gates, ups = _numbers(gate).reshape(-1), _numbers(up).reshape(-1)
    result = np.empty_like(gates)
    with np.errstate(over="ignore", invalid="ignore"):  # e^-x of x below -88: a sigmoid of 0
        for begin in range(0, gates.size, BLOCK):
            block = slice(begin, begin + BLOCK)
            out = np.negative(gates[block], out=result[block])
            np.exp(out, out=out)
            out += 1.0
            np.divide(gates[block], out, out=out)
            out *= ups[block]
    return mx.array(result.reshape(gate.shape))


def logsumexp(logits_NV: mx.array) -> mx.array:
    """Return log Σ exp of each row (N, 1) of float32 ``logits_NV``."""
    mx.eval(logits_NV)
    logits = _numbers(logits_NV)
    result = np.empty((logits.shape[0], 1), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for row, total in zip(logits, result, strict=True):
            peak = row.max()
            total[0] = np.log(np.exp(row - peak).sum()) + peak
    return mx.array(result)


def softmax(scores: mx.array) -> mx.array:
    """Return the softmax of float32 ``scores`` over the last axis."""
    mx.eval(scores)
    rows = _numbers(scores).reshape(-1, scores.shape[-1])
    result = np.empty_like(rows)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for begin in range(0, len(rows), step):
            block = slice(begin, begin + step)
            out = np.subtract(
                rows[block], rows[block].max(axis=-1, keepdims=True), out=result[block]
            )
            np.exp(out, out=out)
            out /= out.sum(axis=-1, keepdims=True)
    return mx.array(result.reshape(scores.shape))


def _logsumexp_before(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a log-sum-exp that goes to ``stock`` where it is not over float32 rows."""

    def over_rows(x: mx.array, axis: Any = None, keepdims: bool = False, **named: Any) -> mx.array:
        if axis != -1 or not keepdims or not in_use(x):
            return stock(x, axis, keepdims, **named)
        return logsumexp(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], 1)

    return over_rows


def _attention_before(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return attention that goes to ``stock`` where it is not plain float32."""

    def attention(
        q_BHTD: mx.array,
        k_BKSD: mx.array,
        v_BKSD: mx.array,
        *,
        scale: float,
        mask: Any = None,
        **named: Any,
    ) -> mx.array:
        if named.get("sinks") is not None or not in_use(q_BHTD, k_BKSD, v_BKSD):
            return stock(q_BHTD, k_BKSD, v_BKSD, scale=scale, mask=mask, **named)
        groups = q_BHTD.shape[1] // k_BKSD.shape[1]
        q_BKGTD = mx.unflatten(q_BHTD * scale, 1, (-1, groups))
        scores = q_BKGTD @ k_BKSD[:, :, None].swapaxes(-1, -2)
        weights = softmax(_masked(scores, mask))
        return mx.flatten(weights @ v_BKSD[:, :, None], 1, 2)

    return attention


def _masked(scores_BKGTS: mx.array, mask: Any) -> mx.array:
    """Return scores with ``mask`` as MLX reads it: booleans, numbers to add, or "causal"."""
    if mask is None:
        return scores_BKGTS
    queries, keys = scores_BKGTS.shape[-2:]
    if isinstance(mask, str):
        mask = mx.tri(queries, keys, keys - queries, dtype=mx.bool_)
    elif mask.ndim > 2:  # (B or 1, H or 1, T, S), or without the rows
        by_head = mask.shape[-3] > 1
        mask = mx.unflatten(mask, -3, scores_BKGTS.shape[1:3] if by_head else (1, 1))
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores_BKGTS, mx.finfo(mx.float32).min)
    return scores_BKGTS + mask


_replaced = Replacement(
    [(mx.fast, "scaled_dot_product_attention"), (mx, "logsumexp")],
    lambda attention, total: (_attention_before(attention), _logsumexp_before(total)),
)
