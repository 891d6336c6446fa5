"""The Macs that a run can be planned for: memory, bandwidth, GPU, and the GPU's working set.

Invariant: a Mac's limit is the working set that Metal recommends
(``MTLDevice.recommendedMaxWorkingSetSize``): two thirds of memory below 36 GB and three quarters
from there on. These fractions give the sizes that programs log on such machines to the megabyte:
10,923 MiB of 16 GB, 21,845 of 32 (llama.cpp issue 2011), 49,152 of 64 (issue 1870), 73,728 of 96
(issue 3213); newer systems allow more (107.5 GiB of 128 on macOS 26), never less. Bandwidths,
memory sizes and GPU cores are Apple's technical specifications of each chip, in GB/s (1e9) and GB
(2^30); the smaller GPU of a Max from M3 on has slower memory in sizes of its own, so the size tells
which one it is. Apple publishes no GPU clocks: those of M1 and M2 are
philipturner/metal-benchmarks', those of M3, M4 and M5 hmc-tech.com/gpu's, M5 Pro and Max have M5's.
A core has 128 float32 units, so they give 2.6 TFLOP/s for M1, 3.6 for M2, 14.3 for M3 Max, as the
Hugging Face hub lists (huggingface.js, ``hardware.ts``; for M4 and M5 it lists 7% to 28% more). An
M5 without a fan ran at 1,578 MHz (michaelstinkerings.org, its roofline). 16-bit floats are counted
as no faster, M5's neural accelerators not at all. Try it: ``mlx-slim plan --macs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import AUTO_FRACTION
from mlx_slim.units import human_bytes

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)


class Chip(NamedTuple):
    """One chip.

    Attributes:
        bandwidth: Of its memory, GB/s.
        cores: Of the GPU, fewest and most.
        megahertz: Of the GPU, at most.
        memory: Sizes that it was sold with, GB.
    """

    bandwidth: int
    cores: tuple[int, int]
    megahertz: int
    memory: tuple[int, ...]

    @property
    def tflops(self) -> float:
        """Of the GPU with most cores, 1e12 float32 operations a second: 128 FMA units a core."""
        return self.cores[1] * 128 * 2 * self.megahertz / 1e6


CHIPS: dict[str, Chip] = {
    "m1": Chip(68, (7, 8), 1278, (8, 16)),
    "m1-pro": Chip(200, (14, 16), 1296, (16, 32)),
    "m1-max": Chip(400, (24, 32), 1296, (32, 64)),
    "m1-ultra": Chip(800, (48, 64), 1296, (64, 128)),
    "m2": Chip(100, (8, 10), 1398, (8, 16, 24)),
    "m2-pro": Chip(200, (16, 19), 1398, (16, 32)),
    "m2-max": Chip(400, (30, 38), 1398, (32, 64, 96)),
    "m2-ultra": Chip(800, (60, 76), 1398, (64, 128, 192)),
    "m3": Chip(100, (8, 10), 1398, (8, 16, 24)),
    "m3-pro": Chip(150, (14, 18), 1398, (18, 36)),
    "m3-max": Chip(400, (30, 40), 1398, (36, 48, 64, 96, 128)),
    "m3-ultra": Chip(819, (60, 80), 1398, (96, 256, 512)),
    "m4": Chip(120, (8, 10), 1578, (16, 24, 32)),
    "m4-pro": Chip(273, (16, 20), 1578, (24, 48, 64)),
    "m4-max": Chip(546, (32, 40), 1678, (36, 48, 64, 128)),
    "m5": Chip(153, (8, 10), 1740, (16, 24, 32)),
    "m5-pro": Chip(307, (16, 20), 1740, (24, 48, 64)),
    "m5-max": Chip(614, (32, 40), 1740, (36, 48, 64, 128)),
}

# Of the smaller GPU of a chip: bandwidth, and the sizes of memory that it alone is sold with.
_SMALLER = {"m3-max": (300, (36, 96)), "m4-max": (410, (36,)), "m5-max": (460, (36,))}


def chip_with(name: str, memory_gb: int) -> Chip:
    """Return a chip of the table as it is sold with ``memory_gb`` of memory."""
    chip = CHIPS[name]
    if name not in _SMALLER or memory_gb not in chip.memory:
        return chip
    bandwidth, sizes = _SMALLER[name]
    fewest, most = chip.cores
    if memory_gb in sizes:
        return chip._replace(bandwidth=bandwidth, cores=(fewest, fewest))
    return chip._replace(cores=(most, most))


@dataclass(frozen=True)
class Mac:
    """One configuration.

    Attributes:
        name: ``m2-16gb``, ``m4-max-64gb``.
        memory_gb: Unified memory, GB of 2^30 bytes.
        chip_name: ``m2``, ``m4-max``.
        chip: Bandwidth and GPU.
        working_set_bytes: Memory that MLX may use.
    """

    name: str
    memory_gb: int
    chip_name: str
    chip: Chip
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
        Mac(f"{name}-{size}gb", size, name, chip_with(name, size), working_set(size))
        for name, chip in CHIPS.items()
        for size in chip.memory
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
        if key in CHIPS:
            hint = "with its memory: " + ", ".join(m.name for m in macs() if m.chip_name == key)
        raise SlimError(f"no Mac {name!r} in the table", hint)
    return by_name[key]


def as_records() -> list[JsonObject]:
    """Return all configurations as ``plan --macs --json`` has them."""
    return [
        {
            "mac": mac.name,
            "memory_gb": mac.memory_gb,
            "bandwidth_gb_per_second": mac.chip.bandwidth,
            "gpu_tflops": round(mac.chip.tflops, 1),
            "working_set_bytes": mac.working_set_bytes,
        }
        for mac in macs()
    ]


def markdown() -> str:
    """Return the table of all configurations."""
    lines = ["| Mac | memory | bandwidth | GPU | GPU working set |", "|---|---|---|---|---|"]
    lines += [
        f"| {m.name} | {m.memory_gb} GB | {m.chip.bandwidth} GB/s | {m.chip.tflops:.1f} TFLOP/s | "
        f"{human_bytes(m.working_set_bytes)} |"
        for m in macs()
    ]
    return "\n".join(lines)
