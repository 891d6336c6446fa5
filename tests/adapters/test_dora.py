"""DoRA against the slow formula that forms V, over dense and quantized weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim.adapters.dora import DoRALinear
from mlx_slim.models.quantized import use_fast_matmul
from tests.adapters.support import dense, linear, relative_error, shake

CASES = [(bits, bias) for bits in (None, 3, 4, 5, 6, 8) for bias in (True, False)]


def slow(
    weight: mx.array,
    bias: mx.array | None,
    x: mx.array,
    a: mx.array,
    b: mx.array,
    m: mx.array,
    scale: float,
) -> mx.array:
    """M · V / ‖V‖ with V formed in full, the norm constant to autodiff."""
    v = weight + scale * (a @ b).T
    norm = mx.stop_gradient(mx.linalg.norm(v, axis=1))
    return x @ ((m / norm)[:, None] * v).T + (0 if bias is None else bias)


@pytest.mark.parametrize(("bits", "bias"), CASES)
def test_start_forward_and_gradients(bits: int | None, bias: bool) -> None:
    base = linear(128, 96, bias=bias, bits=bits)
    adapter = DoRALinear(base, 4, 2.0)
    x = mx.random.normal((2, 7, 128))
    assert mx.array_equal(adapter(x), base(x))
    assert mx.array_equal(adapter.m / adapter.norm(), mx.ones(96))
    weight = dense(base)
    assert relative_error(adapter.m, mx.linalg.norm(weight, axis=1)) < 1e-6

    shake(adapter, 0.2)
    offset = base["bias"] if bias else None
    parameters = adapter.lora_a, adapter.lora_b, adapter.m
    assert relative_error(adapter(x), slow(weight, offset, x, *parameters, 2.0)) < 1e-5
    merged = x @ adapter.merged_weight().T + (0 if offset is None else offset)
    assert relative_error(merged, adapter(x)) < 1e-5

    target = mx.random.normal((2, 7, 96))

    def fast_loss(x: mx.array, a: mx.array, b: mx.array, m: mx.array):
        adapter.lora_a, adapter.lora_b, adapter.m = a, b, m
        return ((adapter(x) - target) ** 2).sum()

    def slow_loss(x: mx.array, a: mx.array, b: mx.array, m: mx.array):
        return ((slow(weight, offset, x, a, b, m, 2.0) - target) ** 2).sum()

    everything = (0, 1, 2, 3)
    for value, expected in zip(
        mx.grad(fast_loss, argnums=everything)(x, *parameters),
        mx.grad(slow_loss, argnums=everything)(x, *parameters),
        strict=True,
    ):
        assert relative_error(value, expected) < 1e-4


def test_the_cached_norm_and_the_base_are_no_parameters_of_the_adapter() -> None:
    adapter = DoRALinear(linear(64, 48, bias=True, bits=4), 4, 2.0)
    assert set(adapter.trainable_parameters()) >= {"lora_a", "lora_b", "m"}
    assert {k for k, v in adapter.parameters().items() if isinstance(v, mx.array)} == {
        "lora_a",
        "lora_b",
        "m",
    }
    assert "bias" in adapter.linear


def test_a_zero_row_stays_zero_instead_of_nan() -> None:
    base = linear(64, 48, bias=False, bits=None)
    base["weight"][5] = 0
    adapter = DoRALinear(base, 4, 2.0)
    y = adapter(mx.random.normal((3, 64)))
    assert mx.all(y[:, 5] == 0)
    assert mx.all(mx.isfinite(y))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_formats(mode: str) -> None:
    mx.random.seed(0)
    base = nn.Linear(128, 96).to_quantized(mode=mode)
    base.freeze()
    adapter = DoRALinear(base, 4, 2.0)
    x = mx.random.normal((5, 128))
    assert relative_error(adapter(x), base(x)) < 1e-6
    shake(adapter)
    parameters = adapter.lora_a, adapter.lora_b, adapter.m
    expected = slow(dense(base).astype(mx.float32), base["bias"], x, *parameters, 2.0)
    assert relative_error(adapter(x), expected) < 0.01


def test_over_the_fast_cpu_layers() -> None:
    base = linear(128, 96, bias=True, bits=4)
    adapter = DoRALinear(base, 4, 2.0)
    shake(adapter)
    x = mx.random.normal((5, 128))
    before = adapter(x)
    use_fast_matmul(adapter)
    assert relative_error(adapter(x), before) < 1e-5


def test_16_bit_base_keeps_dtype() -> None:
    base = linear(64, 48, bias=True, bits=None)
    base.set_dtype(mx.bfloat16)
    adapter = DoRALinear(base, 4, 2.0)
    x = mx.random.normal((5, 64)).astype(mx.bfloat16)
    assert adapter(x).dtype == mx.bfloat16
    assert adapter.m.dtype == mx.float32
    assert relative_error(adapter(x).astype(mx.float32), base(x).astype(mx.float32)) < 0.01
