"""Losses over a vocabulary straight from hidden states: full logits never exist.

Invariant: value and gradients equal those of the loss of ``head(hidden)`` in float32 for any chunk
size; at most one chunk of logits is alive, and each logit is exponentiated once, because the
gradient is formed together with the loss (the idea of arXiv 2411.09009, here without a kernel).
What the loss is, a rule says: cross-entropy here, divergences from a teacher in ``distill/losses``.
Legend: N supervised positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

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


@dataclass(frozen=True)
class Slope:
    """The gradient of a chunk's loss by its logits, in parts that are cheap to multiply.

    It is ``scale_C · share_CV / total_C1``, minus ``push_C`` at each target: the one-hot matrix is
    never built, and the softmax is divided after the product where the head is frozen.

    Attributes:
        share_CV: float32.
        total_C1: float32, or None for ones.
        scale_C: float32, or None for ones.
        targets_C: Token ids, or None for no such term.
        push_C: float32, or None for ones.
    """

    share_CV: mx.array
    total_C1: mx.array | None = None
    scale_C: mx.array | None = None
    targets_C: mx.array | None = None
    push_C: mx.array | None = None

    def by_hidden(self, weight_VD: mx.array) -> mx.array:
        """Return the gradient by the hidden states, float32 (C, D)."""
        gradient_CD = (self.share_CV.astype(weight_VD.dtype) @ weight_VD).astype(mx.float32)
        if self.total_C1 is not None:
            gradient_CD = gradient_CD / self.total_C1
        if self.scale_C is not None:
            gradient_CD = gradient_CD * self.scale_C[:, None]
        if self.targets_C is None:
            return gradient_CD
        return gradient_CD - self._pushed(weight_VD[self.targets_C].astype(mx.float32))

    def _pushed(self, rows_CD: mx.array) -> mx.array:
        return rows_CD if self.push_C is None else rows_CD * self.push_C[:, None]

    def by_head(
        self, hidden_CD: mx.array, d_weight: mx.array, d_bias: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return ``d_weight`` (V, D) and ``d_bias`` (V,), float32, with this chunk's part added."""
        hidden32 = hidden_CD.astype(mx.float32)
        share_CV = self.share_CV if self.total_C1 is None else self.share_CV / self.total_C1
        if self.scale_C is not None:
            share_CV = share_CV * self.scale_C[:, None]
        d_weight = mx.addmm(d_weight, share_CV.T, hidden32)
        d_bias = d_bias + share_CV.sum(axis=0)
        if self.targets_C is not None:
            push = mx.array(1.0) if self.push_C is None else self.push_C
            d_weight = d_weight.at[self.targets_C].subtract(self._pushed(hidden32))
            d_bias = d_bias.at[self.targets_C].subtract(push)
        return d_weight, d_bias


class Rule(Protocol):
    """A summed loss of logits. ``columns`` are arrays with one row a position, not differentiated.

    Both return a float32 scalar in nats, or a vector whose first entry is the loss and whose others
    are only reported.
    """

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the sum over the positions; differentiable."""
        ...

    def slope(self, logits_CV: mx.array, *columns: mx.array) -> tuple[mx.array, Slope]:
        """Return the same, with its gradient by float32 ``logits_CV``."""
        ...


class NLL:
    """Σ w · −log softmax(logits)[target]; columns: ``targets_C``, and ``weights_C`` if not ones."""

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the weighted sum, a float32 scalar in nats."""
        targets_C, *weights = columns
        nll_C = token_nll(logits_CV, targets_C)
        return (nll_C * weights[0] if weights else nll_C).sum()

    def slope(self, logits_CV: mx.array, *columns: mx.array) -> tuple[mx.array, Slope]:
        """Return the sum and softmax − one-hot, weighted."""
        targets_C, *weights = columns
        target_C1 = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1)
        peak_C1 = logits_CV.max(axis=-1, keepdims=True)
        exp_CV = exp(logits_CV - peak_C1)
        total_C1 = row_sums(exp_CV)
        nll_C1 = mx.log(total_C1) + peak_C1 - target_C1
        if not weights:
            return nll_C1.sum(), Slope(exp_CV, total_C1, targets_C=targets_C)
        weights_C = weights[0]
        slope = Slope(exp_CV, total_C1, weights_C, targets_C, weights_C)
        return (nll_C1[:, 0] * weights_C).sum(), slope


def _logits(hidden_CD: mx.array, weight_VD: mx.array, bias_V: mx.array | None) -> mx.array:
    logits_CV = (hidden_CD @ weight_VD.T).astype(mx.float32)
    return logits_CV if bias_V is None else logits_CV + bias_V.astype(mx.float32)


