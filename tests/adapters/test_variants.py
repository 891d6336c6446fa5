"""PiSSA, rsLoRA, LoRA+: the start, the residual and the learning rates."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.adapters.lora import LoRAEmbedding, LoRALinear
from mlx_slim.adapters.variants import learning_rate_scale, principal_factors, start_pissa
from mlx_slim.config.schema import AdapterConfig
from tests.adapters.support import dense, linear, relative_error, shake
from tests.support.memory import reset_peak


def decaying(rows: int, columns: int) -> mx.array:
    """A matrix whose singular values fall like those of trained weights: 1/√k."""
    mx.random.seed(3)
    u = mx.linalg.qr(mx.random.normal((rows, rows)), stream=mx.cpu)[0]
    v = mx.linalg.qr(mx.random.normal((columns, columns)), stream=mx.cpu)[0]
    size = min(rows, columns)
    return (u[:, :size] * mx.arange(1, size + 1) ** -0.5) @ v[:, :size].T


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (200, 320), (320, 200)])
def test_principal_factors_are_the_best_approximation_and_repeatable(
    shape: tuple[int, int],
) -> None:
    weight = decaying(*shape)
    a, b = principal_factors(weight, 8, 2.0)
    assert a.shape == (shape[0], 8)
    assert b.shape == (8, shape[1])
    best = mx.sqrt((1.0 / mx.arange(9, min(shape) + 1)).sum())
    error = mx.linalg.norm(weight - 2.0 * a @ b)
    assert error.item() == pytest.approx(best.item(), rel=2e-3)
    gram_a, gram_b = a.T @ a, b @ b.T
    assert relative_error(gram_a, gram_b) < 0.01  # the singular values are shared equally
    mx.random.seed(99)
    state: Any = mx.random.state  # the stub says object
    before = state[0].tolist()
    again = principal_factors(weight, 8, 2.0)
    assert mx.array_equal(again[0], a)
    assert mx.array_equal(again[1], b)
    assert state[0].tolist() == before


@pytest.mark.parametrize("shape", [(24, 90), (90, 24)])
def test_the_factors_are_those_of_the_full_svd(shape: tuple[int, int]) -> None:
    weight = decaying(*shape)
    a, b = principal_factors(weight, 6, 0.5)
    u, sigma, vt = mx.linalg.svd(weight, stream=mx.cpu)
    best = (u[:, :6] * sigma[:6]) @ vt[:6]
    assert relative_error(0.5 * a @ b, best) < 1e-5
    size = min(shape)
    whole = principal_factors(weight, size, 0.5)
    assert relative_error(0.5 * whole[0] @ whole[1], weight) < 1e-5


@pytest.mark.parametrize("shape", [(64, 6000), (6000, 64), (128, 6000), (6000, 128)])
def test_a_long_matrix_makes_no_square_of_its_long_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    real = np.linalg.svd

    def svd(matrix: mx.array, *rest: Any, **settings: Any):
        factors = real(matrix, *rest, **settings)
        largest.append(max(part.size for part in (matrix, *factors)))
        return factors

    monkeypatch.setattr(np.linalg, "svd", svd)
    weight = mx.random.normal(shape)
    mx.eval(weight)
    before = reset_peak()
    mx.eval(principal_factors(weight, 8, 1.0))
    assert max(largest) <= weight.size
    assert mx.get_peak_memory() - before < 4 * weight.nbytes  # 144 MB is the square


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_pissa_is_the_residual_plus_a_trained_pair(
    kind: type[LoRALinear | DoRALinear], bits: int | None
) -> None:
    base = linear(128, 96, bias=True, bits=bits)
    weight = mx.array(dense(base))
    x = mx.random.normal((5, 128))
    adapter: Any = kind(base, 4, 2.0)
    start_pissa(adapter)
    assert relative_error(adapter(x), base(x)) < 1e-5
    assert mx.array_equal(dense(base), weight)
    trainable = {k for k, v in adapter.trainable_parameters().items() if isinstance(v, mx.array)}
    assert trainable == set(kind.trainable)
    a0, b0 = mx.array(adapter.lora_a), mx.array(adapter.lora_b)
    shake(adapter)
    residual = weight - 2.0 * (a0 @ b0).T
    v = residual + 2.0 * (adapter.lora_a @ adapter.lora_b).T
    if kind is DoRALinear:
        v = (adapter.m / mx.linalg.norm(v, axis=1))[:, None] * v
    assert relative_error(adapter(x), x @ v.T + base["bias"]) < 1e-5

    def loss(a: mx.array, b: mx.array) -> mx.array:
        adapter.lora_a, adapter.lora_b = a, b
        return (adapter(x) ** 2).sum()

    def slow(a: mx.array, b: mx.array) -> mx.array:
        v = residual + 2.0 * (a @ b).T
        if kind is DoRALinear:
            v = (adapter.m / mx.stop_gradient(mx.linalg.norm(v, axis=1)))[:, None] * v
        return ((x @ v.T + base["bias"]) ** 2).sum()

    factors = adapter.lora_a, adapter.lora_b
    for value, expected in zip(
        mx.grad(loss, argnums=(0, 1))(*factors),
        mx.grad(slow, argnums=(0, 1))(*factors),
        strict=True,
    ):
        assert relative_error(value, expected) < 1e-4


def test_pissa_over_an_embedding() -> None:
    base = nn.Embedding(60, 32)
    base.freeze()
    adapter = LoRAEmbedding(base, 4, 2.0)
    start_pissa(adapter)
    ids, x = mx.array([3, 59]), mx.random.normal((2, 32))
    assert relative_error(adapter(ids), base(ids)) < 1e-5
    assert relative_error(adapter.as_linear(x), base.as_linear(x)) < 1e-5


def test_scales_and_rates() -> None:
    assert AdapterConfig(rank=16, alpha=32).resolved_scale == 2.0
    assert AdapterConfig(rank=16, alpha=32, scaling="rslora").resolved_scale == 8.0
    config = AdapterConfig(lora_plus_ratio=16)
    assert learning_rate_scale("model.layers.0.self_attn.q_proj.lora_b", config) == 16
    assert learning_rate_scale("model.layers.0.self_attn.q_proj.lora_a", config) == 1
    assert learning_rate_scale("model.layers.0.self_attn.q_proj.m", config) == 1
