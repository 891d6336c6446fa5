"""Rounds of a benchmark: each side in a process of its own, medians and ratios.

Invariant: the sides that are compared ran in the same call, alternating, each in a fresh process.
Try it: ``mlx-slim bench train MODEL --data tatsu-lab/alpaca --against mlx-lm``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import matmul_gflops


def run_side(module: str, side: str, work: JsonObject) -> JsonObject:
    """Return what ``side`` of ``mlx_slim.bench.<module>`` measured on ``work``.

    Raises:
        SlimError: If the process failed; its last line is quoted.
    """
    command = [sys.executable, "-m", f"mlx_slim.bench.{module}", side, json.dumps(work)]
    environment = dict(os.environ)
    if module == "torch_sides":  # our BLAS in its process makes PyTorch 3.6 times slower
        environment["MLX_SLIM_BLAS"] = "off"
        environment.pop("LD_PRELOAD", None)
    with stage(f"measuring {side}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise SlimError(f"the side {side} of the benchmark failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def reset_process_peak() -> None:
    """Let ``process_peak_bytes`` begin anew, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def process_peak_bytes() -> int:
    """Return the most memory that this process has held, libraries included, bytes.

    Since ``reset_process_peak`` on Linux, else since the process began.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = re.search(r"VmHWM:\s*(\d+) kB", status)
        if peak:
            return int(peak[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_rates(timed: list[tuple[int, float]]) -> JsonObject:
    """Return tokens, seconds and tokens/s over the (tokens, seconds) of timed steps."""
    tokens, seconds = sum(t for t, _ in timed), sum(s for _, s in timed)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "steps": len(timed),
    }


def record(work: JsonObject, other: str, rounds: list[JsonObject]) -> JsonObject:
    """Return the record that DESIGN.md calls ``bench … --json``.

    Args:
        work: What was measured.
        other: Name of the side beside ``ours``.
        rounds: For each round the figures of both sides.
    """
    result: JsonObject = {
        "device": f"{platform.system()} {platform.machine()}, {mx.default_device().type.name}",
        "matmul_gflops": round(matmul_gflops(), 1),
        "work": work,
        "rounds": rounds,
    }
    keys = [key for key, value in rounds[0]["ours"].items() if isinstance(value, (int, float))]
    for side in ("ours", other):
        result[side] = {
            key: statistics.median(each[side][key] for each in rounds)
            for key in keys
            if key in rounds[0][side]
        }
    ours, theirs = result["ours"], result[other]
    peak = peak_key(theirs)
    result["ratio"] = {
        "speed": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "peak_memory": ours[peak] / theirs[peak],
    }
    return result


def peak_key(theirs: JsonObject) -> str:
    """Return which peak both sides have: MLX's own, or that of the process beside PyTorch."""
    return "peak_memory_bytes" if "peak_memory_bytes" in theirs else "process_peak_bytes"
