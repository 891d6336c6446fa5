"""Pools without processes: who runs jobs, in this process."""

from __future__ import annotations

from collections.abc import Callable

from mlx_slim.cluster.jobs import Ended, Job


class HerePool:
    """A pool whose jobs are calls in this process: of those that run, the last one ends first."""

    far, shared = False, True

    def __init__(
        self, launch: Callable[[str], Ended], most: int = 1, budget: int = 1 << 60
    ) -> None:
        self._launch, self.most, self.budget = launch, most, budget
        self._names: list[str] = []
        self.started: list[Job] = []

    @property
    def free(self) -> bool:
        return len(self._names) < self.most

    @property
    def running(self) -> int:
        return len(self._names)

    def start(self, job: Job) -> None:
        self._names.append(job.name)
        self.started.append(job)

    def wait(self) -> Ended:
        return self._launch(self._names.pop())
