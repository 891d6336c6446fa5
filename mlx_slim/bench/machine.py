"""What a record of measurements says about the machine: what it is, and nothing about its owner.

Invariant: no path, no name of user or host; what identifies a kind of machine (chip, cores, memory,
versions) and its plain speeds. Try it: ``mlx-slim doctor --self-test --json``.
"""

from __future__ import annotations

import os
import platform

from mlx_slim.reading import JsonObject


def speed() -> dict[str, float]:
    """Return the measured rates; bfloat16 on a CPU, which is slow, on a small product."""
    import mlx.core as mx

    from mlx_slim import runtime

    small = 1024 if runtime.on_gpu() else 256
    return {
        "matmul_float32_gflops": round(runtime.matmul_gflops(), 1),
        "matmul_bfloat16_gflops": round(runtime.matmul_gflops(mx.bfloat16, small, 4), 1),
        "exp_ns": round(runtime.exp_nanoseconds(), 2),
    }


def device() -> JsonObject:
    """Return the kind of device, its name, its cores and the dtype that it computes in."""
    import mlx.core as mx

    from mlx_slim import runtime

    name = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    return {
        "type": "gpu" if runtime.on_gpu() else "cpu",
        "name": str(name),
        "cores": os.cpu_count(),
        "dtype": runtime.dtype_name(runtime.resolve_dtype("auto")),
    }


def total_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> JsonObject:
    """Return the machine as a record that can be published has it."""
    from mlx_slim import artifacts, blas

    return {
        "device": device(),
        "memory_bytes": total_memory(),
        **artifacts.provenance(),
        "blas": blas.status().source,
        "speed": speed(),
    }
