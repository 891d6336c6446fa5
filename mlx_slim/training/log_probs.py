"""The log-probability of each target straight from hidden states: full logits never exist.

Invariant: values and gradients equal those of ``log_softmax(head(hidden))[target]`` in float32 for
any chunk size, whatever function of the log-probabilities is differentiated; at most one chunk of
logits is alive. A frozen head that is one matrix gives the gradient by the hidden states with the
value; any other one computes its logits again in the backward pass, with the cotangents as loss
weights (``losses.py``). Try it: ``python -m pytest tests/training/test_log_probs.py``. Legend: N
targets, C of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_slim.models.logits import token_nll
from mlx_slim.models.quantized import HeadWeight
from mlx_slim.models.structure import Head
from mlx_slim.training.losses import (
    NLL,
    by_autodiff,
    by_logits_gradient,
    chunks,
    nll_and_gradient,
    plain_weight,
)


def target_log_probs(
    hidden_ND: mx.array,
    head: Head,
    targets_N: mx.array,
    *,
    chunk: int,
    gradient: bool = True,
    dense_VD: mx.array | None = None,
) -> mx.array:
    """Return log softmax(head(hidden))[target] of each row (N,), float32, nats.

    Args:
        hidden_ND: Hidden states, any floating dtype.
        head: The model's head; dense, quantized, tied, biased or adapted.
        targets_N: Token ids, integers.
        chunk: Positions whose logits exist at one time.
        gradient: Whether a function of the result will be differentiated.
        dense_VD: The dense weight of a quantized head, where it exists already.
    """
    if not gradient:
        return _values(hidden_ND, head, targets_N, chunk)
    named = cast(list[tuple[str, mx.array]], tree_flatten(head.module.trainable_parameters()))
    weight = plain_weight(head.module, dense_VD)
    if weight is not None and not named:
        return _with_gradient(hidden_ND, head, weight, targets_N, chunk)
    paths, parameters = [path for path, _ in named], [value for _, value in named]

    @mx.custom_function
    def forward(hidden_ND: mx.array, parameters: list[mx.array]) -> mx.array:
        return _values(hidden_ND, head, targets_N, chunk)

    @forward.vjp
    def backward(
        primals: tuple[mx.array, list[mx.array]], cotangent_N: mx.array, output: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        hidden_ND, parameters = primals
        if weight is None or paths not in (["weight"], ["weight", "bias"]):
            part = by_autodiff(NLL(), head, paths)
        else:
            part = by_logits_gradient(NLL(), head, weight)
        by_hidden: list[mx.array] = []
        by_parameters = [mx.zeros(value.shape, dtype=mx.float32) for value in parameters]
        done: list[mx.array] = []
        for hidden_CD, *columns in chunks((hidden_ND, targets_N, -cotangent_N), chunk, done):
            _, gradient_CD, by_parameters = part(hidden_CD, columns, parameters, by_parameters)
            by_hidden.append(gradient_CD.astype(hidden_ND.dtype))
            done[:] = [by_hidden[-1], *by_parameters]
        pairs = zip(by_parameters, parameters, strict=True)
        return mx.concatenate(by_hidden), [d.astype(value.dtype) for d, value in pairs]

    return cast(mx.array, forward(hidden_ND, parameters))


def _values(hidden_ND: mx.array, head: Head, targets_N: mx.array, chunk: int) -> mx.array:
    values: list[mx.array] = []
    for hidden_CD, targets_C in chunks((hidden_ND, targets_N), chunk, values):
        values.append(-token_nll(head(hidden_CD), targets_C))
    return mx.concatenate(values)


def _with_gradient(
    hidden_ND: mx.array, head: Head, weight: HeadWeight, targets_N: mx.array, chunk: int
) -> mx.array:
    """Return the values; their gradient by the hidden states is an output of the forward pass."""
    bias_V = head.module.get("bias")

    @mx.custom_function
    def forward(hidden_ND: mx.array) -> list[mx.array]:
        values: list[mx.array] = []
        by_hidden: list[mx.array] = []
        done: list[mx.array] = []
        for hidden_CD, targets_C in chunks((hidden_ND, targets_N), chunk, done):
            logits_CV = weight.logits(hidden_CD).astype(mx.float32)
            if bias_V is not None:
                logits_CV = logits_CV + bias_V.astype(mx.float32)
            logits_CV = head.finish(logits_CV)
            nll_C, logits_gradient = nll_and_gradient(logits_CV, targets_C)
            logits_gradient = logits_gradient.through(head.cap_derivative(logits_CV))
            values.append(-nll_C)
            by_hidden.append(-logits_gradient.by_hidden(weight).astype(hidden_ND.dtype))
            done[:] = [values[-1], by_hidden[-1]]
        return [mx.concatenate(values), mx.concatenate(by_hidden)]

    @forward.vjp
    def backward(
        primals: mx.array, cotangents: list[mx.array], outputs: list[mx.array]
    ) -> mx.array:
        by_hidden_ND = outputs[1]
        return (cotangents[0][:, None] * by_hidden_ND).astype(by_hidden_ND.dtype)

    return cast(list[mx.array], forward(hidden_ND))[0]
