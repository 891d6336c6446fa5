"""The CPU forward of gated MLPs: the same numbers, the same gradients, only where it fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.models.activations import exp, swiglu, use_fast_swiglu
from mlx_slim.runtime import on_gpu, to_float
from tests.support.stock import stock_load

cpu_only = pytest.mark.skipif(on_gpu(), reason="a GPU keeps mlx-lm's own forward")


def test_exp_is_exact_to_a_few_bits_and_saturates() -> None:
    x = np.linspace(-80, 80, 10_001).astype(np.float32)
    ours = np.array(exp(mx.array(x)), dtype=np.float64)
    np.testing.assert_allclose(ours, np.exp(x.astype(np.float64)), rtol=8e-6)
    assert np.array(exp(mx.array([-1e4, -200.0]))).tolist() == [0.0, 0.0]
    assert np.isposinf(np.array(exp(mx.array([200.0])))).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_swiglu_and_its_gradient_equal_autodiff(dtype: Any) -> None:
    gate = (mx.random.normal((64, 32), key=mx.random.key(1)) * 6).astype(dtype)
    up = mx.random.normal((64, 32), key=mx.random.key(2)).astype(dtype)
    weight = mx.random.normal((64, 32), key=mx.random.key(3))

    def ours(gate: Any, up: Any) -> Any:
        product: Any = swiglu(gate, up)
        return (product * weight).sum()

    def plain(gate: Any, up: Any) -> Any:
        return (nn.silu(gate.astype(mx.float32)) * up.astype(mx.float32) * weight).sum()

    value, gradients = mx.value_and_grad(ours, argnums=(0, 1))(gate, up)
    expected, slow = mx.value_and_grad(plain, argnums=(0, 1))(gate, up)
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2
    assert abs(value.item() - expected.item()) <= tolerance * 100
    for one, other in zip(gradients, slow, strict=True):
        assert one.dtype == dtype
        difference = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max()
        assert to_float(difference) <= tolerance * to_float(mx.abs(other).max())


def test_the_gradient_is_finite_where_the_exponential_overflows() -> None:
    gate = mx.array([-500.0, -100.0, 0.0, 100.0, 500.0])
    gated: Any = swiglu
    gradient = mx.grad(lambda g: gated(g, mx.ones(5)).sum())(gate)
    np.testing.assert_allclose(np.array(gradient), [0.0, 0.0, 0.5, 1.0, 1.0], atol=1e-6)


@cpu_only
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_logits_stay_and_a_second_call_changes_nothing(
    tiny: Callable[..., Path], architecture: str
) -> None:
    model, _ = stock_load(str(tiny(architecture)))
    tokens = mx.array([[1, 5, 2, 9, 4]])
    before = model(tokens)
    changed = use_fast_swiglu(model)
    assert changed == len(model.layers)
    assert use_fast_swiglu(model) == 0
    np.testing.assert_allclose(np.array(model(tokens)), np.array(before), atol=1e-5, rtol=1e-4)


class _GeluGated(nn.Module):
    """Named like SwiGLU, but another function: gemma's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=False)
        self.up_proj = nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


def test_an_mlp_with_another_activation_is_left_alone() -> None:
    mlp = _GeluGated()
    mlp.gate_proj.weight = mlp.gate_proj.weight * 1e-3  # near zero the two functions look alike
    model = nn.Sequential(mlp)
    assert use_fast_swiglu(model) == 0
    assert type(model.layers[0]) is _GeluGated


def test_phi_has_no_gated_mlp(tiny: Callable[..., Path]) -> None:
    model, _ = stock_load(str(tiny("phi")))
    assert use_fast_swiglu(model) == 0
