"""Losses over a vocabulary straight from hidden states: full logits never exist.

Invariant: value and gradients equal those of the loss of ``head(hidden)`` in float32 for any chunk
size; at most one chunk of logits is alive, and each logit is exponentiated once, because the
gradient is formed with the loss (the idea of arXiv 2411.09009, here without a kernel).
A ``TokenLoss`` says what is summed: cross-entropy here, divergences from a teacher in
``distillation/losses.py``. To add one, write ``value`` and ``value_and_gradient``; the test in
``tests/training/test_losses.py`` compares the two. Legend: N supervised positions, C positions of
one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.models import host_exponentials
from mlx_slim.models.activations import exp
from mlx_slim.models.logits import row_sums, token_nll
from mlx_slim.models.quantized import (
    DenseWeight,
    HeadWeight,
    QuantizedWeight,
    dequantize_weight,
)
from mlx_slim.models.structure import Head
from mlx_slim.runtime import on_gpu


def cross_entropy_sum(logits_NV: mx.array, targets_N: mx.array) -> mx.array:
    """Return Σ −log softmax(logits)[target], a float32 scalar in nats."""
    return token_nll(logits_NV, targets_N).sum()


def weighted_sum(values_C: mx.array, weights_C: mx.array | None = None) -> mx.array:
    """Return Σ w · value, a scalar; None is 1 for all."""
    return (values_C if weights_C is None else values_C * weights_C).sum()


@dataclass(frozen=True)
class LogitsGradient:
    """The gradient of a chunk's loss by its logits, as factors that are cheap to multiply.

    With y_C the targets, it is::

        G_CV = normalizer_C · probs_CV / total_C1 − label_weight_C · onehot(y_C)

    The one-hot matrix is never built, and the division by the total comes after the product with
    the head where the head is frozen: C·D divisions in place of C·V.

    Two tokens over a vocabulary of two, with targets 0 and 1 and loss weights 1 and 2. Their
    softmax is (1/4, 3/4) and (1/5, 4/5), so the loss is −1·ln(1/4) − 2·ln(4/5), and the gradient
    is 1·(1/4 − 1, 3/4) and 2·(1/5, 4/5 − 1):

    >>> logits_CV = mx.log(mx.array([[1.0, 3.0], [1.0, 4.0]]))
    >>> targets_C, weights_C = mx.array([0, 1]), mx.array([1.0, 2.0])
    >>> loss, gradient = NLL().value_and_gradient(logits_CV, targets_C, weights_C)
    >>> round(loss.item(), 4)
    1.8326
    >>> def digits(array):
    ...     return [[round(value, 4) for value in row] for row in array.tolist()]
    >>> digits(gradient.probs_CV / gradient.total_C1)
    [[0.25, 0.75], [0.2, 0.8]]
    >>> digits(gradient.by_hidden(mx.eye(2)))  # G_CV · W_VD, and W is the identity
    [[-0.75, 0.75], [0.4, -0.4]]
    >>> digits(gradient.by_head(mx.eye(2), [mx.zeros((2, 2))])[0])  # G_CVᵀ · hidden_CD
    [[-0.75, 0.4], [0.75, -0.4]]

    Attributes:
        probs_CV: Unnormalized probabilities, float32: exp(logit − largest logit) for ``NLL``.
        total_C1: Their sum, float32; None for 1.
        normalizer_C: Loss weights of the positions, float32; None for 1.
        targets_C: Token ids; None for no one-hot term.
        label_weight_C: Loss weights of the one-hot term, float32; None for 1.
    """

    probs_CV: mx.array
    total_C1: mx.array | None = None
    normalizer_C: mx.array | None = None
    targets_C: mx.array | None = None
    label_weight_C: mx.array | None = None

    def by_hidden(self, weight: HeadWeight | mx.array) -> mx.array:
        """Return the gradient by the hidden states, float32 (C, D); an array is W (V, D)."""
        if isinstance(weight, mx.array):
            weight = DenseWeight(weight)
        gradient_CD = weight.back(self.probs_CV).astype(mx.float32)
        if self.total_C1 is not None:
            gradient_CD = gradient_CD / self.total_C1
        if self.normalizer_C is not None:
            gradient_CD = gradient_CD * self.normalizer_C[:, None]
        if self.targets_C is None:
            return gradient_CD
        return gradient_CD - self._label_weighted(weight.rows(self.targets_C).astype(mx.float32))

    def _label_weighted(self, rows_CD: mx.array) -> mx.array:
        return rows_CD if self.label_weight_C is None else rows_CD * self.label_weight_C[:, None]

    def through(self, derivative_CV: mx.array | None) -> LogitsGradient:
        """Return the gradient by what an elementwise map with this derivative made logits of."""
        if derivative_CV is None:
            return self
        label_weight_C = self.label_weight_C
        if self.targets_C is not None:
            at_target_C = mx.take_along_axis(derivative_CV, self.targets_C[:, None], axis=-1)[:, 0]
            label_weight_C = at_target_C if label_weight_C is None else label_weight_C * at_target_C
        return replace(self, probs_CV=self.probs_CV * derivative_CV, label_weight_C=label_weight_C)

    def by_head(self, hidden_CD: mx.array, gradients: list[mx.array]) -> list[mx.array]:
        """Return ``gradients`` with this chunk's added, float32.

        Those are the gradients by the head's weight (V, D) and by its bias (V,), if it has one.
        """
        d_weight, *biases = gradients
        hidden32 = hidden_CD.astype(mx.float32)
        probs_CV = self.probs_CV if self.total_C1 is None else self.probs_CV / self.total_C1
        if self.normalizer_C is not None:
            probs_CV = probs_CV * self.normalizer_C[:, None]
        d_weight = mx.addmm(d_weight, probs_CV.T, hidden32)
        biases = [d_bias + probs_CV.sum(axis=0) for d_bias in biases]
        if self.targets_C is not None:
            label_weight = mx.array(1.0) if self.label_weight_C is None else self.label_weight_C
            d_weight = d_weight.at[self.targets_C].subtract(self._label_weighted(hidden32))
            biases = [d_bias.at[self.targets_C].subtract(label_weight) for d_bias in biases]
        return [d_weight, *biases]


class TokenLoss(Protocol):
    """A summed loss of logits. ``columns`` are arrays with one row a position, not differentiated.

    Both return a float32 scalar in nats, or a vector whose first entry is the loss and whose others
    are only reported.
    """

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the sum over the positions; differentiable."""
        ...

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the same, with its gradient by float32 ``logits_CV``."""
        ...


class NLL:
    """Σ w · −log softmax(logits)[target]; columns: ``targets_C``, and ``weights_C`` if not ones."""

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the weighted sum, a float32 scalar in nats."""
        targets_C, *weights = columns
        return weighted_sum(token_nll(logits_CV, targets_C), *weights)

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the sum and softmax − one-hot, weighted."""
        targets_C, *weights = columns
        nll_C, plain = nll_and_gradient(logits_CV, targets_C)
        if not weights:
            return nll_C.sum(), plain
        logits_gradient = replace(plain, normalizer_C=weights[0], label_weight_C=weights[0])
        return weighted_sum(nll_C, weights[0]), logits_gradient


def nll_and_gradient(logits_CV: mx.array, targets_C: mx.array) -> tuple[mx.array, LogitsGradient]:
    """Return −log softmax(logits)[target] of each row (C,), and the gradient of the rows' sum."""
    target_C1 = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1)
    if host_exponentials.in_losses_here(logits_CV):
        exp_CV, total_C1, peak_C1 = host_exponentials.exponentials(logits_CV)
    else:
        peak_C1 = logits_CV.max(axis=-1, keepdims=True)
        exp_CV = exp(logits_CV - peak_C1)
        total_C1 = row_sums(exp_CV)
    nll_C1 = mx.log(total_C1) + peak_C1 - target_C1
    return nll_C1[:, 0], LogitsGradient(exp_CV, total_C1, targets_C=targets_C)


