"""Losses outside of a trace are those of ``linear_loss``."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models.structure import Head
from mlx_slim.runtime import to_float
from mlx_slim.training.host_loss import rows_gradient
from mlx_slim.training.losses import NLL, linear_loss
from tests.adapters.support import linear


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_value_and_gradient(weighted: bool, bits: int | None, cap: float | None) -> None:
    rng = np.random.default_rng(0)
    head = Head(linear(64, 300, bias=bits is None, bits=bits), tied=False, cap=cap)
    rows_ND = mx.array(3 * rng.normal(size=(21, 64)).astype(np.float32))
    columns = [mx.array(rng.integers(0, 300, 21))]
    if weighted:
        columns.append(mx.array(rng.random(21).astype(np.float32)))

    def loss(rows_ND: mx.array) -> mx.array:
        return linear_loss(rows_ND, head, NLL(), (*columns,), chunk=8)

    expected, by_rows = mx.value_and_grad(loss)(rows_ND)
    ours = rows_gradient(rows_ND, head, NLL(), (*columns,), chunk=8)
    assert ours is not None
    assert to_float(ours[0]) == pytest.approx(to_float(expected), rel=1e-6)
    np.testing.assert_allclose(np.array(ours[1]), np.array(by_rows), atol=2e-6)


def test_a_trained_head_is_not_taken() -> None:
    module = linear(64, 16, bias=False, bits=None)
    module.unfreeze()
    head = Head(module, tied=False)
    assert rows_gradient(mx.ones((2, 64)), head, NLL(), (mx.array([0, 1]),), chunk=8) is None


def test_a_loss_that_is_not_finite_is_returned_so() -> None:
    head = Head(linear(64, 16, bias=False, bits=None), tied=False)
    rows_ND = mx.array([[float("nan")] * 64, [1.0] * 64])
    result = rows_gradient(rows_ND, head, NLL(), (mx.array([0, 1]),), chunk=8)
    assert result is not None and np.isnan(to_float(result[0]))
