"""Jobs on the workers of a Dask scheduler: the only file that speaks to one.

Invariant: Dask decides when and where a job runs, by the memory that it reserves (a resource of
the workers); a job whose worker is lost runs on another one; one that a worker refuses is sent to
those that have not refused it. Results are fetched from the worker that has them. Try it: ``dask
scheduler``, ``mlx-slim worker tcp://HOST:8786``, ``mlx-slim compare matrix-tiny -o runs/tiny
--cluster tcp://HOST:8786``.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_slim import locks
from mlx_slim.artifacts import write_json
from mlx_slim.cluster import worker
from mlx_slim.cluster.archive import pack, unpack
from mlx_slim.cluster.jobs import Ended, Job, JobRequest, Outcome, package_hash
from mlx_slim.cluster.options import MEMORY
from mlx_slim.errors import Interrupted, ResourceError, SlimError
from mlx_slim.interrupts import SignalFlag
from mlx_slim.reading import JsonObject, one_line, read_object
from mlx_slim.units import human_bytes

LARGE_FILES = "large_files"  # folder of notes: which files of a job stayed on which worker
_HERE = "127.0.0.1:0"  # of Dask's pages: this machine alone sees them
_POLL = 0.1  # seconds between looks at results and signals
_LOOK = 3.0  # seconds between looks at the workers
_PATIENCE = 20.0  # seconds for a scheduler to answer, and for a first worker to be there
_LEAVE = 90.0  # seconds for processes in this process's worker to end


@dataclass
class _Started:
    """A job that runs or waits, and who refused it with which words."""

    job: Job
    future: Any
    only: list[str] | None
    refusals: dict[str, str] = field(default_factory=dict)


class DaskPool:
    """Runs jobs on a cluster.

    Args:
        client: Connected; Dask types its methods, and its futures', as values or coroutines.
        out: The output folder, as the user named it.
        say: Tells the user a line.
    """

    far = True

    def __init__(self, client: Any, out: Path, say: Callable[[str], None]) -> None:
        self._client, self._out, self._say = client, out, say
        self._started: dict[str, _Started] = {}
        self._failed: list[Ended] = []  # those that could not be submitted
        self._ended: queue.Queue[Any] = queue.Queue()
        self._last_seen: dict[str, JsonObject] = {}  # the workers, by address
        self._largest = 0
        self._looked = time.monotonic()
        self._waiting = False  # for a worker, and the user knows
        self._stop = SignalFlag()
        self._stack = contextlib.ExitStack()
        self._listening = False

    def __enter__(self) -> DaskPool:
        """Signals are listened for from the first job on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what still runs: its processes save their states and end."""
        with self._stack:
            self._cancel()

    # ------------------------------------------------------------------------------ the pool

    @property
    def free(self) -> bool:
        """Whether a thread of a worker is idle."""
        return self.running < self.most

    @property
    def most(self) -> int:
        """Threads of all workers."""
        return max(1, sum(one["nthreads"] for one in self._workers().values()))

    @property
    def shared(self) -> bool:
        """Whether every worker that is there now sees the output folder."""
        try:
            seen = self._client.run(worker.sees_output, self._request(Job("look", ()), b""))
        except Exception:  # raised in a worker: one of another version
            return False
        return bool(seen) and all(seen.values())

    @property
    def running(self) -> int:
        """How many jobs have been started and not waited for."""
        return len(self._started) + len(self._failed)

    @property
    def budget(self) -> int:
        """Bytes of the largest worker; while none is there, of the largest that was."""
        if offered := [one["resources"].get(MEMORY, 0) for one in self._workers().values()]:
            self._largest = int(max(offered))
        return self._largest

    def start(self, job: Job) -> None:
        """Submit a job."""
        if not self._listening:
            self._stack.enter_context(self._stop)
            self._listening = True
        self._submit(job, {})

    def wait(self) -> Ended:
        """Return a job that has ended.

        Raises:
            Interrupted: A signal came.
            SlimError: The scheduler is gone.
        """
        while True:
            if self._failed:
                return self._failed.pop()
            if self._stop.requested:
                self._cancel()
                raise Interrupted("stopped; what is complete is kept")
            try:
                future = self._ended.get(timeout=_POLL)
            except queue.Empty:
                self._look()
                continue
            started = next((s for s in self._started.values() if s.future is future), None)
            if started is not None and (ended := self._result(started)) is not None:
                return ended

    # ------------------------------------------------------------------------------ submitting

    def _submit(self, job: Job, refusals: dict[str, str]) -> None:
        """Submit a job to all workers, or to those that it may run on."""
        try:
            if job.memory > (most := self.budget):
                needs, has = human_bytes(job.memory), human_bytes(most)
                raise ResourceError(f"needs {needs}, the largest worker has {has}")
            only = self._allowed(job, refusals)
        except SlimError as error:
            self._failed.append(Ended(job.name, error.exit_code, error.message))
            return
        archive, _ = pack(self._out, job.reads)  # what is too large is where the job goes
        job = replace(job, memory=int(job.memory or self.budget))
        request = self._request(job, archive)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")
            future = self._client.submit(
                worker.run_job,
                request,
                key=f"{job.name}-{secrets.token_hex(4)}",
                pure=False,
                resources={MEMORY: job.memory},
                workers=only,
                allow_other_workers=False,
            )
        self._started[job.name] = _Started(job, future, only, refusals)
        future.add_done_callback(self._ended.put)

    def _request(self, job: Job, archive: bytes) -> JobRequest:
        identity = identity_of(self._out)
        return JobRequest(job, str(self._out), str(Path.cwd()), identity, archive, package_hash())

    def _allowed(self, job: Job, refusals: dict[str, str]) -> list[str] | None:
        """Return the workers that a job may run on; None if that is all of them.

        Raises:
            SlimError: If the one that has what it starts from refuses it, or is not there.
        """
        workers = self._workers()
        if job.beside is not None and (holder := self._holder(job.beside)) is not None:
            there = [address for address, one in workers.items() if str(one["name"]) == holder]
            if any(address in refusals for address in there):
                raise SlimError(f"no worker takes it; {'; '.join(refusals.values())}")
            if not there:
                raise SlimError(
                    f"it starts from {job.beside}, whose files are on worker {holder}, which is "
                    f"not there: start it again with --name {holder}"
                )
            return there
        return [address for address in workers if address not in refusals] if refusals else None

    def _workers(self) -> dict[str, JsonObject]:
        # Not ``scheduler_info``: its answer lies where the client's own callback writes, now and
        # then, one without workers.
        with contextlib.suppress(OSError):  # no answer now: ``_look`` says so if it stays away
            identity = self._client.sync(self._client.scheduler.identity, n_workers=-1)
            self._last_seen = identity["workers"]
        return self._last_seen

    # ------------------------------------------------------------------------------ results

    def _result(self, started: _Started) -> Ended | None:
        """Return how a job ended; None where it was sent to another worker."""
        from distributed import KilledWorker

        job, future = started.job, started.future
        del self._started[job.name]
        if future.status == "error":
            error = future.exception()
            if isinstance(error, KilledWorker):
                return Ended(job.name, 1, "each worker that ran it was lost (out of memory?)")
            code = error.exit_code if isinstance(error, SlimError) else 1
            return Ended(job.name, code, one_line(error) if error else "no result")
        if future.status != "finished":
            raise SlimError(
                f"the scheduler forgot {job.name} ({future.status}): it was stopped, or is gone",
                "start it again, then the same command with --resume",
            )
        where = next(iter(self._client.who_has([future]).get(future.key, ())), "")
        outcome: Outcome = self._client.gather(future, direct=True)
        if outcome.refused:
            return self._refused(started, where, outcome.why)
        if outcome.code == 0 and outcome.archive:
            self._store(job, outcome, where)
        if outcome.code == Interrupted.exit_code:  # its worker is being stopped
            self._submit(job, started.refusals)
            return None
        return Ended(job.name, outcome.code, outcome.why)

    def _refused(self, started: _Started, where: str, why: str) -> Ended | None:
        """Send a job to the workers that have not refused it; the last refusal ends it."""
        job = started.job
        workers = self._workers()
        name = str(workers[where]["name"]) if where in workers else where
        self._say(f"{job.name}: worker {name} refuses it: {why}")
        refusals = {**started.refusals, where: f"{name}: {why}"}
        if all(address in refusals for address in workers):
            lines = dict.fromkeys(refusals.values())
            return Ended(job.name, 2, f"no worker takes it; {'; '.join(lines)}")
        self._submit(job, refusals)
        return None

    def _store(self, job: Job, outcome: Outcome, where: str) -> None:
        """Put the files of a job into the output folder, in place of earlier ones.

        Each file or folder of ``job.writes`` is there whole or not at all, whenever this process
        is killed.
        """
        with locks.hold(self._out / "arrived") as work:
            unpack(outcome.archive, work.folder / locks.NEW, job.writes)
            for name in job.writes:
                path, new = self._out / name, work.folder / locks.NEW / name
                if path.is_dir():
                    shutil.rmtree(path)
                if new.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    new.rename(path)
        note = self._note(job.name)
        if outcome.large:
            workers = self._workers()
            holder = str(workers[where]["name"]) if where in workers else where
            files = [asdict(one) for one in outcome.large]
            write_json(note, {"worker": holder, "files": files})
            size = human_bytes(sum(one.bytes for one in outcome.large))
            self._say(f"{job.name}: {size} of its files stay on worker {holder}: {note}")
        else:
            note.unlink(missing_ok=True)

    def _note(self, name: str) -> Path:
        return self._out / LARGE_FILES / f"{name.replace('/', '-')}.json"

    def _holder(self, name: str) -> str | None:
        """Return the worker that has the large files of a job; None if they are here."""
        note = self._note(name)
        return str(read_object(note)["worker"]) if note.is_file() else None

    # ------------------------------------------------------------------------------ watching

    def _look(self) -> None:
        """Look at the workers now and then: a job must not wait for one that is gone.

        Raises:
            SlimError: The scheduler is gone.
        """
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        if self._client.status not in ("running", "connecting"):
            raise SlimError(
                "the scheduler is gone", "start it again, then the same command with --resume"
            )
        workers = self._workers()
        if not workers and not self._waiting:
            self._say("no worker is left; waiting for one: mlx-slim worker ADDRESS")
        self._waiting = not workers
        for started in list(self._started.values()):
            lost = started.only is not None and not set(started.only) & set(workers)
            if workers and lost and started.future.status == "pending":
                del self._started[started.job.name]
                started.future.cancel()
                self._submit(started.job, started.refusals)

    def _cancel(self) -> None:
        """Cancel all jobs, and wait for the processes that this process's worker runs."""
        for started in self._started.values():
            with contextlib.suppress(Exception):  # the scheduler is gone: so are its jobs
                started.future.cancel()
        self._started.clear()
        until = time.monotonic() + _LEAVE
        while worker.running and time.monotonic() < until:
            time.sleep(_POLL)


