"""What a student learns from teachers that wrote text: rows in groups, each with its weight.

Invariant: the data's own answers are group 0 and teacher m's texts group m; each group's loss is a
mean over its own tokens, so a teacher that writes longer answers does not weigh more
(``distillation/loss_weights.py``). The rows are files in ``dataset/`` of the run folder and go
through the student's chat template like any other rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.artifacts import atomic_folder
from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.schema import DataConfig, Recipe, SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.sources import Source
from mlx_slim.distillation.loss_weights import target_weights
from mlx_slim.distillation.queries import TeacherQuery, prefix_of

FOLDER = "taught"
_HELD_OUT = f"{FOLDER}/validation.jsonl"


@dataclass(frozen=True)
class Part:
    """One source of taught rows.

    Attributes:
        file: Inside the run folder.
        group: 0 for the data's own answers, m for teacher m.
        weight: Of the source.
        system: System message of the source.
    """

    file: str
    group: int
    weight: float
    system: str | None


@dataclass(frozen=True)
class DistillationDataset:
    """What the student trains on.

    Attributes:
        parts: Sources, in the order of ``data.path``.
        shares: Weight a_g of each group: ``distillation/loss_weights.py``.
        data: The recipe's data section, over ``parts``.
        out: The run folder.
        report: ``teaching.json``.
    """

    parts: list[Part]
    loss_weights: list[float]
    data: DataConfig
    out: Path
    report: dict[str, Any]

    def find(self, config: SourceConfig) -> Source:
        """Find one of the taught files."""
        file = self.out / config.path
        return Source(config.path, "taught", [file]) if file.is_file() else sources.find(config)

    def weights(self, prepared: Prepared) -> np.ndarray:
        """Return the weight of every training target, float32, as ``target_weights``."""
        used = [source["rows_used"] for source in prepared.ledger["sources"]]
        bounds = np.cumsum([0, *used])
        part_R = np.searchsorted(bounds, prepared.train.index, "right") - 1
        groups_R = np.array([part.group for part in self.parts])[part_R]
        return target_weights(prepared.train.supervised, groups_R, self.loss_weights)


def dataset_from_record(record: dict[str, Any], recipe: Recipe, out: Path) -> DistillationDataset:
    """Return what the student trains on, from ``teaching.json``."""
    config = recipe.distill
    assert config is not None
    parts = [Part(**part) for part in record["parts"]]
    teacher_weights = [teacher.weight for teacher in config.teachers]
    if record["method"] == "rationales":
        loss_weights = [1.0, *teacher_weights]
    else:
        loss_weights = [
            1 - config.weight,
            *(config.weight * weight / sum(teacher_weights) for weight in teacher_weights),
        ]
    path = [SourceConfig(path=p.file, weight=p.weight, system=p.system) for p in parts]
    validation: Any = recipe.data.validation
    if not isinstance(validation, str):
        validation = _HELD_OUT if record["rows_held_out"] else 0.0
    data = recipe.data.model_copy(
        update={
            "path": path,
            "format": "auto",
            "columns": {},
            "max_rows": None,
            "validation": validation,
        }
    )
    return DistillationDataset(parts, loss_weights, data, out, record)


def write_dataset(
    recipe: Recipe,
    method: str,
    out: Path,
    queries: Sequence[TeacherQuery],
    held_out: set[int],
    asking: Sequence[TeacherQuery],
    texts: Sequence[Sequence[str | None]],
) -> list[dict[str, Any]]:
    """Write the rows of each source and group; return the parts.

    Args:
        recipe: With a ``distill`` section.
        method: ``sequence`` or ``rationales``.
        out: The run folder.
        queries: All usable rows.
        held_out: Numbers of those that no one learns from.
        asking: The rows that teachers were asked about.
        texts: Of each teacher, its answer to each of them; None for one that is not used.
    """
    distill = recipe.distill
    assert distill is not None
    files: dict[tuple[int, int], list[dict[str, Any]]] = {}
    if method == "rationales" or distill.weight < 1:
        for i, query in enumerate(queries):
            if i not in held_out:
                files.setdefault((query.source, 0), []).append(query.row())
    prefixes: list[Callable[[TeacherQuery], str]] = []
    for number, teacher in enumerate(distill.teachers, 1):
        template = prefix_of(teacher.prefix, number)
        prefixes.append(
            (lambda query, t=template: query.render(t, "distill.teachers.prefix"))
            if method == "rationales"
            else lambda _: ""
        )
    if method == "rationales" or distill.weight > 0:
        for number, (own, prefix) in enumerate(zip(texts, prefixes, strict=True), 1):
            for query, text in zip(asking, own, strict=True):
                if text is not None:
                    row = query.row(text, prefix(query))
                    files.setdefault((query.source, number), []).append(row)
    parts = []
    with atomic_folder(out / FOLDER, replace=True) as folder:
        for (source, group), rows in sorted(files.items()):
            name = f"{source}-{_group_name(group, distill)}.jsonl"
            _write_rows(folder / name, rows)
            config = recipe.data.sources[source]
            parts.append(
                {
                    "file": f"{FOLDER}/{name}",
                    "group": group,
                    "weight": config.weight,
                    "system": config.system,
                }
            )
        if held_out:
            rows = [queries[i].row() for i in sorted(held_out)]
            _write_rows(folder / Path(_HELD_OUT).name, rows)
    return parts


def _group_name(group: int, distill: DistillConfig) -> str:
    if not group:
        return "data"
    label = distill.teachers[group - 1].name or distill.teachers[group - 1].model or "teacher"
    label = label.rstrip("/").rsplit("/", 1)[-1]
    return f"{group}-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", errors="replace") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
