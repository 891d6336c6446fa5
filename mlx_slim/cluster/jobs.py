"""A job, what it reads and leaves, and who runs jobs: the records that pools and workers share.

Invariant: a job is one process of ``mlx-slim``, so that its memory goes back when it ends and its
crash ends nothing else; it reads nothing of its output folder but ``reads``, and leaves nothing but
``writes``. Used by ``compare``, ``sweep`` and ``slim``: a cell, a trial, a candidate is a job. Try
it: ``mlx-slim compare matrix-tiny -o runs/tiny --workers 2``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

from mlx_slim.hashing import hash_bytes, hash_file

Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Input:
    """A model or a file that a job reads, as the job names it.

    Attributes:
        path: As the recipe or the matrix names it; in a data mirror: inside the mirror.
        kind: ``model`` is looked up under a worker's ``--models``, ``data`` under ``--data-dir``.
        sha256: Of its contents (a model folder: ``model_hash``).
        mirrored: Whether it is a file of the data mirror, which a worker has in its own place.
    """

    path: str
    kind: Kind
    sha256: str
    mirrored: bool = False


@dataclass(frozen=True)
class Job:
    """One process of ``mlx-slim``.

    Attributes:
        name: Unique among the jobs of a pool.
        words: Of the command line, without the program and ``-o``.
        memory: Bytes that it reserves, and may use; 0 is not limited.
        inputs: What it reads beside the output folder.
        reads: Files and folders of the output folder that it reads.
        writes: Files and folders of it that the job makes, and that are worth keeping.
        without: Names of files and folders in ``writes`` that are not.
        note: File with ``reason``, written where the job failed with a message; None: none is.
        beside: Name of the job whose large files this one reads, or None.
    """

    name: str
    words: tuple[str, ...]
    memory: int = 0
    inputs: tuple[Input, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    note: str | None = None
    beside: str | None = None

    def command(self, out: str) -> list[str]:
        """Return the command line that runs it in the output folder ``out``."""
        return [sys.executable, "-m", "mlx_slim", *self.words, "-o", out]


@dataclass(frozen=True)
class LargeFile:
    """A file that stays where it was made: its path in the output folder, bytes and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class JobRequest:
    """What a worker gets.

    Attributes:
        job: The job.
        out: The output folder, as the coordinator's user named it.
        origin: Working folder of the coordinator; its files are used where a worker sees them.
        identity: Of the output folder, as its marker file says.
        archive: Of ``job.reads``.
        code: ``package_hash`` of the coordinator.
    """

    job: Job
    out: str
    origin: str
    identity: str
    archive: bytes
    code: str


@dataclass(frozen=True)
class Outcome:
    """What a worker answers.

    Attributes:
        code: Exit code of the process (negative: killed by that signal).
        why: In one line, where the process left a message; of a refusal, its reason.
        refused: The worker lacks something: no process was started.
        archive: Of ``job.writes``; empty where the folder is shared.
        large: Files that stayed on the worker.
    """

    code: int
    why: str = ""
    refused: bool = False
    archive: bytes = field(default=b"", repr=False)
    large: tuple[LargeFile, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a job ended, for who started it: exit code, and a message in one line or none."""

    name: str
    code: int
    why: str = ""


class Pool(Protocol):
    """Runs jobs."""

    @property
    def budget(self) -> int:
        """Bytes that one job can have at most."""
        ...

    @property
    def most(self) -> int:
        """Jobs at the same time, at most."""
        ...

    @property
    def far(self) -> bool:
        """Whether jobs may run where this machine's models and rows are not."""
        ...

    @property
    def shared(self) -> bool:
        """Whether jobs run in the output folder itself, so that files of any size are there."""
        ...

    @property
    def free(self) -> bool:
        """Whether another job may be started now."""
        ...

    @property
    def running(self) -> int:
        """How many have been started and not waited for."""
        ...

    def start(self, job: Job) -> None:
        """Start a job, or queue it until there is memory for it."""
        ...

    def wait(self) -> Ended:
        """Return a job that has ended, and how.

        Raises:
            Interrupted: A signal came; the jobs have saved their states and ended.
            SlimError: The cluster is gone.
        """
        ...


@lru_cache(maxsize=1)
def package_hash() -> str:
    """Return a hash of this package's source: workers with another one compute other numbers."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    lines = [f"{path.relative_to(package).as_posix()} {hash_file(path)}" for path in files]
    return hash_bytes("\n".join(lines).encode())[:12]
