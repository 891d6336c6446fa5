"""Losses of tokens and their gradients outside of a trace, on a CPU.

Invariant: value and gradient are those of ``linear_loss`` to float32 rounding, and one chunk of
logits is alive. Cross-entropy has NumPy's exponentials, other losses their own.
Try it: ``python -m pytest tests/training/test_host_loss.py``.
Legend: N supervised positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_slim.models.structure import Head
from mlx_slim.training.losses import (
    NLL,
    LogitsGradient,
    TokenLoss,
    by_logits_gradient,
    plain_weight,
)


class HostNLL(NLL):
    """``NLL`` of logits that are computed, with NumPy's exponentials."""

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the sum and softmax − one-hot, weighted."""
        targets_C, *weights = columns
        mx.eval(logits_CV, columns)
        logits = np.asarray(logits_CV)
        exps = np.empty_like(logits)
        totals, peaks = (np.empty((len(logits), 1), np.float32) for _ in range(2))
        with np.errstate(invalid="ignore", over="ignore"):  # the loss says that it is not finite
            for row, out, total, peak in zip(logits, exps, totals, peaks, strict=True):
                peak[0] = row.max()
                np.subtract(row, peak[0], out=out)
                np.exp(out, out=out)
                total[0] = out.sum()
            at_target = logits[np.arange(len(logits)), np.asarray(targets_C)]
            nll = (np.log(totals) + peaks)[:, 0] - at_target
        weight_C = weights[0] if weights else None
        gradient = LogitsGradient(
            mx.array(exps),
            mx.array(totals),
            normalizer_C=weight_C,
            targets_C=targets_C,
            label_weight_C=weight_C,
        )
        total = nll if weight_C is None else nll * np.asarray(weight_C)
        return mx.array(total.sum(dtype=np.float32)), gradient


def rows_gradient(
    rows_ND: mx.array,
    head: Head,
    token_loss: TokenLoss,
    columns: tuple[mx.array, ...],
    *,
    chunk: int,
    dense_VD: mx.array | None = None,
) -> tuple[mx.array, mx.array] | None:
    """Return Σ loss of head(rows) and its gradient (N, D), evaluated; None if the head is trained.

    Args:
        rows_ND: Hidden states of the supervised positions, evaluated.
        head: The model's head.
        token_loss: What is summed over the positions.
        columns: Arrays that it needs, one row a position.
        chunk: Positions whose logits exist at one time.
        dense_VD: The dense weight of a quantized head, where it exists already.

    Returns:
        What ``token_loss`` returns, and the gradient of its first number, in the dtype of rows.
    """
    weight = plain_weight(head.module, dense_VD)
    if weight is None or tree_flatten(head.module.trainable_parameters()):
        return None
    part = by_logits_gradient(HostNLL() if type(token_loss) is NLL else token_loss, head, weight)
    total, gradients = mx.zeros((), dtype=mx.float32), []
    for begin in range(0, rows_ND.shape[0], chunk):
        rows_CD, *cut = (array[begin : begin + chunk] for array in (rows_ND, *columns))
        value, by_rows_CD, _ = part(rows_CD, list(cut), [], [])
        total = total + value
        gradients.append(by_rows_CD.astype(rows_ND.dtype))
        mx.eval(total, gradients[-1])
    by_rows_ND = mx.concatenate(gradients) if gradients else mx.zeros_like(rows_ND)
    mx.eval(total, by_rows_ND)
    return total, by_rows_ND
