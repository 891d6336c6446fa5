"""What the adapter tests share: models moved away from their start, and slow references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.runtime import to_float
from mlx_slim.training.optim import trainable
from tests.support.stock import stock_load

IDS = mx.array([[1, 5, 9, 70, 200, 31, 8, 8, 2, 100]])


def stock_model(folder: Path, bits: int | None = None, group_size: int = 32) -> Any:
    """The model at ``folder`` by stock mlx-lm, quantized in memory when ``bits`` are given."""
    model, _ = stock_load(str(folder))
    if bits:
        nn.quantize(model, group_size=group_size, bits=bits)
    return model


def shake(module: nn.Module, size: float = 0.05) -> None:
    """Move every trainable parameter away from its start, as training would."""
    mx.random.seed(7)
    moved = [
        (name, value + size * mx.random.normal(value.shape))
        for name, value in trainable(module).items()
    ]
    module.load_weights(moved, strict=False)


def linear(inputs: int, outputs: int, *, bias: bool, bits: int | None, seed: int = 0) -> nn.Module:
    """A frozen random linear layer, dense or quantized (group 64)."""
    mx.random.seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    module = layer.to_quantized(64, bits) if bits else layer
    module.freeze()
    return module


def dense(layer: Any) -> mx.array:
    """The weight of a layer as plain floats, by mlx alone."""
    if "scales" not in layer:
        return layer["weight"]
    return mx.dequantize(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def relative_error(value: mx.array, expected: mx.array) -> float:
    """‖value − expected‖ / ‖expected‖."""
    return to_float(mx.linalg.norm(value - expected) / mx.linalg.norm(expected))
