"""Where independent jobs run: the options of every command that has them.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim compare --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.values import PositiveInt
from mlx_slim.errors import SlimError

MEMORY = "MEMORY"  # the resource that workers offer and jobs ask for: bytes
Workers = Annotated[PositiveInt, Interval(le=64)]


@dataclass(frozen=True)
class PoolOptions:
    """How many jobs at a time, and where.

    Attributes:
        workers: Jobs at the same time on this machine, as many as fit the memory budget.
        cluster: Address of a Dask scheduler whose workers run them; None is this machine.
    """

    workers: Workers = field(
        default=1,
        metadata=option(
            "Jobs at the same time, where their predicted peaks fit the budget.", metavar="N"
        ),
    )
    cluster: str | None = field(
        default=None,
        metadata=option("Run the jobs on this Dask cluster.", metavar="tcp://HOST:PORT"),
    )

    @property
    def several(self) -> bool:
        """Whether jobs may run at the same time."""
        return self.workers > 1 or self.cluster is not None


def check(options: PoolOptions) -> None:
    """Check what can be checked without a network.

    Raises:
        SlimError: A cluster and a number of workers of this machine, or an address of another kind.
    """
    address = options.cluster
    if address is None:
        return
    if options.workers != PoolOptions.workers:
        raise SlimError(
            f"--workers {options.workers} are of this machine, and --cluster {address} has its own",
            "give one of the two",
        )
    if not address.startswith(("tcp://", "tls://")):
        raise SlimError(
            f"{address!r} is no address of a Dask scheduler",
            "dask scheduler prints it: tcp://HOST:8786, or tls://HOST:8786",
        )
