"""The Macs that a run can be planned for: memory, bandwidth, and the working set of the GPU.

Invariant: a Mac's limit is the working set that Metal recommends
(``MTLDevice.recommendedMaxWorkingSetSize``): two thirds of memory below 36 GB and three quarters
from there on. These fractions give the sizes that programs log on such machines to the megabyte:
10,923 MiB of 16 GB, 21,845 of 32 (llama.cpp issue 2011), 49,152 of 64 (issue 1870), 73,728 of 96
(issue 3213); newer systems allow more (107.5 GiB of 128 on macOS 26), never less. Bandwidths and
memory sizes are Apple's technical specifications of each chip, in GB/s (1e9) and GB (2^30); of a
chip with two bandwidths the higher one is listed. Try it: ``mlx-slim plan --macs``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.runtime import AUTO_FRACTION, human_bytes

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)

# chip: (bandwidth in GB/s, memory sizes in GB)
CHIPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "m1": (68, (8, 16)),
    "m1-pro": (200, (16, 32)),
    "m1-max": (400, (32, 64)),
    "m1-ultra": (800, (64, 128)),
    "m2": (100, (8, 16, 24)),
    "m2-pro": (200, (16, 32)),
    "m2-max": (400, (32, 64, 96)),
    "m2-ultra": (800, (64, 128, 192)),
    "m3": (100, (8, 16, 24)),
    "m3-pro": (150, (18, 36)),
    "m3-max": (400, (36, 48, 64, 96, 128)),
    "m3-ultra": (819, (96, 256, 512)),
    "m4": (120, (16, 24, 32)),
    "m4-pro": (273, (24, 48, 64)),
    "m4-max": (546, (36, 48, 64, 128)),
    "m5": (153, (16, 24, 32)),
}


@dataclass(frozen=True)
class Mac:
    """One configuration.

    Attributes:
        name: ``m2-16gb``, ``m4-max-64gb``.
        memory_gb: Unified memory, GB of 2^30 bytes.
        bandwidth: Of that memory, GB/s.
        working_set_bytes: Memory that MLX may use.
    """

    name: str
    memory_gb: int
    bandwidth: int
    working_set_bytes: int


def working_set(memory_gb: int) -> int:
    """Return the bytes that MLX may use on a Mac with ``memory_gb`` of memory."""
    fraction = 2 / 3 if memory_gb < 36 else 3 / 4
    return int(memory_gb * 2**30 * fraction)


def budget(memory_gb: int) -> int:
    """Return the value of ``memory.budget: auto`` on it: nine tenths of the working set."""
    return int(working_set(memory_gb) * AUTO_FRACTION)


def smallest_that_fits(peak_bytes: int) -> int | None:
    """Return the smallest memory size in GB whose budget holds ``peak_bytes``, or None."""
    return next((size for size in SIZES if peak_bytes <= budget(size)), None)


def macs() -> list[Mac]:
    """Return every configuration, oldest chip first."""
    return [
        Mac(f"{chip}-{size}gb", size, bandwidth, working_set(size))
        for chip, (bandwidth, sizes) in CHIPS.items()
        for size in sizes
    ]


def find_mac(name: str) -> Mac:
    """Return the configuration called ``name``, such as ``m2-16gb``.

    Raises:
        SlimError: If there is none.
    """
    by_name = {mac.name: mac for mac in macs()}
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in by_name:
        close = did_you_mean(key, by_name)
        hint = close if close.startswith("did") else "mlx-slim plan --macs lists them"
        raise SlimError(f"no Mac {name!r} in the table", hint)
    return by_name[key]


def markdown() -> str:
    """Return the table of all configurations."""
    lines = ["| Mac | memory | bandwidth | GPU working set |", "|---|---|---|---|"]
    lines += [
        f"| {m.name} | {m.memory_gb} GB | {m.bandwidth} GB/s | {human_bytes(m.working_set_bytes)} |"
        for m in macs()
    ]
    return "\n".join(lines)
