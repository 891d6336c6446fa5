"""Groups of training rows whose losses are averaged apart and added with weights.

Invariant: the loop's loss of all rows, with the weights of ``target_weights``, is exactly

    L = Σ_g a_g · (1/N_g) · Σ_{i in g} nll_i

where g is a group of rows (the data's own answers; each teacher's texts), N_g its supervised
targets and a_g its weight. The loop divides a batch's weighted sum by the batch's N targets, so the
weight of a target in g is w = a_g · N / N_g with N = Σ_g N_g, counted over the training rows (a row
that comes twice counts twice). One batch of all rows gives L itself; a smaller one gives the
part of L that its rows have, scaled to its size. Paper: arXiv 2402.04616 (a = 1 for the
answer, α_m for teacher m).
Legend: R rows, S targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def target_weights(
    supervised_R: np.ndarray, groups_R: np.ndarray, loss_weights: Sequence[float]
) -> np.ndarray:
    """Return the weight of every target of a store, float32 (S,), in the order of its rows.

    Args:
        supervised_R: Supervised targets of each row, int64.
        groups_R: Group of each row.
        loss_weights: a_g of each group.
    """
    counts = np.bincount(groups_R, weights=supervised_R, minlength=len(loss_weights))
    total = float(supervised_R.sum())
    factors = np.asarray(loss_weights, np.float64) * total / np.maximum(counts, 1)
    return np.repeat(factors[groups_R], supervised_R).astype(np.float32)
