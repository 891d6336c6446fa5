"""Which Macs a predicted peak fits.

Invariant: a Mac's limit is what Metal recommends as working set: about two thirds of memory below
36 GB and three quarters from there on; macOS and other programs need the rest. Memory sizes are
those that Apple sells, in GB of 2^30 bytes. Try it: ``mlx-slim plan --table``.
"""

from __future__ import annotations

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)


def working_set(memory_gb: int) -> int:
    """Return the bytes that MLX may use on a Mac with ``memory_gb`` of memory."""
    share = 2 / 3 if memory_gb < 36 else 3 / 4
    return int(memory_gb * 2**30 * share)


def smallest_that_fits(peak_bytes: int) -> int | None:
    """Return the smallest memory size in GB whose working set holds ``peak_bytes``, or None."""
    return next((size for size in SIZES if peak_bytes <= working_set(size)), None)
