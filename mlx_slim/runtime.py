"""The machine: device, default dtype, memory counters and limits, ranks.

Invariant: nothing above this floor asks MLX what it runs on. Sizes are bytes. Try it:
``mlx-slim doctor``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_slim import blas
from mlx_slim.children import MEMORY_VARIABLE
from mlx_slim.errors import SlimError
from mlx_slim.ranks import collectives, watch
from mlx_slim.reading import JsonObject, library_errors
from mlx_slim.units import parse_size

HUB_SECONDS = 3.0
_CONNECT = "docs/several-machines.md, 'Known failures'; started by hand: MLX_RANK and MLX_HOSTFILE"
# Of what the device can hold: the budget of a run that names none. mlx-lm warns above the same
# share of Metal's working set.
AUTO_FRACTION = 0.9
# On a GPU MLX may keep 1/8 of a budget as free buffers. On a CPU it keeps none: malloc is as fast,
# and the process stays at what is in use (docs/lab-log.md).
_CACHE_DIVISOR = 8
_WORKING_SET = "max_recommended_working_set_size"  # only Metal reports it
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def on_metal() -> bool:
    """Return whether MLX computes on a Mac's GPU."""
    return on_gpu() and mx.metal.is_available()


def default_num_threads() -> int:
    """Return how many shards of a batch to compute in parallel: one a core, at most four.

    Without a GPU, MLX runs everything but matrix products on one thread per stream.
    """
    return 1 if on_gpu() else min(4, blas.physical_cores())


def resolve_dtype(name: str) -> mx.Dtype:
    """Return the dtype of a recipe's ``auto`` (bfloat16 on a GPU, float32 on a CPU) or its name."""
    if name == "auto":
        return mx.bfloat16 if on_gpu() else mx.float32
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return ``float32`` for ``mx.float32``."""
    return str(dtype).rsplit(".", 1)[-1]


@lru_cache(maxsize=1)
def world() -> mx.distributed.Group:
    """Return the group of ranks (one rank unless started by ``mlx.launch``), watched.

    Raises:
        SlimError: If the ranks cannot connect, in the words of the backend.
    """
    with library_errors("the ranks cannot connect", _CONNECT):
        group = mx.distributed.init()
    watch.start(group)
    return group


def leads() -> bool:
    """Return whether this rank is the one that reads, writes and prints."""
    return world().rank() == 0


def all_gather_bytes(data: bytes, *, patient: bool = False) -> list[bytes]:
    """Return what every rank gave, in the order of ranks; all ranks must call it.

    ``patient``: a rank may work alone for long before it comes.
    """
    return watch.gather_bytes(data, world(), patient=patient)


def all_sum(array: mx.array, what: str = "sums") -> mx.array:
    """Return the sum of an array over all ranks, evaluated; all ranks must call it.

    ``what``: its bytes are counted under this name.
    """
    return collectives.all_sum(array, world(), what)


def true_on_all_ranks(value: bool = True) -> bool:
    """Return whether ``value`` is true on all ranks, when all have come: one may work before."""
    group = world()
    count = collectives.all_sum(mx.array(int(value)), group, "agreement", patient=True)
    return int(to_float(count)) == group.size()


def from_first_rank(work: Callable[[], Any]) -> Any:
    """Return, on every rank, what ``work`` returns (JSON) on rank 0, which alone does it.

    Raises:
        SlimError: On rank 0, as ``work``; the others end with its exit code and say nothing.
    """
    if world().size() == 1:
        return work()
    if world().rank() == 0:
        answer: JsonObject = {"code": 1}
        try:
            answer = {"value": work()}
        except SlimError as error:
            answer = {"code": error.exit_code}
            raise
        finally:
            all_gather_bytes(json.dumps(answer).encode(), patient=True)
        return answer["value"]
    answer = json.loads(all_gather_bytes(b"", patient=True)[0])
    if "code" in answer:
        raise SystemExit(answer["code"])
    return answer["value"]


def _linux_memory() -> int:
    """Bytes this process may use: available memory, less where a cgroup allows less."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, int(limit))
    return available