def identity_of(out: Path) -> str:
    """Return the identity of an output folder: of its marker file, which is made if absent."""
    file = out / worker.MARKER
    if not file.exists():
        write_json(file, {"identity": secrets.token_hex(16)})
    return str(read_object(file)["identity"])


@contextlib.contextmanager
def local_pool(
    out: Path, descriptor: int, workers: int, budget: int, say: Callable[[str], None]
) -> Iterator[DaskPool]:
    """Yield a pool on this machine: one Dask worker in this process, its memory divided.

    Args:
        out: The output folder.
        descriptor: Of its lock, which the jobs hold too.
        workers: Jobs at the same time, where their memory fits.
        budget: Bytes of all of them.
        say: Tells the user a line.
    """
    from distributed import Client, LocalCluster

    identity = identity_of(out)
    worker.held_locks[identity] = descriptor
    try:
        with (
            LocalCluster(
                n_workers=1,
                threads_per_worker=workers,
                processes=False,
                resources={MEMORY: budget},
                memory_limit=0,
                dashboard_address=_HERE,
                worker_dashboard_address=_HERE,
                silence_logs=50,
            ) as cluster,
            Client(cluster) as client,
            DaskPool(client, out, say) as pool,
        ):
            yield pool
    finally:
        del worker.held_locks[identity]


@contextlib.contextmanager
def cluster_pool(
    out: Path, address: str, say: Callable[[str], None], patience: float = _PATIENCE
) -> Iterator[DaskPool]:
    """Yield a pool on the cluster of a scheduler; TLS is as Dask's own configuration says.

    Args:
        out: The output folder.
        address: Of the scheduler.
        say: Tells the user a line.
        patience: Seconds for the scheduler to answer, and for a first worker to be there.

    Raises:
        SlimError: If it does not answer, or has no worker with memory.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=patience)
    except Exception as error:  # MemoryError, too: what another program sends is read as a size
        raise SlimError(
            f"no Dask scheduler answers at {address}: {one_line(error)}",
            "start one: dask scheduler (for tls:// name certificates in Dask's configuration)",
        ) from error
    with client, DaskPool(client, out, say) as pool:
        until = time.monotonic() + patience
        while not pool.budget:
            if time.monotonic() > until:
                raise SlimError(
                    f"no worker at {address} offers memory",
                    f"start one on each machine: mlx-slim worker {address}",
                )
            time.sleep(_POLL)
        yield pool
