"""How fast each of several ranks computes, and how long it waits for the others.

Invariant: all ranks gather at the same steps, those that are logged; with one rank nothing is
measured. A rank is slower than the rest by its tokens a second of computing, the time in
collectives left out, over all steps so far; that is reported once. Try it: ``mlx.launch -n 2
--backend ring -- mlx-slim train smollm2-lora -o runs/two``.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_slim.events import Event, Notice, Observer
from mlx_slim.ranks.collectives import all_gather
from mlx_slim.runtime import world
from mlx_slim.training.step_result import StepResult

SLOWER = 1.5  # times as slow as the rest: what is named
LEAST_STEPS = 10  # of the run: the first ones compile, and read from disk


@dataclass(frozen=True)
class RanksMeasured(Event):
    """How fast each of several ranks computed the steps since the last of these events.

    Attributes:
        step: The last of these steps.
        tokens_per_second: Positions (padding included) of each rank, in the time that it computed.
        waiting: Fraction of its time that each rank waited for others, or sent and received.
    """

    name: ClassVar[str] = "ranks"
    step: int
    tokens_per_second: list[float]
    waiting: list[float]


class RankSpeeds:
    """The speeds of all ranks of a run.

    Args:
        observer: Receives ``RanksMeasured``, and the notice.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._here = np.zeros(3)  # tokens, seconds of computing, seconds in collectives
        self._totals: np.ndarray | None = None  # (ranks, 2) tokens, seconds of computing
        self._steps = 0
        self._named = False

    def step(self, step: int, result: StepResult, seconds: float, *, report: bool) -> None:
        """Take what this rank measured in a step.

        Args:
            step: Its number.
            result: Of it.
            seconds: That it took, collectives included.
            report: Gather and report the steps so far; the same on all ranks.
        """
        if world().size() == 1:
            return
        waited = min(result.waited, seconds)
        self._here += (result.here, seconds - waited, waited)
        self._steps += 1
        if not report:
            return
        here = mx.array(self._here.astype(np.float32))
        gathered = np.array(all_gather(here, world(), "speeds"), np.float64).reshape(-1, 3)
        self._here[:] = 0
        rates, spent = _rates(gathered), np.maximum(gathered[:, 1] + gathered[:, 2], 1e-9)
        waiting = gathered[:, 2] / spent
        self._observer.notify(
            RanksMeasured(step, [round(x, 1) for x in rates], [round(x, 3) for x in waiting])
        )
        totals = gathered[:, :2]
        self._totals = totals if self._totals is None else self._totals + totals
        if not self._named and self._steps >= LEAST_STEPS and (line := slow_rank(self._totals)):
            self._named = True
            self._observer.notify(Notice(line, "warning"))


def _rates(figures: np.ndarray) -> list[float]:
    """Return tokens a second of each row of (tokens, seconds, …); 0 where it computed nothing."""
    return [float(row[0] / max(row[1], 1e-9)) for row in figures]


def slow_rank(totals: np.ndarray) -> str:
    """Return the line about a rank that is slower than the rest; empty if there is none.

    Args:
        totals: (ranks, 2): tokens computed, and the seconds of that.
    """
    rates = _rates(totals)
    slowest = min(range(len(rates)), key=rates.__getitem__)
    rest = median(rate for rank, rate in enumerate(rates) if rank != slowest)
    if not 0 < rates[slowest] * SLOWER < rest:
        return ""
    return (
        f"rank {slowest} computes {rates[slowest]:,.0f} tokens/s where the others compute "
        f"{rest:,.0f}: each step waits for it; without it the run may be faster"
    )
