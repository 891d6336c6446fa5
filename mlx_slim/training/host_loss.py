"""Losses of tokens and their gradients outside of a trace, on a CPU.

Invariant: value and gradient are those of ``linear_loss`` to float32 rounding, and one chunk of
logits is alive. The exponentials of cross-entropy are NumPy's.
Try it: ``python -m pytest tests/training/test_host_loss.py``.
Legend: N supervised positions, C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_slim.models import host_exponentials
from mlx_slim.models.structure import Head
from mlx_slim.training.losses import TokenLoss, by_logits_gradient, plain_weight


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
    part = by_logits_gradient(token_loss, head, weight)
    total, gradients = mx.zeros((), dtype=mx.float32), []
    for begin in range(0, rows_ND.shape[0], chunk):
        rows_CD, *cut = (array[begin : begin + chunk] for array in (rows_ND, *columns))
        with host_exponentials.in_losses():
            value, by_rows_CD, _ = part(rows_CD, list(cut), [], [])
        total = total + value
        gradients.append(by_rows_CD.astype(rows_ND.dtype))
        mx.eval(total, gradients[-1])
    by_rows_ND = mx.concatenate(gradients) if gradients else mx.zeros_like(rows_ND)
    mx.eval(total, by_rows_ND)
    return total, by_rows_ND
