"""Which machine a job ran on: work of several kinds of machine is not the same to the last digit.

Invariant: nothing about the user. Used by ``compare`` and ``slim``. Try it: ``mlx-slim compare
matrix-tiny -o runs/tiny``, then ``provenance`` in ``runs/tiny/matrix.json``.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import provenance
from mlx_slim.blas import cpus_by_core
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import on_gpu
from mlx_slim.units import human_bytes


def machine() -> JsonObject:
    """Return provenance with the machine in words; nothing about the user."""
    name = ""
    if on_gpu():
        name = str(mx.device_info().get("device_name", "GPU"))
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    where = f"{platform.system()} {platform.machine()}"
    memory = human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cores = sum(map(len, cpus_by_core())) or os.cpu_count()  # a job may have a part of them
    plural = "" if cores == 1 else "s"
    facts = [name, f"{cores} CPU core{plural}", f"{memory} memory", where]
    return {**provenance(), "machine": ", ".join(fact for fact in facts if fact)}


def kind_of(record: JsonObject) -> str:
    """Return the kind of the machine of ``machine()``: chip, cores, memory, versions."""
    versions = [f"Python {record.get('python', '?')}"]
    versions += [f"{name} {version}" for name, version in record.get("versions", {}).items()]
    where = str(record.get("machine") or record.get("system", "?"))
    return f"{where}; {', '.join(versions)}"
