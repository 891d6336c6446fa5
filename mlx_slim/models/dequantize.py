"""Dense float32 weights out of packed ones, and codes into packed ones.

Invariant: bit for bit what ``mx.dequantize`` returns in float32. On a CPU, for which MLX has no
kernel and composes it from 32-bit operations, most passes run over bytes here, 1.6 to 8 times as
fast; on a GPU it is MLX's kernel, which needs no memory besides its result. Try it:
``python -m pytest tests/models/test_quantized.py -k dense_weight``.

Shapes: O output width, I input width, Q packed input width (32-bit words), N groups, G group size.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_slim.runtime import on_gpu

# Codes that fill a whole number of bytes, for the bit widths that do not divide a byte.
_CODES_PER_RUN = {3: 8, 5: 8, 6: 4}


def dequantize(
    weight_OQ: mx.array,
    scales_ON: mx.array,
    biases_ON: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Return the dense float32 weight (O, I) of a quantized one.

    Args:
        weight_OQ: Codes packed into uint32 words by ``mx.quantize``.
        scales_ON: One scale a group: floating (affine) or uint8 (float formats).
        biases_ON: One offset a group; None but for affine.
        group_size: Weights that share a scale.
        bits: Bits a code.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """
    if on_gpu():
        if biases_ON is not None:  # the codes are scaled in the dtype of the scales
            scales_ON, biases_ON = scales_ON.astype(mx.float32), biases_ON.astype(mx.float32)
        return mx.dequantize(
            weight_OQ, scales_ON, biases_ON, group_size, bits, mode, dtype=mx.float32
        )
    outer = weight_OQ.shape[:-1]
    grouped = (*outer, -1, group_size)
    if mode == "affine":
        assert biases_ON is not None
        codes = _codes(weight_OQ, bits).reshape(grouped).astype(mx.float32)
        scales, biases = scales_ON.astype(mx.float32), biases_ON.astype(mx.float32)
        dense = codes * scales[..., None] + biases[..., None]
    elif mode == "mxfp8":
        dense = _e4m3(weight_OQ).reshape(grouped) * _e8m0(scales_ON)[..., None]
    else:
        scales = _e8m0(scales_ON) if mode == "mxfp4" else mx.from_fp8(scales_ON, dtype=mx.float32)
        doubled = _e2m1_doubled(_codes(weight_OQ, 4)).reshape(grouped)
        dense = doubled.astype(mx.float32) * (0.5 * scales)[..., None]
    return dense.reshape(*outer, -1)


def _codes(weight_OQ: mx.array, bits: int) -> mx.array:
    """Return the codes, uint8, of a packed weight; their order is little-endian."""
    bytes_ = weight_OQ.view(mx.uint8)
    if bits == 8:
        return bytes_
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        return mx.stack([(bytes_ >> shift) & mask for shift in range(0, 8, bits)], -1)
    count = _CODES_PER_RUN[bits]
    run = bytes_.reshape(*bytes_.shape[:-1], -1, count * bits // 8)
    codes = []
    for start in range(0, count * bits, bits):
        byte, shift = divmod(start, 8)
        code = run[..., byte] >> shift
        if shift + bits > 8:  # the code goes on in the next byte
            code = code | (run[..., byte + 1] << (8 - shift))
        codes.append(code & mask)
    return mx.stack(codes, -1)


def pack(codes_OI: mx.array, bits: int) -> mx.array:
    """Return codes packed into uint32 words (O, I · bits / 32), as ``mx.quantize`` packs them.

    The codes of a row are one stream of bits, the lowest bit of each code first. (``mx.quantize``
    itself cannot take trained codes: it moves the grid so that 0 is on it.)

    Args:
        codes_OI: uint8, below 2 ** bits; I · bits divisible by 32; leading axes are kept.
        bits: Bits a code.
    """
    shifts = mx.arange(bits, dtype=mx.uint8)
    stream = ((codes_OI[..., None] >> shifts) & 1).reshape(*codes_OI.shape[:-1], -1, 8)
    bytes_ = (stream << mx.arange(8, dtype=mx.uint8)).sum(axis=-1).astype(mx.uint8)
    return bytes_.view(mx.uint32)


def _e2m1_doubled(codes: mx.array) -> mx.array:
    """Return twice the value of each 4-bit float, int8.

    Doubled magnitudes 0 1 2 3 4 6 8 12 are piecewise linear in the low three bits m:
    m + max(m, 4) + 2 max(m, 6) - 16.
    """
    m = codes & 7
    magnitude = m + mx.maximum(m, 4) + 2 * mx.maximum(m, 6) - 16
    sign = 1 - ((codes >> 2) & 2).view(mx.int8)
    return magnitude.view(mx.int8) * sign


def _e4m3(weight_OQ: mx.array) -> mx.array:
    """Return 8-bit floats as float32: their bits moved into place, the exponent bias mended."""
    wide = weight_OQ.view(mx.int8).astype(mx.int32) << 20  # the sign is extended: bits 27-30 go
    return (wide.view(mx.uint32) & 0x87F00000).view(mx.float32) * 2.0**120


def _e8m0(scales: mx.array) -> mx.array:
    """Return 2^(s - 127); 0 stands for the subnormal 2^-127."""
    bits = scales.astype(mx.uint32) << 23
    return mx.where(scales == 0, mx.array(1 << 22, mx.uint32), bits).view(mx.float32)
