"""Which tasks the rows of a run are of.

Invariant: importing this imports no pydantic, for the page of a run. Try it:
``mlx-slim report RUN``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_slim.config import library
from mlx_slim.config.read import read_mapping
from mlx_slim.config.values import TASK
from mlx_slim.reading import exists


def tasks_of(paths: Sequence[str]) -> list[str]:
    """Return the tasks that sources of rows are of: ``task:NAME``, or a shipped task's examples."""
    names = [path.removeprefix(TASK) for path in paths if path.startswith(TASK)]
    files = {Path(path).expanduser().absolute() for path in paths if exists(Path(path))}
    for name in library.names("evals") if files else []:
        task = library.find("evals", name)
        shots = read_mapping(task)[0].get("data", {}).get("shots")
        if shots and (task.parent / shots).absolute() in files:
            names.append(name)
    return list(dict.fromkeys(names))
