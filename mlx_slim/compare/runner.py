"""Run a matrix: every cell in a process of its own, one after the other or several at a time.

Invariant: a cell that fails, is killed or runs out of memory does not affect the others; only one
process runs a folder at a time; ``matrix.json`` records the requests before anything runs, so that
a report can be made from the cells that are complete. Try it: ``mlx-slim compare matrix-tiny -o
runs/tiny``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.children import exit_reason
from mlx_slim.cluster.jobs import Ended, Job, Pool
from mlx_slim.cluster.machines import machine
from mlx_slim.compare import identity
from mlx_slim.compare.cell_job import failure_note, shared_work
from mlx_slim.compare.matrix import Cell, MatrixPlan, expand
from mlx_slim.compare.matrix_spec import MatrixSpec
from mlx_slim.compare.predict import Line, plan
from mlx_slim.compare.questions import task_name, write_questions
from mlx_slim.compare.records import (
    MatrixRecord,
    ModelRecord,
    OmittedCell,
    as_json,
    read_record,
)
from mlx_slim.compare.store import MANIFEST, MATRIX_FILE
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.models.hub import SMOLLM2_PACKAGE
from mlx_slim.reading import read_object
from mlx_slim.run_dir import RunDir, RunKind

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
INTERRUPTED = Interrupted.exit_code
MATRIX = RunKind("compare", "matrix", MATRIX_FILE, ("questions",))


@dataclass
class MatrixOutcome:
    """How a matrix ended.

    Attributes:
        complete: Cells with a manifest.
        failed: (cell, one line).
        seconds: Wall time.
    """

    complete: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def prepare(
    layout: MatrixPlan, out: Path, resume: bool, budget: int | None = None
) -> tuple[list[Cell], dict[str, Line]]:
    """Claim the folder, write ``matrix.json`` and the questions; return the cells and their plans.

    Args:
        layout: The matrix.
        out: Its folder.
        resume: Whether it may hold the matrix already.
        budget: Bytes that a cell may use, as for ``plan``.

    Raises:
        SlimError: If the folder holds something else, or another matrix.
        ResourceError: If the disk is full.
    """
    lines = {line.cell: line for line in plan(layout, budget)}
    cells = [cell for cell in layout.cells if not lines[cell.name].why_not]
    with RunDir(out, MATRIX).claim(resume=resume, match=lambda: _check_same(out, layout)):
        questions = write_questions(layout.matrix, out / "questions")
        write_json(
            out / MATRIX_FILE, as_json(replace(_record(layout, cells, lines), **vars(questions)))
        )
    return cells, lines


def stored_layout(out: Path) -> MatrixPlan:
    """Return the matrix of a prepared folder, as it was when it was prepared.

    Raises:
        SlimError: If it is not prepared, or was by a version that did not store the matrix.
    """
    if not (out / MATRIX_FILE).exists():
        raise SlimError(f"{out} is not prepared", "run the matrix without --only first")
    record = read_record(out / MATRIX_FILE, MatrixRecord)
    if record.matrix is None:
        raise SlimError(
            f"{out} was prepared by another version of mlx-slim",
            "run the whole matrix again with --resume",
        )
    return expand(MatrixSpec.model_validate(record.matrix), record.name)


def _check_same(out: Path, layout: MatrixPlan) -> None:
    stored = read_object(out / MATRIX_FILE)
    if stored.get("schema_version") != SCHEMA_VERSION:
        raise SlimError(
            f"{out} was made by another version (schema {stored.get('schema_version')!r})",
            "choose another output folder",
        )
    if stored.get("name") != layout.name:
        raise SlimError(
            f"{out} holds the matrix {stored.get('name')!r}, not {layout.name!r}",
            "choose another output folder",
        )


def _record(layout: MatrixPlan, cells: list[Cell], lines: dict[str, Line]) -> MatrixRecord:
    matrix = layout.matrix
    omitted = [OmittedCell(*item) for item in layout.omitted]
    omitted += [
        OmittedCell(cell.model, cell.method, lines[cell.name].why_not)
        for cell in layout.cells
        if lines[cell.name].why_not
    ]
    return MatrixRecord(
        schema_version=SCHEMA_VERSION,
        name=layout.name,
        title=matrix.title,
        note=matrix.note,
        matrix=matrix.model_dump(mode="json"),
        models={
            name: ModelRecord(
                entry.source,
                entry.revision,
                SMOLLM2 if entry.source == SMOLLM2_PACKAGE else None,
            )
            for name, entry in matrix.models.items()
        },
        methods=list(matrix.methods),
        tasks=[task_name(entry.task) for entry in matrix.tasks],
        cells=[cell.name for cell in cells],
        refused=list(layout.refused),
        omitted=list(dict.fromkeys(omitted)),
        code=identity.code_version(),
        provenance=machine(),
    )


def run(
    cells: list[Cell],
    out: Path,
    pool: Pool,
    job_of: Callable[[Cell], Job],
    begun: Callable[[int, Cell], None],
) -> MatrixOutcome:
    """Run cells, each as soon as those that it starts from have ended and the pool is free.

    Args:
        cells: In order; a parent stands before its children.
        out: The matrix folder.
        pool: Runs their processes.
        job_of: Returns the process of a cell.
        begun: Called before each cell, with its number.

    Raises:
        Interrupted: If a cell was interrupted; what is complete stays.
    """
    ran, began = MatrixOutcome(), time.monotonic()
    waiting, running = list(cells), {}
    while waiting or running:
        while pool.free and (cell := _next(waiting, list(running.values()))) is not None:
            waiting.remove(cell)
            begun(1 + cells.index(cell), cell)
            running[cell.name] = cell
            pool.start(job_of(cell))
        try:
            ended = pool.wait()
        except Interrupted as error:
            where = ", ".join(running)
            raise Interrupted(f"stopped in {where}; complete cells are kept") from error
        cell = running.pop(ended.name)
        if ended.code == INTERRUPTED:
            raise Interrupted(f"stopped in {cell.name}; complete cells are kept")
        _record_end(ended, cell, out, ran)
    ran.seconds = time.monotonic() - began
    return ran


def _next(waiting: list[Cell], running: list[Cell]) -> Cell | None:
    """Return the first cell that may start now: its parent has ended, no one does work of its."""
    unfinished = {cell.name for cell in (*waiting, *running)}
    taken = {work for cell in running for work in shared_work(cell)}
    for cell in waiting:
        if cell.parent not in unfinished and not taken & shared_work(cell):
            return cell
    return None


def _record_end(ended: Ended, cell: Cell, out: Path, ran: MatrixOutcome) -> None:
    """Note how a cell ended: in the outcome, and a failure in a file."""
    note, manifest = out / failure_note(cell.name), out / "cells" / cell.name / MANIFEST
    code, why = ended.code, ended.why
    if code == 0 and manifest.exists():
        why = _other_weights(cell, out, ran.complete)
        if not why:
            note.unlink(missing_ok=True)
            ran.complete.append(cell.name)
            return
        manifest.unlink()
    elif not why and note.exists():
        why = str(read_object(note)["reason"])
    reason = why or exit_reason(code)
    write_json(note, {"cell": cell.name, "reason": reason, "exit_code": code})
    ran.failed.append((cell.name, reason))


def _other_weights(cell: Cell, out: Path, complete: Sequence[str]) -> str:
    """Return a line where two workers have other weights under one name; empty otherwise.

    ``complete``: cells of this run; what an earlier one left may be of other weights.
    """
    hashes = {
        name: str(read_object(file)["weights_sha256"])
        for name in (*complete, cell.name)
        if read_object(file := out / "cells" / name / MANIFEST)["model"] == cell.model
    }
    mine = hashes.pop(cell.name)
    other = next((name for name, value in hashes.items() if value != mine), None)
    if other is None:
        return ""
    return (
        f"the weights of {cell.model} are {mine[:12]}… where it ran, and {hashes[other][:12]}… in "
        f"{other}: set models.{cell.model}.revision, or copy the same files to all machines"
    )
