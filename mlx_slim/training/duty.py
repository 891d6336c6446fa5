"""A pause after each step, so that a run leaves a part of the time to other programs.

Invariant: it takes time and nothing else: losses, weights and their order are those of a run
without pauses. Try it: ``mlx-slim train smollm2-lora train.duty=0.7 -o runs/try``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_SLEEP = 0.2  # seconds, so that a pause ends soon after Ctrl-C


def pause(
    busy: float,
    duty: float,
    stopping: Callable[[], bool],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Sleep so long that ``busy`` seconds of work are the fraction ``duty`` of all time.

    Args:
        busy: Seconds since the last pause.
        duty: Above 0 and at most 1, which does not sleep.
        stopping: Whether the run is to end: a pause does not delay that.
        sleep: Takes seconds.
        clock: Seconds, monotonic.
    """
    end = clock() + busy * (1 / duty - 1)
    while (left := end - clock()) > 0 and not stopping():
        sleep(min(left, LONGEST_SLEEP))
