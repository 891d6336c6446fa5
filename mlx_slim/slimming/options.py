"""What ``mlx-slim slim`` has to find: a budget, a share of the score to keep, and tasks.

Invariant: the only home of these defaults; all problems are reported at once, before any model is
read. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from mlx_slim.cluster import options as cluster_options
from mlx_slim.cluster.options import PoolOptions
from mlx_slim.config.options import option
from mlx_slim.config.values import MOST, PositiveInt, Strict
from mlx_slim.errors import SlimError

QUESTIONS = 1000  # of a task, where it has as many


@dataclass(frozen=True)
class SlimOptions(PoolOptions):
    """The budget and the demand; where candidates are made, says ``PoolOptions``.

    Attributes:
        memory: Most bytes while answering: weights, cache at ``context``, working buffers; None is
            no limit.
        disk: Most bytes of the model's folder; None is no limit.
        speed: Least tokens per second of generation, as a multiple of the original's, measured on
            this machine; None measures none.
        context: Tokens that the cache holds in ``memory``.
        kv_bits: Bits of a number of the cache; None is the 16 of the weights' dtype.
        keep: Percent of the original's mean score that the result must have; None demands none.
        tasks: Names of tasks and suites that count right answers.
        limit: Questions of a task; half of them select, the other half test the claim.
        data: Rows to recover on, and calibration text; None is the Alpaca mirror.
        data_dir: Data mirror of the tasks.
        time: Longest time of the whole search, seconds; None recovers on a fixed number of rows.
        revision: Commit or tag of a hub model.
    """

    memory: int | None = None
    disk: int | None = None
    speed: float | None = None
    context: Annotated[int, Interval(ge=1, le=MOST), Strict()] = field(
        default=4096, metadata=option("Tokens of the cache that --memory counts.", metavar="N")
    )
    kv_bits: Literal[2, 4, 8] | None = field(
        default=None, metadata=option("Bits of the cache [16].", metavar="B")
    )
    keep: Annotated[float, Interval(gt=0, le=100)] | None = field(
        default=None,
        metadata=option("Percent of the original's score that must be shown to stay."),
    )
    tasks: tuple[str, ...] = ()
    limit: PositiveInt = field(
        default=QUESTIONS,
        metadata=option("Questions of a task; half select, half test the claim.", metavar="N"),
    )
    data: str | None = field(
        default=None,
        metadata=option(
            "Rows to recover on and to calibrate with; default Alpaca.", metavar="ROWS"
        ),
    )
    data_dir: Path | None = field(
        default=None, metadata=option("Evaluation data [MLX_SLIM_DATA].", metavar="DIR")
    )
    time: float | None = None
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))

    @property
    def has_budget(self) -> bool:
        """Whether a size or a speed is demanded."""
        return any(value is not None for value in (self.memory, self.disk, self.speed))

    @property
    def keep_fraction(self) -> float | None:
        """``keep`` as a fraction."""
        return None if self.keep is None else self.keep / 100


def check(options: SlimOptions) -> None:
    """Check what can be checked without a model.

    Raises:
        SlimError: All problems.
    """
    cluster_options.check(options)
    problems: list[tuple[str, str]] = []
    if not options.has_budget and options.keep is None:
        problems.append(("nothing is demanded", "set --memory, --disk, --speed or --keep"))
    if not options.tasks:
        problems.append(("no task to keep", "set --task NAMES"))
    if options.limit < 4:
        problems.append((f"--limit is {options.limit}, expected at least 4", "half select"))
    for name in ("memory", "disk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append((f"--{name} is {value}, expected at least 1 byte", "write it as 4GB"))
    speed = options.speed
    if speed is not None and not (math.isfinite(speed) and 0 < speed <= 100):
        problems.append((f"--speed is {speed:g}, expected 0 to 100", "write it as 1.5x"))
    if options.keep is not None and not 0 < options.keep <= 100:
        problems.append((f"--keep is {options.keep:g}, expected 0 to 100 percent", "such as 95"))
    if options.kv_bits is not None and options.memory is None:
        problems.append((f"--kv-bits {options.kv_bits} counts in --memory only", "add --memory"))
    if len(problems) == 1:
        raise SlimError(*problems[0])
    if problems:
        details = [f"{message} ({hint})" for message, hint in problems]
        raise SlimError(f"{len(problems)} problems", details=details)
