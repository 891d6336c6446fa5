"""The files of a matrix, read back: manifests, results, and one bit a question.

Invariant: a cell counts only with its manifest, which is written last; every vector of right and
wrong answers comes from the stored per-question files, so every published number can be made again.
A file that cannot be used excludes its cell only, with one line. Try it: ``mlx-slim report DIR``.

Folder: ``matrix.json``, ``questions/<task>.jsonl`` (the questions), ``cells/<name>/cell.json``
(the manifest) with ``run/`` (training) and ``eval/<task>/`` (scores), ``sweeps/<model>-<method>/``
(``sweep.json``), ``failed/<name>.json`` (why a cell is missing).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mlx_slim.artifacts import SCHEMA_VERSION, read_records
from mlx_slim.compare.records import CellRecord, Kind, MatrixRecord, SweepRecord, read_record
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.records import TaskSection
from mlx_slim.evaluation.results import check_sample
from mlx_slim.evaluation.tasks.metrics import counted
from mlx_slim.reading import field, library_errors, read_object, short

AGAIN = "run the matrix again with --resume"

MANIFEST = "cell.json"
MATRIX_FILE = "matrix.json"


@dataclass
class Answers:
    """One cell's answers to one task.

    Attributes:
        section: The task's part of ``results.json``.
        samples: The per-question file.
        doc_ids_N: Row numbers.
        right_N: metric -> 0/1 for each question.
        subjects_N: Index into ``subjects``; None for a task without subjects.
        subjects: Names of the subjects.
        chance: Fraction that guessing gets right; 0 for free answers.
        unextracted: Generations in which a filter found no answer, by filter.
        stopped: How generations ended, counted.
    """

    section: TaskSection
    samples: Path
    doc_ids_N: np.ndarray
    right_N: dict[str, np.ndarray]
    subjects_N: np.ndarray | None = None
    subjects: list[str] = dataclasses.field(default_factory=list)
    chance: float = 0.0
    unextracted: dict[str, int] = dataclasses.field(default_factory=dict)
    stopped: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.doc_ids_N)


@dataclass
class StoredCell:
    """A complete cell: its manifest and its answers by task."""

    folder: Path
    record: CellRecord
    answers: dict[str, Answers] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the cell."""
        return self.record.name

    @property
    def model(self) -> str:
        """Key of the matrix's models."""
        return self.record.model

    @property
    def method(self) -> str:
        """Key of the matrix's methods."""
        return self.record.method

    @property
    def kind(self) -> Kind:
        """Of the method."""
        return self.record.kind

    @property
    def seed(self) -> int | None:
        """Of training; None where nothing is trained."""
        return self.record.seed


@dataclass
class StoredMatrix:
    """A matrix on disk.

    Attributes:
        folder: Of the matrix.
        record: ``matrix.json``.
        cells: Complete ones, in the order of the matrix.
        failed: (cell, one line) of the others.
        sweeps: ``sweep.json`` of each sweep.
    """

    folder: Path
    record: MatrixRecord
    cells: list[StoredCell]
    failed: list[tuple[str, str]]
    sweeps: list[SweepRecord]


def load(folder: Path) -> StoredMatrix:
    """Read a matrix folder.

    Raises:
        SlimError: If it is none, or was made by another version of mlx-slim's format.
    """
    file = folder / MATRIX_FILE
    if not file.is_file():
        raise SlimError(f"{folder} holds no {MATRIX_FILE}", "give the folder that compare wrote")
    record = read_record(file, MatrixRecord)
    stored = StoredMatrix(folder, record, [], list(record.refused), [])
    for name in (Path(name).name for name in record.cells):
        cell = _cell_or_why(folder, name)
        if isinstance(cell, str):
            stored.failed.append((name, cell))
        else:
            stored.cells.append(cell)
    for path in sorted(folder.glob("sweeps/*/sweep.json")):
        if read_object(path).get("schema_version") == SCHEMA_VERSION:
            stored.sweeps.append(read_record(path, SweepRecord))
    return stored


def _cell_or_why(folder: Path, name: str) -> StoredCell | str:
    """Return a cell, or in one line why there is none."""
    try:
        return load_cell(folder / "cells" / name)
    except SlimError as error:
        file = folder / "failed" / f"{name}.json"
        if file.is_file() and not (folder / "cells" / name / MANIFEST).exists():
            return str(read_object(file)["reason"])
        return error.message


def load_cell(folder: Path) -> StoredCell:
    """Read one cell: its manifest and every answer.

    Raises:
        SlimError: If it is not complete, is damaged, or was made by another version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise SlimError("not run")
    cell = StoredCell(folder, read_record(file, CellRecord))
    with library_errors(f"{short(file)} is damaged", AGAIN):
        for task in cell.record.tasks:
            cell.answers[task] = load_answers(folder / "eval" / task, task)
    return cell


def task_section(out: Path, task: str) -> TaskSection:
    """Return a task's section of ``results.json``.

    Raises:
        SlimError: If it is missing or damaged.
    """
    path = out / "results.json"
    sections = field(read_object(path), short(path), "tasks", dict, of=dict)
    if task not in sections:
        raise SlimError(f"{path} has no task {task}")
    return TaskSection.read(sections[task], f"{short(path)}: {task}")


def load_answers(out: Path, task: str) -> Answers:
    """Read the answers of one evaluation.

    Raises:
        SlimError: If a file is missing or damaged, or holds another number of questions.
    """
    section = task_section(out, task)
    path = out / f"samples_{task}.jsonl"
    names = list(section.metrics)
    doc_ids: list[int] = []
    right: dict[str, bytearray] = {}
    subjects: dict[str, int] = {}
    where: list[int] = []
    records = read_records(path)
    first = next(records, {})
    right = {name: bytearray() for name in (counted(names, first) if first else ())}
    choices: Counter[int] = Counter()
    filters = [name.removesuffix("_match") for name in names if name.endswith("_match")]
    unextracted = {name: 0 for name in filters if name in first}
    stopped: Counter[str] = Counter()
    for number, record in enumerate(chain([first] if first else [], records), 1):
        check_sample(record, f"{short(path)}, line {number}", right)
        doc_ids.append(record["doc_id"])
        for name, column in right.items():
            column.append(record[name])
        if "subject" in record and (subject := record["subject"]) is not None:
            where.append(subjects.setdefault(subject, len(subjects)))
        if "loglikelihoods" in record:
            choices[len(record["loglikelihoods"])] += 1
        if "stop_reason" in record:
            stopped[record["stop_reason"]] += 1
            for name in unextracted:
                unextracted[name] += record[name] in (None, "", "[invalid]")
    if len(doc_ids) != (n := section.questions.n):
        raise SlimError(f"{path} holds {len(doc_ids)} questions, results.json says {n}")
    return Answers(
        section=section,
        samples=path,
        doc_ids_N=np.array(doc_ids, dtype=np.int32),
        right_N={name: np.frombuffer(bytes(c), dtype=np.uint8) for name, c in right.items()},
        subjects_N=np.array(where, dtype=np.int16) if where else None,
        subjects=list(subjects),
        chance=sum(count / many for many, count in choices.items()) / max(1, len(doc_ids)),
        unextracted=unextracted,
        stopped=dict(stopped),
    )
