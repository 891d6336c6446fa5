"""A layer whose codes, scales and biases are trained: rounded in the forward pass, then packed.

Invariant: the weight that the loss saw is the weight that is stored. Scales s and biases b are
rounded to the dtype that they are stored in, codes are clip(round((w − b) / s), 0, 2^bits − 1), and
the weight is s · code + b; gradients pass the two roundings unchanged (straight-through), so w, s
and b all learn. Packing writes these very codes, scales and biases. Try it:
``python -m pytest tests/quantization/test_fake.py``.

Source: EfficientQAT, arXiv 2407.11062. Shapes: O outputs, I inputs, N groups of G inputs; experts
have a leading axis.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models.dequantize import pack
from mlx_slim.models.quantized import LayerFormat, as_stored, use_fast_matmul

Values = dict[str, mx.array]
CONSTANTS = ("scales", "biases")


class FakeQuantized:
    """A dense layer in training.

    What learns is kept in units of the layer, the mean distance between two codes, so that one
    learning rate suits all layers.

    Args:
        layer: A dense layer that can be quantized; its weight is replaced by the rounded one.
        chosen: Its format, of mode affine.
        stored: Dtype that scales and biases are stored in.

    Attributes:
        start: ``weight`` (O, I), ``scales`` and ``biases`` (O, N), float32, in units.
    """

    def __init__(self, layer: nn.Module, chosen: LayerFormat, stored: mx.Dtype) -> None:
        self.layer, self.format, self.stored = layer, chosen, stored
        weight = layer["weight"]
        self.dtype = weight.dtype
        weight = weight.astype(mx.float32)
        _, scales, biases = mx.quantize(weight, group_size=chosen.group_size, bits=chosen.bits)
        self.unit = mx.maximum(mx.abs(scales).mean(), 1e-7)
        values = {"weight": weight, "scales": scales, "biases": biases}
        self.start: Values = {name: value / self.unit for name, value in values.items()}
        mx.eval(self.unit, self.start)

    def _grid(self, values: Values) -> tuple[mx.array, mx.array, mx.array]:
        """Return codes (O, N, G) as floats, scales and biases (O, N), float32."""
        scales, biases = (as_stored(values[name] * self.unit, self.stored) for name in CONSTANTS)
        grouped = (values["weight"] * self.unit).reshape(*scales.shape, self.format.group_size)
        divisor = mx.where(scales == 0, 1.0, scales)  # a scale may underflow when it is stored
        places = (grouped - biases[..., None]) / divisor[..., None]
        nearest = mx.stop_gradient(mx.round(places))
        codes = mx.clip(nearest, 0, 2**self.format.bits - 1)
        # Added is 0: the gradient of a place on the grid. (That of ``mx.clip`` is 0 at its ends.)
        gradient = mx.where(nearest == codes, places - mx.stop_gradient(places), 0.0)
        return codes + gradient, scales, biases

    def put(self, values: Values) -> None:
        """Let the layer compute with the weight that ``values`` stand for."""
        codes, scales, biases = self._grid(values)
        weight = codes * scales[..., None] + biases[..., None]
        self.layer["weight"] = weight.reshape(values["weight"].shape).astype(self.dtype)

    def packed(self, values: Values) -> nn.Module:
        """Return the quantized layer of ``values``, evaluated."""
        codes, scales, biases = self._grid(values)
        layer: Any = cast(Any, self.layer).to_quantized(
            group_size=self.format.group_size, bits=self.format.bits
        )
        flat = codes.reshape(values["weight"].shape).astype(mx.uint8)
        layer["weight"] = pack(flat, self.format.bits)
        layer["scales"], layer["biases"] = scales.astype(self.dtype), biases.astype(self.dtype)
        mx.eval(layer.parameters())
        layer.freeze()
        use_fast_matmul(layer)
        return layer