def device_memory() -> int:
    """Return the bytes that MLX can hold on the default device.

    Metal: the recommended working set. CUDA: the card's memory. CPU: available memory.
    """
    if on_gpu():
        info = mx.device_info()
        # Metal's working set, CUDA's card; the last is the whole of a Mac's memory.
        for key in (_WORKING_SET, "total_memory", "memory_size"):
            if size := info.get(key):
                return int(size)
    if Path("/proc/meminfo").exists():
        return _linux_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def memory_limits(budget: int | None = None) -> Iterator[None]:
    """Inside, Metal keeps the working set resident, and MLX few or no free buffers; then as before.

    Without a wired limit macOS may page or compress weights between two steps (mlx#3186). The
    limit is the recommended working set, which mlx-lm takes; other devices report none. It is
    also a decorator. Limits are of the process: contexts may nest, threads share them.

    Args:
        budget: Bytes that the work may take; None is the memory of the device.
    """
    limit = device_memory() if budget is None else budget
    working_set = mx.device_info().get(_WORKING_SET)
    before = mx.set_cache_limit(limit // _CACHE_DIVISOR if on_gpu() else 0)
    wired = None
    try:
        if working_set:
            wired = mx.set_wired_limit(int(working_set))
        yield
    finally:
        mx.set_cache_limit(before)
        if wired is not None:
            mx.synchronize()  # the wired limit must not change while arrays are computed
            mx.set_wired_limit(wired)


_returned = [0.0]  # when memory was last returned, seconds of the monotonic clock


def return_free_memory() -> None:
    """Return memory that was freed to the system, at most once a second; for work of seconds.

    Arrays of ever other sizes leave holes in the heaps of glibc's ``malloc``, which it keeps: a
    process would grow step by step, far above what MLX counts. Other systems need no call.
    """
    now = time.monotonic()
    if now - _returned[0] >= 1 and (trim := _malloc_trim()) is not None:
        _returned[0] = now
        trim(0)


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def free_disk(place: Path) -> int:
    """Return the free bytes of the disk that holds ``place``, which need not exist yet."""
    folder = next(each for each in (place, *place.absolute().parents) if each.exists())
    return shutil.disk_usage(folder).free


def memory_budget(setting: str | int) -> int:
    """Return the budget in bytes of a recipe's ``memory.budget``: ``auto`` is 90% of the device.

    A process that another one started with ``MLX_SLIM_MEMORY`` bytes gets no more than these.
    """
    budget = int(device_memory() * AUTO_FRACTION) if setting == "auto" else parse_size(setting)
    most = os.environ.get(MEMORY_VARIABLE)
    return min(budget, parse_size(most)) if most else budget


def hub_offline() -> bool:
    """Return whether the user forbids the network (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_error() -> str:
    """Return why the hub does not answer, in one line; empty when it does.

    One short request: the hub's own clients try again for half a minute before they give up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answer: list[str] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answer.append("")
        except Exception as error:  # the client's errors differ from version to version
            answer.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])

    # In a thread, because looking up a name obeys no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return answer[0] if answer else f"no answer in {HUB_SECONDS:.0f} s"


def to_float(scalar: mx.array) -> float:
    """Return the value of a scalar array that is not complex."""
    return float(cast(float, scalar.item()))


def _best_seconds(work: Callable[[], mx.array], rounds: int) -> float:
    """Return the shortest of ``rounds`` timings after a warm-up: other programs only add to it."""
    mx.eval(work())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_gflops(dtype: mx.Dtype = mx.float32, size: int = 1024, rounds: int = 8) -> float:
    """Return the rate of a square matmul on the default device, 1e9 operations a second."""
    x_NN = mx.linspace(-1, 1, size * size).reshape(size, size).astype(dtype)
    mx.eval(x_NN)
    return 2 * size**3 / _best_seconds(lambda: x_NN @ x_NN, rounds) / 1e9


def exp_nanoseconds(count: int = 1 << 19, rounds: int = 4) -> float:
    """Return the nanoseconds that one exponential costs (what dominates a loss on a CPU)."""
    x_N = mx.linspace(-4, 4, count)
    mx.eval(x_N)
    return _best_seconds(lambda: mx.exp(x_N), rounds) / count * 1e9


def host_exp_nanoseconds(count: int = 1 << 15, rounds: int = 16) -> float:
    """Return the nanoseconds that one exponential of NumPy costs, in a core's cache."""
    x_N = np.linspace(-4, 4, count, dtype=np.float32)
    out_N = np.empty_like(x_N)
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        np.exp(x_N, out=out_N)
        best = min(best, time.perf_counter() - began)
    return best / count * 1e9
