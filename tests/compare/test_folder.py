"""Who may run a matrix in a folder: refused, held by one process, left when it cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim import locks
from mlx_slim.artifacts import write_json
from mlx_slim.claims import LOCK_FILE
from mlx_slim.cluster.jobs import Ended
from mlx_slim.compare import runner
from mlx_slim.compare.matrix import load_matrix
from mlx_slim.errors import Interrupted, SlimError
from tests.support.matrix_run import run_cells


def test_a_folder_that_is_none_or_another_matrix_is_refused(files: Path, tmp_path: Path) -> None:
    layout = load_matrix(str(files / "toy.yaml"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SlimError, match="holds no matrix"):
        runner.prepare(layout, other, False)
    (other / "notes.txt").unlink()
    for record, message in (({"schema_version": 5}, "another version"), ({}, "another version")):
        write_json(other / "matrix.json", record)
        with pytest.raises(SlimError, match=message):
            runner.prepare(layout, other, True)
    write_json(other / "matrix.json", {"schema_version": 1, "name": "else"})
    with pytest.raises(SlimError, match="holds the matrix 'else'"):
        runner.prepare(layout, other, True)
    assert [path.name for path in other.iterdir()] == ["matrix.json"]


def test_rows_that_are_not_there_leave_no_folder(files: Path) -> None:
    (files / "toy.jsonl").unlink()
    with pytest.raises(SlimError, match=r"toy\.jsonl"):
        runner.prepare(load_matrix(str(files / "toy.yaml")), files / "out", False)
    assert not (files / "out").exists()


def test_one_process_at_a_time_and_an_interruption_stops_everything(files: Path) -> None:
    layout = load_matrix(str(files / "toy.yaml"))
    todo, _ = runner.prepare(layout, files / "two", False)
    lock = locks.acquire(files / "two" / LOCK_FILE)
    assert lock is not None
    for held in (False, True):
        with pytest.raises(SlimError, match="--resume" if not held else "another process"):
            runner.prepare(layout, files / "two", held)
    lock.release()
    with pytest.raises(Interrupted, match="stopped in toy-base"):
        run_cells(todo, files / "two", lambda name: Ended(name, 130))
