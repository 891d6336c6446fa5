"""``mlx-slim worker``: run jobs of a Dask cluster on this machine.

Invariant: it offers the memory of this machine, or less, as the resource that jobs ask for, and
runs one job at a time unless told otherwise. Try it: ``dask scheduler``, then ``mlx-slim worker
tcp://127.0.0.1:8786 --models ~/models``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
from pathlib import Path

import click

from mlx_slim.cli.options import Whole
from mlx_slim.cluster.options import PoolOptions, check
from mlx_slim.errors import SlimError

_FOLDER = click.Path(path_type=Path)


@click.command("worker", epilog="Example: mlx-slim worker tcp://studio:8786 --models models")
@click.argument("address", metavar="tcp://HOST:PORT")
@click.option("--models", type=_FOLDER, metavar="DIR", help="Where models are looked up by name.")
@click.option("--data-dir", type=_FOLDER, metavar="DIR", help="Rows by name [MLX_SLIM_DATA].")
@click.option("--memory", default="auto", show_default=True, help="What jobs may use, as 16GB.")
@click.option("--jobs", type=Whole(1, 64), default=1, show_default=True, help="Most at a time.")
@click.option("--name", help="Of this worker [the machine's].")
def command(
    address: str,
    models: Path | None,
    data_dir: Path | None,
    memory: str,
    jobs: int,
    name: str | None,
) -> None:
    """Run jobs of the Dask scheduler at an address until Ctrl-C.

    Dask runs what its clients send: start it in networks that you trust, or with TLS.
    """
    check(PoolOptions(cluster=address))
    if importlib.util.find_spec("distributed") is None:
        raise SlimError("Dask is not installed", "pip install 'mlx-slim[cluster]'")
    from mlx_slim.cluster.inputs import MODELS_VARIABLE
    from mlx_slim.data.sources import MIRROR_VARIABLE
    from mlx_slim.runtime import memory_budget
    from mlx_slim.units import human_bytes

    for variable, folder in ((MODELS_VARIABLE, models), (MIRROR_VARIABLE, data_dir)):
        if folder is not None:
            if not folder.is_dir():
                raise SlimError(f"{folder} is not a folder", "name a folder of this machine")
            os.environ[variable] = str(folder.resolve())
    budget = memory_budget(memory)
    called = name or platform.node() or "worker"
    click.echo(f"worker {called} of {address}: {human_bytes(budget)}, {jobs} at a time")
    asyncio.run(_serve(address, budget, jobs, called))


async def _serve(address: str, budget: int, jobs: int, name: str) -> None:
    """Work until the scheduler is gone, or the process is told to end.

    Raises:
        SlimError: If no scheduler answers.
    """
    from distributed import Worker

    from mlx_slim.cluster.options import MEMORY

    worker = Worker(
        address,
        nthreads=jobs,
        name=name,
        resources={MEMORY: budget},
        memory_limit=0,  # Dask does not see the jobs' processes; each is limited by itself
        dashboard=False,
        death_timeout=_PATIENCE,
    )
    try:
        await worker
    except Exception as error:  # also whatever comes of what another program sends
        raise SlimError(
            f"no Dask scheduler answers at {address}", "start one: dask scheduler"
        ) from error
    try:
        await worker.finished()
    finally:
        await worker.close(timeout=_PATIENCE)


_PATIENCE = 20  # seconds for a scheduler to answer, and for jobs to save their states
