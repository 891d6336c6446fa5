"""How long a run takes on a machine of which only the peak rate is known: a range, an estimate.

Invariant: time is matrix products over (peak x utilisation) plus bytes moved over (bandwidth x its
utilisation); both ends of the range come from stated utilisations, nothing is fitted to the run.

Utilisation of an Apple GPU grows with the positions of a micro-batch: n / (n + 8·cores) of
``APPLE_UTILISATION``. Both are calibrated on published speeds of LoRA over 4-bit bases: on an M1
Max, Qwen3-8B 33 tokens/s with one Alpaca row a batch and 99 packed, Llama-3.2-3B 77 and 226 (three
times as fast: half of the utilisation at 256 positions, if 2,048 are packed; 30 to 33% of the peak
in a large micro-batch); on an M1, Qwen2.5-0.5B 240, Llama-3.2-3B 82, Qwen2.5-7B 33 tokens/s (21 to
47%, if a batch has four rows). The upper end leaves room: a forward pass over a prompt reaches
about 70% (mlx-lm#1569: Qwen3-4B, 615 tokens/s on an M3 Pro).

Elsewhere the peak is a matrix product measured in a fraction of a second. On a CPU
``CPU_UTILISATION`` holds 31% to 49%, what this project's own training reached of it
(docs/lab-log.md: SmolLM2-135M, LoRA, 0.57 GFLOP a token, 86 tokens/s at 157 GFLOP/s, 139 and 154
at 181). Try it: ``mlx-slim plan smollm2-lora --for m2-16gb``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_slim.planner.macs import CHIPS, Chip, chip_with
from mlx_slim.planner.work import Operations
from mlx_slim.runtime import matmul_gflops, on_gpu

APPLE_UTILISATION = (0.20, 0.60)  # of the peak, in a large micro-batch
CPU_UTILISATION = (0.25, 0.55)  # of a measured matrix product
# Of a measured product on a GPU that is not in the table: as Apple's, and an NVIDIA H100 trained at
# 5% of it with compilation in the measurement (docs/lab-log.md), so the lower end is lower.
GPU_UTILISATION = (0.05, 0.60)
BANDWIDTH_UTILISATION = (0.50, 0.80)  # of the memory's; a copy reaches 79% on an M5
TOKENS_PER_CORE = 8  # positions of a micro-batch, for each GPU core, at half of the utilisation


@dataclass(frozen=True)
class Range:
    """An estimate of a time: between ``low`` and ``high`` seconds."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        """Return the time of one after the other."""
        return Range(self.low + other.low, self.high + other.high)

    def scaled(self, factor: float) -> Range:
        """Return ``factor`` times as long."""
        return Range(factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Machine:
    """What is known of the speed of a machine.

    Attributes:
        name: Such as ``m2``.
        flops: Peak operations a second: of its slowest variant, of its fastest.
        utilisation: Of that peak in a large micro-batch: lower, upper.
        half_tokens: Positions of a micro-batch at which half of it is reached.
        bandwidth: Bytes a second of its memory; None where that is part of the utilisation.
        basis: Where the figures are from, as text.
    """

    name: str
    flops: tuple[float, float]
    utilisation: tuple[float, float]
    half_tokens: int
    bandwidth: float | None
    basis: str


def apple(name: str, chip: Chip) -> Machine:
    """Return the machine of an Apple chip in the table."""
    fewest, most = chip.cores
    peak = chip.tflops * 1e12
    (low, high), (slow, fast) = APPLE_UTILISATION, BANDWIDTH_UTILISATION
    speeds = f"{chip.tflops:.1f}"
    if fewest < most:
        speeds = f"{chip.tflops * fewest / most:.1f} to {speeds}"
    return Machine(
        name,
        (peak * fewest / most, peak),
        APPLE_UTILISATION,
        TOKENS_PER_CORE * most,
        chip.bandwidth * 1e9,
        f"{low:.0%} to {high:.0%} of the {speeds} TFLOP/s of {name}, "
        f"{slow:.0%} to {fast:.0%} of its {chip.bandwidth} GB/s",
    )


def this_machine(dtype: mx.Dtype) -> Machine:
    """Return this machine: an Apple chip in the table, or a matrix product measured now.

    Takes a fraction of a second where it measures.

    Args:
        dtype: Of the matrix product.
    """
    name = str(mx.device_info().get("device_name", "this machine"))
    key = name.lower().removeprefix("apple ").replace(" ", "-")
    if on_gpu() and key in CHIPS:
        memory = int(mx.device_info().get("memory_size", 0))
        return apple(key, chip_with(key, round(memory / 2**30)))
    gflops = matmul_gflops(dtype, 2048 if on_gpu() else 512, 4)
    utilisation = GPU_UTILISATION if on_gpu() else CPU_UTILISATION
    low, high = utilisation
    basis = f"{low:.0%} to {high:.0%} of a matrix product's {gflops:,.0f} GFLOP/s, measured here"
    if on_gpu():
        basis += f"; {name} is not in the table of chips"
    return Machine(name, (gflops * 1e9, gflops * 1e9), utilisation, 0, None, basis)


def estimate(work: Operations, machine: Machine) -> Range:
    """Return the seconds that ``work`` takes on ``machine``.

    Args:
        work: Of ``planner.work.operations``; proportional to the tokens of a run.
        machine: Of ``apple`` or ``this_machine``.
    """
    filled = work.batch_tokens / (work.batch_tokens + machine.half_tokens)

    def seconds(end: int) -> float:
        compute = work.flops / (machine.flops[end] * machine.utilisation[end] * filled)
        if machine.bandwidth is None:
            return compute
        return compute + work.moved_bytes / (machine.bandwidth * BANDWIDTH_UTILISATION[end])

    return Range(seconds(1), seconds(0))
