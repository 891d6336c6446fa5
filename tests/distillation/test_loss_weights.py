"""Weights of targets: the loop's gradient is that of the formula, written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_slim.data.batches import collate
from mlx_slim.distillation.loss_weights import target_weights
from mlx_slim.models.load import load
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.optim import trainable
from mlx_slim.training.step import Stepper
from tests.support.rows import MemoryRows

GROUPS = np.array([0, 1, 2, 0, 1, 2, 2])
LOSS_WEIGHTS = [1.0, 0.5, 3.0]


def reference_loss(model: nn.Module, rows: MemoryRows) -> mx.array:
    """L = Σ_g a_g · mean over the targets of g of −log softmax(logits)[target], row by row."""
    total = mx.array(0.0)
    for group, loss_weight in enumerate(LOSS_WEIGHTS):
        nll, count = mx.array(0.0), 0
        for row in np.flatnonzero(group == GROUPS):
            ids, supervised = rows.row(int(row))
            logits_TV = model(mx.array(ids)[None])[0].astype(mx.float32)
            logp_TV = logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)
            for t in np.flatnonzero(supervised):
                nll = nll - logp_TV[int(t) - 1, int(ids[t])]
                count += 1
        total = total + loss_weight * nll / count
    return total


def test_one_batch_of_all_rows_gives_the_formula_and_its_gradient(
    tiny: Callable[..., Path],
) -> None:
    model: Any = load(str(tiny("llama")), dtype=mx.float32).model
    model.freeze()
    model.layers[-1].unfreeze()
    rows = MemoryRows([9, 14, 6, 11, 5, 16, 7], seed=3)
    weights_S = target_weights(rows.supervised, GROUPS, LOSS_WEIGHTS)
    stepper = Stepper(model, CrossEntropy(model, chunk=8, weights_S=weights_S))
    order = [[3], [6], [0], [5], [1], [2], [4]]  # weights follow the targets, not the order
    measured = stepper.step([collate(rows, order, isolate=False)])
    expected, gradients = nn.value_and_grad(model, lambda: reference_loss(model, rows))()
    assert measured.loss == pytest.approx(expected.item(), rel=1e-5)
    flat = dict(tree_flatten(gradients))
    assert set(measured.gradients) == set(trainable(model))
    for path, value in measured.gradients.items():
        error = to_float(mx.abs(value - flat[path]).max())
        assert error <= 1e-5 * max(1.0, to_float(mx.abs(flat[path]).max())), path


def test_micro_batches_give_the_same_step(tiny: Callable[..., Path]) -> None:
    model: Any = load(str(tiny("llama")), dtype=mx.float32).model
    model.freeze()
    model.layers[-1].unfreeze()
    rows = MemoryRows([9, 14, 6, 11, 5, 16, 7], seed=3)
    stepper = Stepper(
        model, CrossEntropy(model, weights_S=target_weights(rows.supervised, GROUPS, LOSS_WEIGHTS))
    )
    whole = stepper.step([collate(rows, [[i] for i in range(7)], isolate=False)])
    in_micro_batches = stepper.step(
        [collate(rows, [[4], [1]], isolate=False), collate(rows, [[6, 0, 3], [2, 5]], isolate=True)]
    )
    assert in_micro_batches.loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_group_counts_by_its_loss_weight_not_its_size() -> None:
    supervised, groups = np.array([3, 100, 1]), np.array([0, 1, 0])
    weights_S = target_weights(supervised, groups, [1.0, 0.25])
    assert len(weights_S) == 104
    of_target = np.repeat(groups, supervised)
    total = len(weights_S)
    assert weights_S[of_target == 0].sum() / total == pytest.approx(1.0)
    assert weights_S[of_target == 1].sum() / total == pytest.approx(0.25)


def test_one_group_of_weight_one_is_plain_training() -> None:
    weights_S = target_weights(np.array([3, 5]), np.array([0, 0]), [1.0, 0.5])
    assert weights_S.tolist() == [1.0] * 8
