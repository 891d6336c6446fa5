"""What slows a run from outside: battery, heat, other programs' memory; each is reported once.

Invariant: it listens and reports and changes nothing of the run; what it says depends on the
machine, so it goes to the console and not into ``metrics.jsonl``, which a resumed run repeats. Try
it: unplug a laptop while ``mlx-slim train`` runs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable

from mlx_slim import events
from mlx_slim.power import battery_percent, memory_pressure

EVERY = 60.0  # seconds between two looks at battery and memory
WARMUP_STEPS = 2  # the first ones compile and fill caches
REFERENCE_STEPS = 5  # of like size, after the first of them: what later ones are compared with
SLOW = 0.7  # of the reference
SUSTAINED = 180.0  # seconds that steps are slow for
FEWEST_SLOW = 5  # steps in that time
MOST_OF_THEM = 0.9
_BETWEEN = 1.0  # seconds between two judgements: a small model takes many steps in one


class ConditionsWatch:
    """An observer of steps that reports bad conditions to another observer, once each.

    Args:
        observer: Receives the notices.
        clock: Seconds, monotonic.
        battery: Returns the charge in percent if the machine runs on battery; None asks it.
        pressure: Returns how short of memory the system is, if it is; None asks it.
    """

    def __init__(
        self,
        observer: events.Observer,
        *,
        clock: Callable[[], float] = time.monotonic,
        battery: Callable[[], int | None] | None = None,
        pressure: Callable[[], str | None] | None = None,
    ) -> None:
        self._observer, self._clock = observer, clock
        self._battery = battery or battery_percent
        self._pressure = pressure or memory_pressure
        self._reported: set[str] = set()
        self._next_look = self._next_judgement = -math.inf
        self._steps = 0
        self._rates: dict[int, list[float]] = defaultdict(list)
        self._recent: deque[tuple[float, float, float]] = deque()

    def notify(self, event: events.Event) -> None:
        """Look at a step, and now and then at the machine."""
        if not isinstance(event, events.StepDone):
            return
        now = self._clock()
        if "speed" not in self._reported:
            self._look_at_speed(event, now)
        if now >= self._next_look:
            self._next_look = now + EVERY
            self._look_at_machine()

    def _look_at_machine(self) -> None:
        if "battery" not in self._reported and (charge := self._battery()) is not None:
            self._report(
                "battery",
                f"running on battery, {charge}% left: connect the charger, most machines are "
                "faster with it too",
            )
        if "memory" not in self._reported and (pressure := self._pressure()) is not None:
            self._report(
                "memory",
                f"the system is short of memory ({pressure}): close other programs, or start a "
                "run with a smaller train.batch_tokens",
            )

    def _look_at_speed(self, event: events.StepDone, now: float) -> None:
        """Compare the step with the run's first ones of like size, which cost as much a token."""
        self._steps += 1
        if self._steps <= WARMUP_STEPS:
            return
        size = round(2 * math.log2(max(1, event.computed_tokens)))
        rates = self._rates[size]
        if len(rates) <= REFERENCE_STEPS:
            rates.append(event.tokens_per_second)
            return
        usual = statistics.median(rates[1:])  # the first of a size may have been compiled
        self._recent.append((now, event.tokens_per_second / usual, usual))
        if now - self._recent[0][0] < SUSTAINED or len(self._recent) < FEWEST_SLOW:
            return
        if now < self._next_judgement:
            return
        self._next_judgement = now + _BETWEEN
        ratios = sorted(ratio for _, ratio, _ in self._recent)
        while now - self._recent[0][0] >= SUSTAINED:
            self._recent.popleft()
        if ratios[int(MOST_OF_THEM * (len(ratios) - 1))] < SLOW:
            ratio = statistics.median(ratios)
            self._report(
                "speed",
                f"for {SUSTAINED / 60:.0f} minutes steps have run at {ratio:.0%} of the speed that "
                f"they began with ({ratio * usual:,.0f} of {usual:,.0f} tokens/s): a hot machine "
                "slows down, and so does one with other work; train.duty=0.7 keeps it cooler",
            )

    def _report(self, what: str, text: str) -> None:
        self._reported.add(what)
        self._observer.notify(events.Notice(text, "warning"))
