"""What a start took out of its base: computed again, or not determined."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.peft_plain import PeftLayer, PlainLayer, taken_out
from tests.adapters.support import linear, relative_error

WEIGHT = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)


def product(start: str, weight: np.ndarray, rank: int, scale: float) -> np.ndarray:
    factors = taken_out(start, mx.array(weight), rank, scale)
    assert factors is not None
    a_RI, b_OR = factors
    assert a_RI.shape == (rank, weight.shape[1]) and b_OR.shape == (weight.shape[0], rank)
    return scale * np.array(b_OR @ a_RI)


def test_pissa_takes_out_the_best_approximation() -> None:
    sigma = np.linalg.svd(WEIGHT.astype(np.float64), compute_uv=False)
    rest = WEIGHT - product("pissa", WEIGHT, 3, 0.5)
    assert np.linalg.norm(rest) == pytest.approx(np.sqrt((sigma[3:] ** 2).sum()), rel=1e-5)


def test_olora_takes_out_the_projection_on_the_first_columns() -> None:
    first = WEIGHT[:, :3].astype(np.float64)
    projected = first @ np.linalg.pinv(first) @ WEIGHT
    assert np.allclose(product("olora", WEIGHT, 3, 2.0), 2 * projected, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_whole_weight_needs_no_gap(start: str) -> None:
    assert np.allclose(product(start, np.eye(8, dtype=np.float32), 8, 1.0), np.eye(8), atol=1e-6)


def test_a_weight_that_does_not_determine_it_has_none() -> None:
    repeated = WEIGHT.copy()
    repeated[:, 1] = repeated[:, 0]
    assert taken_out("olora", mx.array(repeated), 3, 1.0) is None
    assert taken_out("pissa", mx.eye(8), 3, 1.0) is None
    assert taken_out("pissa", mx.array(np.full((8, 8), np.nan)), 3, 1.0) is None
    low = WEIGHT[:, :2] @ WEIGHT[:2]  # of rank 2: nothing of the third triplet is taken out
    assert np.allclose(product("pissa", low, 3, 1.0), low, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_plain_layer_is_the_formula(bits: int | None) -> None:
    module = linear(64, 24, bias=True, bits=bits)
    rng = np.random.default_rng(1)
    a, b = (mx.array(rng.normal(size=shape), dtype=mx.float32) for shape in ((4, 64), (24, 4)))
    a0, b0 = (mx.array(rng.normal(size=shape), dtype=mx.float32) for shape in ((4, 64), (24, 4)))
    m = mx.array(rng.uniform(1, 2, 24), dtype=mx.float32)
    x = mx.array(rng.normal(size=(3, 64)), dtype=mx.float32)
    bias, module.bias = module["bias"], mx.zeros(24)
    weight = module(mx.eye(64)).T - 0.5 * b0 @ a0 + 0.5 * b @ a
    weight = weight * (m / mx.sqrt((weight**2).sum(axis=1)))[:, None]
    module.bias = bias
    plain = PlainLayer(module, PeftLayer(a, b, m, 0.5, False, (a0, b0)))
    assert relative_error(plain(x), x @ weight.T + bias) < 1e-5
