"""Records of a matrix folder: read as they are written, or refused with the field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import SCHEMA_VERSION, write_json
from mlx_slim.compare.records import (
    CellRecord,
    MatrixRecord,
    SweepRecord,
    TriedRate,
    as_json,
    read_record,
)
from mlx_slim.errors import SlimError
from tests.support.matrix import write_matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_matrix(tmp_path_factory.mktemp("matrix"))


def test_cells_and_the_matrix_are_read_whole(folder: Path) -> None:
    for file in folder.glob("cells/*/cell.json"):
        on_disk = json.loads(file.read_text())
        again = json.loads(json.dumps(as_json(read_record(file, CellRecord))))
        assert again == on_disk
    record = read_record(folder / "matrix.json", MatrixRecord)
    assert record.refused == [("toy0-qlroa", "no method 'qlroa': did you mean 'qlora'?")]
    assert record.omitted[0].why == "does not fit"
    assert record.models["toy0"].hub_id is None


def test_a_sweep_is_written_as_it_is_read(tmp_path: Path) -> None:
    rates = [TriedRate(1e-3, 2.5), TriedRate(1e-1, None)]
    record = SweepRecord(SCHEMA_VERSION, "toy", "lora", "3 epochs", 0, rates, 1e-3, {"0.001": "a"})
    write_json(tmp_path / "sweep.json", as_json(record))
    assert read_record(tmp_path / "sweep.json", SweepRecord) == record


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"disk": {"model": 1}}, "disk.adapter: Field required"),
        ({"train": [1]}, "train"),
        ({"kind": "boiled"}, "kind: Input should be 'base'"),
        ({"schema_version": 99}, "made by another version: schema_version 99, expected 1"),
    ],
)
def test_a_wrong_field_is_named(
    folder: Path, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    values = json.loads((folder / "cells/toy0-base/cell.json").read_text())
    write_json(tmp_path / "cell.json", {**values, **change})
    with pytest.raises(SlimError, match=text) as caught:
        read_record(tmp_path / "cell.json", CellRecord)
    assert str(tmp_path / "cell.json") in caught.value.message
