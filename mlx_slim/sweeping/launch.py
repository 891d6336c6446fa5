"""Who runs trials: this process, one after the other, or a process each.

Invariant: a trial is its folder: whoever runs it reads nothing else and leaves ``outcome.json``. A
trial whose process was killed may resume from its checkpoint, as long as it gets further each time.
Used by ``sweeping/run.py``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, final

from mlx_slim.artifacts import write_json
from mlx_slim.children import Children, exit_reason
from mlx_slim.errors import SlimError
from mlx_slim.events import Observer
from mlx_slim.sweeping.records import TrialOutcome, read_json_record, to_json
from mlx_slim.sweeping.trial import OUTCOME, RUN, run_trial
from mlx_slim.training import rotation


class Launcher(Protocol):
    """Runs trials by the name of their folder."""

    def start(self, name: str, peak: int) -> None:
        """Begin a trial that is predicted to need ``peak`` bytes."""
        ...

    @property
    def free(self) -> bool:
        """Whether another trial may begin, if it fits."""
        ...

    def has_room(self, peak: int) -> bool:
        """Return whether a trial of ``peak`` bytes fits beside those that run."""
        ...

    @property
    def running(self) -> int:
        """How many have begun and not been waited for."""
        ...

    def wait(self) -> tuple[str, TrialOutcome]:
        """Return a trial that has ended, and how.

        Raises:
            Interrupted: The states are saved.
        """
        ...


@final
class InProcess:
    """Runs one trial at a time here.

    Args:
        run: Runs the trial of a name.
    """

    def __init__(self, run: Callable[[str], TrialOutcome]) -> None:
        self._run = run
        self._name: str | None = None

    def start(self, name: str, peak: int) -> None:
        """Begin a trial: it runs in ``wait``."""
        self._name = name

    @property
    def free(self) -> bool:
        """Whether none runs."""
        return self._name is None

    def has_room(self, peak: int) -> bool:
        """Return that it does: it is alone."""
        return True

    @property
    def running(self) -> int:
        """0 or 1."""
        return int(self._name is not None)

    def wait(self) -> tuple[str, TrialOutcome]:
        """Run it."""
        assert self._name is not None
        name, self._name = self._name, None
        return name, self._run(name)


@final
class InProcesses:
    """Runs each trial in a process, several where the sum of their predicted peaks fits the budget.

    Args:
        out: Folder of the sweep.
        children: Where they run.
        workers: At most so many at a time.
        budget: Bytes that all of them may need; one alone always begins.
        quiet: Let them print warnings only.
    """

    def __init__(
        self,
        out: Path,
        children: Children,
        workers: int,
        budget: int,
        quiet: bool,
    ) -> None:
        self._out, self._children = out, children
        self._workers, self._budget, self._quiet = workers, budget, quiet
        self._peaks: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def start(self, name: str, peak: int) -> None:
        """Start its process."""
        self._peaks[name] = peak
        self._reached[name] = self._newest(name)
        words = ["-m", "mlx_slim", "sweep", "-o", str(self._out), "--only", name]
        quiet = ["--quiet"] if self._quiet or self._workers > 1 else []
        self._children.start(name, [sys.executable, *words, *quiet])

    @property
    def free(self) -> bool:
        """Whether fewer run than may."""
        return len(self._peaks) < self._workers

    def has_room(self, peak: int) -> bool:
        """Return whether it fits the budget beside those that run; one alone always does."""
        return not self._peaks or sum(self._peaks.values()) + peak <= self._budget

    @property
    def running(self) -> int:
        """How many processes run."""
        return len(self._peaks)

    def wait(self) -> tuple[str, TrialOutcome]:
        """Wait for a process; one that was killed is infeasible where it had got no further."""
        name, code = self._children.wait()
        del self._peaks[name]
        file = self._out / name / OUTCOME
        if code == 0 and file.exists():
            return name, read_json_record(file, TrialOutcome)
        why = exit_reason(code)
        if code < 0 and self._newest(name) > self._reached[name]:
            return name, TrialOutcome("killed", why=why)
        outcome = TrialOutcome("infeasible", why=why)
        write_json(file, to_json(outcome))
        return name, outcome

    def _newest(self, name: str) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        newest = rotation.latest(self._out / name / RUN / "checkpoints")
        return 0 if newest is None else int(newest.name.removeprefix("step-"))


@contextlib.contextmanager
def launcher(
    out: Path, descriptor: int | None, workers: int, budget: int, quiet: bool, observer: Observer
) -> Iterator[Launcher]:
    """Yield who runs the trials of the sweep in ``out``.

    Args:
        out: Its folder.
        descriptor: Of its lock, for processes; None runs trials here, one at a time.
        workers: As ``InProcesses``; likewise the others.
        budget: Bytes.
        quiet: Print warnings only.
        observer: Hears of every event.

    Raises:
        SlimError: Several workers in one process.
    """
    if descriptor is None:
        if workers > 1:
            raise SlimError(f"{workers} workers need processes", "set workers=1")
        yield InProcess(lambda name: run_trial(out / name, observer))
        return
    with Children(descriptor) as children:
        yield InProcesses(out, children, workers, budget, quiet)
