"""Which checkpoints stay, and what of a removal that was killed."""

from __future__ import annotations

from pathlib import Path

from mlx_slim.training.rotation import latest, path_of, remove_after, rotate, steps


def write(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path_of(folder, number).mkdir(parents=True)
        (path_of(folder, number) / "weights.safetensors").write_text("w")
        (path_of(folder, number) / "state.json").write_text("{}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_and_the_needed_stay(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 8, 10)
    rotate(tmp_path, 2, {4, 99})
    assert names(tmp_path) == {"step-4", "step-8", "step-10"}
    assert steps(tmp_path) == [4, 8, 10]
    assert latest(tmp_path) == tmp_path / "step-10"


def test_a_checkpoint_that_was_half_removed_goes_and_other_names_stay(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    (path_of(tmp_path, 2) / "state.json").unlink()
    (tmp_path / "step-best").mkdir()
    assert latest(tmp_path) == tmp_path / "step-4"
    rotate(tmp_path, 3, ())
    assert names(tmp_path) == {"step-4", "step-best"}


def test_later_checkpoints_go(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 10)
    remove_after(tmp_path, 4)
    assert names(tmp_path) == {"step-2", "step-4"}


def test_no_checkpoints(tmp_path: Path) -> None:
    rotate(tmp_path / "none", 3, ())
    assert latest(tmp_path / "none") is None
