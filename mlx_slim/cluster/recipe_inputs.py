"""What a job reads beside its output folder: rows, a template, teachers, tasks.

Invariant: a hub id that is on no disk here names no input: a worker fetches it as this machine
would. Used by ``compare``, ``sweep`` and ``slim`` for their jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_slim.cluster.inputs import data_inputs, model_input
from mlx_slim.cluster.jobs import Input
from mlx_slim.config.schema import Recipe, SourceConfig
from mlx_slim.data.sources import find_local
from mlx_slim.evaluation.tasks.rows import local_rows
from mlx_slim.evaluation.tasks.spec import find_task


def recipe_inputs(recipe: Recipe) -> Iterator[Input]:
    """Yield the rows and teachers of a recipe that are files of this machine; not its model.

    Raises:
        SlimError: If one is missing.
    """
    for teacher in recipe.distill.teachers if recipe.distill else []:
        yield from model_input(teacher.model) if teacher.model else ()
    yield from data_inputs(_files(recipe))


def task_inputs(tasks: Iterable[str], data_dir: Path | None = None) -> Iterator[Input]:
    """Yield the files of tasks, and their scored rows, that are on this machine.

    Args:
        tasks: Names or files.
        data_dir: The data mirror; None takes ``MLX_SLIM_DATA``.

    Raises:
        SlimError: If one is missing.
    """
    for name in tasks:
        task = find_task(name)
        rows = local_rows(task, data_dir)
        yield from data_inputs([task.file, *(rows.files if rows is not None else [])])


def _files(recipe: Recipe) -> Iterator[Path]:
    """Yield the files of training and validation rows that are on this machine, and a template."""
    data = recipe.data
    sources = [one for one in data.sources if one.task is None]
    if isinstance(data.validation, str):
        sources.append(SourceConfig(path=data.validation, split="validation"))
    for config in sources:
        rows = find_local(config)
        yield from rows.files if rows is not None else ()
    for one in data.sources:
        if one.task is not None and (rows := local_rows(find_task(one.task))) is not None:
            yield from rows.files
    if Path(data.template).is_file():
        yield Path(data.template)
