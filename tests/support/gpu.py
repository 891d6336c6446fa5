"""A GPU's path through the package while MLX computes on the CPU, and Metal's memory calls.

Inside ``gpu_path()`` every ``on_gpu()`` is true: bfloat16, compiled steps, one thread,
``quantized_matmul``, and what only a CPU may do is an error. ``Metal`` stands in for the limits
that MLX has on macOS only. Try it: ``python -m pytest tests/test_gpu_path.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim import blas, runtime
from mlx_slim.models import dequantize

_MATMUL = mx.quantized_matmul


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("only a CPU does this")


def _quantized_matmul(
    x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array | None = None, **words: Any
) -> mx.array:
    """Sum in float32, as Metal and CUDA do; MLX's CPU kernel sums 16-bit products in 16 bits."""
    if biases is not None:  # the scales of float formats are bytes
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return _MATMUL(x.astype(mx.float32), codes, scales, biases, **words).astype(x.dtype)


@contextlib.contextmanager
def gpu_path() -> Iterator[None]:
    """Take the branches of a GPU inside, in every module.

    MLX builds the kernels of ``mx.compile`` with the C++ compiler in ``$TMPDIR/mlx``, which all
    processes share: each is built under a name of its own and renamed.
    """
    with pytest.MonkeyPatch.context() as patch:
        # The code, not the name: many modules have imported the function by its name.
        patch.setattr(runtime.on_gpu, "__code__", (lambda: True).__code__)
        patch.setattr(blas, "single_threaded", _refuse)
        patch.setattr(blas, "numpy_single_threaded", _refuse)
        patch.setattr(mx, "disable_compile", _refuse)
        patch.setattr(dequantize, "_codes", _refuse)
        patch.setattr(mx, "quantized_matmul", _quantized_matmul)
        yield


class Metal:
    """MLX's memory limits as a Mac has them.

    Attributes:
        wired: The wired limit now, bytes.
        cache: The limit of free buffers now, bytes.
        history: Each wired limit that was set.
    """

    WORKING_SET, CACHE = 12 << 30, 77

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wired, self.cache = 0, self.CACHE
        self.history: list[int] = []
        info = {"max_recommended_working_set_size": self.WORKING_SET, "memory_size": 16 << 30}
        patch.setattr(mx, "device_info", lambda: info)
        patch.setattr(mx, "set_wired_limit", self._set_wired)
        patch.setattr(mx, "set_cache_limit", self._set_cache)

    def _set_wired(self, limit: int) -> int:
        before, self.wired = self.wired, limit
        self.history.append(limit)
        return before

    def _set_cache(self, limit: int) -> int:
        before, self.cache = self.cache, limit
        return before
