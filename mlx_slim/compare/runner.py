"""Run a matrix: every cell in a process of its own, one after the other.

Invariant: a cell that fails, is killed or runs out of memory does not affect the others; only one
process runs a folder at a time; ``matrix.json`` records the requests before anything runs, so that
a report can be made from the cells that are complete. Try it: ``mlx-slim compare matrix-tiny -o
runs/tiny``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.children import exit_reason
from mlx_slim.compare import identity
from mlx_slim.compare.matrix import Cell, MatrixPlan
from mlx_slim.compare.predict import Line, plan
from mlx_slim.compare.questions import task_name, write_questions
from mlx_slim.compare.records import MatrixRecord, ModelRecord, OmittedCell, as_json
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


def prepare(layout: MatrixPlan, out: Path, resume: bool) -> list[Cell]:
    """Claim the folder, write ``matrix.json`` and the questions; return the cells to run.

    Raises:
        SlimError: If the folder holds something else, or another matrix.
        ResourceError: If the disk is full.
    """
    lines = {line.cell: line for line in plan(layout)}
    cells = [cell for cell in layout.cells if not lines[cell.name].why_not]
    with RunDir(out, MATRIX).claim(resume=resume, match=lambda: _check_same(out, layout)):
        questions = write_questions(layout.matrix, out / "questions")
        write_json(
            out / MATRIX_FILE, as_json(replace(_record(layout, cells, lines), **vars(questions)))
        )
    return cells


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
        provenance=identity.machine(),
    )


def run(
    cells: list[Cell],
    out: Path,
    launch: Callable[[Cell], tuple[int, str]],
    begun: Callable[[int, Cell], None],
) -> MatrixOutcome:
    """Run cells one after the other.

    Args:
        cells: In order.
        out: The matrix folder.
        launch: Runs one cell; returns its exit code (negative: killed by that signal) and its
            error in one line.
        begun: Called before each cell, with its number.

    Raises:
        Interrupted: If a cell was interrupted; what is complete stays.
    """
    ran = MatrixOutcome()
    began = time.monotonic()
    for number, cell in enumerate(cells, 1):
        begun(number, cell)
        code, why = launch(cell)
        note = out / "failed" / f"{cell.name}.json"
        if code == INTERRUPTED:
            raise Interrupted(f"stopped in {cell.name}; complete cells are kept")
        if code == 0 and (out / "cells" / cell.name / MANIFEST).exists():
            note.unlink(missing_ok=True)
            ran.complete.append(cell.name)
            continue
        reason = why or exit_reason(code)
        write_json(note, {"cell": cell.name, "reason": reason, "exit_code": code})
        ran.failed.append((cell.name, reason))
    ran.seconds = time.monotonic() - began
    return ran
