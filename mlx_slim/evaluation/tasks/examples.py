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
from mlx_slim.data.readers import is_data
from mlx_slim.next_steps import GENERAL_TASK, YOUR_TASK
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


def task_to_score(rows: Sequence[str]) -> str:
    """Return the task that shows what a run on these rows learned.

    Rows of tasks: those tasks; files of the user: a task file of the user; else a general task.
    """
    if tasks := tasks_of(rows):
        return ",".join(tasks)
    local = any(is_data(path) or exists(Path(path)) for path in rows)
    return YOUR_TASK if local else GENERAL_TASK