# Hidden states, columns and parameters of a chunk, and the gradients so far -> the chunk's sum, its
# gradient by the hidden states, and the gradients with its own added.
HeadPart = Callable[
    [mx.array, list[mx.array], list[mx.array], list[mx.array]],
    tuple[mx.array, mx.array, list[mx.array]],
]


def chunks(arrays: Sequence[mx.array], chunk: int, done: list[mx.array]) -> Iterator[list]:
    """Yield ``arrays`` in chunks of rows, each to be computed after what is in ``done`` by then.

    Without the dependency the scheduler is free to make the logits of all chunks at once.
    """
    for start in range(0, arrays[0].shape[0], chunk):
        cut = [array[start : start + chunk] for array in arrays]
        yield mx.depends(cut, done) if done else cut


def _fused(
    hidden_ND: mx.array,
    parameters: list[mx.array],
    columns: tuple[mx.array, ...],
    chunk: int,
    part: HeadPart,
) -> mx.array:
    """Return the sum; its gradients by hidden and parameters are outputs of the forward pass."""

    @mx.custom_function
    def forward(hidden_ND: mx.array, parameters: list[mx.array]) -> list[mx.array]:
        total = mx.zeros((), dtype=mx.float32)
        by_hidden: list[mx.array] = []
        by_parameters = [mx.zeros(value.shape, dtype=mx.float32) for value in parameters]
        done: list[mx.array] = []
        for hidden_CD, *cut in chunks((hidden_ND, *columns), chunk, done):
            value, gradient_CD, by_parameters = part(hidden_CD, cut, parameters, by_parameters)
            total = total + value
            by_hidden.append(gradient_CD.astype(hidden_ND.dtype))
            done[:] = [total, by_hidden[-1], *by_parameters]
        return [total, mx.concatenate(by_hidden), *by_parameters]

    @forward.vjp
    def backward(
        primals: tuple[mx.array, list[mx.array]],
        cotangents: list[mx.array],
        outputs: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        scale = cotangents[0] if cotangents[0].ndim == 0 else cotangents[0][0]
        hidden_ND, parameters = primals
        _, by_hidden, *by_parameters = outputs
        return (
            (scale * by_hidden).astype(hidden_ND.dtype),
            [
                (scale * gradient).astype(value.dtype)
                for gradient, value in zip(by_parameters, parameters, strict=True)
            ],
        )

    return cast(list[mx.array], forward(hidden_ND, parameters))[0]


def by_logits_gradient(token_loss: TokenLoss, head: Head, weight: HeadWeight) -> HeadPart:
    """Return the ``HeadPart`` of a head that is one matrix, trained if there are parameters."""
    bias_V = head.module.get("bias")

    def part(
        hidden_CD: mx.array,
        columns: list[mx.array],
        parameters: list[mx.array],
        gradients: list[mx.array],
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        matrix = DenseWeight(parameters[0]) if parameters else weight
        bias = parameters[1] if len(parameters) > 1 else bias_V
        logits_CV = matrix.logits(hidden_CD).astype(mx.float32)
        if bias is not None:
            logits_CV = logits_CV + bias.astype(mx.float32)
        logits_CV = head.finish(logits_CV)
        value, logits_gradient = token_loss.value_and_gradient(logits_CV, *columns)
        logits_gradient = logits_gradient.through(head.cap_derivative(logits_CV))
        by_hidden = logits_gradient.by_hidden(matrix)
        return value, by_hidden, logits_gradient.by_head(hidden_CD, gradients) if parameters else []

    return part


def by_autodiff(token_loss: TokenLoss, head: Head, paths: list[str]) -> HeadPart:
    """Return the ``HeadPart`` of any other head, such as one with an adapter."""

    def loss(
        hidden_CD: mx.array, parameters: list[mx.array], columns: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        head.module.update(tree_unflatten(list(zip(paths, parameters, strict=True))))
        sums = token_loss.value(head(hidden_CD), *columns)
        return (sums[0] if sums.ndim else sums), sums

    def part(
        hidden_CD: mx.array,
        columns: list[mx.array],
        parameters: list[mx.array],
        gradients: list[mx.array],
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        before = head.module.trainable_parameters()
        (_, value), (by_hidden, by_parameters) = mx.value_and_grad(loss, argnums=(0, 1))(
            hidden_CD, parameters, columns
        )
        head.module.update(before)
        return value, by_hidden, [g + p for g, p in zip(gradients, by_parameters, strict=True)]

    return part


def _forward_only(
    hidden_ND: mx.array,
    head: Head,
    token_loss: TokenLoss,
    columns: tuple[mx.array, ...],
    chunk: int,
) -> mx.array:
    total = mx.zeros((), dtype=mx.float32)
    done: list[mx.array] = []
    for hidden_CD, *cut in chunks((hidden_ND, *columns), chunk, done):
        total = total + token_loss.value(head(hidden_CD), *cut)
        done[:] = [total]
    return total


def linear_loss(
    hidden_ND: mx.array,
    head: Head,
    token_loss: TokenLoss,
    columns: tuple[mx.array, ...],
    *,
    chunk: int,
    gradient: bool = True,
    dense_VD: mx.array | None = None,
) -> mx.array:
    """Return the loss ``token_loss`` of head(hidden) without ever holding all logits.

    Args:
        hidden_ND: Hidden states of the supervised positions only, any floating dtype.
        head: The model's head; dense, quantized, tied, biased or adapted.
        token_loss: What is summed over the positions.
        columns: Arrays that the token loss needs, one row a position; not differentiated.
        chunk: Positions whose logits exist at one time.
        gradient: Whether the result will be differentiated (forms the gradient along the way).
        dense_VD: The dense weight of a quantized head, where it exists already.

    Returns:
        What ``token_loss`` returns: a float32 scalar in nats, or a vector that begins with it.
    """
    if not gradient:
        return _forward_only(hidden_ND, head, token_loss, columns, chunk)
    module = head.module
    named = cast(list[tuple[str, mx.array]], tree_flatten(module.trainable_parameters()))
    paths, parameters = [path for path, _ in named], [value for _, value in named]
    weight = plain_weight(module, dense_VD)
    if weight is None or paths not in ([], ["weight"], ["weight", "bias"]):
        part = by_autodiff(token_loss, head, paths)
    else:
        part = by_logits_gradient(token_loss, head, weight)
    return _fused(hidden_ND, parameters, columns, chunk, part)


def plain_weight(module: nn.Module, dense_VD: mx.array | None) -> HeadWeight | None:
    """Return the weight of a head that is nothing but a matrix, else None."""
    if type(module) in (nn.Linear, nn.Embedding):
        return DenseWeight(module["weight"])
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return None
    if on_gpu():
        return QuantizedWeight(module)
    return DenseWeight(dequantize_weight(module) if dense_VD is None else dense_VD)


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
