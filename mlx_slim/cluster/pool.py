"""Who runs jobs: one process after the other, several on this machine, or a Dask cluster.

Invariant: whoever runs a job, it is the same process with the same files; what has several at a
time is Dask, on this machine too, so that memory is divided in one way. Used by ``compare``,
``sweep`` and ``slim``. Try it: ``mlx-slim compare matrix-tiny -o runs/tiny --workers 2``.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_slim.children import Children
from mlx_slim.cluster.jobs import Ended, Job, Pool
from mlx_slim.cluster.options import PoolOptions, check
from mlx_slim.errors import SlimError


class OneByOne:
    """Runs one job at a time, in a child process, in a ``with`` block.

    Args:
        out: The output folder.
        descriptor: Of its lock.
        budget: Bytes that a job may use.
    """

    most, far, shared = 1, False, True

    def __init__(self, out: Path, descriptor: int, budget: int) -> None:
        self._out, self._descriptor, self.budget = out, descriptor, budget
        self._stack = contextlib.ExitStack()
        self._children: Children | None = None

    def __enter__(self) -> OneByOne:
        """Signals are listened for from the first job on."""
        return self

    def __exit__(self, *error: object) -> None:
        """End what still runs."""
        self._stack.close()

    @property
    def free(self) -> bool:
        """Whether none runs."""
        return not self.running

    @property
    def running(self) -> int:
        """0 or 1."""
        return 0 if self._children is None else len(self._children)

    def start(self, job: Job) -> None:
        """Start its process."""
        if self._children is None:
            self._children = self._stack.enter_context(Children(self._descriptor))
        if job.note is not None:
            (self._out / job.note).unlink(missing_ok=True)
        self._children.start(job.name, job.command(str(self._out)), job.memory)

    def wait(self) -> Ended:
        """Wait for it.

        Raises:
            Interrupted: A signal came; its state is saved.
        """
        assert self._children is not None  # a job was started
        return Ended(*self._children.wait())


@contextlib.contextmanager
def pool_of(
    out: Path,
    descriptor: int,
    options: PoolOptions,
    budget: int,
    say: Callable[[str], None],
) -> Iterator[Pool]:
    """Yield who runs the jobs of an output folder.

    Args:
        out: The output folder.
        descriptor: Of its lock, which jobs on this machine hold too.
        options: How many at a time, and where.
        budget: Bytes of all jobs on this machine.
        say: Tells the user a line.

    Raises:
        SlimError: If Dask is not installed, or the cluster cannot be used.
    """
    check(options)
    if not options.several:
        with OneByOne(out, descriptor, budget) as pool:
            yield pool
        return
    if importlib.util.find_spec("distributed") is None:
        what = f"--cluster {options.cluster}" if options.cluster else f"--workers {options.workers}"
        raise SlimError(
            f"{what} needs Dask, which is not installed", "pip install 'mlx-slim[cluster]'"
        )
    from mlx_slim.cluster.dask_pool import cluster_pool, local_pool

    started = (
        local_pool(out, descriptor, options.workers, budget, say)
        if options.cluster is None
        else cluster_pool(out, options.cluster, say)
    )
    with started as pool:
        yield pool
