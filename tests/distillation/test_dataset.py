"""The record of a distillation dataset: written, read back, and as mlx-slim 0.1 named it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.distillation.dataset import (
    OLD_RECORD,
    RECORD,
    DatasetRecord,
    DroppedResponses,
    RowFile,
    TeacherReport,
    dataset_from_record,
    read_record,
)
from mlx_slim.errors import SlimError


def record(folder: str = "dataset") -> DatasetRecord:
    return DatasetRecord(
        schema_version=1,
        key="k",
        method="sequence",
        rows_read=10,
        rows_dropped={"too long": 1},
        validation_rows=2,
        rows_without_a_question=0,
        answers="answers.jsonl",
        teachers=[TeacherReport("t", 7, 6, 0, 0, {"empty": DroppedResponses(1, ["a"])})],
        files=[RowFile(f"{folder}/0-1-t.jsonl", 1, 1.0, None)],
        answers_sha256="h",
    )


@pytest.mark.parametrize("name", [RECORD, OLD_RECORD])
def test_a_record_is_read_back_under_both_names(tmp_path: Path, name: str) -> None:
    assert read_record(tmp_path) is None
    record().write(tmp_path)
    (tmp_path / RECORD).rename(tmp_path / name)
    values = json.loads((tmp_path / name).read_text())
    assert (values["rows_given"], values["rows_held_out"]) == (10, 2)
    assert read_record(tmp_path) == (record(), tmp_path / name)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    record().write(tmp_path)
    values = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**values, "parts": [{"file": "x"}]}))
    with pytest.raises(SlimError, match=r"dataset\.json is damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("folder", ["dataset", "taught"])
def test_validation_rows_stand_beside_the_files(tmp_path: Path, folder: str) -> None:
    distill = {"method": "sequence", "weight": 0.5, "teachers": [{"model": "m"}]}
    recipe = from_values({"model": "m", "data": {"path": "x"}, "distill": distill}, "a", "b").recipe
    dataset = dataset_from_record(record(folder), recipe, tmp_path)
    assert dataset.data.validation == f"{folder}/validation.jsonl"
    assert dataset.loss_weights == [0.5, 0.5]
