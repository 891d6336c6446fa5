"""What of a matrix runs: the values that ``mlx-slim compare`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim compare --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_slim.cluster.options import PoolOptions
from mlx_slim.config.options import option
from mlx_slim.config.values import PositiveInt


@dataclass(frozen=True)
class CompareOptions(PoolOptions):
    """Which cells run, on how many questions; where, says ``PoolOptions``.

    Attributes:
        resume: Compute what is missing or has changed in a folder that is there.
        dry_run: Print cells, predicted memory and time; nothing runs.
        limit: Questions of each task at most; None takes what the matrix says.
        only: One cell of a prepared folder, in this process.
    """

    resume: bool = field(
        default=False, metadata=option("Resume: compute what is missing or has changed.")
    )
    dry_run: bool = field(
        default=False, metadata=option("Print cells, predicted memory and time; do nothing.")
    )
    limit: PositiveInt | None = field(
        default=None, metadata=option("At most N questions of each task.")
    )
    only: str | None = field(
        default=None,
        metadata=option("Run one cell of a prepared folder in this process.", metavar="CELL"),
    )