def _fused(
    hidden_ND: mx.array,
    weight_VD: mx.array,
    bias_V: mx.array | None,
    rule: Rule,
    columns: tuple[mx.array, ...],
    chunk: int,
    head_trains: bool,
) -> mx.array:
    """Return the sum; its gradients by hidden (and head) are outputs of the forward pass."""

    @mx.custom_function
    def forward(hidden: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        total = mx.zeros((), dtype=mx.float32)
        gradients: list[mx.array] = []
        d_weight = mx.zeros(weight.shape, dtype=mx.float32) if head_trains else mx.zeros(())
        d_bias = mx.zeros(bias.shape, dtype=mx.float32)
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]
            if gradients:  # chunks one after the other, or their logits would live together
                part = mx.depends([part], [total, gradients[-1], d_weight])[0]
            logits_CV = _logits(part, weight, None if bias_V is None else bias)
            value, slope = rule.slope(logits_CV, *(c[start : start + chunk] for c in columns))
            total = total + value
            gradients.append(slope.by_hidden(weight).astype(hidden.dtype))
            if head_trains:
                d_weight, d_bias = slope.by_head(part, d_weight, d_bias)
        return [total, mx.concatenate(gradients), d_weight, d_bias]

    @forward.vjp
    def backward(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> list[mx.array]:
        scale = cotangents[0] if cotangents[0].ndim == 0 else cotangents[0][0]
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


def _recomputed(
    hidden_ND: mx.array, head: Head, rule: Rule, columns: tuple[mx.array, ...], chunk: int
) -> mx.array:
    """Return the sum for a head with parts of its own (an adapter), recomputed chunk by chunk.

    The head's parameters travel as arguments: captured by a closure, ``mx.checkpoint`` would give
    them a silent zero gradient; so does the random key, or the two passes would drop differently.
    """

    def part(
        parameters: dict, key: mx.array, hidden_CD: mx.array, columns: list[mx.array]
    ) -> mx.array:
        head.module.update(parameters)
        with dropout_from(key):
            return rule.value(head(hidden_CD), *(mx.stop_gradient(column) for column in columns))

    parameters = head.module.trainable_parameters()
    recomputed = mx.checkpoint(part)
    total = mx.zeros((), dtype=mx.float32)
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        cut = [column[rows] for column in columns]
        total = total + recomputed(parameters, draw_key(), hidden_ND[rows], cut)
    head.module.update(parameters)
    return total


def _forward_only(
    hidden_ND: mx.array, head: Head, rule: Rule, columns: tuple[mx.array, ...], chunk: int
) -> mx.array:
    total = mx.zeros((), dtype=mx.float32)
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        part = mx.depends([hidden_ND[rows]], [total])[0]
        total = total + rule.value(head(part), *(column[rows] for column in columns))
    return total


def linear_loss(
    hidden_ND: mx.array,
    head: Head,
    rule: Rule,
    columns: tuple[mx.array, ...],
    *,
    chunk: int,
    gradient: bool = True,
    dense_VD: mx.array | None = None,
) -> mx.array:
    """Return the loss ``rule`` of head(hidden) without ever holding all logits.

    Args:
        hidden_ND: Hidden states of the supervised positions only, any floating dtype.
        head: The model's head; dense, quantized, tied, biased or adapted.
        rule: What is summed over the positions.
        columns: What the rule wants to know, one row a position; not differentiated.
        chunk: Positions whose logits exist at one time.
        gradient: Whether the result will be differentiated (forms the gradient along the way).
        dense_VD: The dense weight of a quantized head, where it exists already.

    Returns:
        What the rule returns: a float32 scalar in nats, or a vector that begins with it.
    """
    module = head.module
    quantized = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    if not gradient:
        return _forward_only(hidden_ND, head, rule, columns, chunk)
    if quantized and not on_gpu():
        weight_VD = dequantize_weight(module) if dense_VD is None else dense_VD
    elif type(module) in (nn.Linear, nn.Embedding):
        weight_VD = module["weight"]
    else:
        return _recomputed(hidden_ND, head, rule, columns, chunk)
    trains = "weight" in module.trainable_parameters()
    bias_V = module.bias if "bias" in module else None
    return _fused(hidden_ND, weight_VD, bias_V, rule, columns, chunk, trains)


def linear_cross_entropy(
    hidden_ND: mx.array,
    targets_N: mx.array,
    head: Head,
    *,
    chunk: int,
    gradient: bool = True,
    dense_VD: mx.array | None = None,
    weights_N: mx.array | None = None,
) -> mx.array:
    """Return Σ w · −log softmax(head(hidden))[target], float32, nats: ``linear_loss`` of ``NLL``.

    Args:
        hidden_ND: Hidden states of the supervised positions only.
        targets_N: Token ids, integers.
        head: The model's head.
        chunk: Positions whose logits exist at one time.
        gradient: Whether the result will be differentiated.
        dense_VD: The dense weight of a quantized head, where it exists already.
        weights_N: float32 weight of each target; None is 1 for all.
    """
    columns = (targets_N,) if weights_N is None else (targets_N, weights_N)
    return linear_loss(
        hidden_ND, head, NLL(), columns, chunk=chunk, gradient=gradient, dense_VD=dense_VD
    )
