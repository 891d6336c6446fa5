"""A fast BLAS under MLX on Linux, without asking.

MLX's Linux CPU wheel calls ``cblas_sgemm`` and LAPACK by name and ships the netlib reference
library for them (3-5 GFLOP/s). A library that exports the same names and is opened globally before
``mlx.core`` is imported wins. We install OpenBLAS as ``scipy-openblas32``; its names carry the
prefix ``scipy_``, so a copy without the prefix is made once, in the cache.

Invariant: ``activate`` acts once, before ``mlx.core`` is imported, never raises, and never replaces
a BLAS that the user preloaded. ``MLX_SLIM_BLAS=off`` opts out, ``MLX_SLIM_BLAS=/path/lib.so`` names
another library. Try it: ``python -m mlx_slim.blas``, or for a stock tool
``LD_PRELOAD=$(python -m mlx_slim.blas) mlx_lm.lora …``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mlx_slim import locks
from mlx_slim.errors import SlimError

_PREFIX = b"scipy_"
_FORMAT = b"mlx-slim blas 1"  # part of the copy's name: raise it when elf.py writes something else
_HEAD = 1 << 19  # bytes at both ends that tell one build from another
_SYSTEM = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")
_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Status:
    """What ``activate`` did.

    Attributes:
        source: ``scipy-openblas32``, ``system``, ``user`` (``MLX_SLIM_BLAS``), ``preloaded``,
            ``off`` (opted out), ``platform`` (not needed here), ``late`` (mlx.core was imported
            first) or ``none`` (nothing was found: MLX runs on its slow reference BLAS).
        path: The library that MLX's calls go to; None where it is MLX's own.
        note: What went wrong or what to do, one line; empty when all is well.
    """

    source: str
    path: str | None = None
    note: str = ""


_status: Status | None = None


def status() -> Status:
    """Return what ``activate`` did; it is called where ``mlx.core`` was not imported yet."""
    return activate()


def activate() -> Status:
    """Put a fast BLAS under ``mlx.core``; see the module. Later calls change nothing."""
    global _status
    if _status is None:
        _status = _activate()
    return _status


def bound_library() -> str | None:
    """Return the file that answers for ``cblas_sgemm`` before MLX's own does, or None."""
    try:
        symbol = ctypes.CDLL(None).cblas_sgemm
    except (AttributeError, OSError):
        return None
    address = ctypes.cast(symbol, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high and path:
            return path[0].removesuffix(" (deleted)")  # another process made the copy again
    return None


def _activate() -> Status:
    if not sys.platform.startswith("linux"):
        return Status("platform")
    wish = os.environ.get("MLX_SLIM_BLAS", "").strip()
    if wish.lower() in ("off", "0", "no", "none"):
        return Status("off", note="switched off by MLX_SLIM_BLAS")
    if preloaded := bound_library():
        return Status("preloaded", preloaded)
    if "mlx.core" in sys.modules:
        return Status("late", note="import mlx_slim before mlx.core, or its own BLAS stays")
    if wish and (error := _load(wish)):
        return Status("none", note=f"MLX_SLIM_BLAS={wish} cannot be used: {error}")
    if wish:
        return Status("user", bound_library() or wish)
    notes = []
    for source, path in _candidates(notes):
        error = _load(path)
        if error is None:
            return Status(source, bound_library() or path)
        if source != "system":
            notes.append(f"{path}: {error}")
    notes.append("no fast BLAS found; install one: pip install scipy-openblas32")
    return Status("none", note="; ".join(notes))


def _load(path: str) -> str | None:
    """Open ``path`` for every library loaded later; return what is wrong with it, if anything."""
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    if not hasattr(library, "cblas_sgemm"):
        return "it does not export cblas_sgemm"
    if not any(os.environ.get(name) for name in _THREADS):
        with contextlib.suppress(AttributeError):
            library.openblas_set_num_threads(physical_cores())
    return None


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Let OpenBLAS use one thread inside: for callers that keep every core busy themselves.

    MLX's and NumPy's: their wheels bring one each.
    """
    with _one_thread(((ctypes.CDLL(None), "openblas_{}"), *_numpy_openblas())):
        yield


@contextlib.contextmanager
def numpy_single_threaded() -> Iterator[None]:
    """Let NumPy's OpenBLAS alone use one thread inside, where its small products follow MLX's.

    Threads of MLX's spin for a while after a product: NumPy's would wait for their cores, and a
    product of microseconds take milliseconds.
    """
    with _one_thread(_numpy_openblas()):
        yield


@contextlib.contextmanager
def _one_thread(libraries: Iterable[tuple[ctypes.CDLL, str]]) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for library, form in libraries:
            with contextlib.suppress(AttributeError):  # no OpenBLAS, or other names
                before = getattr(library, form.format("get_num_threads"))()
                set_threads = getattr(library, form.format("set_num_threads"))
                set_threads(1)
                undo.callback(set_threads, before)
        yield


@functools.cache
def _numpy_openblas() -> list[tuple[ctypes.CDLL, str]]:
    """Return the OpenBLAS of NumPy's wheel, where there is one, and the form of its names."""
    spec = find_spec("numpy")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parents[1] / "numpy.libs"
    return [
        (ctypes.CDLL(str(path)), "scipy_openblas_{}64_")
        for path in folder.glob("libscipy_openblas64_*.so")
    ]


def physical_cores() -> int:
    """Return the cores this process may use: a second thread a core only slows matmul down."""
    cores = len(cpus_by_core()) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's share of the machine
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    return cores


def cpus_by_core() -> list[list[int]]:
    """Return the CPUs this process may use, core by core; nothing but on Linux."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = topology.read_text()
        except OSError:  # not told: each one is a core
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def _candidates(notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (source, path) of the libraries to try, best first."""
    if original := _scipy_openblas():
        for folder in _cache_folders():
            try:
                yield "scipy-openblas32", str(_renamed_copy(original, folder))
            except (OSError, ValueError, SlimError) as error:  # a slow BLAS will do
                notes.append(f"{folder}: {error}")
    for name in _SYSTEM:
        yield "system", name
        yield "system", str(Path(sys.prefix) / "lib" / name)


def _scipy_openblas() -> Path | None:
    """Return the installed library, without importing its package."""
    try:
        spec = find_spec("scipy_openblas32")
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")):
            return path
    return None


def _cache_folders() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # no home folder
        cache = os.environ.get("MLX_SLIM_CACHE") or "~/.cache/mlx-slim"
        yield Path(cache).expanduser() / "blas"
    yield Path(tempfile.gettempdir()) / f"mlx-slim-{os.getuid()}"


def _renamed_copy(original: Path, folder: Path) -> Path:
    """Return the copy of ``original`` with plain names, making it where it is absent or damaged.

    The copy ends with a digest of its first bytes (all that the rewriting touches but one tag):
    reading 25 MB at every start would cost more than it protects.

    Raises:
        OSError: If ``folder`` belongs to someone else, or others may write to it.
        SlimError: If ``folder`` cannot be written.
        ElfError: If the library cannot be rewritten.
    """
    size = original.stat().st_size
    with original.open("rb") as handle:
        head = handle.read(_HEAD)
        handle.seek(-min(size, _HEAD), os.SEEK_END)
        build = hashlib.sha256(_FORMAT + str(size).encode() + head + handle.read())
    copy = folder / f"openblas-{build.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stats = folder.stat()
    if stats.st_uid not in (os.getuid(), 0) or stats.st_mode & 0o002:
        raise OSError("others may write to this folder")
    locks.remove_dead(folder)
    if _is_whole(copy, size):
        return copy
    # Imported here: they are needed once a machine, and this module runs at every start.
    from mlx_slim.artifacts import atomic_file
    from mlx_slim.blas.elf import without_prefix

    data = without_prefix(original.read_bytes(), _PREFIX)
    with atomic_file(copy) as temporary:
        temporary.write_bytes(data + hashlib.sha256(data[:_HEAD]).digest())
    return copy


def _is_whole(copy: Path, size: int) -> bool:
    try:
        with copy.open("rb") as handle:
            head = handle.read(_HEAD)
            handle.seek(size)
            return handle.read() == hashlib.sha256(head).digest()
    except OSError:
        return False
