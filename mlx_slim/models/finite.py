"""Weights that are numbers: NaN and infinities are found while weights are read, and refused.

Invariant: looking costs one pass over a tensor and no memory: the largest of its bits, read as
signed and as unsigned integers, says it, on every device alike. Try it:
``mlx-slim generate FOLDER --prompt Hello`` with a model that a diverged run saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.models.tensors import few

# dtype -> the integers of its width, and the bits of infinity; with the sign bit: -infinity. NaN
# has more bits than infinity, every other number has fewer.
_BITS = {
    mx.float32: (mx.int32, mx.uint32, 0x7F80_0000, 0xFF80_0000),
    mx.bfloat16: (mx.int16, mx.uint16, 0x7F80, 0xFF80),
    mx.float16: (mx.int16, mx.uint16, 0x7C00, 0xFC00),
}


def is_finite(value: mx.array) -> bool:
    """Evaluate an array; return whether it holds numbers only (integers do)."""
    bits = _BITS.get(value.dtype)
    if bits is None or value.size == 0:
        mx.eval(value)
        return True
    signed, unsigned, infinity, minus_infinity = bits
    most = mx.max(value.view(signed)), mx.max(value.view(unsigned))
    mx.eval(value, most)
    positive, negative = (int(one.item()) for one in most)  # type: ignore[arg-type]
    return positive < infinity and negative < minus_infinity


def check_finite(tensors: Iterable[tuple[str, mx.array]], where: str) -> None:
    """Evaluate tensors one at a time, and refuse NaN and infinities.

    Args:
        tensors: Their names and values.
        where: Begins the message: the file or the folder.

    Raises:
        SlimError: Names the tensors.
    """
    bad = []
    for name, value in tensors:
        if not is_finite(value):
            bad.append(name)
        del value  # freed before the next one is read
    if bad:
        raise SlimError(
            f"{where}: NaN or infinity in {few(bad)}",
            "take an earlier checkpoint, or download it again; a cast to float16 loses numbers "
            "above 65,504",
        )
