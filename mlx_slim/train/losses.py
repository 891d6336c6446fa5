"""Cross-entropy straight from hidden states: full logits never exist.

Invariant: value and gradients equal those of ``cross_entropy(head(hidden))`` in float32 for any
chunk size; at most one chunk of logits is alive, and each logit is exponentiated once, because the
gradient is formed together with the loss (the idea of arXiv 2411.09009, here without a kernel).
Legend: N supervised positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.lora import draw_key, dropout_from
from mlx_slim.models.activations import exp
from mlx_slim.models.anatomy import Head
from mlx_slim.models.logits import row_sums, token_nll
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.runtime import on_gpu

CHUNK_LOGITS = 1 << 23  # 8.4 M float32 logits: 34 MB each time a chunk of them is held


def chunk_size(vocabulary: int, setting: int | None, lanes: int = 1) -> int:
    """Return how many positions get logits at one time: ``setting``, or about 34 MB of them.

    Args:
        vocabulary: V.
        setting: ``train.loss_chunk``.
        lanes: Parts of a batch that are computed side by side; together they hold those 34 MB.
    """
    return setting or max(32, CHUNK_LOGITS // (vocabulary * lanes))


def cross_entropy_sum(logits_NV: mx.array, targets_N: mx.array) -> mx.array:
    """Return Σ −log softmax(logits)[target], a float32 scalar in nats."""
    return token_nll(logits_NV, targets_N).sum()


def _nll_and_gradient(
    hidden_CD: mx.array, weight_VD: mx.array, bias_V: mx.array | None, targets_C: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the chunk's NLL sum, its gradient by the hidden states, and exp(logits)/Σ.

    With p = softmax(hidden Wᵀ + b): d nll / d hidden = p W − W[target], so the one-hot matrix is
    never built.
    """
    logits_CV = _logits(hidden_CD, weight_VD, bias_V)
    target_C1 = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1)
    peak_C1 = logits_CV.max(axis=-1, keepdims=True)
    exp_CV = exp(logits_CV - peak_C1)
    total_C1 = row_sums(exp_CV)
    nll = (mx.log(total_C1) + peak_C1 - target_C1).sum()
    share_CV = exp_CV.astype(weight_VD.dtype)
    pull_CD = (share_CV @ weight_VD).astype(mx.float32) / total_C1
    gradient_CD = pull_CD - weight_VD[targets_C].astype(mx.float32)
    return nll, gradient_CD.astype(hidden_CD.dtype), exp_CV / total_C1


def _logits(hidden_CD: mx.array, weight_VD: mx.array, bias_V: mx.array | None) -> mx.array:
    logits_CV = (hidden_CD @ weight_VD.T).astype(mx.float32)
    return logits_CV if bias_V is None else logits_CV + bias_V.astype(mx.float32)


