"""A cell of a matrix as a job: what its process reads, what it leaves, what it must not do at once.

Invariant: a cell reads of the matrix folder ``matrix.json``, the questions, its parent and the
learning rate that was chosen for its method; two cells that would do the same work in ``models/``
or ``sweeps/`` are not run at the same time. Used by ``compare/runner.py`` and ``cli/compare.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_slim.cluster.inputs import model_input
from mlx_slim.cluster.jobs import Input, Job
from mlx_slim.cluster.recipe_inputs import recipe_inputs, task_inputs
from mlx_slim.compare.matrix import Cell, MatrixPlan
from mlx_slim.compare.store import MANIFEST, MATRIX_FILE
from mlx_slim.models.hub import SMOLLM2_PACKAGE

_SCRATCH = ("checkpoints",)  # what only a resume needs


def failure_note(name: str) -> str:
    """Return the file of the matrix folder that says why a cell failed."""
    return f"failed/{name}.json"


def sweep_folder(cell: Cell) -> str | None:
    """Return the folder of the sweep that a cell needs; None if it needs none."""
    return f"sweeps/{cell.model}-{cell.method}" if len(cell.rates) > 1 else None


def shared_work(cell: Cell) -> set[str]:
    """Return what a cell may compute for others too: no two cells compute it at the same time."""
    work = {sweep_folder(cell)} - {None}
    if cell.recipe.recipe.distill is not None and cell.recipe.recipe.distill.cache is None:
        work.add("models/targets")
    return {str(name) for name in work}


def cell_job(
    layout: MatrixPlan, cell: Cell, out: Path, memory: int, *, far: bool, quiet: bool
) -> Job:
    """Return the process of a cell.

    Args:
        layout: The matrix.
        cell: One of its cells.
        out: The matrix folder.
        memory: Bytes that it may use; 0 where nobody knows what it needs.
        far: Whether it may run where the files of this machine are not.
        quiet: Print warnings and the last lines only.

    Raises:
        SlimError: If an input cannot be read.
    """
    mine, sweep = f"cells/{cell.name}", sweep_folder(cell)
    reads = [MATRIX_FILE, "questions"]
    reads += [f"{sweep}/sweep.json"] if sweep else []
    reads += [f"cells/{cell.parent}"] if cell.parent else []
    reads += [mine] if (out / mine / MANIFEST).exists() else []
    return Job(
        name=cell.name,
        words=("compare", "--only", cell.name, *(["--quiet"] if quiet else [])),
        memory=memory,
        inputs=tuple(dict.fromkeys(_inputs(layout, cell))) if far else (),
        reads=tuple(reads),
        writes=(mine, *([sweep] if sweep else [])),
        without=_SCRATCH,
        note=failure_note(cell.name),
        beside=cell.parent,
    )


def _inputs(layout: MatrixPlan, cell: Cell) -> Iterator[Input]:
    matrix, recipe = layout.matrix, cell.recipe.recipe
    source = matrix.models[cell.model].source
    if source != SMOLLM2_PACKAGE:
        yield from model_input(source)
    yield from task_inputs(entry.task for entry in matrix.tasks)
    if cell.kind == "tuned":
        yield from recipe_inputs(recipe)
