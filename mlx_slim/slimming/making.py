"""Who makes and scores candidates: this process, one after the other, or a process each.

Invariant: what a search decides is decided in one order, whoever makes its candidates; one that was
begun ahead of its turn and is not needed decides nothing, nor does its failure. Used by
``slimming/search.py``. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy
--workers 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, final

from mlx_slim.children import exit_reason
from mlx_slim.cluster.archive import MOST_BYTES
from mlx_slim.cluster.jobs import Ended, Job, Pool
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.folder import CANDIDATES
from mlx_slim.units import human_bytes

_RECORDS = 16 * 10**6  # bytes of what comes back beside a model, at most about


class CandidateMaker(Protocol):
    """Makes candidates and scores them on the selection questions."""

    @property
    def most(self) -> int:
        """Candidates at the same time, at most."""
        ...

    def ensure(self, one: Candidate, later: Sequence[Candidate], left: int) -> None:
        """Return when a candidate is made and scored.

        Args:
            one: The candidate.
            later: Those that are needed next, or may be; they may be begun, too.
            left: How many divide the time that is left, this one included.

        Raises:
            SlimError: If it cannot be made.
            Interrupted: The states are saved.
        """
        ...


@final
class MakesHere:
    """Makes a candidate when it is needed, in this process.

    Args:
        make: Makes and scores one, of so many that divide the time.
    """

    most = 1

    def __init__(self, make: Callable[[Candidate, int], object]) -> None:
        self._make = make

    def ensure(self, one: Candidate, later: Sequence[Candidate], left: int) -> None:
        """Make it; nothing is begun ahead."""
        self._make(one, left)


@final
class MakesInPool:
    """Makes each candidate in a process, several where the pool has threads and memory for them.

    Args:
        pool: Who runs the processes.
        apart: Whether each has a machine to itself, so that several take no longer than one.
        complete: Whether all files of a candidate are there.
        job_of: Returns the process of a candidate, of so many that divide the time.
    """

    def __init__(
        self,
        pool: Pool,
        apart: bool,
        complete: Callable[[Candidate], bool],
        job_of: Callable[[Candidate, int], Job],
    ) -> None:
        self._pool, self._apart = pool, apart
        self._complete, self._job_of = complete, job_of
        self._begun: dict[str, Candidate] = {}  # by the name of the job
        self._failed: dict[str, SlimError] = {}  # by key

    @property
    def most(self) -> int:
        """Threads of the pool."""
        return self._pool.most

    def ensure(self, one: Candidate, later: Sequence[Candidate], left: int) -> None:
        """Start processes until it is complete."""
        waiting = [each for each in (one, *later) if not self._has_begun(each)]
        while not self._complete(one):
            while waiting and self._pool.free:
                self._start(waiting[0], self._divisor(len(waiting), left))
                del waiting[0]
            if (error := self._failed.get(one.key)) is not None:
                raise error
            self._note(self._pool.wait())

    def _start(self, one: Candidate, divisor: int) -> None:
        try:
            job = self._job_of(one, divisor)
        except SlimError as error:  # raised when it is its turn
            self._failed[one.key] = error
            return
        self._begun[job.name] = one
        self._pool.start(job)

    def _has_begun(self, one: Candidate) -> bool:
        begun = f"{CANDIDATES}/{one.key}" in self._begun or one.key in self._failed
        return begun or self._complete(one)

    def _divisor(self, waiting: int, left: int) -> int:
        """Return by what the time that is left is divided for the next one."""
        several = waiting + self._pool.running
        if self._apart:
            return -(-min(left, several) // self._pool.most)
        return min(several, max(left, self._pool.most))

    def _note(self, ended: Ended) -> None:
        """Note a process that failed."""
        one, code = self._begun[ended.name], ended.code
        if code == 0 and self._complete(one):
            return
        why = ended.why or exit_reason(code)
        if code == 0:
            why = "its weights stay on its worker, which does not see the folder of the search"
        kind = ResourceError if code == ResourceError.exit_code else SlimError
        self._failed[one.key] = kind(f"{one.key}: {why}", _AGAIN)


_AGAIN = "mend what it names, then run the same command with --resume"


def check_sizes(candidates: Sequence[Candidate], pool: Pool, out: Path) -> None:
    """Check that the models can come back from where they are made.

    Raises:
        SlimError: If one may be too large for an archive, and a worker does not see ``out``.
    """
    largest = max((one.cost.disk_bytes for one in candidates), default=0)
    if largest + _RECORDS > MOST_BYTES and not pool.shared:
        most = human_bytes(MOST_BYTES)
        raise SlimError(
            f"candidates have up to {human_bytes(largest)}, a worker sends {most} at most, and not "
            f"every worker sees {out}",
            "put -o DIR on a drive that all of them see under the same path, or use --workers",
        )
