"""What a Dask worker does for one job: find its inputs, run its process, pack what it left.

Invariant: the process ends with the worker (its standard input closes) and when nobody waits for
the job any more; a job starts only where each input has the checksum that the coordinator saw. In
a folder that both see (the marker file says so, nothing is configured) it works in place, else in a
folder of its own under ``MLX_SLIM_CACHE``. Try it: ``mlx-slim worker tcp://HOST:8786``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mlx_slim.children import child_environment
from mlx_slim.cluster.archive import pack, unpack
from mlx_slim.cluster.cores import Cores, keep_to
from mlx_slim.cluster.inputs import find, place
from mlx_slim.cluster.jobs import JobRequest, Outcome, package_hash
from mlx_slim.cluster.options import MEMORY
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.models.hub import cache_folder
from mlx_slim.reading import exists, read_object

MARKER = "cluster.json"  # in an output folder: its identity
_POLL = 0.1  # seconds between looks at the process and at the worker
_PATIENCE = 60.0  # seconds for a process to save its state
# Of coordinators in this process: identity of the output folder -> descriptor of its lock.
held_locks: dict[str, int] = {}
running: set[str] = set()  # jobs whose process lives, in this process's workers
_cores = Cores()


def run_job(request: JobRequest) -> Outcome:
    """Run a job on this worker; called by Dask.

    Raises:
        SlimError: If the archive cannot be unpacked.
        OSError: On a full disk.
    """
    job, code = request.job, package_hash()
    if code != request.code:
        versions = f"mlx-slim {code} here, {request.code} on the machine that started the command"
        return Outcome(2, f"{versions}: install the same version", refused=True)
    shared = sees_output(request)
    try:
        folder = _prepare(request, shared)
    except SlimError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return Outcome(2, f"{error.message}{hint}", refused=True)
    out = folder / _inside(request.out)
    if not shared:
        unpack(request.archive, out, job.reads)
    if job.note is not None:
        (out / job.note).unlink(missing_ok=True)
    command = job.command(
        request.out if folder == Path(request.origin) else str(_inside(request.out))
    )
    code = _run(command, folder, request)
    why = ""
    if job.note is not None and exists(out / job.note):
        why = str(read_object(out / job.note)["reason"])
    if shared:
        return Outcome(code, why)
    archive, large = pack(out, job.writes, job.without) if code == 0 else (b"", ())
    return Outcome(code, why, archive=archive, large=large)


def sees_output(request: JobRequest) -> bool:
    """Return whether this machine sees the output folder: its marker has the same identity."""
    file = Path(request.origin) / request.out / MARKER
    try:
        return read_object(file).get("identity") == request.identity
    except SlimError:
        return False


def _inside(out: str) -> Path:
    """Return the output folder's name in a working folder: as it is, unless it leaves it."""
    path = Path(out)
    return Path(path.name) if path.is_absolute() or ".." in path.parts else path


def _prepare(request: JobRequest, shared: bool) -> Path:
    """Return the folder to work in, in which all inputs have the names that the job has for them.

    Raises:
        SlimError: If the machine lacks one.
    """
    origin = Path(request.origin)
    located = [(one, find(one, origin)) for one in request.job.inputs]
    in_place = all(
        one.mirrored or where == origin / Path(one.path).expanduser() for one, where in located
    )
    if shared and in_place:
        return origin
    folder = cache_folder() / "cluster" / request.identity
    folder.mkdir(parents=True, exist_ok=True)
    for one, where in located:
        place(one, where, origin, folder)
    if shared:
        link = folder / _inside(request.out)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        if not link.exists():
            link.symlink_to((origin / request.out).resolve())
    return folder


def _run(command: list[str], folder: Path, request: JobRequest) -> int:
    """Run the process until it ends or is not needed any more; return its exit code."""
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()
    lock = held_locks.get(request.identity)
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **child_environment(request.job.memory),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with _cores.reserved(_jobs_at_a_time(worker, request.job.memory)) as cpus:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C of the terminal is the worker's
            pass_fds=[] if lock is None else [lock],
        )
        running.add(str(key))
        keep_to(process.pid, cpus)  # before it has threads
        try:
            while True:
                try:
                    return process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    task = worker.state.tasks.get(key)
                    needed = task is not None and task.state in ("executing", "long-running")
                    if needed and worker.status in (Status.running, Status.paused):
                        continue
                process.terminate()
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return Interrupted.exit_code
        finally:
            running.discard(str(key))
            if process.stdin is not None:
                process.stdin.close()


def _jobs_at_a_time(worker: Any, memory: int) -> int:
    """Return how many jobs of ``memory`` bytes a worker runs at a time."""
    offered = worker.state.total_resources.get(MEMORY, 0)
    return max(1, min(worker.state.nthreads, int(offered // max(1, memory))))
