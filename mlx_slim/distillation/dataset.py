"""What a student learns from teachers that wrote text: rows in groups, each with its loss weight.

Invariant: the data's own answers are group 0 and teacher m's texts group m; each group's loss is a
mean over its own tokens, so a teacher that writes longer answers does not weigh more
(``distillation/loss_weights.py``). The rows are files in ``dataset/`` of the run folder and go
through the student's chat template like any other rows. ``dataset.json`` is written last: with it
the dataset is complete. Try it: ``mlx-slim distill tinyllm-openbookqa -o runs/try``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_slim.artifacts import atomic_folder, write_json
from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.schema import DataConfig, Recipe, SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.sources import Source
from mlx_slim.distillation.loss_weights import target_weights
from mlx_slim.distillation.queries import TeacherQuery, prefix_of
from mlx_slim.reading import JsonObject, library_errors, read_object, short

FOLDER, RECORD = "dataset", "dataset.json"
# mlx-slim 0.1 called it this, with the files in ``taught/``; a run that began so is resumed.
OLD_FOLDER, OLD_RECORD = "taught", "teaching.json"
_VALIDATION = "validation.jsonl"
# attribute of ``DatasetRecord`` -> key on disk, where they differ
_KEYS = {"rows_read": "rows_given", "validation_rows": "rows_held_out", "files": "parts"}


@dataclass(frozen=True)
class RowFile:
    """One source of training rows; an entry of ``parts`` in ``dataset.json``.

    Attributes:
        file: Path inside the run folder.
        group: 0 for the data's own answers, m for teacher m.
        weight: Of the source, as in ``data.path``.
        system: System message of the source.
    """

    file: str
    group: int
    weight: float
    system: str | None


@dataclass(frozen=True)
class DroppedResponses:
    """Responses of a teacher that are not used, for one reason.

    Attributes:
        count: How many.
        first: Row ids of the first few.
    """

    count: int
    first: list[str]


@dataclass(frozen=True)
class TeacherReport:
    """What one teacher contributed.

    Attributes:
        teacher: Its name.
        asked: Requests.
        used: Responses that the student learns from.
        edited: Of all responses, those that a person changed.
        prompts_cut: Prompts that were longer than the teacher's context.
        dropped: Reason → responses.
    """

    teacher: str
    asked: int
    used: int
    edited: int
    prompts_cut: int
    dropped: dict[str, DroppedResponses]


@dataclass(frozen=True)
class DatasetRecord:
    """``dataset.json``: what the dataset was made from; its presence means complete.

    Attributes:
        schema_version: Of this file.
        key: Hash of the settings that decide the rows.
        method: ``sequence`` or ``rationales``.
        rows_read: Rows of all sources.
        rows_dropped: Reason → rows.
        validation_rows: Rows that no teacher sees.
        rows_without_a_question: Training rows that make no request (plain text).
        answers: The file of responses.
        teachers: One report a teacher.
        files: Files of training rows; ``parts`` on disk.
        answers_sha256: Hash of the file of responses.
    """

    schema_version: int
    key: str
    method: str
    rows_read: int
    rows_dropped: dict[str, int]
    validation_rows: int
    rows_without_a_question: int
    answers: str
    teachers: list[TeacherReport]
    files: list[RowFile]
    answers_sha256: str

    def write(self, out: Path) -> None:
        """Write ``dataset.json`` into the run folder ``out``."""
        write_json(out / RECORD, {_KEYS.get(key, key): v for key, v in asdict(self).items()})


def read_record(out: Path) -> tuple[DatasetRecord, Path] | None:
    """Return the record in the run folder ``out`` and its file; None if there is none.

    A record of mlx-slim 0.1 (``teaching.json``) is read as well.

    Raises:
        SlimError: If it is damaged.
    """
    file = next((out / name for name in (RECORD, OLD_RECORD) if (out / name).is_file()), None)
    if file is None:
        return None
    values = read_object(file, key=str, answers_sha256=str, parts=list, teachers=list)
    with library_errors(f"{short(file)} is damaged", "remove it: it is made again"):
        teachers = []
        for entry in values["teachers"]:
            dropped = {why: DroppedResponses(**part) for why, part in entry["dropped"].items()}
            teachers.append(TeacherReport(**{**entry, "dropped": dropped}))
        renamed = {name: values.pop(key) for name, key in _KEYS.items()}
        files = [RowFile(**entry) for entry in renamed["files"]]
        return DatasetRecord(**{**values, **renamed, "teachers": teachers, "files": files}), file


@dataclass(frozen=True)
class DistillationDataset:
    """What the student trains on.

    Attributes:
        files: Sources, in the order of ``data.path``.
        loss_weights: Weight a_g of each group: ``distillation/loss_weights.py``.
        data: The recipe's data section, over ``files``.
        out: The run folder.
        teachers: What each teacher contributed.
        method: ``sequence`` or ``rationales``.
    """

    files: list[RowFile]
    loss_weights: list[float]
    data: DataConfig
    out: Path
    teachers: list[TeacherReport]
    method: str

    def find(self, config: SourceConfig) -> Source:
        """Return the source of one of ``files``, or of validation rows that stand elsewhere."""
        file = self.out / config.path
        return Source(config.path, "dataset", [file]) if file.is_file() else sources.find(config)

    def weights(self, prepared: Prepared) -> np.ndarray:
        """Return the weight of every training target, float32, as ``target_weights``."""
        used = [
            source.get("rows_after_splitting", source["rows_used"])
            for source in prepared.ledger["sources"]
        ]
        bounds = np.cumsum([0, *used])
        file_R = np.searchsorted(bounds, prepared.train.index, "right") - 1
        groups_R = np.array([file.group for file in self.files])[file_R]
        return target_weights(prepared.train.supervised, groups_R, self.loss_weights)


def dataset_from_record(record: DatasetRecord, recipe: Recipe, out: Path) -> DistillationDataset:
    """Return what the student trains on in the run folder ``out``."""
    config = recipe.distill
    assert config is not None
    files, weights = record.files, [teacher.weight for teacher in config.teachers]
    if record.method == "rationales":
        loss_weights = [1.0, *weights]
    else:
        scale = config.weight
        loss_weights = [1 - scale, *(scale * weight / sum(weights) for weight in weights)]
    path = [SourceConfig(path=f.file, weight=f.weight, system=f.system) for f in files]
    validation: float | int | str = recipe.data.validation
    if not isinstance(validation, str):
        folder = Path(files[0].file).parent if files else Path(FOLDER)
        validation = (folder / _VALIDATION).as_posix() if record.validation_rows else 0.0
    changes = {
        "path": path,
        "format": "auto",
        "columns": {},
        "max_rows": None,
        "validation": validation,
    }
    data = recipe.data.model_copy(update=changes)
    return DistillationDataset(files, loss_weights, data, out, record.teachers, record.method)


def write_dataset(
    recipe: Recipe,
    method: str,
    out: Path,
    queries: Sequence[TeacherQuery],
    validation: set[int],
    asking: Sequence[TeacherQuery],
    texts: Sequence[Sequence[str | None]],
) -> list[RowFile]:
    """Write the rows of each source and group into ``dataset/``; return the files.

    Args:
        recipe: With a ``distill`` section.
        method: ``sequence`` or ``rationales``.
        out: The run folder.
        queries: All usable rows.
        validation: Numbers of the validation rows among them.
        asking: The rows that were sent to the teachers.
        texts: For each teacher, its response to each of them; None where it is not used.
    """
    distill = recipe.distill
    assert distill is not None
    rows: dict[tuple[int, int], list[JsonObject]] = {}
    if method == "rationales" or distill.weight < 1:
        for i, query in enumerate(queries):
            if i not in validation:
                rows.setdefault((query.source, 0), []).append(query.row())
    if method == "rationales" or distill.weight > 0:
        prefixes = _prefixes(distill, method)
        for number, (responses, prefix) in enumerate(zip(texts, prefixes, strict=True), 1):
            for query, text in zip(asking, responses, strict=True):
                if text is not None:
                    row = query.row(text, prefix(query))
                    rows.setdefault((query.source, number), []).append(row)
    files = []
    with atomic_folder(out / FOLDER, replace=True) as folder:
        for (source, group), lines in sorted(rows.items()):
            name = f"{source}-{_group_name(group, distill)}.jsonl"
            _write_rows(folder / name, lines)
            config = recipe.data.sources[source]
            files.append(RowFile(f"{FOLDER}/{name}", group, config.weight, config.system))
        if validation:
            _write_rows(folder / _VALIDATION, [queries[i].row() for i in sorted(validation)])
    return files


def _prefixes(distill: DistillConfig, method: str) -> list[Callable[[TeacherQuery], str]]:
    """Return what stands before the question in the rows of each teacher."""
    if method != "rationales":
        return [lambda _: "" for _ in distill.teachers]
    templates = [prefix_of(t.prefix, number) for number, t in enumerate(distill.teachers, 1)]
    return [
        lambda query, template=template: query.render(template, "distill.teachers.prefix")
        for template in templates
    ]


def _group_name(group: int, distill: DistillConfig) -> str:
    if not group:
        return "data"
    label = distill.teachers[group - 1].name or distill.teachers[group - 1].model or "teacher"
    label = label.rstrip("/").rsplit("/", 1)[-1]
    return f"{group}-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _write_rows(file: Path, rows: Sequence[JsonObject]) -> None:
    with file.open("w", encoding="utf-8", errors="replace") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
