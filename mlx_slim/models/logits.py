"""Sums over a vocabulary that keep float32's precision.

Invariant: one mechanism for every log-softmax in training and scoring. On a CPU, MLX adds up a row
one element after the other: over 49,152 exponentials the small ones are lost and the sum comes out
5e-5 too low (``mx.sum``, ``mx.logsumexp`` and ``mx.softmax`` alike), which shifts a loss and,
behind massive activations, some gradients by almost 1%. BLAS keeps many partial sums: a product
with ones is 300 times as exact and faster. Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_slim.models import host_exponentials
from mlx_slim.models.activations import exp
from mlx_slim.runtime import on_gpu


def row_sums(values_NV: mx.array) -> mx.array:
    """Return the sum of each row (N, 1) of float32 ``values_NV``."""
    if on_gpu():
        return values_NV.sum(axis=-1, keepdims=True)
    return values_NV @ mx.ones((values_NV.shape[-1], 1))


def logsumexp(logits_NV: mx.array) -> mx.array:
    """Return log Σ exp of each row (N, 1), float32, differentiable."""
    logits_NV = logits_NV.astype(mx.float32)
    if host_exponentials.in_use(logits_NV):
        return host_exponentials.logsumexp(logits_NV)
    peak_N1 = mx.stop_gradient(logits_NV.max(axis=-1, keepdims=True))
    return mx.log(row_sums(exp(logits_NV - peak_N1))) + peak_N1


def token_nll(logits_NV: mx.array, targets_N: mx.array) -> mx.array:
    """Return −log softmax(logits)[target] of each row (N,), float32, nats."""
    target_N1 = mx.take_along_axis(logits_NV, targets_N[:, None], axis=-1)
    return (logsumexp(logits_NV) - target_N1.astype(mx.float32))[:, 0]


def kl_divergence(p_NV: mx.array, q_NV: mx.array) -> mx.array:
    """Return KL(softmax p ‖ softmax q) of each row (N,), float32, nats; p and q are logits."""
    log_p_NV = p_NV.astype(mx.float32) - logsumexp(p_NV)
    log_q_NV = q_NV.astype(mx.float32) - logsumexp(q_NV)
    return row_sums(mx.exp(log_p_NV) * (log_p_NV - log_q_NV))[:, 0]
