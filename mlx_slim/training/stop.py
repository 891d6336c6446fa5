"""A request to stop, which a loop sees between two steps.

Invariant: all ranks see it at the same step. Try it: press Ctrl-C while a run trains.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_slim.interrupts import SignalFlag
from mlx_slim.runtime import all_sum, to_float, world


class StopRequest(SignalFlag):
    """Ctrl-C, SIGTERM or SIGHUP ends the run after the current step; a second one at once."""

    def seen_by_any_rank(self) -> bool:
        """Return whether any rank received a stop signal, the same answer on all."""
        if world().size() == 1:
            return self.requested
        return to_float(all_sum(mx.array(int(self.requested)), "stop")) > 0