def _fused(
    hidden_ND: mx.array,
    weight_VD: mx.array,
    bias_V: mx.array | None,
    targets_N: mx.array,
    chunk: int,
    head_trains: bool,
) -> mx.array:
    """Return the NLL sum; its gradients by hidden (and head) are outputs of the forward pass."""

    @mx.custom_function
    def forward(hidden: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        nll = mx.zeros((), dtype=mx.float32)
        gradients: list[mx.array] = []
        d_weight = mx.zeros(weight.shape, dtype=mx.float32) if head_trains else mx.zeros(())
        d_bias = mx.zeros(bias.shape, dtype=mx.float32)
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]
            targets = targets_N[start : start + chunk]
            if gradients:  # chunks one after the other, or their logits would live together
                part = mx.depends([part], [nll, gradients[-1], d_weight])[0]
            used_bias = None if bias_V is None else bias
            part_nll, gradient, softmax = _nll_and_gradient(part, weight, used_bias, targets)
            nll = nll + part_nll
            gradients.append(gradient)
            if head_trains:
                part32 = part.astype(mx.float32)
                d_weight = mx.addmm(d_weight, softmax.T, part32).at[targets].subtract(part32)
                d_bias = (d_bias + softmax.sum(axis=0)).at[targets].subtract(1.0)
        return [nll, mx.concatenate(gradients), d_weight, d_bias]

    @forward.vjp
    def backward(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> list[mx.array]:
        scale = cotangents[0]
        _, d_hidden, d_weight, d_bias = outputs
        hidden, weight, bias = primals
        if not head_trains:
            return [
                (scale * d_hidden).astype(hidden.dtype),
                mx.zeros_like(weight),
                mx.zeros_like(bias),
            ]
        return [
            (scale * d_hidden).astype(hidden.dtype),
            (scale * d_weight).astype(weight.dtype),
            (scale * d_bias).astype(bias.dtype),
        ]

    bias = mx.zeros((weight_VD.shape[0],)) if bias_V is None else bias_V
    return cast(list[mx.array], forward(hidden_ND, weight_VD, bias))[0]


def _recomputed(hidden_ND: mx.array, targets_N: mx.array, head: Head, chunk: int) -> mx.array:
    """Return the NLL sum of a head with parts of its own (an adapter), recomputed chunk by chunk.

    The head's parameters travel as arguments: captured by a closure, ``mx.checkpoint`` would give
    them a silent zero gradient; so does the random key, or the two passes would drop differently.
    """

    def part(parameters: dict, key: mx.array, hidden_CD: mx.array, targets_C: mx.array) -> mx.array:
        head.module.update(parameters)
        with dropout_from(key):
            return cross_entropy_sum(head(hidden_CD), mx.stop_gradient(targets_C))

    parameters = head.module.trainable_parameters()
    recomputed = mx.checkpoint(part)
    nll = mx.zeros((), dtype=mx.float32)
    for start in range(0, hidden_ND.shape[0], chunk):
        hidden_CD = hidden_ND[start : start + chunk]
        targets_C = targets_N[start : start + chunk]
        nll = nll + recomputed(parameters, draw_key(), hidden_CD, targets_C)
    head.module.update(parameters)
    return nll


def _forward_only(hidden_ND: mx.array, targets_N: mx.array, head: Head, chunk: int) -> mx.array:
    nll = mx.zeros((), dtype=mx.float32)
    for start in range(0, hidden_ND.shape[0], chunk):
        part = mx.depends([hidden_ND[start : start + chunk]], [nll])[0]
        nll = nll + cross_entropy_sum(head(part), targets_N[start : start + chunk])
    return nll


def linear_cross_entropy(
    hidden_ND: mx.array,
    targets_N: mx.array,
    head: Head,
    *,
    chunk: int,
    gradient: bool = True,
    dense_VD: mx.array | None = None,
) -> mx.array:
    """Return Σ −log softmax(head(hidden))[target] without ever holding all logits.

    Args:
        hidden_ND: Hidden states of the supervised positions only, any floating dtype.
        targets_N: Token ids, integers.
        head: The model's head; dense, quantized, tied, biased or adapted.
        chunk: Positions whose logits exist at one time.
        gradient: Whether the result will be differentiated (forms the gradient along the way).
        dense_VD: The dense weight of a quantized head, where it exists already.

    Returns:
        A float32 scalar, nats.
    """
    module = head.module
    quantized = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    if not gradient:
        return _forward_only(hidden_ND, targets_N, head, chunk)
    if quantized and not on_gpu():
        weight_VD = dequantize_weight(module) if dense_VD is None else dense_VD
    elif type(module) in (nn.Linear, nn.Embedding):
        weight_VD = module["weight"]
    else:
        return _recomputed(hidden_ND, targets_N, head, chunk)
    trains = "weight" in module.trainable_parameters()
    bias_V = module.bias if "bias" in module else None
    return _fused(hidden_ND, weight_VD, bias_V, targets_N, chunk, trains)
