"""Who runs trials: this process, one after the other, or a process each.

Invariant: a trial is its folder: whoever runs it reads nothing else and leaves ``outcome.json``. A
trial whose process was killed may resume from its checkpoint, as long as it gets further each time.
Used by ``sweeping/run.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, final

from mlx_slim.artifacts import write_json
from mlx_slim.children import exit_reason
from mlx_slim.cluster.inputs import model_input
from mlx_slim.cluster.jobs import Input, Job, Pool
from mlx_slim.cluster.options import PoolOptions
from mlx_slim.cluster.pool import pool_of
from mlx_slim.cluster.recipe_inputs import recipe_inputs
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.sweeping.folder import OUTCOME, RECIPE, RUN
from mlx_slim.sweeping.records import TrialOutcome, read_json_record, to_json
from mlx_slim.sweeping.trial import run_trial
from mlx_slim.training import rotation

_SLACK = 4  # a trial reserves a quarter more than its predicted peak


class Launcher(Protocol):
    """Runs trials by the name of their folder."""

    def start(self, name: str, peak: int) -> None:
        """Begin a trial that is predicted to need ``peak`` bytes."""
        ...

    @property
    def most(self) -> int:
        """Trials at the same time, at most."""
        ...

    @property
    def free(self) -> bool:
        """Whether another trial may begin, or wait for memory."""
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

    most = 1

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
    """Runs each trial in a process, several where the pool has threads and memory for them.

    Args:
        out: Folder of the sweep.
        pool: Who runs the processes.
        quiet: Let them print warnings only.
    """

    def __init__(self, out: Path, pool: Pool, quiet: bool) -> None:
        self._out, self._pool = out, pool
        self._quiet = quiet or pool.most > 1
        self._reached: dict[str, int] = {}

    @property
    def most(self) -> int:
        """Threads of the pool."""
        return self._pool.most

    def start(self, name: str, peak: int) -> None:
        """Start its process; one that needs more than there is gets all of it."""
        self._reached[name] = self._newest(name)
        job = Job(
            name=name,
            words=("sweep", "--only", name, *(["--quiet"] if self._quiet else [])),
            memory=min(self._pool.budget, peak + peak // _SLACK),
            inputs=self._inputs(name) if self._pool.far else (),
            reads=(name,),
            writes=(name,),
            without=("checkpoints",),
        )
        self._pool.start(job)

    @property
    def free(self) -> bool:
        """Whether the pool takes another one."""
        return self._pool.free

    @property
    def running(self) -> int:
        """How many run, or wait for memory."""
        return self._pool.running

    def wait(self) -> tuple[str, TrialOutcome]:
        """Wait for a process; one that was killed is infeasible where it had got no further."""
        ended = self._pool.wait()
        name, code = ended.name, ended.code
        file = self._out / name / OUTCOME
        if code == 0 and file.exists():
            return name, read_json_record(file, TrialOutcome)
        why = ended.why or exit_reason(code)
        if code < 0 and self._newest(name) > self._reached[name]:
            return name, TrialOutcome("killed", why=why)
        outcome = TrialOutcome("infeasible", why=why)
        write_json(file, to_json(outcome))
        return name, outcome

    def _inputs(self, name: str) -> tuple[Input, ...]:
        recipe = load_recipe(str(self._out / name / RECIPE)).recipe
        return tuple(dict.fromkeys([*model_input(recipe.model), *recipe_inputs(recipe)]))

    def _newest(self, name: str) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        newest = rotation.latest(self._out / name / RUN / "checkpoints")
        return 0 if newest is None else int(newest.name.removeprefix("step-"))


@contextlib.contextmanager
def launcher(
    out: Path,
    descriptor: int | None,
    options: PoolOptions,
    budget: int,
    quiet: bool,
    observer: Observer,
) -> Iterator[Launcher]:
    """Yield who runs the trials of the sweep in ``out``.

    Args:
        out: Its folder.
        descriptor: Of its lock, for processes; None runs trials here, one at a time.
        options: How many at a time, and where.
        budget: Bytes of all trials on this machine.
        quiet: Print warnings only.
        observer: Hears of every event.

    Raises:
        SlimError: Several workers in one process, or a cluster that cannot be used.
    """
    if descriptor is None:
        if options.several:
            raise SlimError(f"{options.workers} workers need processes", "set workers=1")
        yield InProcess(lambda name: run_trial(out / name, observer))
        return

    def say(text: str) -> None:
        observer.notify(Notice(text))

    with pool_of(out, descriptor, options, budget, say) as pool:
        yield InProcesses(out, pool, quiet)
