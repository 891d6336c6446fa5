"""Fake quantization: what the loss sees is what is packed, and what its gradients are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.models.dequantize import dequantize, pack
from mlx_slim.models.quantized import LayerFormat, as_stored
from mlx_slim.quantization.fake import FakeQuantized, Values


def _stream(codes: list[int], bits: int) -> list[int]:
    """Return the words of one stream of bits, lowest bit first, by big integers."""
    whole = sum(code << (bits * place) for place, code in enumerate(codes))
    return [(whole >> start) & 0xFFFFFFFF for start in range(0, bits * len(codes), 32)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_packed_by_hand(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 64), dtype=np.uint8)
    packed = np.array(pack(mx.array(codes), bits))
    assert packed.dtype == np.uint32 and packed.shape == (2, 3, 64 * bits // 32)
    for row, words in zip(codes.reshape(6, 64), packed.reshape(6, -1), strict=True):
        assert words.tolist() == _stream(row.tolist(), bits)
    ones, zeros = mx.ones((2, 3, 2)), mx.zeros((2, 3, 2))
    back = mx.dequantize(mx.array(packed), ones, zeros, group_size=32, bits=bits)
    assert np.array_equal(np.array(back), codes)
    weight = mx.random.normal((4, 64), key=mx.random.key(bits))
    theirs, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    values = mx.dequantize(theirs, mx.ones_like(scales), mx.zeros_like(biases), 32, bits)
    assert mx.array_equal(pack(values.astype(mx.uint8), bits), theirs).item()


def _fake(bits: int, stored: mx.Dtype, shape: tuple[int, ...] = (8, 64)) -> FakeQuantized:
    layer = nn.Linear(shape[-1], shape[0], bias=False)
    layer["weight"] = mx.random.normal(shape, key=mx.random.key(bits)) * 0.05
    return FakeQuantized(layer, LayerFormat(32, bits), stored)


def _moved(start: Values) -> Values:
    """Return values as training leaves them: nothing lies on the grid of ``mx.quantize``."""
    keys = mx.random.split(mx.random.key(7), len(start))
    return {
        name: value + 0.2 * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(start.items(), keys, strict=True)
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])
def test_the_packed_layer_has_the_trained_weight(bits: int, stored: mx.Dtype) -> None:
    fake = _fake(bits, stored)
    values = _moved(fake.start)
    fake.put(values)
    trained = fake.layer["weight"]
    packed: Any = fake.packed(values)
    for name in ("scales", "biases"):
        assert mx.array_equal(packed[name].astype(stored).astype(mx.float32), packed[name]).item()
    theirs = mx.dequantize(packed["weight"], packed["scales"], packed["biases"], 32, bits)
    ours = dequantize(
        packed["weight"],
        packed["scales"],
        packed["biases"],
        group_size=32,
        bits=bits,
        mode="affine",
    )
    assert mx.array_equal(ours, trained).item()
    assert mx.abs(theirs - trained).max() <= 1e-6 * mx.abs(trained).max()
    requantized = mx.dequantize(*mx.quantize(trained, 32, bits), 32, bits)
    assert mx.abs(requantized - trained).max() > 1e-3 * mx.abs(trained).max(), "why packed by hand"


def test_at_the_start_it_is_the_rounded_weight() -> None:
    fake = _fake(3, mx.float32)
    weight = fake.layer["weight"]
    fake.put(fake.start)
    expected = mx.dequantize(*mx.quantize(weight, 32, 3), 32, 3)
    assert mx.abs(fake.layer["weight"] - expected).max() < 1e-6


def test_gradients_of_weight_scale_and_bias() -> None:
    """By w: 1 on the grid, 0 beyond. By s: code − (w − b)/s, beyond code. By b: 0, beyond 1."""
    layer = nn.Linear(32, 1, bias=False)
    layer["weight"] = mx.zeros((1, 32))
    fake = FakeQuantized(layer, LayerFormat(32, 2), mx.float32)
    fake.unit = mx.array(1.0)
    weight = mx.array([[0.6, 1.45, -0.7, 3.9] + [0.0] * 28])
    values = {"weight": weight, "scales": mx.array([[1.0]]), "biases": mx.array([[0.25]])}

    def one(values: Values, place: int) -> mx.array:
        fake.put(values)
        return fake.layer["weight"][0, place]

    for place, (code, inside) in enumerate([(0.0, 1), (1.0, 1), (0.0, 0), (3.0, 0)]):
        value = one(values, place).item()
        assert value == code + 0.25
        gradients = mx.grad(one)(values, place)
        x = weight[0, place].item() - 0.25  # type: ignore[operator]
        assert gradients["weight"][0, place].item() == inside
        assert gradients["scales"].item() == pytest.approx(code - x if inside else code, abs=1e-6)
        assert gradients["biases"].item() == pytest.approx(0 if inside else 1, abs=1e-6)


def test_a_scale_that_underflows_gives_the_bias() -> None:
    fake = _fake(2, mx.float16)
    values = {**fake.start, "scales": mx.full(fake.start["scales"].shape, 1e-12)}
    fake.put(values)
    groups = fake.layer["weight"].reshape(8, 2, 32)
    assert mx.isfinite(groups).all() and mx.abs(groups - groups[..., :1]).max() == 0
    assert mx.array_equal(_dense(fake.packed(values)), fake.layer["weight"]).item()


def _dense(layer: Any) -> mx.array:
    return mx.dequantize(layer["weight"], layer["scales"], layer["biases"], 32, 2)


def test_rounding_in_the_loop_is_exact_and_has_slope_one() -> None:
    values = mx.random.normal((1000,), key=mx.random.key(0)) * mx.exp(
        mx.random.normal((1000,), key=mx.random.key(1)) * 4
    )
    for stored in (mx.float16, mx.bfloat16):
        assert mx.array_equal(
            as_stored(values, stored), values.astype(stored).astype(mx.float32)
        ).item()
        gradient = mx.grad(lambda x: (as_stored(x, stored) * 3).sum())(values)  # noqa: B023
        assert mx.array_equal(gradient, mx.full(values.shape, 3.0)).item()
