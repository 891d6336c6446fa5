"""How long each recovery of a search may take, so that the whole ends within ``--time``.

Invariant: what scoring still takes is counted first, at the seconds a question that the original
took; what is left is divided among the recoveries. Try it: ``mlx-slim slim MODEL -o DIR --disk
200MB --task arc_easy --time 30m``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.evaluation.results import TIMINGS_FILE
from mlx_slim.reading import read_object
from mlx_slim.slimming.questions import TaskPlan
from mlx_slim.units import human_duration

_SPARE = 0.1  # of what scoring leaves: recoveries are predicted, and models are written


@dataclass(frozen=True)
class TimeLimit:
    """The time of a search, counted from when this is made.

    Attributes:
        limit: Seconds; None is no limit.
        scores: Folder with the original's scores, a folder a task.
        tasks: Whose questions are scored.
        began: On the clock of this process: a resumed search has its time anew.
    """

    limit: float | None
    scores: Path
    tasks: Sequence[TaskPlan]
    began: float

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def scoring(self, candidates: int) -> float:
        """Return the seconds that it takes to score so many candidates, and the winner's claim.

        The winner answers the claim questions and, in the same pass, those of the selection.
        """
        return sum(
            self._each(plan) * ((candidates + 1) * plan.selection + plan.claim)
            for plan in self.tasks
        )

    def _each(self, plan: TaskPlan) -> float:
        """Return the seconds that a question took the original."""
        timings = read_object(self.scores / plan.name / TIMINGS_FILE, tasks=dict)["tasks"]
        return timings[plan.name]["seconds"] / (plan.selection + plan.claim)

    def recoveries(self, left: int) -> list[float]:
        """Return what a recovery may take, of ``left`` that are scored, too; empty without a limit.

        First its part of the time, in seconds; then, where that is too little, all of the time.
        """
        if self.limit is None:
            return []
        remaining = self.limit - self.elapsed
        return [
            max(0.0, (remaining - self.scoring(count)) * (1 - _SPARE) / count)
            for count in dict.fromkeys((left, 1))
        ]

    def warning(self, candidates: int) -> str | None:
        """Return what to say where scoring so many candidates takes longer than the search may."""
        needed = self.elapsed + self.scoring(candidates)
        if self.limit is None or needed <= self.limit:
            return None
        return (
            f"scoring takes {human_duration(needed)} at the original's speed, and --time is "
            f"{human_duration(self.limit)}: nothing is recovered; ask fewer questions with a "
            "smaller --limit"
        )
